# SPDX-License-Identifier: Apache-2.0
"""The tables of a dataset, read column by column and cast strictly.

Nothing is guessed: a cell that is not what its use expects is an error that names file, row, column and value. Null,
NaN and the empty text are "unknown" everywhere, and an empty text is an empty list.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import numpy as np
import polars as pl

from mvke_tf.config import nearest
from mvke_tf.data import expressions, files
from mvke_tf.data.declaration import PARTS, Dataset
from mvke_tf.errors import DataError, DeclarationError

P = ParamSpec("P")
R = TypeVar("R")
LOG, USERS, ITEMS = "log", "users", "items"
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
# 1700-01-01 and 2200-01-01, in milliseconds.
_EARLIEST, _LATEST = -8_520_336_000_000, 7_258_118_400_000
_MOMENT = "a moment from 1700 to 2200"
_TEXTS = (pl.String, pl.Categorical, pl.Enum)
# Larger whole numbers are not exact as floats.
_EXACT = 2**53
# The largest number of 32 bits, as which numbers are kept.
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Lists:
    """One list per row, flat.

    Args:
        offsets: int64 `(n + 1,)`: row i has `values[offsets[i]:offsets[i + 1]]`.
        values: All values; null is an unknown one.
        weights: float64, one per value; None for 1 each.
    """

    offsets: np.ndarray
    values: pl.Series
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 `(n,)`."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Lists:
        """The lists of these rows; -1 stands for an empty list."""
        rows = np.asarray(rows, np.int64)
        lengths = np.where(rows >= 0, self.lengths[rows] if len(self) else 0, 0)
        starts = self.offsets[:-1][rows] if len(self) else np.zeros(len(rows), np.int64)
        return self._gather(starts, lengths)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> Lists:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        weights = None if self.weights is None else self.weights[index]
        return Lists(offsets, self.values.gather(index), weights)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Values of a column, and the row of the table that each stands in.

    Casts return a series as long as the values, null where one is unknown, and raise a DataError for the first that is
    not what is expected.

    Args:
        table: The table.
        column: Name of the column.
        values: The values as they are stored.
        rows: Row of each value; None if there is one per row.
    """

    table: Table
    column: str
    values: pl.Series
    rows: np.ndarray | None = None

    def reject(self, bad: pl.Series, expected: str, remedy: str = "", missing: str = "") -> None:
        """Raises for the first value where `bad` is true; `missing` is what to call one that is not there."""
        if not bad.any():
            return
        first = first_true(bad)
        received = missing if self.values[first] is None else _shown(self.values[first])
        place = self.table.place(first if self.rows is None else int(self.rows[first]))
        raise DataError(
            f"{place}, column {self.column!r}: expected {expected}. Received: {received or repr('')}."
            f"{' ' if remedy else ''}{remedy}"
        )

    def wrong_type(self, expected: str, remedy: str = "") -> NoReturn:
        """Raises for the column as a whole."""
        raise DataError(
            f"{self.table.source}, column {self.column!r}: expected {expected}. Received a column of type "
            f"{self.values.dtype}.{' ' if remedy else ''}{remedy}"
        )

    def cast(self, kind: str, missing: Sequence[Any] = ()) -> pl.Series:
        """As `"string"`, `"integer"` or `"number"`; `missing` are values that also mean "unknown"."""
        # A word such as "?" means "unknown" in a column of numbers too.
        known = self
        if self.values.dtype == pl.String:
            known = dataclasses.replace(self, values=without(self.values, missing))
        return without({"string": known.strings, "integer": known.integers, "number": known.numbers}[kind](), missing)

    def numbers(self, words: bool = False) -> pl.Series:
        """As Float64; `words`: the texts true and false are 1 and 0."""
        expected = "a finite number" + (", true or false" if words else "") + " or nothing"
        kind = self.values.dtype
        if kind == pl.String:
            text = self.values.str.strip_chars()
            if words:
                text = text.str.replace(r"^(?i:true)$", "1").str.replace(r"^(?i:false)$", "0")
            numbers = text.cast(pl.Float64, strict=False)
            bad = numbers.is_null() & (text != "").fill_null(False)
        elif kind == pl.Boolean or kind.is_numeric() or kind == pl.Null:
            numbers = self.values.cast(pl.Float64)
            bad = pl.repeat(False, len(numbers), eager=True)
        else:
            self.wrong_type(expected)
        numbers = numbers.fill_nan(None)
        self.reject(bad | (numbers.abs() > _LARGEST).fill_null(False), expected)
        return numbers

    def integers(self) -> pl.Series:
        """As Int64; numbers such as 12.0 are whole numbers."""
        kind = self.values.dtype
        if kind == pl.String:
            text = self.values.str.strip_chars()
            integers, numbers = text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)
            known = (text != "").fill_null(False) & ~numbers.is_nan().fill_null(False)
        elif kind.is_integer() or kind == pl.Boolean or kind == pl.Null:
            integers, numbers = self.values.cast(pl.Int64, strict=False), None
            known = self.values.is_not_null()
        elif kind.is_float() or kind.is_decimal():
            numbers = self.values.cast(pl.Float64).fill_nan(None)
            integers = pl.repeat(None, len(numbers), dtype=pl.Int64, eager=True)
            known = numbers.is_not_null()
        else:
            self.wrong_type("whole numbers")
        if numbers is not None:
            whole = _is_whole(numbers) & integers.is_null()
            of_numbers = numbers.zip_with(whole, pl.repeat(0.0, len(numbers), eager=True)).cast(pl.Int64)
            integers = of_numbers.zip_with(whole, integers)
        self.reject(
            known & integers.is_null(),
            "a whole number of 64 bits or nothing",
            'Where the values are names, declare type = "string".',
        )
        return integers

    def strings(self) -> pl.Series:
        """As String; whole numbers, booleans and dates as text."""
        kind = self.values.dtype
        if kind.is_float() or kind.is_decimal():
            numbers = self.values.cast(pl.Float64).fill_nan(None)
            self.reject(
                numbers.is_not_null() & ~_is_whole(numbers),
                "a text or a whole number",
                'A feature of numbers has encode = "buckets" or "number".',
            )
            return numbers.cast(pl.Int64).cast(pl.String)
        if kind == pl.Binary:
            texts = [None if value is None else files.as_text(value) for value in self.values]
            text = pl.Series(self.column, texts, dtype=pl.String)
            self.reject(text.is_null() & self.values.is_not_null(), "UTF-8 text")
        elif isinstance(kind, (pl.List, pl.Array, pl.Struct, pl.Object, pl.Duration)):
            self.wrong_type("single texts or whole numbers")
        else:
            text = self.values.cast(pl.String)
        # Arrays of texts end at it, so that it would make two values one.
        self.reject(text.str.contains("\0", literal=True).fill_null(False), "a text without the character NUL")
        return text.replace("", None)

    def weights(self) -> np.ndarray:
        """As weights, float64: none is missing or negative."""
        numbers = self.numbers()
        bad = numbers.is_null() | (numbers < 0).fill_null(False)
        self.reject(bad, "a weight, a number of at least 0", missing="nothing")
        return numbers.to_numpy()

    def split_weights(self) -> tuple[_Cells, np.ndarray]:
        """Texts such as `name:0.5` as names and weights."""
        separator = self.table.weight_separator
        expected = f"a value and its weight such as 'name{separator}0.5'"
        if self.values.dtype != pl.String:
            self.wrong_type(expected, "`weighted` is for CSV; elsewhere `weights` names a column of weights.")
        # The last separator ends the value, which may hold others.
        parts = self.values.str.reverse().str.splitn(separator[::-1], 2)
        weight, value = (parts.struct.field(field).str.reverse() for field in ("field_0", "field_1"))
        self.reject(value.is_null() | weight.is_null(), expected, missing="nothing")
        weights = dataclasses.replace(self, values=weight.replace("", None)).weights()
        return dataclasses.replace(self, values=value.replace("", None)), weights


