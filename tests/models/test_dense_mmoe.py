import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.models.dense_mmoe import build_mmoe, build_mmoe_recommender
from tests.layer_checks import assert_close
from tests.models.problems import numpy_outputs, randomize

FEATURES = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
SMALL = {"input_dim": 8, "num_experts": 3, "expert_hidden_dims": (5, 4), "tower_hidden_dims": (3,)}


def relu(x):
    return np.maximum(x, 0.0)


@pytest.mark.parametrize("gate_hidden_dims", [None, (7,)])
def test_outputs_by_hand(gate_hidden_dims):
    model = randomize(build_mmoe(**SMALL, gate_hidden_dims=gate_hidden_dims, return_expert_weights=True))
    outputs = numpy_outputs(model, FEATURES)
    first, second, first_bias, second_bias = (model.get_layer("experts").get_weights()[index] for index in (0, 2, 1, 3))
    hidden = relu(np.einsum("bi,eio->beo", FEATURES, first) + first_bias[:, 0])
    experts = relu(np.einsum("bei,eio->beo", hidden, second) + second_bias[:, 0])
    for task in ("task_0", "task_1"):
        x = FEATURES
        for index in range(len(gate_hidden_dims or ())):
            kernel, bias = model.get_layer(f"gate_hidden_{task}_{index}").get_weights()
            x = relu(x @ kernel + bias)
        kernel, bias = model.get_layer(f"gate_{task}").get_weights()
        gate = ops.convert_to_numpy(ops.softmax(x @ kernel + bias))
        assert_close(outputs[f"{task}_expert_weights"], gate)
        assert_close(gate.sum(axis=1), np.ones(6))
        x = np.einsum("be,beo->bo", gate, experts)
        kernel, bias = model.get_layer(f"tower_{task}_0").get_weights()
        x = relu(x @ kernel + bias)
        kernel, bias = model.get_layer(task).get_weights()
        assert_close(outputs[task], x @ kernel + bias)


def test_classification_beside_regression_learns(tmp_path):
    keras.utils.set_random_seed(0)
    model = build_mmoe(8, dropout_rate=0.0, task_output_dims=(1, 2))
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss={"task_0": keras.losses.BinaryCrossentropy(from_logits=True), "task_1": "mse"},
        jit_compile=False,
    )
    features = np.random.default_rng(1).normal(size=(256, 8)).astype("float32")
    labels = {"task_0": (features[:, :1] > 0).astype("float32"), "task_1": features[:, 1:3]}
    history = model.fit(features, labels, epochs=30, batch_size=64, verbose=0).history
    assert history["task_0_loss"][-1] < 0.3 < history["task_0_loss"][0]
    assert history["task_1_loss"][-1] < 0.3 < history["task_1_loss"][0]
    model.save(tmp_path / "model.keras")
    loaded = numpy_outputs(keras.saving.load_model(tmp_path / "model.keras"), FEATURES)
    for task, output in numpy_outputs(model, FEATURES).items():
        assert_close(loaded[task], output, 1e-6)


def test_defaults():
    model = build_mmoe()
    assert model.input_shape == (None, 128)
    assert {task: output.shape for task, output in model.output.items()} == {"task_0": (None, 1), "task_1": (None, 1)}
    assert model.get_layer("experts").num_experts == 3


def test_recommender_is_the_mmoe_on_embeddings_and_dense_features(tmp_path):
    model = randomize(build_mmoe_recommender(9, 7, 3, 2, tower_hidden_dims=(4,), return_expert_weights=True))
    inputs = {
        "user_id": np.array([8, 0, 3], "int32"),
        "item_id": np.array([1, 6, 2], "int32"),
        "dense_features": np.ones((3, 2), "float32"),
    }
    outputs = numpy_outputs(model, inputs)
    features = np.concatenate(
        [
            model.get_layer("embedding_user_id").get_weights()[0][inputs["user_id"]],
            model.get_layer("embedding_item_id").get_weights()[0][inputs["item_id"]],
            inputs["dense_features"],
        ],
        axis=1,
    )
    for name, output in numpy_outputs(model.get_layer("mmoe"), features).items():
        assert_close(outputs[name], output, 1e-6)
    model.save(tmp_path / "model.keras")
    loaded = numpy_outputs(keras.saving.load_model(tmp_path / "model.keras"), inputs)
    assert_close(loaded["task_1"], outputs["task_1"], 1e-6)


def test_recommender_without_dense_features():
    assert set(build_mmoe_recommender(5, 5, 2, 0).input) == {"user_id", "item_id"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tasks": 0}, "at least one task"),
        ({"expert_hidden_dims": ()}, "one layer per expert"),
        ({"task_output_dims": (1, 1, 1)}, "for each of the 2 tasks. Received: \\(1, 1, 1\\)"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        build_mmoe(**settings)
