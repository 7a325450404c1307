# SPDX-License-Identifier: Apache-2.0
"""A prepared dataset: encoded users and items, and the interactions between them; in memory, or a folder of Parquet.

What was prepared in buckets of users lies in buckets: whatever needs less than everything reads one after another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mvke_tf.config import OBJECTIVES, nearest
from mvke_tf.data.batches import Interactions, Shards, taken
from mvke_tf.data.declaration import PARTS, Dataset, TaskDeclaration
from mvke_tf.data.encoder import NUMPY_DTYPES, RAW_UNKNOWN, EncodedFeature, Encoder
from mvke_tf.data.shared import SharedColumn, shared
from mvke_tf.errors import ConfigError, DataError, DeclarationError
from mvke_tf.io import atomic_write, read_json
from mvke_tf.schema import TOWERS, WEIGHTS_SUFFIX, Schema, Task

logger = logging.getLogger(__name__)

# Format 1 had neither mean weight nor length of lists; it is read as it is. Format 3 is 2 in buckets, in which rows of
# wide columns did not share values as in 4.
FORMATS = (1, 2, 3, 4)
WHOLE, IN_BUCKETS = 2, 4
TABLES = ("users", "items", "latest_users")
IN_A_BUCKET = ("users", "latest_users", "interactions")
FILES = ("keys", "encoded", "raw")
# Of encoded columns of user states in buckets: what their rows share.
SHARED = "shared.parquet"
# Ends of the names of their places; what the file of their values has, each of at most so many bytes: Parquet stores no
# value of 2 GiB.
_ROW, _EVENT, _COUNT = ":row", ":event", ":count"
_VALUES = pa.schema([("column", pa.string()), ("values", pa.large_binary())])
_MOST_SHARED = 2**30
INTERACTIONS = "interactions.parquet"
SIDES = {"users": "user", "items": "item", "latest_users": "user"}
# Encoded user states and interactions of buckets that training holds, and shuffles, together; an interaction takes so
# much with its place in the order.
WINDOW_BYTES, INTERACTION_BYTES = 2**26, 64
MANIFEST, ENCODER = "manifest.json", "encoder.json"
REMEDY = "Delete the folder and run `mvke prepare --data ...` again."


def digest(dataset: Dataset, fingerprint: str, version: int = WHOLE, buckets: int = 1) -> str:
    """What a prepared dataset is made of, in one word of 64 hexadecimal digits: format, declaration, source.

    Also the number of its buckets, which the order of the rows depends on.
    """
    made_of = [version, dataset.to_dict(), fingerprint, *([buckets] if version > WHOLE else [])]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EntityTable:
    """Entities of one side, one per row.

    Args:
        side: `"user"` or `"item"`.
        key: Id of each, `(N,)`, int64 or text (object).
        encoded: Encoded columns, `{input: (N, ...)}`.
        raw: Raw columns, `{input: (N, ...)}`; of a list `(N, L)`, and its weights, in which 0 is an empty slot.
        name: Name to show of each, `(N,)` text; None if none is declared.
        time: Moment of the state, `(N,)` int64 in milliseconds since 1970; None of entities without.

    Raises:
        ValueError: If the columns have different lengths.
    """

    side: str
    key: np.ndarray
    encoded: Mapping[str, np.ndarray]
    raw: Mapping[str, np.ndarray]
    name: np.ndarray | None = None
    time: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.side not in TOWERS:
            raise ValueError(f"`side` must be one of {TOWERS}. Received: {self.side!r}")
        columns = {"key": self.key, "name": self.name, "time": self.time}
        columns |= {f"encoded/{name}": column for name, column in self.encoded.items()}
        columns |= {f"raw/{name}": column for name, column in self.raw.items()}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"All columns of the {self.side} table need as many rows. Received: {lengths}")

    def __len__(self) -> int:
        return len(self.key)

    @property
    def names(self) -> np.ndarray:
        """What to show of each entity, `(N,)` text: its name, or its id."""
        name = self.name
        return self.key.astype(str).astype(object) if name is None else name


class _StoredTable(EntityTable):
    """A table in files: also ids, names and moments are read when they are asked for."""

    _keys: Columns
    _rows: int

    def __init__(self, side: str, keys: Columns, encoded: Columns, raw: Columns, rows: int) -> None:
        for name, value in {"side": side, "encoded": encoded, "raw": raw, "_keys": keys, "_rows": rows}.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self._rows

    @property
    def key(self) -> np.ndarray:
        return self._keys["key"]

    @property
    def name(self) -> np.ndarray | None:
        return self._keys.get("name")

    @property
    def time(self) -> np.ndarray | None:
        return self._keys.get("time")


class PreparedDataset:
    """Everything that training, evaluation and export need of a declared dataset.

    Args:
        dataset: The declaration.
        encoder: From raw to encoded columns.
        fingerprint: What the source was.
        users: One row per user state: profile and history at one moment.
        items: One row per item; with statistics at a point in time, one per item and moment.
        latest_users: One row per user, as known by now: after the last row of the log.
        catalogue: Rows of `items` with the latest state of each item, `(M,)`, in the order of the keys.
        user_row: Row of `users` of each interaction, `(n,)`.
        item_row: Row of `items` of each interaction, `(n,)`.
        split: Part of each interaction, `(n,)`: position in `mvke_tf.data.declaration.PARTS`.
        labels: Label of each interaction per task, `{task: (n,)}`; 0 where there is none.
        weights: Weight of each interaction per task, `{task: (n,)}`; 0 where it does not count.
        time: Moment of each interaction, `(n,)`, in milliseconds since 1970; None if none is declared.
        sampled: Which interactions are sampled negatives, `(n,)` bool; none by default.
        offsets: Mean (transformed) label of the training part, per regression task; its logarithm, per count task.
        folder: Where it has been loaded from.

    Raises:
        ValueError: If columns have different lengths, or rows or parts that do not exist.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        encoder: Encoder,
        fingerprint: str,
        users: EntityTable,
        items: EntityTable,
        latest_users: EntityTable,
        catalogue: np.ndarray,
        user_row: np.ndarray,
        item_row: np.ndarray,
        split: np.ndarray,
        labels: Mapping[str, np.ndarray],
        weights: Mapping[str, np.ndarray],
        time: np.ndarray | None = None,
        sampled: np.ndarray | None = None,
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        columns = interaction_columns(
            dataset,
            user_row,
            item_row,
            split,
            labels,
            weights,
            time,
            np.zeros(len(user_row), bool) if sampled is None else sampled,
        )
        self._set(
            dataset, encoder, fingerprint, (users, items, latest_users), catalogue, columns, dict(offsets or {}), None
        )
        for name, most in self._ranges().items():
            if problem := _outside(columns[name], most):
                raise ValueError(f"Column {name!r} of the interactions: {problem}")
        if problem := _outside(self.catalogue, len(items)):
            raise ValueError(f"The catalogue: {problem}")

    def _set(
        self,
        dataset: Dataset,
        encoder: Encoder,
        fingerprint: str,
        tables: tuple[EntityTable, EntityTable, EntityTable],
        catalogue: np.ndarray,
        columns: Mapping[str, np.ndarray],
        offsets: dict[str, float],
        folder: Path | None,
        version: int = WHOLE,
        buckets: Sequence[Callable[[], PreparedDataset]] = (),
    ) -> None:
        self._version, self._buckets = version, tuple(buckets)
        self.dataset, self.encoder, self.fingerprint = dataset, encoder, fingerprint
        self.users, self.items, self.latest_users = tables
        self.catalogue = np.asarray(catalogue, np.int64)
        self.offsets, self.folder = offsets, folder
        self._columns = columns

    def _ranges(self) -> dict[str, int]:
        """Columns of the interactions that count something, and how much there is of it."""
        return {"user_row": len(self.users), "item_row": len(self.items), "split": len(PARTS)}

    def __len__(self) -> int:
        return len(self.split)

    def __repr__(self) -> str:
        return (
            f"<PreparedDataset {self.dataset.name}: {len(self):,} interactions of {len(self.users):,} user states "
            f"and {len(self.items):,} items>"
        )

    @functools.cached_property
    def digest(self) -> str:
        """See `digest`."""
        return digest(self.dataset, self.fingerprint, self._version, len(self._buckets))

    @property
    def is_in_buckets(self) -> bool:
        """Whether it was prepared in buckets, and should be read so: it may not fit into memory."""
        return bool(self._buckets)

    def buckets(self) -> Iterator[PreparedDataset]:
        """The data of some users after those of others, with all items; each is read anew, and kept by nobody.

        All of them one after another are everything, in its order. Data that are in no buckets are one.
        """
        return (read() for read in self._buckets) if self._buckets else iter([self])

    def bucket(self, number: int) -> PreparedDataset:
        """One of the `buckets`."""
        return self._buckets[number]() if self._buckets else self

    def of_part(self, part: str, column: Callable[[PreparedDataset], np.ndarray]) -> np.ndarray:
        """A column of the interactions of one part, made of one bucket after another."""
        return np.concatenate([column(bucket)[bucket.part_rows(part)] for bucket in self.buckets()])

    @property
    def has_users(self) -> bool:
        """Whether users have ids; else each interaction has a user of its own."""
        return self.dataset.keys.user is not None

    @property
    def has_items(self) -> bool:
        """Whether items have ids: whether there is a catalogue."""
        return self.dataset.keys.item is not None

    @property
    def user_row(self) -> np.ndarray:
        """Row of `users` of each interaction, `(n,)` int32."""
        return self._columns["user_row"]

    @property
    def item_row(self) -> np.ndarray:
        """Row of `items` of each interaction, `(n,)` int32."""
        return self._columns["item_row"]

    @property
    def split(self) -> np.ndarray:
        """Part of each interaction, `(n,)` int8: position in `mvke_tf.data.declaration.PARTS`."""
        return self._columns["split"]

    @property
    def sampled(self) -> np.ndarray:
        """Which interactions are sampled negatives, `(n,)` bool."""
        return self._columns["sampled"]

    @property
    def time(self) -> np.ndarray | None:
        """Moment of each interaction, `(n,)` int64 in milliseconds since 1970; None if none is declared."""
        return self._columns.get("time")

    def label(self, task: str) -> np.ndarray:
        """Label of each interaction in a task, `(n,)` float32, transformed as the task says; 0 where there is none."""
        return self._columns[_column("label", self._task(task).name)]

    def weight(self, task: str) -> np.ndarray:
        """Weight of each interaction in a task, `(n,)` float32; 0 where it does not count."""
        return self._columns[_column("weight", self._task(task).name)]

    def event(self, task: str) -> np.ndarray:
        """In which interactions the event of a binary task happened, `(n,)` bool."""
        return self.label(task) == 1

    def _task(self, name: str) -> TaskDeclaration:
        """The declared task of this name.

        Raises:
            ConfigError: If there is none.
        """
        names = self.dataset.task_names
        if name not in names:
            raise ConfigError(
                f"{self.dataset.name} has no task {name!r}.{nearest(name, names)} Tasks: {', '.join(names)}"
            )
        return next(task for task in self.dataset.tasks if task.name == name)

    def task_names(self, tasks: Sequence[str] = ()) -> tuple[str, ...]:
        """Names of the tasks that a model of this data learns, in the order of the declaration.

        Args:
            tasks: Chosen tasks; by default those that are learned unless told otherwise.

        Raises:
            ConfigError: If there is no such task, or one is chosen twice.
        """
        tasks = tuple(tasks)
        chosen = {self._task(name).name for name in tasks}
        if len(chosen) < len(tasks):
            raise ConfigError(f"Expected different tasks. Received: {', '.join(tasks)}")
        return tuple(task.name for task in self.dataset.tasks if (task.name in chosen if tasks else task.default))

    def _objective(self, task: TaskDeclaration, objective: str) -> str:
        if objective not in ("", *OBJECTIVES):
            raise ConfigError(
                f"`objective` must be one of {', '.join(OBJECTIVES)}, or empty: as declared. Received: {objective!r}"
            )
        return objective if objective and task.given is not None else task.objective

    def schema(self, tasks: Sequence[str] = (), objective: str = "") -> Schema:
        """What a model of this data reads and predicts.

        Args:
            tasks: Chosen tasks; by default those that are learned unless told otherwise.
            objective: How all tasks with `given` are learned, see `mvke_tf.schema.Task`; by default as declared. A task
                whose `given` is not among the tasks is learned as one probability.

        Raises:
            ConfigError: If there is no such task or objective, or a task is chosen twice.
        """
        names = self.task_names(tasks)
        declared = [task for task in self.dataset.tasks if task.name in names]
        return Schema(
            self.encoder.schema_features(),
            tuple(
                Task(
                    task.name,
                    task.kind,
                    classes=task.class_names,
                    given=task.given if task.given in names else None,
                    objective=self._objective(task, objective),
                    offset=self.offsets.get(task.name, 0.0),
                    domain=task.domain,
                    transform=task.transform,
                )
                for task in declared
            ),
        )

    def part_rows(self, part: str) -> np.ndarray:
        """Positions of the interactions of one part.

        Raises:
            ConfigError: If there is no such part.
        """
        if part not in PARTS:
            raise ConfigError(f"The parts of the data are {', '.join(PARTS)}. Received: {part!r}")
        return np.flatnonzero(self.split == PARTS.index(part))

    def part(self, part: str, tasks: Sequence[str] = (), objective: str = "") -> Interactions:
        """The interactions of one part, ready for `mvke_tf.data.batches.Batches`.

        Where a task with `given` is learned on the rows of that event only (objective `"conditional"`), all other rows
        get weight 0.

        Args:
            part: `"train"`, `"validation"` or `"test"`.
            tasks: See `schema`.
            objective: See `schema`.

        Raises:
            ConfigError: If there is no such part, task or objective.
        """
        rows = self.part_rows(part)
        weights = {}
        for name in self.task_names(tasks):
            task, weight = self._task(name), self.weight(name)[rows]
            if task.given is not None and self._objective(task, objective) == "conditional":
                weight = weight * self.event(task.given)[rows]
            if (weight != 1).any():
                weights[name] = weight
        return Interactions(
            self.users.encoded,
            self.items.encoded,
            self.user_row[rows],
            self.item_row[rows],
            {name: self.label(name)[rows] for name in self.task_names(tasks)},
            weights,
        )

    def shards(self, part: str, tasks: Sequence[str] = (), objective: str = "") -> Interactions | Shards:
        """As `part`; of data in buckets, shards of one bucket each, with the user states of that part alone.

        Args:
            part: See `part`.
            tasks: See `schema`.
            objective: See `schema`.

        Raises:
            ConfigError: See `part`.
        """
        if not self._buckets:
            return self.part(part, tasks, objective)
        sizes = [len(bucket.part_rows(part)) for bucket in self.buckets()]
        filled = [number for number, size in enumerate(sizes) if size]

        def read(number: int) -> Interactions:
            data = self.bucket(filled[number]).part(part, tasks, objective)
            states, rows = np.unique(data.user_rows, return_inverse=True)
            return dataclasses.replace(data, users=_Rows(data.users, states), user_rows=rows.astype(np.int32))

        dense = self._dense_together()
        most = max((_bytes_to_train(self.bucket(number), dense) for number in filled), default=1)
        return Shards([sizes[number] for number in filled], read, max(1, WINDOW_BYTES // most))

    def _dense_together(self) -> set[str]:
        """Columns of user states that are shared in other forms in other buckets: together they are arrays."""
        forms: dict[str, set[int]] = {}
        for bucket in self.buckets():
            states = _stored_states(bucket)
            for name in states:
                forms.setdefault(name, set()).add(states.form(name))
        return {name for name, found in forms.items() if len(found) > 1}

    def alone(self, part: str) -> PreparedDataset:
        """Of data in buckets, the interactions of one part and the user states in them, without buckets; else itself.

        Columns of users are read when they are asked for, and kept by nobody.

        Args:
            part: See `part`.

        Raises:
            ConfigError: If there is no such part.
        """
        if not self._buckets:
            return self
        states, numbers, count = [], [], 0
        for bucket in self.buckets():
            some, number = np.unique(bucket.user_row[bucket.part_rows(part)], return_inverse=True)
            states.append(some)
            numbers.append((number + count).astype(np.int32))
            count += len(some)
        names = [name for name in self._columns if name != "user_row"]
        columns = {name: self.of_part(part, functools.partial(_column_of, name)) for name in names}
        keys, encoded, raw = (
            _Chosen([functools.partial(_columns_of, read, kind) for read in self._buckets], states)
            for kind in ("_keys", "encoded", "raw")
        )
        alone = PreparedDataset.__new__(PreparedDataset)
        alone._set(
            self.dataset,
            self.encoder,
            f"{self.fingerprint}, {part}",
            (_StoredTable("user", keys, encoded, raw, count), self.items, self.latest_users),
            self.catalogue,
            columns | {"user_row": np.concatenate(numbers)},
            self.offsets,
            None,
        )
        return alone

    def bucket_with(self, part: str, user: str | int | None = None) -> PreparedDataset:
        """The first bucket that has interactions of a part: a sample of whole users, where it is not everything.

        Args:
            part: See `part`.
            user: Id of a user who is to be in it, as a number or a text; if nobody has it, any is taken.

        Raises:
            ConfigError: If there is no such part.
        """
        if not self._buckets:
            return self
        for bucket in self.buckets():
            has_user = user is None or str(user) in bucket.latest_users.key.astype(str)
            if has_user and len(bucket.part_rows(part)):
                return bucket
        return self.bucket(0) if user is None else self.bucket_with(part)

    def known(self, side: str) -> np.ndarray:
        """Per row of `users` or `items`, whether its key occurs in a training row that was not sampled: `(N,)` bool.

        Args:
            side: `"user"` or `"item"`.
        """
        if side == "user" and self._buckets:
            # All rows of a user are in one bucket.
            return np.concatenate([bucket.known(side) for bucket in self.buckets()])
        table = {"user": self.users, "item": self.items}[side]
        _, number = np.unique(table.key, return_inverse=True)
        occurs = np.zeros(len(table), bool)
        for bucket in self.buckets():
            rows = {"user": bucket.user_row, "item": bucket.item_row}[side]
            training = (bucket.split == PARTS.index("train")) & ~bucket.sampled
            occurs[number[np.unique(rows[training])]] = True
        return occurs[number]

    def sample(self, share: float, seed: int = 0) -> PreparedDataset:
        """The same users and items with a random share of the interactions, in memory: for a first look.

        Args:
            share: In (0, 1]; rounded to whole interactions, at least one.
            seed: Seed of the draw.

        Raises:
            ValueError: If the share is none.
        """
        if not 0 < share <= 1:
            raise ValueError(f"`share` must lie in (0, 1]. Received: {share}")
        count = max(1, round(share * len(self)))
        rows = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        some = PreparedDataset.__new__(PreparedDataset)
        some._set(
            self.dataset,
            self.encoder,
            f"{self.fingerprint}, {count} rows of seed {seed}",
            (self.users, self.items, self.latest_users),
            self.catalogue,
            {name: self._columns[name][rows] for name in self._columns},
            self.offsets,
            None,
        )
        return some

    def save(self, folder: Path) -> None:
        """Writes a folder, which `load` reads; one that exists is replaced when everything is written."""
        folder = Path(folder)
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            lengths: dict[str, int] = {}
            for name in TABLES:
                table = getattr(self, name)
                lengths |= write_raw(temporary / name, table, self.encoder.of_tower(table.side))
                write_encoded(temporary / name, table)
            write_columns(temporary / INTERACTIONS, self._columns)
            write_rest(
                *(temporary, folder, self.dataset, self.encoder, self.fingerprint, self.catalogue, self.offsets),
                rows={**{name: len(getattr(self, name)) for name in TABLES}, "interactions": len(self)},
                lengths=lengths,
                version=min(self._version, WHOLE),
            )

    @classmethod
    def load(cls, folder: Path) -> PreparedDataset:
        """Reads what `save` wrote. Columns are read when they are asked for.

        Raises:
            DataError: If the folder is missing, damaged or of another format; names the file, and says what to do.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise DataError(f"There is no prepared dataset in {folder}. Run `mvke prepare --data ...`.")
        manifest = _read_manifest(folder)
        for name, (size, checksum) in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise DataError(f"{path} is missing. {REMEDY}")
            found = _stamp(path)
            if found[0] != size:
                raise DataError(f"{path} is damaged: {found[0]} bytes instead of {size}. {REMEDY}")
            if found[1] != checksum:
                raise DataError(f"{path} is damaged: its checksum is not that of the manifest. {REMEDY}")
        try:
            of_declaration = Path(os.path.normpath(folder / manifest["folder"]))
            dataset = Dataset.from_dict(manifest["dataset"], of_declaration, manifest["name"])
        except DeclarationError as error:
            raise DataError(f"{folder / MANIFEST} is damaged: {error} {REMEDY}") from error
        buckets = _bucket_rows(manifest)
        if digest(dataset, manifest["fingerprint"], manifest["format"], len(buckets)) != manifest["digest"]:
            raise DataError(f"{folder / MANIFEST} is damaged: its digest is not that of its declaration. {REMEDY}")
        try:
            size, _ = manifest["files"][ENCODER]
            encoder = Encoder.from_dict(read_json(folder / ENCODER, most_bytes=size))
        except DataError as error:
            raise DataError(f"{folder / ENCODER} is damaged: {error} {REMEDY}") from error
        offsets = manifest["offsets"]
        wrong = [name for name in offsets if name not in dataset.task_names]
        if wrong:
            raise DataError(f"{folder / MANIFEST} is damaged: offsets of unknown tasks {wrong}. {REMEDY}")

        rows, lengths, version = manifest["rows"], manifest["list_lengths"], manifest["format"]
        items = _load_table([(folder, rows["items"])], "items", encoder, lengths, version)
        catalogue = _File(
            folder / "catalogue.parquet",
            rows["catalogue"],
            {"item_row": pa.int64()},
            _to_flat,
            ranges={"item_row": rows["items"]},
        )
        expected = {"user_row": pa.int32(), "item_row": pa.int32(), "split": pa.int8(), "sampled": pa.bool_()}
        expected |= {_column(kind, task): pa.float32() for kind in ("label", "weight") for task in dataset.task_names}
        if dataset.source.time is not None:
            expected["time"] = pa.int64()

        def part(some: Sequence[tuple[Path, Mapping[str, int]]], parts: Sequence[Callable[[], Any]] = ()) -> Any:
            users, latest_users = (
                _load_table([(path, numbers[name]) for path, numbers in some], name, encoder, lengths, version)
                for name in ("users", "latest_users")
            )
            files = []
            for path, numbers in some:
                ranges = {"user_row": numbers["users"], "item_row": rows["items"], "split": len(PARTS)}
                files.append(_File(path / INTERACTIONS, numbers["interactions"], expected, _to_flat, ranges=ranges))
            starts = np.concatenate([[0], np.cumsum([numbers["users"] for _, numbers in some])[:-1]])
            prepared = cls.__new__(cls)
            prepared._set(
                dataset,
                encoder,
                manifest["fingerprint"],
                (users, items, latest_users),
                catalogue["item_row"],
                _joined(files, {"user_row": starts}),
                {name: float(value) for name, value in offsets.items()},
                folder,
                version,
                parts,
            )
            return prepared

        if version <= WHOLE:
            return part([(folder, rows)])
        places = [(folder / bucket_name(number), numbers) for number, numbers in enumerate(buckets)]
        return part(places, [functools.partial(part, [place]) for place in places])


def _bytes_to_train(bucket: PreparedDataset, dense: Container[str]) -> int:
    """What encoded user states and interactions of a bucket take in memory, some columns as arrays."""
    states = _stored_states(bucket)
    return INTERACTION_BYTES * len(bucket) + sum(states.size(name, name in dense) for name in states)


def _stored_states(bucket: PreparedDataset) -> _Stored:
    """The encoded columns of the user states of one bucket, in its files."""
    return cast("_Stored", bucket.users.encoded)


def interaction_columns(
    dataset: Dataset,
    user_row: np.ndarray,
    item_row: np.ndarray,
    split: np.ndarray,
    labels: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    time: np.ndarray | None,
    sampled: np.ndarray,
) -> dict[str, np.ndarray]:
    """The columns of interactions as they are stored; see `PreparedDataset`.

    Raises:
        ValueError: If columns have different lengths, or labels or weights are not those of the tasks.
    """
    columns: dict[str, np.ndarray] = {
        "user_row": np.asarray(user_row, np.int32),
        "item_row": np.asarray(item_row, np.int32),
        "split": np.asarray(split, np.int8),
        "sampled": np.asarray(sampled, bool),
    }
    if time is not None:
        columns["time"] = np.asarray(time, np.int64)
    for kind, of_tasks in (("label", labels), ("weight", weights)):
        if set(of_tasks) != set(dataset.task_names):
            raise ValueError(f"Expected a {kind} column per task, {dataset.task_names}. Received: {sorted(of_tasks)}")
        columns |= {_column(kind, task): np.asarray(of_tasks[task], np.float32) for task in dataset.task_names}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"All columns of the interactions need as many rows. Received: {lengths}")
    return columns


def bucket_name(number: int) -> str:
    """The name of the folder of a bucket."""
    return f"bucket-{number:04d}"


def write_raw(folder: Path, table: EntityTable, features: Sequence[EncodedFeature]) -> dict[str, int]:
    """Writes ids, names, moments and raw columns of a table into its folder; returns the slots of its lists."""
    folder.mkdir(parents=True)
    keys = {"key": table.key, "name": table.name, "time": table.time}
    columns = {what: _flat(column) for what, column in keys.items() if column is not None}
    _write(folder / "keys.parquet", columns, len(table))
    raw: dict[str, pa.Array] = {}
    lengths = {f"{folder.name}/{feature.name}": _add_raw(raw, feature, table.raw) for feature in features}
    _write(folder / "raw.parquet", raw, len(table))
    return {name: length for name, length in lengths.items() if length is not None}


def write_encoded(folder: Path, table: EntityTable, packed: bool = False) -> None:
    """Writes the encoded columns of a table into its folder; packed, a list is one value of so many bytes.

    Packed lists are read five times faster, and LZ4 twice as fast as Zstandard for a sixth more bytes, which counts
    where a training reads them in every epoch.
    """
    encoded = {column: (_packed if packed else _fixed)(values) for column, values in table.encoded.items()}
    _write(folder / "encoded.parquet", encoded, len(table), "lz4" if packed else "zstd")


def write_shared(folder: Path, states: EntityTable) -> None:
    """Writes the encoded columns of user states, packed, and those in a shared form that are half as large so.

    Of these the places (`:row`; of events `:event` and `:count`, which a list and its weights have together) are beside
    the other columns, and the values in another file, a row for each column.
    """
    encoded: dict[str, pa.Array] = {}
    values: dict[str, np.ndarray] = {}
    places: list[str] = []
    for name, column in states.encoded.items():
        of_list = name + WEIGHTS_SUFFIX
        if column.ndim == 1:
            encoded[name] = _packed(column)
        elif name not in values and name not in encoded:
            names = [name, of_list] if of_list in states.encoded else [name]
            columns = shared(*(states.encoded[one] for one in names))
            if columns is None or any(form.values.nbytes > _MOST_SHARED for form in columns):
                encoded |= {one: _packed(states.encoded[one]) for one in names}
                continue
            for one, form in zip(names, columns, strict=True):
                values[one] = form.values
                if form.count is None:
                    found = {one + _ROW: form.position}
                else:
                    found = {name + _EVENT: form.position, name + _COUNT: form.count}
                encoded |= {place: pa.array(numbers) for place, numbers in found.items()}
                places += found
    _write(folder / "encoded.parquet", encoded, len(states), "lz4", places)
    content = [np.ascontiguousarray(column, column.dtype.newbyteorder("<")).tobytes() for column in values.values()]
    pq.write_table(
        pa.table([pa.array(list(values), pa.string()), pa.array(content, pa.large_binary())], _VALUES),
        folder / SHARED,
        row_group_size=1,
        compression="lz4",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def write_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns without lists or texts into a file."""
    arrays = {name: pa.array(column) for name, column in columns.items()}
    _write(path, arrays, len(next(iter(arrays.values()))))


def write_rest(
    folder: Path,
    final: Path,
    dataset: Dataset,
    encoder: Encoder,
    fingerprint: str,
    catalogue: np.ndarray,
    offsets: Mapping[str, float],
    rows: Mapping[str, int],
    lengths: Mapping[str, int],
    version: int = WHOLE,
    buckets: Sequence[Mapping[str, int]] = (),
) -> None:
    """Writes what a folder of tables and interactions lacks of a prepared dataset, last the manifest.

    Args:
        folder: The folder.
        final: Where it will lie.
        dataset: The declaration.
        encoder: From raw to encoded columns.
        fingerprint: What the source was.
        catalogue: See `PreparedDataset`.
        offsets: See `PreparedDataset`.
        rows: Of each table, and of the interactions.
        lengths: Slots of the lists of each table.
        version: One of `FORMATS`.
        buckets: The rows of each bucket.
    """
    write_columns(folder / "catalogue.parquet", {"item_row": catalogue})
    (folder / ENCODER).write_text(json.dumps(encoder.to_dict()), encoding="utf-8")
    manifest = {
        "format": version,
        "digest": digest(dataset, fingerprint, version, len(buckets)),
        "fingerprint": fingerprint,
        "name": dataset.name,
        "folder": _relative(dataset.folder, final),
        "dataset": dataset.to_dict(),
        "rows": {
            **{name: rows[name] for name in TABLES},
            "catalogue": len(catalogue),
            "interactions": rows["interactions"],
        },
        **({"buckets": list(buckets)} if buckets else {}),
        "list_lengths": dict(lengths),
        "offsets": dict(offsets),
        "files": {
            path.relative_to(folder).as_posix(): _stamp(path) for path in sorted(folder.rglob("*.*")) if path.is_file()
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _column(kind: str, task: str) -> str:
    return f"{kind}:{task}"


def _outside(values: np.ndarray, most: int) -> str | None:
    """What is wrong where values are not in [0, most)."""
    if len(values) and not 0 <= values.min() <= values.max() < most:
        return f"expected values from 0 to {most - 1}. Received: from {values.min()} to {values.max()}"
    return None


def _relative(path: Path, start: Path) -> str:
    """Path of the declaration's folder from the prepared folder, so that both may move together."""
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        # Another drive on Windows.
        return Path(path).as_posix()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except DataError as error:
        raise DataError(f"{error} {REMEDY}") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path} is damaged: it is no object. {REMEDY}")
    if manifest.get("format") not in FORMATS:
        raise DataError(f"{path} has format {manifest.get('format')!r}, expected {WHOLE}. {REMEDY}")
    number = (int, float)
    kinds: dict[str, Any] = {"digest": str, "fingerprint": str, "name": str, "folder": str, "dataset": dict}
    counts: dict[str, Any] = {"rows": int, "list_lengths": int, "offsets": number, "files": list}
    for key, kind in (kinds | dict.fromkeys(counts, dict)).items():
        if not isinstance(manifest.get(key), kind):
            raise DataError(f"{path} is damaged: {key!r} is {_shown(manifest.get(key))}. {REMEDY}")
    for key, kind in counts.items():
        for name, value in manifest[key].items():
            if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
                raise DataError(f"{path} is damaged: {key!r} of {name!r} is {_shown(value)}. {REMEDY}")
    for name, stamp in manifest["files"].items():
        if [type(entry) for entry in stamp] != [int, str]:
            raise DataError(f"{path} is damaged: 'files' of {name!r} is {_shown(stamp)}. {REMEDY}")
    tables = {*TABLES, "catalogue", "interactions"}
    try:
        numbers = [len(bucket) + sum(bucket[name] for name in IN_A_BUCKET) for bucket in manifest.get("buckets", ())]
        is_damaged = (manifest["format"] > WHOLE) != bool(numbers) or any(number < 3 for number in numbers)
    except (TypeError, KeyError):
        is_damaged = True
    if is_damaged:
        raise DataError(f"{path} is damaged: 'buckets' is {_shown(manifest.get('buckets'))}. {REMEDY}")
    files = {"catalogue.parquet", ENCODER}
    for table in TABLES:
        files |= {f"{place}{table}/{name}.parquet" for place in _places(manifest, table) for name in FILES}
    files |= {f"{place}{INTERACTIONS}" for place in _places(manifest, INTERACTIONS)}
    if manifest["format"] == IN_BUCKETS:
        files |= {f"{place}users/{SHARED}" for place in _places(manifest, "users")}
    for key, expected in (("rows", tables), ("files", files)):
        if set(manifest[key]) != expected:
            raise DataError(f"{path} is damaged: {key!r} has {sorted(manifest[key])}, not {sorted(expected)}. {REMEDY}")
    return manifest


def _bucket_rows(manifest: Mapping[str, Any]) -> Sequence[Mapping[str, int]]:
    """The rows of what lies in each bucket; of everything, where there are no buckets."""
    return manifest.get("buckets", [manifest["rows"]])


def _places(manifest: Mapping[str, Any], what: str) -> list[str]:
    """Beginnings of the names of the folders that have a table, or the interactions."""
    if manifest["format"] <= WHOLE or what == "items":
        return [""]
    return [f"{bucket_name(number)}/" for number in range(len(manifest["buckets"]))]


def _stamp(path: Path) -> list[Any]:
    """Size and checksum of a file; of Parquet only of the end, which describes it: each page has its own checksum."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.suffix == ".parquet":
            file.seek(max(0, size - 8))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - 8 - length))
        return [size, hashlib.file_digest(file, "sha256").hexdigest()]


def _shown(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def _load_table(
    places: Sequence[tuple[Path, int]], name: str, encoder: Encoder, lengths: Mapping[str, int], version: int
) -> EntityTable:
    """A table that lies in one folder or several, each with so many of its rows."""
    side = SIDES[name]
    keys = _joined([keys_columns(folder / name, rows) for folder, rows in places])
    types: dict[str, pa.DataType] = {}
    for of_model in encoder.schema_features():
        if of_model.tower == side:
            if of_model.is_dense:
                types[of_model.name] = pa.list_(pa.float32(), of_model.width)
            elif of_model.length == 1:
                types[of_model.name] = pa.int32()
            else:
                types[of_model.name] = pa.list_(pa.int32(), of_model.length)
                types[of_model.name + WEIGHTS_SUFFIX] = pa.list_(pa.float32(), of_model.length)
    readers = {column: functools.partial(_to_rows, kind=kind) for column, kind in types.items()}
    kind = _Encoded if version == IN_BUCKETS and name == "users" else _File
    encoded = _joined(
        [kind(folder / name / "encoded.parquet", rows, types, _to_flat, readers) for folder, rows in places]
    )
    features = encoder.of_tower(side)
    raw = _joined([raw_columns(folder / name, rows, features, lengths) for folder, rows in places])
    return _StoredTable(side, keys, encoded, raw, sum(rows for _, rows in places))


def keys_columns(folder: Path, rows: int) -> _File:
    """Ids, names and moments that `write_raw` wrote, each read when it is asked for."""
    path = folder / "keys.parquet"
    keys = _File(path, rows, None, _to_flat)
    if "key" not in keys or not set(keys) <= {"key", "name", "time"}:
        raise DataError(f"{path} is damaged: its columns are {list(keys)}. {REMEDY}")
    return keys


def raw_columns(folder: Path, rows: int, features: Sequence[EncodedFeature], lengths: Mapping[str, int]) -> _File:
    """The raw columns that `write_raw` wrote, each read when it is asked for."""
    raw: dict[str, pa.DataType] = {}
    readers: dict[str, Callable[[pa.Array], np.ndarray]] = {}
    for feature in features:
        for column in feature.raw_inputs:
            weights = column != feature.name
            kind = pa.float32() if weights else _ARROW_TYPES[feature.raw]
            if feature.raw == "vector":
                raw[column] = pa.list_(kind, feature.width)
            elif feature.is_list:
                raw[column] = pa.large_list(kind)
                length = lengths.get(f"{folder.name}/{feature.name}")
                if length is None:
                    raise DataError(
                        f"The manifest of {folder} is damaged: no list length of {folder.name}/{feature.name}. {REMEDY}"
                    )
                fill = 0.0 if weights else RAW_UNKNOWN[feature.raw]
                dtype = np.float32 if weights else NUMPY_DTYPES[feature.raw]
                readers[column] = functools.partial(_to_padded, length=length, fill=fill, dtype=dtype)
            else:
                raw[column] = kind
    return _File(folder / "raw.parquet", rows, raw, _to_flat, readers)


_ARROW_TYPES = {
    "string": pa.large_string(),
    "integer": pa.int64(),
    "number": pa.float32(),
    "vector": pa.float32(),
}


class _File(Mapping[str, np.ndarray]):
    """Columns of a Parquet file, each read, checked and kept when it is first asked for.

    Args:
        path: The file.
        rows: Rows that it must have.
        types: Types of its columns, or what gives them for their names; any if None.
        read: How a column becomes an array, unless `readers` has another way for it.
        readers: See `read`.
        ranges: Columns whose values must be from 0 to below a number.

    Raises:
        DataError: If the file is not what it must be.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        types: Mapping[str, pa.DataType] | Callable[[Sequence[str]], Mapping[str, pa.DataType]] | None,
        read: Callable[[pa.Array], np.ndarray],
        readers: Mapping[str, Callable[[pa.Array], np.ndarray]] | None = None,
        ranges: Mapping[str, int] | None = None,
    ) -> None:
        self._path, self._rows, self._read, self._readers = path, rows, read, dict(readers or {})
        self._ranges = dict(ranges or {})
        self._columns: dict[str, np.ndarray] = {}
        self._types: Mapping[str, pa.DataType] = {}
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        if metadata.num_rows != rows:
            raise self._damaged(f"{metadata.num_rows} rows instead of {rows}")
        self._names = [name for name in schema.names if name != _NO_COLUMN]
        if types is not None:
            types = types(self._names) if callable(types) else types
            found = {name: schema.field(name).type for name in self._names}
            if set(found) != set(types):
                raise self._damaged(f"columns {sorted(found)} instead of {sorted(types)}")
            for name, kind in types.items():
                if not _same_type(found[name], kind):
                    raise self._damaged(f"column {name!r} is {found[name]}, not {kind}")
            self._names, self._types = list(types), types
        for name, most in self._ranges.items():
            self._check_statistics(metadata, schema.names.index(name), name, most)

    def form(self, name: str) -> int:
        """See `_Encoded.form`: each column is there itself."""
        return 0

    def size(self, name: str, dense: bool = False) -> int:
        """Bytes that a column takes in memory, of 32 bits or lists of them."""
        return _bytes_of(self._types[name], self._rows)

    def _damaged(self, what: object) -> DataError:
        return DataError(f"{self._path} is damaged: {' '.join(str(what).split())}. {REMEDY}")

    def _check_statistics(self, metadata: pq.FileMetaData, column: int, name: str, most: int) -> None:
        """Raises where the file's own statistics show values out of range; reading the column checks it again."""
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(column).statistics
            if statistics is not None and statistics.has_min_max:
                ends = np.array([statistics.min, statistics.max])
                if problem := _outside(ends, most):
                    raise self._damaged(f"column {name!r}: {problem}")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self.read(name)
        return self._columns[name]

    def read(self, name: str) -> np.ndarray:
        """A column, without keeping it."""
        if name not in self._names:
            raise KeyError(name)
        try:
            # Checksums of pages show what was changed, or went bad, since they were written.
            with pq.ParquetFile(self._path, memory_map=True, page_checksum_verification=True) as file:
                # Handing one column to other threads takes longer than they save.
                column = file.read(columns=[name], use_threads=False).column(name)
            nulls = column.null_count
            array = column.combine_chunks()
            if isinstance(array, pa.ChunkedArray):
                array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
            values = None if nulls else self._readers.get(name, self._read)(array)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        except _ShapeError as error:
            raise self._damaged(f"column {name!r}: {error}") from error
        if values is None:
            raise self._damaged(f"column {name!r} has {nulls} null values")
        if len(values) != self._rows:
            raise self._damaged(f"column {name!r} has {len(values)} rows instead of {self._rows}")
        if name in self._ranges and (problem := _outside(values, self._ranges[name])):
            raise self._damaged(f"column {name!r}: {problem}")
        values.flags.writeable = False
        return values

    def __contains__(self, name: object) -> bool:
        # Not by reading it, as `Mapping` does.
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Encoded(Mapping[str, np.ndarray]):
    """Encoded columns of user states as `write_shared` wrote them; see `_File`."""

    def __init__(
        self,
        path: Path,
        rows: int,
        types: Mapping[str, pa.DataType],
        read: Callable[[pa.Array], np.ndarray],
        readers: Mapping[str, Callable[[pa.Array], np.ndarray]],
    ) -> None:
        self._path, self._rows, self._types = path.with_name(SHARED), rows, types
        self._columns: dict[str, np.ndarray] = {}
        self._file = _File(path, rows, self._stored, read, readers)

    def _places(self, name: str, stored: Container[str]) -> tuple[str, ...]:
        """The columns that have the places of the values of a column; none where it is there itself."""
        if not pa.types.is_fixed_size_list(self._types[name]):
            return ()
        events = name.removesuffix(WEIGHTS_SUFFIX)
        kinds = ((), (name + _ROW,), (events + _EVENT, events + _COUNT))
        return next((kind for kind in kinds if all(one in stored for one in kind or (name,))), ())

    def _stored(self, names: Sequence[str]) -> dict[str, pa.DataType]:
        found: dict[str, pa.DataType] = {}
        for name, kind in self._types.items():
            found |= dict.fromkeys(self._places(name, names), pa.int32()) or {name: kind}
        return found

    @functools.cached_property
    def _groups(self) -> dict[str, tuple[int, int]]:
        """Of each column with places, the row group of its values and their bytes."""
        with self._reading() as file:
            if not file.schema_arrow.equals(_VALUES) or file.num_row_groups != file.metadata.num_rows:
                raise ValueError(f"expected columns {_VALUES.names}, and a row group for each row")
            names = file.read(columns=["column"], use_threads=False).column("column").to_pylist()
            sizes = [file.metadata.row_group(group).column(1).total_uncompressed_size for group in range(len(names))]
        return {name: (group, size) for group, (name, size) in enumerate(zip(names, sizes, strict=True))}

    def _group(self, name: str) -> tuple[int, int]:
        if name not in self._groups:
            raise self._damaged(f"no values of column {name!r}")
        return self._groups[name]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[pq.ParquetFile]:
        try:
            with pq.ParquetFile(self._path, memory_map=True, page_checksum_verification=True) as file:
                yield file
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            raise self._damaged(error) from error

    def _damaged(self, what: object) -> DataError:
        return DataError(f"{self._path} is damaged: {' '.join(str(what).split())}. {REMEDY}")

    def read(self, name: str) -> np.ndarray | SharedColumn:
        """A column, without keeping it."""
        places = self._places(name, self._file)
        if not places:
            return self._file.read(name)
        kind, is_row = self._types[name], len(places) == 1
        dtype = np.dtype(kind.value_type.to_pandas_dtype())
        position, *count = (self._file.read(one) for one in places)
        group, _ = self._group(name)
        with self._reading() as file:
            content = file.read_row_group(group, columns=["values"], use_threads=False).column(0)[0].as_buffer()
            if content is None:
                raise ValueError(f"column {name!r} has no values")
            values = np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype, copy=False)
            values = values.reshape(-1, kind.list_size) if is_row else values
        column = SharedColumn(values, position, count[0] if count else None, kind.list_size)
        if problem := column.problem:
            raise self._damaged(f"column {name!r}, or its places beside it: {problem}")
        return column

    def form(self, name: str) -> int:
        """In which form a column is: how many columns have its places."""
        return len(self._places(name, self._file))

    def size(self, name: str, dense: bool = False) -> int:
        """Bytes that a column takes in memory, as it is or as an array."""
        places = self._places(name, self._file)
        if dense or not places:
            return _bytes_of(self._types[name], self._rows)
        return sum(map(self._file.size, places)) + self._group(name)[1]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = np.asarray(self.read(name))
            self._columns[name].flags.writeable = False
        return self._columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self._types

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)


