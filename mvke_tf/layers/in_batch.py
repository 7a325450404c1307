# SPDX-License-Identifier: Apache-2.0
"""Retrieval trained against the other items of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="mvke_tf")
class InBatchSoftmax(keras.layers.Layer):
    """Which item of the batch a user chose: a softmax over the items of all its rows, corrected for their frequency.

    For a user u and a positive item i it is, over the rows j of the batch with another item and i itself,

        ln Σ_j exp(u·j - ln q_j) - (u·i - ln q_i)

    with the share q of an item among the rows that batches are drawn from. Without `ln q` (logQ correction) frequent
    items, which are negatives more often, would be scored too low.

    Args:
        task: Name of the binary task whose positive rows learn from it.
        weight: What the mean over these rows is multiplied with before it is added to the losses.

    Call arguments:
        user, item: Vectors of the pairs, `(B, W)`.
        sampling: Of the item of each pair ln q and a number that other items do not have, `(B, 2)`.

    Returns:
        The loss that each row has where it is positive, `(B, 1)`, in nats.

    Example:

    >>> layer = InBatchSoftmax("click")
    >>> values = layer(np.zeros((2, 3)), np.zeros((2, 3)), np.array([[0.0, 0.0], [0.0, 1.0]]))
    >>> [round(float(value), 4) for value in values[:, 0]]  # one of two equal items
    [0.6931, 0.6931]

    Reference: Yi et al., RecSys 2019, equations 3 to 5.
    """

    def __init__(self, task: str, weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.task, self.weight = task, weight

    def build(self, user_shape, item_shape, sampling_shape) -> None:
        super().build(user_shape)

    def call(self, user, item, sampling):
        logits = ops.matmul(user, ops.transpose(item)) - sampling[None, :, 0]
        own = ops.sum(user * item, axis=-1) - sampling[:, 0]
        number = sampling[:, 1]
        # The item itself counts once, however many rows have it.
        others = ops.where(number[:, None] == number[None, :], -1e30, logits)
        every = ops.concatenate([own[:, None], others], axis=-1)
        return ops.expand_dims(ops.logsumexp(every, axis=-1) - own, -1)

    def compute_output_shape(self, user_shape, item_shape, sampling_shape):
        return (user_shape[0], 1)

    def added_loss(self, labels: Mapping[str, Any], values: Any, weights: Mapping[str, Any] | None = None) -> Any:
        """The mean over the positive rows of a batch, in nats; 0 without any.

        Args:
            labels: `{task: (B, 1)}`, 0 or 1.
            values: What `call` returned.
            weights: Weights of the rows in the mean, `{task: (B,) or (B, 1)}`; 1 each by default.
        """
        counted = ops.reshape(ops.cast(labels[self.task], "float32"), (-1,))
        if weights is not None and self.task in weights:
            counted = counted * ops.reshape(ops.cast(weights[self.task], "float32"), (-1,))
        total = ops.sum(counted)
        return ops.sum(counted * values[:, 0]) / ops.where(total > 0, total, 1.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "task": self.task, "weight": self.weight}
