# SPDX-License-Identifier: Apache-2.0
"""What is known before a moment: of a user from their earlier rows, and of an item from its own.

Everything is a function of arrays: the rows of a log by owner (a user or an item), and per question an owner and a
moment. An answer depends on rows of that owner strictly before the moment and on nothing else, to the last bit, so a
log may be partitioned by owner. Memory is that of the rows and of the answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl

from mvke_tf.data.tables import Lists

# States are answered in blocks of so many slots (of a list) or cells (of a table of counts).
_BLOCK = 1 << 22


class Events:
    """The rows of a log by owner, each owner's in the order of time, rows of one moment in the order of the log.

    Args:
        owner: Number of the owner of each row, int64 `(n,)`.
        time: Moment of each row, int64 `(n,)` milliseconds.

    Attributes:
        row: The row of the log of each event.
        owner: Its owner.
        time: Its moment.
    """

    def __init__(self, owner: np.ndarray, time: np.ndarray) -> None:
        owner, time = np.asarray(owner, np.int64), np.asarray(time, np.int64)
        self.row = np.lexsort((time, owner))
        self.owner, self.time = owner[self.row], time[self.row]
        self._moments = np.unique(time)
        # Where the events of each owner start; of an owner without events, where they would.
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(owner))])
        self._key = self._position(self.owner, np.searchsorted(self._moments, self.time))

    def __len__(self) -> int:
        return len(self.row)

    def _position(self, owner: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """One number that orders events by owner and moment."""
        return owner * (len(self._moments) + 1) + rank

    def before(
        self, owner: np.ndarray, moment: np.ndarray, within: int | None = None, inclusive: bool | np.ndarray = False
    ) -> Spans:
        """The events of an owner strictly before a moment.

        Args:
            owner: Owners asked for, `(n,)`.
            moment: Moments asked for, `(n,)` milliseconds.
            within: Greatest age of an event, in milliseconds; any by default.
            inclusive: Whether events of the moment itself belong to it, of all or of each question.
        """
        owner, moment = np.asarray(owner, np.int64), np.asarray(moment, np.int64)
        # Moments are whole numbers: what is before the next one is up to and with this one.
        rank = np.searchsorted(self._moments, moment + np.asarray(inclusive, np.int64))
        first = self._starts[np.minimum(owner, len(self._starts) - 1)]
        end = np.searchsorted(self._key, self._position(owner, rank))
        start = first
        if within is not None:
            oldest = np.searchsorted(self._moments, moment - within)
            start = np.minimum(np.searchsorted(self._key, self._position(owner, oldest)), end)
        return Spans(owner, moment, first, start, end)


@dataclasses.dataclass(frozen=True)
class Spans:
    """One range of events per question.

    Args:
        owner: The owner asked for, `(n,)`.
        moment: The moment asked for, `(n,)`.
        first: Position of the owner's first event, `(n,)`.
        start: Position of the first event of the answer, `(n,)`.
        end: Position after its last event, `(n,)`.
    """

    owner: np.ndarray
    moment: np.ndarray
    first: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.owner)

    def of(self, chosen: np.ndarray) -> Spans:
        """The same ranges, among chosen events only (a mask of all events)."""
        return self._moved(np.concatenate([[0], np.cumsum(chosen)]))

    def of_lists(self, offsets: np.ndarray) -> Spans:
        """The same ranges, among the values of the events, where each event has a list of them."""
        return self._moved(offsets)

    def _moved(self, position: np.ndarray) -> Spans:
        return Spans(self.owner, self.moment, position[self.first], position[self.start], position[self.end])

    def take(self, rows: slice | np.ndarray) -> Spans:
        """Some of the questions."""
        return Spans(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


# Histories


def count(spans: Spans) -> np.ndarray:
    """The number of events, float32 `(n,)`."""
    return (spans.end - spans.start).astype(np.float32)


def mean(spans: Spans, values: np.ndarray) -> np.ndarray:
    """The mean of a number over events, float32 `(n,)`; NaN without an event.

    Args:
        spans: Ranges of the events.
        values: The number of each event, none of them NaN.
    """
    counts = spans.end - spans.start
    with np.errstate(invalid="ignore"):
        return (_sums(spans, values) / np.where(counts > 0, counts, np.nan)).astype(np.float32)


def _sums(spans: Spans, values: np.ndarray) -> np.ndarray:
    # Differences of running sums would carry the rounding of events before, of other owners too. Each range is made of
    # blocks of 1, 2, 4, ... events instead, and of no event outside it.
    block = np.asarray(values, np.float64)
    position, left = spans.start.copy(), spans.end - spans.start
    total = np.zeros(len(spans))
    size = 1
    while left.any():
        odd = np.flatnonzero(left & size)
        total[odd] += block[position[odd]]
        position[odd] += size
        left[odd] -= size
        if len(block) > size:
            with np.errstate(over="ignore", invalid="ignore"):
                block = np.concatenate([block[:-size] + block[size:], block[-size:]])
        size *= 2
    return total


def since(spans: Spans, time: np.ndarray) -> np.ndarray:
    """Seconds since the last event, float32 `(n,)`; NaN without one.

    Args:
        spans: Ranges of the events.
        time: The moment of each event.
    """
    time = np.concatenate([time, [0]])
    age = (spans.moment - time[spans.end - 1]) / 1000
    return np.where(spans.end > spans.start, age, np.nan).astype(np.float32)


def last(spans: Spans, values: Lists, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of the latest events, the latest first, and within an event in the order of its list.

    Args:
        spans: Ranges of the events.
        values: The values of each event.
        length: How many values.

    Returns:
        Values `(n, length)` and float32 weights `(n, length)`, 0 in empty slots.
    """
    # Read from the end, a list that is stored backwards comes forwards.
    flat = np.repeat(values.offsets[:-1] + values.offsets[1:] - 1, values.lengths) - np.arange(values.offsets[-1])
    known = values.values.is_not_null().to_numpy()[flat]
    if values.weights is not None:
        known &= values.weights[flat] > 0
    spans = spans.of_lists(values.offsets).of(known)
    flat = flat[known]
    column, empty = as_array(values.values.gather(flat))
    column = np.concatenate([column, np.array([empty], column.dtype)])
    weights = np.ones(len(flat)) if values.weights is None else values.weights[flat]
    weights = np.concatenate([weights, [0.0]]).astype(np.float32)
    answer = np.empty((len(spans), length), column.dtype)
    answer_weights = np.empty((len(spans), length), np.float32)
    step = max(1, _BLOCK // length)
    for begin in range(0, len(spans), step):
        block = slice(begin, begin + step)
        position = spans.end[block, None] - 1 - np.arange(length)
        # The last entry of the columns is that of an empty slot.
        position = np.where(position >= spans.start[block, None], position, len(flat))
        answer[block], answer_weights[block] = column[position], weights[position]
    return answer, answer_weights


def counts(spans: Spans, owner: np.ndarray, values: Lists, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of all events and how often each occurs, ordered by value.

    Args:
        spans: Ranges of the events.
        owner: The owner of each event.
        values: The values of each event.
        length: How many values; of more, the most frequent are kept, and of equally frequent ones the first.

    Returns:
        Values `(n, length)` and float32 numbers `(n, length)`, 0 in empty slots.
    """
    owner = np.repeat(owner, values.lengths)
    known = values.values.is_not_null().to_numpy()
    spans = spans.of_lists(values.offsets).of(known)
    owner, known_values = owner[known], values.values.filter(pl.Series(known))
    distinct = known_values.unique().sort()
    column, empty = as_array(distinct)
    answer = np.full((len(spans), length), empty, column.dtype)
    answer_counts = np.zeros((len(spans), length), np.float32)
    if not len(owner) or not len(spans):
        return answer, answer_counts
    code = known_values.replace_strict(distinct, np.arange(len(distinct)), return_dtype=pl.Int64).to_numpy()

    # Questions of one owner one after another, by moment: each event enters at one of them and leaves at a later one.
    order = np.lexsort((spans.moment, spans.owner))
    spans = spans.take(order)
    lowest, highest = (np.searchsorted(spans.owner, owner, side=side) for side in ("left", "right"))
    position = np.arange(len(owner))
    entry = np.maximum(np.searchsorted(spans.end, position, side="right"), lowest)
    leave = np.minimum(np.searchsorted(spans.start, position, side="right"), highest)

    # Every value of an owner is a row of the owner's table of counts, every question a column.
    pair = owner * len(distinct) + code
    pairs, row = np.unique(pair, return_inverse=True)
    pair_owner, pair_code = pairs // len(distinct), pairs % len(distinct)
    low, high = (np.searchsorted(pair_owner, spans.owner, side=side) for side in ("left", "right"))
    cells = np.cumsum(high - low)
    begin = 0
    while begin < len(spans):
        done = cells[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(cells, done + _BLOCK, side="right")))
        # The rows of the tables of the owners in this block, and the columns of each row.
        rows = np.arange(low[begin], high[end - 1])
        of_block = slice(begin, end)
        left = np.maximum(np.searchsorted(spans.owner[of_block], pair_owner[rows], side="left"), 0)
        width = np.searchsorted(spans.owner[of_block], pair_owner[rows], side="right") - left
        offset = np.concatenate([[0], np.cumsum(width)])
        inside = np.flatnonzero((entry < end) & (leave > begin) & (entry < leave))
        table_row = row[inside] - low[begin]
        enters = offset[table_row] + np.maximum(entry[inside], begin) - begin - left[table_row]
        leaves = offset[table_row] + leave[inside] - begin - left[table_row]
        leaves = leaves[leaves < offset[table_row + 1]]
        change = np.bincount(enters, minlength=offset[-1]) - np.bincount(leaves, minlength=offset[-1])
        running = np.concatenate([[0], np.cumsum(change)])
        table = running[1:] - np.repeat(running[offset[:-1]], width)
        filled = np.flatnonzero(table)
        table_row = np.searchsorted(offset, filled, side="right") - 1
        question = filled - offset[table_row] + left[table_row] + begin
        _fill(answer, answer_counts, order[question], pair_code[rows[table_row]], table[filled], column)
        begin = end
    return answer, answer_counts


def _fill(answer, answer_counts, question, code, number, column) -> None:
    """Writes the most frequent values of each question, by value."""
    length = answer.shape[1]
    frequent = np.lexsort((code, -number, question))
    frequent = frequent[rank_of(question[frequent]) < length]
    chosen = frequent[np.lexsort((code[frequent], question[frequent]))]
    slot = rank_of(question[chosen])
    answer[question[chosen], slot] = column[code[chosen]]
    answer_counts[question[chosen], slot] = number[chosen]


def rank_of(groups: np.ndarray) -> np.ndarray:
    """The number of equal entries before each, where equal ones are neighbours."""
    if not len(groups):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.concatenate([starts, [len(groups)]])))


# Statistics with a half-life


def decayed(spans: Spans, owner: np.ndarray, time: np.ndarray, values: np.ndarray | None, half_life: int) -> np.ndarray:
    """A statistic in which an event of age `half_life` counts half: float32 `(n,)`, NaN without an event.

    Args:
        spans: Ranges of the events, each from the owner's first one.
        owner: The owner of each event.
        time: The moment of each event.
        values: The number of each event, whose weighted mean is asked for; None for the sum of the weights.
        half_life: In milliseconds.
    """
    events = np.concatenate([_decayed_sums(owner, time, np.ones(len(owner)), half_life), [0.0]])
    any_event = spans.end > spans.start
    if values is None:
        age = spans.moment - np.concatenate([time, [0]])[spans.end - 1]
        return np.where(any_event, events[spans.end - 1] * np.exp2(-age / half_life), np.nan).astype(np.float32)
    sums = np.concatenate([_decayed_sums(owner, time, np.asarray(values, np.float64), half_life), [0.0]])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(any_event, sums[spans.end - 1] / events[spans.end - 1], np.nan).astype(np.float32)


def _decayed_sums(owner: np.ndarray, time: np.ndarray, values: np.ndarray, half_life: int) -> np.ndarray:
    """Per event the sum over it and the owner's earlier ones, each halved once per half-life since then."""
    total = np.array(values, np.float64)
    if not len(total):
        return total
    rank = rank_of(owner)
    decay = np.ones(len(total))
    decay[1:] = np.exp2(-(time[1:] - time[:-1]).clip(0) / half_life)
    # Each pass doubles how far back a sum reaches. What it adds up in which order depends on the owner's events alone.
    reach = 1
    while reach <= rank.max():
        later = np.flatnonzero(rank >= reach)
        total[later], decay[later] = (
            total[later] + decay[later] * total[later - reach],
            decay[later] * decay[later - reach],
        )
        reach *= 2
    return total


def as_array(values: pl.Series) -> tuple[np.ndarray, object]:
    """A series without nulls as an array, texts as objects, and what an empty slot of a list of them holds."""
    if values.dtype == pl.String:
        return values.to_numpy().astype(object), ""
    if values.dtype.is_integer():
        return values.cast(pl.Int64).to_numpy(), -(2**63)
    return values.cast(pl.Float32).to_numpy(), 0.0
