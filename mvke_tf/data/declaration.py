# SPDX-License-Identifier: Apache-2.0
"""A dataset as its owner declares it: where the rows are, what the columns mean, and what is predicted.

A declaration is one TOML file beside tables that exist already, `Dataset.from_toml`, or the same from Python,
`Dataset.from_frame`. The dataclasses here are the TOML tables, key by key; they check what can be checked without the
data. Nothing here reads a row.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import inspect
import itertools
import keyword
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from mvke_tf.config import OBJECTIVES
from mvke_tf.data import expressions
from mvke_tf.data import values as read
from mvke_tf.data.values import (
    MOST_NAME,
    READERS,
    Column,
    Condition,
    Duration,
    Paths,
    WrongValueError,
    nearest_word,
    short,
    words,
)
from mvke_tf.errors import DeclarationError
from mvke_tf.schema import (
    CONSTANT_ITEM,
    ITEM_ROWS,
    ITEM_SAMPLING,
    SUMMARY_SUFFIX,
    TASK_KINDS,
    TOWERS,
    TRANSFORMS,
    USER_ROWS,
    WEIGHTS_SUFFIX,
)

FORMAT = 1
ENCODINGS = ("vocabulary", "hash", "buckets", "integer", "number", "vector")
PARTS = ("train", "validation", "test")
FORMATS = ("csv", "parquet", "tfrecord")
ENDINGS = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tfrecord": "tfrecord",
    ".tfrecord.gz": "tfrecord",
}
TIME_UNITS = ("s", "ms", "us", "iso")
SPLITS = ("share_of_time", "time", "per_user", "hash", "random", "column", "files")
SHARE_SPLITS = ("share_of_time", "per_user", "hash", "random")
SHARES = (0.7, 0.1, 0.2)
DEFAULT_BINS = 20
KEEP = ("first", "last", "heaviest")
SCALINGS = ("standard", "piecewise")

# The most that a declaration may ask for, so that a slip is an error and not an hour of allocating memory.
MOST_ENTRIES = 10_000
MOST_INDICES = 2**31 - 2
MOST_LENGTH = 10_000
MOST_BINS = 65_536
MOST_WIDTH = 65_536
MOST_CLASSES = 1_000
MOST_SEED = 2**32 - 1

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# Inputs of a model that are no feature.
_RESERVED = frozenset({USER_ROWS, ITEM_ROWS, ITEM_SAMPLING, CONSTANT_ITEM})
# And of features, what the signatures of an export take besides them; and what is no name of an argument.
RESERVED_INPUTS = frozenset({"exclude", "item_ids", "k", "self", "task", *keyword.kwlist})
# What is the matter without a key.
LACKS = {
    "user": "every row is a user of its own, without a history and without profiles",
    "item": "no items can be recommended",
}
# Legal words of a key.
_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("Source", "format"): FORMATS,
    ("Source", "time_unit"): TIME_UNITS,
    ("Statistic", "until"): ("training", "row"),
    ("FeatureDeclaration", "tower"): TOWERS,
    ("FeatureDeclaration", "encode"): ENCODINGS,
    ("FeatureDeclaration", "type"): ("string", "integer"),
    ("FeatureDeclaration", "keep"): KEEP,
    ("FeatureDeclaration", "scaling"): SCALINGS,
    ("TaskDeclaration", "kind"): TASK_KINDS,
    ("TaskDeclaration", "objective"): OBJECTIVES,
    ("TaskDeclaration", "transform"): TRANSFORMS,
    ("Negatives", "kind"): ("none", "uniform", "popularity"),
    ("Split", "by"): SPLITS,
}
# Lowest and highest legal value of a key, or of the number of entries of a list.
_RANGES: dict[tuple[str, str], tuple[float, float]] = {
    ("FeatureDeclaration", "length"): (1, MOST_LENGTH),
    ("FeatureDeclaration", "min_count"): (1, MOST_INDICES),
    ("FeatureDeclaration", "max_size"): (0, MOST_INDICES),
    ("FeatureDeclaration", "out_of_vocabulary_bins"): (0, MOST_INDICES),
    ("FeatureDeclaration", "bins"): (0, MOST_INDICES),
    ("FeatureDeclaration", "width"): (0, MOST_WIDTH),
    ("FeatureDeclaration", "unknown_rate"): (0, 1),
    ("Negatives", "per_positive"): (1, 1_000),
    ("Negatives", "seed"): (0, MOST_SEED),
    ("Split", "seed"): (0, MOST_SEED),
    ("Group", "step"): (0, 10**12),
    ("Group", "quantiles"): (0, MOST_ENTRIES),
    ("Group", "top"): (0, MOST_ENTRIES),
}


def _read_fields(owner: Any, place: str) -> None:
    """Brings every field into the form in which it is kept.

    Raises:
        WrongValueError: If one has another type, is no legal word, or is out of range.
    """
    for field in dataclasses.fields(owner):
        key, value = (type(owner).__name__, field.name), getattr(owner, field.name)
        reader = READERS.get(str(field.type).removesuffix(" | None"))
        if reader is None or (type(value) is type(field.default) and value == field.default):
            continue
        if field.name == "name" and key[0] != "Dataset":
            _check_name(place, value)
            continue
        take, expected = reader
        received, value = value, take(value)
        if choices := _CHOICES.get(key):
            if value not in choices:
                near = nearest_word(received, choices)
                raise WrongValueError(
                    place, f"`{field.name}` must be one of {words(choices)}. Received: {short(received)}.{near}"
                )
        elif value is None:
            raise WrongValueError(place, f"`{field.name}` must be {expected}. Received: {short(received)}")
        if key in _RANGES:
            low, high = _RANGES[key]
            if not low <= value <= high:
                raise WrongValueError(
                    place, f"`{field.name}` must be {expected} from {low:,} to {high:,}. Received: {short(received)}"
                )
        object.__setattr__(owner, field.name, value)


def _check_name(place: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MOST_NAME:
        raise WrongValueError(
            place,
            f"a name must be a letter and then letters, digits or _, at most {MOST_NAME} (the column may be called "
            f"otherwise). Received: {short(name)}",
        )


def _check_sql(place: str, owner: Any, *keys: str) -> None:
    for key in keys:
        if text := getattr(owner, key):
            try:
                expressions.columns(text, f"`{key}`")
            except DeclarationError as error:
                raise WrongValueError(place, str(error)) from error


def _check_durations(place: str, owner: Any, *keys: str) -> None:
    for key in keys:
        if (text := getattr(owner, key)) is not None:
            try:
                expressions.duration_ms(text, f"`{key}`")
            except DeclarationError as error:
                raise WrongValueError(place, str(error)) from error


def _exactly_one(place: str, owner: Any, keys: tuple[str, ...]) -> None:
    given = [key for key in keys if getattr(owner, key)]
    if len(given) != 1:
        raise WrongValueError(place, f"exactly one of {words(keys)} must be given. Received: {words(given)}")


def _repeated(values: Iterable[Any]) -> list[Any]:
    """The values that are there more than once."""
    return [value for value, number in collections.Counter(values).items() if number > 1]


def _increasing(place: str, key: str, values: tuple[float, ...], most: int) -> None:
    if len(values) > most or any(left >= right for left, right in itertools.pairwise(values)):
        raise WrongValueError(place, f"`{key}` must be at most {most:,} increasing numbers. Received: {short(values)}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Table `[source]`: the interaction log, one row per impression (or whatever a prediction is made for).

    Args:
        path: Files, relative to the declaration: a path, a list, or a glob; a folder stands for all tables in it. Left
            out if the frame is given in Python, or if `[split] by = "files"` names the files of each part.
        format: `"csv"` (also `.csv.gz`), `"parquet"` or `"tfrecord"` (of `tf.train.Example`); by default the ending
            says.
        time: Column of the moment of each row. Needed for histories, point-in-time statistics and splits by time.
        time_unit: `"s"`, `"ms"` or `"us"` since 1970, or `"iso"` (text such as 2026-11-24T12:00:00Z; UTC without a
            zone). A column of dates or timestamps needs none.
        delimiter: CSV only: the character between two cells.
        null: CSV only: words that mean "unknown", besides the empty text.
        list_separator: CSV only: between the values of a list in one cell.
        weight_separator: CSV only: between a value and its weight in such a list (`sport:0.8|news:0.1`), for features
            with `weighted = true`.
    """

    path: Paths = ()
    format: str | None = None
    time: Column | None = None
    time_unit: str = "s"
    delimiter: str = ","
    null: tuple[str, ...] = ()
    list_separator: str = "|"
    weight_separator: str = ":"

    def __post_init__(self) -> None:
        place = "[source]"
        _read_fields(self, place)
        if len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n':
            raise WrongValueError(
                place, f"`delimiter` must be one ASCII character, no quote. Received: {short(self.delimiter)}"
            )
        if self.list_separator == self.weight_separator:
            raise WrongValueError(
                place,
                "`list_separator` and `weight_separator` must differ. Received twice: " + short(self.list_separator),
            )
        if self.time_unit != "s" and self.time is None:
            raise WrongValueError(place, f"`time_unit` needs `time`. Received: {short(self.time_unit)} and no `time`")


