# SPDX-License-Identifier: Apache-2.0
"""Metrics of every task of a model on a dataset that need not be declared, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import keras
import numpy as np
from keras import ops

from mvke_tf.inference.collect import as_interactions, collect, known_labels
from mvke_tf.inference.predictions import outputs_of, predict
from mvke_tf.inference.vectors import TILE_ROWS
from mvke_tf.metrics import task_metrics
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
        model: A two-tower model; with `kinds` any model of `{task: (B, 1)}`, logits of binary tasks, values of
            regression tasks, such as the plain MMoE's, logarithms of the rates of count tasks (multi-class: `(B, C)`).
        dataset: A finite `tf.data.Dataset` of (features, labels); of a two-tower model also `Interactions` or
            `Batches`.
        user_feature: The feature whose values are the users of the metric `gauc`; by default each distinct row of user
            features is one. Another model than a two-tower model has no `gauc`.
        batch_size: Rows per step; without influence on the result, but for its last digits.
        kinds: `{task: kind}`; a two-tower model knows its own.

    Returns:
        `{task: metrics}` as of `mvke_tf.metrics.task_metrics`, in the unit of the label. Rows without a label (NaN, or
        sample weight 0) do not count.

    Raises:
        ValueError: If the model is no two-tower model and there are no `kinds`, labels or the feature of the users are
            missing, or the data do not fit the model.
    """
    if kinds is not None:
        return _evaluate_any(model, dataset, kinds, batch_size)
    if not isinstance(model, TwoTowerModel):
        raise ValueError(
            "Expected `kinds`, {task: 'binary', 'regression', ...}, of a model that is no two-tower model. "
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
        label = labels[task][known] if model.transforms[task] is None else np.expm1(labels[task][known])
        measured[task] = task_metrics(kind, label, values[task][known], users[known])
    return measured


def _evaluate_any(model: keras.Model, dataset: object, kinds: Mapping[str, str], batch_size: int) -> Metrics:
    """Metrics of the tasks in `kinds`, of any model with a dictionary of outputs."""
    features, labels = collect(dataset, tuple(kinds))
    _check_labels(kinds, labels)
    outputs = outputs_of(model, features, batch_size)
    measured: Metrics = {}
    for task, kind in kinds.items():
        known = np.isfinite(labels[task])
        output = np.asarray(outputs[task], np.float64)[known]
        output = output if kind == "multiclass" else output[:, 0]
        link = {"binary": ops.sigmoid, "count": ops.exp, "multiclass": ops.softmax}.get(kind)
        values = output if link is None else ops.convert_to_numpy(link(output)).astype(np.float64)
        measured[task] = task_metrics(kind, labels[task][known], values)
    return measured


def _check_labels(tasks: Iterable[str], labels: Mapping[str, object]) -> None:
    if missing := sorted(set(tasks) - set(labels)):
        raise ValueError(
            f"The dataset lacks the labels of {missing}, one number per row. Received those of: {sorted(labels)}"
        )
