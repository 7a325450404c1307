# SPDX-License-Identifier: Apache-2.0
"""From raw columns to what a model reads; the same code in preparation and inside a SavedModel.

A raw table is a dictionary of equally long arrays, one per feature; a multi-valued feature is a pair of arrays
`(n, L)`, values and weights (`<name>_weights`), in which a slot of weight 0 is empty.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import polars as pl

from mvke_tf.data.declaration import DEFAULT_BINS, ENCODINGS, KEEP, SCALINGS
from mvke_tf.errors import DataError, DeclarationError
from mvke_tf.schema import CONSTANT_ITEM, SUMMARY_SUFFIX, TOWERS, WEIGHTS_SUFFIX, Feature

if TYPE_CHECKING:
    import tensorflow as tf

    from mvke_tf.data.declaration import Dataset, FeatureDeclaration

logger = logging.getLogger(__name__)

INT64_MIN = -(2**63)
# Kind of a raw feature to the dtype of its values in TensorFlow, in NumPy, and to the value that means "unknown".
RAW_DTYPES = {"string": "string", "integer": "int64", "number": "float32", "vector": "float32"}
NUMPY_DTYPES = {"string": object, "integer": np.int64, "number": np.float32, "vector": np.float32}
RAW_UNKNOWN: dict[str, Any] = {"string": "", "integer": INT64_MIN, "number": math.nan, "vector": math.nan}
# Kinds of raw values that each encoding reads.
RAW_KINDS = {
    "vocabulary": ("string", "integer"),
    "hash": ("string", "integer"),
    "buckets": ("number",),
    "integer": ("integer",),
    "number": ("number",),
    "vector": ("vector",),
}
# Encoded numbers are clipped to minus this and this: an extreme one would overflow the products of the layers.
MOST_DEVIATIONS = 1_000.0
# Rows that `Encoder.encode_numpy` encodes at a time.
BLOCK = 65_536


@dataclasses.dataclass(frozen=True)
class EncodedFeature:
    """What encoding needs to know of a declared feature.

    Args:
        name: Name of the raw column and of the model input.
        tower: `"user"` or `"item"`.
        encode: One of `mvke_tf.data.declaration.ENCODINGS`; with `embedding` that of the feature named there.
        raw: Kind of the raw values: `"string"` (unknown: `""`), `"integer"` (int64; unknown: the smallest), `"number"`
            (float32; unknown: NaN) or `"vector"` (float32 `(n, width)`; unknown: a row with any NaN).
        length: Slots of a list; 1 of a single value.
        keep: Which values of a longer list are kept, `"first"`, `"last"` or `"heaviest"`; they stay in their order.
        weighted: Whether the values of the list have weights of their own; else each has weight 1.
        summary: Whether the mean weight and the length of the list are encoded, too; see `summaries`.
        embedding: Name of the feature whose vocabulary and embedding table serve this one.
        bins: Hash and integer: number of indices. Buckets and piecewise numbers: most bins.
        out_of_vocabulary_bins: Vocabulary: values outside it are hashed into so many more indices.
        min_count: Vocabulary: fewest rows of the log that a value is in.
        max_size: Vocabulary: most values; 0 for all.
        values: Vocabulary: this list, instead of what the training part has.
        boundaries: Buckets and piecewise numbers: these bounds, instead of quantiles of the training part.
        scaling: Number: `"standard"` or `"piecewise"`.
        width: Vector: its entries.
        missing: Raw values that mean "unknown".
        unknown_rate: See `mvke_tf.schema.Feature`.
        unknown_group: See `mvke_tf.schema.Feature`.
        context: Whether the value is known at the moment of a request only.
        profile_value: The raw value of a context feature in profiles, a tuple of a list or a vector; None for unknown.
        constant: Whether this stands for a side without features: no raw column, index 0 always.

    Raises:
        ValueError: If tower, encoding, kind of values, `keep` or scaling is none of those listed, or they do not go
            together.
    """

    name: str
    tower: str
    encode: str
    raw: str
    length: int = 1
    keep: str = "first"
    weighted: bool = False
    summary: bool = False
    embedding: str | None = None
    bins: int = 0
    out_of_vocabulary_bins: int = 0
    min_count: int = 1
    max_size: int = 0
    values: tuple[Any, ...] = ()
    boundaries: tuple[float, ...] = ()
    scaling: str = "standard"
    width: int = 0
    missing: tuple[Any, ...] = ()
    unknown_rate: float = 0.0
    unknown_group: str | None = None
    context: bool = False
    profile_value: Any = None
    constant: bool = False

    def __post_init__(self) -> None:
        for name in ("values", "boundaries", "missing"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.profile_value, list):
            object.__setattr__(self, "profile_value", tuple(self.profile_value))
        legal = {"tower": TOWERS, "encode": ENCODINGS, "keep": KEEP, "scaling": SCALINGS}
        for name, options in legal.items():
            if getattr(self, name) not in options:
                raise ValueError(
                    f"Feature {self.name!r}: `{name}` must be one of {options}. Received: {getattr(self, name)!r}"
                )
        if self.raw not in RAW_KINDS[self.encode]:
            raise ValueError(
                f"Feature {self.name!r}: the encoding {self.encode!r} reads raw values of the kinds "
                f"{RAW_KINDS[self.encode]}. Received: {self.raw!r}"
            )
        least = {"length": 1, "bins": 1 if self.encode in ("hash", "integer") and not self.constant else 0}
        least |= {"width": 1 if self.encode == "vector" else 0, "out_of_vocabulary_bins": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"Feature {self.name!r}: `{name}` must be at least {lowest}. Received: {getattr(self, name)}"
                )
        if self.is_dense and (self.is_list or self.embedding):
            raise ValueError(
                f"Feature {self.name!r}: the encoding {self.encode!r} is for single values without a shared "
                f"embedding. Received: length={self.length}, embedding={self.embedding!r}"
            )

    @property
    def is_dense(self) -> bool:
        """Whether the encoding is a dense vector."""
        return self.encode in ("number", "vector")

    @property
    def is_list(self) -> bool:
        """Whether the feature is multi-valued."""
        return self.length > 1

    @property
    def summaries(self) -> tuple[EncodedFeature, ...]:
        """Mean weight and length of the list as numbers, which have no raw columns of their own.

        The list's embedding is a weighted mean, from which the level of its weights cancels. The model reads both as
        one field, `<name>_summary`: on a CPU a step takes longer for every field.
        """
        if not self.summary:
            return ()
        return tuple(
            EncodedFeature(name, self.tower, "number", "number", scaling="piecewise", context=self.context)
            for name in (self.name + "_mean_weight", self.name + "_length")
        )

    @property
    def table(self) -> str:
        """Name of the feature that owns vocabulary, bounds and embedding table."""
        return self.embedding or self.name

    @property
    def raw_inputs(self) -> tuple[str, ...]:
        """Names of the raw columns."""
        if self.constant:
            return ()
        return (self.name, self.name + WEIGHTS_SUFFIX) if self.is_list else (self.name,)

    @classmethod
    def from_declaration(cls, feature: FeatureDeclaration, dataset: Dataset, raw_kind: str) -> EncodedFeature:
        """The encoding of a declared feature.

        Args:
            feature: One of the features of `dataset`.
            dataset: The whole declaration, for the feature that owns the vocabulary.
            raw_kind: Kind of the raw values, from the stored type of the column.

        Words in `missing` that are no value of that kind are left out: nothing equals them.

        Raises:
            DeclarationError: If `profile_value` is no value of that kind.
        """
        owner = dataset.owner(feature)
        if owner.encode is None:
            raise ValueError(f"Feature {owner.name!r} has neither an encoding nor another feature's embedding.")
        return cls(
            name=feature.name,
            tower=feature.tower,
            encode=owner.encode,
            raw=raw_kind,
            length=feature.length,
            keep=feature.keep,
            weighted=feature.has_weights,
            summary=feature.has_weights and feature.summary,
            embedding=None if owner.name == feature.name else owner.name,
            bins=owner.bins,
            out_of_vocabulary_bins=owner.out_of_vocabulary_bins,
            min_count=owner.min_count,
            max_size=owner.max_size,
            values=as_kind(owner.values, raw_kind),
            boundaries=tuple(map(float, owner.boundaries)),
            scaling=owner.scaling,
            width=owner.width,
            missing=as_kind((*owner.missing, *feature.missing), raw_kind),
            unknown_rate=feature.unknown_rate,
            unknown_group=feature.unknown_group,
            context=feature.context,
            profile_value=_profile_value(feature, dataset.name, raw_kind),
        )

    @classmethod
    def constant_item(cls) -> EncodedFeature:
        """The only field of an item side without features."""
        return cls(CONSTANT_ITEM, "item", "integer", "integer", constant=True)

    def unknown_raw(self, rows: int = 1, profile: bool = False) -> dict[str, np.ndarray]:
        """Raw columns of `rows` rows in which this feature is unknown; of a list, without a value.

        Args:
            rows: How many.
            profile: Whether a context feature has its `profile_value` instead.
        """
        if self.constant:
            return {}
        dtype, unknown = NUMPY_DTYPES[self.raw], RAW_UNKNOWN[self.raw]
        value = self.profile_value if profile else None
        if self.raw == "vector":
            return {self.name: np.tile(np.array([unknown] * self.width if value is None else value, dtype), (rows, 1))}
        if self.is_list:
            values = np.tile(np.array(value or [unknown], dtype), (rows, 1))
            weights = np.full(values.shape, 1.0 if value else 0.0, np.float32)
            return {self.name: values, self.name + WEIGHTS_SUFFIX: weights}
        return {self.name: np.full(rows, unknown if value is None else value, dtype)}


def _profile_value(feature: FeatureDeclaration, dataset: str, kind: str) -> Any:
    """The declared value of a context feature in profiles, as a raw value of a kind; a tuple of a list or a vector."""
    value = feature.profile_value
    # An empty text is an unknown value.
    if value is None or value == "":
        return None
    is_tuple = isinstance(value, (list, tuple))
    values = list(value) if is_tuple else [value]
    if kind == "vector":
        return tuple(map(float, values))
    for one in values:
        if not as_kind([one], kind):
            expected = {"integer": "a whole number", "number": "a number"}.get(kind, "a text, not empty")
            raise DeclarationError(
                f"{dataset}, [features.{feature.name}]: `profile_value` must be {expected}, as its column has. "
                f"Received: {_short(one)}"
            )
    raw = as_kind(values, kind)
    return raw if is_tuple else raw[0]


def as_kind(values: Iterable[Any], kind: str) -> tuple[Any, ...]:
    """Declared values as raw values of a kind, each once, without those that are none of it.

    As text, a whole number has no decimal point.
    """
    converted: dict[Any, None] = {}
    for value in values:
        if kind == "string" and value != "":
            if isinstance(value, bool):
                text = str(value).lower()
            else:
                text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
            converted[text] = None
        if kind == "string":
            continue
        try:
            if kind == "integer":
                whole = int(value)
                if whole == value or isinstance(value, str):
                    converted[whole] = None
            elif math.isfinite(number := float(value)):
                converted[number] = None
        except (TypeError, ValueError, OverflowError):
            logger.debug("%r is no value of the kind %s.", value, kind)
    return tuple(value for value in converted if kind != "integer" or INT64_MIN < value < -INT64_MIN)


class Encoder:
    """Turns raw tables into encoded tables; index 0 is "unknown".

    | encoding | encoded |
    |---|---|
    | vocabulary | 1 + position in the vocabulary; then the out-of-vocabulary bins (FarmHash64 of the value as text) |
    | hash | 1 + FarmHash64 of the value as text, modulo `bins` |
    | integer | value + 1 where 0 <= value < `bins` |
    | buckets | 1 + number of bounds that are at most the value |
    | number, standard | [unknown, (value - mean) / standard deviation], from -1000 to 1000 |
    | number, piecewise | [unknown, e_1 .. e_T] (Gorishniy et al., NeurIPS 2022, equation 1), from -1000 to 1000 |
    | vector | [unknown, v_1 .. v_W] |

    The encoder is fitted once, on rows of the training part, and holds nothing but vocabularies, bounds and moments.

    Args:
        features: How each column is encoded.
        state: Per feature that owns it, and needs one: vocabulary, bounds, or `[mean, standard deviation]`; from `fit`
            or from a file. An empty list: nothing was known in the training part, and every value is unknown.

    Raises:
        DataError: If the state does not fit the features.
    """

    def __init__(self, features: Iterable[EncodedFeature], state: Mapping[str, Sequence[Any]]) -> None:
        self.features = tuple(features)
        self._by_name = {feature.name: feature for feature in self.features}
        self.state = {name: list(values) for name, values in state.items()}
        _check_state(tuple(feature for feature, _ in _with_summaries(self.features)), self.state)

    def __reduce__(self) -> tuple:
        # Layers are made where they are needed.
        return type(self), (self.features, self.state)

    @functools.cached_property
    def layers(self) -> dict[str, keras.layers.Layer]:
        """The preprocessing layers of the features that own one; they need TensorFlow, which training does not."""
        return {
            feature.name: layer
            for feature in self.features
            if feature.embedding is None and (layer := _layer(feature, self.state.get(feature.name))) is not None
        }

    @classmethod
    def fit(
        cls,
        features: Iterable[EncodedFeature],
        tables: Mapping[str, Mapping[str, Any]],
        rows: Mapping[str, np.ndarray],
        counts: Mapping[str, np.ndarray] | None = None,
    ) -> Encoder:
        """Learns vocabularies, bounds and moments from chosen rows.

        A vocabulary has the values in at least `min_count` rows of the log, at most the `max_size` most frequent ones,
        in the order of the number of chosen table rows that have them, then of the value. Bounds are quantiles, and
        moments those, of the values of the chosen table rows.

        Args:
            features: How each column is encoded.
            tables: Raw tables, `{"user": ..., "item": ...}`.
            rows: Rows of the tables to learn from, each once: those that occur in the training part.
            counts: Number of training rows of the log per row of each table, `(N,)`; by default 1 each.
        """
        learner = Learner(features)
        for tower, table in tables.items():
            if tower in rows:
                learner.add(tower, table, np.asarray(rows[tower]), None if counts is None else counts[tower])
        return learner.encoder()

    def of_tower(self, tower: str) -> tuple[EncodedFeature, ...]:
        """The features of one tower, in order."""
        return tuple(feature for feature in self.features if feature.tower == tower)

    def raw_inputs(self, tower: str) -> dict[str, tuple[str, int, EncodedFeature]]:
        """The raw columns of one tower: `{name: (TensorFlow dtype, rank, feature)}`; none of a constant side."""
        inputs = {}
        for feature in self.of_tower(tower):
            for name in feature.raw_inputs:
                dtype = RAW_DTYPES[feature.raw] if name == feature.name else "float32"
                inputs[name] = (dtype, 2 if feature.is_list or feature.raw == "vector" else 1, feature)
        return inputs

    def example(self, feature: EncodedFeature) -> Any:
        """A raw value that training knows, as JSON has it; None where the encoder holds none."""
        state = self.state.get(feature.table)
        if feature.encode == "integer":
            value: Any = 0
        elif not state:
            return None
        elif feature.encode == "vocabulary":
            value = state[0]
        else:
            is_mean = feature.encode == "number" and feature.scaling == "standard"
            value = float(f"{state[0 if is_mean else len(state) // 2]:.6g}")
        return [value] if feature.is_list else value

    def schema_features(self) -> tuple[Feature, ...]:
        """The encoded features, as a `mvke_tf.schema.Schema` has them."""
        found = []
        for feature in self.features:
            found.append(
                Feature(
                    feature.name,
                    feature.tower,
                    vocabulary_size=0 if feature.is_dense else self._vocabulary_size(feature.table),
                    length=feature.length,
                    width=self._width(feature) if feature.is_dense else 0,
                    embedding=feature.embedding,
                    unknown_rate=feature.unknown_rate,
                    unknown_group=feature.unknown_group,
                )
            )
            if feature.summary:
                width = sum(map(self._width, feature.summaries)) - 1
                found.append(Feature(feature.name + SUMMARY_SUFFIX, feature.tower, width=width))
        return tuple(found)

    def _vocabulary_size(self, owner: str) -> int:
        feature = self._by_name[owner]
        if feature.constant:
            return 1
        if feature.encode == "vocabulary":
            return 1 + len(self.state[owner]) + feature.out_of_vocabulary_bins
        # n bounds make n + 1 buckets.
        return 1 + (len(self.state[owner]) + 1 if feature.encode == "buckets" else feature.bins)

    def _width(self, feature: EncodedFeature) -> int:
        if feature.encode == "vector":
            return 1 + feature.width
        return 1 + (1 if feature.scaling == "standard" else max(1, len(self.state[feature.name]) - 1))

    def encode(self, table: Mapping[str, Any], tower: str, rows: Any = None) -> dict[str, tf.Tensor]:
        """Encodes the columns of one tower; NumPy arrays or TensorFlow tensors in, TensorFlow tensors out.

        Args:
            table: Raw columns, `(n,)`, of a vector `(n, W)`, of a list `(n, L)` for any L. A weight that is not above
                0, or not finite, leaves its slot empty. Columns of other names are ignored.
            tower: `"user"` or `"item"`.
            rows: Number of rows of a tower that is constant; ignored of others.

        Returns:
            int32 indices `(n,)` or `(n, length)`, float32 weights `(n, length)`, and float32 dense vectors
            `(n, width)`. An empty list is one slot of index 0 and weight 1, its summary unknown.

        Raises:
            ValueError: If a column is missing, or `rows` of a constant tower.
        """
        import tensorflow as tf

        features, names = self.of_tower(tower), list(self.raw_inputs(tower))
        if missing := [name for name in names if name not in table]:
            raise ValueError(
                f"The {tower} features {missing} are missing. Expected: {names}. Received: {sorted(table)}"
            )
        encoded = {}
        for feature in features:
            if feature.constant:
                if rows is None:
                    raise ValueError(f"The {tower} side has no raw features. Expected `rows`, the number of its rows")
                encoded[feature.name] = tf.zeros([rows], tf.int32)
                continue
            values = tf.convert_to_tensor(table[feature.name], RAW_DTYPES[feature.raw])
            if feature.encode == "vector":
                if values.shape[1] not in (None, feature.width):
                    raise ValueError(
                        f"The {tower} feature {feature.name!r} is a vector of {feature.width} numbers. "
                        f"Received: shape {tuple(values.shape)}"
                    )
                values = tf.ensure_shape(values, (None, feature.width))
                encoded[feature.name] = _dense(tf.ones_like(values[:, :1], tf.bool), values)
            elif feature.encode == "number":
                known = _is_known(feature, values)[:, None]
                encoded[feature.name] = self._number(feature, known, values[:, None])
            elif not feature.is_list:
                encoded[feature.name] = self._index(feature, values)
            else:
                values, weights = _fit_length(values, table[feature.name + WEIGHTS_SUFFIX], feature)
                filled = weights > 0
                encoded[feature.name] = tf.where(filled, self._index(feature, values), 0)
                # An empty list is one "unknown": a zero vector would have no direction for a layer norm.
                known = tf.reduce_any(filled, axis=1, keepdims=True)
                lone_unknown = ~known & (tf.range(feature.length) == 0)
                encoded[feature.name + WEIGHTS_SUFFIX] = tf.where(filled, weights, tf.cast(lone_unknown, tf.float32))
                if feature.summary:
                    mean, length = (
                        self._number(number, known, of_lists[:, None])
                        for number, of_lists in zip(feature.summaries, _summarised(weights), strict=True)
                    )
                    encoded[feature.name + SUMMARY_SUFFIX] = tf.concat([mean, length[:, 1:]], axis=1)
        return encoded

    def _index(self, feature: EncodedFeature, values: tf.Tensor) -> tf.Tensor:
        """int32 indices of raw values, of the same shape."""
        import tensorflow as tf

        owner = self._by_name[feature.table]
        known, layer = _is_known(feature, values), self.layers.get(owner.name)
        if owner.encode == "integer":
            inside = known & (values >= 0) & (values < owner.bins)
            return tf.cast(tf.where(inside, values + 1, 0), tf.int32)
        if owner.encode == "hash":
            return tf.where(known, 1 + _hash(values, owner.bins), 0)
        if owner.encode == "buckets":
            if layer is None:
                return tf.zeros_like(values, tf.int32)
            return tf.where(known, 1 + tf.cast(layer(values), tf.int32), 0)
        index = tf.zeros_like(values, tf.int32) if layer is None else tf.cast(layer(values), tf.int32)
        if bins := owner.out_of_vocabulary_bins:
            index = tf.where(index > 0, index, 1 + len(self.state[owner.name]) + _hash(values, bins))
        return tf.where(known, index, 0)

    def _number(self, feature: EncodedFeature, known: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """Known `(n, 1)` and values `(n, 1)` as `(n, width)`."""
        import tensorflow as tf

        state = self.state[feature.name]
        if not state:
            return _dense(tf.zeros_like(known), tf.zeros_like(values))
        if feature.scaling == "standard":
            mean, deviation = state
            # Times the reciprocal: a graph would rewrite the division, and differ in the last bit.
            return _dense(known, _clipped((values - mean) * np.float32(1 / (deviation or 1.0))))
        # A constant has one bin of width 1.
        bounds = state if len(state) > 1 else [state[0], state[0] + 1.0]
        low, high = np.asarray(bounds[:-1], np.float32), np.asarray(bounds[1:], np.float32)
        inside = (values - low) * (1 / (high - low))
        first, last = tf.range(len(bounds) - 1) == 0, tf.range(len(bounds) - 1) == len(bounds) - 2
        inside = tf.where((values < low) & ~first, 0.0, tf.where((values >= high) & ~last, 1.0, inside))
        return _dense(known, _clipped(inside))

    def encode_numpy(
        self, table: Mapping[str, Any], tower: str, rows: int | None = None, block: int = BLOCK
    ) -> dict[str, np.ndarray]:
        """As `encode`, block by block, on the CPU, into NumPy arrays.

        Args:
            table: See `encode`; NumPy arrays.
            tower: See `encode`.
            rows: See `encode`.
            block: Rows at a time.
        """
        import tensorflow as tf

        names = [name for name in self.raw_inputs(tower) if name in table]
        total = len(table[names[0]]) if names else rows or 0
        encoded: dict[str, np.ndarray] = {}
        # Without rows, one empty block gives the columns their types.
        for start in range(0, max(total, 1), block):
            end = min(start + block, total)
            with tf.device("CPU"):
                columns = {name: table[name][start:end] for name in names}
                part = self.encode(columns, tower, None if rows is None else end - start)
            for name, column in part.items():
                column = column.numpy()
                if name not in encoded:
                    encoded[name] = np.empty((total, *column.shape[1:]), column.dtype)
                encoded[name][start:end] = column
        return encoded

    def unknown(self, tower: str, rows: int = 1) -> dict[str, np.ndarray]:
        """Encoded columns of `rows` entities of which nothing is known."""
        return self.encode_numpy(self.unknown_raw(tower, rows), tower, rows)

    def unknown_raw(self, tower: str, rows: int = 1, profile: bool = False) -> dict[str, np.ndarray]:
        """Raw columns of `rows` entities of which nothing is known; see `EncodedFeature.unknown_raw`."""
        columns: dict[str, np.ndarray] = {}
        for feature in self.of_tower(tower):
            columns |= feature.unknown_raw(rows, profile)
        return columns

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `Encoder.from_dict` reads it back."""
        defaults = {field.name: field.default for field in dataclasses.fields(EncodedFeature)}
        features = [
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(feature).items()
                if value != defaults[name]
            }
            for feature in self.features
        ]
        return {"features": features, "state": self.state}

    @classmethod
    def from_dict(cls, values: Any) -> Encoder:
        """Reads what `to_dict` wrote.

        Raises:
            DataError: If it is something else.
        """
        if not isinstance(values, dict) or set(values) != {"features", "state"}:
            raise DataError(f"An encoder is an object of `features` and `state`. Received: {_short(values)}")
        features, state = values["features"], values["state"]
        if not isinstance(features, list) or not features:
            raise DataError(f"The encoder's `features` must be a list, not empty. Received: {_short(features)}")
        if not isinstance(state, dict) or not all(isinstance(value, list) for value in state.values()):
            raise DataError(f"The encoder's `state` must be an object of lists. Received: {_short(state)}")
        return cls([_feature_from_dict(feature) for feature in features], state)


