# SPDX-License-Identifier: Apache-2.0
"""Files of tables, found by path or glob and read as frames: CSV, Parquet, and TFRecord of `tf.train.Example`."""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mvke_tf.config import nearest
from mvke_tf.data.declaration import ENDINGS
from mvke_tf.errors import DataError
from mvke_tf.io import one_line, write_json

logger = logging.getLogger(__name__)

# What reading a damaged file raises, by whichever library.
DAMAGE = (pl.exceptions.PolarsError, pa.ArrowException, OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError)
# A record without a value for a column need not name it: so many records tell the types of all.
_SAMPLE_RECORDS = 1_000
_RECORDS_AT_ONCE = 4_096
# Rows that are read at a time of a table that is not read whole.
PIECE = 2**17
# By so many bytes of a file of text its rows are counted, and so much smaller is one that is compressed.
_SAMPLE_BYTES = 2**20
_COMPRESSED = 5


def find(patterns: Sequence[tuple[str, str, int]], folder: Path) -> list[tuple[Path, int]]:
    """All files of a table in the order of their patterns, those of one glob or of one folder by name.

    Args:
        patterns: For each, the key of the declaration that has it, the pattern, and a number to return with its files.
        folder: What patterns are relative to.

    Raises:
        DataError: If a pattern has no file, or two have the same.
    """
    files: dict[Path, tuple[str, int]] = {}
    for key, pattern, number in patterns:
        for path in _matches(Path(folder), pattern, key):
            if path in files:
                raise DataError(f"{path} is read twice, by {files[path][0]} and by {key}. Expected each file once.")
            files[path] = (key, number)
    return [(path, number) for path, (_, number) in files.items()]


def _matches(folder: Path, pattern: str, key: str) -> list[Path]:
    path = folder / pattern
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and file.name.lower().endswith(tuple(ENDINGS))
            and not any(name[0] in "._" for name in file.relative_to(path).parts)
        )
        if not inside:
            raise DataError(f"{key}: the folder {path} has no file that ends in {', '.join(ENDINGS)}.")
        return inside
    if glob.has_magic(pattern):
        found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
        files = [folder / name for name in found if (folder / name).is_file()]
        if not files:
            raise DataError(f"{key}: no file matches {pattern!r} in the folder {folder}.")
        return files
    if path.exists():
        raise DataError(f"{key}: {path} is neither a file nor a folder. Expected a file of data.")
    beside = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else ()
    raise DataError(f"{key}: there is no file {path}.{nearest(path.name, beside)}")


def columns_of(path: Path, format: str, delimiter: str = ",") -> list[str]:
    """Names of the columns of a file.

    Raises:
        DataError: If it cannot be read, or a CSV has no header, or a header with a name twice or without a name.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Expected a table.")
    if format == "csv":
        return _csv_header(path, delimiter)
    if format == "tfrecord":
        return sorted(_record_types(path))
    try:
        return list(pl.read_parquet_schema(path))
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}.") from error


def read(
    path: Path,
    format: str,
    columns: Collection[str],
    rows: int | None = None,
    delimiter: str = ",",
    null: Sequence[str] = (),
    lists: Collection[str] = (),
) -> pl.DataFrame:
    """Some columns of a file. Those of a CSV are text.

    Args:
        path: The file.
        format: `"csv"`, `"parquet"` or `"tfrecord"`.
        columns: Names of columns that it has, at least one.
        rows: Only the first rows; by default all.
        delimiter: CSV only.
        null: CSV only: words that mean "unknown", besides the empty text.
        lists: TFRecord only: columns that are lists even if each record has at most one value.

    Raises:
        DataError: If it cannot be read.
    """
    if format == "csv":
        return _read_csv(path, columns, rows, delimiter, null)
    if format == "tfrecord":
        return _read_records(path, columns, rows, lists)
    try:
        frame = pl.scan_parquet(path, n_rows=rows, glob=False, hive_partitioning=False)
        # A name such as "*" would be a pattern elsewhere.
        return frame.select(cs.by_name(*columns)).collect()
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}.") from error


def pieces(
    path: Path, format: str, columns: Collection[str], delimiter: str = ",", null: Sequence[str] = ()
) -> Iterator[pl.DataFrame]:
    """The rows of a file of CSV or Parquet, at most `PIECE` of them at a time where it lets them be read so.

    Args:
        path: The file.
        format: `"csv"` or `"parquet"`.
        columns: See `read`.
        delimiter: See `read`.
        null: See `read`.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        if format == "csv":
            with pa.csv.open_csv(path, **_csv_options(columns, delimiter, null)) as reader:
                yield from (pl.DataFrame(pl.from_arrow(batch)) for batch in reader)
            return
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        frame = pl.scan_parquet(path, glob=False, hive_partitioning=False).select(cs.by_name(*columns))
        start = 0
        for size in _few_rows(sizes):
            yield frame.slice(start, size).collect()
            start += size
    except DAMAGE as error:
        if format == "csv":
            raise DataError(_csv_fault(path, delimiter, error)) from error
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}.") from error


