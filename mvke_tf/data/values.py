# SPDX-License-Identifier: Apache-2.0
"""How single values of a declaration are read, and how messages show them."""

from __future__ import annotations

import datetime
import math
import numbers
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from mvke_tf.config import nearest
from mvke_tf.errors import DataError, DeclarationError

# The most that a declaration may hold, so that a slip is an error and not an hour of reading.
MOST_BYTES = 2**24
MOST_DOTS = 64
MOST_NAME = 100
MOST_TEXT = 1_000
MOST_WORDS = 10_000

# What strings stand for where a dataclass of a declaration is annotated with them.
Column = str
Condition = str
Duration = str
Paths = tuple[str, ...]


class WrongValueError(DeclarationError):
    """What is wrong, and in which table of a declaration."""

    def __init__(self, place: str, text: str) -> None:
        super().__init__(f"{place}: {text}")
        self.place, self.text = place, text

    def __reduce__(self) -> tuple:
        return type(self), (self.place, self.text)


def short(value: object, most: int = 80) -> str:
    """A value in one short line, however large or deep it is."""
    if isinstance(value, Mapping):
        shown = f"a table of {len(value):,} keys"
    elif isinstance(value, (list, tuple)) and (
        len(value) > 12 or any(isinstance(entry, (Mapping, list, tuple)) for entry in value)
    ):
        shown = f"a list of {len(value):,} entries"
    else:
        value = value[: most + 1] if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
        try:
            shown = repr(value)
        except ValueError:
            # A whole number of thousands of digits has no text.
            shown = f"a {type(value).__name__} that is too large to show"
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def words(names: Iterable[object], most: int = 30) -> str:
    """Names in one line, the first of them if there are many."""
    shown = [short(str(name), MOST_NAME)[1:-1] for name in names]
    more = f" and {len(shown) - most:,} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more if shown else "none"


def nearest_word(word: object, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or nothing, also of a word that is none."""
    return nearest(word[:MOST_NAME], list(known)[:MOST_WORDS]) if isinstance(word, str) else ""


def name_words(name: str) -> tuple[str, ...]:
    """The words of a column's name in lower case.

    >>> name_words("isClicked"), name_words("user_id")
    (('is', 'clicked'), ('user', 'id'))
    """
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return tuple(word.lower() for word in re.split(r"[\W_]+", parted) if word)


# Each of these returns a value as it is kept, or None if it is no such value.
def text(value: Any) -> str | None:
    """A text that files and other libraries can hold."""
    if not isinstance(value, str) or len(value) > MOST_TEXT or "\0" in value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def filled(value: Any) -> str | None:
    """A text that is not empty."""
    return text(value) or None


def column(value: Any) -> str | None:
    """A column name, and none of those that Polars takes for a pattern."""
    name = filled(value)
    return None if name is None or name == "*" or (name[0] == "^" and name[-1] == "$") else name


def path(value: Any) -> str | None:
    """A path or a glob."""
    return filled(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else None


def whole(value: Any) -> int | None:
    """A whole number, no boolean."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def number(value: Any) -> float | None:
    """A finite number, no boolean."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        real = float(value)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def scalar(value: Any) -> str | int | float | None:
    """A text, a number, or a whole number of 64 bits."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, numbers.Integral):
        integer = whole(value)
        return integer if integer is not None and -(2**63) < integer < 2**63 else None
    return number(value)


def flag(value: Any) -> bool | None:
    """True or false."""
    return value if isinstance(value, bool) else None


def scalar_or_flag(value: Any) -> Any:
    """A scalar, or true or false."""
    return value if isinstance(value, bool) else scalar(value)


def moment(value: Any) -> datetime.datetime | int | None:
    """A moment in UTC, from a TOML date or time or ISO text, or a whole number in the unit of the time column."""
    try:
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return None
    if isinstance(value, datetime.date):
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.UTC)
    integer = whole(value)
    # Seconds of so many digits still fit into 64 bits as milliseconds.
    return integer if integer is not None and abs(integer) < 2**52 else None


