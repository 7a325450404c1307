"""Row-wise operations of the scoring head that every two-tower model shares."""

from __future__ import annotations

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="mvke_tf")
class RowDot(keras.layers.Layer):
    """The inner product of each user vector with the item vector of the same row.

    Call arguments:
        user: User vectors `(B, W)`.
        item: Item vectors `(B, W)`.

    Returns:
        Logits `(B, 1)`, in nats.

    Raises:
        ValueError: If the widths differ.

    Example:

    >>> RowDot()(np.ones((2, 3)), np.ones((2, 3)))
    <tf.Tensor: shape=(2, 1), dtype=float32, numpy=
    array([[3.],
           [3.]], dtype=float32)>
    """

    def build(self, user_shape, item_shape) -> None:
        if user_shape[-1] != item_shape[-1]:
            raise ValueError(
                f"{self.name}: user and item vectors need the same width. "
                f"Received: {tuple(user_shape)} and {tuple(item_shape)}"
            )
        super().build(user_shape)

    def call(self, user, item):
        return ops.sum(user * item, axis=-1, keepdims=True)

    def compute_output_shape(self, user_shape, item_shape):
        return (user_shape[0], 1)


@keras.saving.register_keras_serializable(package="mvke_tf")
class GatherRows(keras.layers.Layer):
    """Rows of a table of vectors, by index: takes vectors of distinct entities back to the pairs of a batch.

    Call arguments:
        vectors: `(N, W)`, one row per distinct entity.
        rows: Integer indices `(B,)` into the first axis.

    Returns:
        `(B, W)`.

    Example:

    >>> GatherRows()(np.eye(2), np.array([1, 0, 1])).shape
    TensorShape([3, 2])
    """

    def build(self, vectors_shape, rows_shape) -> None:
        super().build(vectors_shape)

    def call(self, vectors, rows):
        return ops.take(vectors, rows, axis=0)

    def compute_output_shape(self, vectors_shape, rows_shape):
        return (rows_shape[0], vectors_shape[-1])
