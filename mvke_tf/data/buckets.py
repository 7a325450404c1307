# SPDX-License-Identifier: Apache-2.0
"""Preparation of a log that does not fit into memory, bucket by bucket: the same rows, values and encoder as in memory.

All rows of a user are in one bucket, in which histories, parts, negatives and user states are made as in memory. Of
the whole log, files hold what takes a few bytes per row: moments, items and places of the rows in its order, and the
columns of the statistics of items while these are made. They are mapped into memory, whose pages the system takes back
when it is short of them.

Every step writes a folder or a file that appears when it is complete, so that an interrupted preparation goes on with
what it has, and ends with the same bytes. What is done bucket by bucket is done by the workers of an engine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mvke_tf.data import groups, negatives, store
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.encoder import EncodedFeature, Encoder, Learner
from mvke_tf.data.preparation import (
    Entities,
    Log,
    Piece,
    Rows,
    check_facts,
    encoded,
    encoded_features,
    features_of_encoder,
    items_of,
    needs_moments,
    numbers_of,
    offsets,
    side_rows_of,
    warn_of_lacking,
)
from mvke_tf.data.scatter import Buckets, for_workers, scatter
from mvke_tf.data.store import EntityTable, PreparedDataset, bucket_name
from mvke_tf.data.tables import ITEMS, LOG, USERS, named_sources, names_the_declaration
from mvke_tf.engine import Engine, EngineError
from mvke_tf.errors import DataError, MvkeError
from mvke_tf.io import (
    append_array,
    array_file,
    atomic_write,
    discard,
    on_disk,
    read_json,
    try_lock,
    write_array,
    write_json,
)

logger = logging.getLogger(__name__)

MIB = 2**20
# What a process needs before its first row.
_PROCESS = 1024 * MIB
# Bytes that a row takes while it is prepared, and more for each slot of the features of a user, and for each sampled
# negative; measured with benchmarks/scale.py.
_ROW, _SLOT, _NEGATIVE = 400, 30, 100
# A bucket takes so much of the memory that there is for rows: the rest is for what is known of all rows, and training
# holds several buckets at once.
_SHARE = 1 / 8
# Files that a process may have open.
_MOST_BUCKETS = 512
_ROWS_AT_A_TIME = 1 << 22


def number_of_buckets(dataset: Dataset, memory_mb: int | None = None) -> int:
    """How many buckets a dataset is prepared in; 1 for one that is prepared in memory.

    Args:
        dataset: The declaration.
        memory_mb: Memory that the preparation may take, in MiB; by default half of the machine's.

    Raises:
        DataError: If a file cannot be read.
    """
    rows = named_sources(dataset)[0][LOG].size()
    slots = sum(max(feature.length, feature.width) for feature in dataset.of_tower("user"))
    drawn = 0 if dataset.negatives.kind == "none" else dataset.negatives.per_positive
    needed = rows * (_ROW + _SLOT * slots + _NEGATIVE * drawn)
    budget = memory_mb * MIB if memory_mb else _machine_memory() // 2
    available = max(budget - _PROCESS, budget // 4)
    if needed <= available:
        return 1
    if dataset.keys.item is None and dataset.of_tower("item"):
        logger.warning(
            "%s has features of items and no [keys] item: the log is prepared in memory, and takes about %s MB of it.",
            *(dataset.name, f"{needed / 1e6:,.0f}"),
        )
        return 1
    return min(math.ceil(needed / (available * _SHARE)), _MOST_BUCKETS)


def _machine_memory() -> int:
    """Bytes that this machine, or the container, has."""
    limits = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):
            limits.append(int(Path(path).read_text(encoding="utf-8")))
    # Of a system that does not say.
    return min(limits, default=16 * 1024 * MIB)


@names_the_declaration
def prepare_in_buckets(
    dataset: Dataset, folder: Path, fingerprint: str, buckets: int, engine: Engine | None = None
) -> None:
    """Prepares a dataset bucket by bucket, or goes on with that.

    Args:
        dataset: The declaration.
        folder: Where the prepared dataset is to lie; one that exists is replaced. What is written meanwhile is in a
            folder beside it, `<folder>.unfinished`.
        fingerprint: Digest of the contents of the tables.
        buckets: How many.
        engine: Who prepares them; by default this process.

    Raises:
        DataError: If the tables cannot be read or do not fit the declaration, or another process is at it.
        EngineError: If workers are killed again and again.
        DeclarationError: See `mvke_tf.data.preparation.prepare`.
    """
    work = _unfinished(folder)
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "a", encoding="utf-8") as lock:
        if not try_lock(lock):
            raise DataError(f"{folder} is being prepared by another process. Wait for it, or end it.")
        made_of = store.digest(dataset, fingerprint, store.IN_BUCKETS, buckets)
        about = work / "made_of.json"
        if not about.is_file() or read_json(about) != made_of:
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            write_json(about, made_of)
        logger.info("Preparing %s in %d buckets of users in %s ...", dataset.name, buckets, work)
        try:
            _Preparation.begin(dataset, work, buckets, engine or Engine()).run(folder, fingerprint)
        except EngineError:
            # With fewer workers it goes on.
            raise
        except MvkeError:
            # Tables or declaration have to change first.
            discard(work)
            raise
        discard(work)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + ".unfinished")


def name_unfinished(folder: Path, name: str) -> None:
    """Says which preparations of a dataset of this name, but for that of `folder`, lie beside it and take space."""
    for work in sorted(folder.parent.glob(f"{name}-*.unfinished")):
        if work != _unfinished(folder):
            logger.info("%s: an interrupted preparation of other tables. Delete it to free its space.", work)


def remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed at its very end has left beside a prepared dataset."""
    work = _unfinished(folder)
    if work.is_dir():
        with open(work / ".lock", "a", encoding="utf-8") as lock:
            if try_lock(lock):
                discard(work)


