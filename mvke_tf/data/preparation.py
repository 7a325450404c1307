# SPDX-License-Identifier: Apache-2.0
"""From a declared dataset to a prepared one: labels, parts, negatives, histories, statistics, vocabularies, encoding.

Nothing is written before everything has been checked.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mvke_tf.data import expressions, files, groups, history, negatives, split
from mvke_tf.data.declaration import PARTS, Dataset, FeatureDeclaration, History, Statistic, TaskDeclaration
from mvke_tf.data.encoder import RAW_UNKNOWN, EncodedFeature, Encoder
from mvke_tf.data.store import EntityTable, PreparedDataset, digest
from mvke_tf.data.tables import (
    ITEMS,
    LOG,
    USERS,
    Lists,
    Table,
    Tables,
    fingerprint,
    first_true,
    names_the_declaration,
    read_tables,
)
from mvke_tf.errors import DataError, DeclarationError
from mvke_tf.io import TEMPORARY, one_line, remove_temporary
from mvke_tf.schema import WEIGHTS_SUFFIX

logger = logging.getLogger(__name__)

Raw = dict[str, np.ndarray]
# The table of the keys of all users or items.
KEYS = "keys"
# Tables that may have a column of a row of the log, the preferred one first.
_OF_A_ROW = (LOG, ITEMS, USERS)
# The largest label and weight, which are kept in 32 bits.
_LARGEST = float(np.finfo(np.float32).max)
# Ways of reading the columns of one condition that are tried.
_MOST_TRIES = 10_000


def prepared_dataset(dataset: Dataset, data_dir: Path = Path("data"), overwrite: bool = False) -> PreparedDataset:
    """The prepared dataset of a declaration, made unless it is there, in a folder below `data_dir`.

    The folder's name has a digest of format, declaration and contents of the tables: what has changed is another
    folder, and nothing stale is ever read.

    Args:
        dataset: The declaration.
        data_dir: Where prepared datasets are kept, in `prepared/<name>-<digest>`.
        overwrite: Whether to prepare anew what is there.

    Raises:
        DataError: If the tables cannot be read or do not fit the declaration.
        DeclarationError: See `prepare`.
    """
    parent = Path(data_dir) / "prepared"
    # What killed processes left behind.
    for folder in {parent, *(path.parent for path in (Path(data_dir) / "tables").rglob(f"{TEMPORARY}*"))}:
        remove_temporary(folder)
    digests = files.Digests(parent / "digests.json")
    found = fingerprint(dataset, digests)
    folder = parent / f"{dataset.name}-{digest(dataset, found)[:12]}"
    if folder.is_dir() and not overwrite:
        prepared = PreparedDataset.load(folder)
        logger.info("%s is prepared already.", folder)
        digests.save()
        return prepared
    prepared = prepare(dataset, dataclasses.replace(read_tables(dataset, fingerprinted=False), fingerprint=found))
    prepared.save(folder)
    digests.save()
    logger.info("Prepared %s in %s:\n%s", dataset.name, folder, describe(prepared))
    return PreparedDataset.load(folder)


@names_the_declaration
def prepare(dataset: Dataset, tables: Tables | None = None) -> PreparedDataset:
    """Prepares a dataset in memory.

    Args:
        dataset: The declaration.
        tables: Its tables; by default they are read.

    Raises:
        DataError: If the tables cannot be read or do not fit the declaration.
        DeclarationError: If a label would be a feature, or a group cannot be made.
    """
    tables = read_tables(dataset) if tables is None else tables
    rows = _Rows(dataset, tables)
    parts = _parts(rows)
    labels, weights = _labels(rows)
    for task in dataset.tasks:
        if not weights[task.name][parts == 0].any():
            raise DataError(f"[tasks.{task.name}]: no row of the training part counts. Expected at least one label.")
    origin, item, sampled = _interactions(rows)
    time = None if rows.time is None else rows.time[origin]

    features = {feature.name: _encoded_feature(rows, feature) for feature in dataset.features}
    users, state, latest_users = _users(rows, features)
    items, item_row, catalogue = _items(rows, features, parts, item, time)
    encoded = list(features.values())
    if not dataset.of_tower("item"):
        encoded.append(EncodedFeature.constant_item())

    user_row = state[origin]
    training = (parts[origin] == 0) & ~sampled
    counts = {
        "user": np.bincount(user_row[training], minlength=len(users.key)),
        "item": np.bincount(item_row[training], minlength=len(items.key)),
    }
    encoder = Encoder.fit(
        encoded,
        {"user": users.raw, "item": items.raw},
        {tower: np.flatnonzero(number) for tower, number in counts.items()},
        counts,
    )
    tables_of = [
        EntityTable(
            table.side,
            table.key,
            encoder.encode_numpy(table.raw, table.side, len(table)),
            table.raw,
            table.name,
            table.time,
        )
        for table in (users, items, latest_users)
    ]
    counting = {
        task.name: np.where(sampled, np.float32(task.kind == "binary"), weights[task.name][origin])
        for task in dataset.tasks
    }
    prepared = PreparedDataset(
        dataset=dataset,
        encoder=encoder,
        fingerprint=tables.fingerprint,
        users=tables_of[0],
        items=tables_of[1],
        latest_users=tables_of[2],
        catalogue=catalogue,
        user_row=user_row,
        item_row=item_row,
        split=parts[origin],
        labels={name: np.where(sampled, 0, label[origin]) for name, label in labels.items()},
        weights=counting,
        time=time,
        sampled=sampled,
        offsets={
            task.name: _offset(task, labels[task.name][parts == 0], weights[task.name][parts == 0])
            for task in dataset.tasks
            if task.kind in ("regression", "count")
        },
    )
    if dataset.groups is not None:
        # A group that cannot be made is known before anything is trained.
        groups.groups(prepared)
    return prepared


def _offset(task: TaskDeclaration, labels: np.ndarray, weights: np.ndarray) -> float:
    """From where a model starts to learn: the mean label, or the logarithm of that of counts."""
    mean = float(np.average(labels, weights=weights))
    # Of counts that are all 0, a rate that is nearly 0.
    return round(float(np.log(max(mean, 1e-4))) if task.kind == "count" else mean, 4)


def describe(prepared: PreparedDataset) -> str:
    """What a preparation made, one line per part: rows, positives, mean labels, commonest classes, new entities.

    New users and items occur in no training row that was not sampled.
    """
    heads = ["part", "rows"]
    shown = {"binary": "positive", "multiclass": "commonest"}
    heads += [f"{shown.get(task.kind, 'mean')} {task.name}" for task in prepared.dataset.tasks]
    new = {
        side: ~prepared.known(side)[rows]
        for side, rows, has in (
            ("user", prepared.user_row, prepared.has_users),
            ("item", prepared.item_row, prepared.has_items),
        )
        if has
    }
    lines = [[*heads, *(f"new {side}s" for side in new)]]
    for number, part in enumerate(PARTS):
        of_part = prepared.split == number
        line = [part, f"{of_part.sum():,}"]
        for task in prepared.dataset.tasks:
            label, weight = prepared.label(task.name)[of_part], prepared.weight(task.name)[of_part]
            if task.kind == "binary":
                line.append(f"{int((label * (weight > 0)).sum()):,}")
            elif task.kind == "multiclass" and weight.any():
                numbers = np.bincount(label[weight > 0].astype(int), minlength=len(task.class_names))
                line.append(f"{task.class_names[numbers.argmax()]} ({numbers.max() / numbers.sum():.1%})")
            else:
                line.append(f"{np.average(label, weights=weight):.4g}" if weight.any() else "none")
        line += [f"{flags[of_part].mean():.1%}" if of_part.any() else "none" for flags in new.values()]
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


# Rows of the log


@dataclasses.dataclass(frozen=True)
class _Entities:
    """The users or items of a dataset.

    Args:
        keys: Their ids, ascending.
        of_row: Number of the entity of each row of the log, in its order.
        side: Their side table.
        side_row: Row of the side table of each entity; -1 without one.
    """

    keys: pl.Series
    of_row: np.ndarray
    side: Table | None = None
    side_row: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)


class _Rows:
    """The rows of the log in the order of time, user and item, and what belongs to each."""

    def __init__(self, dataset: Dataset, tables: Tables) -> None:
        self.dataset, self.tables = dataset, tables
        self.log = tables.tables[LOG]
        time = None
        if dataset.source.time is not None:
            time = self.log.times(dataset.source.time, dataset.source.time_unit)
        users = self._entities(USERS, dataset.keys.user, None if dataset.users is None else dataset.users.on)
        items = self._entities(ITEMS, dataset.keys.item, None if dataset.items is None else dataset.items.on)
        sort_keys = [entities.of_row for entities in (items, users) if entities is not None]
        if time is not None:
            sort_keys.append(time)
        self.order = np.lexsort(sort_keys) if sort_keys else np.arange(len(self.log))
        self.time = None if time is None else time[self.order]
        # A row without a user key is a user whose number is that of the row.
        if users is None:
            users = _Entities(pl.Series(np.arange(len(self.log))), np.arange(len(self.log)))
        self.users = dataclasses.replace(users, of_row=users.of_row[self.order])
        self.items = None if items is None else dataclasses.replace(items, of_row=items.of_row[self.order])
        self._cache: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.log)

    def _entities(self, name: str, key: str | None, on: str | None) -> _Entities | None:
        if key is None:
            return None
        side, on = self.tables.tables.get(name), on or key
        kind = self._key_kind(name, key, side, on)
        keys = self.log.keys(key, kind)
        if side is None:
            distinct = keys.unique().sort()
            return _Entities(distinct, _numbers(keys, distinct))
        side_keys = side.unique_keys(on, kind)
        distinct = pl.concat([keys, side_keys]).unique().sort() if name == ITEMS else keys.unique().sort()
        side_row = np.full(len(distinct), -1)
        number = _numbers(side_keys, distinct)
        side_row[number[number >= 0]] = np.flatnonzero(number >= 0)
        of_row = _numbers(keys, distinct)
        if without := int((side_row < 0).sum()):
            logger.warning(
                "%s of the %s %s of the log are not in %s: the columns of that table are unknown for them.",
                f"{without:,}",
                f"{len(np.unique(of_row)):,}",
                name,
                side.source,
            )
        return _Entities(distinct, of_row, side, side_row)

    def _key_kind(self, name: str, key: str, side: Table | None, on: str) -> str:
        """Keys are whole numbers where all tables that have them say so, unless a feature of them is declared."""
        tower = "user" if name == USERS else "item"
        for feature in self.dataset.features:
            if feature.tower == tower and feature.source_column == key:
                owner = self.dataset.owner(feature)
                if owner.encode == "integer":
                    return "integer"
                if owner.type:
                    return owner.type
        kinds = {self.log.natural_kind(key)} | ({side.natural_kind(on)} if side is not None else set())
        return "integer" if kinds == {"integer"} else "string"

    @functools.cached_property
    def events_of_users(self) -> history.Events:
        """The rows by user and time."""
        return history.Events(self.users.of_row, self.moments)

    @property
    def moments(self) -> np.ndarray:
        """The moment of each row, where the declaration has something that needs it."""
        return _needed(self.time)

    def entities(self, tower: str) -> _Entities:
        """The users or the items, where the declaration has something that needs their keys."""
        entities = self.users if tower == "user" else self.items
        if entities is None:
            raise DeclarationError("Expected the column of the item of each row. Received none: declare [keys] item.")
        return entities

    def side_rows(self, tower: str) -> np.ndarray:
        """The row of the side table of each user or item; -1 of those that it lacks."""
        side_row = self.entities(tower).side_row
        if side_row is None:
            raise DeclarationError(f"Expected a side table of {tower}s. Received none: declare [tables.{tower}s].")
        return side_row

    def table_of(self, feature: FeatureDeclaration) -> Table:
        """The table that has a feature's column; keys are a table of their own, of all users or items."""
        key = self.dataset.keys.user if feature.tower == "user" else self.dataset.keys.item
        if key is not None and feature.source_column == key:
            entities = self.entities(feature.tower)
            return Table(KEYS, entities.keys.alias(key).to_frame(), [("[keys]", len(entities))])
        return self.holder_of(feature, _column_of(feature), "column")

    def holder_of(self, feature: FeatureDeclaration, column: str, key: str) -> Table:
        """The table that has a column of a feature.

        Raises:
            DeclarationError: If it is the log, and the column a label.
        """
        table = self.tables.holder(column, _among(feature), f"[features.{feature.name}] {key}")
        if table.name == LOG:
            self.dataset.check_no_label(feature, key, column)
        return table

    def place(self, row: int) -> str:
        """Where a row stands in the source."""
        return self.log.place(int(self.order[row]))

    def index(self, table: Table) -> np.ndarray:
        """The row of a table that belongs to each row of the log; -1 without one."""
        if table.name == LOG:
            return self.order
        tower = "user" if table.name == USERS else "item"
        return self.side_rows(tower)[self.entities(tower).of_row]

    def scalars(self, column: str, kind: str, place: str, among: Sequence[str] = _OF_A_ROW) -> pl.Series:
        """A column of single values, one per row of the log."""
        table = self.tables.holder(column, among, place)
        return gather(self._once(table, "scalars", column, kind), self.index(table))

    def lists(self, column: str, kind: str, place: str, weights: str | None = None) -> Lists:
        """A column of lists, or of single values as lists of one, one per row of the log; with weights."""
        table = self.tables.holder(column, _OF_A_ROW, place)
        lists = self._column_lists(table, column, kind).take(self.index(table))
        if weights is None:
            return lists
        holder = self.tables.holder(weights, _OF_A_ROW, place)
        if holder.is_list(weights) or self.is_text_list(holder, weights):
            of_lists = holder.lists(weights, "number").take(self.index(holder))
            differing = np.flatnonzero(of_lists.lengths != lists.lengths)
            if len(differing):
                row = differing[0]
                raise DataError(
                    f"{self.place(row)}: {place}: expected as many weights in column {weights!r} as values in "
                    f"{column!r}. Received: {of_lists.lengths[row]} weights of {lists.lengths[row]} values."
                )
            numbers = of_lists.values.to_numpy()
        else:
            single = self.scalars(weights, "number", place).to_numpy()
            numbers = np.repeat(single, lists.lengths)
        # A value of unknown weight is as good as none; a negative weight is a mistake.
        if (numbers < 0).any():
            row = np.repeat(np.arange(len(self)), lists.lengths)[(numbers < 0).argmax()]
            raise DataError(
                f"{self.place(row)}, column {weights!r}: expected a weight, a number of at least 0. "
                f"Received: {numbers[(numbers < 0).argmax()]:g}."
            )
        return Lists(lists.offsets, lists.values, np.nan_to_num(numbers))

    def _column_lists(self, table: Table, column: str, kind: str) -> Lists:
        if table.is_list(column) or self.is_text_list(table, column):
            lists = self._once(table, "lists", column, kind, None, self.is_weighted(table, column))
            # Weights are those that the history declares.
            return Lists(lists.offsets, lists.values)
        if table.is_text:
            table.check_no_lists(column)
        values = self._once(table, "scalars", column, kind)
        return Lists(np.arange(len(values) + 1), values)

    def is_text_list(self, table: Table, column: str) -> bool:
        """Whether a feature of the declaration says that the cells of a CSV column are lists."""
        return table.is_text and any(
            feature.is_list and column in (feature.source_column, feature.weights) for feature in self.dataset.features
        )

    def is_weighted(self, table: Table, column: str) -> bool:
        """Whether a feature of the declaration says that these lists have their weights in their cells."""
        return table.is_text and any(
            feature.weighted and column == feature.source_column for feature in self.dataset.features
        )

    def _once(self, table: Table, what: str, *arguments: Any) -> Any:
        key = (table.name, what, arguments)
        if key not in self._cache:
            self._cache[key] = getattr(table, what)(*arguments)
        return self._cache[key]

    def value(self, text: str, place: str) -> pl.Series:
        """A SQL expression, one Float64 per row of the log, null where it is unknown."""
        return self._evaluate(text, place, expressions.value(text, place))

    def condition(self, text: str, place: str) -> np.ndarray:
        """A SQL condition, one bool per row of the log."""
        return self._evaluate(text, place, expressions.condition(text, place)).to_numpy()

    def _evaluate(self, text: str, place: str, expression: pl.Expr) -> pl.Series:
        # The cells of a CSV are text: an expression of numbers gets them as numbers, one of lists as lists.
        choices: list[list[pl.Series]] = []
        problems: list[DataError] = []
        for column in expressions.columns(text, place):
            table = self.tables.holder(column, _OF_A_ROW, place)
            stored = gather(table.series(column), self.index(table))
            forms = [stored]
            if stored.dtype == pl.String:
                try:
                    forms.insert(0, gather(self._once(table, "values", column), self.index(table)))
                except DataError as error:
                    problems.append(error)
            if self.is_text_list(table, column):
                forms.append(stored.str.split(table.list_separator))
            choices.append([form.alias(column) for form in forms])
        try:
            return pl.DataFrame(_fitting(expression, choices)).select(expression).to_series()
        except pl.exceptions.PolarsError as fault:
            if problems:
                raise DataError(f"{place} = {text!r}: {problems[0]}") from problems[0]
            raise DataError(f"{place} = {text!r} does not fit its columns: {one_line(fault)}.") from fault


