# SPDX-License-Identifier: Apache-2.0
"""What would become of a dataset: its first rows, prepared, column by column. What `mvke check` says."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from mvke_tf.data import expressions
from mvke_tf.data.declaration import LACKS, PARTS, Dataset, FeatureDeclaration
from mvke_tf.data.encoder import EncodedFeature, known_values
from mvke_tf.data.groups import groups
from mvke_tf.data.preparation import prepare
from mvke_tf.data.split import NoTrainingRowError
from mvke_tf.data.store import EntityTable, PreparedDataset
from mvke_tf.data.tables import ITEMS, LOG, USERS, Table, Tables, names_the_declaration, read_tables, references
from mvke_tf.data.values import name_words, words
from mvke_tf.errors import DeclarationError
from mvke_tf.schema import WEIGHTS_SUFFIX, Feature

MOST_WIDTH = 120
# Shares of rows from which on something is worth a warning.
MANY_UNKNOWN = 0.5
MANY_VALUES = 0.5
MANY_LONG = 0.05
# A feature that comes with an event only: the chance of that, were they independent, and values that are tried.
UNLIKELY = 1e-6
MOST_TRIED = 20
# 1990-01-01, in milliseconds: earlier moments are most likely of another unit.
EARLIEST = 631_152_000_000


@dataclasses.dataclass(frozen=True)
class FeatureReport:
    """A feature in the rows that were looked at.

    Args:
        name: Its name.
        tower: `"user"`, `"item"`, or `"context"` of a user feature that is known at the moment of a request only.
        source: The column, and the side table that has it; or what is computed.
        type: Kind of its raw values.
        unknown: Share of the rows in which it is unknown; of a list, in which the list is empty.
        distinct: Number of distinct known values; None of a vector.
        becomes: What a model reads of it.
    """

    name: str
    tower: str
    source: str
    type: str
    unknown: float
    distinct: int | None
    becomes: str


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """A task in the rows that were looked at.

    Args:
        name: Its name.
        kind: One of `mvke_tf.schema.TASK_KINDS`.
        label: Its label, as declared.
        rows: Number of rows that count.
        mean: Share of events among them, share of the commonest class, or mean label (not transformed); NaN without a
            row.
        deviation: Standard deviation of the label (multi-class: of its index).
    """

    name: str
    kind: str
    label: str
    rows: int
    mean: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What the first rows of a dataset say about its declaration.

    Args:
        name: Name of the dataset.
        rows: Number of rows of the log that were looked at.
        is_sample: Whether there may be more rows than these.
        users: Number of users; None without a key.
        items: Number of items; None without a key.
        features: See `FeatureReport`.
        tasks: See `TaskReport`.
        parts: Number of rows of each part of the split; None where these rows do not say.
        unused: Columns of the log that nothing reads.
        warnings: What looks like a mistake, one sentence each.
    """

    name: str
    rows: int
    is_sample: bool
    users: int | None
    items: int | None
    features: tuple[FeatureReport, ...]
    tasks: tuple[TaskReport, ...]
    parts: dict[str, int] | None
    unused: tuple[str, ...]
    warnings: tuple[str, ...]

    def table(self) -> str:
        """All of it as text, at most 120 characters wide."""
        counted = [f"{self.rows:,} rows" if not self.is_sample else f"the first {self.rows:,} rows"]
        counted += [f"{number:,} {what}" for number, what in ((self.users, "users"), (self.items, "items")) if number]
        lines = [f"{self.name}: {', '.join(counted)}", ""]
        lines += _laid_out(
            ["feature", "tower", "from", "type", "unknown", "distinct", "becomes" + " (so far)" * self.is_sample],
            [
                [
                    feature.name,
                    feature.tower,
                    feature.source,
                    feature.type,
                    f"{feature.unknown:.1%}",
                    "" if feature.distinct is None else f"{feature.distinct:,}",
                    feature.becomes,
                ]
                for feature in self.features
            ],
            "llllrrl",
        )
        lines += [""]
        lines += _laid_out(
            ["task", "kind", "label", "rows", "events or mean"],
            [[task.name, task.kind, task.label, f"{task.rows:,}", _outcome(task)] for task in self.tasks],
            "lllrr",
        )
        lines += [""]
        for key, number in (("user", self.users), ("item", self.items)):
            if number is None:
                note = f"Note: [keys] names no {key}: {LACKS[key]}."
                lines += textwrap.wrap(note, MOST_WIDTH, subsequent_indent="  ")
        if self.parts is not None:
            lines += [f"Parts: {', '.join(f'{part} {rows:,}' for part, rows in self.parts.items())} rows"]
        if self.unused:
            lines += textwrap.wrap(f"Not read: {words(self.unused)}", MOST_WIDTH, subsequent_indent="  ")
        for warning in self.warnings:
            lines += textwrap.wrap(f"Warning: {warning}", MOST_WIDTH, subsequent_indent="  ")
        return "\n".join(lines)


