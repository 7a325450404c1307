# SPDX-License-Identifier: Apache-2.0
"""ONNX files, run by onnxruntime and compared with Keras."""

import dataclasses
import json
import sys
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import ops

from mvke_tf.cli import main
from mvke_tf.config import ModelConfig
from mvke_tf.errors import ConfigError, MissingExtraError
from mvke_tf.layers import FieldEmbedding
from mvke_tf.models import MODELS, TwoTowerModel, build_model
from mvke_tf.models.two_tower import build_two_tower, tag_vectors, task_networks
from mvke_tf.run import Run
from mvke_tf.schema import Feature, Schema, Task
from mvke_tf.serving.onnx import OnnxError, _GatheredEmbedding, export_onnx
from tests.serving.helpers import pair_rows

pytestmark = pytest.mark.slow

FEATURES = ("user", "recent_items", "mean_stars", "item", "tags", "price")
SMALL = {"embedding_dim": 8, "hidden_dims": (8,), "virtual_kernel_stddev": 1.0, "embedding_stddev": 1.0}
TWO_TASKS = (Task("click"), Task("buy"))
THREE_TASKS = (
    Task("click"),
    Task("buy", given="click"),
    Task("revenue", kind="regression", offset=3.5, transform="log1p"),
)


@pytest.fixture(scope="module")
def run(tiny_run_template) -> Run:
    """For reading only."""
    return Run(tiny_run_template)


@pytest.fixture(scope="module")
def rows(run) -> dict[str, np.ndarray]:
    """Encoded rows of all pairs of the test part; the first list of each kind holds one value several times."""
    rows = pair_rows(run.prepared, "test", kind="encoded")
    rows = {name: column for name, column in rows.items() if name.removesuffix("_weights") in FEATURES}
    for name in ("recent_items", "tags"):
        rows[name] = rows[name].copy()
        rows[name][0] = max(1, rows[name][0, 0])
        rows[name + "_weights"] = rows[name + "_weights"].copy()
        rows[name + "_weights"][0] = np.arange(1, 1 + rows[name].shape[1])
    return rows


def small_model(run: Run, name: str, tasks: tuple[Task, ...]) -> TwoTowerModel:
    """On some of the features only: tf2onnx takes its time for each."""
    keras.utils.set_random_seed(1)
    features = [feature for feature in run.prepared.schema().features if feature.name in FEATURES]
    features = [dataclasses.replace(feature, unknown_group=None) for feature in features]
    return build_model(name, Schema(features, tasks), ModelConfig(name=name, num_experts=4, **SMALL))


def run_onnx(path: Path, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {value.name: rows[value.name] for value in session.get_inputs()})
    return dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))


