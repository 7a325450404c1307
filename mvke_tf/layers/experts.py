# SPDX-License-Identifier: Apache-2.0
"""Expert networks: banks of MLPs, evaluated as one batched contraction per layer, and a convolutional expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

POOLINGS = ("max", "average")


@keras.saving.register_keras_serializable(package="mvke_tf")
class Experts(keras.layers.Layer):
    """E multi-layer perceptrons of the same shape, computed together.

    Hidden layers are relu, the last layer is linear unless `output_activation` says otherwise:
    `expert_e(x) = relu(x W_e1 + b_e1) ... W_en + b_en`.
    Every layer is one batched product with weights `(E, in, out)` instead of E small ones. Weights start from
    Glorot's uniform distribution of each single expert, biases from zero.

    B is the batch, E the number of experts, F the number of fields, D their width, O the output width.

    Args:
        num_experts: Number E of experts.
        hidden_dims: Widths of the hidden layers.
        units: Output width O.
        shared: Whether one set of weights `(1, in, out)` serves all experts; the input must then differ by expert.
        dropout_rate: Dropout after every hidden layer, while training. An example loses the same units of every
            expert: drawing a mask for each took a tenth of a training step, and test AUCs were the same.
        output_activation: Activation of the last layer, as in `keras.layers.Dense`; linear by default.
        seed: Seed of the weights and of dropout.

    Call arguments:
        inputs: `(B, F, E, D)`, of which expert e reads the flattened `[:, :, e, :]`, or `(B, I)`, which every expert
            reads whole.
        training: Whether dropout is applied.

    Returns:
        Expert outputs `(B, E, O)`.

    Raises:
        ValueError: If the input has another rank, another number of experts, or is `(B, I)` for shared weights.

    Example:

    >>> Experts(num_experts=5, hidden_dims=(256, 128), units=64)(np.ones((2, 9, 5, 64))).shape
    TensorShape([2, 5, 64])

    Reference: Xu et al., KDD 2022, section 4.2 (virtual-kernel experts).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dims: Sequence[int],
        units: int,
        shared: bool = False,
        dropout_rate: float = 0.0,
        output_activation: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_experts < 1:
            raise ValueError(f"`num_experts` must be at least 1. Received: {num_experts}")
        self.num_experts = num_experts
        self.hidden_dims = tuple(hidden_dims)
        self.units = units
        self.shared = shared
        self.dropout_rate = dropout_rate
        self.output_activation = keras.activations.get(output_activation)
        self.seed = seed
        self.dropout = keras.layers.Dropout(
            dropout_rate, noise_shape=(1, None, None), seed=seed, dtype=self.dtype_policy
        )
        self.expert_kernels: list[keras.Variable] = []
        self.expert_biases: list[keras.Variable] = []

    def build(self, inputs_shape) -> None:
        if len(inputs_shape) == 4 and inputs_shape[2] == self.num_experts:
            width = inputs_shape[1] * inputs_shape[3]
        elif len(inputs_shape) == 2:
            width = inputs_shape[1]
        else:
            raise ValueError(
                f"{self.name}: expected inputs of shape (B, I) or (B, F, {self.num_experts}, D). "
                f"Received: {tuple(inputs_shape)}"
            )
        if self.shared and len(inputs_shape) == 2:
            raise ValueError(
                f"{self.name}: experts that share their weights give equal outputs on one common input; "
                f"expected (B, F, {self.num_experts}, D). Received: {tuple(inputs_shape)}"
            )
        stacked = 1 if self.shared else self.num_experts
        for index, units in enumerate((*self.hidden_dims, self.units)):
            self.expert_kernels.append(
                self.add_weight(
                    shape=(stacked, width, units),
                    # Keras counts the leading axis into the fans; the scale takes it out again.
                    initializer=keras.initializers.VarianceScaling(
                        float(stacked), "fan_avg", "uniform", seed=None if self.seed is None else self.seed + index
                    ),
                    name=f"kernel_{index}",
                )
            )
            self.expert_biases.append(
                self.add_weight(shape=(stacked, 1, units), initializer="zeros", name=f"bias_{index}")
            )
            width = units
        super().build(inputs_shape)

    def call(self, inputs, training=None):
        if len(inputs.shape) == 4:
            x = ops.reshape(
                ops.transpose(inputs, (2, 0, 1, 3)), (self.num_experts, -1, inputs.shape[1] * inputs.shape[3])
            )
        else:
            x = ops.expand_dims(inputs, 0)
        # The expert axis leads, because a batched product is twice as fast there than between other axes.
        for index, (kernel, bias) in enumerate(zip(self.expert_kernels, self.expert_biases, strict=True)):
            if index:
                x = self.dropout(ops.relu(x), training=training)
            x = ops.matmul(x, kernel) + bias
        return ops.transpose(self.output_activation(x), (1, 0, 2))

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0], self.num_experts, self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_dims": self.hidden_dims,
            "units": self.units,
            "shared": self.shared,
            "dropout_rate": self.dropout_rate,
            "output_activation": keras.activations.serialize(self.output_activation),
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="mvke_tf")
class SelectExperts(keras.layers.Layer):
    """The outputs of chosen experts, side by side.

    Args:
        indices: Indices of the experts, in the order of the output.

    Call arguments:
        inputs: Expert outputs `(B, E, O)`.

    Returns:
        `(B, len(indices) * O)`.

    Raises:
        ValueError: If no index is given, one is repeated, or one lies outside `[0, E)`.

    Example:

    >>> SelectExperts((0, 2))(np.ones((8, 5, 64))).shape
    TensorShape([8, 128])
    """

    def __init__(self, indices: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.indices = check_indices(indices)

    def build(self, inputs_shape) -> None:
        check_indices(self.indices, inputs_shape[1])
        super().build(inputs_shape)

    def call(self, inputs):
        experts = ops.unstack(inputs, axis=1)
        return ops.concatenate([experts[index] for index in self.indices], axis=-1)

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0], len(self.indices) * inputs_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "indices": self.indices}


