# SPDX-License-Identifier: Apache-2.0
import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.errors import ConfigError
from mvke_tf.layers import FieldEmbedding
from mvke_tf.models import MODELS, build_model
from mvke_tf.models.mvke import build_mvke
from mvke_tf.models.two_tower import TwoTowerModel, embed_fields, feature_inputs, score
from mvke_tf.schema import Feature, Schema, Task
from tests.layer_checks import assert_close
from tests.models.problems import (
    CONFIG,
    ITEMS,
    PAIRS,
    ROWS,
    SCHEMA,
    USERS,
    numpy_outputs,
    randomize,
    task_losses_and_gradients,
)


def test_inputs_and_outputs(model):
    assert {name: (symbol.shape, symbol.dtype) for name, symbol in model.input.items()} == {
        "user_id": ((None,), "int32"),
        "age": ((None,), "int32"),
        "history": ((None, 4), "int32"),
        "history_weights": ((None, 4), "float32"),
        "item_id": ((None,), "int32"),
        "genres": ((None, 3), "int32"),
        "genres_weights": ((None, 3), "float32"),
    }
    assert {name: symbol.shape for name, symbol in model.output.items()} == {"ctr": (None, 1), "cvr": (None, 1)}
    assert model.task_names == ("ctr", "cvr")


def test_a_loaded_model_gives_the_same_logits(built, loaded):
    expected = numpy_outputs(built, PAIRS)
    assert all(np.abs(logit).max() > 0.1 for logit in expected.values())
    for task, logit in numpy_outputs(loaded, PAIRS).items():
        assert_close(logit, expected[task], 1e-6)


def test_logits_are_inner_products_of_the_towers(model):
    users, items = numpy_outputs(model.user_tower, USERS), numpy_outputs(model.item_tower, ITEMS)
    for task, logit in numpy_outputs(model, PAIRS).items():
        all_pairs = users[task] @ items[task].T
        assert_close(all_pairs[ROWS["user_rows"], ROWS["item_rows"]], logit[:, 0])


def test_towers_read_their_own_features_and_share_the_weights(model):
    user, item = model.user_tower, model.item_tower
    assert (set(user.input), set(item.input)) == (set(USERS), set(ITEMS))
    parts = [{id(weight) for weight in part.weights} for part in (user, item, model)]
    assert parts[0] | parts[1] == parts[2]
    paths = {weight.path for weight in user.weights if id(weight) in parts[1]}
    assert paths == {"embedding_item_id/embeddings", "virtual_kernels/kernels"}


def test_features_that_share_a_table_have_one():
    inputs = feature_inputs(SCHEMA.features)
    fields = embed_fields(SCHEMA, CONFIG, inputs)
    assert {side: symbol.shape for side, symbol in fields.items()} == {"user": (None, 3, 8), "item": (None, 2, 8)}
    model = keras.Model(inputs, fields)
    tables = {layer.name for layer in model.layers if isinstance(layer, FieldEmbedding)}
    assert tables == {"embedding_user_id", "embedding_age", "embedding_item_id", "embedding_genres"}
    table = ops.convert_to_numpy(model.get_layer("embedding_item_id").embeddings)
    outputs = numpy_outputs(model, PAIRS)
    np.testing.assert_array_equal(outputs["item"][:, 0], table[PAIRS["item_id"]])
    weights = PAIRS["history_weights"]
    means = np.einsum("bl,bld->bd", weights, table[PAIRS["history"]]) / np.maximum(weights.sum(1, keepdims=True), 1e-9)
    assert_close(outputs["user"][:, 2], means)


def test_the_distinct_model_has_the_same_losses_and_gradients(model):
    variables = model.trainable_variables
    distinct = model.training_model()
    assert {id(weight) for weight in distinct.trainable_variables} == {id(weight) for weight in variables}
    losses, gradients = task_losses_and_gradients(model, PAIRS, ("ctr", "cvr"), variables)
    same_losses, same_gradients = task_losses_and_gradients(
        distinct, {**USERS, **ITEMS, **ROWS}, ("ctr", "cvr"), variables
    )
    for task, loss in losses.items():
        assert_close(same_losses[task], loss)
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for variable, same, gradient in zip(variables, same_gradients, gradients, strict=True):
        assert_close(same, gradient, floor=1e-7 * largest, name=variable.path)


def test_scores_are_float32_in_mixed_precision():
    symbols = {"ctr": keras.Input((3,), dtype="bfloat16")}
    logit = score(symbols, symbols, [Task("ctr")])["ctr"]
    assert (logit.shape, logit.dtype, logit._keras_history.operation.name) == ((None, 1), "float32", "ctr")


def test_a_part_keeps_the_inputs_that_the_outputs_need(built):
    part = built.part(built.get_layer("embedding_age").output, "age")
    assert (list(part.input), part.name) == (["age"], "age")
    table = ops.convert_to_numpy(built.get_layer("embedding_age").embeddings)
    np.testing.assert_array_equal(ops.convert_to_numpy(part({"age": USERS["age"]})), table[USERS["age"]])