@dataclasses.dataclass(frozen=True)
class SideTable:
    """Table `[tables.users]` or `[tables.items]`: one row per user or item, joined to the log by its key.

    Args:
        path: As in `[source]`.
        on: Column of the key in this table; by default that of `[keys]`.
    """

    path: Paths = ()
    on: Column | None = None

    def __post_init__(self) -> None:
        _read_fields(self, "[tables]")


@dataclasses.dataclass(frozen=True)
class Keys:
    """Table `[keys]`: the columns that say which rows belong together.

    Args:
        user: Column of the user; without it every row is a user of its own (no histories, no GAUC).
        item: Column of the item; without it items have no ids (no catalogue, no recommendations, no negatives).
        item_name: Column with a name to show for each item; the id by default.
    """

    user: Column | None = None
    item: Column | None = None
    item_name: Column | None = None

    def __post_init__(self) -> None:
        _read_fields(self, "[keys]")
        if self.item_name and not self.item:
            raise WrongValueError(
                "[keys]", f"`item_name` needs `item`. Received: {short(self.item_name)} and no `item`"
            )
        if self.user and self.user == self.item:
            raise WrongValueError(
                "[keys]", f"`user` and `item` must be two columns. Received twice: {short(self.user)}"
            )


@dataclasses.dataclass(frozen=True)
class History:
    """`history = {...}` of a user feature: something about the user's earlier rows, strictly before each row's moment.

    Exactly one of the first six is given. Rows that `[negatives]` draws are in no history.

    Args:
        last: Column (of the log or of the items); the values in the user's last `length` earlier rows, the most recent
            first: a list. Of a list column, `length` values of them.
        counts: Column; its distinct values in all earlier rows (of a list column: in the lists), weighted by their
            number: a list. Of more than `length`, those with the highest numbers.
        count: True: the number of earlier rows.
        mean: Column; its mean over earlier rows in which it is known; unknown without one.
        share: Condition; the share of earlier rows in which it holds; unknown without a row.
        since: True: seconds since the last earlier row; unknown without one.
        weights: With `last`: column of the weights of the values; 1 each by default.
        where: Condition on earlier rows, a SQL expression such as `"clicked"` or `"price >= 4"`.
        within: Only rows of at most this age, such as `"30d"` (units s, m, h, d, w).
    """

    last: Column | None = None
    counts: Column | None = None
    count: bool = False
    mean: Column | None = None
    share: Condition | None = None
    since: bool = False
    weights: Column | None = None
    where: Condition | None = None
    within: Duration | None = None

    def __post_init__(self) -> None:
        place = "history"
        if isinstance(self.count, str):
            raise WrongValueError(
                place,
                f"`count` must be true; what is counted is the condition `where`. Received: {short(self.count)}. "
                f"Write: history = {{ count = true, where = {short(self.count)} }}",
            )
        _read_fields(self, place)
        _exactly_one(place, self, ("last", "counts", "count", "mean", "share", "since"))
        if self.weights and not self.last:
            raise WrongValueError(
                place, f"`weights` are those of `last`. Received: {short(self.weights)} and no `last`"
            )
        _check_sql(place, self, "share", "where")
        _check_durations(place, self, "within")

    @property
    def is_list(self) -> bool:
        """Whether it is a list of values, and not a number."""
        return bool(self.last or self.counts)


@dataclasses.dataclass(frozen=True)
class Statistic:
    """`statistic = {...}` of an item feature: a number about the rows of the item.

    Exactly one of the first three is given. Neither sampled negatives nor, with `until = "training"`, rows of the
    validation or test part count.

    Args:
        count: True: the number of rows; unknown without one.
        mean: Column; its mean over rows in which it is known; unknown without one.
        share: Condition; the share of rows in which it holds; unknown without a row.
        where: Condition on the rows that count.
        until: `"training"`: all rows of the training part, one value per item, the same for all rows of the log;
            `"row"`: the rows strictly before the moment of each row, of whatever part (point in time).
        every: With `until = "row"`: values change only so often, such as `"7d"`, counted from the first row of the log:
            a row sees what was known at the last change. Fewer item states; by default every moment counts.
        half_life: Age at which a row counts half, such as `"30d"`; by default all count fully.
    """

    count: bool = False
    mean: Column | None = None
    share: Condition | None = None
    where: Condition | None = None
    until: str = "training"
    every: Duration | None = None
    half_life: Duration | None = None

    def __post_init__(self) -> None:
        place = "statistic"
        _read_fields(self, place)
        _exactly_one(place, self, ("count", "mean", "share"))
        if self.every is not None and self.until != "row":
            raise WrongValueError(
                place, f'`every` needs `until = "row"`. Received: {short(self.every)} and until = {short(self.until)}'
            )
        _check_sql(place, self, "share", "where")
        _check_durations(place, self, "every", "half_life")

    @property
    def needs_time(self) -> bool:
        """Whether it cannot be made without the moments of the rows."""
        return self.until == "row" or self.half_life is not None


# Keys of a feature that only some encodings read; None is the encoding of a feature with `embedding`.
_LIST_KEYS = ("length", "keep", "weights", "weighted")
_ENCODING_KEYS: dict[str | None, tuple[str, ...]] = {
    None: ("embedding", *_LIST_KEYS),
    "vocabulary": ("type", "min_count", "max_size", "values", "out_of_vocabulary_bins", *_LIST_KEYS),
    "hash": ("type", "bins", *_LIST_KEYS),
    "buckets": ("bins", "boundaries"),
    "integer": ("bins", *_LIST_KEYS),
    "number": ("scaling", "bins", "boundaries"),
    "vector": ("width",),
}
_SOME_ENCODINGS = tuple(dict.fromkeys(key for keys in _ENCODING_KEYS.values() for key in keys if key != "embedding"))


