# SPDX-License-Identifier: Apache-2.0
"""Who profiles are made for, and what they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mvke_tf.config import nearest
from mvke_tf.data.groups import Grouping, groups
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError
from mvke_tf.io import give_back, on_disk

BY_ITEM = "item"


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The items that profiles are made of.

    Args:
        table: Encoded item features, `{feature: (M, ...)}`.
        ids: Id of each item, `(M,)`; None of data without items, whose table has one row.
        names: Name of each item, `(M,)`; None if they have none.
        groupings: Groups of the items by which profiles can be made, with `members` of M rows.
        shown: Names of the groupings that profiles by item show.

    Raises:
        ValueError: If the numbers of rows differ.
    """

    table: Mapping[str, np.ndarray]
    ids: np.ndarray | None
    names: np.ndarray | None = None
    groupings: tuple[Grouping, ...] = ()
    shown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = {"ids": self.ids, "names": self.names} | {g.variable: g.members for g in self.groupings}
        _check_rows("items", self.table, **{name: rows for name, rows in named.items() if rows is not None})

    @classmethod
    def of(cls, prepared: PreparedDataset, by: str = BY_ITEM) -> Candidates:
        """The items of prepared data in their latest state.

        Args:
            prepared: The data. Items without ids of their own get the number of their row.
            by: `"item"`, or the name of the one grouping to keep, beside those that profiles by item show.

        Raises:
            ConfigError: If there is no such grouping.
        """
        items, rows = prepared.items, prepared.catalogue
        table = {name: np.asarray(column)[rows] for name, column in items.encoded.items()}
        if not prepared.encoder.raw_inputs("item"):
            if by != BY_ITEM:
                raise ConfigError(f"The data have no features of items: there are no groups of them. Received: {by!r}")
            return cls(table, None)
        lists = {feature.name for feature in prepared.encoder.of_tower("item") if feature.is_list}
        declared = {group.name: group.feature for group in prepared.dataset.groups or ()}
        found = {grouping.variable: grouping for grouping in groups(prepared, ("item",))}
        if by != BY_ITEM and by not in found:
            raise ConfigError(
                f"Profiles are made by {BY_ITEM!r} or by a group of items: {', '.join(found) or 'there is none'}. "
                f"Received: {by!r}{nearest(by, found)}"
            )
        shown = tuple(name for name in found if declared.get(name, name) in lists)
        return cls(
            table,
            np.asarray(items.key)[rows],
            None if items.name is None else np.asarray(items.name, object)[rows],
            tuple(
                dataclasses.replace(grouping, members=grouping.members[rows])
                for name, grouping in found.items()
                if name == by or (name in shown and by == BY_ITEM)
            ),
            shown if by == BY_ITEM else (),
        )

    def grouping(self, name: str) -> Grouping:
        """The grouping of a name.

        Raises:
            ConfigError: If there is none.
        """
        found = {grouping.variable: grouping for grouping in self.groupings}
        if name not in found:
            raise ConfigError(f"`by` must be one of {[BY_ITEM, *found]}. Received: {name!r}{nearest(name, found)}")
        return found[name]


