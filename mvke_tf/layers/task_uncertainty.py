# SPDX-License-Identifier: Apache-2.0
"""Learned weights of the losses of several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="mvke_tf")
class TaskUncertainty(keras.layers.Layer):
    """Passes the outputs of a model on unchanged, and owns one trained log-variance s per task.

    As a layer of the model, the log-variances are trained, saved and restored with it. The losses read them in
    `mvke_tf.models.multi_task.MultiTaskModel`.

    Args:
        tasks: Names of the tasks.

    Call arguments:
        inputs: `{task: (B, n)}`.

    Returns:
        The same.

    Example:

    >>> layer = TaskUncertainty(("click", "stars"))
    >>> outputs = layer({"click": np.ones((2, 1)), "stars": np.ones((2, 1))})
    >>> {task: float(value) for task, value in layer.by_task().items()}
    {'click': 0.0, 'stars': 0.0}

    Reference: Kendall et al., CVPR 2018, section 3.2.
    """

    def __init__(self, tasks: Sequence[str], **kwargs: Any) -> None:
        # Outputs stay what they are under every dtype policy, as those of the heads do.
        super().__init__(**{"dtype": "float32", **kwargs})
        self.tasks = tuple(tasks)

    def build(self, inputs_shape=None) -> None:
        self.log_variances = self.add_weight(shape=(len(self.tasks),), initializer="zeros", name="log_variances")
        super().build(inputs_shape)

    def call(self, inputs):
        return dict(inputs)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def by_task(self) -> dict[str, Any]:
        """`{task: log-variance}`, as NumPy scalars."""
        return dict(zip(self.tasks, ops.convert_to_numpy(self.log_variances), strict=True))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tasks": self.tasks}
