# SPDX-License-Identifier: Apache-2.0
"""From a declared dataset to a prepared one: labels, parts, negatives, histories, statistics, vocabularies, encoding.

Nothing is written before everything has been checked.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from mvke_tf.engine import Engine
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
_ROWS_AT_A_TIME = 1 << 20
# Ways of reading the columns of one condition that are tried.
_MOST_TRIES = 10_000


def prepared_dataset(
    dataset: Dataset,
    data_dir: Path = Path("data"),
    overwrite: bool = False,
    memory_mb: int | None = None,
    engine: Engine | None = None,
) -> PreparedDataset:
    """The prepared dataset of a declaration, made unless it is there, in a folder below `data_dir`.

    The folder's name has a digest of format, declaration and contents of the tables: what has changed is another
    folder, and nothing stale is ever read. A log that does not fit into memory is prepared in buckets of its users;
    what is there is taken as it is, in buckets or not.

    Args:
        dataset: The declaration.
        data_dir: Where prepared datasets are kept, in `prepared/<name>-<digest>`.
        overwrite: Whether to prepare anew what is there.
        memory_mb: Memory that the preparation may take, in MiB; by default half of the machine's. Of several workers,
            each may take as much.
        engine: Who prepares the buckets; by default this process, which prepares what fits into memory in any case.
            With any engine the bytes are the same.

    Raises:
        DataError: If the tables cannot be read or do not fit the declaration.
        DeclarationError: See `prepare`.
        EngineError: If workers are killed again and again.
    """
    parent = Path(data_dir) / "prepared"
    # What killed processes left behind.
    for folder in {parent, *(path.parent for path in (Path(data_dir) / "tables").rglob(f"{TEMPORARY}*"))}:
        remove_temporary(folder)
    digests = files.Digests(parent / "digests.json")
    found = fingerprint(dataset, digests)
    folder = parent / f"{dataset.name}-{digest(dataset, found)[:12]}"
    from mvke_tf.data.buckets import name_unfinished, number_of_buckets, prepare_in_buckets, remove_unfinished

    name_unfinished(folder, dataset.name)
    if folder.is_dir() and not overwrite:
        remove_unfinished(folder)
        prepared = PreparedDataset.load(folder)
        logger.info("%s is prepared already.", folder)
        digests.save()
        return prepared
    buckets = number_of_buckets(dataset, memory_mb)
    if buckets > 1:
        prepare_in_buckets(dataset, folder, found, buckets, engine)
    else:
        if engine is not None and not engine.is_alone:
            logger.info(
                "The log of %s fits into memory: one process prepares it. Workers prepare buckets, which a smaller "
                "--memory_mb makes of it.",
                dataset.name,
            )
        tables = dataclasses.replace(read_tables(dataset, fingerprinted=False), fingerprint=found)
        prepare(dataset, tables).save(folder)
    digests.save()
    prepared = PreparedDataset.load(folder)
    logger.info("Prepared %s in %s:\n%s", dataset.name, folder, describe(prepared))
    return prepared


def stored(prepared: PreparedDataset, data_dir: Path = Path("data")) -> PreparedDataset:
    """Prepared data in a folder: themselves, or what are in memory only as saved below `data_dir`."""
    if prepared.folder is None:
        prepared = copy.copy(prepared)
        prepared.folder = Path(data_dir) / "prepared" / f"{prepared.dataset.name}-{prepared.digest[:12]}"
        prepared.save(prepared.folder)
    return prepared


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
    rows = Rows(dataset, tables)
    log = Log(dataset, lambda number: rows, rows.items, rows.time)
    features = encoded_features(rows)
    piece = Piece.of(rows, log, features)
    users, latest_users = piece.users, piece.latest_users
    items, item_row, catalogue = items_of(log, features, piece.parts, piece.item, piece.time)
    training = piece.training
    counts = {
        "user": np.bincount(piece.user_row[training], minlength=len(users.key)),
        "item": np.bincount(item_row[training], minlength=len(items.key)),
    }
    encoder = Encoder.fit(
        features_of_encoder(dataset, features),
        {"user": users.raw, "item": items.raw},
        {tower: np.flatnonzero(number) for tower, number in counts.items()},
        counts,
    )
    prepared = PreparedDataset(
        dataset=dataset,
        encoder=encoder,
        fingerprint=tables.fingerprint,
        users=encoded(encoder, users),
        items=encoded(encoder, items),
        latest_users=encoded(encoder, latest_users),
        catalogue=catalogue,
        user_row=piece.user_row,
        item_row=item_row,
        split=piece.split,
        labels=piece.labels,
        weights=piece.weights,
        time=piece.time,
        sampled=piece.sampled,
        offsets=offsets(dataset, piece.facts),
    )
    if dataset.groups is not None:
        # A group that cannot be made is known before anything is trained.
        groups.groups(prepared)
    return prepared


def encoded_features(rows: Rows) -> dict[str, EncodedFeature]:
    """How the declared features are encoded, by name."""
    return {feature.name: _encoded_feature(rows, feature) for feature in rows.dataset.features}


def features_of_encoder(dataset: Dataset, features: Mapping[str, EncodedFeature]) -> list[EncodedFeature]:
    """The features of an encoder: an item side without any has one that is constant."""
    every = list(features.values())
    return every if dataset.of_tower("item") else [*every, EncodedFeature.constant_item()]


def encoded(encoder: Encoder, table: EntityTable) -> EntityTable:
    """The table with its encoded columns."""
    return dataclasses.replace(table, encoded=encoder.encode_numpy(table.raw, table.side, len(table)))


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is made of the rows of some users: of all of them in memory, else of those of one bucket.

    Args:
        users: The states of the users, not encoded.
        latest_users: The latest state of each user, not encoded.
        user_row: Row of `users` of each interaction, `(n,)`.
        item: Number of the item of each interaction, `(n,)`; None where items have no keys.
        split: Part of each interaction, `(n,)`.
        sampled: Which interactions are sampled negatives, bool `(n,)`.
        time: Moment of each interaction, `(n,)`; None without.
        labels: `{task: (n,)}`.
        weights: `{task: (n,)}`.
        parts: Part of each row of the log, int8 `(m,)`.
        facts: See `check_facts`.
    """

    users: EntityTable
    latest_users: EntityTable
    user_row: np.ndarray
    item: np.ndarray | None
    split: np.ndarray
    sampled: np.ndarray
    time: np.ndarray | None
    labels: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    parts: np.ndarray
    facts: dict[str, Any]

    @classmethod
    def of(cls, rows: Rows, log: Log, features: Mapping[str, EncodedFeature]) -> Piece:
        """What is made of some rows of a log."""
        dataset = rows.dataset
        parts = _parts(rows, log)
        labels, weights, tasks = _labels(rows, parts)
        facts: dict[str, Any] = {"parts": np.bincount(parts, minlength=3).tolist(), "tasks": tasks}
        if log.is_alone:
            check_facts(dataset, facts)
        origin, item, sampled = _interactions(rows, log)
        facts["rows_without_negatives"] = 0
        if dataset.negatives.kind != "none" and rows.items is not None:
            facts["rows_without_negatives"] = len(rows) - int(sampled.sum()) // dataset.negatives.per_positive
        users, state, latest_users = _users(rows, features)
        counting = {
            task.name: np.where(sampled, np.float32(task.kind == "binary"), weights[task.name][origin])
            for task in dataset.tasks
        }
        return cls(
            users=users,
            latest_users=latest_users,
            user_row=state[origin],
            item=item,
            split=parts[origin],
            sampled=sampled,
            time=None if rows.time is None else rows.time[origin],
            labels={name: np.where(sampled, 0, label[origin]) for name, label in labels.items()},
            weights=counting,
            parts=parts,
            facts=facts,
        )

    @property
    def training(self) -> np.ndarray:
        """Which interactions are training rows that were not sampled, bool `(n,)`."""
        return (self.split == 0) & ~self.sampled


