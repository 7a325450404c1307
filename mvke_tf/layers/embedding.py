"""Field embeddings."""

from __future__ import annotations

from typing import Any

import keras
import keras_rs
from keras import ops


@keras.saving.register_keras_serializable(package="mvke_tf")
class FieldEmbedding(keras_rs.layers.EmbedReduce):
    """Embeds one field, single-valued or multi-valued and weighted, of which index 0 is "unknown".

    A multi-valued field becomes the weighted mean of its embeddings; a row whose weights are all zero
    (an empty list) becomes the zero vector. While training, a share `unknown_rate` of the indices is
    replaced by 0, so that the embedding of "unknown" is learned from real rows.

    B is the batch, L the number of slots, D the width.

    Args:
        input_dim: Number of indices, the unknown index 0 included.
        output_dim: Width D.
        unknown_rate: Share of the indices replaced by 0 while training, in [0, 1].
        seed: Seed of that replacement.
        **kwargs: Arguments of `keras_rs.layers.EmbedReduce`.

    Call arguments:
        inputs: Integer indices `(B,)`, or `(B, L)` for a multi-valued field.
        weights: Float weights `(B, L)` of a multi-valued field; a weight of 0 leaves a slot out.
        training: Whether indices are replaced by "unknown".

    Returns:
        Field embeddings `(B, D)`.

    Raises:
        ValueError: If `unknown_rate` lies outside [0, 1].

    Example:

    >>> layer = FieldEmbedding(input_dim=10, output_dim=4)
    >>> layer(np.array([3, 0])).shape
    TensorShape([2, 4])
    """

    def __init__(
        self, input_dim: int, output_dim: int, unknown_rate: float = 0.0, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(input_dim, output_dim, **kwargs)
        if not 0.0 <= unknown_rate <= 1.0:
            raise ValueError(f"`unknown_rate` must lie in [0, 1]. Received: {unknown_rate}")
        self.unknown_rate = unknown_rate
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed) if unknown_rate else None

    @property
    def embeddings(self):
        # The product makes the gradient dense. Keras' optimizers update every row of their moments in any case, and
        # deduplicating a sparse gradient first took an eighth of a training step.
        return super().embeddings * 1.0

    def call(self, inputs, weights=None, training=None):
        if training and self.unknown_rate:
            kept = keras.random.uniform(ops.shape(inputs), seed=self.seed_generator) >= self.unknown_rate
            inputs = ops.where(kept, inputs, ops.zeros_like(inputs))
        if weights is not None:
            weights = ops.cast(weights, self.compute_dtype)
        # A gather of (B, L, D) rows costs more, most of all to differentiate, than a product with a smaller bag (B, V).
        if weights is None or self.combiner != "mean" or self.input_dim >= inputs.shape[-1] * self.output_dim:
            return super().call(inputs, weights)
        rows = ops.broadcast_to(ops.expand_dims(ops.arange(ops.shape(inputs)[0]), 1), ops.shape(inputs))
        indices = ops.reshape(ops.stack([rows, ops.cast(inputs, rows.dtype)], axis=-1), (-1, 2))
        bag = ops.scatter(indices, ops.reshape(weights, (-1,)), (ops.shape(inputs)[0], self.input_dim))
        total = ops.matmul(bag, ops.cast(self.embeddings, self.compute_dtype))
        return ops.divide_no_nan(total, ops.sum(weights, axis=-1, keepdims=True))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "unknown_rate": self.unknown_rate, "seed": self.seed}
