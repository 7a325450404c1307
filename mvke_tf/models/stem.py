# SPDX-License-Identifier: Apache-2.0
"""STEM: shared and task-specific embeddings (Su et al., AAAI 2024, arXiv 2308.13537), as two towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.layers import ExpertGate, Experts, MixExperts, SliceFields
from mvke_tf.layers.gates import check_top_k
from mvke_tf.models.ple import cgc_experts, own_experts
from mvke_tf.models.two_tower import TwoTowerModel, Vectors, build_two_tower, task_networks
from mvke_tf.schema import Schema, Task


def build_stem(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """STEM, `{feature: tensor} -> {task: logit (B, 1)}`.

    Every field has T + 1 embeddings of width D: one per task, and a shared one. On the user side each task owns experts
    that read its embeddings, and the shared experts read the shared ones. A task's gate, which reads its own and the
    shared embeddings, mixes the experts of all tasks and the shared ones; a task sends no gradient to the experts of
    another (the paper's "all forward, task-specific backward"), so that only its own and the shared embeddings learn
    from it. What the two-tower form changes: the item side has no experts, but one MLP per task, of the task's own and
    the shared embeddings.

    Raises:
        ConfigError: If there are too few experts.
    """
    return build_two_tower(schema, config, stem_towers, "stem", embeddings=len(schema.tasks) + 1)


def stem_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of STEM.

    Args:
        user_fields: `(B, F, (T + 1) D)`: the embeddings of the T tasks side by side, then the shared ones.
        item_fields: `(B, F', (T + 1) D)`.
        tasks: The tasks.
        config: Shape of the model.

    Returns:
        `{task: (B, D)}` for users and for items.
    """
    own, count, shared = own_experts(len(tasks), config.num_experts), config.num_experts, len(tasks)
    seen_backward = cgc_experts(len(tasks), count)
    sizes = [own] * shared + [count - shared * own]
    flat = [
        keras.layers.Flatten(name=f"user_flat_{name}")(
            SliceFields((index,), shared + 1, name=f"user_part_{name}")(user_fields)
        )
        for index, name in enumerate([*(task.name for task in tasks), "shared"])
    ]
    outputs = keras.layers.Concatenate(axis=1, name="experts")(
        [
            Experts(
                size,
                config.hidden_dims,
                config.embedding_dim,
                dropout_rate=config.dropout_rate,
                name=f"experts_{index}",
            )(part)
            for index, (size, part) in enumerate(zip(sizes, flat, strict=True))
        ]
    )
    users: Vectors = {}
    items: Vectors = {}
    for index, task in enumerate(tasks):
        check_top_k(config.gate_top_k, count, f"gate_{task.name}")
        inputs = keras.layers.Concatenate(name=f"gate_input_{task.name}")([flat[index], flat[shared]])
        gate = ExpertGate(
            range(count),
            top_k=config.gate_top_k,
            load_balancing_weight=config.load_balancing_weight,
            name=f"gate_{task.name}",
        )(inputs)
        stopped = tuple(expert for expert in range(count) if expert not in seen_backward[index])
        users[task.name] = MixExperts(range(count), stopped, name=f"user_vector_{task.name}")(outputs, gate)
        fields = SliceFields((index, shared), shared + 1, name=f"item_part_{task.name}")(item_fields)
        items |= task_networks(fields, (task,), config, f"tag_tower_{task.name}", "item_vector_{task}")
    return users, items
