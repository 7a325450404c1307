# SPDX-License-Identifier: Apache-2.0
"""A first declaration of a table, guessed from names and values: what `mvke init` writes."""

from __future__ import annotations

import collections
import csv
import dataclasses
import datetime
import gzip
import itertools
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from mvke_tf.data import files
from mvke_tf.data.declaration import ENDINGS, LACKS, MOST_LENGTH, MOST_WIDTH, RESERVED_INPUTS, Dataset
from mvke_tf.data.values import MOST_NAME, column, name_words, short, words
from mvke_tf.errors import DataError, DeclarationError
from mvke_tf.schema import CONSTANT_ITEM, ITEM_ROWS, SUMMARY_SUFFIX, USER_ROWS, WEIGHTS_SUFFIX

MOST_ROWS = 100_000
MOST_COLUMNS = 2_000
DELIMITERS = ",;\t|"
LIST_SEPARATORS = "|;,"
# Words that stand for "unknown" in the CSV files that one meets.
NULL_WORDS = ("\\N", "NULL", "null", "NA", "N/A", "n/a", "NaN", "nan", "None", "?")
# More values than this are hashed.
MOST_VOCABULARY = 50_000
# Texts that are mostly longer than this, and mostly different, are prose.
LONG_TEXT = 40
# 1990 and 2100 in seconds: what a moment of a log lies between.
EARLIEST, LATEST = 631_152_000, 4_102_444_800
# 0002-01-01 and 9998-12-31, in days since 1970: the calendar of Python, in any time zone.
FIRST_DAY, LAST_DAY = -718_797, 2_932_531
# How much less two rows of one user or item differ than any two rows, for a column that belongs to users or items.
DEPENDENT = 0.1
LEAST_PAIRS = 10
# Moments that a table must have, to be split by them.
LEAST_MOMENTS = 10

# fmt: off
USER_WORDS = frozenset((
    "user", "member", "customer", "client", "visitor", "account", "person", "uid", "cookie", "subscriber", "viewer",
    "candidate", "applicant", "listener", "reader", "player", "patient", "student", "learner", "buyer", "shopper",
    "guest", "traveler", "traveller", "passenger", "employee", "consumer", "household",
))
ITEM_WORDS = frozenset((
    "item", "ad", "product", "movie", "film", "article", "video", "doc", "document", "song", "track", "book", "offer",
    "creative", "content", "listing", "sku", "post", "news", "asin", "iid", "app", "campaign", "hotel", "banner", "job",
    "advert", "vacancy", "podcast", "episode", "series", "recipe", "dish", "game", "course", "lesson", "restaurant",
    "venue", "property", "vehicle", "coupon", "deal", "photo", "image", "clip", "playlist", "artist", "album", "plant",
    "package", "destination",
))
ID_ENDS = (("id",), ("uid",), ("uuid",), ("key",), ("hash",))
KEY_WORDS = frozenset(("id", "key", "hash", "uuid", "no", "nr", "number", "code"))
TIME_WORDS = frozenset(("time", "timestamp", "ts", "datetime", "date", "at", "moment", "when", "day"))
BINARY_WORDS = frozenset((
    "click", "clicked", "install", "installed", "purchase", "purchased", "buy", "bought", "order", "ordered", "convert",
    "converted", "conversion", "like", "liked", "follow", "followed", "share", "shared", "cart", "label", "target", "y",
    "download", "downloaded", "subscribe", "subscribed", "churn", "churned", "income", "default", "fraud", "class",
    "response", "responded", "open", "opened", "watched", "finished", "completed", "survived", "outcome", "booking",
    "booked", "signup", "registered", "paid",
))
VALUE_WORDS = frozenset((
    "revenue", "gmv", "ltv", "spend", "spent", "amount", "payment", "dwell", "watch", "duration", "sales", "profit",
    "playtime",
))
# fmt: on
# Grades that users give, of few levels.
GRADE_WORD = re.compile(r"(rat(e|ed|ing)|star|score|grade)s?")
MOST_GRADES = 20
# Share of the texts of a column of numbers up to which they are slips.
MOST_ODD = 0.02
# Of a flag that is 1 in every row of an event: the chance of that, were they independent.
UNLIKELY = 1e-3
POSITIVE_VALUES = frozenset(("yes", "y", "true", "t", "1", "positive", "pos", "success", "good", "clicked", "bought"))
PART_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_RESERVED = (USER_ROWS, ITEM_ROWS, CONSTANT_ITEM)


