"""MVKE: Mixture of Virtual-Kernel Experts (Xu et al., KDD 2022, arXiv 2106.07356)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.layers import Experts, SelectExperts, VirtualKernelAttention, VirtualKernelGate, VirtualKernels
from mvke_tf.models.two_tower import Vectors, build_two_tower, cut, tag_vectors
from mvke_tf.schema import Schema, Task


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
    table = VirtualKernels(num_kernels, dim, config.kernel_stddev, name="virtual_kernels")
    attended, _ = VirtualKernelAttention(config.attention_stddev, name="virtual_kernel_attention")(
        user_fields, table(user_fields), return_attention_scores=True
    )
    experts = Experts(
        num_kernels, config.hidden_dims, dim, config.shared_experts, config.dropout_rate, name="virtual_kernel_experts"
    )(attended)
    tags = tag_vectors(item_fields, tasks, config, "tag_{task}")
    kernels = table(item_fields)
    user_vectors, item_vectors = {}, {}
    for task, default in zip(tasks, default_kernels(len(tasks), num_kernels), strict=True):
        tag = tags[task.name]
        seen = default if task.kernels is None else task.kernels
        gate = VirtualKernelGate(seen, config.gate_top_k, config.balance_coefficient, name=f"gate_{task.name}")(
            tag, kernels
        )
        scaled = keras.layers.Multiply(name=f"gated_tag_{task.name}")(
            [
                keras.layers.Reshape((-1, 1), name=f"gate_column_{task.name}")(gate),
                keras.layers.Reshape((1, dim), name=f"tag_row_{task.name}")(tag),
            ]
        )
        item_vectors[task.name] = keras.layers.Flatten(name=f"item_vector_{task.name}")(scaled)
        user_vectors[task.name] = SelectExperts(seen, name=f"user_vector_{task.name}")(experts)
    return user_vectors, item_vectors


def build_mvke(schema: Schema, config: ModelConfig | None = None) -> keras.Model:
    """The MVKE model, `{feature: tensor} -> {task: logit (B, 1)}`.

    Args:
        schema: Features and tasks; a task without `kernels` gets those of `default_kernels`.
        config: Shape of the model.

    Raises:
        ValueError: If a task names a kernel that does not exist, or sees fewer kernels than `gate_top_k`.

    Example:

    >>> schema = Schema((Feature("user_id", "user", 100), Feature("item_id", "item", 50)))
    >>> model = build_mvke(schema)
    >>> sorted(model(dict(user_id=np.array([1]), item_id=np.array([2]))))
    ['ctr', 'cvr']
    """
    return build_two_tower(schema, config, mvke_towers, "mvke")


def field_attention_model(model: keras.Model) -> keras.Model:
    """The field attention of a built or loaded MVKE, `{user feature: tensor} -> (B, F, K)`, summing to 1 over F."""
    _, scores = model.get_layer("virtual_kernel_attention").output
    return cut(model, scores, name="field_attention")
