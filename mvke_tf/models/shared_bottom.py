# SPDX-License-Identifier: Apache-2.0
"""Models without gates: shared bottom, hard sharing, single task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.errors import ConfigError
from mvke_tf.layers import Experts, SelectExperts
from mvke_tf.models.two_tower import TwoTowerModel, Vectors, build_two_tower, tag_vectors, task_networks
from mvke_tf.schema import Schema, Task


def build_shared_bottom(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """Shared bottom, `{feature: tensor} -> {task: logit (B, 1)}`.

    Raises:
        ConfigError: If there is no hidden layer to share.
    """
    return build_two_tower(schema, config, shared_bottom_towers, "shared_bottom")


def build_hard_sharing(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """Hard sharing, `{feature: tensor} -> {task: logit (B, 1)}`."""
    return build_two_tower(schema, config, hard_sharing_towers, "hard_sharing")


def build_single_task(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """A model of one task, with one MLP per side, `{feature: tensor} -> {task: logit (B, 1)}`."""
    return build_two_tower(schema, config, hard_sharing_towers, "single_task")


def shared_bottom_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of shared bottom: all tasks share the hidden layers of the user side, each has a linear head.

    Args:
        user_fields: `(B, F, D)`.
        item_fields: `(B, F', D)`.
        tasks: The tasks.
        config: Shape of the model; needs at least one hidden layer.

    Returns:
        `{task: (B, D)}` for users and for items.

    Raises:
        ConfigError: If there is no hidden layer to share.
    """
    if not config.hidden_dims:
        raise ConfigError("shared_bottom shares its hidden layers; `hidden_dims` needs at least one. Received: ()")
    x = keras.layers.Flatten(name="user_flat")(user_fields)
    for index, units in enumerate(config.hidden_dims):
        x = keras.layers.Dense(units, activation="relu", name=f"shared_bottom_{index}")(x)
        x = keras.layers.Dropout(config.dropout_rate, name=f"shared_bottom_dropout_{index}")(x)
    heads = Experts(len(tasks), (), config.embedding_dim, name="user_heads")(x)
    user_vectors = {
        task.name: SelectExperts((index,), name=f"user_vector_{task.name}")(heads) for index, task in enumerate(tasks)
    }
    return user_vectors, tag_vectors(item_fields, tasks, config)


def hard_sharing_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of hard sharing: tasks share the embeddings only, each has an MLP per side.

    Arguments and return value as in `shared_bottom_towers`.
    """
    user_vectors = task_networks(user_fields, tasks, config, "user_towers", "user_vector_{task}")
    return user_vectors, tag_vectors(item_fields, tasks, config)
