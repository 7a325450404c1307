"""ONNX files, run by onnxruntime and compared with Keras."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import ops

from mvke_tf.config import ModelConfig
from mvke_tf.layers import FieldEmbedding
from mvke_tf.models import MODELS, build_model
from mvke_tf.models.two_tower import build_two_tower, outputs_of_products, tag_vectors, user_networks
from mvke_tf.onnx_export import OnnxError, _GatheredEmbedding, export_onnx
from mvke_tf.run import Run
from mvke_tf.schema import CTR_CVR, Feature, Schema, Task
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "export_onnx.py"
FEATURES = ("user_id", "recent_items", "item_id", "genres")
SMALL = {"embedding_dim": 8, "hidden_dims": (8,), "kernel_stddev": 1.0, "embedding_stddev": 1.0}
THREE_TASKS = (Task("ctr"), Task("cvr", given="ctr"), Task("rating", kind="regression", offset=3.5))


@pytest.fixture(scope="module")
def run(tiny_run_template) -> Run:
    """For reading only."""
    return Run(tiny_run_template)


@pytest.fixture(scope="module")
def rows(run) -> dict[str, np.ndarray]:
    """Encoded rows of all pairs of the test part; the first list of each kind holds one value several times."""
    part = run.prepared.part("test")
    rows = {name: column[part.user_rows] for name, column in part.users.items()}
    rows |= {name: column[part.item_rows] for name, column in part.items.items()}
    rows = {name: column for name, column in rows.items() if name.removesuffix("_weights") in FEATURES}
    for name in ("recent_items", "genres"):
        rows[name] = rows[name].copy()
        rows[name][0] = rows[name][0, 0]
        rows[name + "_weights"] = rows[name + "_weights"].copy()
        rows[name + "_weights"][0] = np.arange(1, 1 + rows[name].shape[1])
    return rows


def small_model(run: Run, name: str, tasks: tuple[Task, ...]) -> keras.Model:
    """On some of the features only: tf2onnx takes its time for each."""
    keras.utils.set_random_seed(1)
    features = [feature for feature in run.prepared.schema.features if feature.name in FEATURES]
    features = [dataclasses.replace(feature, unknown_group=None) for feature in features]
    return build_model(name, Schema(features, tasks), ModelConfig(name=name, num_experts=4, **SMALL))


def run_onnx(path: Path, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {port.name: rows[port.name] for port in session.get_inputs()})
    return dict(zip([port.name for port in session.get_outputs()], outputs, strict=True))


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

    def export(name: str, *parts: str) -> tuple[keras.Model, Path]:
        if name not in models:
            models[name] = small_model(run, name, THREE_TASKS[:1] if name == "single_task" else THREE_TASKS)
        for part in parts:
            path = folder / name / f"{part}.onnx"
            if not path.exists():
                assert export_onnx(models[name], path, rows, part) == path
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
    assert_equal(outputs_of_products(model, products), model(rows, training=False))
    inputs = {part: {port.name for port in onnx.load(folder / f"{part}.onnx").graph.input} for part in ("user", "item")}
    assert inputs["user"] | inputs["item"] == set(model.input) and not inputs["user"] & inputs["item"]


def test_the_description_says_names_dtypes_shapes_and_kinds(exported):
    _, folder = exported("mvke", "model", "item")
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    proto = onnx.load(folder / "model.onnx")
    assert {entry.key: json.loads(entry.value) for entry in proto.metadata_props} == {"mvke_tf": described}
    assert described["tasks"] == {
        "ctr": {"kind": "binary"},
        "cvr": {"kind": "binary", "given": "ctr"},
        "rating": {"kind": "regression", "offset": 3.5},
    }
    assert described["outputs"]["rating"]["description"] == "value, in the unit of the label"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    types = {"int32": "tensor(int32)", "float32": "tensor(float)"}
    for ports, side in ((session.get_inputs(), "inputs"), (session.get_outputs(), "outputs")):
        actual = {port.name: (port.type, port.shape) for port in ports}
        assert actual == {
            name: (types[port["dtype"]], ["batch" if size == -1 else size for size in port["shape"]])
            for name, port in described[side].items()
        }
    assert described["inputs"]["recent_items"] == {
        **{"dtype": "int32", "shape": [-1, 5], "description": "encoded; index 0 is unknown"}
    }
    assert described["inputs"]["genres_weights"]["description"] == "weight of each slot; 0 is an empty slot"
    vectors = json.loads((folder / "item.json").read_text(encoding="utf-8"))
    assert (vectors["part"], vectors["outputs"]["ctr"]["description"]) == ("item", "item vector")


class InverseError(keras.layers.Layer):
    def call(self, inputs):
        return ops.erfinv(ops.tanh(inputs))


def test_an_operation_that_onnx_lacks_is_named_and_nothing_is_written(tmp_path):
    def towers(user_fields, item_fields, tasks, config):
        return user_networks(InverseError(name="odd_layer")(user_fields), tasks, config), tag_vectors(
            item_fields, tasks, config
        )

    schema = Schema((Feature("user_id", "user", 5), Feature("item_id", "item", 5)), (Task("ctr"),))
    model = build_two_tower(schema, ModelConfig(**SMALL), towers)
    (tmp_path / "model.onnx").write_text("as it was")
    rows = {"user_id": np.arange(5), "item_id": np.arange(5)}
    with pytest.raises(OnnxError, match=r"no counterpart .* Received: Erfinv \(in [^,]*odd_layer[^,]*\)$"):
        export_onnx(model, tmp_path / "model.onnx", rows)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("model.onnx", "as it was")]


def test_an_operation_that_means_something_else_is_refused(run, rows, tmp_path, monkeypatch):
    """tf2onnx's scatter keeps the last of several equal indices, where TensorFlow's sums."""
    monkeypatch.setattr(_GatheredEmbedding, "call", FieldEmbedding.call)
    with pytest.raises(OnnxError, match=r"must agree to 1e-05.*differences of up to {'ctr'"):
        export_onnx(small_model(run, "hard_sharing", CTR_CVR), tmp_path / "model.onnx", rows)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_refused(run, rows, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model(run, "hard_sharing", CTR_CVR)
    finally:
        keras.config.set_dtype_policy(before)
    with pytest.raises(OnnxError, match=r"Only float32 .* Received: half precision in embedding_genres and"):
        export_onnx(model, tmp_path / "model.onnx", rows)


def test_bad_arguments_are_refused(run, rows, tmp_path, monkeypatch):
    model = small_model(run, "hard_sharing", CTR_CVR)
    with pytest.raises(ValueError, match=r"`part` must be one of .* Received: 'gate'"):
        export_onnx(model, tmp_path / "model.onnx", rows, "gate")
    with pytest.raises(ValueError, match=r"ends in \.onnx\. Received: .*model\.tflite"):
        export_onnx(model, tmp_path / "model.tflite", rows)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="KERAS_BACKEND=tensorflow"):
        export_onnx(model, tmp_path / "model.onnx", rows)
    assert list(tmp_path.iterdir()) == []


def test_script_exports_parts_of_a_run(tiny_run, tmp_path, monkeypatch, capsys):
    arguments = ["--checkpoint_path", str(tiny_run.folder), "--part", "item", "item"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    folder = tiny_run.folder / "onnx"
    assert sorted(path.name for path in folder.iterdir()) == ["item.json", "item.onnx"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"ONNX: {folder / 'item.onnx'}   (its inputs and outputs: {folder / 'item.json'})",
        "onnxruntime and Keras agree to 1e-05 on rows of the test part.",
    ]
    part = tiny_run.prepared.part("test")
    items = {name: np.asarray(column) for name, column in part.items.items()}
    vectors = run_onnx(folder / "item.onnx", items)
    assert {task: vector.shape for task, vector in vectors.items()} == {"ctr": (30, 24), "cvr": (30, 32)}


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--checkpoint_path", "nowhere"], 2)])
def test_script_answers_without_tensorflow(arguments, status):
    code = "import runpy, sys; sys.modules['tensorflow'] = sys.modules['keras'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert ("--onnx_path" if status == 0 else "there is nothing at nowhere") in done.stdout + done.stderr
