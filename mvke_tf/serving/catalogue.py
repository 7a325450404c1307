# SPDX-License-Identifier: Apache-2.0
"""The items that a SavedModel knows by id: their names, and their vectors, computed once at export."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from mvke_tf.data.encoder import Encoder
from mvke_tf.data.store import PreparedDataset
from mvke_tf.inference.vectors import vectors_of
from mvke_tf.models import TwoTowerModel


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Items with their features, raw or encoded.

    Args:
        ids: `(N,)`, distinct integers, or distinct strings other than `""`; their order breaks ties.
        features: The raw table of the items, as the encoder reads it, N rows; not needed where they are encoded.
        names: `(N,)` strings to show; the ids by default.
        encoded: The encoded table of the items, N rows.

    Raises:
        ValueError: If the ids are of another type, repeated or reserved, or the numbers of rows differ.
    """

    ids: Any
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Any = None
    encoded: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids)
        strings = ids.dtype.kind in "UO" and all(isinstance(value, str) for value in ids.flat)
        if ids.ndim != 1 or not len(ids) or not (strings or ids.dtype.kind in "iu"):
            raise ValueError(
                f"The ids of a catalogue must be a list of integers or of strings. Received: {ids.dtype}, {ids.shape}"
            )
        object.__setattr__(self, "ids", ids.astype(object) if strings else ids.astype(np.int64))
        names = ids if self.names is None else self.names
        object.__setattr__(self, "names", np.array([str(name) for name in names], object))
        known, counts = np.unique(self.ids, return_counts=True)
        if counts.max() > 1:
            raise ValueError(
                f"Every item of a catalogue needs an id of its own. Received twice: {known[counts > 1][:10]}"
            )
        if strings and "" in known:
            raise ValueError("The id '' is reserved for empty places in lists of ids. Received: an item with it")
        columns = self.features if self.encoded is None else self.encoded
        rows = {"names": len(self.names)} | {name: len(column) for name, column in columns.items()}
        wrong = {name: count for name, count in rows.items() if count != len(ids)}
        if wrong:
            raise ValueError(f"Expected one row for each of the {len(ids)} ids of the catalogue. Received: {wrong}")

    @classmethod
    def from_prepared(cls, prepared: PreparedDataset) -> Catalogue:
        """All items of prepared data in their latest state, ordered by id.

        Raises:
            ValueError: If the items have no ids.
        """
        if not prepared.has_items:
            raise ValueError("A catalogue needs ids of items. Received: a dataset without `[keys] item`")
        items, rows = prepared.items, prepared.catalogue
        names = None if items.name is None else np.asarray(items.name, object)[rows]
        encoded = {name: np.asarray(column)[rows] for name, column in items.encoded.items()}
        return cls(np.asarray(items.key)[rows], names=names, encoded=encoded)

    @property
    def dtype(self) -> str:
        """TensorFlow dtype of the ids."""
        return "string" if self.ids.dtype == object else "int64"

    @cached_property
    def padding(self) -> int | str:
        """The id of no item, which fills lists of ids up: `""`, or the highest negative number that is free."""
        if self.dtype == "string":
            return ""
        taken = {int(value) for value in self.ids if value < 0}
        return next(number for number in itertools.count(-1, -1) if number not in taken)

    def table(self, encoder: Encoder) -> Mapping[str, np.ndarray]:
        """The encoded table of the items."""
        return encoder.encode_numpy(self.features, "item") if self.encoded is None else self.encoded


class StoredCatalogue(tf.Module):
    """What a SavedModel holds of a catalogue of N items.

    Items whose encoded features agree have one vector, and with it one score to the last bit, wherever they stand: a
    matrix product alone may round equal columns differently, and ties would not be ties.

    Args:
        model: A two-tower model.
        encoder: The encoder of the data that the model was trained on.
        catalogue: The items.

    Raises:
        MvkeError: If a vector is NaN or infinite.
        ValueError: If a feature is missing.
    """

    def __init__(self, model: TwoTowerModel, encoder: Encoder, catalogue: Catalogue) -> None:
        super().__init__(name="catalogue")
        self.size = len(catalogue.ids)
        self.dtype = catalogue.dtype
        self.padding = catalogue.padding
        # One more place, for what is not in the catalogue.
        self.ids = tf.constant([*catalogue.ids, catalogue.padding], self.dtype)
        self.names = tf.constant([*catalogue.names, ""], "string")
        self.lookup = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(self.ids[:-1], tf.range(self.size, dtype=tf.int64)), self.size
        )
        table = catalogue.table(encoder)
        first, rows = _distinct({name: table[name] for name in model.item_tower.input})
        vectors = vectors_of(model.item_tower, table, first)
        unknown = vectors_of(model.item_tower, encoder.unknown("item"))
        # The last vector is that of an item of which nothing is known.
        self.rows = tf.Variable(np.append(rows, len(first)).astype(np.int32), trainable=False, name="rows")
        self.vectors = {
            task: tf.Variable(np.concatenate([values, unknown[task]]), trainable=False, name=f"item_vectors_{task}")
            for task, values in vectors.items()
        }

    @property
    def width(self) -> int:
        """Numbers in the vectors of an item, of all tasks."""
        return sum(vectors.shape[1] for vectors in self.vectors.values())

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


def _distinct(table: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The first row of every distinct row of an encoded table, and for every row which of these it equals."""
    count = len(next(iter(table.values())))
    columns = [np.ascontiguousarray(column).reshape(count, -1).view(np.uint8) for column in table.values()]
    rows = np.ascontiguousarray(np.concatenate(columns, axis=1))
    _, first, same = np.unique(rows.view([("", f"V{rows.shape[1]}")]), return_index=True, return_inverse=True)
    return first, same.reshape(-1)