@dataclasses.dataclass
class _Column:
    """A column and what its values look like.

    Args:
        name: Its name.
        values: Numbers, texts, moments or lists; null is unknown.
        kind: `"flag"` (0 and 1), `"integer"`, `"number"`, `"string"`, `"moment"`, `"list"`, `"vector"` or `"other"`.
        separator: Of a list in a CSV cell.
        weighted: Whether each value of such a list has a weight.
        weights: Column with the weights of a list.
        text: The values as they are stored, if they are texts.
    """

    name: str
    # Polars gives single values of a series as any of a dozen types.
    values: Any
    kind: str
    separator: str | None = None
    weighted: bool = False
    weights: str | None = None
    text: pl.Series | None = None
    # The condition of the event without which it has no value.
    outcome_of: str | None = None
    # A text among numbers.
    odd: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the name."""
        return name_words(self.name)

    @property
    def known(self) -> Any:
        return self.values.drop_nulls()

    @property
    def unknown_share(self) -> float:
        return self.values.null_count() / max(len(self.values), 1)

    @property
    def tokens(self) -> Any:
        """All values; those of lists one by one."""
        if self.kind != "list":
            return self.known
        return self.known.filter(self.known.list.len() > 0).explode().drop_nulls()

    def named(self, *vocabularies: frozenset[str]) -> bool:
        return any(word in vocabulary for word in self.words for vocabulary in vocabularies)

    @property
    def is_grade(self) -> bool:
        if self.kind not in ("integer", "number") or self.known.n_unique() > MOST_GRADES:
            return False
        return any(GRADE_WORD.fullmatch(word) for word in self.words)

    def describe(self) -> str:
        """The values in a few words."""
        known, unknown = self.known, f", {self.unknown_share:.1%} unknown" if self.unknown_share else ""
        if not len(known):
            return "nothing but unknown values"
        if self.kind == "flag":
            return f"1 in {known.mean():.1%} of the rows{unknown}"
        if self.kind in ("integer", "number"):
            return f"{self.kind}s from {known.min():.6g} to {known.max():.6g}, {known.n_unique():,} values{unknown}"
        if self.kind == "list":
            lengths = known.list.len()
            return f"lists of {lengths.min()} to {lengths.max()}, {self.tokens.n_unique():,} values{unknown}"
        if self.kind == "vector":
            return f"vectors of {known.list.len().max()} numbers{unknown}"
        if self.kind == "moment":
            return f"moments from {known.min()} to {known.max()}{unknown}"
        if self.kind == "other":
            return f"values of type {known.dtype}{unknown}"
        common = known.value_counts(sort=True).head(3)[known.name].to_list()
        shown = ", ".join(short(value, 24) for value in common)
        return f"{known.n_unique():,} values such as {shown}{unknown}"


def draft(path: str | Path, folder: str | Path | None = None) -> str:
    """A commented declaration of a table in TOML, to be read and corrected.

    What is guessed is marked `# guess`. Only the first 100,000 rows are looked at.

    Args:
        path: A CSV (also .csv.gz), Parquet or TFRecord file, a folder of such files, or a glob.
        folder: Where the declaration will lie; by default beside the table.

    Raises:
        DataError: If there is no such table, or it cannot be read.
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    log = _Log(path)
    lines = list(_Draft(log, os.path.relpath(path, folder)).lines())
    try:
        Dataset.from_dict(tomllib.loads("\n".join(lines)), folder, where="EDIT FIRST")
    except DeclarationError as error:
        # Without a label, or without a feature of the user tower, there is nothing to declare yet.
        lines.insert(1, f"# {error}")
    return "\n".join(lines) + "\n"


