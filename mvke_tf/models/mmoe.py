# SPDX-License-Identifier: Apache-2.0
"""MMoE: Multi-gate Mixture of Experts (Ma et al., KDD 2018), with the published tag tower on the item side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.layers import ExpertGate, Experts, MixExperts
from mvke_tf.layers.gates import check_top_k
from mvke_tf.models.two_tower import TwoTowerModel, Vectors, build_two_tower, tag_vectors
from mvke_tf.schema import Schema, Task


def build_mmoe_two_tower(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """MMoE, `{feature: tensor} -> {task: logit (B, 1)}`; a task without `experts` sees all.

    Example:

    >>> features = (Feature("user_id", "user", 100), Feature("item_id", "item", 50))
    >>> model = build_mmoe_two_tower(Schema(features, (Task("click"), Task("stars", "regression"))))
    >>> model.kinds
    {'click': 'binary', 'stars': 'regression'}
    """
    return build_two_tower(schema, config, mmoe_towers, "mmoe")


def mmoe_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of MMoE: on the user side experts, and a gate per task that mixes those which the task sees.

    Args:
        user_fields: `(B, F, D)`.
        item_fields: `(B, F', D)`.
        tasks: The tasks; with `experts` (0..5) and (2..9) of 10 they make the published baseline.
        config: Shape of the model.

    Returns:
        `{task: (B, D)}` for users and for items.
    """
    everything = tuple(range(config.num_experts))
    seen = {task.name: everything if task.experts is None else task.experts for task in tasks}
    return mixture_of_experts(user_fields, seen, config), tag_vectors(item_fields, tasks, config)


def mixture_of_experts(user_fields: Any, seen: Mapping[str, Sequence[int]], config: ModelConfig) -> Vectors:
    """User vectors `{task: (B, D)}`: one mixture per task of the experts that it sees, of the fields `(B, F, D)`."""
    flat = keras.layers.Flatten(name="user_flat")(user_fields)
    outputs = Experts(
        config.num_experts,
        config.hidden_dims,
        config.embedding_dim,
        dropout_rate=config.dropout_rate,
        name="experts",
    )(flat)
    return {
        task: mixture(flat, outputs, experts, f"gate_{task}", f"user_vector_{task}", config)
        for task, experts in seen.items()
    }


def mixture(inputs: Any, outputs: Any, experts: Sequence[int], gate: str, name: str, config: ModelConfig) -> Any:
    """The mixture of experts that one task sees, with a linear softmax gate on `inputs`.

    Args:
        inputs: What the gate reads, `(B, I)`.
        outputs: Expert outputs `(B, E, O)`.
        experts: Indices of the experts; a single one needs no gate, its output is returned.
        gate: Name of the gate's layer.
        name: Name of the layer that puts the mixture out.
        config: Shape of the model, for `gate_top_k` and `load_balancing_weight`.

    Returns:
        `(B, O)`.

    Raises:
        ConfigError: If there are fewer experts than `gate_top_k`.
    """
    check_top_k(config.gate_top_k, len(experts), gate)
    mix = MixExperts(experts, name=name)
    if len(experts) == 1:
        return mix(outputs)
    weights = ExpertGate(
        experts, top_k=config.gate_top_k, load_balancing_weight=config.load_balancing_weight, name=gate
    )(inputs)
    return mix(outputs, weights)