def assert_equal(received: dict, expected: dict) -> None:
    assert sorted(received) == sorted(expected)
    for task, output in expected.items():
        assert np.ptp(output) > 0.1
        np.testing.assert_allclose(received[task], output, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def exported(run, rows, tmp_path_factory):
    """Exports a small model by name, with a conditional and a regression task, once: the model and its folder."""
    folder = tmp_path_factory.mktemp("onnx")
    models = {}

    def export(name: str, *components: str) -> tuple[TwoTowerModel, Path]:
        if name not in models:
            models[name] = small_model(run, name, THREE_TASKS[:1] if name == "single_task" else THREE_TASKS)
        for component in components:
            path = folder / name / f"{component}.onnx"
            if not path.exists():
                assert export_onnx(models[name], path, rows, component) == path
        return models[name], folder / name

    return export


@pytest.mark.parametrize("name", MODELS)
def test_every_model_agrees_with_keras_on_any_number_of_rows(exported, rows, name):
    model, folder = exported(name, "model")
    received = run_onnx(folder / "model.onnx", rows)
    assert_equal(received, model(rows, training=False))
    one = run_onnx(folder / "model.onnx", {name: column[:1] for name, column in rows.items()})
    for task, output in received.items():
        np.testing.assert_allclose(one[task], output[:1], rtol=1e-5, atol=1e-5)


def test_products_of_the_towers_give_the_outputs_of_the_model(exported, rows):
    model, folder = exported("mvke", "user", "item")
    users, items = run_onnx(folder / "user.onnx", rows), run_onnx(folder / "item.onnx", rows)
    products = {task: (users[task] * items[task]).sum(axis=1, keepdims=True) for task in users}
    assert_equal(model.outputs_of_products(products), model(rows, training=False))
    inputs = {
        side: {value.name for value in onnx.load(folder / f"{side}.onnx").graph.input} for side in ("user", "item")
    }
    assert inputs["user"] | inputs["item"] == set(model.input) and not inputs["user"] & inputs["item"]


def test_the_description_says_names_dtypes_shapes_and_kinds(exported):
    _, folder = exported("mvke", "model", "item")
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    proto = onnx.load(folder / "model.onnx")
    assert {entry.key: json.loads(entry.value) for entry in proto.metadata_props} == {"mvke_tf": described}
    assert described["tasks"] == {
        "click": {"kind": "binary"},
        "buy": {"kind": "binary", "given": "click"},
        "revenue": {"kind": "regression", "offset": 3.5, "transform": "log1p"},
    }
    assert described["outputs"]["revenue"]["description"] == "log(1 + value), the value in the unit of the label"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    types = {"int32": "tensor(int32)", "float32": "tensor(float)"}
    for values, side in ((session.get_inputs(), "inputs"), (session.get_outputs(), "outputs")):
        actual = {value.name: (value.type, value.shape) for value in values}
        assert actual == {
            name: (types[field["dtype"]], ["batch" if size == -1 else size for size in field["shape"]])
            for name, field in described[side].items()
        }
    assert described["inputs"]["recent_items"] == {
        **{"dtype": "int32", "shape": [-1, 5], "description": "encoded; index 0 is unknown"}
    }
    assert described["inputs"]["tags_weights"]["description"] == "weight of each slot; 0 is an empty slot"
    dense = "encoded; the first entry is 1, and all others 0, where the value is unknown"
    assert described["inputs"]["mean_stars"] == {"dtype": "float32", "shape": [-1, 2], "description": dense}
    assert described["inputs"]["price"] == {"dtype": "float32", "shape": [-1, 5], "description": dense}
    vectors = json.loads((folder / "item.json").read_text(encoding="utf-8"))
    assert (vectors["component"], vectors["outputs"]["click"]["description"]) == ("item", "item vector")


class InverseError(keras.layers.Layer):
    def call(self, inputs):
        return ops.erfinv(ops.tanh(inputs))


def test_an_operation_that_onnx_lacks_is_named_and_nothing_is_written(tmp_path):
    def towers(user_fields, item_fields, tasks, config):
        fields = InverseError(name="odd_layer")(user_fields)
        users = task_networks(fields, tasks, config, "user_towers", "user_vector_{task}")
        return users, tag_vectors(item_fields, tasks, config)

    schema = Schema((Feature("user_id", "user", 5), Feature("item_id", "item", 5)), (Task("click"),))
    model = build_two_tower(schema, ModelConfig(**SMALL), towers)
    (tmp_path / "model.onnx").write_text("as it was")
    rows = {"user_id": np.arange(5), "item_id": np.arange(5)}
    with pytest.raises(OnnxError, match=r"no counterpart .* Received: Erfinv \(in [^,]*odd_layer[^,]*\)$"):
        export_onnx(model, tmp_path / "model.onnx", rows)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("model.onnx", "as it was")]


def test_an_operation_that_means_something_else_is_refused(run, rows, tmp_path, monkeypatch):
    """tf2onnx's scatter keeps the last of several equal indices, where TensorFlow's sums."""
    monkeypatch.setattr(_GatheredEmbedding, "call", FieldEmbedding.call)
    with pytest.raises(OnnxError, match=r"must agree to 1e-05.*differences of up to {'"):
        export_onnx(small_model(run, "hard_sharing", TWO_TASKS), tmp_path / "model.onnx", rows)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_refused(run, rows, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model(run, "hard_sharing", TWO_TASKS)
    finally:
        keras.config.set_dtype_policy(before)
    with pytest.raises(OnnxError, match=r"Only float32 .* Received: half precision in embedding_"):
        export_onnx(model, tmp_path / "model.onnx", rows)


def test_bad_arguments_are_refused(run, rows, tmp_path, monkeypatch):
    model = small_model(run, "hard_sharing", TWO_TASKS)
    with pytest.raises(ConfigError, match=r"component must be one of .* Received: 'gate'"):
        export_onnx(model, tmp_path / "model.onnx", rows, "gate")
    with pytest.raises(ConfigError, match=r"ends in \.onnx\. Received: .*model\.tflite"):
        export_onnx(model, tmp_path / "model.tflite", rows)
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mvke_tf\[onnx\]'"):
        export_onnx(model, tmp_path / "model.onnx", rows)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ConfigError, match="KERAS_BACKEND=tensorflow"):
        export_onnx(model, tmp_path / "model.onnx", rows)
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_components_of_a_run(tiny_run, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["onnx", str(tiny_run.folder), "--component", "item", "item"])
    assert ended.value.code == 0
    folder = tiny_run.folder / "onnx"
    assert sorted(path.name for path in folder.iterdir()) == ["item.json", "item.onnx"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"ONNX: {folder / 'item.onnx'}   (its inputs and outputs: {folder / 'item.json'})",
        "onnxruntime and Keras agree to 1e-05 on rows of the test part.",
        "",
        f"Next:  mvke export {tiny_run.folder}",
        f"       mvke profile {tiny_run.folder}",
    ]
    vectors = run_onnx(folder / "item.onnx", tiny_run.prepared.items.encoded)
    assert {task: vector.shape for task, vector in vectors.items()} == {"click": (30, 24), "buy": (30, 32)}