@dataclasses.dataclass(frozen=True)
class FeatureDeclaration:
    """Table `[features.<name>]`; their order is the order of the fields in the model.

    Args:
        name: Name of the model input.
        tower: `"user"` or `"item"`.
        encode: `"vocabulary"`: one index per value that the training part has; `"hash"`: FarmHash64 of the value as
            text, modulo `bins`; `"buckets"`: one index per interval of a number; `"integer"`: already an index, 0 to
            `bins - 1`, anything else unknown; `"number"`: a dense encoding of a number; `"vector"`: a list of `width`
            numbers as it is. A feature with `embedding` has the encoding of the feature that it names.
        column: Column of the log or of a side table; the feature's name by default. None where there is a history or a
            statistic.
        type: `"string"` or `"integer"`: how values are looked up. By default as the column is stored; of CSV, whole
            numbers where all values are.
        context: User features only: known at the moment of a request, not of a user as such (the hour, the slot). It is
            `profile_value` where profiles of users are made in bulk.
        profile_value: See `context`; unknown by default.
        embedding: Name of the feature whose vocabulary and embedding table serve this one.
        length: Slots of a list; 1 of a single value.
        keep: Which values of a longer list are kept: `"first"`, `"last"` or `"heaviest"`.
        weights: Column of the weights of a list, of its lengths; 1 each by default.
        weighted: CSV only: the cells hold the weights (`weight_separator`).
        summary: Lists with weights: whether the model also reads their mean weight and length, as `<name>_summary`.
            (The embedding of the list is a weighted mean, from which the level of the weights cancels.)
        min_count: Vocabulary: values in fewer rows of the training part are unknown.
        max_size: Vocabulary: only the most frequent values; 0 for all.
        values: Vocabulary: this fixed list instead.
        out_of_vocabulary_bins: Vocabulary: values outside it are hashed into so many more indices; 0: they are unknown.
        bins: Hash and integer: number of indices. Buckets: most buckets, bounded by quantiles of the training part (20
            by default). Number with `scaling = "piecewise"`: most bins, 20 by default.
        boundaries: Buckets and piecewise numbers: these bounds instead of quantiles.
        scaling: Number: `"standard"` (less the mean, over the standard deviation of the training part) or `"piecewise"`
            (piecewise-linear encoding, Gorishniy et al., NeurIPS 2022, section 3.2.1).
        width: Vector: its entries.
        missing: Values that mean "unknown", besides null, NaN and the empty text.
        unknown_rate: Share of the rows in which training replaces this feature by "unknown", so that "unknown" is
            trained. Single values, numbers and vectors only.
        unknown_group: Features of one group, all of one tower and one rate, are replaced together.
        history: See `History`; user features only.
        statistic: See `Statistic`; item features only.
    """

    name: str
    tower: str
    encode: str | None = None
    column: Column | None = None
    type: str | None = None
    context: bool = False
    profile_value: Any = None
    embedding: str | None = None
    length: int = 1
    keep: str = "first"
    weights: Column | None = None
    weighted: bool = False
    summary: bool = True
    min_count: int = 1
    max_size: int = 0
    values: tuple[Any, ...] = ()
    out_of_vocabulary_bins: int = 0
    bins: int = 0
    boundaries: tuple[float, ...] = ()
    scaling: str = "standard"
    width: int = 0
    missing: tuple[Any, ...] = ()
    unknown_rate: float = 0.0
    unknown_group: str | None = None
    history: History | None = None
    statistic: Statistic | None = None

    def __post_init__(self) -> None:
        place = f"[features.{short(self.name)[1:-1]}]" if isinstance(self.name, str) else "[features]"
        _read_fields(self, place)
        for key, cls in (("history", History), ("statistic", Statistic)):
            value = getattr(self, key)
            if value is not None and not isinstance(value, cls):
                object.__setattr__(self, key, _build(cls, value, f"{place} {key}"))
        self._check_encoding(place)
        self._check_list(place)
        self._check_unknown(place)
        self._check_source(place)
        if self.profile_value is not None:
            object.__setattr__(self, "profile_value", self._read_profile_value(place))
        if self.most_bins_default:
            object.__setattr__(self, "bins", DEFAULT_BINS)
        if self.history is not None and self.history.counts:
            object.__setattr__(self, "keep", "heaviest")

    def _given(self, key: str) -> bool:
        return getattr(self, key) != next(f.default for f in dataclasses.fields(self) if f.name == key)

    def _check_encoding(self, place: str) -> None:
        if (self.encode is None) == (self.embedding is None):
            received = "both" if self.encode else "neither"
            raise WrongValueError(
                place,
                f"either `encode` ({words(ENCODINGS)}) or `embedding` (the name of another feature) must be given. "
                f"Received: {received}",
            )
        keys = _ENCODING_KEYS[self.encode]
        for key in _SOME_ENCODINGS:
            if key not in keys and self._given(key):
                why = f'encode = "{self.encode}"' if self.encode else f"embedding = {short(self.embedding)}"
                raise WrongValueError(
                    place,
                    f"`{key}` has no effect with {why}; that reads {words(keys)}. "
                    f"Received: {short(getattr(self, key))}",
                )
        if self.encode in ("hash", "integer") and self.bins < 1:
            raise WrongValueError(
                place,
                f'`bins`, the number of indices, must be given with encode = "{self.encode}", from 1 to '
                f"{MOST_INDICES:,}. Received: {self.bins if self._given('bins') else 'no `bins`'}",
            )
        if self.encode == "vector" and self.width < 1:
            raise WrongValueError(
                place,
                f'`width`, the entries of the list, must be given with encode = "vector", from 1 to {MOST_WIDTH:,}. '
                "Received: no `width`",
            )
        if self.encode in ("buckets", "number"):
            if self.bins and self.boundaries:
                raise WrongValueError(place, "either `bins` or `boundaries` may be given. Received: both")
            if self.bins == 1 or self.bins > MOST_BINS:
                raise WrongValueError(place, f"`bins` must be from 2 to {MOST_BINS:,}. Received: {self.bins}")
            _increasing(place, "boundaries", self.boundaries, MOST_BINS - 1)
            if self.encode == "number" and self.scaling == "standard" and (self.bins or self.boundaries):
                key = "bins" if self.bins else "boundaries"
                raise WrongValueError(
                    place,
                    f'`{key}` needs scaling = "piecewise". Received: {short(getattr(self, key))} and '
                    'scaling = "standard"',
                )
            if self.scaling == "piecewise" and len(self.boundaries) == 1:
                raise WrongValueError(
                    place,
                    f"`boundaries` of a piecewise number must be at least 2. Received: {short(self.boundaries)}",
                )
        if self.values:
            if self.min_count > 1 or self.max_size:
                raise WrongValueError(
                    place, "`values` is the whole vocabulary. Received: also `min_count` or `max_size`"
                )
            kinds = {type(value) for value in self.values}
            legal: dict[str, list[set[type]]] = {"string": [{str}], "integer": [{int}]}
            if kinds not in legal.get(self.type or "", [{str}, {int}]) or "" in self.values:
                what = {"string": "texts", "integer": "whole numbers"}.get(
                    self.type or "", "either texts or whole numbers"
                )
                raise WrongValueError(place, f"`values` must be {what}, none empty. Received: {short(self.values)}")
            if repeated := _repeated(self.values):
                raise WrongValueError(place, f"`values` must differ. Received twice: {words(repeated)}")

    def _check_list(self, place: str) -> None:
        listed = self.history is not None and self.history.is_list
        if self.length > 1 and (self.statistic or (self.history and not listed)):
            raise WrongValueError(place, f"`length` must be 1 of a number. Received: {self.length}")
        if listed and self.length < 2:
            raise WrongValueError(
                place,
                f"`length`, the slots of the list, must be from 2 to {MOST_LENGTH:,} with history."
                f"{'last' if self.history and self.history.last else 'counts'}. Received: {self.length}",
            )
        if listed and self.encode in ("buckets", "number", "vector"):
            raise WrongValueError(
                place,
                f"a history of values needs `embedding`, or `encode` one of vocabulary, hash, integer. "
                f"Received: {short(self.encode)}",
            )
        for key in ("keep", "weights", "weighted"):
            if not self._given(key):
                continue
            if self.history and not (key == "keep" and self.history.counts and self.keep == "heaviest"):
                hint = " Use history.weights." if key == "weights" else ""
                raise WrongValueError(
                    place,
                    f"`{key}` is for list columns, not for a history.{hint} Received: {short(getattr(self, key))}",
                )
            if self.length == 1:
                raise WrongValueError(
                    place,
                    f"`{key}` is for lists: `length`, the number of slots, must be at least 2. "
                    f"Received: {short(getattr(self, key))} and length = 1",
                )
        if not self.summary and not self.has_weights:
            raise WrongValueError(
                place,
                "`summary` is for lists with weights (`weights`, `weighted`, history.weights or history.counts). "
                "Received: false",
            )
        if self.weights and self.weighted:
            raise WrongValueError(
                place, "either `weights` (a column) or `weighted` (in the cells) may be given. Received: both"
            )

    def _check_unknown(self, place: str) -> None:
        if self.unknown_rate and self.length > 1:
            raise WrongValueError(
                place,
                f"`unknown_rate` is for single values, numbers and vectors. "
                f"Received: {self.unknown_rate} and length = {self.length}",
            )
        if self.unknown_group is not None and not self.unknown_rate:
            raise WrongValueError(
                place,
                f"`unknown_group` needs an `unknown_rate` above 0. Received: {short(self.unknown_group)} and no rate",
            )
        if self.missing and (self.history or self.statistic or self.encode == "vector"):
            what = "a vector" if self.encode == "vector" else "what is computed from other rows; use its `where`"
            raise WrongValueError(place, f"`missing` is not for {what}. Received: {short(self.missing)}")

    def _check_source(self, place: str) -> None:
        if self.history and self.statistic:
            raise WrongValueError(place, "either `history` or `statistic` may be given. Received: both")
        for key, tower in (("history", "user"), ("statistic", "item"), ("context", "user")):
            if getattr(self, key) and self.tower != tower:
                raise WrongValueError(
                    place, f'`{key}` is for features with tower = "{tower}". Received: {short(self.tower)}'
                )
        computed = "history" if self.history else "statistic" if self.statistic else None
        if computed:
            if self.column is not None:
                raise WrongValueError(
                    place, f"either `column` or `{computed}` may be given. Received: {short(self.column)}"
                )
            if self.context:
                raise WrongValueError(place, f"`context` is for columns, not for a {computed}. Received: true")
            source = getattr(self, computed)
            allowed = ("buckets", "number", "integer") if source.count else ("buckets", "number")
            if not (self.history and self.history.is_list) and self.encode not in allowed:
                raise WrongValueError(
                    place,
                    f"`encode` must be one of {words(allowed)} for this {computed}, which is a number. "
                    f"Received: {short(self.encode) if self.encode else 'embedding'}",
                )
        if self.profile_value is not None and not self.context:
            raise WrongValueError(
                place,
                f"`profile_value` needs `context = true`. Received: {short(self.profile_value)} and no `context`",
            )

    def _read_profile_value(self, place: str) -> Any:
        is_list = self.length > 1 or self.width > 0
        value = self.profile_value
        if is_list:
            value = read.listed(value, read.number if self.width else read.scalar, alone=not self.width)
            expected = f"a list of {self.width or f'at most {self.length}'} values"
            fits = value is not None and (len(value) == self.width if self.width else len(value) <= self.length)
        else:
            numeric = self.encode in ("buckets", "number")
            value = read.number(value) if numeric else value if isinstance(value, bool) else read.scalar(value)
            expected, fits = "a finite number" if numeric else "a text or a number", value is not None
        if not fits:
            raise WrongValueError(place, f"`profile_value` must be {expected}. Received: {short(self.profile_value)}")
        return value

    @property
    def most_bins_default(self) -> bool:
        """Whether quantiles bound this feature and nobody said how many."""
        quantiles = self.encode == "buckets" or (self.encode == "number" and self.scaling == "piecewise")
        return quantiles and not self.boundaries and self.bins in (0, DEFAULT_BINS)

    @property
    def source_column(self) -> str | None:
        """The column that this feature reads; None of a history or a statistic."""
        return None if self.history or self.statistic else self.column or self.name

    @property
    def is_list(self) -> bool:
        """Whether it is multi-valued: a list of values with weights."""
        return self.length > 1

    @property
    def has_weights(self) -> bool:
        """Whether the values of the list have weights of their own; else each has weight 1."""
        history = self.history
        return self.weighted or self.weights is not None or bool(history and (history.counts or history.weights))

    @property
    def owns_vocabulary(self) -> bool:
        """Whether it has an embedding table that another feature may share by `embedding`."""
        return self.encode in ("vocabulary", "hash", "integer")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model inputs that carry this feature."""
        names = (self.name, self.name + WEIGHTS_SUFFIX) if self.is_list else (self.name,)
        return (*names, self.name + SUMMARY_SUFFIX) if self.has_weights and self.summary else names


@dataclasses.dataclass(frozen=True)
class TaskDeclaration:
    """Table `[tasks.<name>]`, in this order.

    Args:
        name: Name of the model output.
        label: Column (0, 1 or boolean; a number of a regression, a whole one of a count, one of `classes`), or a SQL
            condition such as `"price >= 4"`. A row in which it is null does not count for this task.
        kind: `"binary"` (label 0 or 1), `"regression"`, `"count"` (0, 1, 2, ...; a Poisson rate is learned) or
            `"multiclass"` (one of `classes`; a probability of each is learned).
        classes: Multi-class only: the legal labels, two or more texts or numbers.
        given: Name of the binary task whose event comes first, as a click before a purchase.
        objective: How a task with `given` is learned: over all rows as p(event) · p(task given the event) (`"joint"`),
            on the rows with that event only (`"conditional"`), or over all rows as one probability (`"marginal"`).
        where: Condition on the rows that count for this task.
        weight: Column of the weight of each row in this task.
        transform: Regression only: `"log1p"` if the model learns log(1 + label); serving and reports undo it.
        domain: Regression only: the lowest and the highest legal label; any by default.
        default: Whether a model learns this task unless told otherwise.
    """

    name: str
    label: Condition = ""
    kind: str = "binary"
    classes: tuple[Any, ...] | None = None
    given: str | None = None
    objective: str = "joint"
    where: Condition | None = None
    weight: Column | None = None
    transform: str | None = None
    domain: tuple[float, float] | None = None
    default: bool = True

    def __post_init__(self) -> None:
        place = f"[tasks.{short(self.name)[1:-1]}]" if isinstance(self.name, str) else "[tasks]"
        _read_fields(self, place)
        if not self.label:
            raise WrongValueError(place, "`label` must be given: a column or a SQL condition. Received: no `label`")
        _check_sql(place, self, "label", "where")
        for key, kind in {"given": "binary", "transform": "regression", "domain": "regression"}.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise WrongValueError(
                    place,
                    f"`{key}` is for {kind} tasks. Received: {short(getattr(self, key))} and kind = {short(self.kind)}",
                )
        self._check_classes(place)
        if self.objective != "joint" and self.given is None:
            raise WrongValueError(place, f"`objective` needs `given`. Received: {short(self.objective)} and no `given`")
        if self.domain is not None:
            if len(self.domain) != 2 or not self.domain[0] < self.domain[1]:
                raise WrongValueError(
                    place,
                    f"`domain` must be the lowest and the highest legal label. Received: {short(list(self.domain))}",
                )
            if self.transform == "log1p" and self.domain[0] <= -1:
                raise WrongValueError(
                    place,
                    f'`domain` must lie above -1 with transform = "log1p". Received: {short(list(self.domain))}',
                )

    def _check_classes(self, place: str) -> None:
        classes = self.classes
        if (self.kind == "multiclass") != (classes is not None):
            raise WrongValueError(
                place,
                f'`classes` goes with kind = "multiclass". Received: kind = {short(self.kind)} and '
                f"{'no `classes`' if classes is None else short(list(classes))}",
            )
        if classes is None:
            return
        of_one_type = all(isinstance(value, str) for value in classes) or not any(
            isinstance(value, (str, bool)) for value in classes
        )
        if not 2 <= len(classes) <= MOST_CLASSES or len(set(self.class_names)) < len(classes) or not of_one_type:
            raise WrongValueError(
                place,
                f"`classes` must be 2 to {MOST_CLASSES:,} different texts, or as many numbers. "
                f"Received: {short(list(classes))}",
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of a multi-class task, in the order of their indices."""
        return tuple(value if isinstance(value, str) else f"{value:.15g}" for value in self.classes or ())