def _few_rows(sizes: Sequence[int]) -> Iterator[int]:
    """Groups of rows as pieces: small groups together, and large ones in several."""
    together = 0
    for size in sizes:
        if together and together + size > PIECE:
            yield together
            together = 0
        together += size
        while together > PIECE:
            yield PIECE
            together -= PIECE
    if together:
        yield together


def size(path: Path, format: str) -> int:
    """About how many rows a file has.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        if format == "parquet":
            return pq.read_metadata(path).num_rows
        with _open(path, "rb") as file:
            sample = file.read(_SAMPLE_BYTES)
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}.") from error
    # A record begins with its length, and has two checksums.
    record = int.from_bytes(sample[:8], "little") + 16
    per_row = len(sample) / max(sample.count(b"\n"), 1) if format == "csv" else record
    expanded = _COMPRESSED if path.name.lower().endswith(".gz") else 1
    return int(path.stat().st_size * expanded / max(per_row, 1))


class Digests:
    """SHA-256 of files, remembered by their size and times of change so that an unchanged file is not read again.

    Besides the time of the contents, which copying may keep, the time of the file's entry counts.

    Args:
        path: File that remembers them; by default nothing does.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, list] = {}
        self._changed = False
        if path is not None and path.is_file():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                known = None
            if isinstance(known, dict) and all(map(_is_remembered, known.values())):
                # Without the second time of change they are of an earlier version.
                self._known = {key: entry for key, entry in known.items() if len(entry) == 4}
            else:
                logger.warning("%s is damaged: all files are read to see whether they have changed.", path)

    def of(self, path: Path) -> str:
        """The digest of a file in hexadecimal.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            state = path.stat()
            key, stamp = str(path.resolve()), [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            if self._known.get(key, [])[:3] != stamp:
                with open(path, "rb") as file:
                    self._known[key] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
                self._changed = True
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
        return self._known[key][3]

    def save(self) -> None:
        """Writes what is new to the file."""
        if self._changed and self._path is not None:
            write_json(self._path, self._known)
            self._changed = False


def _is_remembered(entry: Any) -> bool:
    """Whether it is the size, the times of change and the digest of a file."""
    return (
        isinstance(entry, list)
        and len(entry) in (3, 4)
        and all(type(number) is int for number in entry[:-1])
        and isinstance(entry[-1], str)
        and re.fullmatch("[0-9a-f]{64}", entry[-1]) is not None
    )


# CSV


def _read_csv(
    path: Path, columns: Collection[str], rows: int | None, delimiter: str, null: Sequence[str]
) -> pl.DataFrame:
    options = _csv_options(columns, delimiter, null)
    try:
        if rows is None:
            table = pa.csv.read_csv(path, **options)
        else:
            with pa.csv.open_csv(path, **options) as reader:
                batches = []
                for batch in reader:
                    batches.append(batch)
                    if sum(batch.num_rows for batch in batches) >= rows:
                        break
                table = pa.Table.from_batches(batches, reader.schema).slice(0, rows)
    except DAMAGE as error:
        raise DataError(_csv_fault(path, delimiter, error)) from error
    return pl.DataFrame(pl.from_arrow(table))


def _csv_options(columns: Collection[str], delimiter: str, null: Sequence[str]) -> dict[str, Any]:
    return {
        "parse_options": pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns),
            null_values=["", *null],
            strings_can_be_null=True,
        ),
    }


def _open(path: Path, mode: str) -> Any:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, mode, **({"encoding": "utf-8-sig", "newline": ""} if mode == "rt" else {}))


def _csv_header(path: Path, delimiter: str) -> list[str]:
    try:
        names = next((record for _, record in _csv_records(path, delimiter)), [])
    except DAMAGE as error:
        raise DataError(_csv_fault(path, delimiter, error)) from error
    if not names:
        raise DataError(f"{path} is empty. Expected a header line with the names of the columns.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}, line 1: the column {twice[0]!r} appears twice in the header. Expected each name once."
        )
    if names[0].startswith("sep="):
        raise DataError(f"{path}, line 1: {names[0]!r} is for Excel. Delete the line; the header must be the first.")
    if "" in names:
        raise DataError(f"{path}, line 1: column {names.index('') + 1} has no name. Expected a name for each column.")
    return names


def csv_line(path: Path, delimiter: str, row: int) -> int:
    """The line on which a row starts; rows count from 0, lines from 1."""
    return next(itertools.islice(_csv_records(path, delimiter), row + 1, None))[0]


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of each record, the header included; empty lines are no records."""
    with _open(path, "rt") as file, _cells_of_any_size():
        reader = csv.reader(file, delimiter=delimiter)
        line = 1
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1