def check_facts(dataset: Dataset, facts: Mapping[str, Any]) -> None:
    """Raises, or warns, where what is known of all rows says that something is wrong with them.

    Args:
        dataset: The declaration.
        facts: Of the whole log: `parts`, the number of rows of each, and `tasks`, see `_labels`.

    Raises:
        NoTrainingRowError: If all rows are in other parts.
        DataError: If a task has nothing to learn from.
    """
    split.check_parts(facts["parts"])
    for number, part in enumerate(PARTS):
        if not facts["parts"][number]:
            logger.warning("[split] gives the %s part no row.", part)
    for task in dataset.tasks:
        place, of_task = f"[tasks.{task.name}]", facts["tasks"][task.name]
        low, high = of_task["labels"] or (0, 1)
        if task.kind == "binary" and dataset.negatives.kind == "none" and low == high:
            logger.warning("%s: all labels are %g; there is nothing to tell apart.", place, low)
        if of_task["out_of_order"]:
            logger.warning(
                "%s: in %s rows the label is 1, but that of %r, which comes first, is 0.",
                place,
                f"{of_task['out_of_order']:,}",
                task.given,
            )
        only_after = of_task["without_event"] and not of_task["counts_without_event"]
        if task.kind == "binary" and task.objective == "joint" and only_after:
            logger.warning(
                "%s: the label is known only where that of %r is 1, and over those rows alone the product of the "
                'two probabilities says nothing of the second. Declare objective = "conditional", which learns it '
                "from these rows, or a label that is 0 in the others.",
                place,
                task.given,
            )
    for task in dataset.tasks:
        if not facts["tasks"][task.name]["training"]:
            raise DataError(f"[tasks.{task.name}]: no row of the training part counts. Expected at least one label.")


def offsets(dataset: Dataset, facts: Mapping[str, Any]) -> dict[str, float]:
    """From where the tasks of numbers start to learn: the mean label, or the logarithm of that of counts."""
    found = {}
    for task in dataset.tasks:
        if task.kind in ("regression", "count"):
            mean = facts["tasks"][task.name]["sum"] / facts["tasks"][task.name]["weight"]
            # Of counts that are all 0, a rate that is nearly 0.
            found[task.name] = round(float(np.log(max(mean, 1e-4))) if task.kind == "count" else mean, 4)
    return found