class _Log:
    """The table, its columns, and what they seem to be for."""

    def __init__(self, path: Path) -> None:
        found = [file for file, _ in files.find([("table", str(path.resolve()), 0)], Path("."))]
        formats = {ENDINGS[ending] for ending in ENDINGS if found[0].name.lower().endswith(ending)}
        if not formats:
            raise DataError(f"{path} must be a table whose name ends in {words(ENDINGS)}.")
        self.name, self.format = path.name, formats.pop()
        self.delimiter = _delimiter(found[0]) if self.format == "csv" else ","
        names = files.columns_of(found[0], self.format, self.delimiter)
        if len(names) > MOST_COLUMNS:
            raise DataError(f"{path} has {len(names):,} columns. Expected at most {MOST_COLUMNS:,}.")
        frames: list[pl.DataFrame] = []
        for file in found:
            left = MOST_ROWS - sum(frame.height for frame in frames)
            if left <= 0 or (frames and files.columns_of(file, self.format, self.delimiter) != names):
                break
            frames.append(files.read(file, self.format, names, left, self.delimiter))
        frame = pl.concat(frames, how="vertical_relaxed")
        if not frame.height:
            raise DataError(f"{path} has no rows. Expected at least one.")
        self.rows, self.is_sample = frame.height, frame.height >= MOST_ROWS or len(frames) < len(found)
        self.null = _null_words(frame) if self.format == "csv" else ()
        self.columns = [_look_at(series, self.format == "csv", self.null) for series in frame]
        self._separate_lists()
        self._find_weights()
        self.by_name = {one.name: one for one in self.columns}

        self.time, self.time_unit = self._find_time()
        self.user, self.item = self._find_keys()
        self.item_name = self._find_item_name()
        self.part = self._find_part()
        self.tasks = self._find_tasks()

    def _separate_lists(self) -> None:
        """One separator for all lists of a CSV: the most frequent; other lists stay texts.

        What separates the cells, too, as in quoted cells, may not be declared.
        """
        taken = (None, self.delimiter)
        found = collections.Counter(one.separator for one in self.columns if one.separator not in taken)
        self.separator = found.most_common(1)[0][0] if found else None
        for one in self.columns:
            if one.separator and one.separator != self.separator:
                one.values, one.kind, one.separator, one.weighted = one.text, "string", None, False

    def _find_weights(self) -> None:
        lists = {one.name: one for one in self.columns if one.values.dtype == pl.List}
        for name, one in list(lists.items()):
            for end in ("_weight", "_weights", "_score", "_scores"):
                other = lists.get(f"{name}{end}") or lists.get(f"{name.removesuffix('s')}{end}")
                if other is None or other is one or one.kind != "list" or not _are_numbers(other):
                    continue
                if (one.values.list.len() == other.values.list.len()).fill_null(True).all():
                    one.weights, other.kind = other.name, "weights"

    def _find_time(self) -> tuple[_Column | None, str]:
        found = []
        for position, one in enumerate(self.columns):
            unit = _time_unit(one)
            if unit is None or one.values.null_count():
                continue
            hits = [word for word in one.words if word in TIME_WORDS]
            if one.kind != "moment" and not hits:
                continue
            # The shortest name, `timestamp` before `signup_date`; then the one with the most moments.
            found.append((len(one.words) - 2 * bool(hits), -one.values.n_unique(), position, one, unit))
        return min(found)[-2:] if found else (None, "s")

    def _find_keys(self) -> tuple[_Column | None, _Column | None]:
        keys = [one for one in self.columns if one.kind in ("integer", "string", "flag") and one is not self.time]
        keys = [one for one in keys if not one.values.null_count()]

        def best(vocabulary: frozenset[str]) -> _Column | None:
            fitting = []
            for position, one in enumerate(keys):
                rest = [word for word in one.words if word not in vocabulary]
                if len(rest) < len(one.words) and all(word in KEY_WORDS for word in rest):
                    fitting.append((len(one.words) != 2, position, one))
            return min(fitting)[-1] if fitting else None

        user, item = best(USER_WORDS), best(ITEM_WORDS)
        # Other ids that repeat, that with the most values first: there are more users than items.
        others = [
            (-one.values.n_unique(), position, one)
            for position, one in enumerate(keys)
            if one is not user
            and one is not item
            and one.words[-1:] in ID_ENDS
            and 1 < one.values.n_unique() <= self.rows / 2
        ]
        left = [one for *_, one in sorted(others)]
        if user is None and (item is not None or len(left) > 1):
            user = left.pop(0) if left else None
        if user is not None and item is None:
            item = left.pop(0) if left else None
        return user, item

    def _find_item_name(self) -> _Column | None:
        if self.item is None:
            return None
        for one in self.columns:
            if one.kind == "string" and one is not self.item and one.words[-1:] in (("title",), ("name",)):
                others = [word for word in one.words[:-1] if word not in ITEM_WORDS and word not in self.item.words]
                if not others and self.dependence(one, self.item) <= DEPENDENT:
                    return one
        return None

    def _find_part(self) -> tuple[_Column, dict[str, list[str]]] | None:
        for one in self.columns:
            if one.kind != "string" or one.values.null_count() or one.values.n_unique() > 6:
                continue
            values = one.values.unique().to_list()
            parts = {part: [v for v in values if v.lower() in names] for part, names in PART_WORDS.items()}
            if all(parts.values()) and sum(map(len, parts.values())) == len(values):
                return one, parts
        return None

    def _find_tasks(self) -> list[_Task]:
        used = [self.time, self.user, self.item, self.item_name, self.part and self.part[0]]
        left = [one for one in self.columns if not any(one is other for other in used)]
        binary = [task for one in left if one.named(BINARY_WORDS) for task in _binary_task(one)]
        values = [one for one in left if (one.named(VALUE_WORDS) or one.is_grade) and self._is_outcome(one)]
        grades = [one for one in values if one.is_grade]
        binary += [_grade_task(one) for one in grades]
        if not binary and not values:
            flags = [task for one in reversed(left) if one.kind == "flag" for task in _binary_task(one)]
            binary = flags[:1]
        binary += [task for one in left for task in self._wider_task(one, binary)]
        binary += [task for one in left for task in self._narrower_task(one, binary)]
        self._find_outcomes(left, [*binary, *(_Task(one, "", "", one.values) for one in values)])
        binary.sort(key=lambda task: -task.positives)
        for task in binary:
            wider = [
                other
                for other in binary
                if other.positives > task.positives
                and other.label.name != task.label.name
                and not (task.happened & ~other.happened).any()
            ]
            task.given = min(wider, key=lambda other: other.positives, default=None)
            if task.given is not None:
                task.is_conditional = bool(task.label.values.filter(~task.given.happened).is_null().all())
        return binary + [self._value_task(one, binary) for one in values]

    def _wider_task(self, one: _Column, tasks: Sequence[_Task]) -> list[_Task]:
        """The task of a flag without which no event of another happens, by more than chance: as a feature it would
        tell the model that event."""
        if one.kind != "flag" or any(task.label is one for task in tasks) or not self._varies(one):
            return []
        for wider in _binary_task(one):
            for task in tasks:
                chance = (wider.positives / self.rows) ** task.positives
                if chance < UNLIKELY and not (task.happened & ~wider.happened).any():
                    # In a comment, where TOML allows no control character.
                    name = _toml(task.name or task.label.name)[1:-1]
                    return [dataclasses.replace(wider, note=f"an outcome: {name} is 1 only where it is 1")]
        return []

    def _narrower_task(self, one: _Column, tasks: Sequence[_Task]) -> list[_Task]:
        """The task of a flag that is 1 only where another event has happened, by more than chance."""
        if one.kind != "flag" or any(task.label is one for task in tasks) or not self._varies(one):
            return []
        for narrower in _binary_task(one):
            for task in tasks:
                if self._happens_only_with(narrower.happened, task):
                    name = _toml(task.name or task.label.name)[1:-1]
                    return [dataclasses.replace(narrower, note=f"an outcome: it is 1 only where {name} is 1")]
        return []

    def _find_outcomes(self, columns: Sequence[_Column], tasks: Sequence[_Task]) -> None:
        """Marks columns that have a value other than 0 only where an event has happened, by more than chance: they are
        known afterwards, and would tell the model that event."""
        for one in columns:
            if any(task.label is one for task in tasks) or not self._varies(one):
                continue
            filled = one.values.is_not_null()
            if one.kind in ("flag", "integer", "number"):
                filled = filled & (one.values != 0).fill_null(False)
            elif one.kind == "list":
                filled = filled & (one.values.list.len() > 0).fill_null(False)
            for task in tasks:
                if task.kind == "binary" and self._happens_only_with(filled, task):
                    one.outcome_of = task.sql

    def _happens_only_with(self, happened: pl.Series, task: _Task) -> bool:
        chance = (task.positives / self.rows) ** int(happened.sum())
        return chance < UNLIKELY**2 and not (happened & ~task.happened).any()

    def _is_outcome(self, one: _Column) -> bool:
        return one.kind in ("integer", "number") and one.known.n_unique() >= 3 and self._varies(one)

    def _varies(self, one: _Column) -> bool:
        """Whether it is no property of the user or of the item."""
        return all(key is None or self.dependence(one, key) > DEPENDENT for key in (self.user, self.item))

    def _value_task(self, one: _Column, binary: Sequence[_Task]) -> _Task:
        values = one.values.cast(pl.Float64)
        happened = (values != 0).fill_null(False)
        wider = [task for task in binary if task.label is not one and not (happened & ~task.happened).any()]
        where = min(wider, key=lambda task: task.positives, default=None)
        positive = values.filter(happened)
        skewed = values.min() >= 0 and positive.max() > 5 * positive.mean()
        return _Task(one, _sql(one.name), "regression", happened, where=where, log=skewed)

    def dependence(self, one: _Column, key: _Column) -> float:
        """How often two rows of one key differ in a column, over how often any two rows do; 1 without evidence."""
        values = one.values
        if isinstance(values.dtype, pl.List):
            if values.dtype.inner.is_nested():
                return 1.0
            values = values.cast(pl.List(pl.String)).list.join("\0")
        frame = pl.DataFrame({"key": key.values, "value": values}).drop_nulls()
        # Neighbours in the order of keys, in which the order of the rows of one key is left as it is.
        frame = frame.sort("key", maintain_order=True)
        same = frame["key"] == frame["key"].shift(1)
        pairs = int(same.fill_null(False).sum())
        if pairs < LEAST_PAIRS:
            return 1.0
        within = float(((frame["value"] != frame["value"].shift(1)) & same).sum()) / pairs
        shares = frame["value"].value_counts()["count"] / frame.height
        between = 1.0 - float((shares**2).sum())
        return 1.0 if between <= 1e-9 else within / between