@keras.saving.register_keras_serializable(package="mvke_tf")
class ConvolutionalExpert(keras.layers.Layer):
    """An expert that slides over a sequence: `y = flatten(pool(relu(x * Wc + bc))) Wp + bp`.

    One 1-D convolution that keeps the length (zeros beyond the ends), pooling over windows side by side, a linear
    projection. Windows keep the order of the sequence; pooling over the whole of it forgets where a pattern was.

    B is the batch, L the length of the sequence, C its channels, O the output width.

    Args:
        units: Output width O.
        filters: Number of filters of the convolution.
        kernel_size: Width of the filters.
        pool_size: Length of a pooling window; the last window may be shorter. None pools the whole sequence.
        pooling: `"max"` or `"average"`.
        activation: Activation after the convolution, as in `keras.layers.Conv1D`.

    Call arguments:
        inputs: `(B, L, C)`, or `(B, I)`, a sequence of I values of one channel.

    Returns:
        `(B, O)`.

    Raises:
        ValueError: If a size is not positive, `pooling` is unknown, the input has another rank, or `pool_size` is
            given for a sequence of unknown length.

    Example:

    >>> ConvolutionalExpert(units=32)(np.ones((4, 128))).shape
    TensorShape([4, 32])
    """

    def __init__(
        self,
        units: int,
        filters: int = 32,
        kernel_size: int = 3,
        pool_size: int | None = 2,
        pooling: str = "max",
        activation: str | None = "relu",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"units": units, "filters": filters, "kernel_size": kernel_size, "pool_size": pool_size or 1}
        if min(sizes.values()) < 1 or pool_size == 0:
            raise ValueError(f"Sizes must be at least 1. Received: {sizes | {'pool_size': pool_size}}")
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {POOLINGS}. Received: {pooling!r}")
        self.units = units
        self.filters = filters
        self.kernel_size = kernel_size
        self.pool_size = pool_size
        self.pooling = pooling
        self.activation = keras.activations.get(activation)
        self.convolution = keras.layers.Conv1D(
            filters,
            kernel_size,
            padding="same",
            activation=self.activation,
            data_format="channels_last",
            dtype=self.dtype_policy,
            name="convolution",
        )
        self.projection = keras.layers.Dense(units, dtype=self.dtype_policy, name="projection")

    def build(self, inputs_shape) -> None:
        sequence_shape = check_sequence(self.name, inputs_shape)
        length = sequence_shape[1]
        windows = 1
        if self.pool_size is not None:
            if length is None:
                raise ValueError(
                    f"{self.name}: windows need a sequence of known length; pool all of it with pool_size=None. "
                    f"Received: {tuple(inputs_shape)}, pool_size={self.pool_size}"
                )
            windows = -(-length // self.pool_size)
        self.convolution.build(sequence_shape)
        self.projection.build((sequence_shape[0], windows * self.filters))
        super().build(inputs_shape)

    def call(self, inputs):
        x = self.convolution(as_sequence(inputs))
        if self.pool_size is None:
            x = ops.max(x, axis=1) if self.pooling == "max" else ops.mean(x, axis=1)
        else:
            pool = ops.max_pool if self.pooling == "max" else ops.average_pool
            x = pool(x, self.pool_size, self.pool_size, padding="same", data_format="channels_last")
            x = ops.reshape(x, (-1, x.shape[1] * x.shape[2]))
        return self.projection(x)

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "pool_size": self.pool_size,
            "pooling": self.pooling,
            "activation": keras.activations.serialize(self.activation),
        }


def check_indices(indices: Sequence[int], size: int | None = None) -> tuple[int, ...]:
    """The indices as a tuple, once they are known to be distinct and inside `[0, size)`.

    Raises:
        ValueError: If they are not.
    """
    indices = tuple(int(index) for index in indices)
    if not indices or len(set(indices)) != len(indices) or min(indices) < 0:
        raise ValueError(f"Expected at least one index, none repeated or negative. Received: {indices}")
    if size is not None and max(indices) >= size:
        raise ValueError(f"Expected indices below {size}. Received: {indices}")
    return indices


def as_sequence(inputs):
    """`(B, I)` as `(B, I, 1)`; `(B, L, C)` as it is."""
    return ops.expand_dims(inputs, -1) if len(inputs.shape) == 2 else inputs


def check_sequence(name: str, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shape `(B, L, C)` of the sequence that an input of shape `(B, I)` or `(B, L, C)` is.

    Raises:
        ValueError: If it has another rank, or I or C is unknown.
    """
    if len(shape) not in (2, 3) or shape[-1] is None:
        raise ValueError(f"{name}: expected inputs of shape (B, I) or (B, L, C). Received: {tuple(shape)}")
    return (*shape, 1) if len(shape) == 2 else tuple(shape)
