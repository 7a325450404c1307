"""Losses of multi-task models by kind of task, and how a learned uncertainty weighs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from mvke_tf.schema import TASK_KINDS

# The mean over the rows that count: rows of weight 0 (no label there) do not dilute the others.
REDUCTION = "mean_with_sample_weight"


def task_loss(kind: str) -> keras.losses.Loss:
    """The loss of one task from its output and label `(B, 1)`: sigmoid cross entropy in nats, or squared error.

    Args:
        kind: `"binary"` or `"regression"`.

    Raises:
        ValueError: If it is another kind.
    """
    if kind not in TASK_KINDS:
        raise ValueError(f"The kind of a task must be one of {TASK_KINDS}. Received: {kind!r}")
    if kind == "binary":
        return keras.losses.BinaryCrossentropy(from_logits=True, reduction=REDUCTION)
    return keras.losses.MeanSquaredError(reduction=REDUCTION)


def task_losses(kinds: Mapping[str, str]) -> dict[str, keras.losses.Loss]:
    """The loss of each task for `model.compile(loss=...)`, with fixed weights and with learned ones alike.

    Args:
        kinds: `{task: "binary" or "regression"}`; `model.kinds` of a two-tower model.

    Raises:
        ValueError: If a kind is unknown.
    """
    return {task: task_loss(kind) for task, kind in kinds.items()}


def uncertainty_weight(log_variance: Any, kind: str) -> Any:
    """What the loss of a task is multiplied with: `exp(-s)` for a binary task, `exp(-s) / 2` for a regression task.

    Reference: Kendall et al., CVPR 2018, equations 5 to 10.
    """
    return ops.exp(-log_variance) * (1.0 if kind == "binary" else 0.5)
