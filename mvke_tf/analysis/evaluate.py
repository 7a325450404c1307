"""Metrics of every task of a model on a dataset, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import keras
import numpy as np
from keras import ops

from mvke_tf.analysis.study import BATCH_SIZE, as_pairs, known_labels
from mvke_tf.data.dataset import Batches
from mvke_tf.metrics import binary_metrics, regression_metrics
from mvke_tf.models.two_tower import predictions, task_kinds, task_names

if TYPE_CHECKING:
    import tensorflow as tf

Metrics = dict[str, dict[str, float | int | None]]


def evaluate_multitask_model(
    model: keras.Model,
    dataset: object,
    user_feature: str = "user_id",
    batch_size: int = BATCH_SIZE,
    kinds: Mapping[str, str] | None = None,
) -> Metrics:
    """Metrics of every task of a model.

    Args:
        model: A built or loaded two-tower model; with `kinds` any model of `{task: (B, 1)}`, logits of binary tasks and
            values of regression tasks, such as the plain MMoE's.
        dataset: A finite `tf.data.Dataset` of (features, labels); of a two-tower model also a `PairData` or `Batches`.
        user_feature: The feature whose values are the users of the metric `gauc`; without it, each distinct row of
            user features is one. Another model than a two-tower model has no `gauc`.
        batch_size: Pairs per step; has no influence on the result.
        kinds: `{task: "binary" or "regression"}`; a two-tower model knows its own.

    Returns:
        `{task: metrics}`: of a binary task those of `mvke_tf.metrics.binary_metrics`, of a regression task those of
        `regression_metrics`. Rows without a label (NaN, or sample weight 0) do not count.

    Raises:
        ValueError: If the model is no two-tower model and there are no `kinds`, a label is missing, or the data do not
            fit the model.
    """
    if kinds is not None:
        return _evaluate_any(model, dataset, kinds)
    tasks, kinds = task_names(model), task_kinds(model)
    pairs = as_pairs(model, dataset)
    _check_labels(tasks, pairs.labels)
    outputs = model.predict(Batches(pairs, batch_size).in_order(), verbose=0)
    users = pairs.users[user_feature][pairs.user_rows] if user_feature in pairs.users else pairs.user_rows
    labels = known_labels(pairs)
    values = {task: _column(value) for task, value in predictions(model, outputs).items()}
    return {task: _measure(kinds[task], labels[task], values[task], users) for task in tasks}


def _evaluate_any(model: keras.Model, dataset: tf.data.Dataset, kinds: Mapping[str, str]) -> Metrics:
    """Metrics of the tasks in `kinds`, of any model with dictionaries of outputs and labels."""
    collected: dict[str, list[np.ndarray]] = {}
    for features, labels, *_ in dataset:
        _check_labels(kinds, labels)
        outputs = model(features, training=False)
        for task in kinds:
            collected.setdefault(f"label/{task}", []).append(_column(labels[task]))
            collected.setdefault(f"output/{task}", []).append(_column(outputs[task]))
    if not collected:
        raise ValueError("Expected a dataset of at least one batch (features, labels). Received: an empty one")
    columns = {name: np.concatenate(parts) for name, parts in collected.items()}
    measured = {}
    for task, kind in kinds.items():
        outputs = columns[f"output/{task}"]
        values = _column(ops.sigmoid(outputs)) if kind == "binary" else outputs
        measured[task] = _measure(kind, columns[f"label/{task}"], values, np.zeros(len(values)))
        # All rows as one user would only repeat the AUC.
        measured[task].pop("gauc", None)
    return measured


def _check_labels(tasks: Iterable[str], labels: Mapping[str, object]) -> None:
    missing = sorted(set(tasks) - set(labels))
    if missing:
        raise ValueError(f"The dataset lacks the labels of {missing}. Received: {sorted(labels)}")


def _column(values: object) -> np.ndarray:
    return ops.convert_to_numpy(values).astype(np.float64).reshape(-1)


def _measure(kind: str, labels: np.ndarray, values: np.ndarray, users: np.ndarray) -> dict[str, float | int | None]:
    known = np.isfinite(labels)
    if kind == "regression":
        return regression_metrics(labels[known], values[known])
    return binary_metrics(labels[known], values[known], users[known])
