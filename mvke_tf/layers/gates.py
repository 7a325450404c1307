"""Gates: how much each task listens to each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from mvke_tf.layers.experts import check_indices


@keras.saving.register_keras_serializable(package="mvke_tf")
class VirtualKernelGate(keras.layers.Layer):
    """The virtual-kernel gate of one task: `g = softmax over the task's kernels of tag · Wᵀ`.

    Neither a projection nor a factor 1/sqrt(D). The gate reads the tag (the item side) only, and a kernel outside
    the task's choice gets no gradient from it.

    B is the batch, K the number of virtual kernels, D the width.

    Args:
        kernels: Indices of the virtual kernels that the task may select.

    Call arguments:
        tag: Tag vectors `(B, D)`.
        kernels: Virtual kernels W `(K, D)`.

    Returns:
        Gate weights `(B, len(kernels))`, which sum to 1 over the last axis.

    Raises:
        ValueError: If an index lies outside `[0, K)`, or the widths differ.

    Example:

    >>> gate = VirtualKernelGate(kernels=(0, 1, 2))
    >>> gate(np.ones((2, 64)), np.ones((5, 64))).shape
    TensorShape([2, 3])

    Reference: Xu et al., KDD 2022, section 4.3.
    """

    def __init__(self, kernels: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernels = check_indices(kernels)

    def build(self, tag_shape, kernels_shape) -> None:
        check_indices(self.kernels, kernels_shape[0])
        if tag_shape[-1] != kernels_shape[-1]:
            raise ValueError(
                f"{self.name}: expected a tag (B, D) and kernels (K, D) of one width D. "
                f"Received: {tuple(tag_shape)} and {tuple(kernels_shape)}"
            )
        super().build(tag_shape)

    def call(self, tag, kernels):
        chosen = ops.take(kernels, ops.convert_to_tensor(self.kernels, "int32"), axis=0)
        return ops.softmax(ops.matmul(tag, ops.transpose(chosen)), axis=-1)

    def compute_output_shape(self, tag_shape, kernels_shape):
        return (tag_shape[0], len(self.kernels))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kernels": self.kernels}
