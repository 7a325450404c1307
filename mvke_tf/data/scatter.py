# SPDX-License-Identifier: Apache-2.0
"""A log in buckets of users on the disk, each small enough to be held in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.tables import ITEMS, LOG, USERS, Table, Tables, named_sources
from mvke_tf.errors import DataError
from mvke_tf.io import atomic_write

# Whole numbers from here on are not exact as floats.
_EXACT = 2**53
# The column of the number of each row among all rows of its table.
_NUMBER = "number of the row"


class Buckets:
    """The tables of a dataset, the log and the users in buckets: all rows of a user are in one, in their order.

    Rows without users are spread by their numbers. Items stay in memory.

    Args:
        dataset: The declaration.
        folder: Where `scatter` has written them.
    """

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset, self._folder = dataset, folder
        self._sources, self._columns = named_sources(dataset)
        self._written = json.loads((folder / "tables.json").read_text(encoding="utf-8"))
        self._whole = {name: _WholeTable(self._pieces(name)) for name in self._written["files"]}
        self.items = None
        if ITEMS in self._sources:
            self.items = self._sources[ITEMS].read(self._columns[ITEMS], None)

    def __reduce__(self) -> tuple:
        return type(self), (for_workers(self.dataset), self._folder.absolute())

    def __len__(self) -> int:
        return len(self._written["rows"])

    @property
    def rows(self) -> list[int]:
        """Rows of the log in each bucket."""
        return self._written["rows"]

    def tables(self, number: int) -> Tables:
        """The tables of one bucket."""
        tables = {name: self._table(name, number) for name in self._written["files"]}
        return Tables(tables | ({} if self.items is None else {ITEMS: self.items}), "")

    def _pieces(self, name: str) -> Callable[[str], Iterator[Table]]:
        return lambda column: (self._table(name, number, [column]) for number in range(len(self)))

    def _table(self, name: str, number: int, columns: Sequence[str] = ()) -> Table:
        frame = _read(self._folder / name / f"{self._written['buckets'][number]}.arrow", columns)
        return Table(
            name,
            frame.drop(_NUMBER),
            **self._sources[name].describing(self._written["files"][name]),
            numbers_of_rows=frame[_NUMBER].to_numpy(),
            whole=None if columns else self._whole[name],
        )


def for_workers(dataset: Dataset) -> Dataset:
    """What is needed beside buckets by a process that may have another working directory."""
    frames = {name: frame if name == ITEMS else frame.clear() for name, frame in dataset.frames.items()}
    return dataclasses.replace(dataset, folder=dataset.folder.absolute(), frames=frames)


class _WholeTable:
    """See `mvke_tf.data.tables.Whole`.

    Args:
        read: Reads a column of each bucket.
    """

    def __init__(self, read: Callable[[str], Iterator[Table]]) -> None:
        self._read = read
        self._known: dict[Any, Any] = {}

    def are_whole(self, column: str, lists: bool, weighted: bool, missing: tuple[Any, ...]) -> tuple[bool, bool]:
        asked = column, lists, weighted, missing
        if asked not in self._known:
            answers = [table.are_whole(*asked) for table in self._read(column)]
            self._known[asked] = any(known for known, _ in answers), all(whole for _, whole in answers)
        return self._known[asked]

    def written_as(self, column: str) -> set[str]:
        if column not in self._known:
            found = set.intersection(*(table.written_as(column) for table in self._read(column)))
            try:
                for table in () if found else self._read(column):
                    table.numbers(column, words=True)
                self._known[column] = found
            except DataError as error:
                self._known[column] = error
        if isinstance(self._known[column], DataError):
            raise self._known[column]
        return self._known[column]


def scatter(dataset: Dataset, folder: Path, buckets: int, done: Callable[[int], object]) -> None:
    """Writes the log and the table of users into at most so many buckets; those without a row are left out.

    Args:
        dataset: The declaration.
        folder: The folder; it appears when all is written.
        buckets: How many.
        done: Called with numbers of rows of the log that have been written.

    Raises:
        DataError: If the tables cannot be read.
    """
    sources, columns = named_sources(dataset)
    keys = {LOG: dataset.keys.user}
    if USERS in sources:
        keys[USERS] = (dataset.users and dataset.users.on) or dataset.keys.user
    with atomic_write(folder) as temporary:
        rows, files = {}, {}
        for name, key in keys.items():
            pieces = sources[name].pieces(columns[name])
            rows[name], files[name] = _scatter(pieces, key, temporary / name, buckets, done if name == LOG else None)
            if not sum(rows[name]):
                raise DataError(f"{sources[name].title} has no rows. Expected at least one.")
        filled = [number for number in range(buckets) if rows[LOG][number]]
        written = {"files": files, "buckets": filled, "rows": [rows[LOG][number] for number in filled]}
        (temporary / "tables.json").write_text(json.dumps(written), encoding="utf-8")


def _scatter(
    pieces: Iterator[tuple[int, pl.DataFrame]],
    key: str | None,
    folder: Path,
    buckets: int,
    done: Callable[[int], object] | None,
) -> tuple[list[int], list[int]]:
    """Writes a table into buckets; returns the rows of each bucket and of each file."""
    folder.mkdir(parents=True)
    of_buckets, of_files = np.zeros(buckets, np.int64), [0]
    with contextlib.ExitStack() as stack:
        writers: list[pa.RecordBatchStreamWriter] = []
        for file, frame in pieces:
            of_files += [0] * (file + 1 - len(of_files))
            number = np.arange(frame.height) + sum(of_files)
            of_files[file] += frame.height
            bucket = _mixed(number if key is None else _of_keys(frame[key])) % np.uint64(buckets)
            order = np.argsort(bucket, kind="stable")
            ends = np.concatenate([[0], np.cumsum(np.bincount(bucket.astype(np.int64), minlength=buckets))])
            of_buckets += np.diff(ends)
            frame = frame.with_columns(pl.Series(_NUMBER, number))[order]
            table = frame.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
            if not writers:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                for one in range(buckets):
                    writer = pa.ipc.new_stream(str(folder / f"{one}.arrow"), table.schema, options=options)
                    writers.append(stack.enter_context(writer))
            for writer, start, end in zip(writers, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                if end > start:
                    writer.write_table(table.slice(start, end - start))
            if done is not None:
                done(frame.height)
    return of_buckets.tolist(), of_files


def _read(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    with pa.OSFile(str(path)) as file:
        options = None
        if columns:
            with pa.ipc.open_stream(file) as reader:
                names = reader.schema.names
            file.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in (*columns, _NUMBER)])
        with pa.ipc.open_stream(file, options=options) as reader:
            return pl.DataFrame(pl.from_arrow(reader.read_all())).rechunk()


def _of_keys(keys: pl.Series) -> np.ndarray:
    """A number for each key, int64 `(n,)`: keys that are equal as texts, or as whole numbers, have one number."""
    if keys.dtype.is_nested():
        # No keys, which is an error later.
        return np.zeros(len(keys), np.int64)
    if keys.dtype.is_integer() or keys.dtype == pl.Boolean:
        return keys.cast(pl.Int64, strict=False).fill_null(0).to_numpy()
    numbers: pl.Series | None = None
    if keys.dtype.is_float() or keys.dtype.is_decimal():
        numbers = keys.cast(pl.Float64)
        whole = pl.repeat(None, len(keys), dtype=pl.Int64, eager=True)
    else:
        if keys.dtype == pl.Binary:
            texts = [None if key is None else key.decode(errors="replace") for key in keys.to_list()]
            keys = pl.Series(texts, dtype=pl.String)
        keys = keys.cast(pl.String)
        text = keys.str.strip_chars().replace({"true": "1", "false": "0"})
        whole = text.cast(pl.Int64, strict=False)
        if whole.has_nulls():
            numbers = text.cast(pl.Float64, strict=False)
    if numbers is not None:
        exact = ((numbers == numbers.round()) & (numbers.abs() <= _EXACT)).fill_null(False)
        of_numbers = numbers.zip_with(exact, pl.repeat(None, len(keys), dtype=pl.Float64, eager=True))
        whole = whole.zip_with(whole.is_not_null(), of_numbers.cast(pl.Int64))
    if keys.dtype == pl.String and whole.has_nulls():
        whole = whole.zip_with(whole.is_not_null(), _of_texts(keys))
    return whole.fill_null(0).to_numpy()


def _of_texts(texts: pl.Series) -> pl.Series:
    distinct = texts.drop_nulls().unique(maintain_order=True)
    numbers = pl.Series([zlib.crc32(text.encode()) for text in distinct.to_list()], dtype=pl.Int64)
    return texts.replace_strict(distinct, numbers, default=None, return_dtype=pl.Int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers without an order, uint64 (SplitMix64)."""
    with np.errstate(over="ignore"):
        state = numbers.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
