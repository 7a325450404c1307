# SPDX-License-Identifier: Apache-2.0
"""A network that is no two-tower model, for comparisons: what of a user counts depends on the item in question.

It says what the two-tower form costs. Nothing else of the library takes it: its users have no vectors.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from mvke_tf.config import ModelConfig
from mvke_tf.errors import ConfigError
from mvke_tf.layers import FieldEmbedding
from mvke_tf.models.multi_task import MultiTaskModel
from mvke_tf.models.two_tower import embed_fields, feature_inputs, score
from mvke_tf.schema import WEIGHTS_SUFFIX, Schema

# Width of the hidden layer of the attention, that of the paper.
ATTENTION_WIDTH = 36


class TargetAttention(keras.layers.Layer):
    """The mean of a list's embeddings, weighted by how much each slot says about a candidate.

    The activation unit of the Deep Interest Network (Zhou et al., KDD 2018, section 4.3), with a softmax over the
    slots, times the weights of the list: where all slots say the same, it is the weighted mean of `FieldEmbedding`.

    B is the batch, L the number of slots, D the width.

    Args:
        table: The embedding of the list's values, whose table is shared.
        width: Width of the hidden layer.

    Call arguments:
        slots: Integer indices `(B, L)`.
        weights: Float weights `(B, L)`; a weight of 0 leaves a slot out.
        candidate: Embeddings `(B, D)` of the candidates.

    Returns:
        Vectors `(B, D)`; of a row without a filled slot the zero vector.
    """

    def __init__(self, table: FieldEmbedding, width: int = ATTENTION_WIDTH, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table
        self.hidden = keras.layers.Dense(width, activation="relu", name="hidden")
        self.score = keras.layers.Dense(1, name="score")

    def build(self, slots_shape, weights_shape, candidate_shape) -> None:
        width = candidate_shape[-1]
        self.hidden.build((*slots_shape, 4 * width))
        self.score.build((*slots_shape, self.hidden.units))
        super().build(slots_shape)

    def call(self, slots, weights, candidate):
        values = ops.take(self.table.embeddings, slots, axis=0)
        wanted = ops.broadcast_to(candidate[:, None], ops.shape(values))
        pairs = ops.concatenate([values, wanted, values - wanted, values * wanted], axis=-1)
        scores = ops.squeeze(self.score(self.hidden(pairs)), -1)
        filled = weights > 0
        scores = ops.where(filled, scores + ops.log(ops.where(filled, weights, 1.0)), -1e9)
        shares = ops.where(filled, ops.softmax(scores), 0.0)
        return ops.sum(shares[..., None] * values, axis=1)

    def compute_output_shape(self, slots_shape, weights_shape, candidate_shape):
        return candidate_shape


def attended_lists(schema: Schema) -> dict[str, str]:
    """`{list of the user: feature of the item whose table it shares}`, of the lists whose slots are like the item.

    Raises:
        ConfigError: If there is none.
    """
    items = {feature.name for feature in schema.of_tower("item") if feature.length == 1 and not feature.is_dense}
    found = {
        feature.name: feature.table
        for feature in schema.of_tower("user")
        if feature.length > 1 and feature.table in items
    }
    if not found:
        raise ConfigError(
            "The baseline target_attention needs a list of the user, such as a history, that shares the embedding of "
            f"one of the features of the item, {sorted(items)}; leave it out of --models. Received: the lists "
            f"{[feature.name for feature in schema.of_tower('user') if feature.length > 1]}"
        )
    return found


def build_target_attention(schema: Schema, config: ModelConfig | None = None) -> MultiTaskModel:
    """A shared-bottom model of user and item together, `{feature: tensor} -> {task: output (B, 1)}`.

    All fields of both, and each list of `attended_lists` by `TargetAttention` to the item, are the input of one
    network, on which each task has an output.

    Args:
        schema: Features, and binary tasks.
        config: Shape of the model; the default shape if None.

    Raises:
        ConfigError: If no list can be attended to.
    """
    config = config or ModelConfig()
    lists = attended_lists(schema)
    inputs = feature_inputs(schema.features)
    fields = embed_fields(schema, config, inputs)
    tables = keras.Model(inputs, fields)
    of_items = [feature.name for feature in schema.of_tower("item")]
    hidden = [keras.layers.Flatten()(fields[tower]) for tower in ("user", "item")]
    for name, owner in lists.items():
        attention = TargetAttention(tables.get_layer(f"embedding_{owner}"), name=f"attention_{name}")
        candidate = fields["item"][:, of_items.index(owner)]
        hidden.append(attention(inputs[name], inputs[name + WEIGHTS_SUFFIX], candidate))
    x = keras.layers.Concatenate()(hidden)
    for width in config.hidden_dims:
        x = keras.layers.Dropout(config.dropout_rate)(keras.layers.Dense(width, activation="relu")(x))
    # The heads of all models take an inner product: here with 1.
    vectors = {task.name: keras.layers.Dense(1, name=f"logit_{task.name}")(x) for task in schema.tasks}
    ones = {task: ops.ones_like(vector) for task, vector in vectors.items()}
    return MultiTaskModel(inputs, score(vectors, ones, schema.tasks), name="target_attention")
