# SPDX-License-Identifier: Apache-2.0
"""MVKE: Mixture of Virtual-Kernel Experts (Xu et al., KDD 2022, arXiv 2106.07356)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mvke_tf.config import ModelConfig
from mvke_tf.layers import Experts, GatedTag, SelectExperts, VirtualKernelAttention, VirtualKernelGate, VirtualKernels
from mvke_tf.models.two_tower import TwoTowerModel, Vectors, build_two_tower, tag_vectors
from mvke_tf.schema import Schema, Task


def build_mvke(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """The MVKE model, `{feature: tensor} -> {task: logit (B, 1)}`.

    Args:
        schema: Features and tasks; a task without `kernels` gets those of `default_kernels`.
        config: Shape of the model.

    Raises:
        ValueError: If a task names a kernel that does not exist.
        ConfigError: If a task sees fewer kernels than `gate_top_k`.

    Example:

    >>> features = (Feature("user_id", "user", 100), Feature("item_id", "item", 50))
    >>> model = build_mvke(Schema(features, (Task("click"), Task("buy", given="click"))))
    >>> sorted(model(dict(user_id=np.array([1]), item_id=np.array([2]))))
    ['buy', 'click']
    """
    return build_two_tower(schema, config, mvke_towers, "mvke")


def mvke_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of MVKE.

    User side: virtual-kernel attention, one expert per kernel; the vector of a task is its kernels' expert outputs
    side by side. Item side: one tag tower per task; the vector is the tag, scaled by each gate weight in turn. Their
    inner product is the published logit `⟨Σ_k g_k expert_k, tag⟩`.

    Args:
        user_fields: `(B, F, D)`.
        item_fields: `(B, F', D)`.
        tasks: The tasks, with their kernels.
        config: Shape of the model.

    Returns:
        `{task: (B, n_task D)}` for users and for items, n_task the number of kernels of the task.
    """
    dim, num_kernels = config.embedding_dim, config.num_virtual_kernels
    seen = {
        task.name: default if task.kernels is None else task.kernels
        for task, default in zip(tasks, default_kernels(len(tasks), num_kernels), strict=True)
    }

    # === User tower ===
    # One table of virtual kernels, which the attention and the gates read.
    table = VirtualKernels(num_kernels, dim, config.virtual_kernel_stddev, name="virtual_kernels")
    attended, _ = VirtualKernelAttention(config.attention_stddev, name="virtual_kernel_attention")(
        user_fields, table(user_fields), return_attention_scores=True
    )
    experts = Experts(
        num_kernels, config.hidden_dims, dim, config.shared_experts, config.dropout_rate, name="virtual_kernel_experts"
    )(attended)
    user_vectors = {task: SelectExperts(seen[task], name=f"user_vector_{task}")(experts) for task in seen}

    # === Item tower ===
    tags = tag_vectors(item_fields, tasks, config, "tag_{task}")
    kernels = table(item_fields)
    item_vectors = {}
    for task in seen:
        gate = VirtualKernelGate(seen[task], config.gate_top_k, config.load_balancing_weight, name=f"gate_{task}")(
            tags[task], kernels
        )
        item_vectors[task] = GatedTag(name=f"item_vector_{task}")(tags[task], gate)
    return user_vectors, item_vectors


def default_kernels(num_tasks: int, num_kernels: int) -> tuple[tuple[int, ...], ...]:
    """The virtual kernels of each task where none are stated.

    Task t of T sees the kernels `floor(t K / 2T)` to `K - 1 - floor((T - 1 - t) K / T)`: overlapping windows that
    move from the first kernel to the last, of which two tasks and five kernels give the published ranges.

    >>> default_kernels(2, 5)
    ((0, 1, 2), (1, 2, 3, 4))
    """
    return tuple(
        tuple(range(t * num_kernels // (2 * num_tasks), num_kernels - (num_tasks - 1 - t) * num_kernels // num_tasks))
        for t in range(num_tasks)
    )