@names_the_declaration
def check(dataset: Dataset, rows: int = 10_000) -> Report:
    """Reads and prepares the first rows of a dataset, in memory, and says what would become of them.

    Args:
        dataset: The declaration.
        rows: Number of rows of the log to look at; side tables are read whole.

    Raises:
        DataError: If the tables cannot be read or do not fit the declaration; one line, as preparing all rows would
            raise for these.
        DeclarationError: If a group cannot be made of its feature.
    """
    tables = read_tables(dataset, rows=rows)
    is_sample = tables.log.height >= rows
    with _logged_warnings() as warnings:
        prepared, has_parts = _prepare(dataset, tables, is_sample, warnings)
        groups(prepared)
    if is_sample:
        # Later rows may well be in a part that the first ones leave empty.
        warnings = [warning for warning in warnings if not warning.startswith("[split] gives the ")]
    return _Check(dataset, tables, prepared, has_parts, is_sample, warnings).report()


@contextlib.contextmanager
def _logged_warnings() -> Iterator[list[str]]:
    """The warnings that preparing logs, which are then not logged."""
    messages: list[str] = []
    logger, handler = logging.getLogger("mvke_tf.data"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _prepare(dataset: Dataset, tables: Tables, is_sample: bool, warnings: list[str]) -> tuple[PreparedDataset, bool]:
    """The rows, prepared, and whether they tell the parts of the split."""
    try:
        return prepare(dataset, tables), True
    except NoTrainingRowError as error:
        if not is_sample:
            raise
        # The first rows need not have a row of each part.
        warnings.clear()
        try:
            at_random = dataset.replace({"split.by": "random"})
        except DeclarationError:
            raise error from None
        return prepare(at_random, tables), False


class _Check:
    """One look at a prepared sample."""

    def __init__(
        self,
        dataset: Dataset,
        tables: Tables,
        prepared: PreparedDataset,
        has_parts: bool,
        is_sample: bool,
        warnings: list[str],
    ) -> None:
        self._dataset, self._tables, self._prepared = dataset, tables, prepared
        self._has_parts, self._is_sample = has_parts, is_sample
        self._shown = ~prepared.sampled
        self._rows = int(self._shown.sum())
        # What preparing itself warned of comes first.
        self._warnings = warnings

    def report(self) -> Report:
        prepared = self._prepared
        features = tuple(self._features())
        tasks = tuple(self._tasks())
        parts = self._parts()
        self._look_at_labels()
        self._look_at_time()
        return Report(
            name=self._dataset.name,
            rows=self._rows,
            is_sample=self._is_sample,
            users=len(prepared.latest_users) if prepared.has_users else None,
            items=len(prepared.catalogue) if prepared.has_items else None,
            features=features,
            tasks=tasks,
            parts=parts,
            unused=self._unused(),
            warnings=tuple(self._warnings),
        )

    def _warn(self, place: str, text: str) -> None:
        self._warnings.append(f"{place}: {text}")

    def _features(self) -> Iterator[FeatureReport]:
        encoded = {feature.name: feature for feature in self._prepared.encoder.features}
        schema = {feature.name: feature for feature in self._prepared.encoder.schema_features()}
        for declared in self._dataset.features:
            yield self._feature(declared, encoded[declared.name], schema[declared.name])

    def _feature(self, declared: FeatureDeclaration, encoded: EncodedFeature, schema: Feature) -> FeatureReport:
        table, rows = self._of_rows(declared.tower)
        raw = table.raw[declared.name]
        if encoded.raw == "vector":
            known, distinct = ~np.isnan(raw).any(axis=1), None
        elif encoded.is_list:
            filled = (table.raw[declared.name + WEIGHTS_SUFFIX] > 0) & known_values(encoded, raw)
            known, distinct = filled.any(axis=1), _distinct(raw[rows][filled[rows]])
        else:
            known = known_values(encoded, raw)
            distinct = _distinct(raw[rows][known[rows]])
        unknown = float((~known[rows]).mean())
        self._warn_of_feature(declared, encoded, table, rows, known, unknown, distinct)
        return FeatureReport(
            name=declared.name,
            tower="context" if declared.context else declared.tower,
            source=self._source(declared),
            type=f"{encoded.raw} list" if encoded.is_list else encoded.raw,
            unknown=unknown,
            distinct=distinct,
            becomes=_becomes(schema) + ", mean weight and length" * encoded.summary,
        )

    def _of_rows(self, tower: str) -> tuple[EntityTable, np.ndarray]:
        """The table of a tower, and its row for each row of the log."""
        prepared = self._prepared
        if tower == "user":
            return prepared.users, prepared.user_row[self._shown]
        return prepared.items, prepared.item_row[self._shown]

    def _warn_of_feature(
        self,
        declared: FeatureDeclaration,
        encoded: EncodedFeature,
        table: EntityTable,
        rows: np.ndarray,
        known: np.ndarray,
        unknown: float,
        distinct: int | None,
    ) -> None:
        place = f"[features.{declared.name}]"
        computed = declared.history is not None or declared.statistic is not None
        if MANY_UNKNOWN < unknown < 1.0 and not computed:
            self._warn(place, f"it is unknown in {unknown:.0%} of the rows.")
        if distinct == 1:
            self._warn(place, "it has one value only, and tells nothing apart.")
        if computed:
            return
        is_key = declared.source_column in (self._dataset.keys.user, self._dataset.keys.item)
        looks_like_id = is_key or name_words(str(declared.source_column))[-1:] == ("id",)
        if encoded.raw == "number" and looks_like_id and encoded.encode in ("buckets", "number"):
            self._warn(place, f'it looks like an id, but is encoded as a number by "{encoded.encode}".')
        many = distinct is not None and not encoded.is_list and distinct > MANY_VALUES * self._rows
        if encoded.encode == "vocabulary" and declared.embedding is None and many and not is_key and self._rows >= 100:
            self._warn(
                place, f"{distinct:,} values in {self._rows:,} rows are too many to learn; is it a number, or prose?"
            )
        self._warn_of_lost_values(place, declared, encoded, table, rows, known)
        if not is_key and declared.source_column is not None and self._column(declared)[1].name == LOG:
            self._warn_of_outcomes(place, encoded, table, rows, known)
        if encoded.is_list:
            self._warn_of_long_lists(place, declared)

    def _warn_of_outcomes(
        self, place: str, encoded: EncodedFeature, table: EntityTable, rows: np.ndarray, known: np.ndarray
    ) -> None:
        """Warns of a feature with values that come with an event only, by more than chance."""
        raw, filled = table.raw[encoded.name], known
        values: list[tuple[str, np.ndarray]] = []
        if not encoded.is_list and encoded.raw != "vector":
            distinct = np.unique(raw[known].astype(str) if raw.dtype == object else raw[known])
            if len(distinct) <= MOST_TRIED:
                values = [(f"is {value!r}", known & (raw == value)) for value in distinct.tolist()]
            if encoded.raw != "string":
                filled = known & (raw != 0)
        general = "has a value other than 0" if encoded.raw != "string" else "is known"
        for task in self._dataset.tasks:
            if task.kind != "binary":
                continue
            counts = self._prepared.weight(task.name)[self._shown] > 0
            label = self._prepared.label(task.name)[self._shown]
            for condition, mask in [(general, filled), *values]:
                inside = counts & mask[rows]
                if not inside.any() or label[inside].min() < 1:
                    continue
                if label[counts].mean() ** self._independent(inside) < UNLIKELY:
                    self._warn(
                        place,
                        f"where it {condition}, the label of [tasks.{task.name}] is always 1 ({int(inside.sum()):,} "
                        "rows): is it an outcome, known only after the moment of a prediction? Then it belongs among "
                        "the tasks, or nowhere.",
                    )
                    return

    def _independent(self, rows: np.ndarray) -> int:
        """How many rows count that are chosen by a mask: those of one user or one item are alike, and count once."""
        prepared, number = self._prepared, int(rows.sum())
        if prepared.has_users:
            number = min(number, len(np.unique(np.asarray(prepared.users.key)[prepared.user_row[self._shown][rows]])))
        if prepared.has_items:
            number = min(number, len(np.unique(np.asarray(prepared.items.key)[prepared.item_row[self._shown][rows]])))
        return number

    def _warn_of_lost_values(
        self,
        place: str,
        declared: FeatureDeclaration,
        encoded: EncodedFeature,
        table: EntityTable,
        rows: np.ndarray,
        known: np.ndarray,
    ) -> None:
        """Warns of known values that have no index."""
        if encoded.is_list or encoded.encode not in ("integer", "vocabulary"):
            return
        lost = known & (table.encoded[declared.name] == 0)
        share = float(lost[rows].mean())
        if not share:
            return
        example = table.raw[declared.name][rows[lost[rows]][:1]].tolist()[0]
        if encoded.encode == "integer":
            why = f"lie outside 0 to {encoded.bins - 1}"
        elif encoded.values:
            why = "are not among `values`"
        elif share > MANY_UNKNOWN and declared.embedding is None and not self._is_sample:
            why = "are too rare for the vocabulary"
        else:
            return
        self._warn(place, f"{share:.1%} of the values {why}, such as {example!r}, and count as unknown.")

    def _warn_of_long_lists(self, place: str, declared: FeatureDeclaration) -> None:
        column, table = self._column(declared)
        lengths = table.lists(column, "string", weighted=declared.weighted).lengths
        longer = float((lengths > declared.length).mean())
        if longer > MANY_LONG:
            self._warn(place, f"{longer:.0%} of the lists are longer than `length`; the longest has {lengths.max()}.")

    def _source(self, declared: FeatureDeclaration) -> str:
        for kind in ("history", "statistic"):
            if (computed := getattr(declared, kind)) is not None:
                name = next(
                    key for key in ("last", "counts", "count", "mean", "share", "since") if getattr(computed, key)
                )
                of = getattr(computed, name)
                return f"{kind}: {name}" + ("" if of is True else f" of {of}")
        column, table = self._column(declared)
        return column + ("" if table.name == LOG else f" ({table.name})")

    def _column(self, declared: FeatureDeclaration) -> tuple[str, Table]:
        """The column that a feature reads, and the table that has it."""
        column = declared.column or declared.name
        return column, self._tables.holder(column, (USERS if declared.tower == "user" else ITEMS, LOG))

    def _tasks(self) -> Iterator[TaskReport]:
        for task in self._dataset.tasks:
            place = f"[tasks.{task.name}]"
            counts = self._shown & (self._prepared.weight(task.name) > 0)
            labels = self._prepared.label(task.name)[counts].astype(np.float64)
            labels = np.expm1(labels) if task.transform == "log1p" else labels
            mean, deviation = (float(labels.mean()), float(labels.std())) if len(labels) else (np.nan, np.nan)
            if not len(labels):
                self._warn(place, "no row counts.")
            elif task.kind != "binary" and deviation == 0.0:
                only = task.class_names[int(mean)] if task.class_names else f"{mean:g}"
                self._warn(place, f"the label is {only} in all rows that count, so that there is nothing to learn.")
            if task.kind == "multiclass" and len(labels):
                mean = float(np.bincount(labels.astype(int)).max() / len(labels))
            yield TaskReport(task.name, task.kind, task.label, len(labels), mean, deviation)

    def _parts(self) -> dict[str, int] | None:
        if not self._has_parts:
            self._warn("[split]", "the first rows do not have what each part needs; look at more of them.")
            return None
        numbers = np.bincount(self._prepared.split[self._shown], minlength=len(PARTS))
        return {part: int(number) for part, number in zip(PARTS, numbers, strict=True)}

    def _look_at_labels(self) -> None:
        """Warns of features that a label is computed from; a label of one column is an error of the declaration."""
        for task in self._dataset.tasks:
            read = expressions.columns(task.label)
            for feature in self._dataset.features:
                if len(read) > 1 and feature.source_column in read and self._column(feature)[1].name == LOG:
                    self._warn(
                        f"[features.{feature.name}]",
                        f"the label of [tasks.{task.name}] is computed from its column {feature.source_column!r}; is "
                        "that known when a prediction is made?",
                    )

    def _look_at_time(self) -> None:
        time = self._prepared.time
        if time is None:
            return
        first, last = (
            datetime.datetime.fromtimestamp(int(end) / 1_000, datetime.UTC).date() for end in (time.min(), time.max())
        )
        if time.min() < EARLIEST:
            self._warn(
                "[source]",
                f"moments from {first} to {last}: is the unit of {self._dataset.source.time!r} "
                f'"{self._dataset.source.time_unit}", its `time_unit`?',
            )
        elif time.min() == time.max() and self._rows > 1:
            self._warn("[source]", f"all rows have the same moment, {first}.")

    def _unused(self) -> tuple[str, ...]:
        read = {reference.column for reference in references(self._dataset) if LOG in reference.tables}
        return tuple(name for name in self._tables.tables[LOG].available if name not in read)


def _distinct(values: np.ndarray) -> int:
    return pl.Series(values.tolist() if values.dtype == object else values).n_unique()


def _becomes(feature: Feature) -> str:
    """What a model reads of a feature."""
    if feature.is_dense:
        return f"{feature.width:,} numbers"
    indices = f"{feature.vocabulary_size:,} indices" + (f" of {feature.embedding}" if feature.embedding else "")
    return indices if feature.length == 1 else f"{feature.length} slots, {indices}"


def _outcome(task: TaskReport) -> str:
    if not task.rows:
        return ""
    if task.kind == "binary":
        return f"{round(task.mean * task.rows):,} ({task.mean:.2%})"
    if task.kind == "multiclass":
        return f"commonest {task.mean:.2%}"
    return f"{task.mean:.4g} ± {task.deviation:.4g}"


def _laid_out(heads: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of a table, `sides` saying l(eft) or r(ight) per column; the widest columns are cut if it is too wide."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > MOST_WIDTH:
        widths[widths.index(max(widths))] -= 1

    def cell(text: str, width: int, side: str) -> str:
        text = text if len(text) <= width else f"{text[: width - 3]}..."
        return text.ljust(width) if side == "l" else text.rjust(width)

    return ["  ".join(map(cell, line, widths, sides)).rstrip() for line in lines]
