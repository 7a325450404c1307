# SPDX-License-Identifier: Apache-2.0
"""The files of MovieLens 100K, 1M, 10M, 20M and 25M, read into the same three checked frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import polars as pl

from mvke_tf.errors import DataError

GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
# What later data sets call otherwise, or have beside those.
LATER_GENRES = ("Children", "IMAX")
NO_GENRES = "(no genres listed)"
# README of ML-1M: what the numbers in users.dat mean.
OCCUPATIONS = (
    *("other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service"),
    *("doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer"),
    *("retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman"),
    *("unemployed", "writer"),
)


class Counts(NamedTuple):
    """Number of rows of each frame."""

    ratings: int
    users: int
    items: int


# Sizes whose files say who the users are.
WITH_USERS = ("100k", "1m")
ML_100K_COUNTS = Counts(ratings=100_000, users=943, items=1_682)


@dataclass(frozen=True)
class MovieLens:
    """The tables of a MovieLens data set, rows in file order.

    Attributes:
        ratings: `user_id`, `item_id`, Int64; `rating`, Int64 of 1 to 5 in 100K and 1M, Float64 of 0.5 to 5 in larger
            ones; `timestamp` (Unix seconds), Int64.
        users: `user_id` and `age` (years; of 1M the lower end of a band), Int64; `gender`, `occupation`, `zip_code`,
            String. None in 10M and larger ones, which do not say who their users are.
        items: `item_id`, Int64; `title`, String, without the year; `release_year`, Int64, null where unknown; `genres`,
            lists of String, empty where none is listed.
        size: `"100k"`, `"1m"`, `"10m"` or `"20m-25m"`, as the names of the files tell.
    """

    ratings: pl.DataFrame
    users: pl.DataFrame | None
    items: pl.DataFrame
    size: str = "100k"


@dataclass(frozen=True)
class _File:
    """How one text file is written. `header` is the first line where the format has one."""

    name: str
    columns: tuple[str, ...]
    separator: str
    encoding: str
    header: str | None = None
    quoted: bool = False


@dataclass(frozen=True)
class _Layout:
    """The files of one data set; `others` are not read, and tell the data set from a similar one."""

    size: str
    title: str
    ratings: _File
    users: _File | None
    items: _File
    others: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """Names of the files that are read."""
        return tuple(file.name for file in (self.ratings, self.users, self.items) if file is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files that must be there."""
        return self.read + self.others