@dataclasses.dataclass
class _Task:
    """A task, and the rows in which its event happened."""

    label: _Column
    sql: str
    kind: str
    happened: pl.Series
    name: str = ""
    given: _Task | None = None
    where: _Task | None = None
    log: bool = False
    note: str = ""
    is_conditional: bool = False

    @property
    def positives(self) -> int:
        return int(self.happened.sum())


class _Draft:
    """The text of the declaration."""

    def __init__(self, log: _Log, path: str) -> None:
        self._log, self._path = log, Path(path).as_posix()
        self._names: set[str] = set(_RESERVED)
        for task in log.tasks:
            task.name = self._name_of(task.name or task.label.name)
        self._unused: list[tuple[str, str]] = []
        # Names of the features of columns.
        self._features_of: dict[str, str] = {}

    def _name_of(self, name: str, is_list: bool = False) -> str:
        """A legal name that is not taken, and neither is that of its weights or its summary."""
        clean = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[: MOST_NAME - 20]
        clean = clean if clean[:1].isalpha() else f"column_{clean}".rstrip("_")
        for found in itertools.chain([clean], (f"{clean}_{number}" for number in itertools.count(2))):
            # Whatever the next one is called, neither is then what belongs to the other.
            names = {found.lower(), *((found + suffix).lower() for suffix in (WEIGHTS_SUFFIX, SUMMARY_SUFFIX))}
            if not names & self._names and found not in RESERVED_INPUTS:
                break
        self._names |= names
        return found

    def lines(self) -> Iterator[str]:
        log = self._log
        rows = f"the first {log.rows:,} rows" if log.is_sample else f"{log.rows:,} rows"
        yield f"# Draft of a declaration, made by `mvke init` from {rows} of {short(log.name)[1:-1]}."
        yield "# Lines that are marked as a guess were guessed from names and values: read them and correct them."
        yield "# docs/dataset.md explains all keys. Then run: mvke check"
        yield "format = 1"
        yield from self._source()
        yield from self._keys()
        yield from self._split()
        tasks = list(self._tasks())
        features = list(self._features())
        yield from features
        yield from tasks
        if self._unused:
            yield ""
            yield "# Columns that nothing reads:"
            names = [short(name, 40)[1:-1] for name, _ in self._unused]
            width = max(map(len, names))
            yield from (f"#   {name:<{width}}  {why}" for name, (_, why) in zip(names, self._unused, strict=True))

    def _source(self) -> Iterator[str]:
        log = self._log
        yield ""
        yield "[source]"
        yield f"path = {_toml(self._path)}"
        if log.delimiter != ",":
            yield f"delimiter = {_toml(log.delimiter)}"
        if log.null:
            yield f'null = {_toml(list(log.null))}  # guess: these words mean "unknown"'
        if log.separator and log.separator != "|":
            yield f"list_separator = {_toml(log.separator)}  # guess"
        if log.time is not None:
            yield f"time = {_toml(log.time.name)}  # guess: {_span(log.time, log.time_unit)}"
            if log.time.kind != "moment" or log.time.text is not None:
                yield f"time_unit = {_toml(log.time_unit)}  # guess"

    def _keys(self) -> Iterator[str]:
        log = self._log
        yield ""
        yield "[keys]"
        for key, one in (("user", log.user), ("item", log.item)):
            if one is None:
                yield f"# guess: no column looks like the id of the {key}. If one is, name it: without, {LACKS[key]}."
                yield f'# {key} = "..."'
            else:
                yield f"{key} = {_toml(one.name)}  # guess: {one.values.n_unique():,} values"
        if log.item_name is not None:
            yield f"item_name = {_toml(log.item_name.name)}  # guess"

    def _split(self) -> Iterator[str]:
        log = self._log
        yield ""
        yield "[split]"
        if log.part is not None:
            one, parts = log.part
            yield f'by = "column"  # guess: {one.describe()}'
            yield f"column = {_toml(one.name)}"
            yield from (f"{part} = {_toml(sorted(values))}" for part, values in parts.items())
        elif log.time is not None and log.time.values.n_unique() >= LEAST_MOMENTS:
            yield 'by = "share_of_time"  # the latest rows are the test part'
            yield from ("train = 0.7", "validation = 0.1", "test = 0.2")
        else:
            yield 'by = "random"  # guess: without a column of moments; "hash" keeps all rows of a user together'
            yield from ("train = 0.7", "validation = 0.1", "test = 0.2")

    def _tasks(self) -> Iterator[str]:
        log = self._log
        yield ""
        if not log.tasks:
            yield "# No column looks like a label (0 and 1, or a number such as a revenue). Take out the # of two"
            yield "# lines, name the column with the label, and delete its table of [features] above:"
            yield "# [tasks.label]"
            yield f"# label = {_toml(_sql(log.columns[-1].name))}"
            return
        yield "# Tasks, in this order."
        for number, task in enumerate(log.tasks):
            yield ""
            yield f"[tasks.{task.name}]"
            yield f"label = {_toml(task.sql)}  # guess: {task.note or task.label.describe()}"
            if task.kind == "regression":
                yield 'kind = "regression"'
                if task.where is not None:
                    yield f"where = {_toml(task.where.sql)}  # guess: it is 0 or unknown in all other rows"
                if task.log:
                    yield 'transform = "log1p"  # guess: it learns log(1 + label)'
                if number and task.label.is_grade:
                    yield "default = false  # guess: learned only where it is asked for"
            if task.given is not None:
                yield f"given = {_toml(task.given.name)}  # guess: it is 1 only where {task.given.name} is 1"
                if task.is_conditional:
                    yield f'objective = "conditional"  # it is unknown where {task.given.name} is 0'

    def _features(self) -> Iterator[str]:
        log = self._log
        labels = {task.label.name for task in log.tasks}
        special = {log.time and log.time.name, log.item_name and log.item_name.name, log.part and log.part[0].name}
        by_tower: dict[str, list[list[str]]] = {"user": [], "context": [], "item": []}
        for one in log.columns:
            if one.name in labels or one.name in special or one.kind == "weights":
                continue
            why = self._reason_against(one)
            if why:
                self._unused.append((one.name, why))
                continue
            tower, reason = self._tower(one)
            is_list = one.kind == "list"
            name = self._features_of[one.name] = self._name_of(one.name, is_list)
            lines = [f"[features.{name}]  # {one.describe()}"]
            lines.append(f'tower = "{"item" if tower == "item" else "user"}"{reason}')
            if tower == "context":
                lines.append("context = true  # guess: it changes from row to row of a user")
            if name != one.name:
                lines.append(f"column = {_toml(one.name)}")
            if one.odd is not None:
                lines.append(
                    f"# guess: a text, because of cells such as {one.odd}. Nearly all others are numbers: correct"
                )
                lines.append(
                    "# them in the table, or name the words that mean unknown in `null` of [source]; then draft anew."
                )
            lines += self._encoding(one)
            by_tower[tower].append(lines)
        by_tower["user"] += self._histories()
        if not by_tower["user"] and not by_tower["context"]:
            yield ""
            yield "# No column is left for the user tower, which needs at least one feature: change the tower of one."
        titles = {
            "user": "What is known of the user",
            "context": "What is known at the moment of the request only",
            "item": "What is known of the item",
        }
        for tower, title in titles.items():
            for number, lines in enumerate(by_tower[tower]):
                yield ""
                if not number:
                    yield f"# {title}"
                yield from lines

    def _reason_against(self, one: _Column) -> str | None:
        """Why a column makes no feature; None if it does."""
        known, rows = one.known, self._log.rows
        if column(one.name) is None:
            return "a name that patterns have; rename the column to use it"
        if not len(known) or (one.kind == "list" and not len(one.tokens)):
            return "nothing but unknown values"
        if one.kind == "other":
            return f"no encoding for values of type {known.dtype}"
        if one.kind == "moment":
            return f"{one.describe()}; no encoding for moments"
        if one.outcome_of is not None:
            event = short(one.outcome_of, 40)[1:-1]
            return f"an outcome: it has a value only where {event}; as a feature it would give that away"
        if one.kind in ("list", "vector"):
            return None
        if known.n_unique() == 1:
            return f"one value only: {short(known[0], 40)}"
        is_name = one.kind == "string" or (one.kind == "integer" and (one.named(KEY_WORDS) or one is self._log.user))
        if is_name and rows >= 20 and known.n_unique() > 0.95 * rows:
            return "nearly every row has a value of its own"
        if one.kind == "string" and known.str.len_chars().median() > LONG_TEXT and known.n_unique() > 0.5 * rows:
            return "prose; a text embedding of it would be a vector"
        return None

    def _tower(self, one: _Column) -> tuple[str, str]:
        """`"user"`, `"item"` or `"context"`, and a comment."""
        log = self._log
        if one is log.user:
            return "user", ""
        if one is log.item:
            return "item", ""
        ratios = {
            side: log.dependence(one, key) for side, key in (("user", log.user), ("item", log.item)) if key is not None
        }
        # Of two sides that determine the column, the one that the name speaks of, then the stricter one.
        fitting = [side for side, ratio in ratios.items() if ratio <= DEPENDENT]
        spoken = [side for side, said in (("user", USER_WORDS), ("item", ITEM_WORDS)) if one.named(said)]
        for side in sorted(fitting, key=lambda side: (side not in spoken, ratios[side])):
            return side, f"  # guess: all rows of one {side} have one value"
        if "item" in spoken and log.item is not None and ratios["item"] < 0.5:
            return "item", "  # guess: the name says so"
        return ("context", "") if log.user is not None else ("user", "")

    def _encoding(self, one: _Column) -> list[str]:
        distinct = one.tokens.n_unique()
        if one.kind == "vector":
            return ['encode = "vector"', f"width = {min(one.known.list.len().max(), MOST_WIDTH)}"]
        lines = []
        known = one.tokens
        is_id = one is self._log.user or one is self._log.item or one.words[-1:] == ("id",)
        if one.kind == "integer" and one.words[-1:] == ("hour",) and known.min() >= 0 and known.max() <= 23:
            return ['encode = "integer"', "bins = 24"]
        if one.kind == "number" or (one.kind == "integer" and not is_id and distinct > 20):
            lines.append('encode = "buckets"  # by quantiles; or "number"')
            lines.append(f"bins = {10 if distinct < 1_000 else 20}")
            low = known.filter(known > known.min())
            if known.min() == -1 and len(low) and low.min() >= 0:
                lines.append("missing = [-1]  # guess")
            return lines
        if distinct > MOST_VOCABULARY or (self._log.is_sample and distinct > MOST_VOCABULARY / 5):
            lines += ['encode = "hash"  # guess: too many values for a vocabulary', f"bins = {_bins(distinct)}"]
        else:
            lines.append('encode = "vocabulary"')
            if one.kind != "flag" and distinct > 100:
                least = 2 if distinct <= 1_000 else 5
                lines.append(f"min_count = {least}  # guess: rarer values are unknown")
        if one.kind == "list":
            lengths = one.known.list.len()
            length = int(lengths.max()) if lengths.max() <= 20 else math.ceil(lengths.quantile(0.95))
            lines.append(f"length = {min(max(length, 2), MOST_LENGTH)}")
            if one.weighted:
                lines.append("weighted = true  # guess: value and weight in each cell")
            if one.weights is not None:
                lines.append(f"weights = {_toml(one.weights)}  # guess: lists of the same lengths")
            if one.weighted or one.weights is not None:
                lines.append('keep = "heaviest"')
        elif one is self._log.user:
            lines.append("unknown_rate = 0.5  # guess: so that the model can do without the id, as of a new user")
        elif one is self._log.item:
            lines.append("unknown_rate = 0.05  # guess: so that the model knows new items")
        return lines

    def _histories(self) -> list[list[str]]:
        """What each user did before: possible where there are users and moments, and users come again."""
        log = self._log
        if log.user is None or log.time is None or log.user.values.n_unique() > 0.5 * log.rows:
            return []
        binary = next((task for task in log.tasks if task.kind == "binary"), None)
        features = []
        if binary is not None:
            name = self._name_of(f"{binary.name}_share")
            features.append(
                [
                    f"[features.{name}]  # share of the user's earlier rows in which the label {binary.name} is 1",
                    'tower = "user"',
                    'encode = "buckets"',
                    "bins = 10",
                    f"history = {{ share = {_toml(binary.sql)} }}  # guess",
                ]
            )
        if log.item is not None and log.item.name in self._features_of:
            where = f", where = {_toml(binary.sql)}" if binary is not None else ""
            features.append(
                [
                    f"[features.{self._name_of('recent_items', True)}]  # the last items of the user, before each row",
                    'tower = "user"',
                    f"embedding = {_toml(self._features_of[log.item.name])}",
                    "length = 20",
                    f"history = {{ last = {_toml(log.item.name)}{where} }}  # guess",
                ]
            )
        return features


