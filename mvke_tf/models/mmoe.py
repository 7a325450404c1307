"""Mixtures of experts with a gate per task: MMoE (Ma et al., KDD 2018), CGC and PLE (Tang et al., RecSys 2020).

They differ in the experts that a task sees: in MMoE all (or those named by the task), in CGC its own and the shared
ones; PLE stacks several levels of CGC. The item side is the published tag tower, as in every model of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.layers import ExpertGate, Experts, MixExperts
from mvke_tf.layers.gates import check_top_k
from mvke_tf.models.two_tower import USER_VECTOR, Vectors, build_two_tower, tag_vectors
from mvke_tf.schema import Schema, Task


def own_experts(num_tasks: int, num_experts: int) -> int:
    """How many experts each task owns in CGC and PLE, `E // (T + 1)`; the rest is shared.

    Raises:
        ValueError: If there are too few experts to give each task one and share one.
    """
    own = num_experts // (num_tasks + 1)
    if not own:
        raise ValueError(
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


def mixture(
    inputs: Any, outputs: Any, experts: Sequence[int], gate: str, name: str, top_k: int = 0, balance: float = 0.0
) -> Any:
    """The mixture of experts that one task sees, with a linear softmax gate on `inputs`.

    Args:
        inputs: What the gate reads, `(B, I)`.
        outputs: Expert outputs `(B, E, O)`.
        experts: Indices of the experts; a single one needs no gate, its output is returned.
        gate: Name of the gate's layer.
        name: Name of the layer that puts the mixture out.
        top_k: Experts that keep weight in each row; 0 for all.
        balance: Coefficient of the loss that evens out the use of experts.

    Returns:
        `(B, O)`.

    Raises:
        ValueError: If there are fewer experts than `top_k`.
    """
    check_top_k(top_k, len(experts), gate)
    mix = MixExperts(experts, name=name)
    if len(experts) == 1:
        return mix(outputs)
    return mix(outputs, ExpertGate(experts, top_k=top_k, balance=balance, name=gate)(inputs))


def gate_settings(config: ModelConfig) -> dict[str, Any]:
    """What `mixture` takes from the settings of a model."""
    return {"top_k": config.gate_top_k, "balance": config.balance_coefficient}


def _one_level(user_fields: Any, tasks: Sequence[Task], config: ModelConfig, seen: Sequence[Sequence[int]]) -> Vectors:
    flat = keras.layers.Flatten(name="user_flat")(user_fields)
    outputs = Experts(
        config.num_experts,
        config.hidden_dims,
        config.embedding_dim,
        dropout_rate=config.dropout_rate,
        name="experts",
    )(flat)
    return {
        task.name: mixture(
            flat,
            outputs,
            default if task.experts is None else task.experts,
            f"gate_{task.name}",
            USER_VECTOR.format(task=task.name),
            **gate_settings(config),
        )
        for task, default in zip(tasks, seen, strict=True)
    }


def mmoe_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of MMoE: a task sees `task.experts`, or all.

    Args:
        user_fields: `(B, F, D)`.
        item_fields: `(B, F', D)`.
        tasks: The tasks; with `experts` (0..5) and (2..9) of 10 they make the published baseline.
        config: Shape of the model.

    Returns:
        `{task: (B, D)}` for users and for items.
    """
    everything = [tuple(range(config.num_experts))] * len(tasks)
    return _one_level(user_fields, tasks, config, everything), tag_vectors(item_fields, tasks, config)


def cgc_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of CGC: a task sees `task.experts`, or those of `cgc_experts`. Arguments as in `mmoe_towers`."""
    seen = cgc_experts(len(tasks), config.num_experts)
    return _one_level(user_fields, tasks, config, seen), tag_vectors(item_fields, tasks, config)


def ple_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of PLE: `num_levels` levels of CGC. Arguments as in `mmoe_towers`.

    On every level each task owns experts that read the task's mixture of the level below, and the shared experts read
    the shared mixture, whose gate sees all experts of its level. The last level has no shared mixture.
    """
    seen = cgc_experts(len(tasks), config.num_experts)
    own = own_experts(len(tasks), config.num_experts)
    settings = gate_settings(config)
    sizes = {f"task_{task.name}": own for task in tasks} | {"shared": config.num_experts - len(tasks) * own}
    flat = keras.layers.Flatten(name="user_flat")(user_fields)
    below = dict.fromkeys(sizes, flat)
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
        if level == config.num_levels:
            break
        below = {
            group: mixture(
                below[group], outputs, chosen, f"gate_{level}_{group}", f"mixture_{level}_{group}", **settings
            )
            for group, chosen in zip(sizes, (*seen, range(config.num_experts)), strict=True)
        }
    user_vectors = {
        task.name: mixture(
            below[f"task_{task.name}"],
            outputs,
            chosen,
            f"gate_{task.name}",
            USER_VECTOR.format(task=task.name),
            **settings,
        )
        for task, chosen in zip(tasks, seen, strict=True)
    }
    return user_vectors, tag_vectors(item_fields, tasks, config)


def build_mmoe_two_tower(schema: Schema, config: ModelConfig | None = None) -> keras.Model:
    """MMoE, `{feature: tensor} -> {task: logit (B, 1)}`; a task without `experts` sees all."""
    return build_two_tower(schema, config, mmoe_towers, "mmoe")


def build_cgc(schema: Schema, config: ModelConfig | None = None) -> keras.Model:
    """CGC, `{feature: tensor} -> {task: logit (B, 1)}`; a task without `experts` sees those of `cgc_experts`."""
    return build_two_tower(schema, config, cgc_towers, "cgc")


def build_ple(schema: Schema, config: ModelConfig | None = None) -> keras.Model:
    """PLE, `{feature: tensor} -> {task: logit (B, 1)}`."""
    return build_two_tower(schema, config, ple_towers, "ple")