def listed(value: Any, entry: Callable[[Any], Any], alone: bool = False) -> tuple | None:
    """The entries of a list, if all are legal; `alone`: one entry may stand for a list of one."""
    if alone and not isinstance(value, (list, tuple)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return None
    entries = tuple(entry(item) for item in value)
    return None if any(item is None for item in entries) else entries


# By annotation: how a value is read, and what is expected in words.
READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (filled, "a text that is not empty"),
    "bool": (flag, "true or false"),
    "int": (whole, "a whole number"),
    "float": (number, "a finite number"),
    "Column": (column, "the name of a column"),
    "Condition": (filled, "a column or a SQL condition"),
    "Duration": (filled, 'a duration such as "30d"'),
    "Paths": (lambda value: listed(value, path, alone=True), "a path or a list of paths"),
    "tuple[str, ...]": (lambda value: listed(value, text), "a list of texts"),
    "tuple[float, ...]": (lambda value: listed(value, number), "a list of finite numbers"),
    "tuple[float, float]": (lambda value: listed(value, number), "a list of two finite numbers"),
    "tuple[Any, ...]": (lambda value: listed(value, scalar), "a list of texts or numbers"),
}


def read_toml(file: Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        DeclarationError: If it is missing, too large, nested too deeply, or no TOML.
    """
    shown = short(str(file), 300)[1:-1]
    try:
        if not file.is_file():
            near = nearest_word(file.name, [other.name for other in file.parent.glob("*.toml")])
            raise DeclarationError(f"{shown} is no file.{near} Expected: a declaration in TOML")
        if file.name.lower().endswith((".csv", ".csv.gz", ".parquet", ".pq", ".tfrecord", ".tfrecord.gz")):
            raise DeclarationError(
                f"{shown} is a table. Expected: a declaration in TOML, of which `mvke init {shown}` writes a draft"
            )
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise DeclarationError(f"{shown} cannot be read: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise DeclarationError(f"{shown} is too large for a declaration. Expected: at most {MOST_BYTES:,} bytes")
    try:
        toml = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = content[: error.start].count(b"\n") + 1
        raise DeclarationError(
            f"{shown}, line {position}: no text in UTF-8. Expected: a declaration in TOML"
        ) from error
    for number, line in enumerate(toml.split("\n"), start=1):
        if _dots(line) > MOST_DOTS:
            raise DeclarationError(f"{shown}, line {number}: a key has too many dots. Expected: at most {MOST_DOTS}")
    try:
        return tomllib.loads(toml)
    except RecursionError as error:
        raise DeclarationError(f"{shown} is nested too deeply for a declaration.") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DeclarationError(f"{shown} is no valid TOML: {reason[:300]}") from error


def _dots(line: str) -> int:
    """Dots of the longest dotted key in a line; the parser's time grows with their square."""
    if line.count(".") <= MOST_DOTS:
        return 0
    longest = run = 0
    for part in line.split("."):
        run = run + 1 if re.fullmatch(r"[\w\s\"'-]*", part) else 0
        longest = max(longest, run)
    return longest


def frame(table: Any, name: str) -> pl.DataFrame:
    """A table that is given in Python as a Polars frame.

    Args:
        table: A Polars or pandas frame, an Arrow table, or a dictionary of equally long arrays.
        name: What messages call it.

    Raises:
        DataError: If it is none of these.
    """
    module = type(table).__module__.partition(".")[0]
    try:
        if isinstance(table, pl.DataFrame):
            return table
        if isinstance(table, pl.LazyFrame):
            return table.collect()
        if isinstance(table, Mapping):
            return pl.DataFrame(dict(table))
        if module == "pandas" and hasattr(table, "columns"):
            return pl.from_pandas(table)
        if module == "pyarrow":
            return pl.DataFrame(pl.from_arrow(table))
    except (pl.exceptions.PolarsError, pa.ArrowException, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"The {name} table cannot be read: {reason[:300]}") from error
    raise DataError(
        f"The {name} table must be a Polars or pandas frame, an Arrow table, or a dictionary of arrays. "
        f"Received: {type(table).__name__}"
    )