_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_USER_COLUMNS = ("user_id", "age", "gender", "occupation", "zip_code")
_ITEM_COLUMNS = ("item_id", "raw_title", "genres")
_ORIGINAL = _Layout(
    "100k",
    "ML-100K",
    _File("u.data", _RATING_COLUMNS, "\t", "latin-1"),
    _File("u.user", _USER_COLUMNS, "|", "latin-1"),
    _File("u.item", ("item_id", "raw_title", "release_date", "video_date", "url", *GENRES), "|", "latin-1"),
)
_RECBOLE = _Layout(
    "100k",
    "ML-100K",
    _File(
        "ml-100k.inter",
        _RATING_COLUMNS,
        "\t",
        "utf-8",
        header="user_id:token\titem_id:token\trating:float\ttimestamp:float",
    ),
    _File(
        "ml-100k.user",
        _USER_COLUMNS,
        "\t",
        "utf-8",
        header="user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
    ),
    _File(
        "ml-100k.item",
        ("item_id", "title", "year", "genres"),
        "\t",
        "utf-8",
        header="item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    ),
)
_1M = _Layout(
    "1m",
    "ML-1M",
    _File("ratings.dat", _RATING_COLUMNS, "::", "latin-1"),
    _File("users.dat", ("user_id", "gender", "age", "occupation", "zip_code"), "::", "latin-1"),
    _File("movies.dat", _ITEM_COLUMNS, "::", "latin-1"),
)
_10M = _Layout(
    "10m",
    "ML-10M",
    _File("ratings.dat", _RATING_COLUMNS, "::", "utf-8"),
    None,
    _File("movies.dat", _ITEM_COLUMNS, "::", "utf-8"),
    # Without it a copy of ML-1M that lacks users.dat would look the same.
    others=("tags.dat",),
)
_25M = _Layout(
    "20m-25m",
    "ML-20M or ML-25M",
    _File("ratings.csv", _RATING_COLUMNS, ",", "utf-8", header="userId,movieId,rating,timestamp"),
    None,
    _File("movies.csv", _ITEM_COLUMNS, ",", "utf-8", header="movieId,title,genres", quoted=True),
)
_LAYOUTS = (_ORIGINAL, _RECBOLE, _1M, _10M, _25M)
ORIGINAL_FILES = _ORIGINAL.read
RECBOLE_FILES = _RECBOLE.read

# At most 18 digits always fit an int64.
_WHOLE = r"^([0-9]{1,18})$"
_WHOLE_OR_POINT_ZERO = r"^([0-9]{1,18})(?:\.0*)?$"
_HALVES = r"^(0\.5|[1-4](?:\.[05])?|5(?:\.0)?)$"
# A quoted text may hold commas, and quotes twice.
_QUOTED_ROW = r'^([^,"]*),("(?:[^"]|"")*"|[^",]*),([^,"]*)$'

_CONTROL = rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
# Any bytes decode as latin-1, so a file that some editor saved as UTF-8 would give garbled titles without an
# error. Its accented letters are these pairs, which are not neighbours in any latin-1 title.
_UNDECODABLE = {
    "latin-1": re.compile(_CONTROL + rb"|[\xc2\xc3][\x80-\xbf]"),
    "utf-8": re.compile(_CONTROL),
}
# Files are parsed in blocks of so many bytes: the text of 25 million rows would not fit a small machine.
_BLOCK = 2**26


class _Origin(NamedTuple):
    """A file and the data set it belongs to, for messages."""

    path: Path
    title: str

    def fail(self, line: int, received: str, expected: str) -> NoReturn:
        raise DataError(
            f"{self.path}, line {line}: received {received}; expected {expected}. "
            f"Correct that line, or replace {self.path.name} by the one of a fresh copy of {self.title}."
        )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _decode(origin: _Origin, content: bytes, first_line: int, encoding: str) -> str:
    bad = _UNDECODABLE[encoding].search(content)
    position = bad.start() if bad else None
    if position is None:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            position = error.start
    received = " ".join(f"0x{byte:02x}" for byte in content[position : position + 2])
    origin.fail(content.count(b"\n", 0, position) + first_line, f"the bytes {received}", f"{encoding} text")


class _Table:
    """The cells of one file, or of a block of it, as text, with the checks that its columns need.

    Args:
        origin: The file.
        cells: One String column per column of the file.
        first_line: Number of the line of the first row, so that any failed check can name its line.
    """

    def __init__(self, origin: _Origin, cells: pl.DataFrame, first_line: int) -> None:
        self.origin, self.cells, self.first_line = origin, cells, first_line

    def reject(self, bad: pl.Series, received: str | pl.Series, expected: str) -> None:
        """Raises for the first line where `bad` holds. `received` is a column to quote, or what to say by row."""
        row = bad.arg_max()
        if row is not None and bad[row]:
            said = f"{received} {_shorten(self.cells[received][row])}" if isinstance(received, str) else received[row]
            self.origin.fail(self.first_line + row, said, expected)

    def texts(self, column: str) -> pl.Series:
        """The column with runs of whitespace as one space, none at the ends; empty cells raise."""
        values = self.cells[column].str.replace_all(r"\s+", " ").str.strip_chars()
        self.reject(values == "", column, "a text that is not empty")
        return values

    def whole_numbers(self, column: str, pattern: str = _WHOLE) -> pl.Series:
        """The column as Int64; anything but digits raises."""
        digits = self.cells[column].str.extract(pattern, 1)
        self.reject(digits.is_null(), column, "a whole number of 1 to 18 digits")
        return digits.cast(pl.Int64)

    def unique_ids(self, column: str) -> pl.Series:
        """The column as Int64; a value that stood on an earlier line raises."""
        ids = self.whole_numbers(column)
        self.reject(~ids.is_first_distinct(), column, f"each {column} once")
        return ids


def _tables(folder: Path, layout: _Layout, file: _File, block: int = _BLOCK) -> Iterator[_Table]:
    """A file in blocks of whole lines."""
    origin = _Origin(folder / file.name, layout.title)
    try:
        content = origin.path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{origin.path}: cannot be read ({error.strerror}); expected a readable file. Check its permissions."
        ) from error
    content, line, start = content.rstrip(b"\r\n"), 1, 0
    if file.header is not None and content:
        end = content.find(b"\n")
        end = len(content) if end < 0 else end
        header = _decode(origin, content[:end], 1, file.encoding).removesuffix("\r")
        if header != file.header:
            origin.fail(1, f"the header {_shorten(header)}", f"the header {file.header!r}")
        start, line = end + 1, 2
    if start >= len(content):
        origin.fail(line, "an empty file", "at least one row")
    while start < len(content):
        end = content.find(b"\n", min(start + block, len(content)))
        end = len(content) if end < 0 else end
        text = _decode(origin, content[start:end], line, file.encoding).replace("\r\n", "\n").removesuffix("\r")
        rows = pl.Series([text]).str.split("\n").explode()
        yield _Table(origin, _cells(origin, file, rows, line), line)
        start, line = end + 1, line + len(rows)