class Learner:
    """Learns an encoder from tables that come one after another, as `Encoder.fit` does from one per tower.

    Args:
        features: How each column is encoded.
    """

    def __init__(self, features: Iterable[EncodedFeature]) -> None:
        self.features = tuple(features)
        self._counted: dict[str, list[pl.DataFrame]] = {}
        self._numbers: dict[str, list[tuple[np.ndarray, np.ndarray | None]]] = {}

    def _learned(self) -> Iterator[tuple[EncodedFeature, EncodedFeature | None]]:
        for feature, listed in _with_summaries(self.features):
            if feature.embedding is None and _has_state(feature):
                yield feature, listed

    def add(
        self,
        tower: str,
        table: Mapping[str, Any],
        rows: np.ndarray,
        counts: np.ndarray | None = None,
        order: np.ndarray | None = None,
    ) -> None:
        """Learns from chosen rows of one table.

        Args:
            tower: `"user"` or `"item"`.
            table: Raw columns.
            rows: Rows to learn from, each once.
            counts: Number of training rows of the log per row of the table, `(N,)`; by default 1 each.
            order: Of a table of several, where each of its rows stands among all, `(N,)`: sums depend on the order of
                their terms. Rows of one number stand in the order in which they come.
        """
        for feature, listed in self._learned():
            if feature.tower != tower or not _is_fitted(feature):
                continue
            values, entity = _flat_values(feature, table, rows, listed)
            if feature.encode == "vocabulary":
                count = np.ones(len(rows), np.int64) if counts is None else counts[rows]
                self._counted.setdefault(feature.name, []).append(_counted(feature, values, entity, count))
            elif order is None:
                self._numbers.setdefault(feature.name, []).append((values, None))
            elif feature.encode == "number" and feature.scaling == "standard":
                self._numbers.setdefault(feature.name, []).append((values, order[rows][entity]))
            else:
                # Quantiles are those of the values in any order.
                self._numbers.setdefault(feature.name, []).append(np.unique(values, return_counts=True))

    def join(self, other: Learner) -> None:
        """Learns what another one of the same features has learned from tables that come after."""
        for name, counted in other._counted.items():
            self._counted.setdefault(name, []).extend(counted)
        for name, numbers in other._numbers.items():
            self._numbers.setdefault(name, []).extend(numbers)

    def encoder(self) -> Encoder:
        """What has been learned."""
        state: dict[str, list] = {}
        for feature, _ in self._learned():
            if feature.encode == "vocabulary" and feature.values:
                state[feature.name] = list(feature.values)
            elif feature.boundaries:
                dtype = np.float32 if feature.encode == "number" else np.float64
                state[feature.name] = np.unique(np.asarray(feature.boundaries, dtype)).tolist()
            elif feature.encode == "vocabulary":
                state[feature.name] = _vocabulary(feature, pl.concat(self._counted[feature.name]))
            else:
                values = self._values(feature)
                state[feature.name] = _bounds(feature, values) if len(values) else []
            if not state[feature.name]:
                logger.warning(
                    "Nothing is known of the feature %r in the training part: every value of it is unknown.",
                    feature.name,
                )
        return Encoder(self.features, state)

    def _values(self, feature: EncodedFeature) -> np.ndarray:
        numbers = self._numbers.pop(feature.name)
        if len(numbers) == 1 and numbers[0][1] is None:
            return numbers[0][0]
        values = np.concatenate([values for values, _ in numbers])
        others = np.concatenate([other for _, other in numbers if other is not None])
        if feature.encode == "number" and feature.scaling == "standard":
            return values[np.argsort(others, kind="stable")]
        return np.repeat(values, others)