# Reading


def _delimiter(path: Path) -> str:
    """The delimiter of a CSV: the one that most of the header's names stand between."""
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            header = file.readline(1_000_000)
    except files.DAMAGE:
        # Whoever reads the rows says what is wrong.
        return ","
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def _null_words(frame: pl.DataFrame) -> tuple[str, ...]:
    found = {word for series in frame for word in series.filter(series.is_in(list(NULL_WORDS))).unique().to_list()}
    return tuple(word for word in NULL_WORDS if word in found)


def _look_at(series: pl.Series, is_csv: bool, null: Sequence[str]) -> _Column:
    kind = series.dtype
    if is_csv:
        return _look_at_text(series.replace(dict.fromkeys(null)) if null else series)
    if isinstance(kind, (pl.Categorical, pl.Enum)):
        series, kind = series.cast(pl.String), pl.String()
    if kind == pl.String:
        text = series.replace("", None)
        moments = _moments(text)
        if moments is not None:
            return _Column(series.name, moments, "moment", text=text)
        return _Column(series.name, text, "string")
    if kind == pl.Boolean:
        return _Column(series.name, series.cast(pl.Int64), "flag")
    if kind.is_integer():
        return _numeric(series.name, series.cast(pl.Int64, strict=False))
    if kind.is_float() or kind.is_decimal():
        numbers = series.cast(pl.Float64).fill_nan(None)
        return _numeric(series.name, pl.select(pl.when(numbers.is_finite()).then(numbers)).to_series())
    if isinstance(kind, (pl.Datetime, pl.Date)):
        return _Column(series.name, _within_calendar(series), "moment")
    if isinstance(kind, (pl.List, pl.Array)):
        lists: Any = series.arr.to_list() if isinstance(kind, pl.Array) else series
        inner = lists.dtype.inner
        lengths = lists.list.len().drop_nulls()
        if inner.is_float():
            one_length = lengths.n_unique() == 1 and lengths[0] > 0
            return _Column(series.name, lists, "vector" if one_length else "other")
        if inner == pl.String or inner.is_integer():
            return _Column(series.name, lists, "list")
    return _Column(series.name, series, "other")


