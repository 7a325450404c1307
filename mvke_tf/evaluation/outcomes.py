# SPDX-License-Identifier: Apache-2.0
"""What was predicted for the rows of one part of the data, and what came of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import DataError


@dataclasses.dataclass(frozen=True)
class Given:
    """What was predicted given the event that comes before a task.

    Args:
        task: Name of the task of that event.
        rows: `(n,)` bool, the rows in which it happened, of those that count.
        values: `(n,)` float64, predicted probabilities given the event where the model has them, else unconditional.
    """

    task: str
    rows: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One task on all rows of a part, in their order.

    Args:
        task: Name of the task.
        kind: One of `mvke_tf.schema.TASK_KINDS`.
        labels: `(n,)` float64, in the unit of the label; means nothing where a row does not count.
        values: `(n,)` float64, predicted probabilities, or values in the unit of the label; of a multi-class task
            `(n, C)`, probabilities.
        counts: `(n,)` bool, which rows count for the task: those with a label that `where` takes. Each counts once,
            whatever its weight in training.
        given: The same given the event that is declared to come first; None of a task without.
    """

    task: str
    kind: str
    labels: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    given: Given | None = None


def outcomes(
    predicted: Mapping[str, np.ndarray],
    conditional: Mapping[str, np.ndarray],
    kinds: Mapping[str, str],
    prepared: PreparedDataset,
    part: str,
) -> tuple[Outcome, ...]:
    """What was predicted, beside what came of it.

    Args:
        predicted: `{task: (n,)}`, in the order of `prepared.part_rows(part)`: probabilities, or values of a regression
            in the unit of the label; of a multi-class task `(n, C)`.
        conditional: `{task: (n,)}`, probabilities given the event before the task, where `predicted` has others.
        kinds: `{task: kind}`.
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.

    Raises:
        ConfigError: If there is no such part or task.
        DataError: If the part has no rows.
        ValueError: If there is another number of predictions than rows.
    """
    rows = part_rows(prepared, part)
    found = []
    for task, values in predicted.items():
        if np.shape(values)[:1] != rows.shape or np.ndim(values) != 1 + (kinds[task] == "multiclass"):
            raise ValueError(
                f"Expected a prediction of task {task!r} for each of the {len(rows):,} rows of the {part} part. "
                f"Received: shape {np.shape(values)}"
            )
        labels = prepared.of_part(part, functools.partial(PreparedDataset.label, task=task)).astype(np.float64)
        counts = prepared.of_part(part, functools.partial(PreparedDataset.weight, task=task)) > 0
        declared = prepared.dataset.task(task)
        if declared.transform == "log1p":
            labels = np.expm1(labels)
        given = None
        if declared.given is not None:
            event = counts & prepared.of_part(part, functools.partial(PreparedDataset.event, task=declared.given))
            given = Given(declared.given, event, np.asarray(conditional.get(task, values), np.float64))
        found.append(Outcome(task, kinds[task], labels, np.asarray(values, np.float64), counts, given))
    return tuple(found)


def part_rows(prepared: PreparedDataset, part: str) -> np.ndarray:
    """Positions of the interactions of one part.

    Raises:
        ConfigError: If there is no such part.
        DataError: If it has no rows.
    """
    rows = prepared.part_rows(part)
    if not len(rows):
        raise DataError(
            f"The {part} part of {prepared.dataset.name} has no rows. Choose another part, or another [split]."
        )
    return rows