def _is_fitted(feature: EncodedFeature) -> bool:
    """Whether the state of an encoding is not declared."""
    return not feature.values and not feature.boundaries


def _short(value: Any, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


_JSON_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str | None": (str, type(None)),
    "tuple[Any, ...]": list,
    "tuple[float, ...]": list,
    "Any": object,
}
_FIELD_TYPES = {field.name: _JSON_TYPES[str(field.type)] for field in dataclasses.fields(EncodedFeature)}


def _feature_from_dict(values: Any) -> EncodedFeature:
    if not isinstance(values, dict) or not {"name", "tower", "encode", "raw"} <= set(values) <= set(_FIELD_TYPES):
        raise DataError(
            f"A feature of an encoder is an object of some of {list(_FIELD_TYPES)}, the first four at least. "
            f"Received: {_short(values)}"
        )
    for name, value in values.items():
        kind = _FIELD_TYPES[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, float))):
            raise DataError(
                f"The encoder's feature {values['name']!r}: `{name}` has the wrong type. Received: {_short(value)}"
            )
    raw = values["raw"]
    for name in ("values", "missing"):
        _check_values(values["name"], f"`{name}`", values.get(name, ()), str if raw == "string" else (int, float))
    _check_values(values["name"], "`boundaries`", values.get("boundaries", ()), (int, float))
    try:
        return EncodedFeature(**values)
    except ValueError as error:
        raise DataError(str(error)) from error


