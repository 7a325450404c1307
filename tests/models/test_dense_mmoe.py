# SPDX-License-Identifier: Apache-2.0
import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import AttentionGate, ConvolutionalExpert
from mvke_tf.models.dense_mmoe import DenseMMoE, build_mmoe, build_mmoe_recommender
from tests.layer_checks import assert_close, compiled
from tests.models.problems import JIT_COMPILE, in_training, numpy_outputs, randomize

FEATURES = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
SMALL = {"input_dim": 8, "num_experts": 3, "expert_hidden_dims": (5, 4), "tower_hidden_dims": (3,)}


@keras.saving.register_keras_serializable(package="tests")
class Wave(keras.layers.Layer):
    """A caller's own layer, `scale * sin(x W)`."""

    def __init__(self, units, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.units, self.scale = units, scale

    def build(self, inputs_shape):
        self.kernel = self.add_weight(shape=(inputs_shape[-1], self.units), name="kernel")
        super().build(inputs_shape)

    def call(self, inputs):
        return self.scale * ops.sin(ops.matmul(inputs, self.kernel))

    def compute_output_shape(self, inputs_shape):
        return (inputs_shape[0], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units, "scale": self.scale}


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


@pytest.mark.slow
def test_classification_beside_regression_learns():
    """With exchanged parts, sparse gates and the load-balancing loss."""
    keras.utils.set_random_seed(0)
    model = build_mmoe(
        8,
        dropout_rate=0.0,
        task_output_dims=(1, 2),
        experts=[ConvolutionalExpert(16, 8), keras.layers.Dense(16, activation="relu"), Wave(16)],
        gates=[AttentionGate(3), keras.layers.Dense(3)],
        gate_top_k=2,
        load_balancing_weight=0.01,
    )
    model.compile(
        optimizer=keras.optimizers.Adam(0.02),
        loss={"task_0": keras.losses.BinaryCrossentropy(from_logits=True), "task_1": "mse"},
        jit_compile=JIT_COMPILE,
    )
    features = np.random.default_rng(1).normal(size=(1024, 8)).astype("float32")
    labels = {"task_0": (features[:, :1] > 0).astype("float32"), "task_1": features[:, 1:3]}
    history = model.fit(features, labels, epochs=8, batch_size=64, verbose=0).history
    for task in labels:
        assert history[f"{task}_loss"][-1] < 0.4 * history[f"{task}_loss"][0]
    # The load-balancing loss of both gates is the rest of the loss.
    rest = np.subtract(history["loss"], np.add(history["task_0_loss"], history["task_1_loss"]))
    assert rest.min() >= -1e-5 and rest[0] > 1e-4


def test_exchanged_parts_by_hand_and_after_saving(tmp_path):
    experts = [Wave(4, 2.0), keras.Sequential([keras.layers.Dense(5, "relu"), keras.layers.Dense(4)])]
    experts.append(ConvolutionalExpert(4, 2))
    gates = [Wave(3, 3.0), AttentionGate(3, 1, 2)]
    sparse = {"gate_top_k": 2, "load_balancing_weight": 0.1, "dropout_rate": 0.0}
    model = randomize(build_mmoe(8, experts=experts, gates=gates, return_expert_weights=True, **sparse))
    outputs = numpy_outputs(model, FEATURES)
    expert_outputs = [ops.convert_to_numpy(compiled(expert)(FEATURES)) for expert in experts]
    for task, gate in zip(("task_0", "task_1"), gates, strict=True):
        scores = np.array(compiled(gate)(FEATURES))
        scores[np.arange(6), scores.argmin(axis=1)] = -np.inf
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        assert_close(outputs[f"{task}_expert_weights"], weights)
        mixed = np.einsum("be,ebo->bo", weights, expert_outputs)
        mixture = keras.Model(model.input, model.get_layer(f"mixture_{task}").output)
        assert_close(numpy_outputs(mixture, FEATURES), mixed)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again, losses = in_training(loaded, FEATURES)
    assert len(losses) == 2
    for name, output in outputs.items():
        np.testing.assert_array_equal(again[name], output)


def test_one_gate_for_all_tasks():
    model = randomize(build_mmoe(**SMALL, gates=[keras.layers.Dense(3)] * 2, return_expert_weights=True))
    outputs = numpy_outputs(model, FEATURES)
    np.testing.assert_array_equal(outputs["task_0_expert_weights"], outputs["task_1_expert_weights"])
    assert np.abs(outputs["task_0"] - outputs["task_1"]).max() > 0.1
    assert len(model.trainable_variables) == 4 + 2 + 2 * 4


def test_defaults():
    model = build_mmoe()
    assert model.input_shape == (None, 128)
    assert {task: output.shape for task, output in model.output.items()} == {"task_0": (None, 1), "task_1": (None, 1)}
    assert model.get_layer("experts").num_experts == 3


def test_recommender_is_the_mmoe_on_embeddings_and_dense_features(tmp_path):
    parts = {"experts": [Wave(3), Wave(3)], "gates": [Wave(2), Wave(2)], "load_balancing_weight": 0.1}
    model = randomize(
        build_mmoe_recommender(
            9, 7, 3, 2, tower_hidden_dims=(4,), dropout_rate=0.0, return_expert_weights=True, **parts
        )
    )
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
    behind = keras.Model(model.get_layer("all_features").output, model.output)
    for name, output in numpy_outputs(behind, features).items():
        assert_close(outputs[name], output, 1e-6)
    assert outputs["task_0_expert_weights"].shape == (3, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again, losses = in_training(loaded, inputs)
    assert_close(again["task_1"], outputs["task_1"], 1e-6)
    assert len(losses) == 2


def test_recommender_without_dense_features():
    assert set(build_mmoe_recommender(5, 5, 2, 0).input) == {"user_id", "item_id"}


@pytest.mark.parametrize("return_expert_weights", [False, True])
def test_what_a_model_knows_of_itself(return_expert_weights, tmp_path):
    small = {"num_experts": 3, "expert_hidden_dims": (5, 4), "return_expert_weights": return_expert_weights}
    build_mmoe(8, **small).save(tmp_path / "model.keras")
    for model, inputs in (
        (keras.saving.load_model(tmp_path / "model.keras"), {"features": FEATURES}),
        (build_mmoe_recommender(5, 4, 3, 0, **small), {name: np.arange(6) % 4 for name in ("user_id", "item_id")}),
    ):
        assert isinstance(model, DenseMMoE)
        assert model.task_names == ("task_0", "task_1") and model.gate_side == "user"
        assert model.experts_of("task_1") == (0, 1, 2) and model.kernels_of("task_1") == ()
        gates, experts = numpy_outputs(model.gates, inputs), ops.convert_to_numpy(model.expert_outputs(inputs))
        assert experts.shape == (6, 3, 4)
        mixture = numpy_outputs(model.part(model.get_layer("mixture_task_1").output), inputs)
        assert_close(np.einsum("be,beo->bo", gates["task_1"], experts), mixture)


def test_features_of_any_layers():
    """What the experts read may be made of several inputs."""
    inputs = [keras.Input((2,), name="a"), keras.Input((3,), name="b")]
    model = build_mmoe(features=keras.layers.Concatenate()(inputs), num_tasks=1, name="wide")
    assert (model.name, set(model.input), model.get_layer("experts").weights[0].shape[1]) == ("wide", {"a", "b"}, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tasks": 0}, "at least one task"),
        ({"expert_hidden_dims": ()}, "one layer per expert"),
        ({"experts": []}, "one expert"),
        ({"experts": [keras.layers.Dense(3)] * 2}, "a layer of its own. Received: "),
        ({"experts": [Wave(3, name="a"), Wave(4, name="b")]}, r"one width O for all. Received: {'a': \(None, 3\), 'b'"),
        ({"experts": [keras.layers.Reshape((2, 64), name="a")]}, r"put out \(B, O\).* {'a': \(None, 2, 64\)}"),
        ({"gates": [keras.layers.Dense(3)]}, "a gate for each of the 2 tasks. Received: 1"),
        ({"gates": [Wave(4, name="a"), Wave(3)]}, r"one score per expert, \(B, 3\). Received: \(None, 4\) from 'a'"),
        ({"gates": [Wave(3), Wave(3)], "gate_hidden_dims": (4,)}, r"leave it out .* Received: \(4,\)"),
        ({"gate_top_k": 4}, "that this gate weighs, 3; 0 keeps all. Received: 4"),
        ({"gate_top_k": 4, "gates": [Wave(3), Wave(3)]}, "weighs, 3; 0 keeps all. Received: 4"),
        ({"load_balancing_weight": -1.0}, "`load_balancing_weight` must be 0 or more. Received: -1.0"),
        ({"task_output_dims": (1, 1, 1)}, "for each of the 2 tasks. Received: \\(1, 1, 1\\)"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        build_mmoe(**settings)