def first_true(flags: pl.Series) -> int:
    """The position of the first true flag, of flags of which one is true."""
    return int(flags.fill_null(False).to_numpy().argmax())


def _is_whole(numbers: pl.Series) -> pl.Series:
    return ((numbers == numbers.round()) & (numbers.abs() <= _EXACT)).fill_null(False)


class Whole(Protocol):
    """What a table of some rows asks of all rows: how a column is read may depend on every cell of it."""

    def are_whole(self, column: str, lists: bool, weighted: bool, missing: tuple[Any, ...]) -> tuple[bool, bool]:
        """See `Table.are_whole`."""

    def written_as(self, column: str) -> set[str]:
        """See `Table.written_as`; raises as `Table.values` where a cell of any row is no number."""


class Table:
    """One table with its columns as they are stored, and where its rows came from.

    Args:
        name: `"log"`, `"users"` or `"items"`.
        frame: The columns that are needed; empty texts and NaN are null already.
        files: Name and number of rows of each file, in order; of a frame given in Python, its name alone.
        format: `"csv"`, `"parquet"`, `"tfrecord"` or `"frame"`.
        available: Names of all columns of the source.
        list_separator: See `mvke_tf.data.declaration.Source`.
        weight_separator: See `mvke_tf.data.declaration.Source`.
        null: See `mvke_tf.data.declaration.Source`.
        delimiter: See `mvke_tf.data.declaration.Source`.
        paths: The files themselves, where the rows came from files.
        part_of_file: Part of the split that each file belongs to, where files make the split.
        numbers_of_rows: Number of each row among all rows of the files, of a table that has some of them only.
        whole: Answers what is asked of all rows, of a table that has some of them only.
    """

    def __init__(
        self,
        name: str,
        frame: pl.DataFrame,
        files: Sequence[tuple[str, int]],
        format: str = "frame",
        available: Sequence[str] = (),
        list_separator: str = "|",
        weight_separator: str = ":",
        null: Sequence[str] = (),
        delimiter: str = ",",
        paths: Sequence[Path] = (),
        part_of_file: Sequence[int] | None = None,
        numbers_of_rows: np.ndarray | None = None,
        whole: Whole | None = None,
    ) -> None:
        self.name = name
        self.frame = frame
        self.files = tuple(files)
        self.format = format
        self.available = tuple(available) or tuple(frame.columns)
        self.list_separator = list_separator
        self.weight_separator = weight_separator
        self.null = tuple(null)
        self.delimiter = delimiter
        self.paths = tuple(paths)
        self.part_of_file = part_of_file
        self.numbers_of_rows = numbers_of_rows
        self.whole = whole

    def __len__(self) -> int:
        return self.frame.height

    @property
    def is_text(self) -> bool:
        """Whether cells are text, as those of CSV are."""
        return self.format == "csv"

    @property
    def source(self) -> str:
        """What the table was read from, in a few words."""
        first = self.files[0][0]
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more"

    def parts(self) -> np.ndarray:
        """int8 `(n,)`: the part of the split that each row's file belongs to."""
        parts = np.asarray(self.part_of_file, np.int8)
        if self.numbers_of_rows is None:
            return np.repeat(parts, [rows for _, rows in self.files])
        return parts[self._file_of(self.numbers_of_rows)]

    def _file_of(self, row: Any) -> Any:
        return np.searchsorted(np.cumsum([rows for _, rows in self.files]), row, side="right")

    def place(self, row: int) -> str:
        """Where a row stands, such as `log.csv, line 17`; rows of frames count from 0, all others from 1."""
        row = row if self.numbers_of_rows is None else int(self.numbers_of_rows[row])
        if self.format == "frame":
            return f"{self.files[0][0]}, row {row}"
        number = int(self._file_of(row))
        row -= sum(rows for _, rows in self.files[:number])
        if self.format == "csv":
            return f"{self.files[number][0]}, line {files.csv_line(self.paths[number], self.delimiter, row)}"
        return f"{self.files[number][0]}, {'record' if self.format == 'tfrecord' else 'row'} {row + 1}"

    def series(self, column: str) -> pl.Series:
        """A column as it is stored.

        Raises:
            DataError: If there is none; the message has the nearest name.
        """
        if column not in self.frame.columns:
            _holder(column, [(self.source, self.frame.columns)], "")
        return self.frame[column]

    def is_list(self, column: str) -> bool:
        """Whether a column is stored as lists; the text of a CSV is not."""
        return isinstance(self.series(column).dtype, (pl.List, pl.Array))

    def natural_kind(
        self, column: str, lists: bool = False, weighted: bool = False, missing: Sequence[Any] = ()
    ) -> str:
        """`"integer"` or `"string"`: how values are looked up unless the declaration says otherwise.

        Args:
            column: Name of the column.
            lists: Whether its values are lists.
            weighted: Whether each value of a CSV cell is followed by its weight.
            missing: Values that mean "unknown".
        """
        asked = column, lists, weighted, tuple(missing)
        known, whole = self.are_whole(*asked) if self.whole is None else self.whole.are_whole(*asked)
        return "integer" if known and whole else "string"

    def are_whole(self, column: str, lists: bool, weighted: bool, missing: tuple[Any, ...]) -> tuple[bool, bool]:
        """Whether any value is known, and whether all that are known are whole numbers; see `natural_kind`."""
        cells = self._flat(column)[1] if lists or self.is_list(column) else self._cells(column)
        values = (cells.split_weights()[0] if weighted else cells).values
        if values.dtype.is_integer() or values.dtype == pl.Boolean:
            return True, True
        known = (without(values, missing) if values.dtype == pl.String else values).drop_nulls()
        if values.dtype.is_float():
            # What pandas makes of whole numbers with gaps.
            return bool(len(known)), bool(_is_whole(known).all())
        if self.is_text:
            # A text with leading zeros is a name.
            whole = known.cast(pl.Int64, strict=False).cast(pl.String)
            return bool(len(known)), bool((whole == known).fill_null(False).all())
        return True, False

    def _cells(self, column: str) -> _Cells:
        return _Cells(self, column, self.series(column))

    def numbers(self, column: str, words: bool = False) -> pl.Series:
        """A column of single values as Float64, null where the value is unknown.

        Args:
            column: Its name.
            words: Whether the texts `true` and `false` are 1 and 0.

        Raises:
            DataError: If a cell is no finite number.
        """
        return self._cells(column).numbers(words)

    def values(self, column: str) -> pl.Series:
        """A column of texts as what they are the texts of: Int64 or Boolean if every one is written so, else Float64.

        Args:
            column: Its name.

        Raises:
            DataError: If a cell is no finite number, and neither true nor false.
        """
        text = self.series(column)
        written_as = self.written_as(column) if self.whole is None else self.whole.written_as(column)
        if "integer" in written_as:
            return text.cast(pl.Int64, strict=False)
        return text == "true" if "boolean" in written_as else self.numbers(column, words=True)

    def written_as(self, column: str) -> set[str]:
        """Whether every text is that of an `"integer"`, or of a `"boolean"`."""
        text = self.series(column)
        whole = text.cast(pl.Int64, strict=False).cast(pl.String)
        found = {"integer"} if (text.is_null() | (whole == text).fill_null(False)).all() else set()
        return found | ({"boolean"} if text.is_in(["true", "false"]).fill_null(True).all() else set())

    def scalars(self, column: str, kind: str, missing: Sequence[Any] = ()) -> pl.Series:
        """A column of single values, null where the value is unknown.

        Args:
            column: Its name.
            kind: `"string"`; `"integer"` (Int64), where numbers such as 12.0 are whole numbers; `"number"` (Float64).
            missing: Values that also mean "unknown".

        Raises:
            DataError: If a cell cannot be cast, or the column has lists.
        """
        if self.is_list(column):
            self._cells(column).wrong_type("single values", "A feature of lists has `length`, the number of its slots.")
        return self._cells(column).cast(kind, missing)

    def lists(
        self,
        column: str,
        kind: str,
        weights: str | None = None,
        weighted: bool = False,
        missing: Sequence[Any] = (),
    ) -> Lists:
        """A column of lists; null is an empty list. CSV cells are split at the list separator.

        Args:
            column: Its name.
            kind: How values are cast, see `scalars`.
            weights: Column of their weights, in lists of the same lengths.
            weighted: Whether each value of a CSV cell is followed by its weight.
            missing: Values that also mean "unknown".

        Raises:
            DataError: If a value cannot be cast, a weight is missing, negative or infinite, or two lists differ in
                length.
        """
        offsets, cells = self._flat(column)
        numbers = None
        if weighted:
            cells, numbers = cells.split_weights()
        values = cells.cast(kind, missing)
        if weights is not None:
            other, cells = self._flat(weights)
            differing = np.flatnonzero(np.diff(offsets) != np.diff(other))
            if len(differing):
                row = int(differing[0])
                raise DataError(
                    f"{self.place(row)}: expected as many weights in column {weights!r} as values in {column!r}. "
                    f"Received: {np.diff(other)[row]} weights of {np.diff(offsets)[row]} values."
                )
            numbers = cells.weights()
        return Lists(offsets, values, numbers)

    def _flat(self, column: str) -> tuple[np.ndarray, _Cells]:
        """Offsets and all values of a column of lists."""
        lists = self.series(column)
        if self.is_text:
            lists = lists.str.split(self.list_separator)
        elif isinstance(lists.dtype, pl.Array):
            lists = lists.arr.to_list()
        elif lists.dtype == pl.Null:
            lists = lists.cast(pl.List(pl.String))
        if not isinstance(lists.dtype, pl.List):
            self._cells(column).wrong_type("lists", "Only the cells of a CSV are split into lists.")
        lengths = lists.list.len().fill_null(0).cast(pl.Int64).to_numpy()
        flat = lists.filter(pl.Series(lengths > 0)).explode()
        if flat.dtype == pl.String:
            flat = flat.replace(dict.fromkeys(("", *(self.null if self.is_text else ()))))
        elif flat.dtype.is_float():
            flat = flat.fill_nan(None)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return offsets, _Cells(self, column, flat, np.repeat(np.arange(len(lengths)), lengths))

    def check_no_lists(self, column: str) -> None:
        """Raises where a cell of a CSV column of single values looks like a list.

        Raises:
            DataError: If so.
        """
        cells = self._cells(column)
        cells.reject(
            cells.values.str.contains(self.list_separator, literal=True).fill_null(False),
            f"a single value, without the list separator {self.list_separator!r}",
            "A feature of this column that has `length` says that its cells are lists; if they are none, declare "
            "another `list_separator`.",
        )

    def vectors(self, column: str, width: int) -> np.ndarray:
        """A column of lists of `width` numbers, float32 `(n, width)`; a row of NaN where the value is unknown.

        Raises:
            DataError: If a list has another length or something that is no number.
        """
        lists = self.lists(column, "number")
        wrong = np.flatnonzero(~np.isin(lists.lengths, (0, width)))
        if len(wrong):
            raise DataError(
                f"{self.place(int(wrong[0]))}, column {column!r}: expected a list of {width} numbers. "
                f"Received: {lists.lengths[wrong[0]]} numbers."
            )
        vectors = np.full((len(self), width), np.nan, np.float32)
        vectors[lists.lengths > 0] = lists.values.to_numpy().astype(np.float32).reshape(-1, width)
        vectors[np.isnan(vectors).any(axis=1)] = np.nan
        return vectors

    def times(self, column: str, unit: str) -> np.ndarray:
        """A column of moments, int64 `(n,)` milliseconds since 1970.

        Args:
            column: Its name.
            unit: `"s"`, `"ms"`, `"us"` or `"iso"`; a column of dates or timestamps needs none.

        Raises:
            DataError: If a moment is missing, cannot be read, or is not from 1700 to 2200.
        """
        cells = self._cells(column)
        cells.reject(cells.values.is_null(), "a moment in every row")
        kind = cells.values.dtype
        if isinstance(kind, (pl.Datetime, pl.Date)):
            moments = cells.values.dt.epoch("ms").to_numpy().astype(np.int64)
        elif unit != "iso":
            moments = _since_1970(cells, unit)
        elif kind == pl.String:
            moments = _of_texts(cells)
        else:
            cells.wrong_type("text such as 2026-11-24T12:00:00Z", 'Declare time_unit = "s", "ms" or "us".')
        cells.reject(pl.Series((moments < _EARLIEST) | (moments > _LATEST)), _MOMENT)
        return moments

    def keys(self, column: str, kind: str) -> pl.Series:
        """A column of keys as `"string"` or `"integer"`.

        Raises:
            DataError: If one is missing or cannot be cast.
        """
        keys = self.scalars(column, kind)
        self._cells(column).reject(keys.is_null(), f"a key in every row of {self.name!r}")
        return keys

    def unique_keys(self, column: str, kind: str) -> pl.Series:
        """As `keys`, each once.

        Raises:
            DataError: If one is missing, cannot be cast, or stands twice.
        """
        keys = self.keys(column, kind)
        again = ~keys.is_first_distinct()
        if again.any():
            first = first_true(keys == keys[first_true(again)])
            self._cells(column).reject(again, f"each key once (it stands in {self.place(first)} already)")
        return keys


