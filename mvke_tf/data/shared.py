# SPDX-License-Identifier: Apache-2.0
"""Wide columns whose rows share values with the row before: a profile stays, and a history grows by an event."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class SharedColumn:
    """A column `(n, W)` whose rows are gathered when they are asked for.

    Args:
        values: Rows `(R, W)`; or events `(E,)`, of which the first is 0, and that of an empty slot.
        position: int32 `(n,)`: the row of each; or the event of its first slot, from which the others run backwards.
        count: int32 `(n,)`, the filled slots of each; None of rows.
        width: W.
    """

    values: np.ndarray
    position: np.ndarray
    count: np.ndarray | None
    width: int

    def __len__(self) -> int:
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.values.nbytes + self.position.nbytes + (0 if self.count is None else self.count.nbytes)

    def of(self, rows: np.ndarray) -> SharedColumn:
        """Some of its rows, which share the same values."""
        count = None if self.count is None else self.count.take(rows)
        return dataclasses.replace(self, position=self.position.take(rows), count=count)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some of its rows as an array, `(len(rows), W)`."""
        position = self.position.take(rows)
        if self.count is None:
            return self.values.take(position, axis=0)
        slots = np.arange(self.width)
        return self.values.take(np.where(slots < self.count.take(rows)[:, None], position[:, None] - slots, 0))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("The rows of a `SharedColumn` are gathered: there is no array without a copy.")
        return np.asarray(self.take(np.arange(len(self))), dtype)

    @property
    def problem(self) -> str | None:
        """What is wrong where it does not fit together."""
        if self.count is not None:
            if not len(self.values) or self.values[:1].view(np.int32)[0]:
                return "expected 0 as the first event"
            if len(self) and not 0 <= self.count.min() <= self.count.max() <= self.width:
                return f"expected from 0 to {self.width} filled slots"
        # In 64 bits, in which no difference overflows.
        first = self.position.astype(np.int64) - (0 if self.count is None else np.maximum(self.count - 1, 0))
        if len(self) and not 0 <= first.min() <= self.position.max() < len(self.values):
            return f"expected positions from 0 to {len(self.values) - 1}"
        return None


def joined(columns: Sequence[Any]) -> Any:
    """Arrays or shared columns one after another, which still share values if all do, in the same way."""
    if len(columns) == 1:
        return columns[0]
    if len({isinstance(column, SharedColumn) and (column.count is None, column.width) for column in columns}) > 1:
        return np.concatenate([np.asarray(column) for column in columns])
    if not isinstance(columns[0], SharedColumn):
        return np.concatenate(columns)
    starts = np.cumsum([0, *(len(column.values) for column in columns[:-1])], dtype=np.int32)
    return SharedColumn(
        np.concatenate([column.values for column in columns]),
        np.concatenate([column.position + start for column, start in zip(columns, starts, strict=True)]),
        None if columns[0].count is None else np.concatenate([column.count for column in columns]),
        columns[0].width,
    )


def shared(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[SharedColumn, ...] | None:
    """A column `(n, W)` of 32 bits, and the weights of its values, in a form that takes at most half of the memory.

    None where there is none. Events are gathered more slowly than rows, and taken where they are half of those.
    """
    columns = [values] if weights is None else [values, weights]
    dense = sum(column.nbytes for column in columns)
    rows = tuple(map(_shared_rows, columns))
    size = _size(rows)
    if weights is not None and 4 * size > dense:
        events = _shared_events(values, weights)
        if events is not None and 2 * _size(events) <= min(size, dense):
            return events
    return rows if 2 * size <= dense else None


def _size(columns: Sequence[SharedColumn]) -> int:
    return sum(column.nbytes for column in columns)


def _shared_rows(column: np.ndarray) -> SharedColumn:
    """A column of which a row that is equal to the one before shares it."""
    bits = _bits(column)
    is_new = np.ones(len(bits), bool)
    is_new[1:] = (bits[1:] != bits[:-1]).any(axis=1)
    return SharedColumn(column[is_new], (np.cumsum(is_new) - 1).astype(np.int32), None, column.shape[1])


def _shared_events(values: np.ndarray, weights: np.ndarray) -> tuple[SharedColumn, SharedColumn] | None:
    """Lists as events: of each row those that are new, before which stand those of the row before.

    None where empty slots, those of weight 0, are not the last ones, or have a value.
    """
    width = values.shape[1]
    count = np.count_nonzero(weights, axis=1)
    is_empty = np.arange(width) >= count[:, None]
    both = np.stack([_bits(values), _bits(weights)], axis=2)
    if (is_empty != (weights == 0)).any() or both[is_empty].any():
        return None
    # By so many slots the list of the row before has moved; of old events it may have lost some.
    added = count.copy()
    unknown = np.arange(1, len(both))
    for number in range(width):
        # Few have its first event there, and are looked at in full.
        first = (both[unknown, number] == both[unknown - 1, 0]).all(axis=1)
        some = np.flatnonzero((count[unknown] == number) | (first & (count[unknown] > number)))
        rows = unknown[some]
        moved = (both[rows, number:] == both[rows - 1, : width - number]).all(axis=2)
        is_moved = (moved | is_empty[rows, number:]).all(axis=1)
        added[rows[is_moved]] = number
        unknown = np.delete(unknown, some[is_moved])
    end = 1 + np.cumsum(added)
    row = np.repeat(np.arange(len(both)), added)
    slot = np.arange(len(row)) - np.repeat(end - 1 - added, added)
    columns = []
    for column in (values, weights):
        events = np.zeros(len(row) + 1, column.dtype)
        events[end[row] - 1 - slot] = column[row, slot]
        columns.append(SharedColumn(events, (end - 1).astype(np.int32), count.astype(np.int32), width))
    return columns[0], columns[1]


def _bits(column: np.ndarray) -> np.ndarray:
    """32-bit values as whole numbers, of which those that are equal have the same bits."""
    return np.ascontiguousarray(column).view(np.int32)
