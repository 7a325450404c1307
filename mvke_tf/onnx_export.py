"""A trained model as ONNX: encoded features in, the model's outputs or a tower's vectors out. Needs the extra `onnx`.

    <part>.onnx    inputs by feature name, outputs by task name, any number of rows
    <part>.json    dtype, shape and meaning of each; the kinds of the tasks. The file itself holds the same, as metadata

Encoding is not part of it (strings have no place in most ONNX runtimes): a client sends what
`mvke_tf.data.features.Encoder` makes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_rs
import numpy as np
import onnx
import onnxruntime

from mvke_tf.files import write_json, written_whole
from mvke_tf.layers import FieldEmbedding
from mvke_tf.models.two_tower import conditional_tasks, task_kinds, tower
from mvke_tf.run import Run
from mvke_tf.schema import WEIGHTS_SUFFIX

MODEL_PARTS = ("model", "user", "item")
TOLERANCE = 1e-5
# Rows of the test part on which an export is compared with Keras.
_CHECKED_ROWS = 1000


class OnnxError(ValueError):
    """A model that ONNX cannot express; the message says which piece."""


def export_onnx(model: keras.Model, path: Path, rows: Mapping[str, Any], part: str = "model") -> Path:
    """Writes a two-tower model, or one of its towers, as ONNX, whole or not at all.

    The written graph is run by onnxruntime on `rows` first, and must agree with Keras to 1e-5.

    Args:
        model: A two-tower model, float32, built or loaded.
        path: The `.onnx` file; one that is there is replaced. A `.json` of the same name is written beside it.
        rows: Encoded features, `{feature: (B,) or (B, L)}`; those that the part does not read are left alone.
        part: `"model"` for `{task: logit or value (B, 1)}`, `"user"` or `"item"` for `{task: vector (B, W_task)}`.

    Returns:
        `path`.

    Raises:
        OnnxError: If a piece of the model has no counterpart in ONNX, or another meaning.
        ValueError: If Keras does not run on TensorFlow, or the part or the path is something else.
    """
    path = Path(path)
    _check(model, path, part)
    source = model if part == "model" else tower(model, part)
    exported = _portable(source)
    features = {name: np.asarray(rows[name], tensor.dtype) for name, tensor in exported.input.items()}
    exported(features)  # Keras exports only what has been called.
    with written_whole(path.with_suffix(".json")) as description, written_whole(path) as temporary:
        with _quiet():
            exported.export(temporary, format="onnx", verbose=False)
        proto = onnx.load(temporary)
        _check_operations(proto)
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        described = _describe(model, source, proto, part)
        onnx.helper.set_model_props(proto, {"mvke_tf": json.dumps(described)})
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, temporary)
        _check_outputs(temporary, features, source)
        write_json(description, described)
    return path


def export_run_onnx(run: Run, part: str = "model", folder: Path | None = None) -> Path:
    """Writes the best checkpoint of a run, or a tower of it, as ONNX, checked on rows of the test part.

    Args:
        run: The run.
        part: See `export_onnx`.
        folder: Where `<part>.onnx` and `<part>.json` go; `onnx` in the run directory by default.

    Returns:
        The `.onnx` file.

    Raises:
        RunError: If the run has no checkpoint yet.
        OnnxError, ValueError: See `export_onnx`.
    """
    data = run.prepared.part("test")
    users, items = data.user_rows[:_CHECKED_ROWS], data.item_rows[:_CHECKED_ROWS]
    rows = {name: column[users] for name, column in data.users.items()}
    rows |= {name: column[items] for name, column in data.items.items()}
    return export_onnx(run.load_model(), (folder or run.folder / "onnx") / f"{part}.onnx", rows, part)


def _check(model: keras.Model, path: Path, part: str) -> None:
    if part not in MODEL_PARTS:
        raise ValueError(f"`part` must be one of {MODEL_PARTS}. Received: {part!r}")
    if path.suffix != ".onnx":
        raise ValueError(f"Expected a path that ends in .onnx. Received: {path}")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
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

    def call(self, inputs, weights=None):
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


_MEANINGS = {
    "binary": "logit, in nats; its sigmoid is the probability",
    "regression": "value, in the unit of the label",
}


def _describe(model: keras.Model, source: keras.Model, proto: onnx.ModelProto, part: str) -> dict[str, Any]:
    """What the file holds, as a dictionary for JSON."""
    given = conditional_tasks(model)
    tasks = {}
    for task, kind in task_kinds(model).items():
        tasks[task] = {"kind": kind}
        if task in given:
            tasks[task]["given"] = given[task]
        if kind == "regression":
            tasks[task]["offset"] = model.get_layer(task).offset
    inputs = {}
    for name, tensor in source.input.items():
        is_weight = name.endswith(WEIGHTS_SUFFIX) and name.removesuffix(WEIGHTS_SUFFIX) in source.input
        meaning = "weight of each slot; 0 is an empty slot" if is_weight else "encoded; index 0 is unknown"
        inputs[name] = {"dtype": tensor.dtype, "shape": [-1, *tensor.shape[1:]], "description": meaning}
    outputs = {
        task: {
            "dtype": tensor.dtype,
            "shape": [-1, *tensor.shape[1:]],
            "description": _MEANINGS[tasks[task]["kind"]] if part == "model" else f"{part} vector",
        }
        for task, tensor in source.output.items()
    }
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    return {
        **{"part": part, "model": model.name, "opset": opset},
        **{"inputs": inputs, "outputs": outputs, "tasks": tasks},
    }