def describe(prepared: PreparedDataset) -> str:
    """What a preparation made, one line per part: rows, positives, mean labels, commonest classes, new entities.

    New users and items occur in no training row that was not sampled.
    """
    heads = ["part", "rows"]
    shown = {"binary": "positive", "multiclass": "commonest"}
    heads += [f"{shown.get(task.kind, 'mean')} {task.name}" for task in prepared.dataset.tasks]
    sides = [side for side, has in (("user", prepared.has_users), ("item", prepared.has_items)) if has]
    known_items = prepared.known("item")
    lines = [[*heads, *(f"new {side}s" for side in sides)]]
    for part in PARTS:
        rows, new = 0, dict.fromkeys(sides, 0)
        # Of each class, its weight; else of all labels their sum, and that of their weights.
        sums = {task.name: np.zeros(max(len(task.class_names), 2)) for task in prepared.dataset.tasks}
        for bucket in prepared.buckets():
            of_part = bucket.part_rows(part)
            rows += len(of_part)
            for task in prepared.dataset.tasks:
                label = bucket.label(task.name)[of_part].astype(np.float64)
                weight = bucket.weight(task.name)[of_part].astype(np.float64)
                if task.kind == "multiclass":
                    known = label[weight > 0].astype(int)
                    sums[task.name] += np.bincount(known, minlength=len(task.class_names))
                else:
                    weight = weight > 0 if task.kind == "binary" else weight
                    sums[task.name] += (label * weight).sum(), weight.sum()
            for side in sides:
                known = known_items[bucket.item_row] if side == "item" else bucket.known("user")[bucket.user_row]
                new[side] += int((~known[of_part]).sum())
        line = [part, f"{rows:,}"]
        for task in prepared.dataset.tasks:
            numbers = sums[task.name]
            if task.kind == "binary":
                line.append(f"{int(numbers[0]):,}")
            elif task.kind == "multiclass" and numbers.any():
                line.append(f"{task.class_names[numbers.argmax()]} ({numbers.max() / numbers.sum():.1%})")
            else:
                line.append(f"{numbers[0] / numbers[1]:.4g}" if numbers[1] else "none")
        line += [f"{number / rows:.1%}" if rows else "none" for number in new.values()]
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


# Rows of the log


@dataclasses.dataclass(frozen=True)
class Entities:
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


class Rows:
    """The rows of the log in the order of time, user and item, and what belongs to each.

    Args:
        dataset: The declaration.
        tables: Its tables.
        items: All items, where the log has some rows only; the numbers of their rows are not read.
        position: Position of each row among all, ascending, where the log has some rows only.
    """

    def __init__(
        self, dataset: Dataset, tables: Tables, items: Entities | None = None, position: np.ndarray | None = None
    ) -> None:
        self.dataset, self.tables = dataset, tables
        self.position = np.arange(len(tables.tables[LOG])) if position is None else position
        self.log = tables.tables[LOG]
        time = None
        if dataset.source.time is not None:
            time = self.log.times(dataset.source.time, dataset.source.time_unit)
        users = self._entities(USERS, dataset.keys.user, None if dataset.users is None else dataset.users.on)
        if items is None:
            items = self._entities(ITEMS, dataset.keys.item, None if dataset.items is None else dataset.items.on)
        else:
            key = str(dataset.keys.item)
            kind = "string" if items.keys.dtype == pl.String else "integer"
            items = dataclasses.replace(items, of_row=numbers_of(self.log.keys(key, kind), items.keys))
        sort_keys = [entities.of_row for entities in (items, users) if entities is not None]
        if time is not None:
            sort_keys.append(time)
        self.order = np.lexsort(sort_keys) if sort_keys else np.arange(len(self.log))
        self.time = None if time is None else time[self.order]
        # A row without a user key is a user whose number is that of the row.
        if users is None:
            number = self.log.numbers_of_rows
            number = np.arange(len(self.log)) if number is None else number
            users = Entities(pl.Series(number), np.arange(len(self.log)))
        self.users = dataclasses.replace(users, of_row=users.of_row[self.order])
        self.items = None if items is None else dataclasses.replace(items, of_row=items.of_row[self.order])
        self._cache: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.log)

    def _entities(self, name: str, key: str | None, on: str | None) -> Entities | None:
        if key is None:
            return None
        side, on = self.tables.tables.get(name), on or key
        kind = self._key_kind(name, key, side, on)
        keys = self.log.keys(key, kind)
        if side is None:
            distinct = keys.unique().sort()
            return Entities(distinct, numbers_of(keys, distinct))
        distinct = pl.concat([keys, side.unique_keys(on, kind)]) if name == ITEMS else keys
        distinct = distinct.unique().sort()
        side_row = side_rows_of(side, on, distinct)
        of_row = numbers_of(keys, distinct)
        if self.log.whole is None:
            warn_of_lacking(name, int((side_row < 0).sum()), len(np.unique(of_row)), side)
        return Entities(distinct, of_row, side, side_row)

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

    def entities(self, tower: str) -> Entities:
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


def warn_of_lacking(name: str, lacking: int, number: int, side: Table) -> None:
    """Says how many of the users or items of the log a side table lacks."""
    if lacking:
        logger.warning(
            "%s of the %s %s of the log are not in %s: the columns of that table are unknown for them.",
            f"{lacking:,}",
            f"{number:,}",
            name,
            side.source,
        )


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