class _Preparation:
    """The steps of a preparation in buckets; in a worker, which opens what is in the folder, those of one bucket.

    Args:
        dataset: The declaration.
        work: The folder for what is written meanwhile, in which the log lies in buckets and is ordered.
        engine: Who does the steps of single buckets; by default this process.
    """

    def __init__(self, dataset: Dataset, work: Path, engine: Engine | None = None) -> None:
        self.dataset, self.work, self._engine = dataset, work, engine or Engine()
        self.buckets = Buckets(dataset, work / "tables")
        self._order = read_json(work / "order" / "order.json")
        self._starts = np.concatenate([[0], np.cumsum(self.buckets.rows)])

    @classmethod
    def begin(cls, dataset: Dataset, work: Path, number: int, engine: Engine) -> _Preparation:
        """Spreads the log over buckets and orders it; buckets without a row are left out."""
        if not (work / "tables").is_dir():
            with _bar("Spreading the log", named_sources(dataset)[0][LOG].size()) as done:
                scatter(dataset, work / "tables", number, done)
        if not (work / "order").is_dir():
            buckets = Buckets(dataset, work / "tables")
            with _bar("Ordering its rows", sum(buckets.rows)) as done:
                _order(buckets, work / "order", engine, done)
        return cls(dataset, work, engine)

    def __reduce__(self) -> tuple:
        return type(self), (for_workers(self.dataset), self.work.absolute())

    @functools.cached_property
    def log(self) -> Log:
        """The whole log."""
        return Log(
            self.dataset,
            self.rows,
            self._items(),
            self._ordered("time"),
            int(self._starts[-1]),
            len(self.buckets),
            self._engine,
            functools.partial(on_disk, self.work),
        )

    def _ordered(self, name: str) -> np.ndarray | None:
        path = self.work / "order" / f"{name}.npy"
        return np.load(path, mmap_mode="r") if path.is_file() else None

    def _items(self) -> Entities | None:
        path, item = self.work / "order" / "items.parquet", self._ordered("item")
        if item is None:
            return None
        keys, side = pl.read_parquet(path)["key"], self.buckets.items
        return Entities(keys, item, side, None if side is None else side_rows_of(side, _on(self.dataset), keys))

    def rows(self, number: int) -> Rows:
        """The rows of one bucket."""
        position = self._ordered("position")
        if position is None:
            raise DataError(f"{self.work} is damaged. Delete it and prepare again.")
        span = slice(self._starts[number], self._starts[number + 1])
        return Rows(self.dataset, self.buckets.tables(number), self.log.items, np.asarray(position[span]))

    def run(self, folder: Path, fingerprint: str) -> None:
        """Does what has not been done yet."""
        features = encoded_features(self.rows(0))
        facts = self._make_pieces(features)
        check_facts(self.dataset, facts)
        if facts["rows_without_negatives"] == len(self.log):
            raise DataError(
                "[negatives]: up to the moment of each row its user has had all items. Expected a row that has one to "
                "draw. Declare the items in [tables.items], or future = true."
            )
        if facts["rows_without_negatives"]:
            negatives.warn_of_rows_without(facts["rows_without_negatives"], len(self.log))
        if USERS in self.buckets.tables(0).tables:
            lacking = self._order["lacking"], self._order["users"], self.buckets.tables(0).tables[USERS]
            warn_of_lacking(USERS, *lacking)
        if self.log.items is not None and self.log.items.side_row is not None and self.buckets.items is not None:
            occurring = np.unique(self.log.items.of_row).size
            warn_of_lacking(ITEMS, int((self.log.items.side_row < 0).sum()), occurring, self.buckets.items)
        items, item_rows, catalogue = self._make_items(features, facts["interactions"])
        encoder = self._learn(features, facts, items, item_rows)
        items = encoded(encoder, items)
        self._encode(encoder, item_rows, facts)
        with atomic_write(folder) as temporary:
            self._write(temporary, folder, fingerprint, encoder, items, catalogue, facts)
            if self.dataset.groups is not None:
                # A group that cannot be made is known before anything is trained.
                groups.groups(PreparedDataset.load(temporary).bucket(0))

    def _piece(self, number: int) -> Path:
        return self.work / "pieces" / bucket_name(number)

    def _make_pieces(self, features: Mapping[str, EncodedFeature]) -> dict[str, Any]:
        """Makes the piece of each bucket; returns what is known of all of them together."""
        every: list[dict[str, Any]] = []
        with _bar("Preparing", len(self.log)) as done:
            for facts in self._engine.map(functools.partial(self._make_piece, features), range(len(self.buckets))):
                done(self.buckets.rows[len(every)])
                every.append(facts)
        together: dict[str, Any] = {
            "parts": np.sum([one["parts"] for one in every], axis=0).tolist(),
            "rows_without_negatives": sum(one["rows_without_negatives"] for one in every),
            "lengths": every[0]["lengths"],
            **{name: [one[name] for one in every] for name in store.IN_A_BUCKET},
            "tasks": {},
        }
        for task in self.dataset.task_names:
            of_task = [one["tasks"][task] for one in every]
            numbers = {name: sum(one[name] for one in of_task) for name in of_task[0] if name != "labels"}
            ends = [end for one in of_task for end in one["labels"] or ()]
            together["tasks"][task] = numbers | {"labels": [min(ends), max(ends)] if ends else None}
        return together

    def _make_piece(self, features: Mapping[str, EncodedFeature], number: int) -> dict[str, Any]:
        if not self._piece(number).is_dir():
            rows = self.rows(number)
            with atomic_write(self._piece(number)) as temporary:
                self._write_piece(temporary, Piece.of(rows, self.log, features), features)
        return read_json(self._piece(number) / "facts.json")

    def _write_piece(self, folder: Path, piece: Piece, features: Mapping[str, EncodedFeature]) -> None:
        of_users = [features[feature.name] for feature in self.dataset.of_tower("user")]
        lengths: dict[str, int] = {}
        for name, table in (("users", piece.users), ("latest_users", piece.latest_users)):
            lengths |= store.write_raw(folder / name, table, of_users)
        columns = {"user_row": piece.user_row, "split": piece.split, "sampled": piece.sampled}
        columns |= {"item": np.zeros(len(piece.split), np.int32) if piece.item is None else piece.item}
        columns |= {} if piece.time is None else {"time": piece.time}
        for kind, of_tasks in (("label", piece.labels), ("weight", piece.weights)):
            columns |= {f"{kind}:{task}": np.asarray(column, np.float32) for task, column in of_tasks.items()}
        store.write_columns(folder / "rows.parquet", columns)
        write_array(folder / "parts.npy", piece.parts)
        facts = piece.facts | {"lengths": lengths, "interactions": len(piece.split)}
        facts |= {"users": len(piece.users), "latest_users": len(piece.latest_users)}
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    def _columns(self, number: int, *names: str) -> list[np.ndarray]:
        frame = pl.read_parquet(self._piece(number) / "rows.parquet", columns=list(names))
        return [frame[name].to_numpy() for name in names]

    def _make_items(
        self, features: Mapping[str, EncodedFeature], interactions: Sequence[int]
    ) -> tuple[EntityTable, list[np.ndarray], np.ndarray]:
        """Items, not encoded; the item state of each interaction of each bucket; the latest states."""
        numbers = range(len(self.buckets))
        if self.log.items is None:
            items, _, catalogue = items_of(self.log, features, np.zeros(0, np.int8), None, None)
            return items, [np.zeros(number, np.int32) for number in interactions], catalogue
        parts = on_disk(self.work, len(self.log), np.int8)
        for number in numbers:
            position = self._ordered("position")
            if position is not None:
                span = slice(self._starts[number], self._starts[number + 1])
                parts[position[span]] = np.load(self._piece(number) / "parts.npy")
        ends = np.cumsum(interactions)
        spans = [slice(end - size, end) for end, size in zip(ends.tolist(), interactions, strict=True)]
        item, time = on_disk(self.work, sum(interactions), np.int32), None
        if self.log.time is not None and needs_moments(self.rows(0)):
            time = on_disk(self.work, len(item), np.int64)
        for number, span in enumerate(spans):
            item[span] = self._columns(number, "item")[0]
            if time is not None:
                time[span] = self._columns(number, "time")[0]
        items, item_row, catalogue = items_of(self.log, features, parts, item, time)
        return items, np.split(item_row.astype(np.int32, copy=False), ends[:-1]), catalogue

    def _learn(
        self,
        features: Mapping[str, EncodedFeature],
        facts: Mapping[str, Any],
        items: EntityTable,
        item_rows: Sequence[np.ndarray],
    ) -> Encoder:
        learner = Learner(features_of_encoder(self.dataset, features))
        item_counts = np.zeros(len(items.key), np.int64)
        learn = functools.partial(self._learn_bucket, learner.features, facts, len(items.key))
        with _bar("Learning values", len(self.log)) as done:
            for number, (of_bucket, counts) in enumerate(self._engine.map(learn, enumerate(item_rows))):
                learner.join(of_bucket)
                item_counts += counts
                done(self.buckets.rows[number])
        learner.add("item", items.raw, np.flatnonzero(item_counts), item_counts)
        return learner.encoder()

    def _learn_bucket(
        self, features: Sequence[EncodedFeature], facts: Mapping[str, Any], items: int, bucket: tuple[int, np.ndarray]
    ) -> tuple[Learner, np.ndarray]:
        """What is learned from the users of a bucket, and the number of training rows of each item state in it."""
        (number, item_row), learner, order = bucket, Learner(features), self._ordered("users")
        states = facts["users"][number]
        user_row, split, sampled = self._columns(number, "user_row", "split", "sampled")
        training = (split == 0) & ~sampled
        counts = np.bincount(user_row[training], minlength=states)
        place = self._piece(number) / "users"
        key = store.keys_columns(place, states).read("key")
        # States are in the order of users; a user without a key is a row, whose number is its key.
        user = key
        if order is not None:
            start = sum(facts["latest_users"][:number])
            user = order[start + np.concatenate([[0], np.cumsum(key[1:] != key[:-1])])]
        of_users = [feature for feature in features if feature.tower == "user"]
        raw = store.raw_columns(place, states, of_users, facts["lengths"])
        learner.add("user", raw, np.flatnonzero(counts), counts, user)
        return learner, np.bincount(item_row[training], minlength=items)

    def _encode(self, encoder: Encoder, item_rows: Sequence[np.ndarray], facts: Mapping[str, Any]) -> None:
        with _bar("Encoding", len(self.log)) as done:
            encode = functools.partial(self._encode_bucket, encoder, facts)
            for number, _ in enumerate(self._engine.map(encode, enumerate(item_rows))):
                done(self.buckets.rows[number])

    def _encoded(self, number: int) -> Path:
        return self.work / "encoded" / bucket_name(number)

    def _encode_bucket(self, encoder: Encoder, facts: Mapping[str, Any], bucket: tuple[int, np.ndarray]) -> None:
        number, item_row = bucket
        if not self._encoded(number).is_dir():
            with atomic_write(self._encoded(number)) as temporary:
                self._write_bucket(temporary, number, encoder, item_row, facts)

    def _write(
        self,
        temporary: Path,
        folder: Path,
        fingerprint: str,
        encoder: Encoder,
        items: EntityTable,
        catalogue: np.ndarray,
        facts: Mapping[str, Any],
    ) -> None:
        """Writes the prepared dataset of the encoded buckets."""
        temporary.mkdir()
        for number in range(len(self.buckets)):
            shutil.copytree(self._encoded(number), temporary / bucket_name(number), copy_function=_linked)
        lengths = dict(facts["lengths"]) | store.write_raw(temporary / "items", items, encoder.of_tower("item"))
        store.write_encoded(temporary / "items", items, packed=True)
        buckets = [
            dict(zip(store.IN_A_BUCKET, rows, strict=True))
            for rows in zip(*(facts[name] for name in store.IN_A_BUCKET), strict=True)
        ]
        store.write_rest(
            *(temporary, folder, self.dataset, encoder, fingerprint, catalogue, offsets(self.dataset, facts)),
            rows={"items": len(items.key), **{name: sum(facts[name]) for name in store.IN_A_BUCKET}},
            lengths=lengths,
            version=store.IN_BUCKETS,
            buckets=buckets,
        )

    def _write_bucket(
        self, folder: Path, number: int, encoder: Encoder, item_row: np.ndarray, facts: Mapping[str, Any]
    ) -> None:
        for name in ("users", "latest_users"):
            place, rows = self._piece(number) / name, facts[name][number]
            (folder / name).mkdir(parents=True)
            for file in ("keys.parquet", "raw.parquet"):
                _linked(place / file, folder / name / file)
            raw = store.raw_columns(place, rows, encoder.of_tower("user"), facts["lengths"])
            table = EntityTable("user", np.zeros(rows, np.int8), encoder.encode_numpy(raw, "user", rows), {})
            if name == "users":
                store.write_shared(folder / name, table)
            else:
                store.write_encoded(folder / name, table, packed=True)
        tasks = self.dataset.task_names
        user_row, split, sampled = self._columns(number, "user_row", "split", "sampled")
        labels, weights = (
            dict(zip(tasks, self._columns(number, *(f"{kind}:{task}" for task in tasks)), strict=True))
            for kind in ("label", "weight")
        )
        time = self._columns(number, "time")[0] if self.log.time is not None else None
        columns = store.interaction_columns(self.dataset, user_row, item_row, split, labels, weights, time, sampled)
        store.write_columns(folder / store.INTERACTIONS, columns)


