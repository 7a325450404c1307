# SPDX-License-Identifier: Apache-2.0
"""What a model predicts of pairs, from the vectors of their distinct users and items."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from mvke_tf.data.batches import Interactions, Shards
from mvke_tf.inference.vectors import TILE_ROWS, Vectors, slices, vectors_of
from mvke_tf.layers import LogitMap
from mvke_tf.models import TwoTowerModel

# Bounds of memory: vectors of so many bytes are held for each side, and pairs are multiplied so many at a time.
HELD_BYTES = 1 << 30
PAIRS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions for pairs, in their order.

    Args:
        values: `{task: (n,)}` float64: probabilities of binary tasks, values of regression tasks and rates of count
            tasks in the unit of their labels; `(n, C)` probabilities of the classes of multi-class tasks.
        conditional: `{task: (n,)}` float64, of the tasks in `model.given`: probabilities given the event before.
    """

    values: dict[str, np.ndarray]
    conditional: dict[str, np.ndarray]


def predict(model: TwoTowerModel, interactions: Interactions | Shards, batch: int = TILE_ROWS) -> Predictions:
    """Predictions for all pairs, in one pass.

    Each tower runs once per distinct user or item, and a pair costs an inner product, in float32 as in the model; so
    results equal those of the model on the pairs.

    Args:
        model: A two-tower model.
        interactions: The pairs; labels and weights are not read.
        batch: Rows per step of a tower; another number may change the last bit.

    Raises:
        DataError: If a feature is missing.
        MvkeError: If an output is NaN or infinite.
    """
    classes = {task: (len(names),) for task, names in model.classes.items()}
    values = {task: np.empty((len(interactions), *classes.get(task, ()))) for task in model.task_names}
    conditional = {task: np.empty(len(interactions)) for task in model.given}
    if isinstance(interactions, Shards):
        end = 0
        for piece in interactions.pieces():
            start, end = end, end + len(piece)
            predicted = predict(model, piece, batch)
            for whole, part in ((values, predicted.values), (conditional, predicted.conditional)):
                for task, column in part.items():
                    whole[task][start:end] = column
        return Predictions(values, conditional)
    class_vectors = {task: vectors.T for task, (vectors, _) in model.class_weights.items()}
    items, item_rows = _Items(model, interactions, batch), np.asarray(interactions.item_rows)
    for pairs, users, user_rows in _by_user(model, interactions, batch):
        for some in slices(len(pairs), PAIRS):
            vectors, rows = items.of(item_rows[pairs[some]])
            met = {task: users[task][user_rows[some]] * vectors[task][rows] for task in model.task_names}
            products = {
                task: each @ class_vectors[task] if task in class_vectors else np.sum(each, axis=1)
                for task, each in met.items()
            }
            joint = model.outputs_of_products(products)
            given = model.outputs_of_products(products, conditional=True) if conditional else {}
            for task in values:
                values[task][pairs[some]] = _prediction(model, task, joint[task], model.calibration.get(task))
            for task in conditional:
                conditional[task][pairs[some]] = _prediction(model, task, given[task])
    return Predictions(values, conditional)


def outputs_of(model: keras.Model, features: Any, batch: int = TILE_ROWS) -> Any:
    """The outputs of a model that is no two-tower model, in NumPy and in their structure.

    Args:
        model: The model.
        features: What it takes, `(n, ...)` each.
        batch: Rows per step.
    """
    return model.predict(features, batch_size=batch, verbose=0)


def _by_user(
    model: TwoTowerModel, interactions: Interactions, batch: int
) -> Iterator[tuple[np.ndarray, Vectors, np.ndarray]]:
    """Pairs by user, so many that their users' vectors can be held: pairs, vectors, and the vector of each pair."""
    tower, user_rows = model.user_tower, np.asarray(interactions.user_rows)
    distinct, inverse = np.unique(user_rows, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(distinct) + 1))
    for block in slices(len(distinct), _held_rows(tower)):
        pairs = order[starts[block.start] : starts[block.stop]]
        yield pairs, vectors_of(tower, interactions.users, distinct[block], batch), inverse[pairs] - block.start


class _Items:
    """The vectors of items: all at once where they can be held, else those of the pairs at hand."""

    def __init__(self, model: TwoTowerModel, interactions: Interactions, batch: int) -> None:
        self._tower, self._table, self._batch = model.item_tower, interactions.items, batch
        self._distinct = np.unique(interactions.item_rows)
        held = len(self._distinct) <= _held_rows(self._tower)
        self._vectors = vectors_of(self._tower, self._table, self._distinct, batch) if held else None

    def of(self, item_rows: np.ndarray) -> tuple[Vectors, np.ndarray]:
        """Vectors, and the vector of each pair."""
        if self._vectors is not None:
            return self._vectors, np.searchsorted(self._distinct, item_rows)
        distinct, inverse = np.unique(item_rows, return_inverse=True)
        return vectors_of(self._tower, self._table, distinct, self._batch), inverse


def _held_rows(tower: keras.Model) -> int:
    width = sum(symbol.shape[-1] for symbol in tower.output.values())
    return max(1, HELD_BYTES // (4 * width))


def _prediction(model: TwoTowerModel, task: str, output: Any, calibration: LogitMap | None = None) -> np.ndarray:
    """`model.predictions` in float64, which not every backend has."""
    output = ops.convert_to_numpy(output).astype(np.float64)
    if calibration is not None:
        output = calibration(output, np)
    if model.kinds[task] == "binary":
        return np.exp(-np.logaddexp(0.0, -output))
    if model.kinds[task] == "multiclass":
        odds = np.exp(output - output.max(axis=-1, keepdims=True))
        return odds / odds.sum(axis=-1, keepdims=True)
    if model.kinds[task] == "count":
        return np.exp(output)
    return output if model.transforms[task] is None else np.expm1(output)