@dataclasses.dataclass(frozen=True)
class Negatives:
    """Table `[negatives]`: items that were not shown, added to each row of the log with all binary labels 0.

    Never an item that the user has had by that moment.

    Args:
        kind: `"none"`, `"uniform"` or `"popularity"` (in proportion to the item's rows up to that moment).
        per_positive: How many per row of the log.
        future: Whether a draw may know later moments: it then avoids all items that the user ever has, and draws from
            all items of the log (and in proportion to all of its rows). By default it knows nothing later than its row.
        seed: Seed of the draws.
    """

    kind: str = "none"
    per_positive: int = 1
    future: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _read_fields(self, "[negatives]")


@dataclasses.dataclass(frozen=True)
class Split:
    """Table `[split]`: which part each row of the log belongs to.

    Args:
        by: `"share_of_time"`: by time, in these shares of the rows, all rows of one moment on one side; `"time"`: from
            the moments `validation` and `test` on; `"per_user"`: as share_of_time within each user; `"hash"`: by a hash
            of `column` (the user by default), all rows of one value on one side; `"random"`: row by row; `"column"`: by
            the values of `column`; `"files"`: by file.
        train: Share of the training part (share_of_time, per_user, hash, random), by default what the others leave;
            values (column); files (files).
        validation: The same of the validation part; with `"time"` its first moment: a date or time (UTC without a
            zone), or a whole number in the unit of the time column.
        test: The same of the test part. Without any, shares are 0.7, 0.1 and 0.2.
        column: See `by`.
        seed: Of hash and random.
    """

    by: str = "random"
    train: Any = None
    validation: Any = None
    test: Any = None
    column: Column | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        place = "[split]"
        _read_fields(self, place)
        if self.column is not None and self.by not in ("hash", "column"):
            raise WrongValueError(
                place,
                f"`column` is read with by = hash or by = column. Received: {short(self.column)} and by = "
                f"{short(self.by)}",
            )
        if self.seed and self.by not in ("hash", "random"):
            raise WrongValueError(
                place, f"`seed` is read with by = hash or by = random. Received: {self.seed} and by = {short(self.by)}"
            )
        if self.by in SHARE_SPLITS:
            self._read_shares(place)
        elif self.by == "time":
            self._read_moments(place)
        else:
            self._read_lists(place)

    def _read_shares(self, place: str) -> None:
        if self.train is None and self.validation is None and self.test is None:
            train, validation, test = SHARES
        else:
            test, validation = self._share(place, "test", self.test), self._share(place, "validation", self.validation)
            rest = round(1 - validation - test, 12)
            train = self._share(place, "train", rest if self.train is None else self.train)
        shares = (train, validation, test)
        if abs(sum(shares) - 1) > 1e-6:
            raise WrongValueError(
                place, f"shares must sum to 1. Received: {' + '.join(map(str, shares))} = {sum(shares):g}"
            )
        for part, share in zip(PARTS, shares, strict=True):
            object.__setattr__(self, part, share)

    def _share(self, place: str, part: str, value: Any) -> float:
        share = read.number(value)
        if share is None or not 0 < share < 1:
            raise WrongValueError(
                place, f'`{part}` must be a share between 0 and 1 with by = "{self.by}". Received: {short(value)}'
            )
        return share

    def _read_moments(self, place: str) -> None:
        if self.train is not None:
            raise WrongValueError(
                place, f'`train` is all before `validation` with by = "time". Received: {short(self.train)}'
            )
        for part in ("validation", "test"):
            moment = read.moment(getattr(self, part))
            if moment is None:
                raise WrongValueError(
                    place,
                    f'`{part}` must be the first moment of that part with by = "time", such as 2026-11-20 or '
                    f"2026-11-20T12:00:00Z. Received: {short(getattr(self, part))}",
                )
            object.__setattr__(self, part, moment)
        if type(self.validation) is not type(self.test) or not self.validation < self.test:
            raise WrongValueError(
                place,
                "`validation` must be a moment before `test`, written alike. "
                f"Received: {_shown_moment(self.validation)} and {_shown_moment(self.test)}",
            )

    def _read_lists(self, place: str) -> None:
        files = self.by == "files"
        if self.by == "column" and self.column is None:
            raise WrongValueError(place, '`column` must be given with by = "column". Received: no `column`')
        seen: dict[Any, str] = {}
        for part in PARTS:
            entries = read.listed(getattr(self, part), read.path if files else read.scalar_or_flag, alone=True)
            if not entries:
                what = "a path or a list of paths" if files else f"a value or a list of values of {short(self.column)}"
                raise WrongValueError(
                    place, f'`{part}` must be {what} with by = "{self.by}". Received: {short(getattr(self, part))}'
                )
            for entry in entries:
                # True is no 1 here.
                if first := seen.get((type(entry), entry)):
                    raise WrongValueError(
                        place, f"a file or value has one part. Received in `{first}` and `{part}`: {short(entry)}"
                    )
                seen[type(entry), entry] = part
            object.__setattr__(self, part, entries)

    @property
    def needs_time(self) -> bool:
        """Whether the moments of the rows say their part."""
        return self.by in ("share_of_time", "time", "per_user")