def _has_state(feature: EncodedFeature) -> bool:
    """Whether the encoding of an owner is learned."""
    return feature.encode in ("vocabulary", "buckets", "number") and not feature.constant


def _check_state(features: tuple[EncodedFeature, ...], state: dict[str, list]) -> None:
    by_name = {feature.name: feature for feature in features}
    if len(by_name) < len(features):
        raise DataError(f"Every encoded feature needs another name. Received: {[feature.name for feature in features]}")
    for feature in features:
        owner = by_name.get(feature.table)
        if owner is None or owner.embedding is not None:
            owners = sorted(name for name, other in by_name.items() if other.embedding is None)
            raise DataError(
                f"Feature {feature.name!r}: `embedding` must name a feature with a vocabulary, one of {owners}. "
                f"Received: {feature.embedding!r}"
            )
        if (owner.encode, owner.raw) != (feature.encode, feature.raw):
            raise DataError(
                f"Feature {feature.name!r} shares the vocabulary of {owner.name!r}, and needs its encoding and kind of "
                f"values, {(owner.encode, owner.raw)}. Received: {(feature.encode, feature.raw)}"
            )
    expected = {feature.name for feature in features if feature.embedding is None and _has_state(feature)}
    if set(state) != expected:
        raise DataError(
            f"The encoder needs vocabularies, bounds or moments of {sorted(expected)}. Received: {sorted(state)}"
        )
    for name, values in state.items():
        feature = by_name[name]
        if feature.encode == "vocabulary":
            _check_values(name, "the vocabulary", values, str if feature.raw == "string" else int)
            unknown = RAW_UNKNOWN[feature.raw]
            if len(set(values)) < len(values) or unknown in values:
                raise DataError(
                    f"The encoder's feature {name!r}: the vocabulary must have each value once, and not {unknown!r}. "
                    f"Received: {_short(values)}"
                )
            continue
        _check_values(name, "bounds or moments", values, (int, float))
        if feature.encode == "number" and feature.scaling == "standard":
            if values and (len(values) != 2 or values[1] < 0):
                raise DataError(
                    f"The encoder's feature {name!r}: expected [mean, standard deviation]. Received: {_short(values)}"
                )
        elif (np.diff(np.asarray(values, np.float32 if feature.encode == "number" else np.float64)) <= 0).any():
            raise DataError(f"The encoder's feature {name!r}: bounds must increase. Received: {_short(values)}")


