"""Metrics of every task of a model on a dataset, in one call."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from mvke_tf.analysis.study import BATCH_SIZE, as_pairs, known_labels
from mvke_tf.data.dataset import Batches
from mvke_tf.metrics import binary_metrics
from mvke_tf.models.two_tower import predictions, task_kinds, task_names

Metrics = dict[str, dict[str, float | int | None]]


def evaluate_multitask_model(
    model: keras.Model, dataset: object, user_feature: str = "user_id", batch_size: int = BATCH_SIZE
) -> Metrics:
    """Metrics of every task of a two-tower model.

    Args:
        model: A built or loaded two-tower model.
        dataset: A `tf.data.Dataset` of (features, labels), a `PairData` or `Batches`.
        user_feature: The feature whose values are the users of the metric `gauc`; without it, each distinct row of
            user features is one.
        batch_size: Pairs per step; has no influence on the result.

    Returns:
        `{task: metrics}`: of a binary task those of `mvke_tf.metrics.binary_metrics`, of a regression task `rmse`,
        `mae` (in the unit of the label) and `rows`. Rows without a label (NaN, or sample weight 0) do not count.

    Raises:
        ValueError: If the model is no two-tower model, a label is missing, or the data do not fit the model.
    """
    tasks, kinds = task_names(model), task_kinds(model)
    pairs = as_pairs(model, dataset)
    missing = sorted(set(tasks) - set(pairs.labels))
    if missing:
        raise ValueError(f"The dataset lacks the labels of {missing}. Received: {sorted(pairs.labels)}")
    outputs = model.predict(Batches(pairs, batch_size).in_order(), verbose=0)
    users = pairs.users[user_feature][pairs.user_rows] if user_feature in pairs.users else pairs.user_rows
    all_labels = known_labels(pairs)
    measured: Metrics = {}
    for task, values in predictions(model, outputs).items():
        predicted = ops.convert_to_numpy(values).astype(np.float64).reshape(-1)
        labels = all_labels[task]
        known = np.isfinite(labels)
        measured[task] = (
            _regression(labels[known], predicted[known])
            if kinds[task] == "regression"
            else (binary_metrics(labels[known], predicted[known], users[known]))
        )
    return measured


def _regression(labels: np.ndarray, values: np.ndarray) -> dict[str, float | int | None]:
    error = values - labels
    if not len(error):
        return {"rmse": None, "mae": None, "rows": 0}
    return {"rmse": float(np.sqrt(np.mean(np.square(error)))), "mae": float(np.mean(np.abs(error))), "rows": len(error)}
