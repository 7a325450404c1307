"""Raw features without leaks, and their encoding as integers.

A raw table is a dictionary of equally long arrays; a multi-valued feature is a pair of arrays `(n, L)`, values and
weights, in which a slot of weight 0 is empty.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pandas as pd

from mvke_tf.config import DataConfig
from mvke_tf.data.movielens import GENRES, MovieLens
from mvke_tf.schema import CTR_CVR, WEIGHTS_SUFFIX, Feature, Schema, Task

Table = dict[str, Any]
# Kind of a raw feature to its TensorFlow dtype.
RAW_DTYPES = {"integer": "int64", "string": "string", "number": "float32"}


@dataclasses.dataclass(frozen=True)
class RawFeature:
    """How one column of a raw table becomes indices.

    Args:
        name: Column of the raw table.
        tower: `"user"` or `"item"`.
        kind: `"integer"` and `"string"` look a token up, `"number"` finds the bucket of a quantity; NaN is unknown.
        length: Slots of a multi-valued feature, else 1.
        bins: Most buckets of a number, bounded by quantiles of the training part.
        shares: Name of the feature whose vocabulary and embedding table serve this one.
        unknown_rate: See `mvke_tf.schema.Feature`.
        unknown_group: See `mvke_tf.schema.Feature`.
    """

    name: str
    tower: str
    kind: str
    length: int = 1
    bins: int = 20
    shares: str | None = None
    unknown_rate: float = 0.0
    unknown_group: str | None = None


def movielens_features(config: DataConfig) -> tuple[RawFeature, ...]:
    """The fields of both towers on MovieLens."""
    length, rate = config.history_length, config.unknown_rate
    return (
        RawFeature("user_id", "user", "integer", unknown_rate=config.unknown_user_rate),
        RawFeature("age", "user", "number", bins=10, unknown_rate=rate),
        RawFeature("gender", "user", "string", unknown_rate=rate),
        RawFeature("occupation", "user", "string", unknown_rate=rate),
        RawFeature("rating_count", "user", "number", unknown_rate=rate),
        RawFeature("mean_rating", "user", "number", unknown_rate=rate),
        RawFeature("recent_items", "user", "integer", length=length, shares="item_id"),
        RawFeature("liked_items", "user", "integer", length=length, shares="item_id"),
        RawFeature("liked_genres", "user", "string", length=len(GENRES), shares="genres"),
        # Rows of the training part count themselves in the statistics: unless an item is made "new" as a whole, only
        # negatives have no rating while training, and a new item would always be taken for one.
        RawFeature("item_id", "item", "integer", unknown_rate=rate, unknown_group="item"),
        RawFeature("genres", "item", "string", length=len(GENRES)),
        RawFeature("release_year", "item", "number", unknown_rate=rate),
        RawFeature("popularity", "item", "number", unknown_rate=rate, unknown_group="item"),
        RawFeature("item_mean_rating", "item", "number", unknown_rate=rate, unknown_group="item"),
    )


def user_states(frames: MovieLens, length: int) -> tuple[Table, pd.DataFrame]:
    """What is known of a user before each moment at which he rates something.

    One row per user and timestamp. Everything but the profile comes from ratings of strictly earlier timestamps.

    Args:
        frames: The data.
        length: Slots of the lists of recent and of liked items.

    Returns:
        The raw table: `user_id`, `age` (years), `gender`, `occupation`; `rating_count`; `mean_rating` (NaN before the
        first rating); `recent_items`, the last rated items, most recent first, weighted by their rating;
        `liked_items`, the same of ratings of 4 and 5; `liked_genres`, weighted by the number of liked items. And the
        frame of keys `user_id`, `timestamp`, whose index is the row of the table.
    """
    log = _log(frames)
    # Ratings are in the order of their states, so a state's history ends where its own ratings begin.
    state_start = log.groupby(["user_id", "timestamp"], sort=True).head(1).index.to_numpy()
    keys = log.loc[state_start, ["user_id", "timestamp"]].reset_index(drop=True)
    return _states(frames, log, keys["user_id"].to_numpy(), state_start, length), keys


def latest_states(frames: MovieLens, length: int) -> Table:
    """What is known of each user by now: all of his ratings, those of the last moment included.

    Args:
        frames: The data; a user need not have rated anything.
        length: Slots of the lists of recent and of liked items.

    Returns:
        The raw table of `user_states`, one row per row of `frames.users`.
    """
    log, users = _log(frames), frames.users["user_id"].to_numpy()
    return _states(frames, log, users, np.searchsorted(log["user_id"], users, side="right"), length)


def _log(frames: MovieLens) -> pd.DataFrame:
    return frames.ratings.sort_values(["user_id", "timestamp", "item_id"], kind="stable", ignore_index=True)


def _states(frames: MovieLens, log: pd.DataFrame, users: np.ndarray, state_start: np.ndarray, length: int) -> Table:
    """The raw table of states: each of one of `users`, who by then has rated all his rows of `log[:state_start]`."""
    user_start = np.searchsorted(log["user_id"], users)
    rating = log["rating"].to_numpy()
    rated_before = state_start - user_start
    rating_sum = np.concatenate([[0], np.cumsum(rating)])
    with np.errstate(invalid="ignore"):
        mean_rating = (rating_sum[state_start] - rating_sum[user_start]) / rated_before

    liked = rating >= 4
    liked_until = np.concatenate([[0], np.cumsum(liked)])
    liked_log = log[liked]
    genre_flags = pd.DataFrame(
        [[genre in genres for genre in GENRES] for genres in frames.items["genres"]],
        index=frames.items["item_id"],
        columns=GENRES,
        dtype=np.int32,
    )
    genre_sum = np.concatenate(
        [np.zeros((1, len(GENRES)), np.int32), genre_flags.loc[liked_log["item_id"]].to_numpy().cumsum(axis=0)]
    )
    liked_genres = genre_sum[liked_until[state_start]] - genre_sum[liked_until[user_start]]

    profile = frames.users.set_index("user_id").loc[users]
    return {
        "user_id": users.astype(np.int64),
        "age": profile["age"].to_numpy(np.float32),
        "gender": profile["gender"].to_numpy(object),
        "occupation": profile["occupation"].to_numpy(object),
        "rating_count": rated_before.astype(np.float32),
        "mean_rating": mean_rating.astype(np.float32),
        **_last("recent_items", log, state_start, user_start, length),
        **_last("liked_items", liked_log, liked_until[state_start], liked_until[user_start], length),
        "liked_genres": np.broadcast_to(np.array(GENRES, object), liked_genres.shape),
        "liked_genres" + WEIGHTS_SUFFIX: liked_genres.astype(np.float32),
    }


def _last(name: str, log: pd.DataFrame, end: np.ndarray, start: np.ndarray, length: int) -> Table:
    """The last `length` rows of `log[start:end]` per state, most recent first, as values and weights `(n, length)`."""
    position = end[:, None] - 1 - np.arange(length)
    valid = position >= start[:, None]
    position = np.where(valid, position, 0)
    items, ratings = log["item_id"].to_numpy(np.int64), log["rating"].to_numpy(np.float32)
    if not len(log):
        items, ratings = np.zeros(1, np.int64), np.zeros(1, np.float32)
    return {name: np.where(valid, items[position], 0), name + WEIGHTS_SUFFIX: np.where(valid, ratings[position], 0)}


def item_table(frames: MovieLens, training_ratings: pd.DataFrame) -> Table:
    """What is known of each item, in the order of `frames.items`.

    Args:
        frames: The data.
        training_ratings: The ratings of the training part, `item_id` and `rating`; never a negative.

    Returns:
        The raw table: `item_id`; `genres` (weight 1 each); `release_year` (NaN if unknown); `popularity`, the number
        of training ratings; `item_mean_rating`, their mean (both NaN if there is none).
    """
    items = frames.items
    statistics = training_ratings.groupby("item_id")["rating"].agg(["size", "mean"]).reindex(items["item_id"])
    flags = np.array([[genre in genres for genre in GENRES] for genres in items["genres"]], np.float32)
    return {
        "item_id": items["item_id"].to_numpy(np.int64),
        "genres": np.broadcast_to(np.array(GENRES, object), flags.shape),
        "genres" + WEIGHTS_SUFFIX: flags,
        "release_year": items["release_year"].to_numpy(np.float32, na_value=np.nan),
        "popularity": statistics["size"].to_numpy(np.float32),
        "item_mean_rating": statistics["mean"].to_numpy(np.float32),
    }


class Encoder:
    """Turns raw tables into integer tables; index 0 is "unknown".

    Every column has a Keras preprocessing layer (`IntegerLookup`, `StringLookup`, `Discretization`). The encoder is
    fitted once, on rows of the training part, and holds nothing but vocabularies and bucket bounds.

    Args:
        features: How each column is encoded.
        state: `{feature: vocabulary or bucket bounds}`, from `fit` or from a file.
    """

    def __init__(self, features: tuple[RawFeature, ...], state: dict[str, list]) -> None:
        self.features = tuple(features)
        self.state = state
        missing = sorted({f.shares or f.name for f in self.features} - set(state))
        if missing:
            raise ValueError(f"The encoder has no vocabulary or bounds for {missing}. Received: {sorted(state)}")
        self.layers = {f.name: _encoding_layer(f.kind, state[f.name]) for f in self.features if f.shares is None}

    @classmethod
    def fit(cls, features: tuple[RawFeature, ...], tables: dict[str, Table], rows: dict[str, np.ndarray]) -> Encoder:
        """Learns vocabularies (most frequent first) and bucket bounds (quantiles) from chosen rows.

        Args:
            features: How each column is encoded.
            tables: Raw tables, `{"user": ..., "item": ...}`.
            rows: Rows of the training part to learn from, per table.
        """
        state = {}
        for feature in (f for f in features if f.shares is None):
            values = tables[feature.tower][feature.name][rows[feature.tower]]
            if feature.kind == "number":
                known = values[np.isfinite(values)]
                layer = keras.layers.Discretization(num_bins=feature.bins)
                if len(known):
                    layer.adapt(known[:, None])
                state[feature.name] = np.unique(layer.bin_boundaries or []).tolist()
            else:
                if feature.length > 1:
                    values = values[tables[feature.tower][feature.name + WEIGHTS_SUFFIX][rows[feature.tower]] > 0]
                state[feature.name] = (
                    pd.Series(values)
                    .value_counts(sort=False)
                    .sort_index()
                    .sort_values(ascending=False, kind="stable")
                    .index.tolist()
                )
        return cls(features, state)

    def encode(self, table: Table, tower: str) -> Table:
        """Encodes the columns of one tower; NumPy arrays or TensorFlow tensors in, TensorFlow tensors out.

        Args:
            table: Raw columns, `(n,)` or `(n, L)`; a list of another length is cut or filled up.
            tower: `"user"` or `"item"`.

        Returns:
            int32 indices `(n,)` or `(n, length)` and float32 weights `(n, length)`.

        Raises:
            ValueError: If a column is missing.
        """
        import tensorflow as tf

        chosen = [f for f in self.features if f.tower == tower]
        names = [name for f in chosen for name in ((f.name, f.name + WEIGHTS_SUFFIX) if f.length > 1 else (f.name,))]
        missing = [name for name in names if name not in table]
        if missing:
            raise ValueError(
                f"The {tower} features {missing} are missing. Expected: {names}. Received: {sorted(table)}"
            )
        encoded = {}
        for feature in chosen:
            kind = {f.name: f for f in self.features}[feature.shares or feature.name].kind
            values = tf.convert_to_tensor(table[feature.name], RAW_DTYPES[kind])
            layer = self.layers[feature.shares or feature.name]
            if kind == "number":
                # Bucket 0 is left to "unknown".
                index = tf.where(tf.math.is_finite(values), tf.cast(layer(values), tf.int32) + 1, 0)
            else:
                index = tf.cast(layer(values), tf.int32)
            if feature.length > 1:
                weights = tf.convert_to_tensor(table[feature.name + WEIGHTS_SUFFIX], tf.float32)
                index, weights = _fit_length(index, feature.length), _fit_length(weights, feature.length)
                filled = weights > 0
                index = tf.where(filled, index, 0)
                # An empty list is one "unknown": a zero vector would have no direction for the layer norm.
                lone_unknown = ~tf.reduce_any(filled, axis=1, keepdims=True) & (tf.range(feature.length) == 0)
                encoded[feature.name + WEIGHTS_SUFFIX] = tf.where(filled, weights, tf.cast(lone_unknown, tf.float32))
            encoded[feature.name] = index
        return encoded

    def schema(self, tasks: tuple[Task, ...] = CTR_CVR) -> Schema:
        """The schema that models are built from."""
        kinds = {f.name: f.kind for f in self.features}

        def size(feature: RawFeature) -> int:
            owner = feature.shares or feature.name
            # n bounds make n + 1 buckets, and "unknown" is one more index.
            return len(self.state[owner]) + (2 if kinds[owner] == "number" else 1)

        return Schema(
            tuple(
                Feature(f.name, f.tower, size(f), f.length, f.shares, f.unknown_rate, f.unknown_group)
                for f in self.features
            ),
            tasks,
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `Encoder.from_dict` reads it back."""
        return {"features": [dataclasses.asdict(f) for f in self.features], "state": self.state}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Encoder:
        """Reads what `to_dict` wrote."""
        return cls(tuple(RawFeature(**f) for f in values["features"]), values["state"])


def _encoding_layer(kind: str, state: list) -> keras.layers.Layer:
    if kind == "integer":
        return keras.layers.IntegerLookup(vocabulary=state)
    if kind == "string":
        return keras.layers.StringLookup(vocabulary=state)
    return keras.layers.Discretization(bin_boundaries=state)


def _fit_length(values: Any, length: int) -> Any:
    """Cuts or zero-fills the second axis to `length` slots."""
    import tensorflow as tf

    values = values[:, :length]
    padded = tf.pad(values, [[0, 0], [0, length - tf.shape(values)[1]]])
    return tf.ensure_shape(padded, (None, length))