def _fitting(expression: pl.Expr, choices: Sequence[Sequence[pl.Series]]) -> list[pl.Series]:
    """The first forms of columns whose types an expression takes; those that come first if it takes none.

    One row tells the types. A part of the expression is tried as soon as all of its columns have a form.
    """
    names = [forms[0].name for forms in choices]
    first = [forms[0] for forms in choices]
    if all(len(forms) == 1 for forms in choices) or _takes(expression, first):
        return first
    parts: list[list[pl.Expr]] = [[] for _ in names]
    for part in expressions.parts(expression):
        parts[max(map(names.index, part.meta.root_names()))].append(part)
    chosen: list[int] = []
    number = 0
    for _ in range(_MOST_TRIES):
        if len(chosen) == len(names):
            return [forms[one] for forms, one in zip(choices, chosen, strict=True)]
        forms = choices[len(chosen)]
        if number == len(forms):
            if not chosen:
                break
            number = chosen.pop() + 1
            continue
        tried = [*(forms[one] for forms, one in zip(choices, chosen, strict=False)), forms[number]]
        if all(_takes(part, tried) for part in parts[len(chosen)]):
            chosen.append(number)
            number = 0
        else:
            number += 1
    return first


def _takes(expression: pl.Expr, columns: Sequence[pl.Series]) -> bool:
    try:
        pl.DataFrame([column.head(1) for column in columns]).select(expression)
    except pl.exceptions.PolarsError:
        return False
    return True


