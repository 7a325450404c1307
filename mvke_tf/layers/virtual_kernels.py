# SPDX-License-Identifier: Apache-2.0
"""The virtual kernels and the attention by which each of them reads the user's fields."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from mvke_tf.layers.gates import softmax

# tf.contrib's layer normalisation, which the reference uses; Keras' own default is 1e-3.
LAYER_NORM_EPSILON = 1e-12


@keras.saving.register_keras_serializable(package="mvke_tf")
class VirtualKernels(keras.layers.Layer):
    """The trained table of virtual kernels W `(K, D)`.

    One instance is called in both towers: the user tower's attention and the item tower's gates read the
    same weight.

    Args:
        num_kernels: Number K of virtual kernels.
        dim: Width D.
        stddev: Standard deviation of the normal distribution that W starts from.
        seed: Seed of that draw.

    Call arguments:
        inputs: Any tensor; it only ties the table to a functional graph.

    Returns:
        W `(K, D)`.

    Example:

    >>> VirtualKernels(5, 64)(np.zeros((2, 3))).shape
    TensorShape([5, 64])

    Reference: Xu et al., KDD 2022, section 4.1.
    """

    def __init__(
        self, num_kernels: int, dim: int, stddev: float = 0.01, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_kernels < 1 or dim < 1:
            raise ValueError(f"`num_kernels` and `dim` must be at least 1. Received: {num_kernels}, {dim}")
        self.num_kernels = num_kernels
        self.dim = dim
        self.stddev = stddev
        self.seed = seed

    def build(self, inputs_shape=None) -> None:
        self.kernels = self.add_weight(
            shape=(self.num_kernels, self.dim),
            initializer=keras.initializers.RandomNormal(stddev=self.stddev, seed=self.seed),
            name="kernels",
        )
        super().build(inputs_shape)

    def call(self, inputs):
        return ops.cast(self.kernels, self.compute_dtype)

    def compute_output_shape(self, inputs_shape):
        return (self.num_kernels, self.dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_kernels": self.num_kernels,
            "dim": self.dim,
            "stddev": self.stddev,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="mvke_tf")
class VirtualKernelAttention(keras.layers.Layer):
    """Each virtual kernel weighs the user's fields and keeps them apart.

        Q = W Wq + bq,  Key = X Wk + bk,  V = X Wv + bv
        A = softmax over the fields of Key Qᵀ / sqrt(D)
        Y[b, f, k] = LayerNorm(A[b, f, k] V[b, f] + X[b, f])

    The field axis is kept, with a residual. The layer norm has epsilon 1e-12 (TensorFlow 1).

    B is the batch, F the number of fields, K the number of virtual kernels, D the width.

    Args:
        stddev: Standard deviation of the normal distribution that Wq, Wk and Wv start from.
        seed: Seed of those draws.

    Call arguments:
        fields: Field embeddings X `(B, F, D)`.
        kernels: Virtual kernels W `(K, D)`.
        return_attention_scores: Whether to return A as well.

    Returns:
        Y `(B, F, K, D)`; with `return_attention_scores`, also A `(B, F, K)`, which sums to 1 over the fields F.

    Raises:
        ValueError: If the widths of fields and kernels differ.

    Example:

    >>> layer = VirtualKernelAttention()
    >>> layer(np.ones((2, 9, 64)), np.ones((5, 64))).shape
    TensorShape([2, 9, 5, 64])

    Reference: Xu et al., KDD 2022, section 4.1.
    """

    def __init__(self, stddev: float = 0.01, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stddev = stddev
        self.seed = seed
        self.dense: dict[str, keras.layers.Dense] = {}

    def build(self, fields_shape, kernels_shape) -> None:
        if len(fields_shape) != 3 or len(kernels_shape) != 2 or fields_shape[-1] != kernels_shape[-1]:
            raise ValueError(
                f"{self.name}: expected fields (B, F, D) and kernels (K, D) of one width D. "
                f"Received: {tuple(fields_shape)} and {tuple(kernels_shape)}"
            )
        dim = fields_shape[-1]
        for offset, name in enumerate(("query", "key", "value")):
            # Two initializers of one seed draw the same numbers.
            seed = None if self.seed is None else self.seed + offset
            self.dense[name] = keras.layers.Dense(
                dim,
                kernel_initializer=keras.initializers.RandomNormal(stddev=self.stddev, seed=seed),
                dtype=self.dtype_policy,
                name=name,
            )
            self.dense[name].build(kernels_shape if name == "query" else fields_shape)
        self.gamma = self.add_weight(shape=(dim,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(dim,), initializer="zeros", name="beta")
        super().build(fields_shape)

    def call(self, fields, kernels, return_attention_scores=False):
        key, query = self.dense["key"], ops.transpose(self.dense["query"](kernels))
        # (X Wk + bk) Qᵀ, multiplied from the right: the keys (B, F, D) need not be made.
        scores = ops.matmul(fields, ops.matmul(key.kernel, query)) + ops.matmul(key.bias, query)
        scores = softmax(scores / fields.shape[-1] ** 0.5, axis=1)
        outputs = normalized_mixture(scores, self.dense["value"](fields), fields, self.gamma, self.beta)
        return (outputs, scores) if return_attention_scores else outputs

    def compute_output_spec(self, fields, kernels, return_attention_scores=False):
        shape = self.compute_output_shape(fields.shape, kernels.shape)
        outputs = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return outputs
        return outputs, keras.KerasTensor(shape[:-1], dtype=self.compute_dtype)

    def compute_output_shape(self, fields_shape, kernels_shape):
        return (*fields_shape[:2], kernels_shape[0], fields_shape[2])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "stddev": self.stddev, "seed": self.seed}


def normalized_mixture(scores, values, fields, gamma, beta):
    """`LayerNorm(scores[..., None] * values[..., None, :] + fields[..., None, :])` over the last axis.

    For one field, the K rows to normalise lie in the plane of the centred value v and the centred field x, so that
    their variance follows from three scalars, `a² var(v) + 2 a cov(v, x) + var(x)`, and the result is one product of
    `(K, 3)` coefficients with the rows `(gamma v, gamma x, beta)`. That writes the `(B, F, K, D)` tensor once, where
    the layer norm written out reads and writes it many times. Statistics are float32 under every dtype policy, because
    epsilon 1e-12 is zero in half precision.

    Args:
        scores: A `(B, F, K)`.
        values: V `(B, F, D)`.
        fields: X `(B, F, D)`.
        gamma: Scale `(D,)`.
        beta: Offset `(D,)`.

    Returns:
        `(B, F, K, D)`, in the dtype of `values`.
    """
    dtype = values.dtype
    scores, values, fields, gamma, beta = (ops.cast(x, "float32") for x in (scores, values, fields, gamma, beta))
    values = values - ops.mean(values, axis=-1, keepdims=True)
    fields = fields - ops.mean(fields, axis=-1, keepdims=True)
    value_variance = ops.mean(ops.square(values), axis=-1, keepdims=True)
    field_variance = ops.mean(ops.square(fields), axis=-1, keepdims=True)
    covariance = ops.mean(values * fields, axis=-1, keepdims=True)
    variance = ops.square(scores) * value_variance + 2.0 * scores * covariance + field_variance
    # Rounding may leave a variance of zero slightly negative.
    scale = ops.rsqrt(ops.maximum(variance, 0.0) + LAYER_NORM_EPSILON)
    coefficients = ops.stack([scores * scale, scale, ops.ones_like(scale)], axis=-1)
    rows = ops.stack([values * gamma, fields * gamma, ops.broadcast_to(beta, ops.shape(values))], axis=-2)
    return ops.cast(ops.matmul(coefficients, rows), dtype)
