# SPDX-License-Identifier: Apache-2.0
"""Gates: how much each task listens to each expert, and the mixtures that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from mvke_tf.errors import ConfigError
from mvke_tf.layers.experts import as_sequence, check_indices, check_sequence


def check_top_k(top_k: int | None, num_experts: int | None = None, gate: str = "gate") -> int:
    """The number of experts that keep weight, 0 for all, once it is known to be possible.

    Args:
        top_k: The number.
        num_experts: How many experts the gate weighs, where that is known.
        gate: Name of the gate, for the message.

    Raises:
        ValueError: If it is no integer, or negative.
        ConfigError: If it is larger than the number of experts.
    """
    top_k = top_k or 0
    if top_k != int(top_k) or top_k < 0:
        raise ValueError(f"`top_k` must be 0 (all experts) or the number that keep weight. Received: {top_k}")
    top_k = int(top_k)
    if num_experts is not None and top_k > num_experts:
        raise ConfigError(
            f"{gate}: `top_k` (`gate_top_k`) must be at most the number of experts that this gate weighs, "
            f"{num_experts}; 0 keeps all. Received: {top_k}"
        )
    return top_k


def softmax(scores, axis):
    """The softmax over one axis; ones where its size is 1, of which Keras would warn.

    Args:
        scores: Any shape.
        axis: The axis; its size is looked at if it is static.

    Returns:
        The shape and the dtype of the scores.
    """
    if scores.shape[axis] == 1:
        # Not a constant: the weights behind the scores have a gradient of zero, and not none.
        return scores - scores + 1
    return ops.softmax(scores, axis=axis)


@keras.saving.register_keras_serializable(package="mvke_tf")
class GateSoftmax(keras.layers.Layer):
    """From scores to gate weights: `g = softmax(s)`, over the k highest scores of each row if `top_k` is k.

    With `top_k`, exactly k experts of a row keep weight, those of the lowest index where scores are equal; the others
    get a weight of exactly zero, and no gradient of a mixture reaches their scores or their outputs. With k = 1 the
    kept weight is always 1, so that nothing but the load-balancing loss trains the scores.

    With `load_balancing_weight`, training adds to the loss `load_balancing_weight * CV(I)²`, where
    `I_e = Σ_b softmax(s_b)_e` is the importance of expert e and CV(I) the standard deviation of the importances over
    their mean: 0 if the batch uses all experts alike, E - 1 if it uses one alone. Differs from the paper in that
    scores have no noise; the softmax is therefore that of all scores, kept or not, so that the loss also reaches an
    expert that no row chooses.

    B is the batch, E the number of experts.

    Args:
        top_k: Number k of experts that keep weight; None or 0 for all.
        load_balancing_weight: Coefficient of the loss that evens out the use of experts; 0 for none.

    Call arguments:
        scores: `(B, E)`.
        training: Whether the load-balancing loss is added.

    Returns:
        Gate weights `(B, E)`, which sum to 1 over the last axis.

    Raises:
        ValueError: If `top_k` is negative or above E, or `load_balancing_weight` is negative.

    Example:

    >>> np.round(GateSoftmax(top_k=2)(np.log([[1.0, 2.0, 6.0]]).astype("float32")), 2)
    array([[0.  , 0.25, 0.75]], dtype=float32)

    Reference: Shazeer et al., ICLR 2017, section 2.1 (top k), equations 6 and 7 (load balancing).
    """

    def __init__(self, top_k: int | None = None, load_balancing_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if load_balancing_weight < 0.0:
            raise ValueError(f"`load_balancing_weight` must be 0 or more. Received: {load_balancing_weight}")
        self.top_k = check_top_k(top_k)
        self.load_balancing_weight = float(load_balancing_weight)

    def build(self, scores_shape) -> None:
        check_top_k(self.top_k, scores_shape[-1], self.name)
        super().build(scores_shape)

    def call(self, scores, training=None):
        if training and self.load_balancing_weight:
            importance = ops.sum(softmax(ops.cast(scores, "float32"), axis=-1), axis=0)
            self.add_loss(self.load_balancing_weight * squared_variation(importance))
        if self.top_k:
            # By index and not by the k-th highest score, which several experts may have.
            _, chosen = ops.top_k(scores, self.top_k)
            kept = ops.sum(ops.one_hot(chosen, scores.shape[-1], dtype="int32"), axis=-2) > 0
            scores = ops.where(kept, scores, float("-inf"))
        return softmax(scores, axis=-1)

    def compute_output_shape(self, scores_shape):
        return tuple(scores_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "top_k": self.top_k, "load_balancing_weight": self.load_balancing_weight}


def squared_variation(values):
    """The squared coefficient of variation of `values` `(E,)`: their variance over their squared mean, a scalar."""
    return ops.var(values) / ops.square(ops.mean(values))


@keras.saving.register_keras_serializable(package="mvke_tf")
class VirtualKernelGate(keras.layers.Layer):
    """The virtual-kernel gate of one task: `g = softmax over the task's kernels of tag · Wᵀ`.

    Neither a projection nor a factor 1/sqrt(D). The gate reads the tag (the item side) only, and a kernel outside
    the task's choice gets no gradient from it.

    B is the batch, K the number of virtual kernels, D the width.

    Args:
        kernels: Indices of the virtual kernels that the task may select.
        top_k: Number of kernels that keep weight, per row (see `GateSoftmax`); 0 for all, as published.
        load_balancing_weight: Coefficient of the loss that evens out the use of kernels (see `GateSoftmax`).

    Call arguments:
        tag: Tag vectors `(B, D)`.
        kernels: Virtual kernels W `(K, D)`.
        training: Whether the load-balancing loss is added.

    Returns:
        Gate weights `(B, len(kernels))`, which sum to 1 over the last axis.

    Raises:
        ValueError: If an index lies outside `[0, K)`, the widths differ, or `top_k` is above the number of kernels.

    Example:

    >>> gate = VirtualKernelGate(kernels=(0, 1, 2))
    >>> gate(np.ones((2, 64)), np.ones((5, 64))).shape
    TensorShape([2, 3])

    Reference: Xu et al., KDD 2022, section 4.3.
    """

    def __init__(
        self, kernels: Sequence[int], top_k: int = 0, load_balancing_weight: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.kernels = check_indices(kernels)
        check_top_k(top_k, len(self.kernels), self.name)
        self.softmax = GateSoftmax(top_k, load_balancing_weight, dtype=self.dtype_policy, name="softmax")

    def build(self, tag_shape, kernels_shape) -> None:
        check_indices(self.kernels, kernels_shape[0])
        if tag_shape[-1] != kernels_shape[-1]:
            raise ValueError(
                f"{self.name}: expected a tag (B, D) and kernels (K, D) of one width D. "
                f"Received: {tuple(tag_shape)} and {tuple(kernels_shape)}"
            )
        self.softmax.build((tag_shape[0], len(self.kernels)))
        super().build(tag_shape)

    def call(self, tag, kernels, training=None):
        chosen = ops.take(kernels, ops.convert_to_tensor(self.kernels, "int32"), axis=0)
        return self.softmax(ops.matmul(tag, ops.transpose(chosen)), training=training)

    def compute_output_shape(self, tag_shape, kernels_shape):
        return (tag_shape[0], len(self.kernels))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "kernels": self.kernels,
            "top_k": self.softmax.top_k,
            "load_balancing_weight": self.softmax.load_balancing_weight,
        }


@keras.saving.register_keras_serializable(package="mvke_tf")
class ExpertGate(keras.layers.Layer):
    """The softmax gate of one task over the experts that it sees: `g = softmax(x Wg + bg)`.

    B is the batch, I the input width.

    Args:
        experts: Indices of the experts that the task sees.
        stddev: Standard deviation of the normal distribution that Wg starts from.
        seed: Seed of that draw.
        top_k: Number of experts that keep weight, per row (see `GateSoftmax`); 0 for all.
        load_balancing_weight: Coefficient of the loss that evens out the use of experts (see `GateSoftmax`).

    Call arguments:
        inputs: `(B, I)`.
        training: Whether the load-balancing loss is added.

    Returns:
        Gate weights `(B, len(experts))`, which sum to 1 over the last axis.

    Raises:
        ValueError: If `top_k` is above the number of experts.

    Example:

    >>> ExpertGate(experts=range(6))(np.ones((2, 48))).shape
    TensorShape([2, 6])

    Reference: Ma et al., KDD 2018, section 4.2, equation 7; with a part of the experts it is the gate of CGC (Tang et
    al., RecSys 2020).
    """

    def __init__(
        self,
        experts: Sequence[int],
        stddev: float = 0.01,
        seed: int | None = None,
        top_k: int = 0,
        load_balancing_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.experts = check_indices(experts)
        check_top_k(top_k, len(self.experts), self.name)
        self.stddev = stddev
        self.seed = seed
        self.dense = keras.layers.Dense(
            len(self.experts),
            kernel_initializer=keras.initializers.RandomNormal(stddev=stddev, seed=seed),
            dtype=self.dtype_policy,
            name="dense",
        )
        self.softmax = GateSoftmax(top_k, load_balancing_weight, dtype=self.dtype_policy, name="softmax")

    def build(self, inputs_shape) -> None:
        self.dense.build(inputs_shape)
        self.softmax.build((inputs_shape[0], len(self.experts)))
        super().build(inputs_shape)

    def call(self, inputs, training=None):
        return self.softmax(self.dense(inputs), training=training)

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0], len(self.experts))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "experts": self.experts,
            "stddev": self.stddev,
            "seed": self.seed,
            "top_k": self.softmax.top_k,
            "load_balancing_weight": self.softmax.load_balancing_weight,
        }


@keras.saving.register_keras_serializable(package="mvke_tf")
class MixExperts(keras.layers.Layer):
    """The mixture of chosen experts: `Σ_e g_e expert_e`.

    Args:
        experts: Indices of the experts, in the order of the gate weights.
        stopped: Those of them that get no gradient from this mixture.

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

    def __init__(self, experts: Sequence[int], stopped: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = check_indices(experts)
        self.stopped = tuple(stopped)
        if not set(self.stopped) <= set(self.experts):
            raise ValueError(f"`stopped` must be some of the experts {self.experts}. Received: {self.stopped}")

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
        experts = [ops.stop_gradient(own) if e in self.stopped else own for e, own in enumerate(experts)]
        if gate is None:
            return experts[self.experts[0]]
        chosen = ops.stack([experts[index] for index in self.experts], axis=1)
        return ops.squeeze(ops.matmul(ops.expand_dims(gate, 1), chosen), 1)

    def compute_output_shape(self, outputs_shape, gate_shape=None):
        return (outputs_shape[0], outputs_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "experts": self.experts, "stopped": self.stopped}


@keras.saving.register_keras_serializable(package="mvke_tf")
class TransferAttention(keras.layers.Layer):
    """AITM's transfer between two tasks: `z = Σ_v softmax_v(⟨h2(v), h3(v)⟩ / √D) h1(v)` over v = p and q.

    h1, h2 and h3 are linear, D to D.

    Call arguments:
        transferred: p, from the task before, `(B, D)`.
        own: q, of the task itself, `(B, D)`.

    Returns:
        `(B, D)`.

    Example:

    >>> TransferAttention()(np.ones((2, 4)), np.ones((2, 4))).shape
    TensorShape([2, 4])

    Reference: Xi et al., KDD 2021, equations 4 to 6.
    """

    def build(self, transferred_shape, own_shape) -> None:
        width = own_shape[-1]
        # Glorot's uniform one for each of the three: the first axis does not count.
        per_matrix = keras.initializers.VarianceScaling(3.0, "fan_avg", "uniform")
        self.kernels = self.add_weight(shape=(3, width, width), initializer=per_matrix, name="kernels")
        self.biases = self.add_weight(shape=(3, 1, width), initializer="zeros", name="biases")
        super().build(transferred_shape)

    def call(self, transferred, own):
        both = ops.stack([transferred, own], axis=1)
        value, key, query = (ops.matmul(both, self.kernels[h]) + self.biases[h] for h in range(3))
        scores = ops.sum(key * query, axis=-1) / float(own.shape[-1]) ** 0.5
        return ops.sum(ops.expand_dims(ops.softmax(scores, axis=-1), -1) * value, axis=1)

    def compute_output_shape(self, transferred_shape, own_shape):
        return tuple(own_shape)


@keras.saving.register_keras_serializable(package="mvke_tf")
class GatedTag(keras.layers.Layer):
    """The item vector of MVKE: the tag, scaled by each gate weight in turn, side by side.

    Its inner product with the outputs of the same experts side by side is the published logit,
    `⟨concat_k expert_k, concat_k g_k tag⟩ = ⟨Σ_k g_k expert_k, tag⟩`.

    B is the batch, n the number of gate weights, D the width of the tag.

    Call arguments:
        tag: Tag vectors `(B, D)`.
        gate: Gate weights `(B, n)`.

    Returns:
        `(B, n D)`.

    Example:

    >>> GatedTag()(np.array([[1.0, 2.0]]), np.array([[0.25, 0.75]]))
    <tf.Tensor: shape=(1, 4), dtype=float32, numpy=array([[0.25, 0.5 , 0.75, 1.5 ]], dtype=float32)>
    """

    def build(self, tag_shape, gate_shape) -> None:
        super().build(tag_shape)

    def call(self, tag, gate):
        return ops.reshape(gate[:, :, None] * tag[:, None, :], (-1, gate.shape[1] * tag.shape[1]))

    def compute_output_shape(self, tag_shape, gate_shape):
        return (tag_shape[0], gate_shape[1] * tag_shape[1])


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