def _cells(origin: _Origin, file: _File, rows: pl.Series, first_line: int) -> pl.DataFrame:
    """The cells of lines; a line of another number of columns raises."""
    table = _Table(origin, rows.to_frame(), first_line)
    width = len(file.columns)
    expected = f"{width} columns separated by {file.separator!r}"
    if file.quoted:
        cells = rows.str.extract_groups(_QUOTED_ROW).struct.unnest()
        table.reject(cells.to_series().is_null(), "the line " + rows.str.slice(0, 80), f"{expected}, quoted as in CSV")
        quoted = pl.all().str.starts_with('"')
        inside = pl.all().str.slice(1, pl.all().str.len_chars() - 2).str.replace_all('""', '"', literal=True)
        cells = cells.select(pl.when(quoted).then(inside).otherwise(pl.all()))
    else:
        count = rows.str.count_matches(file.separator, literal=True) + 1
        table.reject(count != width, count.cast(pl.String) + " columns", expected)
        cells = rows.str.split_exact(file.separator, width - 1).struct.unnest()
    return cells.rename(dict(zip(cells.columns, file.columns, strict=True)))


def detect(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Which data set a folder holds, told by the names of its files.

    Returns:
        Its size as in `MovieLens`, and the names of the files that are read.

    Raises:
        DataError: If files are missing.
    """
    layout = _detect(Path(folder))
    return layout.size, layout.read


def is_complete(folder: Path) -> bool:
    """Whether a folder holds all files of a data set."""
    return any(not missing for missing in _missing(Path(folder)).values())


def _missing(folder: Path) -> dict[_Layout, list[str]]:
    return {layout: [name for name in layout.names if not (folder / name).is_file()] for layout in _LAYOUTS}


def _detect(folder: Path) -> _Layout:
    missing = _missing(folder)
    layout = min(_LAYOUTS, key=lambda candidate: len(missing[candidate]) / len(candidate.names))
    if not missing[layout]:
        return layout
    received = f"a folder without {', '.join(missing[layout])}" if folder.is_dir() else "no such folder"
    expected = "; ".join(f"{', '.join(layout.names)} ({layout.title})" for layout in _LAYOUTS)
    raise DataError(
        f"{folder}: received {received}; expected the files of one data set: {expected}. "
        "Copy the missing files there, or name another folder."
    )


def read_movielens(folder: Path, expected_counts: Counts | None = ML_100K_COUNTS) -> MovieLens:
    """Reads a MovieLens data set; which one, the names of the files tell.

    ML-100K is read in the original layout (`u.data` ...) or in RecBole's (`ml-100k.inter` ...), which give identical
    frames. Where a folder holds both, the original is read.

    Args:
        folder: The folder that holds the files of one data set.
        expected_counts: Rows that the files of ML-100K must have, or `None` to read any number (a slice of it). Other
            data sets may have any number.

    Returns:
        The checked frames, rows in file order.

    Raises:
        DataError: If a file is missing or undecodable, or any row breaks the format.
    """
    folder = Path(folder)
    layout = _detect(folder)
    items = _whole(folder, layout, layout.items)
    users = None if layout.users is None else _whole(folder, layout, layout.users)
    item_frame = {_ORIGINAL: _original_items, _RECBOLE: _recbole_items}.get(layout, _listed_items)(items)
    user_frame = None if users is None else _users(users, coded=layout is _1M)
    ratings = _ratings(folder, layout, user_frame, item_frame)
    if layout.size == "100k" and expected_counts is not None:
        read = ((layout.ratings, ratings), (layout.users, user_frame), (layout.items, item_frame))
        for (file, frame), expected, what in zip(read, expected_counts, Counts._fields, strict=True):
            if file is not None and frame is not None and len(frame) != expected:
                raise DataError(
                    f"{folder / file.name}, line {len(frame) + (file.header is not None)}: the file ends after "
                    f"{len(frame):,} {what}; expected {expected:,} {what}. Replace {file.name} by the one of a fresh "
                    f"copy of {layout.title}, or pass expected_counts=None to read a part of it."
                )
    return MovieLens(ratings, user_frame, item_frame, layout.size)


def _whole(folder: Path, layout: _Layout, file: _File) -> _Table:
    """A file of users or items, small enough for one block."""
    blocks = list(_tables(folder, layout, file))
    return _Table(blocks[0].origin, pl.concat([block.cells for block in blocks]), blocks[0].first_line)


def _ratings(folder: Path, layout: _Layout, users: pl.DataFrame | None, items: pl.DataFrame) -> pl.DataFrame:
    halves = layout.size not in WITH_USERS
    number = _WHOLE_OR_POINT_ZERO if layout is _RECBOLE else _WHOLE
    frames = []
    for table in _tables(folder, layout, layout.ratings):
        user_id, item_id = table.whole_numbers("user_id"), table.whole_numbers("item_id")
        if halves:
            rating = table.cells["rating"].str.extract(_HALVES, 1)
            table.reject(rating.is_null(), "rating", "a rating from 0.5 to 5 in steps of 0.5")
            rating = rating.cast(pl.Float64)
        else:
            rating = table.whole_numbers("rating", number)
            table.reject(~rating.is_between(1, 5), "rating", "a rating from 1 to 5")
        time = table.whole_numbers("timestamp", number)
        if users is not None:
            table.reject(~user_id.is_in(users["user_id"].implode()), "user_id", "a user of the user file")
        table.reject(~item_id.is_in(items["item_id"].implode()), "item_id", "an item of the item file")
        frames.append(pl.DataFrame({"user_id": user_id, "item_id": item_id, "rating": rating, "timestamp": time}))
        if len(frames) == 1:
            first = table
    ratings = pl.concat(frames)
    again = ~ratings.select(pl.struct("user_id", "item_id").is_first_distinct()).to_series()
    row = again.arg_max()
    if row is not None and again[row]:
        user, item, *_ = ratings.row(row)
        first.origin.fail(
            first.first_line + row,
            f"user {user}, item {item} a second time",
            "each user to rate an item once",
        )
    return ratings


def _users(table: _Table, coded: bool) -> pl.DataFrame:
    """The users; `coded`: occupations are numbers."""
    occupation = table.texts("occupation")
    if coded:
        number = table.whole_numbers("occupation")
        table.reject(number >= len(OCCUPATIONS), "occupation", f"a number from 0 to {len(OCCUPATIONS) - 1}")
        occupation = pl.Series(OCCUPATIONS).gather(number)
    return pl.DataFrame(
        {
            "user_id": table.unique_ids("user_id"),
            "age": table.whole_numbers("age"),
            "gender": table.texts("gender"),
            "occupation": occupation,
            "zip_code": table.texts("zip_code"),
        }
    )


def _original_items(table: _Table) -> pl.DataFrame:
    flags = table.cells.select(GENRES)
    for genre in GENRES:
        table.reject(~flags[genre].is_in(["0", "1"]), genre, f"the genre flag {genre!r} as 0 or 1")
    names = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES]
    genres = flags.select(pl.concat_list(names).list.drop_nulls()).to_series()
    nothing = pl.repeat("no genre flag that is 1", len(flags), eager=True)
    table.reject(genres.list.len() == 0, nothing, "at least one genre")
    return _items(table.unique_ids("item_id"), table.texts("raw_title"), genres)


def _recbole_items(table: _Table) -> pl.DataFrame:
    names = _known_genres(table, table.texts("genres").str.split(" "), GENRES)
    # The order of the columns of the original.
    order = pl.DataFrame({"genre": GENRES}).with_row_index()
    genres = (
        names.to_frame("genre")
        .with_row_index("row")
        .explode("genre")
        .join(order, on="genre")
        .sort("row", "index")
        .group_by("row", maintain_order=True)
        .agg(pl.col("genre").unique(maintain_order=True))["genre"]
    )
    # RecBole took the last parenthesis of the raw title for the year, which is "V" for a film released on video,
    # and wrote "unkonwn" for both parts where there was none. The raw title is put together again from the two.
    title, year = table.texts("title"), table.texts("year")
    table.reject(~year.str.contains(r"^(?:[0-9]{4}|[A-Z]+|unkonwn)$"), "year", "a year of 4 digits")
    raw_title = (title + " (" + year + ")").zip_with(year != "unkonwn", title.replace("unkonwn", "unknown"))
    return _items(table.unique_ids("item_id"), raw_title, genres)


def _listed_items(table: _Table) -> pl.DataFrame:
    """The items of ML-1M and later: genres between bars."""
    genres = table.texts("genres")
    listed = genres.replace(NO_GENRES, "").str.split("|").list.eval(pl.element().filter(pl.element() != ""))
    genres = _known_genres(table, listed, (*GENRES, *LATER_GENRES))
    return _items(table.unique_ids("item_id"), table.texts("raw_title"), genres)


def _known_genres(table: _Table, names: pl.Series, known: tuple[str, ...]) -> pl.Series:
    """The lists of genres; an unknown genre raises."""
    fits = names.list.eval(pl.element().is_in(list(known))).list.all()
    table.reject(~fits, "genres", f"genres among {', '.join(known)}")
    return names


def _items(item_id: pl.Series, raw_title: pl.Series, genres: pl.Series) -> pl.DataFrame:
    """Splits `Title (1995)`, `Title (1995) (V)` and, of series, `Title (1995-1999)`.

    A raw title without a year stays whole, its year null.
    """
    parts = raw_title.str.extract_groups(
        r"^(?P<title>.+?) ?\((?P<year>[0-9]{4})(?:[-\u2013] ?(?:[0-9]{4})? ?)?\)(?: ?\([A-Z]+\))?$"
    ).struct.unnest()
    return pl.DataFrame(
        {
            "item_id": item_id,
            "title": parts["title"].fill_null(raw_title),
            "release_year": parts["year"].cast(pl.Int64),
            "genres": genres.cast(pl.List(pl.String)),
        }
    )