def _within_calendar(moments: pl.Series) -> pl.Series:
    """Dates or timestamps; null for those of years that Python does not have."""
    kind = moments.dtype
    if isinstance(kind, pl.Datetime) and kind.time_unit == "ns":
        # 64 bits of nanoseconds end in 2262.
        return moments
    per_day = 86_400 * (1_000 if kind.time_unit == "ms" else 1_000_000) if isinstance(kind, pl.Datetime) else 1
    inside = moments.to_physical().is_between(FIRST_DAY * per_day, LAST_DAY * per_day)
    return pl.select(pl.when(inside).then(moments)).to_series()


def _numeric(name: str, numbers: pl.Series) -> _Column:
    known: Any = numbers.drop_nulls()
    if known.dtype == pl.Float64 and len(known) and (known == known.round()).all() and known.abs().max() < 2**53:
        numbers = numbers.cast(pl.Int64)
        known = numbers.drop_nulls()
    if known.dtype != pl.Int64:
        return _Column(name, numbers, "number")
    return _Column(name, numbers, "flag" if len(known) and set(known.unique().to_list()) <= {0, 1} else "integer")


def _look_at_text(series: pl.Series) -> _Column:
    known: Any = series.drop_nulls()
    text = known.str.strip_chars()
    if not len(known):
        return _Column(series.name, series, "string")
    if text.str.to_lowercase().is_in(["true", "false"]).all():
        return _Column(series.name, series.str.strip_chars().str.to_lowercase().eq("true").cast(pl.Int64), "flag")
    numbers = text.cast(pl.Float64, strict=False)
    # A text with leading zeros is a name.
    if numbers.is_finite().fill_null(False).all() and not text.str.contains(r"^[+-]?0\d").any():
        whole = series.str.strip_chars().cast(pl.Int64, strict=False)
        exact = whole.null_count() == series.null_count()
        return _numeric(series.name, whole if exact else series.str.strip_chars().cast(pl.Float64, strict=False))
    moments = _moments(series)
    if moments is not None:
        return _Column(series.name, moments, "moment", text=series)
    odd = text.filter(~numbers.is_finite().fill_null(False))
    return _as_list(series) or _Column(
        series.name, series, "string", odd=short(odd[0], 40) if 0 < len(odd) <= MOST_ODD * len(text) else None
    )


