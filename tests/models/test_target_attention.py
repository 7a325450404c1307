# SPDX-License-Identifier: Apache-2.0
import keras
import numpy as np
import pytest

from mvke_tf.config import ModelConfig
from mvke_tf.errors import ConfigError
from mvke_tf.layers import FieldEmbedding
from mvke_tf.models.target_attention import TargetAttention, attended_lists, build_target_attention
from mvke_tf.schema import Feature, Schema, Task

SCHEMA = Schema(
    features=(
        Feature("user", "user", 5),
        Feature("recent", "user", 7, length=4, embedding="item"),
        Feature("topics", "user", 3, length=2, embedding="topic"),
        Feature("item", "item", 7),
        Feature("topic", "item", 3, length=2),
    ),
    tasks=(Task("click"), Task("buy", given="click")),
)
SHAPE = ModelConfig(embedding_dim=3, hidden_dims=(5,), embedding_stddev=0.5)
SLOTS = np.array([[1, 2, 3, 0], [4, 4, 0, 0], [0, 0, 0, 0]], np.int32)
WEIGHTS = np.array([[1, 2, 0.5, 0], [3, 1, 0, 0], [0, 0, 0, 0]], np.float32)


def layer_and_inputs():
    keras.utils.set_random_seed(3)
    table = FieldEmbedding(7, 3, embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0))
    table.build((None,))
    layer = TargetAttention(table, width=2)
    candidate = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    layer(SLOTS, WEIGHTS, candidate)
    return layer, keras.ops.convert_to_numpy(table.embeddings), candidate


def test_slots_weigh_what_the_activation_unit_says():
    layer, table, candidate = layer_and_inputs()
    hidden, score = ([keras.ops.convert_to_numpy(one) for one in part.weights] for part in (layer.hidden, layer.score))
    expected = np.zeros((3, 3))
    for row in range(2):
        shares, vectors = [], []
        for slot, weight in zip(SLOTS[row], WEIGHTS[row], strict=True):
            if weight:
                e, c = table[slot], candidate[row]
                unit = np.maximum(np.concatenate([e, c, e - c, e * c]) @ hidden[0] + hidden[1], 0) @ score[0] + score[1]
                shares.append(weight * np.exp(unit[0]))
                vectors.append(e)
        expected[row] = np.average(vectors, axis=0, weights=shares)
    np.testing.assert_allclose(layer(SLOTS, WEIGHTS, candidate), expected, rtol=1e-5, atol=1e-6)


def test_where_all_slots_say_the_same_it_is_the_mean_of_the_field():
    layer, _, candidate = layer_and_inputs()
    layer.score.kernel.assign(np.zeros((2, 1)))
    mean = layer.table(SLOTS, WEIGHTS)
    np.testing.assert_allclose(layer(SLOTS, WEIGHTS, candidate), mean, rtol=1e-5, atol=1e-6)


def test_the_candidate_decides_and_shapes_are_known():
    layer, _, candidate = layer_and_inputs()
    first, other = (keras.ops.convert_to_numpy(layer(SLOTS, WEIGHTS, one)) for one in (candidate, -candidate))
    assert np.abs(first - other)[0].max() > 1e-3
    assert layer.compute_output_shape((None, 4), (None, 4), (None, 3)) == (None, 3)
    spec = layer(keras.Input((4,), dtype="int32"), keras.Input((4,)), keras.Input((3,)))
    assert spec.shape == (None, 3)


def test_lists_of_the_user_that_are_like_the_item_are_attended_to():
    assert attended_lists(SCHEMA) == {"recent": "item"}
    without = Schema(SCHEMA.features[:1] + SCHEMA.features[2:], SCHEMA.tasks)
    with pytest.raises(ConfigError, match=r"features of the item, \['item'\].*Received: the lists \['topics'\]"):
        attended_lists(without)


def test_what_a_list_means_depends_on_the_item():
    keras.utils.set_random_seed(0)
    model = build_target_attention(SCHEMA, SHAPE)
    rows = {
        "user": np.array([1, 1], np.int32),
        "recent": np.array([[2, 3, 0, 0]] * 2, np.int32),
        "recent_weights": np.array([[1, 1, 0, 0]] * 2, np.float32),
        "topics": np.zeros((2, 2), np.int32),
        "topics_weights": np.zeros((2, 2), np.float32),
        "item": np.array([2, 3], np.int32),
        "topic": np.zeros((2, 2), np.int32),
        "topic_weights": np.zeros((2, 2), np.float32),
    }
    rows = {name: rows[name] for name in model.input}
    pooled = keras.Model(model.input, model.get_layer("attention_recent").output)
    of_two, of_three = keras.ops.convert_to_numpy(pooled(rows))
    assert np.abs(of_two - of_three).max() > 1e-4
    outputs = model(rows)
    click, buy = (keras.ops.convert_to_numpy(outputs[task]) for task in ("click", "buy"))
    assert click.shape == buy.shape == (2, 1)
    # p(buy) is p(click) times p(buy given click).
    assert (buy < click).all()
