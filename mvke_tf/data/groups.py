"""Groups of users or items, over which gate weights are averaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from mvke_tf.data.prepared import Prepared
from mvke_tf.schema import TOWERS, WEIGHTS_SUFFIX

UNKNOWN = "unknown"
# The age bands of the later MovieLens data sets, and lengths of history.
AGE_BANDS = (18, 25, 35, 45, 50, 56)
HISTORY_BANDS = (1, 10, 50, 100, 200)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Groups of the entities of one side; an entity may be in several groups (a film in each of its genres).

    Args:
        variable: What the groups are values of, for example `"genre"`.
        side: `"user"` or `"item"`.
        groups: Names of the groups, in the order in which they are shown.
        members: `(N, len(groups))` bool: which rows of the table of that side are in which group.
        description: Variable and unit, as an axis states them.

    Raises:
        ValueError: If side or shapes are something else.
    """

    variable: str
    side: str
    groups: tuple[str, ...]
    members: np.ndarray
    description: str = ""

    def __post_init__(self) -> None:
        if self.side not in TOWERS:
            raise ValueError(f"Grouping {self.variable!r}: `side` must be one of {TOWERS}. Received: {self.side!r}")
        if self.members.ndim != 2 or self.members.shape[1] != len(self.groups):
            raise ValueError(
                f"Grouping {self.variable!r}: `members` must be (rows, {len(self.groups)}). "
                f"Received: {self.members.shape}"
            )

    @classmethod
    def of_labels(
        cls, variable: str, side: str, labels: Sequence[str], order: Sequence[str] | None = None, description: str = ""
    ) -> Grouping:
        """Groups of equal labels, one label per row.

        Args:
            variable: See above.
            side: See above.
            labels: `(N,)`, the group of each row.
            order: Groups in order; by default those that occur, sorted.
            description: See above.
        """
        labels = np.asarray(labels, str)
        groups = tuple(np.unique(labels) if order is None else order)
        members = labels[:, None] == np.asarray(groups, str)
        return cls(variable, side, groups, members, description or variable)


def group_counts(inside: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """How many pairs of each group each entity of one side has.

    Args:
        inside: `(n, G)` bool: the groups in which each pair is, through its user or its item.
        rows: `(n,)`, the entity of each pair.
        size: Number E of entities.

    Returns:
        `(G, E)`.
    """
    return np.stack([np.bincount(rows, weights=column, minlength=size) for column in inside.T])


def movielens_groups(prepared: Prepared) -> tuple[Grouping, ...]:
    """The groups of MovieLens: genre, popularity and decade of items; age, gender, occupation and history of users.

    A film counts in each of its genres. Popularity is the number of training impressions, in four bins of (nearly)
    equally many films, and one for those without any.
    """
    users, items = prepared.raw["user"], prepared.raw["item"]
    genres = tuple(str(genre) for genre in items["genres"][0])
    return (
        Grouping("genre", "item", genres, np.asarray(items["genres" + WEIGHTS_SUFFIX]) > 0, "genre of the item"),
        _popularity(items["popularity"]),
        _decades(items["release_year"]),
        _bands("age", users["age"], AGE_BANDS, "age of the user (years)"),
        Grouping.of_labels("gender", "user", users["gender"], description="gender of the user"),
        Grouping.of_labels("occupation", "user", users["occupation"], description="occupation of the user"),
        _bands("history", users["rating_count"], HISTORY_BANDS, "items rated before (number)"),
    )


def _popularity(popularity: np.ndarray) -> Grouping:
    known = np.isfinite(popularity)
    names = np.full(len(popularity), "0", dtype=object)
    order = ["0"]
    if known.any():
        bins = pd.qcut(popularity[known], 4, labels=False, duplicates="drop")
        labels = {}
        for number in np.unique(bins):
            inside = popularity[known][bins == number]
            labels[number] = f"{inside.min():.0f} to {inside.max():.0f}"
        names[known] = [labels[number] for number in bins]
        order += labels.values()
    return Grouping.of_labels("popularity", "item", names, order, "popularity of the item (training impressions)")


def _decades(year: np.ndarray) -> Grouping:
    known = np.isfinite(year)
    names = np.full(len(year), UNKNOWN, dtype=object)
    names[known] = [f"{10 * int(value // 10)}s" for value in year[known]]
    order = [*sorted(set(names) - {UNKNOWN}), *([UNKNOWN] if not known.all() else [])]
    return Grouping.of_labels("decade", "item", names, order, "decade of release")


def _bands(variable: str, values: np.ndarray, bounds: Sequence[int], description: str) -> Grouping:
    """Bands `[bound, next bound)` of whole numbers, the first below the first bound."""
    first = str(bounds[0] - 1) if bounds[0] == 1 else f"below {bounds[0]}"
    between = [f"{low} to {high - 1}" for low, high in pairwise(bounds)]
    order = [first, *between, f"{bounds[-1]} and more"]
    return Grouping.of_labels(variable, "user", np.asarray(order)[np.digitize(values, bounds)], order, description)