def side_rows_of(side: Table, on: str, keys: pl.Series) -> np.ndarray:
    """The row of a side table, whose keys are in the column `on`, of each of distinct keys; -1 of those it lacks."""
    number = numbers_of(side.unique_keys(on, "string" if keys.dtype == pl.String else "integer"), keys)
    side_row = np.full(len(keys), -1)
    side_row[number[number >= 0]] = np.flatnonzero(number >= 0)
    return side_row


def numbers_of(values: pl.Series, distinct: pl.Series) -> np.ndarray:
    """The position of each value among distinct ones; -1 of others."""
    positions = pl.DataFrame({"value": distinct, "number": np.arange(len(distinct))})
    joined = values.alias("value").to_frame().join(positions, on="value", how="left", maintain_order="left")
    return joined["number"].fill_null(-1).to_numpy()


def gather(values: pl.Series, rows: np.ndarray) -> pl.Series:
    """The values of these rows; null for -1."""
    index = pl.Series(rows, dtype=pl.Int64)
    return values.gather(index.replace(-1, None) if (rows < 0).any() else index)


# Parts, labels, negatives


def _parts(rows: Rows, log: Log) -> np.ndarray:
    """The part of each row, int8."""
    declared = rows.dataset.split
    if declared.by in ("share_of_time", "random"):
        parts = log.shares[rows.position]
    elif declared.by == "files":
        parts = rows.log.parts()[rows.order]
    elif declared.by == "time":
        parts = split.by_time(rows.moments, *rows.dataset.moments)
    elif declared.by == "per_user":
        parts = split.per_user(rows.users.of_row, rows.moments, split.share_ends(declared))
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
    return parts


def _labels(
    rows: Rows, parts: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Label and weight of each row, per task, 0 and 0 where it does not count; and facts of each task.

    The facts are numbers of rows, sums over the training part, and the lowest and highest label of rows that count.
    """
    labels: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    facts: dict[str, dict[str, Any]] = {}
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
        training, of_label = parts == 0, labels[task.name]
        facts[task.name] = {
            "training": int((weight[training] != 0).sum()),
            "labels": [float(label[counts].min()), float(label[counts].max())] if counts.any() else None,
            "sum": float((of_label[training] * weight[training]).sum()),
            "weight": float(weight[training].sum()),
            **dict.fromkeys(("out_of_order", "without_event", "counts_without_event"), 0),
        }
        if task.given is not None:
            known = weights[task.given] > 0
            without = (labels[task.given] == 0) & known
            facts[task.name] |= {
                "out_of_order": int(((label == 1) & (labels[task.given] != 1) & known).sum()),
                "without_event": int(without.sum()),
                "counts_without_event": int((weight[without] != 0).sum()),
            }
    return labels, weights, facts


def _classes(rows: Rows, task: TaskDeclaration, place: str) -> pl.Series:
    """The index of each row's class, -1 of a label that is none, null where there is no label."""
    index = np.full(len(rows), -1.0)
    for number, value in enumerate(task.classes or ()):
        literal = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)
        index[rows.condition(f"({task.label}) = {literal}", f"{place} label")] = number
    known = rows.condition(f"({task.label}) IS NOT NULL", f"{place} label")
    return pl.Series(np.where(known, index, np.nan)).fill_nan(None)


def _check_labels(rows: Rows, task: TaskDeclaration, label: np.ndarray, counts: np.ndarray) -> None:
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


def _check_size(rows: Rows, numbers: np.ndarray, what: str) -> None:
    wrong = np.abs(numbers) > _LARGEST
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{rows.place(row)}: {what}: expected a number of 32 bits, at most {_LARGEST:.3g}. "
            f"Received: {numbers[row]:g}."
        )


def _row_weights(rows: Rows, column: str, place: str, counts: np.ndarray) -> np.ndarray:
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


def _interactions(rows: Rows, log: Log) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Row of the log, number of the item, and whether it is sampled, of each interaction: rows, each with negatives."""
    declared, items = rows.dataset.negatives, rows.items
    every_row = np.arange(len(rows))
    if declared.kind == "none" or items is None:
        return every_row, None if items is None else items.of_row, np.zeros(len(rows), bool)
    time = np.zeros(len(rows), np.int64) if rows.time is None else rows.time
    catalogue = None if items.side_row is None else items.side_row >= 0
    origin, drawn = negatives.draw(
        *(declared, rows.users.of_row, items.of_row, time, len(items), catalogue, rows.users.keys),
        *((None, None) if log.is_alone else (log.for_negatives, rows.position)),
    )
    origins = np.concatenate([every_row, origin])
    order = np.argsort(origins, kind="stable")
    sampled = (np.arange(len(origins)) >= len(rows))[order]
    return origins[order], np.concatenate([items.of_row, drawn])[order], sampled


# Raw columns


def _encoded_feature(rows: Rows, feature: FeatureDeclaration) -> EncodedFeature:
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


def _natural_kind(rows: Rows, feature: FeatureDeclaration) -> str:
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
        table: The table, where it is another one than the declaration says.
    """

    def __init__(
        self, rows: Rows, declared: FeatureDeclaration, encoded: EncodedFeature, table: Table | None = None
    ) -> None:
        self.feature = encoded
        self.table = table or rows.table_of(declared)
        self.column = _column_of(declared)
        column, missing = self.column, (*declared.missing, *rows.dataset.owner(declared).missing)
        self._values: np.ndarray | Lists | pl.Series
        if encoded.raw == "vector":
            vectors = self.table.vectors(column, encoded.width)
            self._values, self.known = vectors, ~np.isnan(vectors).any(axis=1)
        elif encoded.is_list:
            if declared.weights is not None:
                holder = rows.holder_of(declared, declared.weights, "weights")
                if holder.name != self.table.name:
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


