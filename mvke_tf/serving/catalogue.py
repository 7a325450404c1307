"""The items that a SavedModel knows by id: their titles, and their vectors, computed once at export."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mvke_tf.data.features import Encoder, Table
from mvke_tf.data.prepared import Prepared
from mvke_tf.models.two_tower import tower
from mvke_tf.schema import WEIGHTS_SUFFIX

_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Items with their raw features.

    Args:
        ids: `(N,)`, distinct integers other than -1, or distinct strings other than `""`; their order breaks ties.
        features: The raw table of the items, as the encoder reads it, N rows.
        titles: `(N,)` strings; the ids by default.

    Raises:
        ValueError: If the ids are of another type, repeated or reserved, or the numbers of rows differ.
    """

    ids: Any
    features: Table
    titles: Any = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids)
        strings = ids.dtype.kind in "UO" and all(isinstance(value, str) for value in ids.flat)
        if ids.ndim != 1 or not len(ids) or not (strings or ids.dtype.kind in "iu"):
            raise ValueError(
                f"The ids of a catalogue must be a list of integers or of strings. Received: {ids.dtype}, {ids.shape}"
            )
        object.__setattr__(self, "ids", ids.astype(object) if strings else ids.astype(np.int64))
        titles = np.asarray(ids if self.titles is None else self.titles).astype(str)
        object.__setattr__(self, "titles", titles.astype(object))
        known, counts = np.unique(self.ids, return_counts=True)
        if counts.max() > 1:
            raise ValueError(
                f"Every item of a catalogue needs an id of its own. Received twice: {known[counts > 1][:10]}"
            )
        if self.padding in known:
            raise ValueError(
                f"The id {self.padding!r} is reserved for empty places in lists of ids. Received: an item with it"
            )
        rows = {"titles": len(self.titles)} | {name: len(column) for name, column in self.features.items()}
        wrong = {name: count for name, count in rows.items() if count != len(ids)}
        if wrong:
            raise ValueError(f"Expected one row for each of the {len(ids)} ids of the catalogue. Received: {wrong}")

    @classmethod
    def from_prepared(cls, prepared: Prepared) -> Catalogue:
        """All items of prepared data, in their order."""
        return cls(prepared.raw["item"]["item_id"], prepared.raw["item"], prepared.titles)

    @property
    def dtype(self) -> str:
        """TensorFlow dtype of the ids."""
        return "string" if self.ids.dtype == object else "int64"

    @property
    def padding(self) -> int | str:
        """The id of no item: it fills lists of ids up."""
        return "" if self.dtype == "string" else -1


class StoredCatalogue(tf.Module):
    """What a SavedModel holds of a catalogue of N items.

    Items whose encoded features agree have one vector, and with it one score to the last bit, wherever they stand: a
    matrix product alone may round equal columns differently, and ties would not be ties.

    Args:
        model: A two-tower model.
        encoder: The encoder of the data that the model was trained on.
        catalogue: The items.

    Raises:
        ValueError: If a feature is missing, or a vector is NaN or infinite.
    """

    def __init__(self, model: keras.Model, encoder: Encoder, catalogue: Catalogue) -> None:
        super().__init__(name="catalogue")
        self.size = len(catalogue.ids)
        self.dtype = catalogue.dtype
        self.padding = catalogue.padding
        # One more place, for what is not in the catalogue.
        self.ids = tf.constant([*catalogue.ids, catalogue.padding], self.dtype)
        self.titles = tf.constant([*catalogue.titles, ""], "string")
        self.lookup = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(self.ids[:-1], tf.range(self.size, dtype=tf.int64)), self.size
        )
        rows, vectors = _distinct_vectors(model, encoder, catalogue.features)
        self.rows = tf.Variable(rows, trainable=False, name="rows")
        self.vectors = {
            task: tf.Variable(values, trainable=False, name=f"item_vectors_{task}") for task, values in vectors.items()
        }

    def positions(self, ids: tf.Tensor) -> tf.Tensor:
        """Places of ids in the catalogue, int64 of the same shape; N for an id that is not in it."""
        return self.lookup.lookup(ids)

    def gather(self, positions: tf.Tensor) -> dict[str, tf.Tensor]:
        """Item vectors `{task: (..., W_task)}`; at the place N those of an item of which nothing is known."""
        rows = tf.gather(self.rows, positions)
        return {task: tf.gather(vectors, rows) for task, vectors in self.vectors.items()}

    def products(self, users: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Inner products of user vectors `{task: (n, W_task)}` with those of all items, `{task: (n, N)}`."""
        rows = self.rows[:-1]
        return {
            task: tf.gather(tf.matmul(vectors, self.vectors[task], transpose_b=True), rows, axis=1)
            for task, vectors in users.items()
        }


def unknown_item(encoder: Encoder) -> dict[str, np.ndarray]:
    """The encoded features, one row, of an item of which nothing is known."""
    encoded = {}
    for feature in encoder.schema().of_tower("item"):
        encoded[feature.name] = np.zeros((1,) if feature.length == 1 else (1, feature.length), np.int32)
        if feature.length > 1:
            encoded[feature.name + WEIGHTS_SUFFIX] = np.eye(1, feature.length, dtype=np.float32)
    return encoded


def _distinct_vectors(
    model: keras.Model, encoder: Encoder, features: Table
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Item vectors of all distinct items, and which of them each item has, the unknown item last."""
    unknown = unknown_item(encoder)
    encoded = {
        name: np.concatenate([column.numpy(), unknown[name]])
        for name, column in encoder.encode(features, "item").items()
    }
    keys = np.column_stack([column.astype(np.float64) for column in encoded.values()])
    _, first, rows = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    part = tower(model, "item")
    blocks = [
        part({name: encoded[name][chosen] for name in part.input}, training=False) for chosen in _blocks(first, _BLOCK)
    ]
    vectors = {task: np.concatenate([np.asarray(block[task], np.float32) for block in blocks]) for task in part.output}
    damaged = [task for task, values in vectors.items() if not np.isfinite(values).all()]
    if damaged:
        raise ValueError(
            f"Expected finite item vectors. Received: NaN or infinite ones of the tasks {damaged}; the weights are "
            "damaged, train anew with a lower learning rate."
        )
    return rows.reshape(-1).astype(np.int32), vectors


def _blocks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
