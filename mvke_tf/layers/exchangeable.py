"""Parts to exchange the experts and gates of the plain MMoE for: a convolutional expert, an attention gate."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

POOLINGS = ("max", "average")


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
        if self.pool_size is not None and length is None:
            raise ValueError(
                f"{self.name}: windows need a sequence of known length; pool all of it with pool_size=None. "
                f"Received: {tuple(inputs_shape)}, pool_size={self.pool_size}"
            )
        self.convolution.build(sequence_shape)
        windows = 1 if self.pool_size is None else -(-length // self.pool_size)
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


@keras.saving.register_keras_serializable(package="mvke_tf")
class AttentionGate(keras.layers.Layer):
    """Scores of the experts by attention among the parts of the input: `s = mean over tokens of MHA(T, T) Wp + bp`.

    Every token T_l attends to all tokens (multi-head self-attention); the mean over the tokens is projected to one
    score per expert. An input of I single values becomes I tokens `T_i = x_i w_i + b_i`, with a vector w_i and b_i of
    each value's own, without which attention could not tell one value from another. The tokens of a `(B, L, C)` input
    are taken as they are: where their order matters, they must carry their position.

    B is the batch, I the input width, L the number of tokens, C their width, E the number of experts.

    Args:
        num_experts: Number E of experts.
        num_heads: Number of attention heads.
        key_dim: Width of the queries, keys and values of each head. A token of a `(B, I)` input is `num_heads *
            key_dim` wide.

    Call arguments:
        inputs: `(B, L, C)`, or `(B, I)`.

    Returns:
        Scores `(B, E)`; `GateSoftmax`, or `build_mmoe(gates=...)`, makes gate weights of them.

    Raises:
        ValueError: If a size is not positive, or the input has another rank.

    Example:

    >>> AttentionGate(num_experts=3)(np.ones((4, 128))).shape
    TensorShape([4, 3])

    Reference: Vaswani et al., NeurIPS 2017, section 3.2.2 (attention); Gorishniy et al., NeurIPS 2021, section 3.3
    (tokens of single values).
    """

    def __init__(self, num_experts: int, num_heads: int = 2, key_dim: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(num_experts, num_heads, key_dim) < 1:
            raise ValueError(
                "Sizes must be at least 1. "
                f"Received: num_experts={num_experts}, num_heads={num_heads}, key_dim={key_dim}"
            )
        self.num_experts = num_experts
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.attention = keras.layers.MultiHeadAttention(num_heads, key_dim, dtype=self.dtype_policy, name="attention")
        self.projection = keras.layers.Dense(num_experts, dtype=self.dtype_policy, name="projection")
        self.token_kernel = self.token_bias = None

    def build(self, inputs_shape) -> None:
        batch, length, width = check_sequence(self.name, inputs_shape)
        if len(inputs_shape) == 2:
            width = self.num_heads * self.key_dim
            initializer = keras.initializers.RandomUniform(-(width**-0.5), width**-0.5)
            self.token_kernel = self.add_weight(shape=(length, width), initializer=initializer, name="token_kernel")
            self.token_bias = self.add_weight(shape=(length, width), initializer=initializer.clone(), name="token_bias")
        tokens_shape = (batch, length, width)
        self.attention.build(tokens_shape, tokens_shape)
        self.projection.build((batch, width))
        super().build(inputs_shape)

    def call(self, inputs, training=None):
        tokens = as_sequence(inputs)
        if self.token_kernel is not None:
            tokens = tokens * self.token_kernel + self.token_bias
        attended = self.attention(tokens, tokens, training=training)
        return self.projection(ops.mean(attended, axis=1))

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0], self.num_experts)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
        }


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
