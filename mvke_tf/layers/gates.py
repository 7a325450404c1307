"""Gates: how much each task listens to each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from mvke_tf.layers.experts import check_indices


def check_top_k(top_k: int | None, num_experts: int | None = None, gate: str = "gate") -> int:
    """The number of experts that keep weight, 0 for all, once it is known to be possible.

    Args:
        top_k: The number.
        num_experts: How many experts the gate weighs, where that is known.
        gate: Name of the gate, for the message.

    Raises:
        ValueError: If it is no integer, negative, or larger than the number of experts.
    """
    top_k = top_k or 0
    if top_k != int(top_k) or top_k < 0:
        raise ValueError(f"`top_k` must be 0 (all experts) or the number that keep weight. Received: {top_k}")
    top_k = int(top_k)
    if num_experts is not None and top_k > num_experts:
        raise ValueError(
            f"{gate}: `top_k` (`gate_top_k`) must be at most the number of experts that this gate weighs, "
            f"{num_experts}; 0 keeps all. Received: {top_k}"
        )
    return top_k


@keras.saving.register_keras_serializable(package="mvke_tf")
class GateSoftmax(keras.layers.Layer):
    """From scores to gate weights: `g = softmax(s)`, over the k highest scores of each row if `top_k` is k.

    With `top_k`, exactly k experts of a row keep weight, those of the lowest index where scores are equal; the others
    get a weight of exactly zero, and no gradient of a mixture reaches their scores or their outputs. With k = 1 the
    kept weight is always 1, so that nothing but the balance loss trains the scores.

    With `balance`, training adds to the loss `balance * CV(I)²`, where `I_e = Σ_b softmax(s_b)_e` is the importance of
    expert e and CV(I) the standard deviation of the importances over their mean: 0 if the batch uses all experts alike,
    E - 1 if it uses one alone. Differs from the paper in that scores have no noise; the softmax is therefore that of
    all scores, kept or not, so that the loss also reaches an expert that no row chooses.

    B is the batch, E the number of experts.

    Args:
        top_k: Number k of experts that keep weight; None or 0 for all.
        balance: Coefficient of the loss that evens out the use of experts; 0 for none.

    Call arguments:
        scores: `(B, E)`.
        training: Whether the balance loss is added.

    Returns:
        Gate weights `(B, E)`, which sum to 1 over the last axis.

    Raises:
        ValueError: If `top_k` is negative or above E, or `balance` is negative.

    Example:

    >>> GateSoftmax(top_k=2)(np.log([[1.0, 2.0, 6.0]]).astype("float32"))
    <tf.Tensor: shape=(1, 3), dtype=float32, numpy=array([[0.  , 0.25, 0.75]], dtype=float32)>

    Reference: Shazeer et al., ICLR 2017, section 2.1 (top k), equations 6 and 7 (balance).
    """

    def __init__(self, top_k: int | None = None, balance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if balance < 0.0:
            raise ValueError(f"`balance` must be 0 or more. Received: {balance}")
        self.top_k = check_top_k(top_k)
        self.balance = float(balance)

    def build(self, scores_shape) -> None:
        check_top_k(self.top_k, scores_shape[-1], self.name)
        super().build(scores_shape)

    def call(self, scores, training=None):
        if training and self.balance:
            importance = ops.sum(ops.softmax(ops.cast(scores, "float32"), axis=-1), axis=0)
            self.add_loss(self.balance * squared_variation(importance))
        if self.top_k:
            # By index and not by the k-th highest score, which several experts may have.
            _, chosen = ops.top_k(scores, self.top_k)
            kept = ops.sum(ops.one_hot(chosen, scores.shape[-1], dtype="int32"), axis=-2) > 0
            scores = ops.where(kept, scores, float("-inf"))
        return ops.softmax(scores, axis=-1)

    def compute_output_shape(self, scores_shape):
        return tuple(scores_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "top_k": self.top_k, "balance": self.balance}


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
        balance: Coefficient of the loss that evens out the use of kernels (see `GateSoftmax`).

    Call arguments:
        tag: Tag vectors `(B, D)`.
        kernels: Virtual kernels W `(K, D)`.
        training: Whether the balance loss is added.

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

    def __init__(self, kernels: Sequence[int], top_k: int = 0, balance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernels = check_indices(kernels)
        check_top_k(top_k, len(self.kernels), self.name)
        self.softmax = GateSoftmax(top_k, balance, dtype=self.dtype_policy, name="softmax")

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
            "balance": self.softmax.balance,
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
        balance: Coefficient of the loss that evens out the use of experts (see `GateSoftmax`).

    Call arguments:
        inputs: `(B, I)`.
        training: Whether the balance loss is added.

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
        balance: float = 0.0,
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
        self.softmax = GateSoftmax(top_k, balance, dtype=self.dtype_policy, name="softmax")

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
            "balance": self.softmax.balance,
        }


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