def _users(rows: Rows, features: Mapping[str, EncodedFeature]) -> tuple[EntityTable, np.ndarray, EntityTable]:
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


def _states(rows: Rows, declared: Sequence[FeatureDeclaration], with_time: bool) -> tuple[np.ndarray, np.ndarray]:
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
    for some in _some_of(chosen):
        np.maximum.at(last, entity[some], some)
    return last


class _Histories:
    """Histories of users from the rows of the log.

    Args:
        rows: The rows of the log.
        user: The users asked for.
        moment: The moments before which their rows count.
        inclusive: Whether the rows of these moments count too.
    """

    def __init__(self, rows: Rows, user: np.ndarray, moment: np.ndarray, inclusive: bool) -> None:
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


class Log:
    """All rows of a log, in the order of time, user and item: in memory, or opened bucket by bucket.

    Args:
        dataset: The declaration.
        opened: Gives the rows of the bucket of a number, or all rows.
        items: All items, numbered by row in that order; None where they have no keys.
        time: Moment of each row in that order; None without.
        rows: How many rows there are in buckets; None of a log in memory.
        buckets: How many buckets.
        engine: Who asks the rows of buckets; by default this process.
        array: Makes arrays of a length and a type, which are as long as the log; by default in memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        opened: Callable[[int], Rows],
        items: Entities | None,
        time: np.ndarray | None,
        rows: int | None = None,
        buckets: int = 1,
        engine: Engine | None = None,
        array: Callable[[int, Any], np.ndarray] = np.empty,
    ) -> None:
        self.dataset, self.items, self.time = dataset, items, time
        self._opened, self._buckets, self._engine = opened, buckets, engine or Engine()
        self.array = array
        # Whether all rows are in memory.
        self.is_alone = rows is None
        self._rows = len(opened(0)) if rows is None else rows

    def __len__(self) -> int:
        return self._rows

    @property
    def moments(self) -> np.ndarray:
        """The moment of each row, where the declaration has something that needs it."""
        return _needed(self.time)

    def entities(self) -> Entities:
        """The items, where the declaration has something that needs their keys."""
        if self.items is None:
            raise DeclarationError("Expected the column of the item of each row. Received none: declare [keys] item.")
        return self.items

    def any_rows(self) -> Rows:
        """The rows of a bucket, for what is the same in all of them."""
        return self._opened(0)

    def buckets(self) -> Iterator[Rows]:
        """The rows of each bucket."""
        return map(self._opened, range(self._buckets))

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """The part of each row by its place among all rows, int8."""
        declared = self.dataset.split
        if declared.by == "random":
            return split.by_chance(len(self), split.share_ends(declared), declared.seed)
        return split.by_share_of_time(self.moments, split.share_ends(declared))

    @functools.cached_property
    def for_negatives(self) -> negatives.Log:
        """What negatives are drawn from."""
        items = self.entities()
        time = np.zeros(len(self), np.int64) if self.time is None else self.time
        return negatives.Log(time, items.of_row, len(items))

    def every(self, ask: Callable[[Rows], Sequence[np.ndarray | None]]) -> list[np.ndarray | None]:
        """Columns with an entry for each row, in order, from what is said of the rows of each bucket in theirs."""
        if self.is_alone:
            return list(ask(self.any_rows()))
        answer: list[np.ndarray | None] = []
        said = self._engine.map(functools.partial(_said_of_bucket, self._opened, ask), range(self._buckets))
        for position, columns in said:
            if not answer:
                answer = [None if column is None else self.array(len(self), column.dtype) for column in columns]
            for whole, column in zip(answer, columns, strict=True):
                if whole is not None:
                    whole[position] = column
        return answer

    def table_at(self, position: np.ndarray, columns: Sequence[str]) -> Table:
        """Some columns of some rows, `(n,)` by position; a row of nulls for -1."""
        numbered = {column: f"column {number}" for number, column in enumerate(columns)}
        found, table = [], None
        for rows in self.buckets():
            table = table or copy.copy(rows.log)
            place = np.minimum(np.searchsorted(rows.position, position), len(rows) - 1)
            here = np.flatnonzero(rows.position[place] == position)
            stored = rows.order[place[here]]
            values = {name: gather(rows.log.series(column), stored) for column, name in numbered.items()}
            found.append(pl.DataFrame({"number": here, **values}, schema_overrides={"number": pl.Int64}))
        joined = pl.DataFrame({"number": np.arange(len(position))}).join(
            pl.concat(found), on="number", how="left", maintain_order="left"
        )
        if table is None:
            raise ValueError("Expected a log of at least one bucket.")
        table.frame = pl.DataFrame([joined[name].alias(column) for column, name in numbered.items()])
        return table


def _said_of_bucket(
    opened: Callable[[int], Rows], ask: Callable[[Rows], Sequence[np.ndarray | None]], number: int
) -> tuple[np.ndarray, Sequence[np.ndarray | None]]:
    rows = opened(number)
    return rows.position, ask(rows)


def needs_moments(rows: Rows) -> bool:
    """Whether the moments of interactions decide on the states of their items."""
    declared = rows.dataset.of_tower("item")
    return any(
        (f.statistic is not None and f.statistic.until == "row")
        or (f.source_column is not None and rows.table_of(f).name == LOG)
        for f in declared
    )


def items_of(
    log: Log,
    features: Mapping[str, EncodedFeature],
    parts: np.ndarray,
    item: np.ndarray | None,
    time: np.ndarray | None,
) -> tuple[EntityTable, np.ndarray, np.ndarray]:
    """All item states, the state of each interaction, and the rows of the latest states; not encoded.

    Args:
        log: The log.
        features: How features are encoded.
        parts: Part of each row of the log.
        item: Number of the item of each interaction; None where items have no keys.
        time: Moment of each interaction; not read unless `needs_moments`.
    """
    declared, rows = log.dataset.of_tower("item"), log.any_rows()
    if log.items is None or item is None:
        return _items_without_keys(
            rows, {f.name: _Column(rows, f, features[f.name]) for f in declared if f.source_column}
        )
    of_log = [f for f in declared if f.source_column and rows.table_of(f).name == LOG]
    counted = [(f, f.statistic, f"[features.{f.name}] statistic") for f in declared if f.statistic is not None]
    answers = log.every(functools.partial(_values_of_statistics, [(one, place) for _, one, place in counted]))
    asked = [
        _Asked(feature, statistic, _flags(chosen), values)
        for (feature, statistic, _), chosen, values in zip(counted, answers[::2], answers[1::2], strict=True)
    ]
    moving = [one for one in asked if one.statistic.until == "row"]
    states = _item_states(log, moving, item, time, _first_seen(log, parts) if of_log else None)
    raw: Raw = {}
    for feature in declared:
        if feature.source_column is None:
            continue
        encoded = features[feature.name]
        if feature in of_log:
            raw |= _raw_of_log(log, feature, encoded, parts, states)
            continue
        column = _Column(rows, feature, encoded)
        raw |= column.take(states.item if column.table.name == KEYS else rows.side_rows("item")[states.item])
    numbers = {one.feature.name: found for one, found in zip(moving, states.numbers, strict=True)}
    for one in asked:
        name = one.feature.name
        if one.statistic.until == "training":
            numbers[name] = _frozen(log, one, parts)[states.item]
        raw[name] = _whole(numbers[name]) if features[name].raw == "integer" else numbers[name]
    raw = {name: raw[name] for f in declared for name in features[f.name].raw_inputs}
    key = _filled(log.items.keys, "string" if log.items.keys.dtype == pl.String else "integer")
    table = EntityTable("item", key[states.item], {}, raw, _names(log, parts, key, states.item), states.time)
    return table, states.of_interaction, states.latest


def _raw_of_log(
    log: Log, feature: FeatureDeclaration, encoded: EncodedFeature, parts: np.ndarray, states: _ItemStates
) -> Raw:
    """The raw columns of an item feature that is a column of the log, per state."""
    (known,) = log.every(functools.partial(_known_rows, feature, encoded))
    columns = [name for name in (feature.source_column, feature.weights) if name is not None]
    table = log.table_at(_rows_of_items(log, _flags(known), parts), columns)
    _warn_of_varying(log, encoded, table, columns[0], _flags(known))
    return _Column(log.any_rows(), feature, encoded, table).take(np.where(states.unseen, -1, states.item))


def _known_rows(feature: FeatureDeclaration, encoded: EncodedFeature, rows: Rows) -> list[np.ndarray]:
    return [_Column(rows, feature, encoded).known[rows.order]]


def _flags(known: np.ndarray | None) -> np.ndarray:
    if known is None:
        raise ValueError("Expected a flag for each row. Received nothing")
    return known


def _warn_of_varying(log: Log, feature: EncodedFeature, table: Table, column: str, known: np.ndarray) -> None:
    """Warns where rows of an item have another value of an item feature than the one that the item gets."""
    differs, of_item = 0, table.series(column)
    for rows in log.buckets():
        stored = gather(rows.log.series(column), rows.order)
        other = stored.ne_missing(of_item.gather(rows.entities("item").of_row)).to_numpy()
        differs += int((known[rows.position] & other).sum())
    if differs:
        logger.warning(
            "[features.%s]: %s of the rows have another value than the one that their item gets, that of its last row "
            "in the training part. What varies within an item may be a feature of the user tower with "
            "context = true, or a `statistic`.",
            feature.name,
            f"{differs / known.sum():.1%}",
        )


def _whole(values: np.ndarray) -> np.ndarray:
    """Numbers as whole ones, the nearest; NaN is unknown."""
    return np.where(np.isnan(values), RAW_UNKNOWN["integer"], np.round(np.nan_to_num(values))).astype(np.int64)


def _items_without_keys(rows: Rows, columns: Mapping[str, _Column]) -> tuple[EntityTable, np.ndarray, np.ndarray]:
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


def _rows_of_items(log: Log, known: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The row of the log that says what is known of each item; -1 without one.

    It is the item's last row in the training part that says anything, else its first row: nothing later than needed.
    """
    items = log.entities()
    said = _last_rows(items.of_row, known & (parts == 0), len(items))
    first = np.full(len(items), len(log))
    for some in _blocks(len(log)):
        np.minimum.at(first, items.of_row[some], np.arange(some.start, some.stop))
    return np.where(said >= 0, said, np.where(first < len(log), first, -1))


