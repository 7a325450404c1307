# SPDX-License-Identifier: Apache-2.0
"""Items that were not shown: draws for each row of the log, exact and never an item that the user has had.

A draw is a function of the seed and of the row's position in the ordered log, and knows nothing later than its row
(unless it may): rows that come later change no earlier draw.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from mvke_tf.data.declaration import Negatives
from mvke_tf.errors import DataError

logger = logging.getLogger(__name__)

# Draws that hit an item that the user has had are repeated so often; then the candidates are counted out.
_ATTEMPTS = 24
# Candidates are counted out for so many items that users have had at a time.
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Log:
    """All rows of a log in order, of which some ask for negatives.

    Args:
        time: Moment of each row, `(n,)`, ascending.
        item: Number of the item of each row, `(n,)`.
        items: How many items there are, whether or not the log has them.
    """

    time: np.ndarray
    item: np.ndarray
    items: int

    def __len__(self) -> int:
        return len(self.item)

    @functools.cached_property
    def first_seen(self) -> np.ndarray:
        """Moment of the first row of each item; that of an item without one is later than any."""
        first_seen = np.full(self.items, np.iinfo(np.int64).max)
        np.minimum.at(first_seen, self.item, self.time)
        return first_seen


def draw(
    negatives: Negatives,
    user: np.ndarray,
    item: np.ndarray,
    time: np.ndarray,
    items: int,
    catalogue: np.ndarray | None = None,
    user_ids: Sequence[Any] | pl.Series | None = None,
    log: Log | None = None,
    position: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the negatives of each row of the log.

    Args:
        negatives: How to draw.
        user: Number of the user of each row, `(n,)`.
        item: Number of the item of each row, `(n,)`; items are numbered by the order of their ids.
        time: Moment of each row, `(n,)`, ascending.
        items: How many items there are, whether or not the log has them.
        catalogue: Which items are candidates from the start, bool `(items,)`: those of a side table. By default none:
            an item is a candidate from its first row on.
        user_ids: What users are called in messages.
        log: The whole log, if the rows are some of it: all rows of some users.
        position: Position of each row in the whole log, `(n,)`, ascending.

    Returns:
        The row that each negative belongs to, ascending, and its item: int64 `(m,)` each. A row early in a log without
        a side table, at which no other item has been seen, has no negatives.

    Raises:
        DataError: If a user has had all items.
    """
    per_row = negatives.per_positive
    rows = np.arange(len(user))
    alone = log is None or position is None
    if log is None or position is None:
        log, position = Log(time, item, items), rows
    if negatives.future:
        first_seen = np.zeros(items, np.int64)
        latest, had = np.zeros(len(user), np.int64), _Had(user, item, np.zeros(len(user), np.int64), items)
    else:
        start = np.iinfo(np.int64).min
        first_seen = log.first_seen.copy()
        if catalogue is not None:
            first_seen[catalogue] = start
        latest, had = time, _Had(user, item, time, items)
    # Candidates in the order in which they come into sight: at any moment they are a prefix.
    order = np.lexsort((np.arange(items), first_seen))
    place = np.empty(items, np.int64)
    place[order] = np.arange(items)
    had.renumber(place)
    in_sight = np.searchsorted(first_seen[order], latest, side="right")
    choices = in_sight - had.count(user, latest)
    if not choices.all():
        rows = _with_choices(negatives, choices, user, in_sight, catalogue, user_ids, alone)
    origin, rows_of_one = np.repeat(rows, per_row), np.arange(per_row)
    if negatives.kind == "uniform" and negatives.future:
        # One draw each, counted out among the items that the user never has.
        share = _stream([negatives.seed, 1], np.repeat(position, per_row) * per_row + np.tile(rows_of_one, len(user)))
        return origin, order[had.unseen(user[origin], latest[origin], _numbers(share, choices[origin]))]

    counter = position[origin] * per_row + np.tile(rows_of_one, len(rows))
    drawn = np.full(len(origin), -1, np.int64)
    if negatives.kind == "popularity":
        # A random row up to that moment: its item is as likely as its rows are many.
        range_of = np.full(len(user), len(log)) if negatives.future else np.searchsorted(log.time, time, side="right")
    else:
        range_of = in_sight
    open_draws = np.arange(len(origin))
    for attempt in range(_ATTEMPTS):
        if not len(open_draws):
            break
        row = origin[open_draws]
        share = _uniform(negatives.seed, counter[open_draws], attempt)
        hit = _numbers(share, range_of[row])
        if negatives.kind == "popularity":
            hit = place[log.item[hit]]
        good = ~had.contains(user[row], hit, latest[row])
        drawn[open_draws[good]] = hit[good]
        open_draws = open_draws[~good]
    if len(open_draws):
        row = origin[open_draws]
        share = _uniform(negatives.seed, counter[open_draws], _ATTEMPTS)
        drawn[open_draws] = had.unseen(user[row], latest[row], _numbers(share, choices[row]))
        if negatives.kind == "popularity" and alone:
            logger.info(
                "%s of %s negatives are drawn uniformly from the candidates: their users have had nearly all popular "
                "items.",
                f"{len(open_draws):,}",
                f"{len(drawn):,}",
            )
    return origin, order[drawn]


