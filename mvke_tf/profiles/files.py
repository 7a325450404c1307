"""The profiles of a run, as files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mvke_tf.data.entities import Catalogue, Users
from mvke_tf.exact import best_products
from mvke_tf.files import written_whole
from mvke_tf.models.two_tower import task_names
from mvke_tf.profiles.profiler import EFFORT, GENRE_ITEMS, MEMORY_MB, TOP, Frames, Profiler, check_indexable
from mvke_tf.run import Run
from mvke_tf.vector_index import IndexConfig, VectorIndex, recall

FORMATS = ("parquet", "csv")
# Recall is measured on so many users, drawn at random where there are more.
RECALL_USERS = 1000


def profile_run(
    run: Run,
    tasks: Sequence[str] | None = None,
    top: int = TOP,
    by: str = "item",
    users: Sequence[int] | None = None,
    exclude_seen: bool = False,
    memory_mb: int = MEMORY_MB,
    genre_items: int = GENRE_ITEMS,
    formats: Sequence[str] = FORMATS,
    folder: Path | None = None,
    index: IndexConfig | None = None,
    effort: int = EFFORT,
    report: Callable[[str], object] = print,
) -> dict[str, list[Path]]:
    """Makes the profiles of users of a run's data with its best checkpoint, and writes one file per task and format.

    Args:
        run: The run.
        tasks: Names of the tasks; all of the model by default.
        top: See `Profiler.blocks`.
        by: See `Profiler.blocks`.
        users: Ids of the users; all by default.
        exclude_seen: Whether to leave out what a user has rated.
        memory_mb: See `Profiler.blocks`.
        genre_items: See `Profiler.blocks`.
        formats: Some of `"parquet"` and `"csv"`.
        folder: Where; `profiles` in the run directory by default. Files of an earlier call are replaced.
        index: How to build a vector index that finds the items; exact scoring by default. It is kept in `<folder>` and
            used again as long as the item vectors are the same.
        effort: See `VectorIndex.search`.
        report: Called with lines of text.

    Returns:
        `{task: files}`, `<folder>/<task>_<by>.<format>`. They appear together when the last user is done.

    Raises:
        RunError: If the run has no checkpoint yet.
        ValueError: If a user, a task or another argument is unknown or out of range.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(f"`formats` must be some of {FORMATS}. Received: {tuple(formats)}")
    folder = Path(folder or run.folder / "profiles")
    people = Users.of(run.prepared, users, exclude_seen)
    model = run.load_model()
    if index is not None:
        check_indexable(model, task_names(model) if tasks is None else tasks, by)
    profiler = Profiler(model, Catalogue.of(run.prepared), tasks)
    indexes = None
    if index is not None:
        indexes = {
            task: kept_index(profiler.item_vectors[task], index, folder / f"{task}_{index.kind}_index.npz", report)
            for task in profiler.tasks
        }
        _report_recall(profiler, people, indexes, top, effort, report)
    blocks = profiler.blocks(people, top, by, memory_mb, genre_items, indexes, effort)
    size = profiler.users_per_block(top, by, memory_mb, genre_items)
    return write_profiles(_with_progress(blocks, len(people), size), profiler.tasks, folder, by, formats)


def write_profiles(
    blocks: Iterable[Frames], tasks: Sequence[str], folder: Path, by: str, formats: Sequence[str] = FORMATS
) -> dict[str, list[Path]]:
    """Writes blocks of profiles as they come; arguments and result as of `profile_run`."""
    files = {task: [Path(folder) / f"{task}_{by}.{format}" for format in formats] for task in tasks}
    with contextlib.ExitStack() as whole:
        temporary = {path: whole.enter_context(written_whole(path)) for paths in files.values() for path in paths}
        # Closed before the files get their names.
        with contextlib.ExitStack() as opened:
            append = {path: _WRITERS[path.suffix](hidden, opened) for path, hidden in temporary.items()}
            for block in blocks:
                for task, paths in files.items():
                    for path in paths:
                        append[path](block[task])
    return files


def _parquet_writer(path: Path, opened: contextlib.ExitStack) -> Callable[[pd.DataFrame], None]:
    writers: list[pq.ParquetWriter] = []

    def append(frame: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        if not writers:
            writers.append(opened.enter_context(pq.ParquetWriter(path, table.schema)))
        writers[0].write_table(table)

    return append


def _csv_writer(path: Path, opened: contextlib.ExitStack) -> Callable[[pd.DataFrame], None]:
    file = opened.enter_context(path.open("w", encoding="utf-8", newline=""))

    def append(frame: pd.DataFrame) -> None:
        frame.to_csv(file, index=False, header=file.tell() == 0, lineterminator="\n")

    return append


_WRITERS = {".parquet": _parquet_writer, ".csv": _csv_writer}


def _with_progress(blocks: Iterable[Frames], users: int, size: int) -> Iterable[Frames]:
    with tqdm(total=users, unit="user", desc="Profiles") as bar:
        for block in blocks:
            yield block
            bar.update(min(size, users - bar.n))


def kept_index(
    vectors: np.ndarray, config: IndexConfig, path: Path, report: Callable[[str], object] = print
) -> VectorIndex:
    """The index in a file, if it is of these vectors and settings; otherwise a new one, which replaces it.

    Raises:
        ValueError: If the file is damaged.
    """
    if path.is_file():
        index = VectorIndex.load(path)
        if index.config == config and index.fits(vectors):
            report(f"Index: {path}, as it was")
            return index
    index = VectorIndex.build(vectors, config)
    index.save(path)
    report(f"Index: {path}, built from {len(vectors):,} items")
    return index


def _report_recall(
    profiler: Profiler,
    users: Users,
    indexes: dict[str, VectorIndex],
    top: int,
    effort: int,
    report: Callable[[str], object],
) -> None:
    rows = np.arange(len(users))
    if len(rows) > RECALL_USERS:
        rows = np.sort(np.random.default_rng(0).choice(rows, RECALL_USERS, replace=False))
    vectors = profiler.user_vectors({name: column[rows] for name, column in users.table.items()})
    for task, index in indexes.items():
        _, exact = best_products(vectors[task], profiler.item_vectors[task], top)
        _, found = index.search(vectors[task], exact.shape[1], effort)
        report(
            f"recall@{exact.shape[1]} of {task}: {recall(found, exact):.4f} against exact scoring ({len(rows):,} users)"
        )