def _first_seen(log: Log, parts: np.ndarray) -> np.ndarray | None:
    """The moment before which nothing may be known of each item from the log, `(M,)`; None without moments.

    What the training part knows of an item is known of it everywhere, as vocabularies are.
    """
    if log.time is None:
        return None
    items, always, never = log.entities(), np.iinfo(np.int64).min, np.iinfo(np.int64).max
    first = np.full(len(items), never)
    for some in _blocks(len(log)):
        np.minimum.at(first, items.of_row[some], log.time[some])
    for some in _blocks(len(log)):
        first[items.of_row[some][parts[some] == 0]] = always
    return np.where(first == never, always, first)


def _names(log: Log, parts: np.ndarray, key: np.ndarray, item: np.ndarray) -> np.ndarray | None:
    name = log.dataset.keys.item_name
    if name is None:
        return None
    rows = log.any_rows()
    table = rows.tables.holder(name, (ITEMS, LOG), "[keys] item_name")
    if table.name == ITEMS:
        names = gather(table.scalars(name, "string"), rows.side_rows("item"))
    else:
        (known,) = log.every(functools.partial(_named_rows, name))
        names = log.table_at(_rows_of_items(log, _flags(known), parts), [name]).scalars(name, "string")
    return np.array([str(key) if name is None else name for name, key in zip(names, key, strict=True)], object)[item]


