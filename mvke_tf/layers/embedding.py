# SPDX-License-Identifier: Apache-2.0
"""Fields: embeddings, stacked side by side, and made unknown while training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import keras_rs
import numpy as np
from keras import ops

# Rows from which on a table is never read or differentiated as a whole, where the backend can help it.
LARGE_TABLE = 8192
# Of a table that is saved.
BYTES_OF_A_PART = 2**22


@keras.saving.register_keras_serializable(package="mvke_tf")
class ReplaceByUnknown(keras.layers.Layer):
    """While training, makes a share of the rows "unknown", in all of its inputs together.

    Unknown is index 0, or of a dense input `[1, 0, ..., 0]`. It teaches the model what to do with an entity of which
    nothing is known: without it, the embedding of index 0 would hardly be trained, and features that are always unknown
    together would never be so while training.

    B is the batch, W the width of a dense input.

    Args:
        rate: Share of the rows, in [0, 1].
        seed: Seed of the choice.

    Call arguments:
        inputs: A list of integer indices `(B,)` and of float dense inputs `(B, W)`.
        training: Whether rows are replaced.

    Returns:
        The list, with unknown values in the chosen rows.

    Raises:
        ValueError: If `rate` lies outside [0, 1].

    Example:

    >>> ids, price = ReplaceByUnknown(1.0)([np.array([3, 4]), np.array([[0.0, 0.7], [0.0, -1.2]])], training=True)
    >>> ids
    <tf.Tensor: shape=(2,), dtype=int32, numpy=array([0, 0], dtype=int32)>
    >>> price
    <tf.Tensor: shape=(2, 2), dtype=float32, numpy=
    array([[1., 0.],
           [1., 0.]], dtype=float32)>
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"`rate` must lie in [0, 1]. Received: {rate}")
        self.rate = rate
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=None):
        inputs = [ops.cast(column, self._dtype(column)) for column in inputs]
        if not training:
            return inputs
        known = keras.random.uniform(ops.shape(inputs[0])[:1], seed=self.seed_generator) >= self.rate
        return [
            ops.where(known, column, 0)
            if len(column.shape) == 1
            else ops.where(known[:, None], column, ops.one_hot(0, column.shape[1], dtype=column.dtype))
            for column in inputs
        ]

    def _dtype(self, column) -> str:
        return "int32" if len(column.shape) == 1 else self.compute_dtype

    def compute_output_spec(self, inputs, training=None):
        return [keras.KerasTensor(column.shape, dtype=self._dtype(column)) for column in inputs]

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable(package="mvke_tf")
class FieldEmbedding(keras_rs.layers.EmbedReduce):
    """Embeds one field, single-valued or multi-valued and weighted, of which index 0 is "unknown".

    A multi-valued field becomes the weighted mean of its embeddings; a row whose weights are all zero (an empty list)
    becomes the zero vector. The result is that of `keras_rs.layers.EmbedReduce`, faster for small vocabularies.

    B is the batch, L the number of slots, D the width.

    Args:
        input_dim: Number of indices, the unknown index 0 included.
        output_dim: Width D.
        **kwargs: Arguments of `keras_rs.layers.EmbedReduce`.

    Call arguments:
        inputs: Integer indices `(B,)`, or `(B, L)` for a multi-valued field.
        weights: Float weights `(B, L)` of a multi-valued field; a weight of 0 leaves a slot out.

    Returns:
        Field embeddings `(B, D)`.

    Example:

    >>> layer = FieldEmbedding(input_dim=10, output_dim=4)
    >>> layer(np.array([3, 0])).shape
    TensorShape([2, 4])
    """

    # Whether a gradient of a large table need not be dense; the optimizer has to understand it.
    row_gradients = False
    # What is read in place of the variable.
    _read: Any = None

    @property
    def embeddings(self):
        return super().embeddings if self._read is None else self._read

    @contextmanager
    def reading(self, rows: Any) -> Iterator[None]:
        """Reads `rows` `(n, D)` in place of the table, by indices into them: what a training step has gathered."""
        # Not by assignment, which would make a variable of TensorFlow a part of the layer once more.
        self.__dict__["_read"] = rows
        try:
            yield
        finally:
            self.__dict__["_read"] = None

    def call(self, inputs, weights=None, training=None):
        if self._read is None:
            table = self.embeddings
            if self.input_dim > LARGE_TABLE and (self.row_gradients or not training):
                # TensorFlow gathers from the variable itself, without a copy of it, and the gradient names the rows.
                table = getattr(table, "value", table)
            else:
                # The product makes the gradient dense. Keras' optimizers update every row of their moments in any case,
                # and deduplicating a sparse gradient first took an eighth of a training step.
                table = table * 1.0
            with self.reading(table):
                return self.call(inputs, weights)
        if weights is not None:
            weights = ops.cast(weights, self.compute_dtype)
        count = self.embeddings.shape[0]
        # A gather of (B, L, D) rows costs more, most of all to differentiate, than a product with a smaller bag (B, V).
        if weights is None or self.combiner != "mean" or count >= inputs.shape[-1] * self.output_dim:
            return super().call(inputs, weights)
        rows = ops.broadcast_to(ops.expand_dims(ops.arange(ops.shape(inputs)[0]), 1), ops.shape(inputs))
        indices = ops.reshape(ops.stack([rows, ops.cast(inputs, rows.dtype)], axis=-1), (-1, 2))
        bag = ops.scatter(indices, ops.reshape(weights, (-1,)), (ops.shape(inputs)[0], count))
        total = ops.matmul(bag, ops.cast(self.embeddings, self.compute_dtype))
        return ops.divide_no_nan(total, ops.sum(weights, axis=-1, keepdims=True))

    def compute_output_spec(self, inputs, weights=None, training=None):
        return super().compute_output_spec(inputs, weights)

    def save_own_variables(self, store) -> None:
        own: dict[str, Any] = {}
        super().save_own_variables(own)
        if list(own) != ["0"]:
            for name, value in own.items():
                store[name] = value
            return
        # In parts, because two copies of what is stored are made in memory.
        rows = max(1, BYTES_OF_A_PART // (4 * self.output_dim))
        for part, start in enumerate(range(0, self.input_dim, rows)):
            store[str(part)] = own["0"][start : start + rows]

    def load_own_variables(self, store) -> None:
        if self.quantization_mode is not None or len(store.keys()) <= 1:
            super().load_own_variables(store)
            return
        parts = (store[str(number)] for number in range(len(store.keys())))
        table: Any = getattr(getattr(self, "_embeddings", None), "value", None)
        if self.lora_enabled or not hasattr(table, "assign"):
            super().load_own_variables({"0": np.concatenate(list(parts))})
            return
        # TensorFlow writes them into the variable, where a whole table would be three more of its size meanwhile.
        start = 0
        for part in parts:
            end = start + len(part)
            if part.shape[1:] != table.shape[1:] or end > self.input_dim:
                raise ValueError(f"{self.name}: expected {table.shape}. Received: rows to {end} of {part.shape[1:]}")
            table[start:end].assign(part)
            start = end
        if start != self.input_dim:
            raise ValueError(f"{self.name}: expected a table of {self.input_dim} rows. Received: {start}")


@keras.saving.register_keras_serializable(package="mvke_tf")
class StackFields(keras.layers.Layer):
    """Fields `(B, D)` side by side, `(B, F, D)`.

    B is the batch, F the number of fields, D their width.

    Args:
        fields: Names of the F fields in their order; `call` does not read them: a model keeps them here.

    Call arguments:
        inputs: A list of F field embeddings `(B, D)`.

    Returns:
        `(B, F, D)`.

    Raises:
        ValueError: If there is another number of inputs, or their widths differ.

    Example:

    >>> StackFields(("user_id", "age"))([np.ones((2, 4)), np.zeros((2, 4))]).shape
    TensorShape([2, 2, 4])
    """

    def __init__(self, fields: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fields = tuple(fields)

    def build(self, inputs_shape) -> None:
        widths = [shape[-1] for shape in inputs_shape]
        if len(widths) != len(self.fields) or len(set(widths)) != 1:
            raise ValueError(
                f"{self.name}: expected one input (B, D) of one width D for each of the fields {self.fields}. "
                f"Received: {[tuple(shape) for shape in inputs_shape]}"
            )
        super().build(inputs_shape)

    def call(self, inputs):
        return ops.stack(inputs, axis=1)

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0][0], len(self.fields), inputs_shape[0][1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "fields": self.fields}


@keras.saving.register_keras_serializable(package="mvke_tf")
class SliceFields(keras.layers.Layer):
    """Some of the embeddings of equal width that every field has side by side.

    Args:
        chosen: Indices of the embeddings, in the order in which they are put out.
        count: How many a field has.

    Call arguments:
        inputs: `(B, F, count D)`.

    Returns:
        `(B, F, len(chosen) D)`.

    Example:

    >>> SliceFields((2, 0), 3)(np.array([[[1.0, 2.0, 3.0]]]))
    <tf.Tensor: shape=(1, 1, 2), dtype=float32, numpy=array([[[3., 1.]]], dtype=float32)>
    """

    def __init__(self, chosen: Sequence[int], count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chosen, self.count = tuple(chosen), count

    def call(self, inputs):
        width = inputs.shape[-1] // self.count
        return ops.concatenate([inputs[..., index * width : (index + 1) * width] for index in self.chosen], axis=-1)

    def compute_output_shape(self, inputs_shape):
        return (*inputs_shape[:-1], inputs_shape[-1] // self.count * len(self.chosen))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "chosen": self.chosen, "count": self.count}