def _needed(time: np.ndarray | None) -> np.ndarray:
    """Moments that the declaration has something to ask of."""
    if time is None:
        raise DeclarationError("Expected the column of the moment of each row. Received none: declare [source] time.")
    return time


def _numbers(values: pl.Series, distinct: pl.Series) -> np.ndarray:
    """The position of each value among distinct ones; -1 of others."""
    positions = pl.DataFrame({"value": distinct, "number": np.arange(len(distinct))})
    joined = values.alias("value").to_frame().join(positions, on="value", how="left", maintain_order="left")
    return joined["number"].fill_null(-1).to_numpy()


def gather(values: pl.Series, rows: np.ndarray) -> pl.Series:
    """The values of these rows; null for -1."""
    index = pl.Series(rows, dtype=pl.Int64)
    return values.gather(index.replace(-1, None) if (rows < 0).any() else index)


# Parts, labels, negatives


def _parts(rows: _Rows) -> np.ndarray:
    """The part of each row of the log, int8."""
    declared = rows.dataset.split
    if declared.by == "files":
        parts = rows.log.parts()[rows.order]
    elif declared.by == "time":
        parts = split.by_time(rows.moments, *rows.dataset.moments)
    elif declared.by == "share_of_time":
        parts = split.by_share_of_time(rows.moments, split.share_ends(declared))
    elif declared.by == "per_user":
        parts = split.per_user(rows.users.of_row, rows.moments, split.share_ends(declared))
    elif declared.by == "random":
        parts = split.by_chance(len(rows), split.share_ends(declared), declared.seed)
    elif declared.by == "hash":
        if declared.column is None:
            values = gather(rows.users.keys, rows.users.of_row)
        else:
            values = rows.scalars(declared.column, "string", "[split] column")
        parts = split.by_hash(values, split.share_ends(declared), declared.seed)
    else:
        if declared.column is None:
            raise DeclarationError(f"[split] by = {declared.by!r}: expected `column`. Received none: declare it.")
        table = rows.tables.holder(declared.column, _OF_A_ROW, "[split] column")
        values = gather(table.series(declared.column), rows.index(table))
        parts = split.by_column(values, declared)
        if (parts < 0).any():
            row = int((parts < 0).argmax())
            named = ", ".join(repr(value) for part in PARTS for value in getattr(declared, part))
            raise DataError(
                f"{rows.place(row)}, column {declared.column!r}: expected a value that [split] names: {named}. "
                f"Received: {values[row]!r}."
            )
    split.check_parts(parts)
    for number, part in enumerate(PARTS):
        if not (parts == number).any():
            logger.warning("[split] gives the %s part no row.", part)
    return parts


