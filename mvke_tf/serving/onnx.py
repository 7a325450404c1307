# SPDX-License-Identifier: Apache-2.0
"""A trained model as ONNX: encoded features in, the model's outputs or a tower's vectors out. Needs the extra `onnx`.

    <component>.onnx   inputs by feature name, outputs by task name, any number of rows
    <component>.json   dtype, shape and meaning of each; the kinds of the tasks. The `.onnx` holds the same as metadata

Encoding is not part of it (strings have no place in most ONNX runtimes): a client sends what
`mvke_tf.data.encoder.Encoder` makes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import keras_rs
import numpy as np

from mvke_tf.errors import ConfigError, MissingExtraError, MvkeError
from mvke_tf.io import atomic_write, write_json
from mvke_tf.layers import CalibratedLogit, FieldEmbedding
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import Run
from mvke_tf.schema import WEIGHTS_SUFFIX

if TYPE_CHECKING:
    import onnx

COMPONENTS = ("model", "user", "item")
TOLERANCE = 1e-5
# Rows of the test part on which an export is compared with Keras.
_CHECKED_ROWS = 1000


class OnnxError(MvkeError):
    """A model that ONNX cannot express; the message says which piece."""


def export_onnx(model: TwoTowerModel, path: Path, rows: Mapping[str, Any], component: str = "model") -> Path:
    """Writes a two-tower model, or one of its towers, as ONNX, atomically.

    The written graph is run by onnxruntime on `rows` first, and must agree with Keras to 1e-5.

    Args:
        model: A two-tower model, float32.
        path: The `.onnx` file; one that is there is replaced. A `.json` of the same name is written beside it.
        rows: Encoded features, `{feature: (B,), (B, L) or (B, W)}`; those that the component does not read are ignored.
        component: `"model"` for the outputs `{task: (B, 1)}` (multi-class `(B, C)`), `"user"` or `"item"` for
            `{task: vector (B, W_task)}`.

    Returns:
        `path`.

    Raises:
        OnnxError: If a piece of the model has no counterpart in ONNX, or another meaning.
        MissingExtraError: If the extra `onnx` is not installed.
        ConfigError: If Keras does not run on TensorFlow, or the component or the path is something else.
    """
    path = Path(path)
    _check(model, path, component)
    onnx = _extra("onnx", "onnxruntime", "tf2onnx")[0]
    source = {"model": _calibrated(model), "user": model.user_tower, "item": model.item_tower}[component]
    exported = _portable(source)
    features = {name: np.asarray(rows[name], tensor.dtype) for name, tensor in exported.input.items()}
    exported(features)  # Keras exports only what has been called.
    with atomic_write(path.with_suffix(".json")) as description, atomic_write(path) as temporary:
        with _quiet():
            exported.export(temporary, format="onnx", verbose=False)
        proto = onnx.load(temporary)
        _check_operations(proto)
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        described = _describe(model, source, proto, component)
        onnx.helper.set_model_props(proto, {"mvke_tf": json.dumps(described)})
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, temporary)
        _check_outputs(temporary, features, source)
        write_json(description, described)
    return path


def _calibrated(model: TwoTowerModel) -> keras.Model:
    """The model with its calibration as layers behind its outputs."""
    if not model.calibration:
        return model
    outputs = {
        task: CalibratedLogit(dataclasses.asdict(model.calibration[task]), name=f"calibrated_{task}")(output)
        if task in model.calibration
        else output
        for task, output in model.output.items()
    }
    return keras.Model(model.input, outputs, name=model.name)


def export_run_onnx(run: Run, component: str = "model", folder: Path | None = None) -> Path:
    """Writes the best checkpoint of a run, or a tower of it, as ONNX, checked on rows of the test part.

    Args:
        run: The run.
        component: See `export_onnx`.
        folder: Where `<component>.onnx` and `<component>.json` go; `onnx` in the run directory by default.

    Returns:
        The `.onnx` file.

    Raises:
        RunError: If the run has no checkpoint yet.
        OnnxError, MissingExtraError, ConfigError: See `export_onnx`.
    """
    model, data = run.load_model(calibrated=True), run.prepared.bucket_with("test").part("test")
    users, items = data.user_rows[:_CHECKED_ROWS], data.item_rows[:_CHECKED_ROWS]
    rows = {name: np.asarray(data.users[name])[users] for name in model.user_tower.input}
    rows |= {name: np.asarray(data.items[name])[items] for name in model.item_tower.input}
    path = (folder or run.folder / "onnx") / f"{component}.onnx"
    return export_onnx(model, path, rows, component)


def _extra(*modules: str) -> list[Any]:
    """The modules of the extra `onnx`.

    Raises:
        MissingExtraError: If one is missing.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX needs {', '.join(modules)}. Install the extra: pip install 'mvke_tf[onnx]'. Received: {error}"
        ) from error