def _check_values(name: str, what: str, values: Iterable[Any], kind: type | tuple[type, ...]) -> None:
    for value in values:
        finite = not isinstance(value, (int, float)) or (
            math.isfinite(value) if isinstance(value, float) else INT64_MIN <= value < -INT64_MIN
        )
        if not isinstance(value, kind) or isinstance(value, bool) or not finite:
            raise DataError(
                f"The encoder's feature {name!r}: {what} must have "
                f"{'texts' if kind is str else 'finite numbers'} only. Received: {_short(value)}"
            )


def _layer(feature: EncodedFeature, state: list | None) -> keras.layers.Layer | None:
    """The preprocessing layer of an owner; None if it needs none, or nothing is known."""
    if not state or feature.encode == "number":
        return None
    if feature.encode == "buckets":
        return keras.layers.Discretization(bin_boundaries=[float(bound) for bound in state])
    # Neither "[UNK]" nor -1, the layers' own tokens of everything unknown: they may be values of the data.
    lookup = keras.layers.StringLookup if feature.raw == "string" else keras.layers.IntegerLookup
    return lookup(vocabulary=state, oov_token=RAW_UNKNOWN[feature.raw])


def _with_summaries(features: Iterable[EncodedFeature]) -> Iterator[tuple[EncodedFeature, EncodedFeature | None]]:
    """Everything that is encoded, and of a number derived from a list, the list."""
    for feature in features:
        yield feature, None
        for number in feature.summaries:
            yield number, feature


