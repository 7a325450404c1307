"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same ending, that is renamed to it when the block ends well.

    Works for a file and for a folder; an existing file is replaced. After an error, or an interruption, the target
    is as it was, and nothing temporary is left (only a killed process leaves its hidden temporary folder).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder)


# What reading a damaged file of ours raises, from the zip archive down to the JSON in it.
DAMAGED = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file.

    Raises:
        Exception: One of `DAMAGED`, if the file is missing or damaged.
    """
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def write_json(path: Path, values: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