class _Joined(Mapping[str, np.ndarray]):
    """The columns of several files with the same columns, one after another; each is kept when it is first asked for.

    Args:
        files: The files.
        shifts: Of columns that count something in each file, what is added to those of each.
    """

    def __init__(self, files: Sequence[_Stored], shifts: Mapping[str, Sequence[int] | np.ndarray]) -> None:
        self._files, self._shifts = files, shifts
        self._columns: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            shifts = self._shifts.get(name)
            columns = [np.asarray(file.read(name)) for file in self._files]
            if shifts is not None:
                columns = [column + column.dtype.type(shift) for column, shift in zip(columns, shifts, strict=True)]
            self._columns[name] = np.concatenate(columns)
            self._columns[name].flags.writeable = False
        return self._columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files[0])

    def __len__(self) -> int:
        return len(self._files[0])


Columns = Mapping[str, np.ndarray]
_Stored = _File | _Encoded


def _joined(files: Sequence[_Stored], shifts: Mapping[str, Sequence[int] | np.ndarray] | None = None) -> Columns:
    return files[0] if len(files) == 1 else _Joined(files, shifts or {})


class _Rows(Mapping[str, Any]):
    """Some rows of the columns of a table, each read when it is asked for, and kept by nobody; shared ones stay so."""

    def __init__(self, table: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
        self._table, self._rows = table, rows

    def __getitem__(self, name: str) -> np.ndarray | SharedColumn:
        column = self._table.read(name) if isinstance(self._table, _Stored) else self._table[name]
        return column.of(self._rows) if isinstance(column, SharedColumn) else taken(column, self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


class _Chosen(Mapping[str, np.ndarray]):
    """Some rows of the columns of several tables, one after another, each read when it is asked for."""

    def __init__(self, tables: Sequence[Callable[[], Mapping[str, np.ndarray]]], rows: Sequence[np.ndarray]) -> None:
        self._tables, self._rows = tables, rows

    def __getitem__(self, name: str) -> np.ndarray:
        pairs = zip(self._tables, self._rows, strict=True)
        return np.concatenate([np.asarray(_Rows(read(), rows)[name]) for read, rows in pairs])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables[0]())

    def __len__(self) -> int:
        return len(self._tables[0]())


def _column_of(name: str, bucket: PreparedDataset) -> np.ndarray:
    return bucket._columns[name]


def _columns_of(read: Callable[[], PreparedDataset], kind: str) -> Mapping[str, np.ndarray]:
    return getattr(read().users, kind)


class _ShapeError(Exception):
    """A stored list that is longer than it may be."""


def _bytes_of(kind: pa.DataType, rows: int) -> int:
    """Bytes of a column of 32 bits, or lists of them, in memory."""
    return 4 * rows * (kind.list_size if pa.types.is_fixed_size_list(kind) else 1)


# The only column of a file that has none, of a side without raw features: rows need a column.
_NO_COLUMN = "__none__"


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether two types are equal but for the names of list entries; lists of fixed size may be packed."""
    if pa.types.is_fixed_size_list(expected):
        if pa.types.is_fixed_size_binary(found):
            return found.byte_width * 8 == expected.list_size * expected.value_type.bit_width
        return (
            pa.types.is_fixed_size_list(found)
            and found.list_size == expected.list_size
            and found.value_type == expected.value_type
        )
    if pa.types.is_large_list(expected):
        return pa.types.is_large_list(found) and found.value_type == expected.value_type
    return found == expected


def _write(
    path: Path, columns: dict[str, pa.Array], rows: int, compression: str = "zstd", rising: Sequence[str] = ()
) -> None:
    """Writes columns into a file; of those that rise by little, whole numbers, differences of a few bits."""
    columns = columns or {_NO_COLUMN: pa.array(np.zeros(rows, np.int8))}
    pq.write_table(
        *(pa.table(columns), path),
        compression=compression,
        use_dictionary=[name for name in columns if name not in rising] if rising else True,
        column_encoding=dict.fromkeys(rising, "DELTA_BINARY_PACKED") or None,
        write_page_checksum=True,
    )


def _flat(values: np.ndarray) -> pa.Array:
    values = np.asarray(values)
    return pa.array(values.tolist(), pa.large_string()) if values.dtype.kind in "OU" else pa.array(values)


def _fixed(values: np.ndarray) -> pa.Array:
    """`(n,)` as it is, `(n, L)` as lists of fixed size."""
    values = np.ascontiguousarray(values)
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _packed(values: np.ndarray) -> pa.Array:
    """`(n,)` as it is, `(n, L)` of 32 bits as n values of 4 L bytes, the lowest first."""
    if values.ndim == 1:
        return pa.array(values)
    content = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    kind = pa.binary(values.shape[1] * values.dtype.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(content)])


def _add_raw(columns: dict[str, pa.Array], feature: EncodedFeature, raw: Mapping[str, np.ndarray]) -> int | None:
    """Adds the raw columns of a feature; returns the slots of a list."""
    if feature.constant:
        return None
    values = np.asarray(raw[feature.name])
    if not feature.is_list:
        columns[feature.name] = _fixed(values) if feature.raw == "vector" else _flat(values)
        return None
    weights = np.asarray(raw[feature.name + WEIGHTS_SUFFIX], np.float32)
    filled = weights != 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(filled.sum(axis=1))]), pa.int64())
    columns[feature.name] = pa.LargeListArray.from_arrays(
        offsets, _flat(values[filled]).cast(_ARROW_TYPES[feature.raw])
    )
    columns[feature.name + WEIGHTS_SUFFIX] = pa.LargeListArray.from_arrays(offsets, pa.array(weights[filled]))
    return values.shape[1]


def _to_flat(array: pa.Array) -> np.ndarray:
    """A column of values or of lists of fixed size."""
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        return _to_flat(array.flatten()).reshape(-1, kind.list_size)
    if pa.types.is_large_string(kind) or pa.types.is_string(kind):
        # Equal texts become one object.
        coded = array.dictionary_encode()
        words = coded.dictionary.to_numpy(zero_copy_only=False).astype(object)
        return words[coded.indices.to_numpy()]
    return array.to_numpy(zero_copy_only=False)


def _to_rows(array: pa.Array, kind: pa.DataType) -> np.ndarray:
    """A column of values or of lists of fixed size, which may be packed."""
    if not pa.types.is_fixed_size_binary(array.type):
        return _to_flat(array)
    dtype, width = np.dtype(kind.value_type.to_pandas_dtype()), kind.list_size
    begin, count = array.offset * width * dtype.itemsize, len(array) * width
    content = np.frombuffer(array.buffers()[1], dtype.newbyteorder("<"), count, begin)
    return content.astype(dtype, copy=False).reshape(-1, width)


def _to_padded(array: pa.Array, length: int, fill: Any, dtype: Any) -> np.ndarray:
    """A column of lists as `(n, length)`."""
    sizes = np.diff(array.offsets.to_numpy())
    if len(sizes) and sizes.max() > length:
        raise _ShapeError(f"a list of {sizes.max()} values where at most {length} are expected")
    padded = np.full((len(array), length), fill, dtype)
    padded[np.arange(length) < sizes[:, None]] = _to_flat(array.flatten())
    return padded
