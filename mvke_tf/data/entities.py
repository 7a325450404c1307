"""The users and items to recommend from: users as they are by now, and the catalogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mvke_tf.data.features import Table, latest_states
from mvke_tf.data.movielens import MovieLens
from mvke_tf.data.prepared import Prepared
from mvke_tf.schema import WEIGHTS_SUFFIX


def item_genres(prepared: Prepared) -> list[tuple[str, ...]]:
    """The names of the genres of each item, in the order of the items."""
    items = prepared.raw["item"]
    flags = items["genres" + WEIGHTS_SUFFIX] > 0
    return [tuple(names[flag].tolist()) for names, flag in zip(np.asarray(items["genres"], object), flags, strict=True)]


def known_ratings(prepared: Prepared) -> pd.DataFrame:
    """Every rating of the log, of all parts: `user_id`, `item_id`, `rating`, `timestamp`."""
    rated = prepared.pairs[prepared.pairs["rating"] > 0]
    return pd.DataFrame(
        {
            "user_id": prepared.raw["user"]["user_id"][rated["user_row"]],
            "item_id": prepared.raw["item"]["item_id"][rated["item_row"]],
            "rating": rated["rating"].to_numpy(),
            "timestamp": rated["timestamp"].to_numpy(),
        }
    )


def latest_users(prepared: Prepared) -> Table:
    """The raw user table of all users of the log after the last rating, ordered by user id.

    The states in `prepared.raw` end before each user's last moment, because training predicts that moment; these know
    it too, and all parts of the log, whatever part the model was trained on. They are for recommending, not for
    measuring: a model's quality on ratings that it has been told is not its quality.
    """
    states, items = prepared.raw["user"], prepared.raw["item"]
    users, row = np.unique(states["user_id"], return_index=True)
    frames = MovieLens(
        ratings=known_ratings(prepared),
        users=pd.DataFrame(
            {"user_id": users, **{name: np.asarray(states[name])[row] for name in ("age", "gender", "occupation")}}
        ),
        items=pd.DataFrame({"item_id": items["item_id"], "genres": item_genres(prepared)}),
    )
    return latest_states(frames, prepared.config.history_length)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The items that profiles are made of.

    Args:
        table: Encoded item features, `{feature: (M, ...)}`.
        ids: Id of each item, `(M,)`.
        titles: Title of each item, `(M,)`.
        genres: Names of the genres of each item, M tuples.
    """

    table: Mapping[str, np.ndarray]
    ids: np.ndarray
    titles: np.ndarray
    genres: Sequence[tuple[str, ...]]

    def __post_init__(self) -> None:
        _check_rows("items", self.table, ids=self.ids, titles=self.titles, genres=self.genres)

    @classmethod
    def of(cls, prepared: Prepared) -> Catalogue:
        """All items of prepared data."""
        return cls(prepared.encoded["item"], prepared.raw["item"]["item_id"], prepared.titles, item_genres(prepared))


@dataclasses.dataclass(frozen=True)
class Users:
    """The users whom profiles are made for.

    Args:
        table: Encoded user features, `{feature: (N, ...)}`.
        ids: Id of each user, `(N,)`.
        seen: Pairs of a row of `table` and a row of the catalogue, int `(n, 2)`, that are no candidates; none by
            default.
    """

    table: Mapping[str, np.ndarray]
    ids: np.ndarray
    seen: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def __post_init__(self) -> None:
        _check_rows("users", self.table, ids=self.ids)
        seen = np.asarray(self.seen)
        users = seen[:, 0] if seen.ndim == 2 and seen.shape[1] == 2 else None
        if users is None or (len(users) and not 0 <= users.min() <= users.max() < len(self.ids)):
            raise ValueError(
                f"Expected `seen` as pairs (row of a user, row of an item), shape (n, 2), of {len(self.ids)} users. "
                f"Received: shape {seen.shape}"
            )
        object.__setattr__(self, "seen", seen[np.argsort(users, kind="stable")])

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, prepared: Prepared, ids: Sequence[int] | None = None, exclude_seen: bool = False) -> Users:
        """Users of prepared data as they are after their last rating (see `latest_users`).

        Args:
            prepared: The data.
            ids: Their ids, in this order; by default all, ordered by id.
            exclude_seen: Whether the items that a user has rated, in whatever part of the log, are no candidates.

        Raises:
            ValueError: If an id is unknown or stands twice.
        """
        raw = latest_users(prepared)
        known = pd.Index(raw["user_id"])
        wanted = known if ids is None else pd.Index(ids)
        rows = known.get_indexer(wanted)
        if (rows < 0).any() or not wanted.is_unique:
            wrong = wanted[(rows < 0) | wanted.duplicated()].tolist()
            raise ValueError(
                f"Expected ids of users of the data, each once; it has {len(known)}, from {known.min()} to "
                f"{known.max()}. Received, unknown or twice: {_some(wrong)}"
            )
        encoded = prepared.encoder.encode({name: np.asarray(column)[rows] for name, column in raw.items()}, "user")
        users = cls({name: column.numpy() for name, column in encoded.items()}, wanted.to_numpy())
        if not exclude_seen:
            return users
        ratings = known_ratings(prepared)
        user, item = (
            pd.Index(ids).get_indexer(ratings[name])
            for name, ids in (("user_id", wanted), ("item_id", prepared.raw["item"]["item_id"]))
        )
        return dataclasses.replace(users, seen=np.stack([user, item], axis=1)[user >= 0])


def _check_rows(what: str, table: Mapping[str, Any], **others: Sequence[Any]) -> None:
    """Raises where columns and attributes of the same entities have different lengths."""
    rows = {name: len(column) for name, column in (*table.items(), *others.items())}
    if len(set(rows.values())) != 1:
        raise ValueError(f"All columns, ids and the like of the {what} need as many rows. Received: {rows}")


def _some(values: Sequence[Any], most: int = 10) -> str:
    """The first values, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
