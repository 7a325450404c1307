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


@keras.saving.register_keras_serializable(package="mvke_tf")
class ExpertGate(keras.layers.Layer):
    """The softmax gate of one task over the experts that it sees: `g = softmax(x Wg + bg)`.

    B is the batch, I the input width.

    Args:
        experts: Indices of the experts that the task sees.
        stddev: Standard deviation of the normal distribution that Wg starts from.
        seed: Seed of that draw.

    Call arguments:
        inputs: `(B, I)`.

    Returns:
        Gate weights `(B, len(experts))`, which sum to 1 over the last axis.

    Example:

    >>> ExpertGate(experts=range(6))(np.ones((2, 48))).shape
    TensorShape([2, 6])

    Reference: Ma et al., KDD 2018, section 4.2, equation 7; with a part of the experts it is the gate of CGC (Tang et
    al., RecSys 2020).
    """

    def __init__(self, experts: Sequence[int], stddev: float = 0.01, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = check_indices(experts)
        self.stddev = stddev
        self.seed = seed
        self.dense = keras.layers.Dense(
            len(self.experts),
            kernel_initializer=keras.initializers.RandomNormal(stddev=stddev, seed=seed),
            dtype=self.dtype_policy,
            name="dense",
        )

    def build(self, inputs_shape) -> None:
        self.dense.build(inputs_shape)
        super().build(inputs_shape)

    def call(self, inputs):
        return ops.softmax(self.dense(inputs), axis=-1)

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0], len(self.experts))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "experts": self.experts, "stddev": self.stddev, "seed": self.seed}


@keras.saving.register_keras_serializable(package="mvke_tf")
class MixExperts(keras.layers.Layer):
    """The mixture of chosen experts: `Σ_e g_e expert_e`.

    Args:
        experts: Indices of the experts, in the order of the gate weights.

    Call arguments:
        outputs: Expert outputs `(B, E, O)`.
        gate: Gate weights `(B, len(experts))`; left out for a single expert, whose output is returned.

    Returns:
        `(B, O)`.

    Raises:
        ValueError: If an index lies outside `[0, E)`, or the number of gate weights is another.

    Example:

    >>> MixExperts((0, 2))(np.ones((4, 3, 8)), np.full((4, 2), 0.5)).shape
    TensorShape([4, 8])
    """

    def __init__(self, experts: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = check_indices(experts)

    def build(self, outputs_shape, gate_shape=None) -> None:
        check_indices(self.experts, outputs_shape[1])
        weights = 1 if gate_shape is None else gate_shape[-1]
        if weights != len(self.experts):
            raise ValueError(
                f"{self.name}: expected a gate weight for each of the {len(self.experts)} experts. Received: {weights}"
            )
        super().build(outputs_shape)

    def call(self, outputs, gate=None):
        experts = ops.unstack(outputs, axis=1)
        if gate is None:
            return experts[self.experts[0]]
        chosen = ops.stack([experts[index] for index in self.experts], axis=1)
        return ops.squeeze(ops.matmul(ops.expand_dims(gate, 1), chosen), 1)

    def compute_output_shape(self, outputs_shape, gate_shape=None):
        return (outputs_shape[0], outputs_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "experts": self.experts}