def _labels(rows: _Rows) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Label and weight of each row of the log, per task; 0 and 0 where it does not count."""
    labels: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    for task in rows.dataset.tasks:
        place = f"[tasks.{task.name}]"
        stored = _classes(rows, task, place) if task.classes else rows.value(task.label, f"{place} label")
        counts = stored.is_not_null().to_numpy()
        if task.where is not None:
            counts = counts & rows.condition(task.where, f"{place} where")
        label = np.where(counts, stored.fill_null(0.0).to_numpy(), 0.0)
        _check_labels(rows, task, label, counts)
        labels[task.name] = np.log1p(label) if task.transform == "log1p" else label
        _check_size(rows, labels[task.name], f"{place} label = {task.label!r}")
        weight = counts.astype(np.float64)
        for column, where in ((rows.dataset.weight, "weight"), (task.weight, f"{place} weight")):
            if column is not None:
                weight *= _row_weights(rows, column, where, counts)
        _check_size(rows, weight, f"{place}: the product of both weights")
        weights[task.name] = weight
        if task.kind == "binary" and rows.dataset.negatives.kind == "none" and len(np.unique(label[counts])) == 1:
            logger.warning("%s: all labels are %g; there is nothing to tell apart.", place, label[counts][0])
        if task.given is not None:
            out_of_order = (label == 1) & (labels[task.given] != 1) & (weights[task.given] > 0)
            if out_of_order.any():
                logger.warning(
                    "%s: in %s rows the label is 1, but that of %r, which comes first, is 0.",
                    place,
                    f"{int(out_of_order.sum()):,}",
                    task.given,
                )
            without = (labels[task.given] == 0) & (weights[task.given] > 0)
            if task.kind == "binary" and task.objective == "joint" and without.any() and not weight[without].any():
                logger.warning(
                    "%s: the label is known only where that of %r is 1, and over those rows alone the product of the "
                    'two probabilities says nothing of the second. Declare objective = "conditional", which learns it '
                    "from these rows, or a label that is 0 in the others.",
                    place,
                    task.given,
                )
    return labels, weights


def _classes(rows: _Rows, task: TaskDeclaration, place: str) -> pl.Series:
    """The index of each row's class, -1 of a label that is none, null where there is no label."""
    index = np.full(len(rows), -1.0)
    for number, value in enumerate(task.classes or ()):
        literal = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)
        index[rows.condition(f"({task.label}) = {literal}", f"{place} label")] = number
    known = rows.condition(f"({task.label}) IS NOT NULL", f"{place} label")
    return pl.Series(np.where(known, index, np.nan)).fill_nan(None)


