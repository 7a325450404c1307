# SPDX-License-Identifier: Apache-2.0
"""Models of tasks that follow one another (a conversion after a click), in the order of the tasks: AITM and ResFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.layers import TransferAttention
from mvke_tf.models.two_tower import TwoTowerModel, Vectors, build_two_tower, tag_vectors, task_networks
from mvke_tf.schema import Schema, Task


def build_aitm(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """AITM (Xi et al., KDD 2021, arXiv 2105.08489), `{feature: tensor} -> {task: logit (B, 1)}`.

    The vector z of each task after the first is the attention over what the task before it transfers,
    `p = relu(W z_before + b)`, and its own tower's output q (`TransferAttention`). What the two-tower form changes:
    the chain is on the user side, and the item side is one MLP per task. The paper's calibrator, a loss of
    `max(p_t - p_before, 0)`, is left out: of tasks with `given` the product of probabilities cannot exceed the one
    before.
    """
    return build_two_tower(schema, config, aitm_towers, "aitm")


def aitm_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of AITM; arguments and return value as in `mvke_tf.models.mmoe.mmoe_towers`."""
    own = task_networks(user_fields, tasks, config, "user_towers", "user_tower_{task}")
    vectors: Vectors = {}
    before = None
    for task in tasks:
        vector = own[task.name]
        if before is not None:
            passed = keras.layers.Dense(config.embedding_dim, activation="relu", name=f"transfer_{task.name}")(before)
            vector = TransferAttention(name=f"user_vector_{task.name}")(passed, vector)
        vectors[task.name] = before = vector
    return vectors, tag_vectors(item_fields, tasks, config)


def build_resflow(schema: Schema, config: ModelConfig | None = None) -> TwoTowerModel:
    """ResFlow (Fu et al., 2024, arXiv 2411.09705), `{feature: tensor} -> {task: logit (B, 1)}`.

    A task learns what is left over by the task before it, in its layers and in its logit:

        h_t^l = relu(W_t^l h_t^(l-1) + b_t^l) + h_before^l,    logit_t = logit_before + residual_t

    What the two-tower form changes: both sides have such layers, and the logit flows by vectors side by side,
    `⟨[u_before, u_t], [v_before, v_t]⟩ = ⟨u_before, v_before⟩ + ⟨u_t, v_t⟩`, so that the t-th task's vectors are t D
    wide. With `given` and the objective `"marginal"` this is the paper's model; with `"joint"` the logit given the
    event flows. Tasks of other kinds, which have no logit to add up, have layers of their own.
    """
    return build_two_tower(schema, config, resflow_towers, "resflow")


def resflow_towers(
    user_fields: Any, item_fields: Any, tasks: Sequence[Task], config: ModelConfig
) -> tuple[Vectors, Vectors]:
    """The two towers of ResFlow: `{task: (B, t D)}` of the t-th binary task; arguments as in `aitm_towers`."""
    return (
        _residual_networks(user_fields, tasks, config, "user"),
        _residual_networks(item_fields, tasks, config, "item"),
    )


def _residual_networks(fields: Any, tasks: Sequence[Task], config: ModelConfig, side: str) -> Vectors:
    flat = keras.layers.Flatten(name=f"{side}_flat")(fields)
    hidden_before: list[Any] = []
    vectors: Vectors = {}
    before = None
    for task in tasks:
        x, hidden = flat, []
        flows = task.kind == "binary"
        for level, units in enumerate(config.hidden_dims):
            x = keras.layers.Dense(units, activation="relu", name=f"{side}_{task.name}_{level}")(x)
            x = keras.layers.Dropout(config.dropout_rate, name=f"{side}_{task.name}_dropout_{level}")(x)
            if flows and hidden_before:
                x = keras.layers.Add(name=f"{side}_{task.name}_flow_{level}")([x, hidden_before[level]])
            hidden.append(x)
        own = keras.layers.Dense(config.embedding_dim, name=f"{side}_{task.name}_residual")(x)
        if flows and before is not None:
            own = keras.layers.Concatenate(name=f"{side}_vector_{task.name}")([before, own])
        vectors[task.name] = own
        if flows:
            before, hidden_before = own, hidden
    return vectors
