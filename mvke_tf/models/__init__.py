"""Models by name."""

from __future__ import annotations

from collections.abc import Callable

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.models.mmoe import build_cgc, build_mmoe_two_tower, build_ple
from mvke_tf.models.mvke import build_mvke
from mvke_tf.models.shared_bottom import build_hard_sharing, build_shared_bottom, build_single_task
from mvke_tf.schema import Schema

MODELS: dict[str, Callable[[Schema, ModelConfig], keras.Model]] = {
    "mvke": build_mvke,
    "mmoe": build_mmoe_two_tower,
    "cgc": build_cgc,
    "ple": build_ple,
    "shared_bottom": build_shared_bottom,
    "hard_sharing": build_hard_sharing,
    "single_task": build_single_task,
}

# Settings of a model that not every model reads, and those that do.
MIXTURES = ("mvke", "mmoe", "cgc", "ple")
READERS = {
    "num_virtual_kernels": ("mvke",),
    "num_experts": ("mmoe", "cgc", "ple"),
    "num_levels": ("ple",),
    "task_kernels": ("mvke",),
    "task_experts": ("mmoe", "cgc"),
    "shared_experts": ("mvke",),
    "gate_top_k": MIXTURES,
    "balance_coefficient": MIXTURES,
    "kernel_stddev": ("mvke",),
    "attention_stddev": ("mvke",),
}


def unread_settings(config: ModelConfig) -> list[str]:
    """Names of the settings that are not the default's and that the model of this name does not read."""
    default = ModelConfig()
    return [
        name
        for name, readers in READERS.items()
        if config.name not in readers and getattr(config, name) != getattr(default, name)
    ]


def check_model(name: str, num_tasks: int | None = None) -> None:
    """Does nothing if there is a model of this name, for so many tasks.

    Raises:
        ValueError: If there is none; the message says what there is.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model. Expected one of {sorted(MODELS)}. Received: {name!r}")
    if name == "single_task" and num_tasks not in (None, 1):
        raise ValueError(f"single_task learns one task at a time, for example --tasks ctr. Received: {num_tasks} tasks")


def build_model(name: str, schema: Schema, config: ModelConfig | None = None) -> keras.Model:
    """A model by name, `{feature: tensor} -> {task: logit (B, 1)}`.

    Raises:
        ValueError: If there is no such model.
    """
    check_model(name, len(schema.tasks))
    return MODELS[name](schema, config)