@pytest.mark.parametrize("outputs", [{"y": 0}, {"ctr": 0}])
def test_a_model_without_heads_is_not_a_two_tower_model(outputs):
    symbol = keras.Input((3,), name="x")
    other = TwoTowerModel(
        {"x": symbol}, {task: keras.layers.Dense(1, name=task)(symbol) for task in outputs}, name="other"
    )
    with pytest.raises(
        ValueError,
        match=rf"from a head of its name.* Received: {list(outputs)} without one in 'other'".replace("[", r"\["),
    ):
        _ = other.user_tower


def test_features_of_a_group_become_unknown_together_and_others_alone():
    schema = Schema(
        (
            Feature("user_id", "user", 9, unknown_rate=0.5),
            Feature("history", "user", 7, length=2, embedding="item_id"),
            Feature("item_id", "item", 7, unknown_rate=0.5, unknown_group="item"),
            Feature("popularity", "item", 5, unknown_rate=0.5, unknown_group="item"),
        ),
        SCHEMA.tasks,
    )
    model = build_mvke(schema, CONFIG)
    replaced = keras.Model(model.input, [model.get_layer(f"unknown_{group}").output for group in ("user_id", "item")])
    ones = np.ones(200, "int32")
    inputs = {
        **{"user_id": ones, "history": np.ones((200, 2), "int32"), "history_weights": np.ones((200, 2), "float32")},
        **{"item_id": ones, "popularity": 2 * ones},
    }
    user, (item, popularity) = keras.tree.map_structure(ops.convert_to_numpy, replaced(inputs, training=True))
    np.testing.assert_array_equal(popularity, 2 * item)
    assert 50 < item.sum() < 150
    assert 50 < (user == item).sum() < 150
    user, (item, _) = keras.tree.map_structure(ops.convert_to_numpy, replaced(inputs, training=False))
    assert user.all() and item.all()


CHAIN = (
    Task("click"),
    Task("buy", given="click"),
    Task("rating", "regression", offset=3.5, domain=(1, 5)),
)


@pytest.fixture(scope="module", params=sorted(set(MODELS) - {"single_task"}))
def chain_model(request, tmp_path_factory) -> keras.Model:
    """Every model with a conditional task and a regression task, after a round trip through a `.keras` file."""
    settings = dataclasses.replace(CONFIG, name=request.param, num_experts=5)
    path = tmp_path_factory.mktemp("chain") / "model.keras"
    built = randomize(build_model(request.param, SCHEMA.with_tasks(CHAIN), settings))
    built.save(path)
    loaded = keras.saving.load_model(path)
    for task, output in numpy_outputs(built, PAIRS).items():
        assert_close(numpy_outputs(loaded, PAIRS)[task], output)
    return loaded


@pytest.mark.slow
def test_a_conditional_and_a_regression_task(chain_model):
    assert chain_model.kinds == {"click": "binary", "buy": "binary", "rating": "regression"}
    assert chain_model.given == {"buy": "click"}
    users = numpy_outputs(chain_model.user_tower, {name: PAIRS[name] for name in SCHEMA.inputs("user")})
    items = numpy_outputs(chain_model.item_tower, {name: PAIRS[name] for name in SCHEMA.inputs("item")})
    dots = {task: np.sum(users[task] * items[task], axis=1, keepdims=True) for task in users}
    outputs = numpy_outputs(chain_model, PAIRS)
    assert_close(outputs["click"], dots["click"])
    assert_close(outputs["rating"], 3.5 + dots["rating"])
    assert_close(numpy_outputs(chain_model.conditional, PAIRS)["buy"], dots["buy"])
    probabilities = keras.tree.map_structure(ops.convert_to_numpy, chain_model.predictions(outputs))
    expected = 1 / (1 + np.exp(-dots["click"].astype("float64"))) / (1 + np.exp(-dots["buy"].astype("float64")))
    assert_close(probabilities["buy"], expected)
    assert_close(probabilities["rating"], outputs["rating"])
    again = keras.tree.map_structure(ops.convert_to_numpy, chain_model.outputs_of_products(dots))
    distinct = numpy_outputs(chain_model.training_model(), {**USERS, **ITEMS, **ROWS})
    for task, output in outputs.items():
        assert_close(again[task], output)
        assert_close(distinct[task], output)


def test_no_conditional_task(built):
    assert built.given == {} and built.conditional is None


def test_a_feature_with_the_name_of_a_layer():
    features = (*SCHEMA.features, Feature("user_vector_ctr", "user", 5))
    with pytest.raises(ConfigError, match=r"give that another name\. Received: 'user_vector_ctr'"):
        build_model("mvke", Schema(features, SCHEMA.tasks), CONFIG)
