# SPDX-License-Identifier: Apache-2.0
"""The raw files of MovieLens as the three Parquet tables that the declarations read."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from mvke_tf.datasets.movielens.obtain import find_copies, obtain_movielens
from mvke_tf.datasets.movielens.read import ML_100K_COUNTS, WITH_USERS, Counts, MovieLens, detect, is_complete
from mvke_tf.errors import DataError
from mvke_tf.io import atomic_write

logger = logging.getLogger(__name__)

# Changes whenever the same raw files become other tables.
FORMAT = 1
_FILES = ("log.parquet", "items.parquet")
_USERS = "users.parquet"


def make_tables(
    data_dir: Path,
    folder: Path | None = None,
    source: str = "auto",
    expected_counts: Counts | None = ML_100K_COUNTS,
) -> tuple[Path, str]:
    """Makes the tables, unless those of the same raw files are there.

    Args:
        data_dir: Where raw files and tables are kept.
        folder: As in `obtain_movielens`.
        source: As in `obtain_movielens`.
        expected_counts: As in `read_movielens`.

    Returns:
        The folder of the tables, below `data_dir/tables/movielens`, and the size as in `MovieLens`.

    Raises:
        DataError: If the raw files cannot be had, or are damaged.
    """
    copy = next((copy for copy in find_copies(data_dir, folder, source) if copy.is_dir()), None)
    if copy is not None and is_complete(copy):
        tables, size = _place(data_dir, copy)
        if all((tables / name).is_file() for name in (*_FILES, *([_USERS] if size in WITH_USERS else []))):
            return tables, size
    raw, movielens = obtain_movielens(data_dir, folder, source, expected_counts)
    tables, size = _place(data_dir, raw)
    with atomic_write(tables) as temporary:
        write_tables(movielens, temporary)
    logger.info("Tables of MovieLens: %s", tables)
    return tables, size


def write_tables(movielens: MovieLens, folder: Path) -> None:
    """Writes `log.parquet`, `items.parquet` and, where there are users, `users.parquet`, rows in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    movielens.ratings.write_parquet(folder / "log.parquet")
    movielens.items.write_parquet(folder / "items.parquet")
    if movielens.users is not None:
        movielens.users.drop("zip_code").write_parquet(folder / _USERS)


def _place(data_dir: Path, raw: Path) -> tuple[Path, str]:
    """The folder of the tables of some raw files, named by their contents, and the size as in `MovieLens`."""
    size, names = detect(raw)
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for name in names:
        try:
            with open(raw / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{raw / name}: cannot be read ({error.strerror}). Check its permissions.") from error
    return Path(data_dir) / "tables" / "movielens" / f"ml-{size}-{digest.hexdigest()[:12]}", size