def _moments(series: pl.Series) -> pl.Series | None:
    """A column of ISO texts as moments; None if a text is none."""
    known = series.drop_nulls()
    if not len(known) or not known.str.contains(r"^\s*\d{4}-\d{2}-\d{2}").all():
        return None
    distinct = known.unique()
    moments: list[datetime.datetime] = []
    for text in distinct.to_list():
        try:
            moment = datetime.datetime.fromisoformat(text.strip())
            moments.append(moment if moment.tzinfo is None else moment.astimezone(datetime.UTC).replace(tzinfo=None))
        except (ValueError, OverflowError):
            return None
    return series.replace_strict(distinct, pl.Series(moments, dtype=pl.Datetime("us")), return_dtype=pl.Datetime("us"))


def _as_list(series: pl.Series) -> _Column | None:
    """A column whose cells are lists, if some have a separator and values come again; None otherwise."""
    known: Any = series.drop_nulls()
    for separator in LIST_SEPARATORS:
        having = known.str.contains(separator, literal=True)
        if having.mean() < 0.1:
            continue
        lists = series.str.split(separator)
        tokens = known.str.split(separator).explode().drop_nulls().str.strip_chars()
        weighted = bool(tokens.str.contains(r"^.*[^\s]:\s*\d*\.?\d+(e-?\d+)?$").mean() > 0.98)
        numbers = tokens.cast(pl.Float64, strict=False)
        if numbers.is_not_null().all() and tokens.str.contains(".", literal=True).any():
            lengths = known.str.split(separator).list.len()
            kind = "vector" if lengths.n_unique() == 1 else "other"
            return _Column(series.name, lists, kind, separator, text=series)
        values = tokens.str.replace(r":[^:]*$", "") if weighted else tokens
        # Of prose nearly every part is another one, and has spaces.
        if values.n_unique() > 0.5 * len(values) or values.str.len_chars().mean() > LONG_TEXT / 2:
            continue
        if separator == "," and values.str.starts_with(" ").mean() > 0.5:
            continue
        if weighted:
            lists = lists.list.eval(pl.element().str.replace(r":[^:]*$", ""))
        return _Column(series.name, lists, "list", separator, weighted, text=series)
    return None