def _named_rows(name: str, rows: Rows) -> list[np.ndarray]:
    return [rows.log.scalars(name, "string").is_not_null().to_numpy()[rows.order]]


def _values_of_statistics(declared: Sequence[tuple[Statistic, str]], rows: Rows) -> list[np.ndarray | None]:
    return [column for statistic, place in declared for column in _statistic_values(rows, statistic, place)]


def _statistic_values(rows: Rows, declared: Statistic, place: str) -> tuple[np.ndarray, np.ndarray | None]:
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


class _Asked(NamedTuple):
    """The statistic of a feature, which rows of the log count for it, and the number of each; None to count them."""

    feature: FeatureDeclaration
    statistic: Statistic
    chosen: np.ndarray
    values: np.ndarray | None


def _frozen(log: Log, asked: _Asked, parts: np.ndarray) -> np.ndarray:
    """A statistic of the rows of the training part, of which some count, one number per item."""
    declared, chosen, values = asked.statistic, asked.chosen & (parts == 0), asked.values
    items, number = log.entities(), len(log.entities())
    total, counts = np.zeros(number), np.zeros(number, np.int64)
    sums = None if values is None else np.zeros(number)
    now = half_life = None
    if declared.half_life is not None:
        half_life, time = expressions.duration_ms(declared.half_life), log.moments
        now = np.full(number, max(time[some].max() for some in _some_of(parts == 0) if len(some)))
        if values is not None:
            # A mean does not change with time; by the age since the item's own last row, no sum of weights is 0.
            now = np.full(number, time.min())
            for some in _some_of(chosen):
                np.maximum.at(now, items.of_row[some], time[some])
    # In the order of the rows, as one sum would be.
    for some in _some_of(chosen):
        item = items.of_row[some]
        weights = 1.0 if now is None or half_life is None else np.exp2((log.moments[some] - now[item]) / half_life)
        counts += np.bincount(item, minlength=number)
        np.add.at(total, item, weights)
        if sums is not None and values is not None:
            np.add.at(sums, item, weights * values[some])
    with np.errstate(invalid="ignore", divide="ignore"):
        answer = total if sums is None else sums / total
    return np.where(counts > 0, answer, np.nan).astype(np.float32)


def _some_of(chosen: np.ndarray) -> Iterator[np.ndarray]:
    """The chosen rows, some at a time: copies of what belongs to all of them would be the most that memory holds."""
    return (some.start + np.flatnonzero(chosen[some]) for some in _blocks(len(chosen)))


class _ItemStates(NamedTuple):
    """The states of items: one per item, or with statistics at a point in time one per item and change of them.

    Attributes:
        item: Number of the item of each state; ordered by item, then by time.
        unseen: Whether nothing is known from the log in each state: a negative may be drawn before its first row.
        time: From when on each state is seen; None without statistics at a point in time.
        of_interaction: State of each interaction.
        latest: The latest state of each item.
        numbers: Of each statistic at a point in time its number in each state.
    """

    item: np.ndarray
    unseen: np.ndarray
    time: np.ndarray | None
    of_interaction: np.ndarray
    latest: np.ndarray
    numbers: Sequence[np.ndarray]