def _flat_values(
    feature: EncodedFeature, table: Mapping[str, Any], rows: np.ndarray, listed: EncodedFeature | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The known values in chosen rows, flat, and which of these rows each is from."""
    entity = np.arange(len(rows))
    if listed is not None:
        values = _summary_values(listed, table, rows)[listed.summaries.index(feature)]
    else:
        values = np.asarray(table[feature.name])[rows]
    if feature.is_list:
        weights = np.asarray(table[feature.name + WEIGHTS_SUFFIX])[rows]
        filled = np.isfinite(weights) & (weights > 0)
        values, entity = values[filled], np.broadcast_to(entity[:, None], filled.shape)[filled]
    known = known_values(feature, values)
    return values[known], entity[known]


def _summary_values(feature: EncodedFeature, table: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
    """The numbers of `feature.summaries` in chosen rows, `(2, n)`."""
    import tensorflow as tf

    numbers = np.empty((len(feature.summaries), len(rows)), np.float32)
    with tf.device("CPU"):
        for start in range(0, len(rows), BLOCK):
            weights = np.asarray(table[feature.name + WEIGHTS_SUFFIX])[rows[start : start + BLOCK]]
            numbers[:, start : start + BLOCK] = _summarised(_fit_length(None, weights, feature)[1])
    return numbers


def _counted(feature: EncodedFeature, values: np.ndarray, entity: np.ndarray, count: np.ndarray) -> pl.DataFrame:
    """Of each value the number of entities that have it, and the sum of their counts."""
    known = pl.Series(values.tolist(), dtype=pl.String) if feature.raw == "string" else pl.Series(values)
    frame = pl.DataFrame({"value": known, "entity": entity, "count": count[entity]}).unique(["value", "entity"])
    return frame.group_by("value").agg(pl.len().cast(pl.Int64).alias("entities"), pl.col("count").sum())


def _vocabulary(feature: EncodedFeature, counted: pl.DataFrame) -> list:
    frame = counted.group_by("value").agg(pl.col("entities").sum(), pl.col("count").sum())
    frame = frame.filter(pl.col("count") >= feature.min_count)
    if feature.max_size:
        frame = frame.sort(["count", "entities", "value"], descending=[True, True, False]).head(feature.max_size)
    return frame.sort(["entities", "value"], descending=[True, False])["value"].to_list()


def _bounds(feature: EncodedFeature, values: np.ndarray) -> list[float]:
    """Bounds or moments of a number, from at least one value."""
    if feature.encode == "buckets":
        layer = keras.layers.Discretization(num_bins=feature.bins or DEFAULT_BINS)
        layer.adapt(values[:, None])
        return np.unique(layer.bin_boundaries).tolist()
    if feature.scaling == "standard":
        values = values.astype(np.float64)
        return [float(values.mean()), float(values.std())]
    quantiles = np.quantile(values.astype(np.float64), np.linspace(0, 1, (feature.bins or DEFAULT_BINS) + 1))
    return np.unique(quantiles.astype(np.float32)).tolist()


def known_values(feature: EncodedFeature, values: np.ndarray) -> np.ndarray:
    """Which raw values of a feature that is no vector are known, bool, of the same shape.

    Args:
        feature: Any that is no vector.
        values: Raw values; of a list, weights are not looked at.
    """
    if feature.raw == "number":
        return np.isfinite(values) & ~np.isin(values, np.asarray(feature.missing, np.float32))
    unknown = (RAW_UNKNOWN[feature.raw], *feature.missing)
    if feature.raw == "integer":
        return ~np.isin(values, np.asarray(unknown, np.int64))
    words = set(unknown)
    return np.fromiter((value not in words for value in values.flat), bool, values.size).reshape(values.shape)


def _is_known(feature: EncodedFeature, values: tf.Tensor) -> tf.Tensor:
    """bool, of the shape of the raw values."""
    import tensorflow as tf

    if feature.raw == "number":
        known = tf.math.is_finite(values)
    else:
        known = values != tf.constant(RAW_UNKNOWN[feature.raw], values.dtype)
    if feature.missing:
        words = tf.constant(feature.missing, values.dtype)
        known &= ~tf.reduce_any(values[..., None] == words, axis=-1)
    return known


def _hash(values: tf.Tensor, bins: int) -> tf.Tensor:
    """FarmHash64 of the values as text, modulo `bins`, int32."""
    import tensorflow as tf

    text = values if values.dtype == tf.string else tf.strings.as_string(values)
    return tf.cast(tf.strings.to_hash_bucket_fast(text, bins), tf.int32)


def _dense(known: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`[unknown, values]` `(n, 1 + W)` of known `(n, 1)` and values `(n, W)`; values not finite are unknown."""
    import tensorflow as tf

    known &= tf.reduce_all(tf.math.is_finite(values), axis=1, keepdims=True)
    return tf.concat([tf.cast(~known, tf.float32), tf.where(known, values, 0.0)], axis=1)


def _clipped(values: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    return tf.clip_by_value(values, -MOST_DEVIATIONS, MOST_DEVIATIONS)


def _summarised(weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean weight, NaN of an empty list, and length of lists with weights `(n, L)`, each float32 `(n,)`."""
    import tensorflow as tf

    # In float64 the sums are exact, so that their order, which follows the shape of a batch, does not matter.
    length = tf.reduce_sum(tf.cast(weights > 0, tf.float64), axis=1)
    mean = tf.reduce_sum(tf.cast(weights, tf.float64), axis=1) / length
    return tf.cast(mean, tf.float32), tf.cast(length, tf.float32)


def _fit_length(values: Any, weights: Any, feature: EncodedFeature) -> tuple[tf.Tensor, tf.Tensor]:
    """Values and weights `(n, L)` as `(n, length)`: the slots to keep in their order, then empty ones, of weight 0."""
    import tensorflow as tf

    weights = tf.convert_to_tensor(weights, tf.float32)
    weights = tf.where(tf.math.is_finite(weights) & (weights > 0), weights, 0.0)
    if values is None:
        values = tf.zeros_like(weights, RAW_DTYPES[feature.raw])
    length, slots = feature.length, values.shape[1]
    if slots is None:
        shorter = tf.shape(values)[1] <= length
        values, weights = tf.cond(
            shorter, lambda: (values, weights), lambda: _kept(values, weights, length, feature.keep)
        )
    elif slots > length:
        values, weights = _kept(values, weights, length, feature.keep)
    empty = [[0, 0], [0, length - tf.shape(values)[1]]]
    fill = tf.constant(RAW_UNKNOWN[feature.raw], values.dtype)
    return (
        tf.ensure_shape(tf.pad(values, empty, constant_values=fill), (None, length)),
        tf.ensure_shape(tf.pad(weights, empty), (None, length)),
    )


def _kept(values: tf.Tensor, weights: tf.Tensor, length: int, keep: str) -> tuple[tf.Tensor, tf.Tensor]:
    """`length` of more than `length` slots: filled ones before empty ones, else as `keep` says; in their order."""
    import tensorflow as tf

    if keep == "heaviest":
        rank = weights
    else:
        slot = tf.range(1, tf.shape(values)[1] + 1)
        rank = tf.where(weights > 0, slot if keep == "last" else slot[::-1], 0)
    # Of equal ranks, `top_k` prefers the first.
    chosen = tf.sort(tf.math.top_k(rank, length).indices, axis=1)
    return tf.gather(values, chosen, batch_dims=1), tf.gather(weights, chosen, batch_dims=1)