def _shown_moment(value: datetime.datetime | int) -> str:
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime.datetime) else str(value)


_GROUP_KINDS = ("bounds", "step", "quantiles", "values", "top")


@dataclasses.dataclass(frozen=True)
class Group:
    """Table `[groups.<name>]`: how evaluation and analysis break results down; at most one of the last five is given.

    Args:
        name: What the groups are called.
        feature: The feature whose raw values are grouped.
        title: Name and unit as an axis states them; the name by default.
        bounds: Bands of a number, `[bound, next)`.
        step: Bands of a number of this width, such as 10 for decades.
        quantiles: So many bands of a number with (nearly) as many users or items each.
        values: These values; all others are one group.
        top: The most frequent values (20 by default); all others are one group.
    """

    name: str
    feature: str = ""
    title: str | None = None
    bounds: tuple[float, ...] = ()
    step: float = 0.0
    quantiles: int = 0
    values: tuple[Any, ...] = ()
    top: int = 0

    def __post_init__(self) -> None:
        place = f"[groups.{short(self.name)[1:-1]}]" if isinstance(self.name, str) else "[groups]"
        _read_fields(self, place)
        if not self.feature:
            raise WrongValueError(place, "`feature` must be given: the name of a feature. Received: no `feature`")
        given = [key for key in _GROUP_KINDS if getattr(self, key)]
        if len(given) > 1:
            raise WrongValueError(place, f"at most one of {words(_GROUP_KINDS)} may be given. Received: {words(given)}")
        _increasing(place, "bounds", self.bounds, 1_000)
        if self.quantiles == 1:
            raise WrongValueError(place, f"`quantiles` must be a whole number from 2 to {MOST_ENTRIES:,}. Received: 1")
        if len(self.values) > MOST_ENTRIES:
            raise WrongValueError(
                place, f"`values` must be at most {MOST_ENTRIES:,} values. Received: {len(self.values):,}"
            )
        if repeated := _repeated(self.values):
            raise WrongValueError(place, f"`values` must differ. Received twice: {words(repeated)}")

    @property
    def is_numeric(self) -> bool:
        """Whether it makes bands of a number."""
        return bool(self.bounds or self.step or self.quantiles)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A whole declaration.

    Args:
        name: Short name, for folders; the name of the file by default.
        source: See `Source`.
        keys: See `Keys`.
        features: See `FeatureDeclaration`.
        tasks: See `TaskDeclaration`.
        split: See `Split`.
        negatives: See `Negatives`.
        groups: See `Group`; None for one group per feature of few values.
        users: Side table of users.
        items: Side table of items: the catalogue. Without one the items are those of the log.
        weight: Column of the weight of each row in all tasks.
        folder: What paths are relative to.
        frames: Tables that are given in Python instead of files: `{"log": frame, "users": frame, "items": frame}`.
        where: What messages call the declaration, such as the file's name.

    Raises:
        DeclarationError: If something is wrong that shows without the data; one line, which names table and key, what
            was received and what was expected.
    """

    name: str
    source: Source
    features: tuple[FeatureDeclaration, ...]
    tasks: tuple[TaskDeclaration, ...]
    keys: Keys = Keys()
    split: Split = Split()
    negatives: Negatives = Negatives()
    groups: tuple[Group, ...] | None = None
    users: SideTable | None = None
    items: SideTable | None = None
    weight: Column | None = None
    folder: Path = dataclasses.field(default=Path("."), compare=False)
    frames: Mapping[str, pl.DataFrame] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    where: str = dataclasses.field(default="declaration", repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("features", "tasks", "groups"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, tuple(getattr(self, key)))
        object.__setattr__(self, "folder", Path(self.folder))
        _read_fields(self, "top level")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) or len(self.name) > MOST_NAME:
            raise WrongValueError(
                "top level",
                f"`name` must be a letter or digit and then letters, digits, dots, - or _, at most {MOST_NAME}. "
                f"Received: {short(self.name)}",
            )
        self._check_names()
        self._check_tasks()
        self._check_tables()
        self._check_split()
        self._check_negatives()
        owners = [feature.name for feature in self.features if feature.owns_vocabulary]
        for feature in self.features:
            self._check_feature(feature, owners)
            self._check_separators(feature)
        self._check_unknown_groups()
        self._check_groups()

    def _check_names(self) -> None:
        for key, entries in (("features", self.features), ("tasks", self.tasks), ("groups", self.groups or ())):
            if len(entries) > MOST_ENTRIES:
                raise WrongValueError(
                    f"[{key}]", f"expected at most {MOST_ENTRIES:,} tables. Received: {len(entries):,}"
                )
        if not any(feature.tower == "user" for feature in self.features):
            raise WrongValueError("[features]", 'expected at least one feature with tower = "user". Received: none')
        if not any(task.default for task in self.tasks):
            received = "default = false in all" if self.tasks else "none"
            raise WrongValueError(
                "[tasks]", f"expected at least one task that is learned by default. Received: {received}"
            )
        owners: dict[str, str] = dict.fromkeys(_RESERVED, "the model itself")
        for place, names in (
            *((f"[features.{feature.name}]", feature.inputs) for feature in self.features),
            *((f"[tasks.{task.name}]", (task.name,)) for task in self.tasks),
        ):
            for name in names:
                if name in owners:
                    weights = ""
                    if name.endswith((WEIGHTS_SUFFIX, SUMMARY_SUFFIX)):
                        weights = (
                            " (the weights of a list are an input, too, and its summary, unless it has "
                            "`summary = false`)"
                        )
                    raise WrongValueError(
                        place,
                        f"features and tasks need different names{weights}. Received twice: {name!r}, "
                        f"also of {owners[name]}",
                    )
                owners[name] = place
        self._check_inputs()
        if repeated := _repeated(group.name for group in self.groups or ()):
            raise WrongValueError("[groups]", f"groups need different names. Received twice: {words(repeated)}")

    def _check_inputs(self) -> None:
        """That an export can name its inputs after the features."""
        spelled: dict[str, str] = {}
        for feature in self.features:
            place = f"[features.{feature.name}]"
            other = f'choose another name for the table and add column = "{feature.name}"'
            for name in feature.inputs:
                if name in RESERVED_INPUTS:
                    taken = "a word of Python" if keyword.iskeyword(name) else "an input of exported models"
                    raise WrongValueError(place, f"this name is {taken}; {other}. Received: {name!r}")
                if name.lower() in spelled:
                    raise WrongValueError(
                        place,
                        "names of features must differ in more than capital letters, which TensorFlow does not tell "
                        f"apart in an export; {other}. Received: {name!r} and {spelled[name.lower()]!r}",
                    )
                spelled[name.lower()] = name
        names = {feature.name for feature in self.features}
        for name in sorted(names):
            for suffix in (WEIGHTS_SUFFIX, SUMMARY_SUFFIX):
                if name.removesuffix(suffix) in names - {name}:
                    raise WrongValueError(
                        f"[features.{name}]",
                        f"this name is kept for what belongs to the feature {name.removesuffix(suffix)!r}; choose "
                        f'another one for the table and add column = "{name}". Received: {name!r}',
                    )

    def _check_tasks(self) -> None:
        earlier: list[str] = []
        for task in self.tasks:
            if f"{task.name}_".startswith("val_"):
                raise WrongValueError(
                    f"[tasks.{task.name}]",
                    "logs put val_ before what is measured on the validation part; choose another name for the task. "
                    f"Received: {task.name!r}",
                )
            if task.given is not None and task.given not in earlier:
                raise WrongValueError(
                    f"[tasks.{task.name}]",
                    f"`given` must name a binary task before it: {words(earlier)}. Received: {short(task.given)}."
                    f"{nearest_word(task.given, earlier)}",
                )
            if task.kind == "binary":
                earlier.append(task.name)

    def _check_tables(self) -> None:
        for key, table, owner in (("user", self.users, "users"), ("item", self.items, "items")):
            if table is not None and getattr(self.keys, key) is None:
                raise WrongValueError(
                    f"[tables.{owner}]", f"needs `{key}` in [keys], to be joined by. Received: no {key} key"
                )
        paths: list[tuple[str, str]] = [("[source]", path) for path in self.source.path]
        if self.split.by == "files":
            if self.source.path:
                raise WrongValueError(
                    "[source]",
                    '`path` must be left out with [split] by = "files", which names the files. '
                    f"Received: {short(self.source.path)}",
                )
            paths = [("[split]", path) for part in PARTS for path in getattr(self.split, part)]
        if self.source.format is None:
            formats = {}
            for place, path in paths:
                if _has_ending(path):
                    formats[self._format_by_ending(place, path)] = path
            if len(formats) > 1:
                raise WrongValueError("[source]", f"files must be of one format. Received: {words(formats.values())}")
        for table, owner in ((self.users, "users"), (self.items, "items")):
            for path in table.path if table is not None else ():
                if _has_ending(path):
                    self._format_by_ending(f"[tables.{owner}]", path)

    def _format_by_ending(self, place: str, path: str) -> str:
        found = [ENDINGS[ending] for ending in ENDINGS if path.lower().endswith(ending)]
        if not found and self.source.format is None:
            raise WrongValueError(
                place,
                f"`path` must end in {words(ENDINGS)}, or `format` in [source] must say what it is. "
                f"Received: {short(path)}",
            )
        return found[0] if found else str(self.source.format)

    def format_of(self, path: str, table: str = "log") -> str:
        """Format of a file: `"csv"`, `"parquet"` or `"tfrecord"`.

        Args:
            path: The file.
            table: `"log"`, whose format `[source]` may state, or `"users"` or `"items"`, where the ending comes first.
        """
        if table == "log" and self.source.format is not None:
            return self.source.format
        return self._format_by_ending("[source]" if table == "log" else f"[tables.{table}]", str(path))

    def _check_feature(self, feature: FeatureDeclaration, owners: list[str]) -> None:
        place = f"[features.{feature.name}]"
        if feature.embedding is not None and feature.embedding not in owners:
            near = nearest_word(feature.embedding, owners)
            raise WrongValueError(
                place,
                "`embedding` must name a feature that has indices (encode = vocabulary, hash or integer): "
                f"{words(owners)}. Received: {short(feature.embedding)}.{near}",
            )
        if feature.history is not None:
            if self.keys.user is None:
                raise WrongValueError(place, "`history` needs `user` in [keys]. Received: no user key")
            if self.source.time is None:
                raise WrongValueError(place, "`history` needs `time` in [source]. Received: no time column")
        if feature.statistic is not None:
            if self.keys.item is None:
                raise WrongValueError(place, "`statistic` needs `item` in [keys]. Received: no item key")
            if feature.statistic.needs_time and self.source.time is None:
                key = "half_life" if feature.statistic.half_life else "until"
                raise WrongValueError(place, f"statistic.{key} needs `time` in [source]. Received: no time column")
        side = self.users if feature.tower == "user" else self.items
        # A side table may have a column of the label's name: then the tables tell.
        if side is None and feature.tower + "s" not in self.frames:
            for key, column in (("column", feature.source_column), ("weights", feature.weights)):
                if column is not None:
                    self.check_no_label(feature, key, column)

    def _check_separators(self, feature: FeatureDeclaration) -> None:
        """Where the cells of a CSV are split into lists."""
        if feature.source_column is None or not feature.is_list:
            return
        for key in ("list_separator", *(("weight_separator",) if feature.weighted else ())):
            if getattr(self.source, key) == self.source.delimiter:
                raise WrongValueError(
                    "[source]",
                    f"`delimiter` and `{key}` must differ, for the lists of [features.{feature.name}]. "
                    f"Received twice: {short(self.source.delimiter)}",
                )

    def check_no_label(self, feature: FeatureDeclaration, key: str, column: str) -> None:
        """Raises where a column of the log that a feature reads is the label of a task.

        Args:
            feature: The feature.
            key: The key of the feature that names the column.
            column: The column.

        Raises:
            DeclarationError: If so.
        """
        for task in self.tasks:
            if expressions.columns(task.label) == (column,):
                raise WrongValueError(
                    f"[features.{feature.name}]",
                    f"`{key}` must not be the label of a task, which is not known when a prediction is made. "
                    f"Received: {short(column)}, the label of [tasks.{task.name}]",
                )

    def _check_unknown_groups(self) -> None:
        own = {feature.name: feature.unknown_group for feature in self.features}
        first: dict[str, FeatureDeclaration] = {}
        for feature in self.features:
            group = feature.unknown_group
            if group is None:
                continue
            place = f"[features.{feature.name}]"
            if own.get(group, group) != group:
                raise WrongValueError(
                    place, f"`unknown_group` must not be the name of a feature outside it. Received: {short(group)}"
                )
            other = first.setdefault(group, feature)
            if (other.tower, other.unknown_rate) != (feature.tower, feature.unknown_rate):
                raise WrongValueError(
                    place,
                    "features of one `unknown_group` need one tower and one `unknown_rate`. "
                    f"Received: {feature.tower}, {feature.unknown_rate} here and "
                    f"{other.tower}, {other.unknown_rate} in [features.{other.name}]",
                )

    def _check_groups(self) -> None:
        for group in self.groups or ():
            place = f"[groups.{group.name}]"
            names = [feature.name for feature in self.features]
            if group.feature not in names:
                raise WrongValueError(
                    place,
                    f"`feature` must name a feature: {words(names)}. Received: {short(group.feature)}."
                    f"{nearest_word(group.feature, names)}",
                )
            feature = self.feature(group.feature)
            if feature.encode == "vector":
                raise WrongValueError(place, f"a vector cannot be grouped. Received: {short(group.feature)}")
            if group.is_numeric and self.owner(feature).type == "string":
                raise WrongValueError(
                    place,
                    f'bands need a number, and [features.{feature.name}] has type = "string". '
                    f"Received: {words(key for key in _GROUP_KINDS if getattr(group, key))}",
                )

    def _check_split(self) -> None:
        split, place = self.split, "[split]"
        if split.needs_time and self.source.time is None:
            raise WrongValueError(place, f'by = "{split.by}" needs `time` in [source]. Received: no time column')
        if split.by == "files" and "log" in self.frames:
            raise WrongValueError(place, 'by = "files" needs files. Received: a table that is given in Python')
        if split.by == "per_user" and self.keys.user is None:
            raise WrongValueError(place, 'by = "per_user" needs `user` in [keys]. Received: no user key')
        if split.by == "hash" and split.column is None and self.keys.user is None:
            raise WrongValueError(place, 'by = "hash" needs `column`, or `user` in [keys]. Received: neither')
        if split.by == "time" and isinstance(split.test, int) and self.source.time_unit == "iso":
            raise WrongValueError(
                place,
                f'moments must be dates or times with time_unit = "iso". Received: {split.validation}, {split.test}',
            )

    def _check_negatives(self) -> None:
        if self.negatives.kind == "none":
            return
        place = "[negatives]"
        for key in ("user", "item"):
            if getattr(self.keys, key) is None:
                raise WrongValueError(place, f"needs `{key}` in [keys]. Received: no {key} key")
        if not self.negatives.future and self.source.time is None:
            raise WrongValueError(place, "needs `time` in [source], or `future = true`. Received: no time column")
        if all(task.kind != "binary" for task in self.tasks):
            kinds = words(sorted({task.kind for task in self.tasks}))
            raise WrongValueError(
                place, f"needs a binary task, of which it adds rows with label 0. Received: tasks of the kinds {kinds}"
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of all tasks, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def moments(self) -> tuple[int, int]:
        """First moments of the validation and of the test part, in milliseconds since 1970; of `[split] by = "time"`.

        Raises:
            ValueError: If the split goes by something else.
        """
        if self.split.by != "time":
            raise ValueError(f"Only [split] by = 'time' has moments. Received: {self.split.by!r}")
        return self._milliseconds(self.split.validation), self._milliseconds(self.split.test)

    def _milliseconds(self, moment: datetime.datetime | int) -> int:
        if isinstance(moment, datetime.datetime):
            return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(milliseconds=1)
        return {"s": moment * 1000, "ms": moment, "us": moment // 1000}[self.source.time_unit]

    def feature(self, name: str) -> FeatureDeclaration:
        """The feature of this name.

        Raises:
            DeclarationError: If there is none.
        """
        for feature in self.features:
            if feature.name == name:
                return feature
        names = [feature.name for feature in self.features]
        raise DeclarationError(
            f"{self.name} has no feature {short(name)}.{nearest_word(name, names)} Features: {words(names)}"
        )

    def task(self, name: str) -> TaskDeclaration:
        """The task of this name.

        Raises:
            DeclarationError: If there is none.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise DeclarationError(
            f"{self.name} has no task {short(name)}.{nearest_word(name, self.task_names)} "
            f"Tasks: {words(self.task_names)}"
        )

    def owner(self, feature: FeatureDeclaration | str) -> FeatureDeclaration:
        """The feature whose vocabulary and embedding table a feature uses: itself unless it has `embedding`.

        Raises:
            DeclarationError: If there is no feature of this name.
        """
        feature = self.feature(feature) if isinstance(feature, str) else feature
        return self.feature(feature.embedding) if feature.embedding else feature

    def of_tower(self, tower: str) -> tuple[FeatureDeclaration, ...]:
        """The features of the `"user"` or the `"item"` tower, in order."""
        return tuple(feature for feature in self.features if feature.tower == tower)

    @classmethod
    def from_toml(cls, path: str | Path) -> Dataset:
        """Reads a declaration.

        Args:
            path: A TOML file; paths in it are relative to its folder.

        Raises:
            DeclarationError: If it cannot be read, is no TOML, or something is wrong that shows without the data; one
                line, which names file, table and key, what was received and what was expected.
        """
        path = Path(path)
        values = read.read_toml(path)
        dataset = cls.from_dict(values, path.parent, _name_of(path), where=path.name)
        paths = READERS["Paths"][1]
        for place, table in (
            ("[source]", dataset.source),
            ("[tables.users]", dataset.users),
            ("[tables.items]", dataset.items),
        ):
            if table is not None and not table.path and not (place == "[source]" and dataset.split.by == "files"):
                raise DeclarationError(f"{path.name}, {place}: `path` must be {paths}. Received: no `path`")
        return dataset

    @classmethod
    def from_dict(
        cls,
        values: Any,
        folder: str | Path = ".",
        name: str = "data",
        *,
        frames: Mapping[str, pl.DataFrame] | None = None,
        where: str = "declaration",
    ) -> Dataset:
        """Reads a declaration from the dictionary that its TOML or JSON is; `to_dict` gives it back.

        Args:
            values: The dictionary. `[source]` may be without `path`: the rows then are in `frames`, or nowhere.
            folder: What paths are relative to.
            name: Name of the dataset unless the dictionary has one.
            frames: Tables instead of files, see `Dataset`.
            where: What messages call the declaration, such as the file's name.

        Raises:
            DeclarationError: See `from_toml`.
        """
        try:
            return _read_dataset(values, Path(folder), name, dict(frames or {}), where)
        except WrongValueError as error:
            raise DeclarationError(" ".join(f"{where}, {error.place}: {error.text}".split())) from error

    @classmethod
    def from_frame(
        cls, log: Any, declaration: Mapping[str, Any] | str | Path, users: Any = None, items: Any = None
    ) -> Dataset:
        """A dataset whose tables are in memory.

        Args:
            log: The interaction log: a Polars or pandas frame, an Arrow table, or a dictionary of equally long arrays
                (of two dimensions for lists).
            declaration: The declaration: a dictionary in the layout of the TOML, or a TOML file. What it says of paths
                of tables that are given here does not matter.
            users: Side table of users, likewise; if left out, that of the declaration.
            items: Side table of items, likewise.

        Raises:
            DeclarationError: See `from_toml`.
            DataError: If a table is none of these.
        """
        where, folder, name = "declaration", Path("."), "data"
        values: Any = declaration
        if isinstance(declaration, (str, Path)):
            path = Path(declaration)
            values, where, folder, name = read.read_toml(path), path.name, path.parent, _name_of(path)
        frames = {"log": read.frame(log, "log")}
        if isinstance(values, Mapping):
            values = dict(values)
            source = values.get("source", {})
            values["source"] = {**source, "path": []} if isinstance(source, Mapping) else source
            tables = values.get("tables", {})
            for key, table in (("users", users), ("items", items)):
                if table is not None and isinstance(tables, Mapping):
                    frames[key] = read.frame(table, key)
                    declared = tables.get(key, {})
                    tables = {**tables, key: {**declared, "path": []} if isinstance(declared, Mapping) else declared}
            if tables:
                values["tables"] = tables
        return cls.from_dict(values, folder, name, frames=frames, where=where)

    def to_dict(self) -> dict[str, Any]:
        """The declaration in the layout of the TOML, as JSON can hold it, without what is left at its default."""
        values: dict[str, Any] = {"format": FORMAT, "name": self.name}
        if self.weight is not None:
            values["weight"] = self.weight
        values["source"] = _values_of(self.source)
        tables = {key: _values_of(table) for key, table in (("users", self.users), ("items", self.items)) if table}
        for key, value in (
            ("keys", _values_of(self.keys)),
            ("tables", tables),
            ("split", _values_of(self.split)),
            ("features", {feature.name: _values_of(feature) for feature in self.features}),
            ("tasks", {task.name: _values_of(task) for task in self.tasks}),
            ("negatives", _values_of(self.negatives)),
        ):
            if value:
                values[key] = value
        if self.groups is not None:
            values["groups"] = {group.name: _values_of(group) for group in self.groups}
        return values

    def replace(self, changes: Mapping[str, Any]) -> Dataset:
        """The declaration with other values.

        Args:
            changes: By dotted key as in the TOML, such as `{"split.by": "hash", "features.age.bins": 5}`; None takes a
                key out. A new `split.by` does without the shares, moments and columns of the old one, unless both go
                by shares.

        Raises:
            DeclarationError: If a key is unknown or the result is no legal declaration.
        """
        values = self.to_dict()
        split = values.get("split", {})
        new = changes.get("split.by", self.split.by)
        if new != self.split.by:
            shares = new in SHARE_SPLITS and self.split.by in SHARE_SPLITS
            kept = {"by", *(PARTS if shares else ()), *(("seed",) if new in ("hash", "random") else ())}
            values["split"] = {key: value for key, value in split.items() if key in kept}
        elif new in SHARE_SPLITS and {"split.validation", "split.test"} & set(changes):
            # The training part is what the others leave.
            split.pop("train", None)
        for dotted, value in changes.items():
            *parents, key = dotted.split(".")
            table = values
            for parent in parents:
                table = table.setdefault(parent, {})
                if not isinstance(table, dict):
                    raise DeclarationError(f"{self.name} has no table in which {short(dotted)} could be replaced.")
            if value is None:
                table.pop(key, None)
            else:
                table[key] = value
        return self.from_dict(values, self.folder, self.name, frames=self.frames, where=self.where)


