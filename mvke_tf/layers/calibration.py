# SPDX-License-Identifier: Apache-2.0
"""What makes calibrated logits of a model's: a rising function, the same in a SavedModel, in ONNX and on arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops


@dataclasses.dataclass(frozen=True)
class LogitMap:
    """`slope * z + intercept` of a logit z; with knots, the line through them, which goes on with slope 1 at both ends.

    Args:
        slope: Above 0.
        intercept: Any number.
        knots: Logits at which the line bends, rising; `slope` and `intercept` are not read then.
        values: Calibrated logit at each knot, not falling.

    Raises:
        ValueError: If the function does not rise.

    Example:

    >>> LogitMap(slope=0.5, intercept=-1.0)(4.0)
    1.0
    """

    slope: float = 1.0
    intercept: float = 0.0
    knots: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("knots", "values"):
            object.__setattr__(self, name, tuple(float(number) for number in getattr(self, name)))
        falls = any(left >= right for left, right in zip(self.knots, self.knots[1:], strict=False)) or any(
            left > right for left, right in zip(self.values, self.values[1:], strict=False)
        )
        if not self.slope > 0 or falls or len(self.knots) != len(self.values):
            raise ValueError(f"A calibration must rise with the logit, from as many knots as values. Received: {self}")

    def __call__(self, logits: Any, library: Any = ops) -> Any:
        """Calibrated logits, elementwise; `library` has `clip`, `maximum` and `minimum`: `keras.ops` or NumPy."""
        if not self.knots:
            return self.slope * logits + self.intercept
        first, last = self.knots[0], self.knots[-1]
        mapped = self.values[0] + library.minimum(logits - first, 0.0) + library.maximum(logits - last, 0.0)
        # A sum of bounded pieces: exact in float32, and made of operations that ONNX has.
        for index, (left, right) in enumerate(zip(self.knots, self.knots[1:], strict=False)):
            rise = self.values[index + 1] - self.values[index]
            mapped = mapped + rise * library.clip((logits - left) / (right - left), 0.0, 1.0)
        return mapped


@keras.saving.register_keras_serializable(package="mvke_tf")
class CalibratedLogit(keras.layers.Layer):
    """A `LogitMap` as a layer without weights, for models that are written to a file.

    Args:
        settings: Arguments of `LogitMap`.

    Call arguments:
        inputs: Logits of any shape.

    Returns:
        Calibrated logits of that shape.

    Example:

    >>> CalibratedLogit({"slope": 2.0, "intercept": 1.0})(np.array([3.0]))
    <tf.Tensor: shape=(1,), dtype=float32, numpy=array([7.], dtype=float32)>
    """

    def __init__(self, settings: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        # As JSON gives them back.
        self.settings = {key: list(v) if isinstance(v, (list, tuple)) else v for key, v in settings.items()}
        self._map = LogitMap(**settings)

    def call(self, inputs):
        return self._map(inputs)

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "settings": self.settings}