def _check_labels(rows: _Rows, task: TaskDeclaration, label: np.ndarray, counts: np.ndarray) -> None:
    if task.kind == "binary":
        wrong, expected = (label != 0) & (label != 1), "0 or 1"
    elif task.kind == "multiclass":
        wrong, expected = label < 0, f"one of the classes {', '.join(task.class_names)}"
    elif task.kind == "count":
        wrong, expected = ~(np.isfinite(label) & (label >= 0) & (label % 1 == 0)), "a whole number of at least 0"
    else:
        wrong, expected = ~np.isfinite(label), "a finite number"
        if not wrong.any() and task.transform == "log1p":
            wrong, expected = label <= -1, 'a number above -1, for transform = "log1p"'
        if not (wrong & counts).any() and task.domain is not None:
            low, high = task.domain
            wrong, expected = (label < low) | (label > high), f"a number from {low:g} to {high:g}, its `domain`"
    wrong &= counts
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{rows.place(row)}: [tasks.{task.name}] label = {task.label!r}: expected {expected}. "
            f"Received: {'another value' if task.kind == 'multiclass' else f'{label[row]:g}'}."
        )


def _check_size(rows: _Rows, numbers: np.ndarray, what: str) -> None:
    wrong = np.abs(numbers) > _LARGEST
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{rows.place(row)}: {what}: expected a number of 32 bits, at most {_LARGEST:.3g}. "
            f"Received: {numbers[row]:g}."
        )


def _row_weights(rows: _Rows, column: str, place: str, counts: np.ndarray) -> np.ndarray:
    """The weight of each row; 0 where it is unknown, which it may be where the row does not count."""
    weights = rows.scalars(column, "number", place)
    wrong = (weights.is_null() & pl.Series(counts)) | (weights < 0).fill_null(False)
    if wrong.any():
        row = first_true(wrong)
        received = "nothing" if weights[row] is None else f"{weights[row]:g}"
        raise DataError(
            f"{rows.place(row)}, column {column!r}: expected the weight of the row, a number of at least 0. "
            f"Received: {received}."
        )
    return weights.fill_null(0.0).to_numpy()