def _linked(source: Any, target: Any) -> None:
    """Gives a file another name, or copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _on(dataset: Dataset) -> str:
    """The column of the key in the table of items."""
    return str((dataset.items and dataset.items.on) or dataset.keys.item)


def _keys_of(buckets: Buckets, number: int) -> tuple[dict[str, np.ndarray], dict[str, pl.Series], int]:
    """What rows of a bucket are ordered by, the users and items that it numbers, and the users without a side row."""
    rows = Rows(buckets.dataset, buckets.tables(number))
    keys: dict[str, np.ndarray] = {} if rows.time is None else {"time": rows.time}
    named: dict[str, pl.Series] = {}
    if buckets.dataset.keys.user is None:
        keys["number"] = rows.users.keys.to_numpy()[rows.users.of_row]
    else:
        keys["user"], named["user"] = rows.users.of_row, rows.users.keys
    if rows.items is not None:
        keys["item"], named["item"] = rows.items.of_row, rows.items.keys
    return keys, named, 0 if rows.users.side_row is None else int((rows.users.side_row < 0).sum())


def _order(buckets: Buckets, folder: Path, engine: Engine, done: Any) -> None:
    """Writes the order of all rows, and what is known of each in it.

    `position.npy` has the place of each row, bucket by bucket in their own order; `time.npy` and `item.npy` are in the
    order of the whole log, `users.npy` has the number of each user of each bucket, and `items.parquet` all items.
    """
    dataset, total, end, lacking = buckets.dataset, sum(buckets.rows), 0, 0
    spans: list[slice] = []
    users: list[pl.Series] = []
    items: list[pl.Series] = []
    # The last key is the first to sort by. Users and items have the numbers of their bucket at first.
    kinds = {"number": (dataset.keys.user is None, np.int64), "item": (dataset.keys.item is not None, np.int32)}
    kinds |= {"user": (dataset.keys.user is not None, np.int32), "time": (dataset.source.time is not None, np.int64)}
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        keys = {name: on_disk(temporary, total, kind) for name, (is_there, kind) in kinds.items() if is_there}
        found = engine.map(functools.partial(_keys_of, buckets), range(len(buckets)))
        for rows, (of_bucket, named, lacked) in zip(buckets.rows, found, strict=True):
            spans.append(slice(end, end + rows))
            end += rows
            for name, column in of_bucket.items():
                keys[name][spans[-1]] = column
            users += [named["user"]] if "user" in named else []
            items += [named["item"]] if "item" in named else []
            lacking += lacked
            done(rows)
        if items:
            every = pl.concat(items).unique().sort()
            pl.DataFrame({"key": every}).write_parquet(temporary / "items.parquet")
            for span, own in zip(spans, items, strict=True):
                keys["item"][span] = numbers_of(own, every)[keys["item"][span]]
        if users:
            rank = np.empty(sum(map(len, users)), np.int32)
            rank[pl.concat(users).arg_sort().to_numpy()] = np.arange(len(rank))
            write_array(temporary / "users.npy", rank)
            parts = np.split(rank, np.cumsum([len(own) for own in users])[:-1])
            for span, part in zip(spans, parts, strict=True):
                keys["user"][span] = part[keys["user"][span]]
        position, end = on_disk(temporary, total, np.int64), 0
        with contextlib.ExitStack() as opened:
            ordered = {
                name: opened.enter_context(array_file(temporary / f"{name}.npy", total, keys[name].dtype))
                for name in ("time", "item")
                if name in keys
            }
            for some in _sorted(list(keys.values()), temporary):
                position[some] = np.arange(end, end + len(some))
                end += len(some)
                for name, file in ordered.items():
                    append_array(file, keys[name][some])
        # Their files are not needed beside the next one.
        keys.clear()
        write_array(temporary / "position.npy", position)
        about = {"lacking": lacking, "users": sum(map(len, users))}
        (temporary / "order.json").write_text(json.dumps(about), encoding="utf-8")


def _sorted(
    keys: Sequence[np.ndarray], folder: Path, rows: np.ndarray | None = None, depth: int = 0
) -> Iterator[np.ndarray]:
    """What `np.lexsort(keys)` gives of whole numbers, a part at a time, into which rows are spread in files before.

    A part has at most `2 * _ROWS_AT_A_TIME` rows. Many rows of one value of the first key, which is the last, are a
    part of their own, and spread by the next one.

    Args:
        keys: One column after another, `(n,)`; rows that are equal in all of them keep their order.
        folder: Where the files are meanwhile.
        rows: The rows that are sorted, ascending; by default all.
        depth: How often they have been spread before.
    """
    count = len(keys[-1]) if rows is None else len(rows)
    if count <= 2 * _ROWS_AT_A_TIME:
        some = np.arange(count) if rows is None else np.asarray(rows)
        yield some[np.lexsort([key[some] for key in keys])]
        return
    first = keys[-1]
    number = min(-(-count // _ROWS_AT_A_TIME), _MOST_BUCKETS // 2)
    every = slice(None, None, max(1, count // (1000 * number)))
    sample = np.sort(first[every if rows is None else rows[every]])
    values, times = np.unique(sample[len(sample) * np.arange(1, number) // number], return_counts=True)
    # A value that is more than one bound has a part of its own.
    bounds = np.union1d(values, values[times > 1] + 1)
    paths = [folder / f"rows-{depth}-{number}" for number in range(len(bounds) + 1)]
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(open(path, "wb")) for path in paths]
        for start in range(0, count, _ROWS_AT_A_TIME):
            some = np.arange(start, min(start + _ROWS_AT_A_TIME, count))
            some = some if rows is None else np.asarray(rows[some])
            place = np.searchsorted(bounds, first[some], side="right").astype(np.int16)
            by_place = some[np.argsort(place, kind="stable")]
            ends = np.cumsum(np.bincount(place, minlength=len(files)))
            for file, part in zip(files, np.split(by_place, ends[:-1]), strict=True):
                append_array(file, part)
    for part_number, path in enumerate(paths):
        if path.stat().st_size:
            part = np.memmap(path, np.int64, "r")
            is_one_value = 0 < part_number < len(bounds) and bounds[part_number] == bounds[part_number - 1] + 1
            rest = keys[:-1] if is_one_value else keys
            yield from _sorted(rest, folder, part, depth + 1) if rest else _slices(part)
        path.unlink()


def _slices(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(rows[start : start + _ROWS_AT_A_TIME]) for start in range(0, len(rows), _ROWS_AT_A_TIME))


@contextlib.contextmanager
def _bar(what: str, rows: int) -> Iterator[Any]:
    """Takes numbers of rows that are done: a bar with rows per second and time left on a terminal, else one line."""
    started, bar = time.perf_counter(), None
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=rows, desc=what, unit="row", unit_scale=True, file=sys.stdout, leave=False)
    try:
        yield (lambda number: None) if bar is None else bar.update
    finally:
        if bar is not None:
            bar.close()
    logger.info("%s: %s rows, %.0f s", what, f"{rows:,}", time.perf_counter() - started)