def _check(model: TwoTowerModel, path: Path, component: str) -> None:
    if component not in COMPONENTS:
        raise ConfigError(f"The component must be one of {COMPONENTS}. Received: {component!r}")
    if path.suffix != ".onnx":
        raise ConfigError(f"Expected a path that ends in .onnx. Received: {path}")
    if keras.backend.backend() != "tensorflow":
        raise ConfigError(
            "ONNX can only be written while Keras runs on TensorFlow. Set KERAS_BACKEND=tensorflow for this command; "
            f"the checkpoint itself serves every backend. Received: the backend {keras.backend.backend()!r}"
        )
    half = sorted({layer.name for layer in model.layers if layer.compute_dtype in ("float16", "bfloat16")})
    if half:
        raise OnnxError(
            "Only float32 models can be exported; build or train it with --precision float32. "
            f"Received: half precision in {half[0]} and {len(half) - 1} other layers"
        )


class _GatheredEmbedding(FieldEmbedding):
    """The same embeddings, as a gather and a weighted sum.

    `FieldEmbedding` adds up the weights of equal indices with a scatter. TensorFlow's scatter sums what meets in one
    cell; the ScatterND that tf2onnx writes for it keeps the last, so that a list with a repeated item would silently
    get another embedding.
    """

    def call(self, inputs, weights=None, training=None):
        return keras_rs.layers.EmbedReduce.call(self, inputs, weights)


def _portable(model: keras.Model) -> keras.Model:
    """A copy of a model, of equal outputs, in operations that mean the same in ONNX."""

    def copy(layer: keras.Layer) -> keras.Layer:
        kind = _GatheredEmbedding if isinstance(layer, FieldEmbedding) else type(layer)
        return kind.from_config(layer.get_config())

    clone = keras.models.clone_model(model, clone_function=copy)
    for layer in clone.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights())
    return clone


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that mean nothing here: NumPy's on how Keras helps tf2onnx, TensorFlow's on lookup tables."""
    log = logging.getLogger("tensorflow")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*`np\.object`", category=FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _check_operations(proto: onnx.ModelProto) -> None:
    (onnx,) = _extra("onnx")
    # tf2onnx logs an operation that it does not know and leaves it in the graph as it is.
    unknown = [node for node in _nodes(proto.graph) if not onnx.defs.has(node.op_type, node.domain)]
    if unknown:
        pieces = sorted({f"{node.op_type} (in {node.name.rpartition('/')[0] or node.name})" for node in unknown})
        raise OnnxError(
            "ONNX has no counterpart for a piece of the model; replace the layer, or serve the SavedModel. "
            f"Received: {', '.join(pieces)}"
        )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _check_outputs(path: Path, features: Mapping[str, np.ndarray], source: keras.Model) -> None:
    (onnxruntime,) = _extra("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    received = dict(zip(names, session.run(names, dict(features)), strict=True))
    expected = source(dict(features), training=False)
    gaps = {
        task: float(np.abs(received[task] - keras.ops.convert_to_numpy(output)).max())
        for task, output in expected.items()
        if not np.allclose(received[task], output, rtol=TOLERANCE, atol=TOLERANCE)
    }
    if gaps:
        raise OnnxError(
            f"onnxruntime and Keras must agree to {TOLERANCE:g}; an operation means something else in ONNX. "
            f"Received: differences of up to {gaps}"
        )


def _describe(model: TwoTowerModel, source: keras.Model, proto: onnx.ModelProto, component: str) -> dict[str, Any]:
    """What the file holds, as a dictionary for JSON."""
    tasks = {
        task: {
            name: value
            for name, value in {
                "kind": kind,
                "given": model.given.get(task),
                "offset": model.offsets.get(task),
                "transform": model.transforms[task],
                "classes": list(model.classes[task]) if task in model.classes else None,
            }.items()
            if value is not None
        }
        for task, kind in model.kinds.items()
    }
    outputs = {
        task: {
            "dtype": tensor.dtype,
            "shape": [-1, *tensor.shape[1:]],
            "description": _meaning(model, task) if component == "model" else f"{component} vector",
        }
        for task, tensor in source.output.items()
    }
    inputs = {
        name: {
            "dtype": tensor.dtype,
            "shape": [-1, *tensor.shape[1:]],
            "description": _input_meaning(name, tensor, source.input),
        }
        for name, tensor in source.input.items()
    }
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    return {
        **{"component": component, "model": model.name, "opset": opset},
        **{"inputs": inputs, "outputs": outputs, "tasks": tasks},
    }


def _meaning(model: TwoTowerModel, task: str) -> str:
    if model.kinds[task] == "binary":
        calibrated = "calibrated " if task in model.calibration else ""
        return f"{calibrated}logit, in nats; its sigmoid is the probability"
    if model.kinds[task] == "count":
        return "logarithm of the expected count"
    if model.kinds[task] == "multiclass":
        return "logits of the classes, in nats; their softmax is the probability of each"
    return (
        "log(1 + value), the value in the unit of the label"
        if model.transforms[task]
        else ("value, in the unit of the label")
    )


def _input_meaning(name: str, tensor: Any, inputs: Mapping[str, Any]) -> str:
    if name.endswith(WEIGHTS_SUFFIX) and name.removesuffix(WEIGHTS_SUFFIX) in inputs:
        return "weight of each slot; 0 is an empty slot"
    if tensor.dtype == "float32":
        return "encoded; the first entry is 1, and all others 0, where the value is unknown"
    return "encoded; index 0 is unknown"
