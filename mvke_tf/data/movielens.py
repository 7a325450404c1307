"""MovieLens 100K: the original and the RecBole files, read into the same three checked frames."""

import re
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple, NoReturn

import pandas as pd

GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line, what was expected and the remedy."""


class Counts(NamedTuple):
    """Number of rows of each frame."""

    ratings: int
    users: int
    items: int


ML_100K_COUNTS = Counts(ratings=100_000, users=943, items=1_682)


@dataclass(frozen=True)
class MovieLens:
    """The three tables of MovieLens, rows in file order.

    Attributes:
        ratings: `user_id`, `item_id`, `rating` (1..5) and `timestamp` (Unix seconds), all int64.
        users: `user_id` and `age` (years), int64; `gender`, `occupation`, `zip_code`, str.
        items: `item_id`, int64; `title`, str, without the year; `release_year`, Int64, `pd.NA` where unknown;
            `genres`, tuples of one or more names in the order of `GENRES`.
    """

    ratings: pd.DataFrame
    users: pd.DataFrame
    items: pd.DataFrame


@dataclass(frozen=True)
class _File:
    """How one text file is written. `header` is the first line where the format has one."""

    name: str
    columns: tuple[str, ...]
    separator: str = "\t"
    encoding: str = "utf-8"
    header: str | None = None


_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_USER_COLUMNS = ("user_id", "age", "gender", "occupation", "zip_code")
_ORIGINAL = (
    _File("u.data", _RATING_COLUMNS, "\t", "latin-1"),
    _File("u.user", _USER_COLUMNS, "|", "latin-1"),
    _File("u.item", ("item_id", "raw_title", "release_date", "video_date", "url", *GENRES), "|", "latin-1"),
)
_RECBOLE = (
    _File("ml-100k.inter", _RATING_COLUMNS, header="user_id:token\titem_id:token\trating:float\ttimestamp:float"),
    _File(
        "ml-100k.user",
        _USER_COLUMNS,
        header="user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
    ),
    _File(
        "ml-100k.item",
        ("item_id", "title", "year", "genres"),
        header="item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    ),
)
ORIGINAL_FILES = tuple(file.name for file in _ORIGINAL)
RECBOLE_FILES = tuple(file.name for file in _RECBOLE)

# At most 18 digits always fit an int64.
_WHOLE = r"^([0-9]{1,18})$"
_WHOLE_OR_POINT_ZERO = r"^([0-9]{1,18})(?:\.0*)?$"

_CONTROL = rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
# Any bytes decode as latin-1, so a file that some editor saved as UTF-8 would give garbled titles without an
# error. Its accented letters are these pairs, which are not neighbours in any latin-1 title.
_UNDECODABLE = {
    "latin-1": re.compile(_CONTROL + rb"|[\xc2\xc3][\x80-\xbf]"),
    "utf-8": re.compile(_CONTROL),
}


def _fail(path: Path, line: int, received: str, expected: str) -> NoReturn:
    raise DataError(
        f"{path}, line {line}: received {received}; expected {expected}. "
        f"Correct that line, or replace {path.name} by the one of a fresh copy of ML-100K."
    )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _decode(path: Path, encoding: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a readable file. Check its permissions."
        ) from error
    bad = _UNDECODABLE[encoding].search(content)
    position = bad.start() if bad else None
    if position is None:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            position = error.start
    received = " ".join(f"0x{byte:02x}" for byte in content[position : position + 2])
    _fail(path, content.count(b"\n", 0, position) + 1, f"the bytes {received}", f"{encoding} text")


class _Table:
    """The cells of one file as text, with the checks that its columns need.

    The index of `cells` is the line number, so that any failed check can name it.
    """

    def __init__(self, folder: Path, file: _File):
        self.path = folder / file.name
        text = _decode(self.path, file.encoding).replace("\r\n", "\n").rstrip("\n")
        lines = text.split("\n") if text else []
        first_line = 1
        if file.header is not None and lines:
            if lines[0] != file.header:
                _fail(self.path, 1, f"the header {_shorten(lines[0])}", f"the header {file.header!r}")
            lines, first_line = lines[1:], 2
        if not lines:
            _fail(self.path, first_line, "an empty file", "at least one row")
        rows = pd.Series(lines, index=range(first_line, first_line + len(lines)))
        count = rows.str.count(re.escape(file.separator)) + 1
        width = len(file.columns)
        expected = f"{width} columns separated by {file.separator!r}"
        self.reject(count != width, count.astype(str) + " columns", expected)
        self.cells = rows.str.split(file.separator, expand=True)
        self.cells.columns = pd.Index(file.columns)

    def reject(self, bad: pd.Series, received: str | pd.Series, expected: str) -> None:
        """Raises for the first line where `bad` holds. `received` is a column to quote, or what to say by line."""
        if bad.any():
            line = bad.idxmax()
            if isinstance(received, str):
                _fail(self.path, line, f"{received} {_shorten(self.cells.at[line, received])}", expected)
            _fail(self.path, line, received[line], expected)

    def texts(self, column: str) -> pd.Series:
        """The column with runs of whitespace as one space, none at the ends; empty cells raise."""
        values = self.cells[column].str.replace(r"\s+", " ", regex=True).str.strip()
        self.reject(values == "", column, "a text that is not empty")
        return values

    def whole_numbers(self, column: str, pattern: str = _WHOLE) -> pd.Series:
        """The column as int64; anything but digits raises."""
        digits = self.cells[column].str.extract(pattern, expand=False)
        self.reject(digits.isna(), column, "a whole number of 1 to 18 digits")
        return digits.astype("int64")

    def unique_ids(self, column: str) -> pd.Series:
        """The column as int64; a value that stood on an earlier line raises."""
        ids = self.whole_numbers(column)
        self.reject(ids.duplicated(), column, f"each {column} once")
        return ids

    def check_count(self, expected: int, what: str) -> None:
        """Raises where the file has not `expected` rows."""
        if len(self.cells) != expected:
            raise DataError(
                f"{self.path}, line {self.cells.index[-1]}: the file ends after {len(self.cells):,} {what}; "
                f"expected {expected:,} {what}. Replace {self.path.name} by the one of a fresh copy of ML-100K, "
                "or pass expected_counts=None to read a part of it."
            )


def read_movielens(folder: Path, expected_counts: Counts | None = ML_100K_COUNTS) -> MovieLens:
    """Reads ML-100K in the original layout (`u.data` ...) or in RecBole's (`ml-100k.inter` ...).

    Both layouts give identical frames. Where a folder holds both, the original is read.

    Args:
        folder: the folder that holds the three files of one layout.
        expected_counts: rows that the files must have, or `None` to read any number (a slice of ML-100K).

    Returns:
        The checked frames, rows in file order.

    Raises:
        DataError: a missing or undecodable file, or any row that breaks the format.
    """
    folder = Path(folder)
    layout = _detect_layout(folder)
    rating_table, user_table, item_table = (_Table(folder, file) for file in layout)
    users = _users(user_table)
    items = _original_items(item_table) if layout is _ORIGINAL else _recbole_items(item_table)
    ratings = _ratings(rating_table, users, items, _WHOLE if layout is _ORIGINAL else _WHOLE_OR_POINT_ZERO)
    if expected_counts is not None:
        rating_table.check_count(expected_counts.ratings, "ratings")
        user_table.check_count(expected_counts.users, "users")
        item_table.check_count(expected_counts.items, "items")
    return MovieLens(*(frame.reset_index(drop=True) for frame in (ratings, users, items)))


def _detect_layout(folder: Path) -> tuple[_File, ...]:
    missing = {
        layout: [file.name for file in layout if not (folder / file.name).is_file()] for layout in (_ORIGINAL, _RECBOLE)
    }
    layout = min(missing, key=lambda candidate: len(missing[candidate]))
    if not missing[layout]:
        return layout
    received = f"a folder without {', '.join(missing[layout])}" if folder.is_dir() else "no such folder"
    raise DataError(
        f"{folder}: received {received}; expected the files {', '.join(ORIGINAL_FILES)} (original ML-100K) or "
        f"{', '.join(RECBOLE_FILES)} (RecBole). Copy the missing files there, or name another folder."
    )


def _ratings(table: _Table, users: pd.DataFrame, items: pd.DataFrame, number: str) -> pd.DataFrame:
    ratings = pd.DataFrame(
        {
            "user_id": table.whole_numbers("user_id"),
            "item_id": table.whole_numbers("item_id"),
            "rating": table.whole_numbers("rating", number),
            "timestamp": table.whole_numbers("timestamp", number),
        }
    )
    table.reject(~ratings["rating"].between(1, 5), "rating", "a rating from 1 to 5")
    table.reject(~ratings["user_id"].isin(users["user_id"]), "user_id", "a user of the user file")
    table.reject(~ratings["item_id"].isin(items["item_id"]), "item_id", "an item of the item file")
    again = ratings.duplicated(["user_id", "item_id"])
    pair = "user " + ratings["user_id"][again].astype(str) + ", item " + ratings["item_id"][again].astype(str)
    table.reject(again, pair + " a second time", "each user to rate an item once")
    return ratings


def _users(table: _Table) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": table.unique_ids("user_id"),
            "age": table.whole_numbers("age"),
            "gender": table.texts("gender"),
            "occupation": table.texts("occupation"),
            "zip_code": table.texts("zip_code"),
        }
    )


def _original_items(table: _Table) -> pd.DataFrame:
    flags = table.cells[list(GENRES)]
    for genre in GENRES:
        table.reject(~flags[genre].isin(["0", "1"]), genre, f"the genre flag {genre!r} as 0 or 1")
    genres = [tuple(compress(GENRES, row)) for row in (flags == "1").to_numpy()]
    nothing = pd.Series("no genre flag that is 1", index=flags.index)
    table.reject(~(flags == "1").any(axis=1), nothing, "at least one genre")
    return _items(table.unique_ids("item_id"), table.texts("raw_title"), genres)


def _recbole_items(table: _Table) -> pd.DataFrame:
    names = table.texts("genres").str.split(" ")
    known = [set(row) <= set(GENRES) for row in names]
    table.reject(~pd.Series(known, index=names.index), "genres", f"genres among {', '.join(GENRES)}")
    genres = [tuple(genre for genre in GENRES if genre in row) for row in names]
    # RecBole took the last parenthesis of the raw title for the year, which is "V" for a film released on video,
    # and wrote "unkonwn" for both parts where there was none. The raw title is put together again from the two.
    title, year = table.texts("title"), table.texts("year")
    table.reject(~year.str.match(r"^(?:[0-9]{4}|[A-Z]+|unkonwn)$"), "year", "a year of 4 digits")
    raw_title = (title + " (" + year + ")").mask(year == "unkonwn", title.replace("unkonwn", "unknown"))
    return _items(table.unique_ids("item_id"), raw_title, genres)


def _items(item_id: pd.Series, raw_title: pd.Series, genres: list[tuple[str, ...]]) -> pd.DataFrame:
    """Splits `Title (1995)` or `Title (1995) (V)`; a raw title without a year stays whole, its year `pd.NA`."""
    parts = raw_title.str.extract(r"^(.+?) ?\(([0-9]{4})\)(?: ?\([A-Z]+\))?$")
    return pd.DataFrame(
        {
            "item_id": item_id,
            "title": parts[0].fillna(raw_title),
            "release_year": pd.to_numeric(parts[1]).astype("Int64"),
            "genres": pd.Series(genres, index=item_id.index, dtype=object),
        }
    )
