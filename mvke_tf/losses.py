# SPDX-License-Identifier: Apache-2.0
"""Losses of multi-task models by kind of task, and how a learned uncertainty weighs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from mvke_tf.schema import TASK_KINDS

# The mean over the rows that count: rows of weight 0 (no label there) do not dilute the others.
REDUCTION = "mean_with_sample_weight"


@keras.saving.register_keras_serializable(package="mvke_tf")
class PoissonLoss(keras.losses.Loss):
    """Negative log likelihood of a count y under a Poisson rate of logarithm z, less ln(y!): `exp(z) - y z`, in nats.

    Example:

    >>> round(float(PoissonLoss()(np.array([[2.0]]), np.array([[np.log(3.0)]]))), 4)  # 3 - 2 ln 3
    0.8028
    """

    def call(self, y_true, y_pred):
        return ops.mean(ops.exp(y_pred) - y_true * y_pred, axis=-1)


def task_loss(kind: str) -> keras.losses.Loss:
    """The loss of one task from its output `(B, 1)` (multi-class: `(B, C)`) and its label `(B, 1)`.

    Sigmoid cross entropy, squared error, `PoissonLoss`, or softmax cross entropy; all but the second in nats.

    Args:
        kind: One of `TASK_KINDS`.

    Raises:
        ValueError: If it is another kind.
    """
    if kind not in TASK_KINDS:
        raise ValueError(f"The kind of a task must be one of {TASK_KINDS}. Received: {kind!r}")
    if kind == "binary":
        return keras.losses.BinaryCrossentropy(from_logits=True, reduction=REDUCTION)
    if kind == "count":
        return PoissonLoss(reduction=REDUCTION)
    if kind == "multiclass":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=REDUCTION)
    return keras.losses.MeanSquaredError(reduction=REDUCTION)


def task_losses(kinds: Mapping[str, str]) -> dict[str, keras.losses.Loss]:
    """The loss of each task for `model.compile(loss=...)`, with fixed weights and with learned ones alike.

    Args:
        kinds: `{task: kind}`; `model.kinds` of a two-tower model.

    Raises:
        ValueError: If a kind is unknown.
    """
    return {task: task_loss(kind) for task, kind in kinds.items()}


def uncertainty_weight(log_variance: Any, kind: str) -> Any:
    """What the loss of a task is multiplied with: `exp(-s) / 2` for a regression task, `exp(-s)` for every other.

    Reference: Kendall et al., CVPR 2018, equations 5 to 10.
    """
    return ops.exp(-log_variance) * (0.5 if kind == "regression" else 1.0)