def _time_unit(one: _Column) -> str | None:
    """The unit of a column of plausible moments; None of any other column."""
    if not len(one.known):
        return None
    if one.kind == "moment":
        return "iso"
    if one.kind not in ("integer", "number"):
        return None
    for unit, per_second in (("s", 1), ("ms", 1_000), ("us", 1_000_000)):
        if EARLIEST * per_second <= one.known.min() and one.known.max() <= LATEST * per_second:
            return unit
    return None


def _span(one: _Column, unit: str) -> str:
    """The first and the last moment of a column."""
    ends = [one.known.min(), one.known.max()]
    if one.kind != "moment":
        per_second = {"s": 1, "ms": 1_000, "us": 1_000_000}[unit]
        ends = [datetime.datetime.fromtimestamp(end / per_second, datetime.UTC).replace(tzinfo=None) for end in ends]
    return " to ".join(end.isoformat(" ", "seconds") if hasattr(end, "hour") else end.isoformat() for end in ends)


def _are_numbers(lists: _Column) -> bool:
    tokens = lists.values.drop_nulls().explode().drop_nulls()
    return len(tokens) > 0 and bool(tokens.cast(pl.Float64, strict=False).is_not_null().all())


def _binary_task(one: _Column) -> list[_Task]:
    """The task of a label of two values; none if it has more."""
    known = one.known
    if known.n_unique() != 2:
        return []
    if one.kind == "flag":
        return [_Task(one, _sql(one.name), "binary", (one.values == 1).fill_null(False))]
    if one.kind != "string" or not all(word in BINARY_WORDS for word in one.words):
        # Two words are as often a property as a label, so that the name must speak of nothing else.
        return []
    counts = known.value_counts().sort(["count", known.name])
    values = counts[known.name].to_list()
    positive = next((value for value in values if value.strip().lower() in POSITIVE_VALUES), values[0])
    quoted = "'" + positive.replace("'", "''") + "'"
    note = f"which of {short(values[0], 30)} and {short(values[1], 30)} is the event?"
    happened = (one.values == positive).fill_null(False)
    return [_Task(one, f"{_sql(one.name)} = {quoted}", "binary", happened, note=note)]


def _grade_task(one: _Column) -> _Task:
    """Whether a grade is one of the better ones."""
    known = one.known.cast(pl.Float64)
    levels = sorted(known.unique().to_list())
    least = min(levels[1:], key=lambda level: abs((known >= level).mean() - 0.4))
    happened = (one.values.cast(pl.Float64) >= least).fill_null(False)
    note = f"{happened.mean():.0%} of the rows"
    return _Task(one, f"{_sql(one.name)} >= {least:g}", "binary", happened, name=f"high_{one.name}", note=note)


def _sql(name: str) -> str:
    """A column in a SQL condition."""
    return name if name.isidentifier() else '"' + name.replace('"', '""') + '"'


def _bins(distinct: int) -> int:
    """A round number of hash bins, about four for each value seen."""
    return 10 ** math.ceil(math.log10(4 * distinct))


def _toml(value: Any) -> str:
    """A text, number, or list of them in TOML, whose texts are those of JSON but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