@dataclasses.dataclass(frozen=True)
class Users:
    """The users whom profiles are made for.

    Args:
        table: Encoded user features, `{feature: (N, ...)}`.
        ids: Id of each user, `(N,)`.
        seen: Pairs of a row of `table` and a row of the candidates, int `(n, 2)`, that are no candidates; none by
            default.

    Raises:
        ValueError: If the numbers of rows differ, or `seen` has rows of no user.
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

    def give_back(self) -> None:
        """Of a table on disk, lets the system have the memory of what has been read."""
        for column in self.table.values():
            give_back(column)
            return

    def part(self, rows: slice) -> Users:
        """Some consecutive users."""
        start, stop = np.searchsorted(self.seen[:, 0], [rows.start, rows.stop])
        table = {name: column[rows] for name, column in self.table.items()}
        return Users(table, self.ids[rows], self.seen[start:stop] - [rows.start, 0])

    @classmethod
    def of(
        cls,
        prepared: PreparedDataset,
        ids: Sequence[int | str] | None = None,
        exclude_seen: bool = False,
        folder: Path | None = None,
    ) -> Users:
        """Users of prepared data as they are after their last row.

        The states that a model is trained on end before the moment that is predicted; these know the whole log, of all
        parts. They are for recommending, not for measuring.

        Args:
            prepared: The data. Without ids of users, each row is a user, whose id is its number.
            ids: Their ids, in this order; by default all, ordered by id. Numbers may come as text.
            exclude_seen: Whether the items of a user's rows, sampled ones aside, are no candidates.
            folder: Where the table of users is put in order, in a file without a name; by default it is in memory.

        Raises:
            ConfigError: If an id is unknown or stands twice, or items have no ids to tell what a user has seen.
        """
        latest = prepared.latest_users
        known = _index(latest.key)
        wanted = known if ids is None else _index(_as_keys(ids, known))
        if ids is None and prepared.is_in_buckets:
            wanted = known.sort_values()
        rows = known.get_indexer(wanted)
        if (rows < 0).any() or not wanted.is_unique:
            wrong = wanted[(rows < 0) | wanted.duplicated()].tolist()
            raise ConfigError(
                f"Expected ids of users of the data, each once; it has {len(known)}, from {known.min()} to "
                f"{known.max()}. Received, unknown or twice: {_some(wrong)}"
            )
        if folder is None:
            table = {name: np.asarray(column)[rows] for name, column in latest.encoded.items()}
        else:
            table = _gathered(prepared, rows, folder)
        users = cls(table, wanted.to_numpy())
        return dataclasses.replace(users, seen=_seen(prepared, wanted)) if exclude_seen else users


def _gathered(prepared: PreparedDataset, rows: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """The encoded columns of rows of the latest users, on disk: bucket by bucket, a record for each user."""
    place = np.full(len(prepared.latest_users), -1)
    place[rows] = np.arange(len(rows))
    table: np.ndarray | None = None
    folder.mkdir(parents=True, exist_ok=True)
    for bucket in prepared.buckets():
        encoded = {name: np.asarray(column) for name, column in bucket.latest_users.encoded.items()}
        here, place = np.split(place, [len(bucket.latest_users)])
        if table is None:
            kinds = [(name, column.dtype, column.shape[1:]) for name, column in encoded.items()]
            table = on_disk(folder, len(rows), np.dtype(kinds, align=True))
        records = np.empty(np.count_nonzero(here >= 0), table.dtype)
        for name, column in encoded.items():
            records[name] = column[here >= 0]
        # In one go, or every column would touch all pages.
        table[here[here >= 0]] = records
        give_back(table)
    return {} if table is None else {name: table[name] for name in table.dtype.names or ()}


def _index(keys: Any) -> pd.Index:
    """Ids as they are: pandas would turn texts into a type of its own."""
    keys = np.asarray(keys)
    keys = keys.astype(object) if keys.dtype.kind in "OU" else keys.astype(np.int64)
    return pd.Index(keys, dtype=keys.dtype)


def _as_keys(ids: Sequence[int | str], known: pd.Index) -> list[Any]:
    if known.dtype == object:
        return [str(value) for value in ids]
    wrong = [value for value in ids if not str(value).removeprefix("-").isdecimal() or abs(int(value)) >= 2**63]
    if wrong:
        raise ConfigError(f"Expected ids of users, which are whole numbers. Received: {_some(wrong)}")
    return [int(value) for value in ids]


def _seen(prepared: PreparedDataset, users: pd.Index) -> np.ndarray:
    """The pairs of a row of `users` and a row of the catalogue that occur in the log, without sampled ones."""
    if not prepared.has_items:
        raise ConfigError("What a user has seen needs ids of items: declare `[keys] item`. Received: data without")
    items = _index(np.asarray(prepared.items.key)[prepared.catalogue])
    number = items.get_indexer(_index(prepared.items.key))
    seen = []
    for bucket in prepared.buckets():
        user = users.get_indexer(_index(bucket.users.key))[bucket.user_row]
        own = (user >= 0) & ~np.asarray(bucket.sampled)
        seen.append(np.unique(np.stack([user[own], number[bucket.item_row[own]]], axis=1), axis=0))
    # The rows of a user are in one bucket.
    return np.concatenate(seen)


def _check_rows(what: str, table: Mapping[str, Any], **others: Sized) -> None:
    """Raises where columns and attributes of the same entities have different lengths."""
    rows = {name: len(column) for name, column in (*table.items(), *others.items())}
    if len(set(rows.values())) != 1:
        raise ValueError(f"All columns, ids and the like of the {what} need as many rows. Received: {rows}")


def _some(values: Sequence[Any], most: int = 10) -> str:
    """The first values, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
