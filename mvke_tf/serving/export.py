# SPDX-License-Identifier: Apache-2.0
"""Versions of a SavedModel on disk, as TensorFlow Serving expects them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import keras
import tensorflow as tf

from mvke_tf.config import EXPORT_FORMAT
from mvke_tf.data.encoder import Encoder
from mvke_tf.errors import ConfigError
from mvke_tf.io import atomic_write, checksums, write_json
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import Run
from mvke_tf.serving import client
from mvke_tf.serving.catalogue import Catalogue
from mvke_tf.serving.saved_model import ServingModule

logger = logging.getLogger(__name__)

SIGNATURES_FILE = "signatures.json"
CLIENT_FILE = "client.py"


def export_saved_model(
    model: TwoTowerModel,
    encoder: Encoder,
    path: Path,
    catalogue: Catalogue | None = None,
    version: int | None = None,
) -> Path:
    """Writes a version of a SavedModel, atomically; one that exists is never overwritten.

    Args:
        model: A two-tower model.
        encoder: The encoder of the data that the model was trained on.
        path: Folder of all versions, as TensorFlow Serving expects it; it may not exist yet.
        catalogue: Items to be known by id; without, there is neither `score_ids` nor `recommend`.
        version: Number of the version; by default 1, or one more than the highest there is. Of two exports at a time,
            the later one gets the number after.

    Returns:
        `<path>/<version>`.

    Raises:
        ConfigError: If Keras does not run on TensorFlow, if `path` is a file, or if the version exists.
        ValueError: If model, encoder and catalogue do not match.
    """
    _check_backend()
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"Expected a folder to write the export to. Received a file: {path}")
    if version is not None and version < 1:
        raise ConfigError(f"A version is a whole number of at least 1. Received: {version}")
    # Before the seconds of work, and again when it is done.
    _check_free(path, version)
    serving = ServingModule(model, encoder, catalogue)
    signatures = serving.signatures()
    described = {
        "format": EXPORT_FORMAT,
        "model": model.name,
        "tasks": serving.describe_tasks(),
        "catalogue": serving.describe_catalogue(),
        "signatures": {name: signature.describe() for name, signature in signatures.items()},
    }
    concrete = {name: signature.concrete() for name, signature in signatures.items()}
    for line in serving.left_out():
        logger.info(line)
    while True:
        target = path / str(_next_version(path) if version is None else version)
        try:
            with atomic_write(target, replace=False) as temporary:
                tf.saved_model.save(serving, str(temporary), signatures=concrete)
                shutil.copyfile(client.__file__, temporary / CLIENT_FILE)
                files = checksums(temporary)
                # A random number: equal models have equal descriptions without it.
                files.pop("fingerprint.pb", None)
                write_json(temporary / SIGNATURES_FILE, {**described, "files": files})
                _check_free(path, version)
        except OSError:
            # Another export may have taken the number meanwhile.
            _check_free(path, version)
            if not target.exists():
                raise
        else:
            return target


def export_run(run: Run, export_dir: Path | None = None, version: int | None = None) -> Path:
    """Writes the best checkpoint of a run, with the catalogue of its data, as a version of a SavedModel.

    Its probabilities are calibrated if the run is (`mvke_tf.evaluation.calibrate_run`).

    Args:
        run: The run.
        export_dir: Folder of all versions; `export` in the run directory by default.
        version: See `export_saved_model`.

    Returns:
        `<export_dir>/<version>`.

    Raises:
        RunError: If the run has no checkpoint yet.
        ConfigError: See `export_saved_model`.
    """
    _check_backend()
    path = Path(export_dir or run.export)
    _check_free(path, version)
    prepared = run.prepared
    catalogue = Catalogue.from_prepared(prepared) if prepared.has_items else None
    return export_saved_model(run.load_model(calibrated=True), prepared.encoder, path, catalogue, version)


def _check_backend() -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ConfigError(
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
        raise ConfigError(
            f"{path} has version {version} already, and a version is never overwritten. Choose another number, or none "
            f"for the next one ({1 + max(versions)}). Received: {version}"
        )