def _with_choices(
    negatives: Negatives,
    choices: np.ndarray,
    user: np.ndarray,
    in_sight: np.ndarray,
    catalogue: np.ndarray | None,
    user_ids: Sequence[Any] | pl.Series | None,
    alone: bool,
) -> np.ndarray:
    """The rows that have a candidate; raises unless the others only come too early."""
    row = int(choices.argmin())
    name = user[row] if user_ids is None else user_ids[int(user[row])]
    if negatives.future or catalogue is not None or (alone and not choices.any()):
        raise DataError(
            f"A negative is an item that the user has not had, but user {name!r} has had all {in_sight[row]:,} items. "
            'Declare more items in [tables.items], or [negatives] kind = "none", or remove the user.'
        )
    if alone:
        warn_of_rows_without(int((choices == 0).sum()), len(choices))
    return np.flatnonzero(choices)


def warn_of_rows_without(number: int, rows: int) -> None:
    """Says that some rows have no negatives."""
    logger.warning(
        "%s of %s rows have no negatives: up to their moments their users have had all items of the log. A side table "
        "of items, [tables.items], would give them candidates.",
        f"{number:,}",
        f"{rows:,}",
    )


class _Had:
    """Which items each user has had, and from when on.

    Args:
        user: Number of the user of each row, `(n,)`.
        item: Number of the item of each row, `(n,)`.
        time: Moment of each row, `(n,)`.
        items: How many items there are.
    """

    def __init__(self, user: np.ndarray, item: np.ndarray, time: np.ndarray, items: int) -> None:
        self._items = items
        order = np.lexsort((time, item, user))
        user, item, time = user[order], item[order], time[order]
        first = np.ones(len(user), bool)
        first[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
        self.user, self.item, self.time = user[first], item[first], time[first]
        self._sort()

    def _sort(self) -> None:
        order = np.lexsort((self.item, self.user))
        self.user, self.item, self.time = self.user[order], self.item[order], self.time[order]
        self._key = self.user * self._items + self.item
        # The same by the moment from which on each item has been had.
        order = np.lexsort((self.time, self.user))
        moments, rank = np.unique(self.time[order], return_inverse=True)
        self._moments = moments
        self._moment_key = self.user[order] * (len(moments) + 1) + rank

    def renumber(self, place: np.ndarray) -> None:
        """Gives items other numbers."""
        self.item = place[self.item]
        self._sort()

    def count(self, user: np.ndarray, latest: np.ndarray) -> np.ndarray:
        """How many distinct items a user has had up to and with a moment."""
        key = user * (len(self._moments) + 1)
        rank = np.searchsorted(self._moments, latest, side="right")
        return np.searchsorted(self._moment_key, key + rank) - np.searchsorted(self._moment_key, key)

    def contains(self, user: np.ndarray, item: np.ndarray, latest: np.ndarray) -> np.ndarray:
        """Whether a user has had an item up to and with a moment."""
        key = user * self._items + item
        position = np.minimum(np.searchsorted(self._key, key), len(self._key) - 1)
        return (self._key[position] == key) & (self.time[position] <= latest)

    def unseen(self, user: np.ndarray, latest: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The item with that number among those that a user has not had up to and with a moment, in their order."""
        start, end = (np.searchsorted(self.user, user, side=side) for side in ("left", "right"))
        answer = np.empty(len(user), np.int64)
        sizes = np.cumsum(end - start)
        begin = 0
        while begin < len(user):
            done = sizes[begin - 1] if begin else 0
            stop = max(begin + 1, int(np.searchsorted(sizes, done + _BLOCK, side="right")))
            block = slice(begin, stop)
            length = (end - start)[block]
            offset = np.concatenate([[0], np.cumsum(length)])
            question = np.repeat(np.arange(stop - begin), length)
            position = np.arange(offset[-1]) + np.repeat(start[block] - offset[:-1], length)
            known = self.time[position] <= latest[block][question]
            question, position = question[known], position[known]
            # `item - rank` is the number of items below an item that the user has not had: if it is no larger than the
            # number asked for, the item is below the answer, which moves up by one.
            numbers = np.bincount(question, minlength=stop - begin)
            rank = np.arange(len(question)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
            skipped = self.item[position] - rank <= number[block][question]
            answer[block] = number[block] + np.bincount(question[skipped], minlength=stop - begin)
            begin = stop
        return answer


def _numbers(share: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Shares in [0, 1) as whole numbers in [0, below)."""
    return np.minimum((share * below).astype(np.int64), below - 1)


def _stream(seed: Sequence[int], numbers: np.ndarray) -> np.ndarray:
    """Those numbers of a random sequence in [0, 1), ascending ones counted from 0, that is made bit by bit."""
    random, answer = np.random.default_rng(seed), np.empty(len(numbers))
    ends = np.searchsorted(numbers, np.arange(0, int(numbers.max(initial=-1)) + 1 + _BLOCK, _BLOCK))
    for block, (begin, end) in enumerate(itertools.pairwise(ends)):
        answer[begin:end] = random.random(_BLOCK)[numbers[begin:end] - block * _BLOCK]
    return answer


def _uniform(seed: int, counter: np.ndarray, attempt: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on nothing but the seed, the counter and the attempt (SplitMix64)."""
    with np.errstate(over="ignore"):
        state = _mixed(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        state = _mixed(state + np.uint64(attempt + 1) * np.uint64(0x9E3779B97F4A7C15))
        state = _mixed(state + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