def _interactions(rows: _Rows) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Row of the log, number of the item, and whether it is sampled, of each interaction: rows, each with negatives."""
    declared, items = rows.dataset.negatives, rows.items
    every_row = np.arange(len(rows))
    if declared.kind == "none" or items is None:
        return every_row, None if items is None else items.of_row, np.zeros(len(rows), bool)
    time = np.zeros(len(rows), np.int64) if rows.time is None else rows.time
    catalogue = None if items.side_row is None else items.side_row >= 0
    origin, drawn = negatives.draw(
        declared, rows.users.of_row, items.of_row, time, len(items), catalogue, rows.users.keys
    )
    origins = np.concatenate([every_row, origin])
    order = np.argsort(origins, kind="stable")
    sampled = (np.arange(len(origins)) >= len(rows))[order]
    return origins[order], np.concatenate([items.of_row, drawn])[order], sampled


# Raw columns


def _encoded_feature(rows: _Rows, feature: FeatureDeclaration) -> EncodedFeature:
    """How a feature is encoded: the kind of its raw values is that of the feature that owns the vocabulary."""
    owner = rows.dataset.owner(feature)
    if owner.encode in ("buckets", "number"):
        kind = "number"
    elif owner.encode in ("vector", "integer"):
        kind = owner.encode
    elif owner.type is not None:
        kind = owner.type
    elif owner.values:
        kind = "integer" if all(isinstance(value, int) for value in owner.values) else "string"
    else:
        kind = _natural_kind(rows, owner)
    return EncodedFeature.from_declaration(feature, rows.dataset, kind)


def _natural_kind(rows: _Rows, feature: FeatureDeclaration) -> str:
    place = f"[features.{feature.name}]"
    if feature.history is not None:
        column = _column_of(feature)
        table = rows.tables.holder(column, _OF_A_ROW, f"{place} history")
        return table.natural_kind(column, rows.is_text_list(table, column), rows.is_weighted(table, column))
    table = rows.table_of(feature)
    return table.natural_kind(_column_of(feature), feature.is_list, feature.weighted, feature.missing)


def _column_of(feature: FeatureDeclaration) -> str:
    """The column whose values a feature has: its own, or that of a history of values."""
    column = feature.source_column
    if feature.history is not None:
        column = feature.history.last or feature.history.counts
    if column is None:
        raise ValueError(f"Expected a feature with the values of a column. Received {feature.name!r}, a number.")
    return column


def _among(feature: FeatureDeclaration) -> tuple[str, str]:
    return (USERS if feature.tower == "user" else ITEMS, LOG)


class _Column:
    """The values of a feature that is a column, per row of the table that has it.

    Args:
        rows: The rows of the log.
        declared: The feature.
        encoded: How it is encoded.
    """

    def __init__(self, rows: _Rows, declared: FeatureDeclaration, encoded: EncodedFeature) -> None:
        self.feature = encoded
        self.table = rows.table_of(declared)
        self.column = _column_of(declared)
        column, missing = self.column, (*declared.missing, *rows.dataset.owner(declared).missing)
        self._values: np.ndarray | Lists | pl.Series
        if encoded.raw == "vector":
            vectors = self.table.vectors(column, encoded.width)
            self._values, self.known = vectors, ~np.isnan(vectors).any(axis=1)
        elif encoded.is_list:
            if declared.weights is not None:
                holder = rows.holder_of(declared, declared.weights, "weights")
                if holder is not self.table:
                    raise DataError(
                        f"[features.{declared.name}]: expected the columns {column!r} and {declared.weights!r} in one "
                        f"table. Received: {self.table.source} and {holder.source}."
                    )
            lists = self.table.lists(column, encoded.raw, declared.weights, declared.weighted, missing)
            self._values, self.known = lists, lists.lengths > 0
        else:
            scalars = self.table.scalars(column, encoded.raw, missing)
            self._values, self.known = scalars, scalars.is_not_null().to_numpy()

    def take(self, index: np.ndarray) -> Raw:
        """Raw columns of these rows of the table; unknown for -1."""
        feature, values = self.feature, self._values
        if isinstance(values, np.ndarray):
            unknown = (index < 0)[:, None]
            return {feature.name: np.where(unknown, np.float32(np.nan), values[index])}
        if isinstance(values, Lists):
            return _padded(feature, values.take(index))
        return {feature.name: _filled(gather(values, index), feature.raw)}


def _filled(values: pl.Series, kind: str) -> np.ndarray:
    """A series as a raw column, with the value that means "unknown" in place of null."""
    if kind == "string":
        return values.fill_null(RAW_UNKNOWN[kind]).to_numpy().astype(object)
    if kind == "integer":
        return values.fill_null(RAW_UNKNOWN[kind]).to_numpy()
    return values.cast(pl.Float32).fill_null(RAW_UNKNOWN[kind]).to_numpy()


def _padded(feature: EncodedFeature, lists: Lists) -> Raw:
    """Lists as raw columns `(n, length)`: the values to keep, then empty slots."""
    length = feature.length
    row = np.repeat(np.arange(len(lists)), lists.lengths)
    weights = np.ones(len(row)) if lists.weights is None else lists.weights
    # A weight of 0 is an empty slot, and takes none.
    position = np.flatnonzero(weights > 0)
    if len(lists) and len(position) and np.bincount(row[position]).max() > length:
        rank = {"first": position, "last": -position, "heaviest": -weights[position]}[feature.keep]
        best = position[np.lexsort((position, rank, row[position]))]
        position = np.sort(best[history.rank_of(row[best]) < length])
    slot = history.rank_of(row[position])
    values = np.full((len(lists), length), RAW_UNKNOWN[feature.raw], object if feature.raw == "string" else np.int64)
    values[row[position], slot] = _filled(lists.values.gather(position), feature.raw)
    filled = np.zeros((len(lists), length), np.float32)
    filled[row[position], slot] = weights[position]
    return {feature.name: values, feature.name + WEIGHTS_SUFFIX: filled}


# Users


def _users(rows: _Rows, features: Mapping[str, EncodedFeature]) -> tuple[EntityTable, np.ndarray, EntityTable]:
    """All user states, the state of each row of the log, and the latest state of each user; not encoded."""
    declared = rows.dataset.of_tower("user")
    columns = {f.name: _Column(rows, f, features[f.name]) for f in declared if f.source_column}
    with_history = any(feature.history for feature in declared)
    first, state = _states(rows, declared, with_history)
    user = rows.users.of_row[first]
    time = rows.moments[first] if with_history else None
    raw: Raw = {}
    latest: Raw = {}
    users = np.arange(len(rows.users))
    last_row = _last_rows(rows.users.of_row, np.ones(len(rows), bool), len(users))
    histories: dict[str, tuple[Raw, Raw]] = {}
    if with_history:
        of_states = _Histories(rows, user, rows.moments[first], False)
        of_users = _Histories(rows, users, rows.moments[last_row], True)
        for feature in declared:
            if feature.history is not None:
                encoded = features[feature.name]
                histories[feature.name] = (
                    of_states.raw(feature.history, encoded),
                    of_users.raw(feature.history, encoded),
                )
    for feature in declared:
        encoded = features[feature.name]
        if feature.name in histories:
            of_state, of_user = histories[feature.name]
            raw |= of_state
            latest |= of_user
            continue
        column = columns[feature.name]
        if column.table.name == KEYS:
            raw |= column.take(user)
            latest |= column.take(users)
        elif column.table.name == USERS:
            side_row = rows.side_rows("user")
            raw |= column.take(side_row[user])
            latest |= column.take(side_row)
        else:
            raw |= column.take(rows.order[first])
            # What the last row that says anything of it says.
            known = column.known[rows.order]
            said = _last_rows(rows.users.of_row, known, len(users))
            latest |= column.take(np.where(said >= 0, rows.order[said], -1))
        if feature.context:
            latest |= encoded.unknown_raw(len(users), profile=True)
    key = _filled(rows.users.keys, "string" if rows.users.keys.dtype == pl.String else "integer")
    return (
        EntityTable("user", key[user], {}, raw, time=time),
        state,
        EntityTable("user", key, {}, latest, time=None if rows.time is None else rows.time[last_row]),
    )


def _states(rows: _Rows, declared: Sequence[FeatureDeclaration], with_time: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first row of the log of each user state, in the order of users and time; the state of each row."""
    user = rows.users.of_row
    keys = {"user": pl.Series(user)}
    if with_time:
        keys["time"] = pl.Series(rows.moments)
    if rows.dataset.keys.user is not None:
        for feature in declared:
            for column in (feature.source_column, feature.weights):
                if column is None or rows.table_of(feature).name != LOG:
                    continue
                keys[f"column {column}"] = gather(rows.log.series(column), rows.order)
    frame = pl.DataFrame(keys).with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    first_of_row = frame.select(pl.col("row").first().over(list(keys))).to_series().to_numpy()
    first = np.flatnonzero(first_of_row == np.arange(len(rows)))
    by = (first, user[first]) if rows.time is None else (first, rows.time[first], user[first])
    first = first[np.lexsort(by)]
    number = np.empty(len(rows), np.int64)
    number[first] = np.arange(len(first))
    return first, number[first_of_row]


def _last_rows(entity: np.ndarray, chosen: np.ndarray, entities: int) -> np.ndarray:
    """The last chosen row of each entity; -1 without one."""
    last = np.full(entities, -1)
    where = np.flatnonzero(chosen)
    np.maximum.at(last, entity[where], where)
    return last


class _Histories:
    """Histories of users from the rows of the log.

    Args:
        rows: The rows of the log.
        user: The users asked for.
        moment: The moments before which their rows count.
        inclusive: Whether the rows of these moments count too.
    """

    def __init__(self, rows: _Rows, user: np.ndarray, moment: np.ndarray, inclusive: bool) -> None:
        self._rows, self._asked = rows, (user, moment)
        self._inclusive = inclusive
        self._events = rows.events_of_users
        self._spans: dict[int | None, history.Spans] = {}

    def raw(self, declared: History, encoded: EncodedFeature) -> Raw:
        """The raw columns of a history feature."""
        events, rows = self._events, self._rows
        place = f"[features.{encoded.name}] history"
        within = None if declared.within is None else expressions.duration_ms(declared.within, place)
        if within not in self._spans:
            self._spans[within] = events.before(*self._asked, within, self._inclusive)
        spans = self._spans[within]
        chosen = np.ones(len(rows), bool)
        if declared.where is not None:
            chosen = rows.condition(declared.where, f"{place}.where")
        values = None
        if declared.mean is not None:
            values = rows.scalars(declared.mean, "number", f"{place}.mean")
        elif declared.share is not None:
            values = rows.value(declared.share, f"{place}.share")
            values = (values != 0).cast(pl.Float64)
        if values is not None:
            chosen = chosen & values.is_not_null().to_numpy()
        chosen = chosen[events.row]
        event, owner = events.row[chosen], events.owner[chosen]
        spans = spans.of(chosen)
        if column := declared.last or declared.counts:
            lists = rows.lists(column, encoded.raw, place, declared.weights).take(event)
            if declared.last:
                listed = history.last(spans, lists, encoded.length)
            else:
                listed = history.counts(spans, owner, lists, encoded.length)
            return dict(zip(encoded.raw_inputs, listed, strict=True))
        if values is not None:
            answer = history.mean(spans, values.to_numpy()[event])
        elif declared.since:
            answer = history.since(spans, events.time[chosen])
        else:
            answer = history.count(spans)
        return {encoded.name: answer.astype(np.int64) if encoded.raw == "integer" else answer}