def _item_states(
    log: Log, moving: Sequence[_Asked], item: np.ndarray, time: np.ndarray | None, first_seen: np.ndarray | None
) -> _ItemStates:
    """The states of all items, made of some items at a time: what they depend on are the rows of each.

    Args:
        log: The log.
        moving: The statistics at a point in time.
        item: Number of the item of each interaction.
        time: Moment of each interaction.
        first_seen: Moment before which nothing is known of each item from the log; None where nothing is asked of it.
    """
    owner, items = log.entities().of_row, np.arange(len(log.entities()))
    if not moving and (
        first_seen is None or all((_needed(time)[some] >= first_seen[item[some]]).all() for some in _blocks(len(item)))
    ):
        return _ItemStates(items, np.zeros(len(items), bool), None, item, items, ())
    time, times = _needed(time), log.moments
    ends = int(times.min()), int(times.max())
    of_interaction, found, made = log.array(len(item), np.int32), list[_ItemStates](), 0
    for some in _some_items(owner, item, len(items)):
        rows, interactions = _within(owner, some), _within(item, some)
        asked = [
            one._replace(chosen=one.chosen[rows], values=None if one.values is None else one.values[rows])
            for one in moving
        ]
        of_some = _states_of_some(
            history.Events(owner[rows] - some.start, times[rows]),
            asked,
            item[interactions] - some.start,
            time[interactions],
            ends,
            np.full(some.stop - some.start, ends[0]) if first_seen is None else first_seen[some],
        )
        of_interaction[interactions] = made + of_some.of_interaction
        moved = {"item": some.start + of_some.item, "latest": made + of_some.latest, "of_interaction": of_interaction}
        made += len(of_some.item)
        found.append(of_some._replace(**moved))
    return _ItemStates(
        np.concatenate([one.item for one in found]),
        np.concatenate([one.unseen for one in found]),
        np.concatenate([_needed(one.time) for one in found]),
        of_interaction,
        np.concatenate([one.latest for one in found]),
        [np.concatenate(numbers) for numbers in zip(*(one.numbers for one in found), strict=True)],
    )


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS_AT_A_TIME, rows)) for start in range(0, rows, _ROWS_AT_A_TIME))


def _some_items(owner: np.ndarray, asked: np.ndarray, items: int) -> Iterator[slice]:
    """Ranges of items that have about `_ROWS_AT_A_TIME` rows and questions together, or are one item with more.

    There are at most about a hundred ranges, because all rows are read for each.
    """
    counts, most = np.zeros(items, np.int64), max(_ROWS_AT_A_TIME, (len(owner) + len(asked)) // 100)
    for column in (owner, asked):
        for some in _blocks(len(column)):
            counts += np.bincount(column[some], minlength=items)
    ends, begin = np.cumsum(counts), 0
    while begin < items:
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(begin, end)
        begin = end


def _within(column: np.ndarray, numbers: slice) -> np.ndarray:
    """The rows whose number is in a range."""
    found = [
        some.start + np.flatnonzero((column[some] >= numbers.start) & (column[some] < numbers.stop))
        for some in _blocks(len(column))
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _states_of_some(
    events: history.Events,
    moving: Sequence[_Asked],
    item: np.ndarray,
    time: np.ndarray,
    ends: tuple[int, int],
    first_seen: np.ndarray,
) -> _ItemStates:
    """As `_item_states`, of the items whose rows are the events.

    Args:
        events: The rows.
        moving: The statistics at a point in time, with an entry for each row.
        item: Number of the item of each interaction.
        time: Moment of each interaction.
        ends: The first and the last moment of the whole log.
        first_seen: Moment before which nothing is known of each item.
    """
    items = np.arange(len(first_seen))
    # Every interaction asks for a state, and every item for its latest one, of all rows.
    asked = np.concatenate([item, items])
    moment = np.concatenate([time, np.full(len(items), ends[1])])
    inclusive = np.arange(len(asked)) >= len(item)
    unseen = ~inclusive & (moment < first_seen[asked])
    keys = [asked, ~unseen]
    seen: dict[str | None, np.ndarray] = {}
    for every in dict.fromkeys(one.statistic.every for one in moving):
        last_change = moment
        if every is not None:
            step = expressions.duration_ms(every)
            last_change = ends[0] + (moment - ends[0]) // step * step
        seen[every] = np.where(inclusive, moment, last_change)
        if any(one.statistic.half_life for one in moving if one.statistic.every == every):
            keys.append(2 * seen[every] + inclusive)
        else:
            # Nothing changes between two rows of an item.
            keys.append(events.before(asked, seen[every], inclusive=inclusive).end)
    order = np.lexsort((moment, inclusive, *keys[::-1]))
    sorted_keys = np.stack([key[order] for key in keys])
    new = np.concatenate([[True], (sorted_keys[:, 1:] != sorted_keys[:, :-1]).any(axis=0)])
    number = np.empty(len(asked), np.int64)
    number[order] = np.cumsum(new) - 1
    first = order[new]
    numbers = [
        _moving(one, events, events.before(asked[first], seen[one.statistic.every][first], inclusive=inclusive[first]))
        for one in moving
    ]
    return _ItemStates(asked[first], unseen[first], moment[first], number[: len(item)], number[len(item) :], numbers)


def _moving(asked: _Asked, events: history.Events, spans: history.Spans) -> np.ndarray:
    """A statistic of the rows before each state, of which some count, float32; NaN without one."""
    chosen = asked.chosen[events.row]
    spans, owner = spans.of(chosen), events.owner[chosen]
    values = None if asked.values is None else asked.values[events.row[chosen]]
    if asked.statistic.half_life is not None:
        half_life = expressions.duration_ms(asked.statistic.half_life)
        return history.decayed(spans, owner, events.time[chosen], values, half_life)
    if values is not None:
        return history.mean(spans, values)
    counts = history.count(spans)
    return np.where(counts > 0, counts, np.float32(np.nan))
