# SPDX-License-Identifier: Apache-2.0
"""Models by name."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import keras

from mvke_tf.config import ModelConfig, nearest
from mvke_tf.errors import ConfigError, RunError
from mvke_tf.io import CORRUPT_FILE_ERRORS, on_disk
from mvke_tf.models.chains import build_aitm, build_resflow
from mvke_tf.models.dense_mmoe import DenseMMoE, build_mmoe, build_mmoe_recommender
from mvke_tf.models.mmoe import build_mmoe_two_tower
from mvke_tf.models.multi_task import MultiTaskModel, with_uncertainty
from mvke_tf.models.mvke import build_mvke
from mvke_tf.models.ple import build_cgc, build_ple
from mvke_tf.models.shared_bottom import build_hard_sharing, build_shared_bottom, build_single_task
from mvke_tf.models.stem import build_stem
from mvke_tf.models.two_tower import TwoTowerModel, build_two_tower
from mvke_tf.schema import Schema

logger = logging.getLogger(__name__)

MODELS: dict[str, Callable[[Schema, ModelConfig | None], TwoTowerModel]] = {
    "mvke": build_mvke,
    "mmoe": build_mmoe_two_tower,
    "cgc": build_cgc,
    "ple": build_ple,
    "stem": build_stem,
    "aitm": build_aitm,
    "resflow": build_resflow,
    "shared_bottom": build_shared_bottom,
    "hard_sharing": build_hard_sharing,
    "single_task": build_single_task,
}

# Settings of a model that not every model reads, and those that do.
MIXTURES = ("mvke", "mmoe", "cgc", "ple", "stem")
READERS = {
    "num_virtual_kernels": ("mvke",),
    "num_experts": ("mmoe", "cgc", "ple", "stem"),
    "num_levels": ("ple",),
    "task_kernels": ("mvke",),
    "task_experts": ("mmoe", "cgc"),
    "shared_experts": ("mvke",),
    "gate_top_k": MIXTURES,
    "load_balancing_weight": MIXTURES,
    "virtual_kernel_stddev": ("mvke",),
    "attention_stddev": ("mvke",),
}

__all__ = [
    "MIXTURES",
    "MODELS",
    "READERS",
    "DenseMMoE",
    "MultiTaskModel",
    "TwoTowerModel",
    "build_aitm",
    "build_cgc",
    "build_hard_sharing",
    "build_mmoe",
    "build_mmoe_recommender",
    "build_mmoe_two_tower",
    "build_model",
    "build_mvke",
    "build_ple",
    "build_resflow",
    "build_shared_bottom",
    "build_single_task",
    "build_stem",
    "build_two_tower",
    "check_model",
    "load_model",
    "save_model",
    "unread_settings",
    "with_uncertainty",
]


def build_model(name: str, schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """A model by name, `{feature: tensor} -> {task: output (B, 1)}`.

    Args:
        name: One of `MODELS`.
        schema: Features and tasks.
        config: Shape of the model; the default shape if None.

    Raises:
        ConfigError: If there is no such model, or not of this shape for these tasks.
    """
    check_model(name, len(schema.tasks))
    return MODELS[name](schema, config)


def check_model(name: str, num_tasks: int | None = None) -> None:
    """Validates the name of a model, and the number of tasks that it is to learn.

    Raises:
        ConfigError: If there is no such model; the message says what there is.
    """
    if name not in MODELS:
        raise ConfigError(f"Unknown model. Expected one of {sorted(MODELS)}. Received: {name!r}{nearest(name, MODELS)}")
    if name == "single_task" and num_tasks not in (None, 1):
        raise ConfigError(f"single_task learns one task at a time; name it with --tasks. Received: {num_tasks} tasks")


def unread_settings(config: ModelConfig) -> list[str]:
    """Names of the settings that are not the default's and that the model of this name does not read."""
    default = ModelConfig()
    return [
        name
        for name, readers in READERS.items()
        if config.name not in readers and getattr(config, name) != getattr(default, name)
    ]


# From so many bytes on, a model is written to and read from files that are not packed: Keras would hold the whole file
# in memory. A file of weights has so much more than the weights, at most.
_LARGE, _REST = 2**25, 2**24
_MEMBERS = ("metadata.json", "config.json", "model.weights.h5")


def save_model(model: keras.Model, path: Path) -> None:
    """Writes a model to a `.keras` file, as `model.save` does, beside which there may be a folder meanwhile."""
    size = sum(4 * math.prod(variable.shape) for variable in model.variables)
    if size >= _LARGE:
        try:
            # HDF5 ends the process where the disk is full.
            on_disk(path.parent, 2 * (size + _REST), "int8")
        except OSError as error:
            logger.warning("%s is made in memory, because it cannot be made on the disk: %s", path.name, error)
        else:
            folder = path.with_suffix(".unpacked")
            model.save(folder, zipped=False)
            with zipfile.ZipFile(path, "w") as archive:
                for name in _MEMBERS:
                    member = zipfile.ZipInfo(name)
                    with open(folder / name, "rb") as file, archive.open(member, "w", force_zip64=True) as packed:
                        shutil.copyfileobj(file, packed, 2**20)
            shutil.rmtree(folder)
            return
    model.save(path)


def _loaded(path: Path) -> keras.Model:
    with zipfile.ZipFile(path) as archive:
        members, size = archive.infolist(), path.stat().st_size
        # What is not compressed takes no more than the file.
        is_plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        is_plain = is_plain and sum(member.file_size for member in members) <= size
        if size >= _LARGE and is_plain and sorted(member.filename for member in members) == sorted(_MEMBERS):
            with contextlib.ExitStack() as opened:
                try:
                    folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="mvke_tf-"))
                    archive.extractall(folder)
                except OSError as error:
                    logger.warning("%s is read in memory, because it cannot be unpacked on the disk: %s", path, error)
                else:
                    return keras.saving.load_model(folder, compile=False)
    return keras.saving.load_model(path, compile=False)


def load_model(path: Path | str) -> TwoTowerModel:
    """A saved two-tower model, uncompiled.

    Args:
        path: A `.keras` file. Layers of other packages in it must have been registered with Keras.

    Raises:
        RunError: If the file is missing, damaged, or holds another model.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"There is no model at {path}. Expected a file such as runs/<name>/best.keras")
    try:
        model = _loaded(path)
    except (*CORRUPT_FILE_ERRORS, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}). Train again.") from error
    if not isinstance(model, TwoTowerModel):
        raise RunError(
            f"Expected a two-tower model, as `build_model` makes it; load any other with keras.saving.load_model. "
            f"Received: {type(model).__name__} in {path}"
        )
    return model
