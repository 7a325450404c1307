# SPDX-License-Identifier: Apache-2.0
"""CGC and PLE: Progressive Layered Extraction (Tang et al., RecSys 2020).

In CGC a task sees experts of its own and shared ones; PLE stacks several levels of CGC. The item side is the published
tag tower, as in every model of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.errors import ConfigError
from mvke_tf.layers import Experts
from mvke_tf.models.mmoe import mixture, mixture_of_experts
from mvke_tf.models.two_tower import TwoTowerModel, Vectors, build_two_tower, tag_vectors
from mvke_tf.schema import Schema, Task


def build_cgc(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """CGC, `{feature: tensor} -> {task: logit (B, 1)}`; a task without `experts` sees those of `cgc_experts`.

    Raises:
        ConfigError: If there are too few experts.
    """
    return build_two_tower(schema, config, cgc_towers, "cgc")


def build_ple(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """PLE, `{feature: tensor} -> {task: logit (B, 1)}`.

    Raises:
        ConfigError: If there are too few experts.
    """
    return build_two_tower(schema, config, ple_towers, "ple")


def cgc_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of CGC; arguments and return value as in `mvke_tf.models.mmoe.mmoe_towers`."""
    default = cgc_experts(len(tasks), config.num_experts)
    seen = {
        task.name: experts if task.experts is None else task.experts
        for task, experts in zip(tasks, default, strict=True)
    }
    return mixture_of_experts(user_fields, seen, config), tag_vectors(item_fields, tasks, config)


def ple_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of PLE: `num_levels` levels of CGC. Arguments and return value as in `cgc_towers`.

    On every level each task owns experts that read the task's mixture of the level below, and the shared experts read
    the shared mixture, whose gate sees all experts of its level. The last level has no shared mixture.
    """
    own = own_experts(len(tasks), config.num_experts)
    seen = dict(zip([task.name for task in tasks], cgc_experts(len(tasks), config.num_experts), strict=True))
    # Who owns how many experts of a level, and which of them its mixture sees.
    sizes = {f"task_{task}": own for task in seen} | {"shared": config.num_experts - len(tasks) * own}
    mixed = {f"task_{task}": experts for task, experts in seen.items()} | {"shared": range(config.num_experts)}

    below = dict.fromkeys(sizes, keras.layers.Flatten(name="user_flat")(user_fields))
    for level in range(1, config.num_levels + 1):
        outputs = keras.layers.Concatenate(axis=1, name=f"experts_{level}")(
            [
                Experts(
                    size,
                    config.hidden_dims,
                    config.embedding_dim,
                    dropout_rate=config.dropout_rate,
                    name=f"experts_{level}_{group}",
                )(below[group])
                for group, size in sizes.items()
            ]
        )
        if level < config.num_levels:
            below = {
                group: mixture(
                    below[group], outputs, experts, f"gate_{level}_{group}", f"mixture_{level}_{group}", config
                )
                for group, experts in mixed.items()
            }
    user_vectors = {
        task: mixture(below[f"task_{task}"], outputs, experts, f"gate_{task}", f"user_vector_{task}", config)
        for task, experts in seen.items()
    }
    return user_vectors, tag_vectors(item_fields, tasks, config)


def own_experts(num_tasks: int, num_experts: int) -> int:
    """How many experts each task owns in CGC and PLE, `E // (T + 1)`; the rest is shared.

    Raises:
        ConfigError: If there are too few experts to give each task one and share one.
    """
    own = num_experts // (num_tasks + 1)
    if not own:
        raise ConfigError(
            f"CGC and PLE need at least one expert per task and one shared, {num_tasks + 1} in all. "
            f"Received: num_experts={num_experts}"
        )
    return own


def cgc_experts(num_tasks: int, num_experts: int) -> tuple[tuple[int, ...], ...]:
    """The experts that each task sees in CGC where none are stated: its own, then the shared ones.

    >>> cgc_experts(2, 10)
    ((0, 1, 2, 6, 7, 8, 9), (3, 4, 5, 6, 7, 8, 9))
    """
    own = own_experts(num_tasks, num_experts)
    shared = tuple(range(num_tasks * own, num_experts))
    return tuple((*range(t * own, (t + 1) * own), *shared) for t in range(num_tasks))
