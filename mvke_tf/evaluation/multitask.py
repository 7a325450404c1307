"""Metrics of every task of a model on a dataset that need not be declared, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import keras
import numpy as np
from keras import ops

from mvke_tf.inference.collect import as_interactions, collect, known_labels
from mvke_tf.inference.predictions import predict
from mvke_tf.inference.vectors import TILE_ROWS
from mvke_tf.metrics import binary_metrics, regression_metrics
from mvke_tf.models import TwoTowerModel

Metrics = dict[str, dict[str, float | int | None]]


def evaluate_multitask_model(
    model: keras.Model,
    dataset: object,
    user_feature: str | None = None,
    batch_size: int = TILE_ROWS,
    kinds: Mapping[str, str] | None = None,
) -> Metrics:
    """Metrics of every task of a model.

    Args:
        model: A two-tower model; with `kinds` any model of `{task: (B, 1)}`, logits of binary tasks and values of
            regression tasks, such as the plain MMoE's.
        dataset: A finite `tf.data.Dataset` of (features, labels); of a two-tower model also `Interactions` or
            `Batches`.
        user_feature: The feature whose values are the users of the metric `gauc`; by default each distinct row of user
            features is one. Another model than a two-tower model has no `gauc`.
        batch_size: Rows per step; without influence on the result, but for its last digits.
        kinds: `{task: "binary" or "regression"}`; a two-tower model knows its own.

    Returns:
        `{task: metrics}`: of a binary task those of `mvke_tf.metrics.binary_metrics`, of a regression task those of
        `regression_metrics`, in the unit of the label. Rows without a label (NaN, or sample weight 0) do not count.

    Raises:
        ValueError: If the model is no two-tower model and there are no `kinds`, labels or the feature of the users are
            missing, or the data do not fit the model.
    """
    if kinds is not None:
        return _evaluate_any(model, dataset, kinds, batch_size)
    if not isinstance(model, TwoTowerModel):
        raise ValueError(
            "Expected `kinds`, {task: 'binary' or 'regression'}, of a model that is no two-tower model. "
            f"Received: {model.name!r} without them"
        )
    pairs = as_interactions(model, dataset)
    _check_labels(model.task_names, pairs.labels)
    users = pairs.user_rows
    if user_feature is not None:
        if user_feature not in pairs.users:
            raise ValueError(f"Expected `user_feature`, one of {sorted(pairs.users)}. Received: {user_feature!r}")
        users = np.asarray(pairs.users[user_feature])[pairs.user_rows]
    labels, values = known_labels(pairs), predict(model, pairs, batch_size).values
    measured: Metrics = {}
    for task, kind in model.kinds.items():
        known = np.isfinite(labels[task])
        if kind == "binary":
            measured[task] = binary_metrics(labels[task][known], values[task][known], users[known])
        else:
            label = labels[task][known] if model.transforms[task] is None else np.expm1(labels[task][known])
            measured[task] = regression_metrics(label, values[task][known])
    return measured


def _evaluate_any(model: keras.Model, dataset: object, kinds: Mapping[str, str], batch_size: int) -> Metrics:
    """Metrics of the tasks in `kinds`, of any model with a dictionary of outputs."""
    features, labels = collect(dataset, tuple(kinds))
    _check_labels(kinds, labels)
    outputs = model.predict(features, batch_size=batch_size, verbose=0)
    measured: Metrics = {}
    for task, kind in kinds.items():
        known = np.isfinite(labels[task])
        values = np.asarray(outputs[task], np.float64).reshape(-1)[known]
        if kind == "binary":
            probabilities = ops.convert_to_numpy(ops.sigmoid(values)).astype(np.float64)
            measured[task] = binary_metrics(labels[task][known], probabilities)
        else:
            measured[task] = regression_metrics(labels[task][known], values)
    return measured


def _check_labels(tasks: Iterable[str], labels: Mapping[str, object]) -> None:
    if missing := sorted(set(tasks) - set(labels)):
        raise ValueError(
            f"The dataset lacks the labels of {missing}, one number per row. Received those of: {sorted(labels)}"
        )
