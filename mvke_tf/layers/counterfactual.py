# SPDX-License-Identifier: Apache-2.0
"""The risk of a later event over all rows, not only over those with the event before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

# Width of the hidden layer that predicts the error of a row.
IMPUTATION_UNITS = 64


@keras.saving.register_keras_serializable(package="mvke_tf")
class CounterfactualRisk(keras.layers.Layer):
    """What ESCM² adds to the losses of ESMM: an unbiased estimate of the loss of p(task given the event before it).

    Labels of the task are known only where the event before it happened, which the model itself decides with: a click
    is likelier where a purchase is. With the label o of that event, its predicted probability p, the loss
    δ = -r ln q - (1 - r) ln(1 - q) of the conditional probability q, and means over all rows, the risk is

        "ips":  mean(o δ / p)
        "dr":   mean(ê + o (δ - ê) / p) + mean(o (δ - ê)² / p)

    (inverse propensity, and doubly robust). ê > 0 is a learned prediction of δ from the vectors of user and item, of
    one hidden layer, for training alone. No gradient flows through p, and 1 / p is cut off.

    Args:
        task: Name of the task.
        given: Name of the task of the event before it.
        method: `"ips"` or `"dr"`.
        weight: What the risk is multiplied with before it is added to the losses.
        most_inverse: Largest 1 / p.

    Call arguments:
        propensity: Logits of the event before, `(B, 1)`.
        conditional: Logits of the task given that event, `(B, 1)`.
        user, item: The vectors whose product these are, `(B, W)`.

    Returns:
        What `added_loss` reads: cut off 1 / p, conditional logits, and for `"dr"` ê; `(B, 2)` or `(B, 3)`.

    Raises:
        ValueError: If the method is another one.

    Example:

    >>> layer = CounterfactualRisk("buy", "click")
    >>> values = layer(np.zeros((1, 1)), np.zeros((1, 1)), np.ones((1, 2)), np.ones((1, 2)))
    >>> ones = np.ones((1, 1))
    >>> round(float(layer.added_loss({"click": ones, "buy": ones}, values)), 4)  # ln 2 / 0.5
    1.3863

    Reference: Wang et al., SIGIR 2022, section 4 (ESCM²).
    """

    def __init__(
        self,
        task: str,
        given: str,
        method: str = "ips",
        weight: float = 1.0,
        most_inverse: float = 15.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        if method not in ("ips", "dr"):
            raise ValueError(f"`method` must be 'ips' or 'dr'. Received: {method!r}")
        self.task, self.given, self.method = task, given, method
        self.weight, self.most_inverse = weight, most_inverse
        self.hidden = self.imputed = None
        if method == "dr":
            self.hidden = keras.layers.Dense(
                IMPUTATION_UNITS, activation="relu", dtype=self.dtype_policy, name="hidden"
            )
            self.imputed = keras.layers.Dense(1, activation="softplus", dtype=self.dtype_policy, name="imputed")

    def build(self, propensity_shape, conditional_shape, user_shape, item_shape) -> None:
        if self.hidden is not None and self.imputed is not None:
            self.hidden.build((None, user_shape[-1] + item_shape[-1]))
            self.imputed.build((None, IMPUTATION_UNITS))
        super().build(propensity_shape)

    def call(self, propensity, conditional, user, item):
        inverse = ops.stop_gradient(ops.minimum(1.0 + ops.exp(-propensity), self.most_inverse))
        values = [inverse, conditional]
        if self.hidden is not None and self.imputed is not None:
            values.append(self.imputed(self.hidden(ops.concatenate([user, item], axis=-1))))
        return ops.concatenate(values, axis=-1)

    def compute_output_shape(self, propensity_shape, conditional_shape, user_shape, item_shape):
        return (propensity_shape[0], 2 if self.method == "ips" else 3)

    def added_loss(self, labels: Mapping[str, Any], values: Any, weights: Mapping[str, Any] | None = None) -> Any:
        """The risk of a batch, in nats (of `"dr"`, with a squared error), a scalar.

        Args:
            labels: `{task: (B, 1)}`, 0 or 1; that of the task is not read where the event before did not happen.
            values: What `call` returned.
            weights: Weights of the rows in the mean, `{task: (B,) or (B, 1)}`; 1 each by default.
        """
        label, event = (ops.reshape(ops.cast(labels[task], "float32"), (-1,)) for task in (self.task, self.given))
        inverse, logits = values[:, 0], values[:, 1]
        error = ops.softplus(logits) - label * logits
        seen = event * inverse
        if self.method == "ips":
            rows = seen * error
        else:
            imputed = values[:, 2]
            rows = imputed + seen * (error - imputed) + seen * ops.square(error - imputed)
        if weights is None or self.task not in weights:
            return ops.mean(rows)
        counted = ops.reshape(ops.cast(weights[self.task], "float32"), (-1,))
        total = ops.sum(counted)
        return ops.sum(counted * rows) / ops.where(total > 0, total, 1.0)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "task": self.task,
            "given": self.given,
            "method": self.method,
            "weight": self.weight,
            "most_inverse": self.most_inverse,
        }