def _has_ending(path: str) -> bool:
    """Whether a path names files of one ending; a folder does not, nor does a glob such as `log/*`."""
    suffix = Path(path).suffix
    return bool(suffix) and not set(suffix) & set("*?[]")


def _values_of(owner: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, as JSON can hold them."""
    values = {}
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if field.name == "name" or value == field.default:
            continue
        if isinstance(owner, FeatureDeclaration) and (
            (field.name == "bins" and owner.most_bins_default) or (field.name == "keep" and owner.history)
        ):
            continue
        if isinstance(value, datetime.datetime):
            value = _shown_moment(value)
        elif dataclasses.is_dataclass(value):
            value = _values_of(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[field.name] = value
    return values


def _build(cls: type, values: Any, place: str, **more: Any) -> Any:
    """A dataclass from a table, with the place of the table in every message.

    Raises:
        WrongValueError: If it is no table, has an unknown key, or a value is wrong.
    """
    if not isinstance(values, Mapping):
        raise WrongValueError(place, f"must be a table. Received: {short(values)}")
    known = [field.name for field in dataclasses.fields(cls) if field.name not in more]
    for key in values:
        if key not in known:
            raise WrongValueError(
                place, f"has no key {short(key)}.{nearest_word(key, known)} Known keys: {words(known)}"
            )
    given = {key: value for key, value in values.items() if value is not None}
    if cls is FeatureDeclaration and "tower" not in given:
        raise WrongValueError(place, f"`tower` must be one of {words(TOWERS)}. Received: no `tower`")
    try:
        return cls(**given, **more)
    except WrongValueError as error:
        raise WrongValueError(error.place if error.place.startswith(place) else place, error.text) from error


_TOP_LEVEL = (
    "format",
    "name",
    "weight",
    "source",
    "keys",
    "tables",
    "split",
    "features",
    "tasks",
    "negatives",
    "groups",
)


def _read_dataset(values: Any, folder: Path, name: str, frames: dict[str, pl.DataFrame], where: str) -> Dataset:
    place = "top level"
    if not isinstance(values, Mapping):
        raise WrongValueError(place, f"must be a table. Received: {short(values)}")
    for key in values:
        if key not in _TOP_LEVEL:
            raise WrongValueError(
                place, f"has no key {short(key)}.{nearest_word(key, _TOP_LEVEL)} Known keys: {words(_TOP_LEVEL)}"
            )
    values = {key: value for key, value in values.items() if value is not None}
    if read.whole(values.get("format")) != FORMAT:
        received = short(values["format"]) if "format" in values else "no `format`"
        raise WrongValueError(place, f"`format` must be {FORMAT}, the version of this layout. Received: {received}")
    for key in ("source", "features", "tasks"):
        if key not in values:
            raise WrongValueError(f"[{key}]", f"must be given. Received: no such table, only {words(values)}")

    def named(key: str, cls: type) -> tuple:
        tables = values[key]
        if not isinstance(tables, Mapping):
            raise WrongValueError(f"[{key}]", f"must hold one table per name. Received: {short(tables)}")
        for one in tables:
            _check_name(f"[{key}]", one)
        return tuple(_build(cls, table, f"[{key}.{one}]", name=one) for one, table in tables.items())

    tables = values.get("tables", {})
    if not isinstance(tables, Mapping):
        raise WrongValueError("[tables]", f"must hold the tables users or items. Received: {short(tables)}")
    for key in tables:
        if key not in ("users", "items"):
            raise WrongValueError(
                "[tables]", f"has no table {short(key)}.{nearest_word(key, ('users', 'items'))} Known: users, items"
            )
    return Dataset(
        name=values.get("name", name),
        source=_build(Source, values["source"], "[source]"),
        features=named("features", FeatureDeclaration),
        tasks=named("tasks", TaskDeclaration),
        keys=_build(Keys, values.get("keys", {}), "[keys]"),
        split=_build(Split, values.get("split", {}), "[split]"),
        negatives=_build(Negatives, values.get("negatives", {}), "[negatives]"),
        groups=named("groups", Group) if "groups" in values else None,
        users=_build(SideTable, tables["users"], "[tables.users]") if "users" in tables else None,
        items=_build(SideTable, tables["items"], "[tables.items]") if "items" in tables else None,
        weight=values.get("weight"),
        folder=folder,
        frames=frames,
        where=where,
    )


def _name_of(path: Path) -> str:
    """A dataset's name from the name of its file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem).lstrip("._-")[:MOST_NAME] or "data"


# By annotation, and for keys whose type depends on another key.
_TEXT = {"type": "string", "minLength": 1}
_SCALAR = {"type": ["string", "number"]}
_JSON_TYPES: dict[str | tuple[str, str], dict[str, Any]] = {
    **dict.fromkeys(("str", "Column", "Condition"), _TEXT),
    "Duration": {"type": "string", "pattern": "^[0-9]{1,15} *(ms|s|m|h|d|w)$"},
    "Paths": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "tuple[str, ...]": {"type": "array", "items": {"type": "string"}},
    "tuple[float, ...]": {"type": "array", "items": {"type": "number"}},
    "tuple[float, float]": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    "tuple[Any, ...]": {"type": "array", "items": _SCALAR},
    ("FeatureDeclaration", "profile_value"): {
        "anyOf": [{"type": ["string", "number", "boolean"]}, {"type": "array", "items": _SCALAR}]
    },
    **{
        ("Split", part): {
            "anyOf": [
                {"type": ["string", "number", "boolean"]},
                {"type": "array", "items": {"type": ["string", "number", "boolean"]}},
            ]
        }
        for part in PARTS
    },
}
_REQUIRED = {"FeatureDeclaration": ["tower"], "TaskDeclaration": ["label"], "Group": ["feature"]}


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the TOML file, for editors: keys, types, legal words, and what they mean.

    Editors cannot check what depends on several keys; `Dataset.from_toml` does.
    """

    def named(cls: type) -> dict[str, Any]:
        names = {"pattern": f"^{_NAME.pattern}$", "maxLength": MOST_NAME}
        return {"type": "object", "propertyNames": names, "additionalProperties": _table_schema(cls)}

    tables = {"users": _table_schema(SideTable), "items": _table_schema(SideTable)}
    about = _descriptions(Dataset)
    properties = {
        "format": {"const": FORMAT, "description": "Version of this layout."},
        "name": {**_TEXT, "description": about.get("name", "")},
        "weight": {**_TEXT, "description": about.get("weight", "")},
        "source": _table_schema(Source),
        "keys": _table_schema(Keys),
        "tables": {"type": "object", "properties": tables, "additionalProperties": False},
        "split": _table_schema(Split),
        "features": {**named(FeatureDeclaration), "minProperties": 1},
        "tasks": {**named(TaskDeclaration), "minProperties": 1},
        "negatives": _table_schema(Negatives),
        "groups": named(Group),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mvke_tf: declaration of a dataset",
        "type": "object",
        "properties": properties,
        "required": ["format", "source", "features", "tasks"],
        "additionalProperties": False,
    }


def _table_schema(cls: type) -> dict[str, Any]:
    about = _descriptions(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        if field.name == "name":
            continue
        key, kind = (cls.__name__, field.name), str(field.type).removesuffix(" | None")
        nested = {"History": History, "Statistic": Statistic}.get(kind)
        schema = _table_schema(nested) if nested else dict(_JSON_TYPES.get(key) or _JSON_TYPES[kind])
        if key in _CHOICES:
            schema = {"enum": list(_CHOICES[key])}
        if key in _RANGES:
            schema |= dict(zip(("minimum", "maximum"), _RANGES[key], strict=True))
        if isinstance(field.default, (bool, int, float, str)) and field.default != "":
            schema["default"] = field.default
        if not nested:
            schema["description"] = about.get(field.name, "")
        properties[field.name] = schema
    schema = {
        "type": "object",
        "description": about.get("", ""),
        "properties": properties,
        "additionalProperties": False,
    }
    return schema | ({"required": _REQUIRED[cls.__name__]} if cls.__name__ in _REQUIRED else {})


def _descriptions(cls: type) -> dict[str, str]:
    """What the docstring of a class says of each argument, and under "" of the class; empty without docstrings."""
    summary, _, arguments = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
    found = {"": " ".join(summary.split())}
    for match in re.finditer(r"^    (\w+): (.*(?:\n        .*)*)", arguments.partition("\nRaises:")[0], re.MULTILINE):
        found[match[1]] = " ".join(match[2].split())
    return found
