# SPDX-License-Identifier: Apache-2.0
"""Dense features, and an item side of one constant."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.models import MODELS, build_model
from mvke_tf.models.two_tower import embed_fields, feature_inputs
from mvke_tf.schema import CONSTANT_ITEM, Feature, Schema, Task
from tests.layer_checks import assert_close
from tests.models.problems import CONFIG, JIT_COMPILE, numpy_outputs, randomize

pytestmark = pytest.mark.slow

SCHEMA = Schema(
    (
        Feature("age", "user", width=2, unknown_rate=0.5, unknown_group="profile"),
        Feature("city", "user", 7, unknown_rate=0.5, unknown_group="profile"),
        Feature("text", "user", width=4),
        Feature(CONSTANT_ITEM, "item", 1),
    ),
    (Task("click"), Task("buy", given="click")),
)
ROWS = 200
RANDOM = np.random.default_rng(0)
INPUTS = {
    "age": np.stack([np.zeros(ROWS), RANDOM.normal(size=ROWS)], axis=1).astype("float32"),
    "city": RANDOM.integers(1, 7, ROWS).astype("int32"),
    "text": RANDOM.normal(size=(ROWS, 4)).astype("float32"),
    CONSTANT_ITEM: np.zeros(ROWS, "int32"),
}
UNKNOWN_AGE = np.array([1.0, 0.0], "float32")


@pytest.fixture(scope="module")
def fields() -> keras.Model:
    """`{feature: tensor} -> {tower: (B, F, D)}` with known weights."""
    inputs = feature_inputs(SCHEMA.features)
    assert {name: (symbol.shape, symbol.dtype) for name, symbol in inputs.items()} == {
        "age": ((None, 2), "float32"),
        "city": ((None,), "int32"),
        "text": ((None, 4), "float32"),
        CONSTANT_ITEM: ((None,), "int32"),
    }
    outputs = embed_fields(SCHEMA, dataclasses.replace(CONFIG, embedding_dim=3, embedding_dropout_rate=0.0), inputs)
    model = keras.Model(inputs, outputs)
    model.get_layer("embedding_age").set_weights([np.array([[1, 2, 3], [10, 20, 30]]), np.array([0.5, 0, -0.5])])
    return model


def test_a_dense_field_is_a_linear_layer_of_its_own(fields):
    inputs = {name: column[:3] for name, column in INPUTS.items()}
    inputs["age"] = np.array([[0, 0.1], [0, -2], [1, 0]], "float32")
    outputs = numpy_outputs(fields, inputs)
    # x W + b: of 0.1, of -2, and of an unknown value.
    assert_close(outputs["user"][:, 0], [[1.5, 2, 2.5], [-19.5, -40, -60.5], [1.5, 2, 2.5]])
    kernel, bias = fields.get_layer("embedding_text").get_weights()
    assert_close(outputs["user"][:, 2], inputs["text"] @ kernel + bias)
    np.testing.assert_array_equal(
        outputs["user"][:, 1], fields.get_layer("embedding_city").get_weights()[0][inputs["city"]]
    )
    table = fields.get_layer(f"embedding_{CONSTANT_ITEM}").get_weights()[0]
    assert table.shape == (1, 3)
    np.testing.assert_array_equal(outputs["item"], np.broadcast_to(table, (3, 1, 3)))


def test_first_weights_of_a_dense_field_have_the_scale_of_embeddings():
    """The bias too: without one, a value of 0 would have no direction."""
    keras.utils.set_random_seed(0)
    schema = Schema((Feature("text", "user", width=400), Feature("id", "item", 2)), (Task("click"),))
    config = dataclasses.replace(CONFIG, embedding_dim=64, embedding_stddev=0.3)
    kernel, bias = build_model("mvke", schema, config).get_layer("embedding_text").get_weights()
    assert np.std(kernel) == pytest.approx(0.3, rel=0.05) and np.std(bias) == pytest.approx(0.3, rel=0.3)


def test_dense_and_indexed_features_of_a_group_become_unknown_together(fields):
    model = keras.Model(fields.input, fields.get_layer("unknown_profile").output)
    age, city = (ops.convert_to_numpy(part) for part in model(INPUTS, training=True))
    unknown = city == 0
    assert 0.4 < unknown.mean() < 0.6
    np.testing.assert_array_equal(age[unknown], np.broadcast_to(UNKNOWN_AGE, (unknown.sum(), 2)))
    np.testing.assert_array_equal(age[~unknown], INPUTS["age"][~unknown])
    np.testing.assert_array_equal(city[~unknown], INPUTS["city"][~unknown])
    age, city = (ops.convert_to_numpy(part) for part in model(INPUTS, training=False))
    np.testing.assert_array_equal(age, INPUTS["age"])
    np.testing.assert_array_equal(city, INPUTS["city"])


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"single_task"}))
def test_every_model_learns_from_dense_features_and_is_saved_with_them(name, tmp_path):
    """The label is the sign of a number; one constant item."""
    config = dataclasses.replace(CONFIG, name=name, num_experts=4, embedding_dropout_rate=0.0)
    model = build_model(name, SCHEMA, config)
    labels = {
        "click": (INPUTS["text"][:, :1] > 0).astype("float32"),
        "buy": (INPUTS["text"][:, :1] > 1).astype("float32"),
    }
    trained = model.training_model(deduplicate=False)
    loss = {task: keras.losses.BinaryCrossentropy(from_logits=True) for task in labels}
    trained.compile(keras.optimizers.Adam(0.02), loss, jit_compile=JIT_COMPILE)
    losses = trained.fit(INPUTS, labels, epochs=12, batch_size=50, verbose=0).history["click_loss"]
    assert losses[-1] < 0.6 * losses[0]
    assert set(model.item_tower.input) == {CONSTANT_ITEM}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.user_fields == ("age", "city", "text")
    for task, logit in numpy_outputs(model, INPUTS).items():
        assert_close(numpy_outputs(loaded, INPUTS)[task], logit, 1e-6)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = randomize(build_model("mvke", SCHEMA, CONFIG))
    finally:
        keras.config.set_dtype_policy("float32")
    expected = numpy_outputs(randomize(build_model("mvke", SCHEMA, CONFIG)), INPUTS)
    for task, logit in numpy_outputs(mixed, INPUTS).items():
        assert_close(logit, expected[task], 0.1)
    age, _ = mixed.get_layer("unknown_profile").output
    assert age.dtype == "bfloat16"