# Items


def _items(
    rows: _Rows,
    features: Mapping[str, EncodedFeature],
    parts: np.ndarray,
    item: np.ndarray | None,
    time: np.ndarray | None,
) -> tuple[EntityTable, np.ndarray, np.ndarray]:
    """All item states, the state of each interaction, and the rows of the latest states; not encoded.

    Args:
        rows: The rows of the log.
        features: How features are encoded.
        parts: Part of each row of the log.
        item: Number of the item of each interaction; None where items have no keys.
        time: Moment of each interaction.
    """
    declared = rows.dataset.of_tower("item")
    columns = {f.name: _Column(rows, f, features[f.name]) for f in declared if f.source_column}
    if rows.items is None or item is None:
        return _items_without_keys(rows, columns)
    of_log = any(column.table.name == LOG for column in columns.values())
    states = _ItemStates(rows, declared, item, time, _first_seen(rows, parts) if of_log else None)
    raw: Raw = {}
    for column in columns.values():
        of_item = _table_rows_of_items(rows, column.table, column.known, parts)
        row = of_item[states.item]
        raw |= column.take(np.where(states.unseen, -1, row) if column.table.name == LOG else row)
        if column.table.name == LOG:
            _warn_of_varying(rows, column, of_item)
    for feature in declared:
        if feature.statistic is None:
            continue
        place = f"[features.{feature.name}] statistic"
        if feature.statistic.until == "training":
            values = _frozen(rows, feature.statistic, place, parts)[states.item]
        else:
            values = states.statistic(feature.statistic, place)
        raw[feature.name] = _whole(values) if features[feature.name].raw == "integer" else values
    raw = {name: raw[name] for f in declared for name in features[f.name].raw_inputs}
    key = _filled(rows.items.keys, "string" if rows.items.keys.dtype == pl.String else "integer")
    table = EntityTable("item", key[states.item], {}, raw, _names(rows, parts, key, states.item), states.time)
    return table, states.of_interaction, states.latest


def _warn_of_varying(rows: _Rows, column: _Column, of_item: np.ndarray) -> None:
    """Warns where rows of an item have another value of an item feature than the one that the item gets."""
    stored = column.table.series(column.column)
    frame = stored.alias("value").to_frame().with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    # Rows of one value have one number: that of the first of them.
    value = frame.select(pl.col("row").first().over("value")).to_series().to_numpy()
    known = column.known[rows.order]
    differs = known & (value[rows.order] != value[of_item[rows.entities("item").of_row]])
    if differs.any():
        logger.warning(
            "[features.%s]: %s of the rows have another value than the one that their item gets, that of its last row "
            "in the training part. What varies within an item may be a feature of the user tower with "
            "context = true, or a `statistic`.",
            column.feature.name,
            f"{differs.sum() / known.sum():.1%}",
        )


def _whole(values: np.ndarray) -> np.ndarray:
    """Numbers as whole ones, the nearest; NaN is unknown."""
    return np.where(np.isnan(values), RAW_UNKNOWN["integer"], np.round(np.nan_to_num(values))).astype(np.int64)


def _items_without_keys(rows: _Rows, columns: Mapping[str, _Column]) -> tuple[EntityTable, np.ndarray, np.ndarray]:
    """Distinct combinations of item features, in the order of their first rows; one constant item without features."""
    if not columns:
        item_row = np.zeros(len(rows), np.int64)
        return EntityTable("item", np.zeros(1, np.int64), {}, {}), item_row, np.zeros(1, np.int64)
    keys = {}
    for feature in rows.dataset.of_tower("item"):
        for name in (feature.source_column, feature.weights):
            if name is not None:
                keys[f"column {name}"] = gather(columns[feature.name].table.series(name), rows.order)
    frame = pl.DataFrame(keys).with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    first_of_row = frame.select(pl.col("row").first().over(list(keys))).to_series().to_numpy()
    first, item_row = np.unique(first_of_row, return_inverse=True)
    raw: Raw = {}
    for column in columns.values():
        raw |= column.take(rows.order[first])
    number = np.arange(len(first))
    return EntityTable("item", number, {}, raw), item_row, number


