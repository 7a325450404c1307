# SPDX-License-Identifier: Apache-2.0
"""The profiles of a run, as files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mvke_tf.engine import Engine
from mvke_tf.errors import ConfigError
from mvke_tf.inference.index import IndexConfig, VectorIndex, recall
from mvke_tf.inference.topk import best_products
from mvke_tf.inference.vectors import slices
from mvke_tf.io import atomic_write, csv_safe
from mvke_tf.run import Run
from mvke_tf.serving.profiles.entities import BY_ITEM, Candidates, Users
from mvke_tf.serving.profiles.profiler import EFFORT, GROUP_ITEMS, MEMORY_MB, TOP, Frames, Profiler, check_indexable

logger = logging.getLogger(__name__)

FORMATS = ("parquet", "csv")
# What a block adds to the files of each task.
Contents = dict[str, list[Any]]
# Recall is measured on so many users, drawn at random where there are more.
RECALL_USERS = 1000


def profile_run(
    run: Run,
    tasks: Sequence[str] | None = None,
    top: int = TOP,
    by: str = BY_ITEM,
    users: Sequence[int | str] | None = None,
    exclude_seen: bool = False,
    memory_mb: int = MEMORY_MB,
    group_items: int = GROUP_ITEMS,
    formats: Sequence[str] = FORMATS,
    folder: Path | None = None,
    index: IndexConfig | None = None,
    effort: int = EFFORT,
    engine: Engine | None = None,
) -> dict[str, list[Path]]:
    """Makes the profiles of users of a run's data with its best checkpoint, and writes one file per task and format.

    Args:
        run: The run.
        tasks: Names of the tasks; all of the model by default.
        top: See `Profiler.blocks`.
        by: `"item"`, or the name of a group of items.
        users: Ids of the users; all by default. Numbers may come as text.
        exclude_seen: Whether to leave out the items of a user's rows in the log.
        memory_mb: See `Profiler.blocks`; of several workers, each may take as much.
        group_items: See `Profiler.blocks`.
        formats: Some of `"parquet"` and `"csv"`.
        folder: Where; `profiles` in the run directory by default. Files of an earlier call are replaced.
        index: How to build a vector index that finds the items; exact scoring by default. It is kept in `<folder>` and
            used again as long as the item vectors are the same.
        effort: See `VectorIndex.search`.
        engine: Who scores the users; by default this process. Others hold the model each, and use no GPU.

    Returns:
        `{task: files}`, `<folder>/<task>_<by>.<format>`; of data without items `<task>_user`. They appear together when
        the last user is done. In CSV files, texts that a spreadsheet would run begin with an apostrophe.

    Raises:
        RunError: If the run has no checkpoint yet.
        ConfigError: If a user, a task, a group or another argument is unknown or out of range.
        EngineError: If workers are killed again and again.
    """
    engine = engine or Engine()
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ConfigError(f"`formats` must be some of {FORMATS}. Received: {tuple(formats)}")
    folder = Path(folder or run.profiles)
    candidates = Candidates.of(run.prepared, by)
    model = run.load_model(calibrated=True)
    if index is not None:
        check_indexable(model, candidates, model.ranked_tasks if tasks is None else tasks, by)
    profiler = Profiler(model, candidates, tasks)
    chosen = Users.of(run.prepared, users, exclude_seen, folder if run.prepared.is_in_buckets else None)
    indexes = None
    if index is not None:
        indexes = {
            task: kept_index(profiler.item_vectors[task], index, _index_file(folder, task, index))
            for task in profiler.tasks
        }
        _log_recall(profiler, chosen, indexes, top, effort)
    blocks: Iterator[Contents] = (
        _contents(frames, formats)
        for frames in profiler.blocks(chosen, top, by, memory_mb, group_items, indexes, effort)
    )
    size = profiler.users_per_block(top, by, memory_mb, group_items)
    if not engine.is_alone:
        kept = {task: _index_file(folder, task, index).absolute() for task in profiler.tasks} if index else None
        options = {"top": top, "by": by, "memory_mb": memory_mb, "group_items": group_items, "effort": effort}
        scoring = _Scoring(run.folder.absolute(), candidates, profiler.tasks, kept, options, formats)
        read = {name: chosen.table[name] for name in profiler.model.user_tower.input}
        chosen = dataclasses.replace(chosen, table=read)
        blocks = engine.map(scoring, _parts(chosen, size))
    what = "user" if candidates.ids is None else re.sub(r"[^\w.-]", "_", by)
    return _write(_with_progress(blocks, len(chosen), size), profiler.tasks, folder, what, formats)


def _parts(users: Users, size: int) -> Iterator[Users]:
    for rows in slices(len(users), size):
        yield users.part(rows)
        users.give_back()


def _index_file(folder: Path, task: str, index: IndexConfig) -> Path:
    return folder / f"{task}_{index.kind}_index.npz"


@dataclasses.dataclass(frozen=True)
class _Scoring:
    """Makes the profiles of a block of users in a worker, which opens the run once.

    Args:
        run: Folder of the run.
        candidates: The items.
        tasks: Names of the tasks.
        indexes: File of the vector index of each task, if indexes find the items.
        options: Of `Profiler.blocks`.
        formats: Of the files.
    """

    run: Path
    candidates: Candidates
    tasks: Sequence[str]
    indexes: Mapping[str, Path] | None
    options: Mapping[str, Any]
    formats: Sequence[str]

    @functools.cached_property
    def _profiler(self) -> Profiler:
        return Profiler(Run(self.run).load_model(calibrated=True), self.candidates, self.tasks)

    @functools.cached_property
    def _opened(self) -> dict[str, VectorIndex] | None:
        return None if self.indexes is None else {task: VectorIndex.load(path) for task, path in self.indexes.items()}

    def __call__(self, users: Users) -> Contents:
        (frames,) = self._profiler.blocks(users, indexes=self._opened, **self.options)
        return _contents(frames, self.formats)


def write_profiles(
    blocks: Iterable[Frames], tasks: Sequence[str], folder: Path, by: str, formats: Sequence[str] = FORMATS
) -> dict[str, list[Path]]:
    """Writes blocks of profiles as they come; arguments and result as of `profile_run`."""
    return _write((_contents(frames, formats) for frames in blocks), tasks, folder, by, formats)


def _write(
    blocks: Iterable[Contents], tasks: Sequence[str], folder: Path, by: str, formats: Sequence[str]
) -> dict[str, list[Path]]:
    files = {task: [Path(folder) / f"{task}_{by}.{format}" for format in formats] for task in tasks}
    with contextlib.ExitStack() as whole:
        temporary = {path: whole.enter_context(atomic_write(path)) for paths in files.values() for path in paths}
        # Closed before the files get their names.
        with contextlib.ExitStack() as opened:
            append = {path: _WRITERS[path.suffix](hidden, opened) for path, hidden in temporary.items()}
            for block in blocks:
                for task, paths in files.items():
                    for path, content in zip(paths, block[task], strict=True):
                        append[path](content)
    return files


def _contents(frames: Frames, formats: Sequence[str]) -> Contents:
    return {task: [_CONTENTS[format](frame) for format in formats] for task, frame in frames.items()}


def _table(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


def _parquet_writer(path: Path, opened: contextlib.ExitStack) -> Callable[[pa.Table], object]:
    writers: list[pq.ParquetWriter] = []

    def append(table: pa.Table) -> None:
        if not writers:
            writers.append(opened.enter_context(pq.ParquetWriter(path, table.schema)))
        writers[0].write_table(table)

    return append


def _csv_text(frame: pd.DataFrame) -> tuple[str, str]:
    """Header and rows."""
    safe = frame.apply(_csv_safe).rename(columns=csv_safe)
    header = safe.head(0).to_csv(index=False, lineterminator="\n")
    return header, safe.to_csv(index=False, header=False, lineterminator="\n")


def _csv_writer(path: Path, opened: contextlib.ExitStack) -> Callable[[tuple[str, str]], object]:
    file = opened.enter_context(path.open("w", encoding="utf-8", newline=""))
    return lambda text: file.write((text[0] if file.tell() == 0 else "") + text[1])


def _csv_safe(column: pd.Series) -> pd.Series:
    if isinstance(column.dtype, pd.CategoricalDtype):
        safe = np.array([*map(csv_safe, column.cat.categories), None], object)
        return pd.Series(safe[column.cat.codes], column.index)
    return column.map(csv_safe) if pd.api.types.is_string_dtype(column.dtype) else column


_CONTENTS: dict[str, Callable[[pd.DataFrame], Any]] = {"parquet": _table, "csv": _csv_text}
_WRITERS: dict[str, Callable[[Path, contextlib.ExitStack], Callable[[Any], object]]] = {
    ".parquet": _parquet_writer,
    ".csv": _csv_writer,
}


def _with_progress(blocks: Iterable[Contents], users: int, size: int) -> Iterator[Contents]:
    with tqdm(total=users, unit="user", desc="Profiles") as bar:
        for block in blocks:
            yield block
            bar.update(min(size, users - bar.n))


def kept_index(vectors: np.ndarray, config: IndexConfig, path: Path) -> VectorIndex:
    """The index in a file, if it is of these vectors and settings; otherwise a new one, which replaces it.

    Raises:
        MvkeError: If the file is damaged, or FAISS is not installed.
    """
    if path.is_file():
        index = VectorIndex.load(path)
        if index.config == config and index.fits(vectors):
            logger.info("Index: %s, as it was", path)
            return index
    index = VectorIndex.build(vectors, config)
    index.save(path)
    logger.info("Index: %s, built from %s items", path, f"{len(vectors):,}")
    return index


def _log_recall(profiler: Profiler, users: Users, indexes: dict[str, VectorIndex], top: int, effort: int) -> None:
    rows = np.arange(len(users))
    if len(rows) > RECALL_USERS:
        rows = np.sort(np.random.default_rng(0).choice(rows, RECALL_USERS, replace=False))
    vectors = profiler.user_vectors(users.table, rows)
    for task, index in indexes.items():
        _, exact = best_products(vectors[task], profiler.item_vectors[task], top)
        _, found = index.search(vectors[task], exact.shape[1], effort)
        logger.info(
            "recall@%d of %s: %.4f against exact scoring (%s users)",
            exact.shape[1],
            task,
            recall(found, exact),
            f"{len(rows):,}",
        )