@contextlib.contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """The `csv` module refuses cells of more than 131,072 characters otherwise."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv_fault(path: Path, delimiter: str, error: Exception) -> str:
    """What is wrong with a CSV file that cannot be read."""
    width = None
    try:
        for line, record in _csv_records(path, delimiter):
            width = width or len(record)
            if len(record) != width:
                return (
                    f"{path}, line {line}: expected {width} columns separated by {delimiter!r}. "
                    f"Received: {len(record)}."
                )
    except UnicodeDecodeError as fault:
        wrong = fault.object[fault.start : fault.start + 1].hex()
        return (
            f"{path}, line {_undecodable_line(path)}: expected UTF-8 text. Received: the byte 0x{wrong}. "
            "Save the file as UTF-8."
        )
    except DAMAGE as fault:
        error = fault
    return f"{path} cannot be read as CSV: {one_line(error)}."


def _undecodable_line(path: Path) -> int:
    with _open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


# TFRecord


def _kinds() -> dict[str, Any]:
    import tensorflow as tf

    return {"bytes_list": tf.string, "int64_list": tf.int64, "float_list": tf.float32}


def _records(path: Path) -> Any:
    import tensorflow as tf

    return tf.data.TFRecordDataset(str(path), "GZIP" if path.name.lower().endswith(".gz") else "")


def _record_types(path: Path) -> dict[str, Any]:
    """The type of each column in the first records."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    kinds = _kinds()
    types: dict[str, Any] = {}
    try:
        for record in _records(path).take(_SAMPLE_RECORDS).as_numpy_iterator():
            for name, feature in tf.train.Example.FromString(record).features.feature.items():
                if kind := feature.WhichOneof("kind"):
                    types.setdefault(name, kinds[kind])
    except (tf.errors.OpError, DecodeError) as error:
        raise DataError(_record_fault(path, types, error)) from error
    return types


def _read_records(path: Path, columns: Collection[str], rows: int | None, lists: Collection[str]) -> pl.DataFrame:
    import tensorflow as tf

    types = _record_types(path)
    specification = {name: tf.io.RaggedFeature(types[name], row_splits_dtype=tf.int64) for name in columns}
    records = _records(path) if rows is None else _records(path).take(rows)
    batches = []
    try:
        for batch in records.batch(_RECORDS_AT_ONCE):
            parsed = tf.io.parse_example(batch, specification)
            batches.append(
                {name: (parsed[name].row_lengths().numpy(), parsed[name].values.numpy()) for name in columns}
            )
    except tf.errors.OpError as error:
        raise DataError(_record_fault(path, types, error)) from error
    return pl.DataFrame(
        {
            name: _ragged(
                path,
                name,
                np.concatenate([np.zeros(0, np.int64), *(batch[name][0] for batch in batches)]),
                np.concatenate([batch[name][1] for batch in batches] or [np.zeros(0)]),
                name in lists,
            )
            for name in columns
        }
    )


