"""Versions of a SavedModel on disk, as TensorFlow Serving expects them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from mvke_tf.data.features import Encoder
from mvke_tf.files import write_json, written_whole
from mvke_tf.run import Run
from mvke_tf.serving import client
from mvke_tf.serving.catalogue import Catalogue
from mvke_tf.serving.model import Serving

SIGNATURES_FILE = "signatures.json"
CLIENT_FILE = "client.py"


def export_saved_model(
    model: keras.Model,
    encoder: Encoder,
    path: Path,
    catalogue: Catalogue | None = None,
    version: int | None = None,
    report: Callable[[str], object] = print,
) -> Path:
    """Writes a version of a SavedModel, whole or not at all; one that exists is never overwritten.

    Args:
        model: A two-tower model, `{feature: tensor} -> {task: output (B, 1)}`.
        encoder: The encoder of the data that the model was trained on.
        path: Folder of all versions, as TensorFlow Serving expects it; it may not exist yet.
        catalogue: Items to be known by id; without, there is neither `score_ids` nor `recommend`.
        version: Number of the version; by default 1, or one more than the highest there is. Of two exports at a time,
            the later one gets the number after.
        report: Receives a line about each signature that this model cannot have.

    Returns:
        `<path>/<version>`.

    Raises:
        ValueError: If Keras does not run on TensorFlow, if `path` is a file, if the version exists, or if model,
            encoder and catalogue do not match.
    """
    _check_backend()
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a folder to write the export to. Received a file: {path}")
    if version is not None and version < 1:
        raise ValueError(f"A version is a whole number of at least 1. Received: {version}")
    # Before the seconds of work, and again when it is done.
    _check_free(path, version)
    serving = Serving(model, encoder, catalogue)
    signatures = serving.signatures()
    described = {
        "model": model.name,
        "tasks": serving.describe_tasks(),
        "catalogue": serving.describe_catalogue(),
        "signatures": {name: signature.describe() for name, signature in signatures.items()},
    }
    concrete = {name: signature.concrete() for name, signature in signatures.items()}
    for line in serving.left_out():
        report(line)
    while True:
        target = path / str(_next_version(path) if version is None else version)
        try:
            with written_whole(target) as temporary:
                tf.saved_model.save(serving, str(temporary), signatures=concrete)
                write_json(temporary / SIGNATURES_FILE, described)
                shutil.copyfile(client.__file__, temporary / CLIENT_FILE)
                _check_free(path, version)
        except OSError:
            # A folder is never renamed over one that has contents: another export may have taken the number meanwhile.
            _check_free(path, version)
            if not target.exists():
                raise
        else:
            return target


def export_run(
    run: Run, export_dir: Path | None = None, version: int | None = None, report: Callable[[str], object] = print
) -> Path:
    """Writes the best checkpoint of a run, with the catalogue of its data, as a version of a SavedModel.

    Args:
        run: The run.
        export_dir: Folder of all versions; `export` in the run directory by default.
        version: See `export_saved_model`.
        report: See `export_saved_model`.

    Returns:
        `<export_dir>/<version>`.

    Raises:
        RunError: If the run has no checkpoint yet.
        ValueError: See `export_saved_model`.
    """
    _check_backend()
    path = Path(export_dir or run.export)
    _check_free(path, version)
    prepared = run.prepared
    catalogue = Catalogue.from_prepared(prepared)
    return export_saved_model(run.load_model(), prepared.encoder, path, catalogue, version, report)


def _check_backend() -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            f"A SavedModel can only be written while Keras runs on TensorFlow. Received: the backend {backend!r}. "
            "Set KERAS_BACKEND=tensorflow for this command; the checkpoint itself serves every backend."
        )


def _versions(path: Path) -> set[int]:
    return {int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()} if path.is_dir() else set()


def _next_version(path: Path) -> int:
    """One more than the highest version in `path`, 1 if there is none."""
    return 1 + max(_versions(path), default=0)


def _check_free(path: Path, version: int | None) -> None:
    versions = _versions(path)
    if version in versions:
        raise ValueError(
            f"{path} has version {version} already, and a version is never overwritten. Choose another number, or none "
            f"for the next one ({1 + max(versions)}). Received: {version}"
        )