def _table_rows_of_items(rows: _Rows, table: Table, known: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The row of a table that says what is known of each item; -1 without one.

    Of the log it is the item's last row in the training part that says anything, else its first row: nothing later
    than needed.
    """
    items = rows.entities("item")
    if table.name == KEYS:
        return np.arange(len(items))
    if table.name == ITEMS:
        return rows.side_rows("item")
    item = items.of_row
    said = _last_rows(item, known[rows.order] & (parts == 0), len(items))
    first = np.full(len(items), len(rows))
    np.minimum.at(first, item, np.arange(len(rows)))
    row = np.where(said >= 0, said, np.where(first < len(rows), first, -1))
    return np.where(row >= 0, rows.order[row], -1)


def _first_seen(rows: _Rows, parts: np.ndarray) -> np.ndarray | None:
    """The moment before which nothing may be known of each item from the log, `(M,)`; None without moments.

    What the training part knows of an item is known of it everywhere, as vocabularies are.
    """
    if rows.time is None:
        return None
    items, always, never = rows.entities("item"), np.iinfo(np.int64).min, np.iinfo(np.int64).max
    first = np.full(len(items), never)
    np.minimum.at(first, items.of_row, rows.time)
    first[items.of_row[parts == 0]] = always
    return np.where(first == never, always, first)


def _names(rows: _Rows, parts: np.ndarray, key: np.ndarray, item: np.ndarray) -> np.ndarray | None:
    name = rows.dataset.keys.item_name
    if name is None:
        return None
    table = rows.tables.holder(name, (ITEMS, LOG), "[keys] item_name")
    names = table.scalars(name, "string")
    names = gather(names, _table_rows_of_items(rows, table, names.is_not_null().to_numpy(), parts))
    return np.array([str(key) if name is None else name for name, key in zip(names, key, strict=True)], object)[item]


def _statistic_values(rows: _Rows, declared: Statistic, place: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Which rows of the log count for a statistic, and the number of each; None where rows are counted."""
    chosen, values = np.ones(len(rows), bool), None
    if declared.where is not None:
        chosen = rows.condition(declared.where, f"{place}.where")
    if declared.mean is not None:
        values = rows.scalars(declared.mean, "number", f"{place}.mean")
    elif declared.share is not None:
        values = (rows.value(declared.share, f"{place}.share") != 0).cast(pl.Float64)
    if values is None:
        return chosen, None
    return chosen & values.is_not_null().to_numpy(), values.fill_null(0.0).to_numpy()


def _frozen(rows: _Rows, declared: Statistic, place: str, parts: np.ndarray) -> np.ndarray:
    """A statistic of the rows of the training part, one number per item."""
    chosen, values = _statistic_values(rows, declared, place)
    chosen = chosen & (parts == 0)
    items = rows.entities("item")
    item, number = items.of_row[chosen], len(items)
    weights = np.ones(len(item))
    if declared.half_life is not None:
        half_life, time = expressions.duration_ms(declared.half_life), rows.moments
        now = np.full(number, time[parts == 0].max())
        if values is not None:
            # A mean does not change with time; by the age since the item's own last row, no sum of weights is 0.
            now = np.full(number, time.min())
            np.maximum.at(now, item, time[chosen])
        weights = np.exp2((time[chosen] - now[item]) / half_life)
    total = np.bincount(item, weights, number)
    occurs = np.bincount(item, minlength=number) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        answer = total if values is None else np.bincount(item, weights * values[chosen], number) / total
    return np.where(occurs, answer, np.nan).astype(np.float32)


class _ItemStates:
    """The states of items: one per item, or with statistics at a point in time one per item and change of them.

    Args:
        rows: The rows of the log.
        declared: The item features.
        item: Number of the item of each interaction.
        time: Moment of each interaction.
        first_seen: Moment before which nothing is known of each item from the log; None where nothing is asked of it.

    Attributes:
        item: Number of the item of each state; ordered by item, then by time.
        unseen: Whether nothing is known from the log in each state: a negative may be drawn before its first row.
        time: From when on each state is seen; None without statistics at a point in time.
        of_interaction: State of each interaction.
        latest: The latest state of each item.
    """

    def __init__(
        self,
        rows: _Rows,
        declared: Sequence[FeatureDeclaration],
        item: np.ndarray,
        time: np.ndarray | None,
        first_seen: np.ndarray | None,
    ) -> None:
        self._rows = rows
        moving = [f.statistic for f in declared if f.statistic is not None and f.statistic.until == "row"]
        entities = rows.entities("item")
        items = np.arange(len(entities))
        self.time: np.ndarray | None
        if not moving and (first_seen is None or (_needed(time) >= first_seen[item]).all()):
            self.item, self.time, self.of_interaction, self.latest = items, None, item, items
            self.unseen = np.zeros(len(items), bool)
            return
        time, times = _needed(time), rows.moments
        self._events = history.Events(entities.of_row, times)
        # Every interaction asks for a state, and every item for its latest one, of all rows.
        asked = np.concatenate([item, items])
        moment = np.concatenate([time, np.full(len(items), times.max())])
        inclusive = np.arange(len(asked)) >= len(item)
        unseen = np.zeros(len(asked), bool)
        if first_seen is not None:
            unseen[: len(item)] = time < first_seen[item]
        keys = [asked, ~unseen]
        self._asked: dict[str | None, tuple[np.ndarray, np.ndarray]] = {}
        for every in dict.fromkeys(statistic.every for statistic in moving):
            seen = np.where(inclusive, moment, self._last_change(moment, every))
            self._asked[every] = (seen, inclusive)
            if any(statistic.half_life for statistic in moving if statistic.every == every):
                keys.append(2 * seen + inclusive)
            else:
                # Nothing changes between two rows of an item.
                keys.append(self._events.before(asked, seen, inclusive=inclusive).end)
        order = np.lexsort((moment, inclusive, *keys[::-1]))
        sorted_keys = np.stack([key[order] for key in keys])
        new = np.concatenate([[True], (sorted_keys[:, 1:] != sorted_keys[:, :-1]).any(axis=0)])
        number = np.empty(len(asked), np.int64)
        number[order] = np.cumsum(new) - 1
        self._first = order[new]
        self.item, self.time, self.unseen = asked[self._first], moment[self._first], unseen[self._first]
        self.of_interaction, self.latest = number[: len(item)], number[len(item) :]

    def _last_change(self, moment: np.ndarray, every: str | None) -> np.ndarray:
        if every is None:
            return moment
        start, step = self._rows.moments.min(), expressions.duration_ms(every)
        return start + (moment - start) // step * step

    def statistic(self, declared: Statistic, place: str) -> np.ndarray:
        """A statistic of the rows before each state, float32; NaN without one."""
        chosen, values = _statistic_values(self._rows, declared, place)
        chosen = chosen[self._events.row]
        seen, inclusive = (asked[self._first] for asked in self._asked[declared.every])
        spans = self._events.before(self.item, seen, inclusive=inclusive).of(chosen)
        owner = self._events.owner[chosen]
        values = None if values is None else values[self._events.row[chosen]]
        if declared.half_life is not None:
            half_life = expressions.duration_ms(declared.half_life)
            return history.decayed(spans, owner, self._events.time[chosen], values, half_life)
        if values is not None:
            return history.mean(spans, values)
        counts = history.count(spans)
        return np.where(counts > 0, counts, np.float32(np.nan))
