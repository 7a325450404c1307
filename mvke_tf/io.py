# SPDX-License-Identifier: Apache-2.0
"""Files that are written atomically, and what reading a damaged one raises. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import shutil
import socket
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mvke_tf.errors import DataError, MvkeError

if TYPE_CHECKING:
    import numpy as np

# Prefix of the hidden folders that hold a file while it is written; the number of the process and its host follow.
TEMPORARY = ".writing-"
# What follows the name of a folder that has stepped aside for its successor.
_EARLIER = ".earlier"
# Far more than any settings, and little enough to be read at once.
MOST_JSON_BYTES = 2**26


def one_line(error: BaseException) -> str:
    """The message of another library's error in at most 200 characters of one line."""
    # Polars goes on with its plan.
    text = re.split("Resolved plan until|This error occurred|, while evaluating|while evaluating", str(error))[0]
    return " ".join(text.split())[:200].rstrip(".: ") or type(error).__name__


@contextlib.contextmanager
def atomic_write(path: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, with the same ending, that is renamed to it when the block ends well.

    Works for a file and for a folder; what exists is replaced, a folder with all that is in it. After an error, or an
    interruption, the target is as it was, and nothing temporary is left. (Only a killed process leaves its hidden
    temporary folder, which the next write beside it clears away.) Contents are on the disk before the new name is.

    Args:
        path: The target.
        replace: Whether a folder that exists is replaced.

    Raises:
        OSError: If the target cannot be written, or is a folder that is not to be replaced and not empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporary(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{os.getpid()}-{_host()}-", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        _sync(temporary)
        if replace and temporary.is_dir() and path.is_dir():
            # No folder can be renamed onto one with files. The earlier one steps aside, and back if the rename fails.
            earlier = folder / (path.name + _EARLIER)
            os.replace(path, earlier)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(earlier, path)
                raise
        else:
            os.replace(temporary, path)
        _sync_entry(path.parent)
    finally:
        # On NFS a file that is still mapped into memory cannot be: like what a killed process leaves.
        shutil.rmtree(folder, ignore_errors=True)


def on_disk(folder: Path, rows: int, kind: Any) -> np.ndarray:
    """An array `(rows,)` of zeros in a file without a name: the system takes its pages from memory when that is short.

    Raises:
        OSError: If the disk has no room for it.
    """
    import numpy as np

    size = rows * np.dtype(kind).itemsize
    if not size:
        return np.zeros(rows, kind)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            # Else a page for which there is no room later would end the process.
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} for {size:,} bytes", str(folder)) from error
        else:
            file.truncate(size)
        return np.asarray(np.memmap(file, kind, "r+", shape=(rows,)))


def give_back(array: np.ndarray) -> None:
    """Lets the system have the memory of an `on_disk` array, or a view of one, whose values stay in the file."""
    import numpy as np

    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.mode == "c":
            # Changes are in memory alone.
            return
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes what `np.load` reads, for which `np.save` may say nothing of a disk that is full."""
    with array_file(path, len(array), array.dtype) as file:
        append_array(file, array)


@contextlib.contextmanager
def array_file(path: Path, rows: int, kind: Any) -> Iterator[BinaryIO]:
    """A file that `np.load` reads, once so many numbers of one kind have been appended to it."""
    import numpy as np

    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": (rows,)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        yield file


def append_array(file: BinaryIO, array: np.ndarray) -> None:
    """Writes the numbers of an array; `array.tofile` may say nothing of a disk that is full."""
    import numpy as np

    file.write(np.ascontiguousarray(array).data)


def discard(folder: Path) -> None:
    """Deletes a folder at once: a process that is killed meanwhile leaves what the next write beside it clears away."""
    aside = tempfile.mkdtemp(prefix=f"{TEMPORARY}{os.getpid()}-{_host()}-", dir=folder.parent)
    try:
        os.replace(folder, Path(aside) / folder.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    if os.name == "nt":
        # Windows syncs neither folders nor files that are open for reading.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What reading a damaged file of ours raises, from the zip archive down to the JSON in it.
CORRUPT_FILE_ERRORS = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file.

    Raises:
        Exception: One of `CORRUPT_FILE_ERRORS`, if the file is missing or damaged.
    """
    import numpy as np

    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder and those below, in hexadecimal, by its path relative to the folder."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


# With these a spreadsheet begins a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def csv_safe(cell: Any) -> Any:
    """A cell of a CSV file that no spreadsheet runs: a text that begins like a formula gets an apostrophe before it.

    A carriage return, which spreadsheets take for the end of a row and writers do not quote, becomes a line feed.
    """
    if not isinstance(cell, str):
        return cell
    return ("'" if cell.startswith(_FORMULA_STARTS) else "") + cell.replace("\r\n", "\n").replace("\r", "\n")


def write_json(path: Path, values: Any) -> None:
    """Writes readable JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, error: type[MvkeError] = DataError, most_bytes: int | None = MOST_JSON_BYTES) -> Any:
    """The contents of a JSON file.

    Args:
        path: The file.
        error: What is raised if it cannot be read.
        most_bytes: Size of the largest file that is read, 64 MiB by default; None for any.

    Raises:
        MvkeError: Of the class `error`, if the file is missing, too large, nested too deeply, or no JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if most_bytes is None or size <= most_bytes else None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path} is no text in UTF-8: {reason}") from reason
    if text is None:
        raise error(f"{path} is too large: {size:,} bytes. Expected: at most {most_bytes:,}")
    try:
        return json.loads(text)
    except RecursionError as reason:
        raise error(f"{path} is no JSON that can be read: it is nested too deeply.") from reason
    except ValueError as reason:
        raise error(f"{path} is no valid JSON: {reason}") from reason


def remove_temporary(folder: Path) -> None:
    """Deletes what processes of this host that no longer exist left half-written directly in `folder`.

    A folder that was whole, and whose predecessor had already stepped aside, gets its name.
    """
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        pid, _, rest = path.name.removeprefix(TEMPORARY).partition("-")
        if not pid.isdecimal() or not rest.startswith(f"{_host()}-") or process_exists(int(pid)):
            continue
        for earlier in path.glob(f"*{_EARLIER}"):
            name = earlier.name.removesuffix(_EARLIER)
            if not (path.parent / name).exists():
                os.replace(path / name, path.parent / name)
        # Another process may do the same now.
        shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def process_exists(pid: int) -> bool:
    """Whether a process of this number runs on this host; on Windows, where asking is not free, always true."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def try_lock(file: Any) -> bool:
    """Whether the open file could be locked against other processes until it is closed."""
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte far behind the text, which others may still read.
            file.seek(2**20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