def _ragged(path: Path, name: str, lengths: np.ndarray, values: np.ndarray, as_lists: bool) -> pl.Series:
    """Single values where no record has more than one, else lists."""
    if values.dtype == object:
        texts = [as_text(value) for value in values.tolist()]
        if None in texts:
            record = np.repeat(np.arange(len(lengths)), lengths)[texts.index(None)]
            raise DataError(
                f"{path}, record {record + 1}, column {name!r}: expected UTF-8 text. "
                f"Received: {values[texts.index(None)]!r:.60}."
            )
        flat = pl.Series(name, texts, dtype=pl.String)
    else:
        flat = pl.Series(name, values)
    if not as_lists and lengths.max(initial=0) <= 1:
        index = pl.Series(np.where(lengths > 0, np.cumsum(lengths) - 1, -1), dtype=pl.Int64)
        return pl.concat([flat, pl.Series(name, [None], dtype=flat.dtype)]).gather(index)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return pl.Series(name, pl.from_arrow(pa.LargeListArray.from_arrays(offsets, flat.rechunk().to_arrow())))


def _record_fault(path: Path, types: Mapping[str, Any], error: Exception) -> str:
    """What is wrong with a TFRecord file that cannot be read."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    kinds, number = _kinds(), 0
    try:
        for number, record in enumerate(_records(path).as_numpy_iterator(), 1):
            for name, feature in tf.train.Example.FromString(record).features.feature.items():
                kind = feature.WhichOneof("kind")
                if kind and types.get(name, kinds[kind]) != kinds[kind]:
                    return (
                        f"{path}, record {number}, column {name!r}: expected values of type {types[name].name}, as in "
                        f"the records before. Received: {kinds[kind].name}."
                    )
    except tf.errors.OpError:
        return f"{path} is damaged after record {number}. Expected a TFRecord file."
    except DecodeError:
        return f"{path}, record {number}: expected a tf.train.Example. Received other bytes."
    return f"{path} cannot be read as TFRecord: {one_line(error)}."


# Small things


def as_text(value: bytes) -> str | None:
    """UTF-8 bytes as text; None of other bytes."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def shown(path: Path, folder: Path) -> str:
    """What a file is called in messages: relative to the declaration if it is below it."""
    relative = os.path.relpath(path, folder)
    return str(path) if relative.startswith("..") else relative


def frame_digest(frame: pl.DataFrame) -> str:
    """SHA-256 of the contents of a frame, in hexadecimal: equal frames have equal digests."""
    digest = hashlib.sha256()
    for series in frame:
        digest.update(f"{series.name!r} ".encode())
        _digest_series(series, digest)
    return digest.hexdigest()


def _digest_series(series: pl.Series, digest: Any) -> None:
    digest.update(f"{series.dtype} {len(series)}\n".encode())
    digest.update(np.packbits(series.is_null().to_numpy()))
    # What is stored where nothing is known does not matter.
    series, kind = series.drop_nulls(), series.dtype
    if isinstance(kind, pl.Array):
        series = series.arr.to_list()
    if isinstance(series.dtype, pl.List):
        lengths = series.list.len()
        digest.update(lengths.cast(pl.Int64).to_numpy().tobytes())
        _digest_series(series.filter(lengths > 0).explode(), digest)
    elif isinstance(kind, pl.Struct):
        for field in series.struct.fields:
            _digest_series(series.struct.field(field), digest)
    elif kind in (pl.String, pl.Binary, pl.Categorical, pl.Enum) or kind.is_decimal() or "128" in str(kind):
        texts = series if kind == pl.Binary else series.cast(pl.String).cast(pl.Binary)
        digest.update(texts.bin.size().cast(pl.Int64).to_numpy().tobytes())
        # The bytes of all of them, one after another.
        digest.update(texts.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).buffers()[2] or b"")
    elif kind != pl.Null:
        digest.update(np.ascontiguousarray(series.to_physical().to_numpy()).tobytes())