def _since_1970(cells: _Cells, unit: str) -> np.ndarray:
    """Numbers since 1970 as int64 milliseconds."""
    values = cells.values
    if values.dtype == pl.String:
        text = values.str.strip_chars()
        whole, numbers = text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)
        bad = ~numbers.is_finite().fill_null(False)
        is_iso = bad.any() and _moment(values[first_true(bad)]) is not None
        remedy = 'For text such as 2026-11-24 declare time_unit = "iso".' if is_iso else ""
        cells.reject(bad, "a number since 1970", remedy)
        values = numbers if whole.has_nulls() else whole
    elif not values.dtype.is_integer():
        values = cells.numbers()
    per_second = _PER_SECOND[unit]
    moments = values.cast(pl.Float64) * (1_000 / per_second)
    outside = (moments < _EARLIEST) | (moments > _LATEST)
    if outside.any():
        first = float(values[first_true(outside)])
        fitting = [name for name, number in _PER_SECOND.items() if _EARLIEST <= first * 1_000 / number <= _LATEST]
        remedy = f'If the unit is another one, declare time_unit = "{fitting[0]}".' if fitting else ""
        cells.reject(outside, f"{_MOMENT}, in {unit} since 1970", remedy)
    if values.dtype.is_integer():
        # Whole numbers stay exact.
        exact = values.cast(pl.Int64).to_numpy()
        return exact * (1_000 // per_second) if per_second <= 1_000 else exact // (per_second // 1_000)
    return np.floor(values.to_numpy() * (1_000 / per_second)).astype(np.int64)


def _of_texts(cells: _Cells) -> np.ndarray:
    """ISO texts as int64 milliseconds."""
    distinct = cells.values.unique()
    moments = [_moment(text) for text in distinct]
    wrong = [text for text, moment in zip(distinct, moments, strict=True) if moment is None]
    cells.reject(cells.values.is_in(wrong), "a moment such as 2026-11-24T12:00:00Z")
    known = pl.Series(moments, dtype=pl.Int64)
    return cells.values.replace_strict(distinct, known, return_dtype=pl.Int64).to_numpy()


@dataclasses.dataclass(frozen=True)
class Reference:
    """A column that a declaration names.

    Args:
        column: Its name.
        tables: Tables that may have it, the preferred one first.
        place: Where the declaration names it.
    """

    column: str
    tables: tuple[str, ...]
    place: str


def references(dataset: Dataset) -> Iterator[Reference]:
    """All columns that a declaration names.

    A feature's column is that of the side table of its tower if there is one that has it, else that of the log; all
    other columns are those of the log if it has them.
    """
    everywhere = (LOG, ITEMS, USERS)
    if dataset.source.time is not None:
        yield Reference(dataset.source.time, (LOG,), "[source] time")
    for key, name, side, table in (
        ("user", dataset.keys.user, dataset.users, USERS),
        ("item", dataset.keys.item, dataset.items, ITEMS),
    ):
        if name is not None:
            yield Reference(name, (LOG,), f"[keys] {key}")
            if side is not None or table in dataset.frames:
                yield Reference((side and side.on) or name, (table,), f"[tables.{table}] on")
    if dataset.keys.item_name is not None:
        yield Reference(dataset.keys.item_name, (ITEMS, LOG), "[keys] item_name")
    for feature in dataset.features:
        place = f"[features.{feature.name}]"
        if feature.source_column is not None:
            among = (USERS if feature.tower == "user" else ITEMS, LOG)
            yield Reference(feature.source_column, among, f"{place} column")
            if feature.weights is not None:
                yield Reference(feature.weights, among, f"{place} weights")
        for rows, key in ((feature.history, "history"), (feature.statistic, "statistic")):
            if rows is None:
                continue
            for name in ("last", "counts", "mean", "weights"):
                if column := getattr(rows, name, None):
                    yield Reference(column, everywhere, f"{place} {key}.{name}")
            for name in ("share", "where"):
                if text := getattr(rows, name):
                    for column in expressions.columns(text):
                        yield Reference(column, everywhere, f"{place} {key}.{name}")
    for task in dataset.tasks:
        for name in ("label", "where"):
            if text := getattr(task, name):
                for column in expressions.columns(text):
                    yield Reference(column, everywhere, f"[tasks.{task.name}] {name}")
        if task.weight is not None:
            yield Reference(task.weight, everywhere, f"[tasks.{task.name}] weight")
    if dataset.weight is not None:
        yield Reference(dataset.weight, everywhere, "weight")
    if dataset.split.column is not None:
        yield Reference(dataset.split.column, everywhere, "[split] column")


@dataclasses.dataclass(frozen=True)
class Tables:
    """All tables of a dataset.

    Args:
        tables: `{"log": ..., "users": ..., "items": ...}`; side tables where there are any.
        fingerprint: Digest of the contents of all files; empty if only some rows were read.
    """

    tables: Mapping[str, Table]
    fingerprint: str

    @property
    def log(self) -> pl.DataFrame:
        """The log as it is stored, the columns that the declaration names."""
        return self.tables[LOG].frame

    @property
    def users(self) -> pl.DataFrame | None:
        """The side table of users."""
        return self.tables[USERS].frame if USERS in self.tables else None

    @property
    def items(self) -> pl.DataFrame | None:
        """The side table of items."""
        return self.tables[ITEMS].frame if ITEMS in self.tables else None

    def holder(self, column: str, among: Sequence[str], place: str = "") -> Table:
        """The first of some tables that has a column.

        Args:
            column: Its name.
            among: Names of tables, the preferred one first.
            place: Where the declaration names it, for the message.

        Raises:
            DataError: If none has it; the message has the nearest name.
        """
        tables = [self.tables[name] for name in among if name in self.tables]
        return tables[_holder(column, [(table.source, table.available) for table in tables], place)]


def _holder(column: str, tables: Sequence[tuple[str, Sequence[str]]], place: str) -> int:
    for number, (_, available) in enumerate(tables):
        if column in available:
            return number
    names = tuple(dict.fromkeys(name for _, available in tables for name in available))
    sources = " and ".join(source for source, _ in tables)
    lacks = f"{sources} {'has' if len(tables) == 1 else 'have'} no column {column!r}."
    shown = ", ".join(map(repr, names[:30])) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
    raise DataError(f"{place}{': ' if place else ''}{lacks}{nearest(column, names)} Columns: {shown}.")


def without(values: pl.Series, missing: Sequence[Any]) -> pl.Series:
    """The series with null in place of values that mean "unknown"."""
    if values.dtype == pl.String:
        words = pl.Series(
            [str(word).lower() if isinstance(word, bool) else str(word) for word in missing], dtype=pl.String
        )
    else:
        numbers = [word for word in missing if isinstance(word, (int, float))]
        if values.dtype.is_integer():
            numbers = [int(word) for word in numbers if word == int(word)]
        words = pl.Series(numbers, dtype=values.dtype, strict=False)
    if not len(words) or not len(values):
        return values
    unknown = values.is_in(words.implode()).fill_null(False)
    return pl.repeat(None, len(values), dtype=values.dtype, eager=True).zip_with(unknown, values)


def names_the_declaration(function: Callable[Concatenate[Dataset, P], R]) -> Callable[Concatenate[Dataset, P], R]:
    """Puts what messages call the declaration before an error of the data that begins with a place in it."""

    @functools.wraps(function)
    def named(dataset: Dataset, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(dataset, *args, **kwargs)
        except (DataError, DeclarationError) as error:
            if str(error).startswith("["):
                error.args = (f"{dataset.where}, {error}",)
            raise

    return named


@names_the_declaration
def read_tables(dataset: Dataset, *, rows: int | None = None, fingerprinted: bool = True) -> Tables:
    """Reads the tables of a dataset: the columns that the declaration names.

    Args:
        dataset: The declaration.
        rows: Only the first rows of the log; by default all.
        fingerprinted: Whether to read the contents of all files for the fingerprint.

    Raises:
        DataError: If there is no file, one cannot be read, has no rows or lacks a column, or files of one table differ
            in the type of a column.
    """
    sources, columns = named_sources(dataset)
    tables = {name: source.read(columns[name], rows if name == LOG else None) for name, source in sources.items()}
    return Tables(tables, fingerprint(dataset) if fingerprinted and rows is None else "")


def named_sources(dataset: Dataset) -> tuple[dict[str, FrameSource | FileSource], dict[str, list[str]]]:
    """Where each table comes from, and the columns of it that the declaration names.

    Raises:
        DataError: If there is no file, one cannot be read, or a column is in no table.
    """
    sources = {name: _source(dataset, name) for name in _table_names(dataset)}
    columns: dict[str, list[str]] = {name: [] for name in sources}
    for reference in references(dataset):
        among = [name for name in reference.tables if name in sources]
        titled = [(sources[name].title, sources[name].available) for name in among]
        first = _holder(reference.column, titled, reference.place)
        # Keys and names may stand in several tables; which one is used is decided where they are.
        for name in among[first:]:
            if reference.column in sources[name].available:
                columns[name].append(reference.column)
    return sources, {name: list(dict.fromkeys(of_table)) for name, of_table in columns.items()}


@names_the_declaration
def fingerprint(dataset: Dataset, digests: files.Digests | None = None) -> str:
    """Digest of the contents of all tables: SHA-256 in hexadecimal.

    Args:
        dataset: The declaration.
        digests: Digests of files that are remembered; by default all files are read.

    Raises:
        DataError: If there is no file, or one cannot be read.
    """
    digests = files.Digests() if digests is None else digests
    digest = hashlib.sha256()
    for name in _table_names(dataset):
        digest.update(f"table {name}\n".encode())
        if name in dataset.frames:
            _check_frame(name, dataset.frames[name])
            digest.update(files.frame_digest(dataset.frames[name]).encode())
            continue
        for path, part in _files(dataset, name):
            relative = Path(os.path.relpath(path, dataset.folder)).as_posix()
            digest.update(f"{relative} {part} {digests.of(path)}\n".encode())
    return digest.hexdigest()


def _table_names(dataset: Dataset) -> tuple[str, ...]:
    sides = {USERS: dataset.users, ITEMS: dataset.items}
    return (LOG, *(name for name, side in sides.items() if side is not None or name in dataset.frames))


def _files(dataset: Dataset, name: str) -> list[tuple[Path, int]]:
    """The files of a table, and the part of the split that each belongs to; -1 where files make no split."""
    if name != LOG:
        side = dataset.users if name == USERS else dataset.items
        paths = () if side is None else side.path
        patterns = [(f"[tables.{name}] path", pattern, -1) for pattern in paths]
    elif dataset.split.by == "files":
        patterns = [
            (f"[split] {part}", pattern, number)
            for number, part in enumerate(PARTS)
            for pattern in getattr(dataset.split, part)
        ]
    else:
        patterns = [("[source] path", pattern, -1) for pattern in dataset.source.path]
    if not patterns:
        raise DataError(f"The table {name!r} of {dataset.name} has no files. Expected a path, or a frame.")
    return files.find(patterns, dataset.folder)


def _check_frame(name: str, frame: pl.DataFrame) -> None:
    """Raises where a frame holds what no file could."""
    if mixed := [column for column, kind in frame.schema.items() if kind == pl.Object]:
        raise DataError(
            f"The frame {name!r}, column {mixed[0]!r}: expected texts, numbers, dates or lists of them. "
            "Received other Python objects."
        )


class FrameSource:
    """A table that is given in Python."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self._name, self._frame = name, dataset.frames[name]
        self.available, self.title = tuple(self._frame.columns), f"the frame {name!r}"

    def read(self, columns: Sequence[str], rows: int | None) -> Table:
        if not self._frame.height:
            raise DataError(f"The frame {self._name!r} has no rows. Expected at least one.")
        _check_frame(self._name, self._frame)
        frame = self._frame if rows is None else self._frame.head(rows)
        frame = _normalised(frame.select([frame[name] for name in columns]) if columns else frame)
        return Table(self._name, frame, [(self.title, frame.height)], "frame", self.available)

    def pieces(self, columns: Sequence[str]) -> Iterator[tuple[int, pl.DataFrame]]:
        """The rows bit by bit, each bit with the number of its file; what `read` does to cells is done to them."""
        whole = self.read(columns, None).frame
        return ((0, piece) for piece in whole.iter_slices(files.PIECE))

    def describing(self, rows: Sequence[int]) -> dict[str, Any]:
        """The arguments of a `Table` of some of the rows, but for the frame, of files of so many rows."""
        return {"files": [(self.title, rows[0])], "available": self.available}

    def size(self) -> int:
        """About how many rows there are."""
        return self._frame.height


class FileSource:
    """A table in files."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self._dataset, self._name = dataset, name
        self._files = _files(dataset, name)
        formats = {path: dataset.format_of(str(path), name) for path, _ in self._files}
        self._format = formats[self._files[0][0]]
        for path, format in formats.items():
            if format != self._format:
                raise DataError(
                    f"The files of the table {name!r} must have one format. Received: {self._files[0][0]} "
                    f"({self._format}) and {path} ({format})."
                )
        self._shown = [files.shown(path, dataset.folder) for path, _ in self._files]
        self.title = self._shown[0] + (f" and {len(formats) - 1} more" if len(formats) > 1 else "")
        self.available = tuple(files.columns_of(self._files[0][0], self._format, dataset.source.delimiter))

    def read(self, columns: Sequence[str], rows: int | None) -> Table:
        frames: list[pl.DataFrame] = []
        # Of a table of which no column is needed, the number of rows is.
        columns = list(columns) or list(self.available[:1])
        for number in range(len(self._files)):
            left = None if rows is None else rows - sum(frame.height for frame in frames)
            if left is not None and left <= 0:
                break
            frames.append(self._read(number, columns, left))
        frame = _joined(frames, self._shown)
        if not frame.height:
            raise DataError(f"{self.title} has no rows. Expected at least one.")
        return Table(self._name, _normalised(frame), **self.describing([part.height for part in frames]))

    def _read(self, number: int, columns: Sequence[str], rows: int | None) -> pl.DataFrame:
        source, path = self._dataset.source, self._files[number][0]
        available = files.columns_of(path, self._format, source.delimiter) if number else self.available
        lacking = [name for name in columns if name not in available]
        if lacking:
            raise DataError(
                f"{self._shown[number]} has no column {lacking[0]!r}, which {self._shown[0]} has."
                f"{nearest(lacking[0], available)} Expected the same columns in all files of a table."
            )
        return files.read(
            path, self._format, columns, rows, source.delimiter, source.null, _list_columns(self._dataset)
        )

    def pieces(self, columns: Sequence[str]) -> Iterator[tuple[int, pl.DataFrame]]:
        """The rows bit by bit, each bit with the number of its file; what `read` does to cells is done to them.

        Of TFRecord a bit is a file, which is read twice: whether its columns are lists shows at its end.
        """
        columns, source = list(columns) or list(self.available[:1]), self._dataset.source
        is_records = self._format == "tfrecord"
        forms = [self._read(number, columns, None if is_records else 0).clear() for number in range(len(self._files))]
        types = _joined(forms, self._shown).schema
        for number, (path, _) in enumerate(self._files):
            if is_records:
                pieces = iter([self._read(number, columns, None)])
            else:
                pieces = files.pieces(path, self._format, columns, source.delimiter, source.null)
            for piece in pieces:
                yield number, _normalised(piece.select([piece[name].cast(kind) for name, kind in types.items()]))

    def describing(self, rows: Sequence[int]) -> dict[str, Any]:
        """The arguments of a `Table` of some of the rows, but for the frame, of files of so many rows."""
        source = self._dataset.source
        return {
            "files": list(zip(self._shown, rows, strict=False)),
            "format": self._format,
            "available": self.available,
            "list_separator": source.list_separator,
            "weight_separator": source.weight_separator,
            "null": source.null,
            "delimiter": source.delimiter,
            "paths": [path for path, _ in self._files],
            "part_of_file": [part for _, part in self._files[: len(rows)]],
        }

    def size(self) -> int:
        """About how many rows there are."""
        return sum(files.size(path, self._format) for path, _ in self._files)


def _source(dataset: Dataset, name: str) -> FrameSource | FileSource:
    return (FrameSource if name in dataset.frames else FileSource)(dataset, name)


def _joined(frames: Sequence[pl.DataFrame], names: Sequence[str]) -> pl.DataFrame:
    """One frame of the rows of several; whole numbers and fractions go together, numbers and texts do not."""
    first = frames[0]
    frames = [frame.select([frame[name] for name in first.columns]) for frame in frames]
    for name, frame in zip(names, frames, strict=False):
        for left, right in zip(first, frame, strict=True):
            texts = [kind in _TEXTS for kind in (left.dtype, right.dtype)]
            if pl.Null not in (left.dtype, right.dtype) and (texts[0] != texts[1] or not _fit(left, right)):
                raise DataError(
                    f"{name}: column {left.name!r} has type {right.dtype}, but {left.dtype} in {names[0]}. "
                    "Expected one type."
                )
    return pl.concat(frames, how="vertical_relaxed", rechunk=True)


def _fit(left: pl.Series, right: pl.Series) -> bool:
    if left.dtype == right.dtype:
        return True
    try:
        pl.concat([left.clear().to_frame(), right.clear().to_frame()], how="vertical_relaxed")
    except pl.exceptions.PolarsError:
        return False
    return True


def _normalised(frame: pl.DataFrame) -> pl.DataFrame:
    """Null in place of NaN and of the empty text, so that conditions see what features see."""
    return pl.DataFrame([_known(column) for column in frame])


def _known(column: pl.Series) -> pl.Series:
    if column.dtype.is_float():
        return column.fill_nan(None)
    if isinstance(column.dtype, (pl.Categorical, pl.Enum)):
        column = column.cast(pl.String)
    if column.dtype == pl.String and (column == "").any():
        return column.replace("", None)
    return column


def _list_columns(dataset: Dataset) -> set[str]:
    """Columns that are lists by declaration, however many values their rows have."""
    lists: set[str] = set()
    for feature in dataset.features:
        if feature.source_column is not None and (feature.is_list or feature.encode == "vector"):
            lists |= {name for name in (feature.source_column, feature.weights) if name is not None}
    return lists


def _moment(text: str) -> int | None:
    """Milliseconds since 1970 of an ISO text; UTC without a zone."""
    try:
        moment = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(milliseconds=1)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
