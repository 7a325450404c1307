"""A SavedModel with all its signatures, by arrays; needs TensorFlow and nothing else of this package's dependencies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from mvke_tf.server.protocol import DEFAULT_SIGNATURE, InputSpec, RequestError

DESCRIPTIONS_FILE = "signatures.json"

# As TensorFlow Serving maps TensorFlow's errors; any other is a defect of the model or of the server.
_STATUS = {
    tf.errors.InvalidArgumentError: 400,
    tf.errors.FailedPreconditionError: 400,
    tf.errors.OutOfRangeError: 400,
    tf.errors.ResourceExhaustedError: 429,
    tf.errors.UnimplementedError: 501,
}


class ServedModel:
    """One version of a SavedModel.

    Args:
        folder: Its folder; the name is the version, as in `export/3`. A `signatures.json` in it describes the
            signatures and their inputs.

    Raises:
        ValueError: If TensorFlow finds no SavedModel there, or one without signatures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.version = int(self.folder.name) if self.folder.name.isdecimal() else 1
        try:
            # Kept: the functions stop working when the object that owns their variables is gone.
            self._loaded = tf.saved_model.load(str(self.folder))
            self._proto = saved_model_pb2.SavedModel()
            self._proto.ParseFromString((self.folder / "saved_model.pb").read_bytes())
        except (OSError, tf.errors.OpError) as error:
            raise ValueError(f"There is no SavedModel that can be loaded at {self.folder}: {error}") from error
        self._functions = dict(self._loaded.signatures)
        if not self._functions:
            raise ValueError(f"Expected a SavedModel with signatures. Received: {self.folder}, which has none")
        described = self._descriptions()
        self.descriptions = {name: _text(_entry(described, name)) for name in sorted(self._functions)}
        self._inputs = {
            name: _input_specs(function, _entry(_entry(described, name), "inputs"))
            for name, function in self._functions.items()
        }

    def _descriptions(self) -> dict[str, Any]:
        path = self.folder / DESCRIPTIONS_FILE
        if not path.is_file():
            return {}
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}. Export again, or delete it") from error
        described = described if isinstance(described, dict) else {}
        return _entry(described, "signatures") or described

    @property
    def default_signature(self) -> str:
        """`serving_default`, or the first by name where there is none."""
        return DEFAULT_SIGNATURE if DEFAULT_SIGNATURE in self._functions else min(self._functions)

    def inputs(self, signature: str) -> dict[str, InputSpec]:
        """What a signature takes.

        Raises:
            RequestError: If there is no such signature.
        """
        if signature not in self._inputs:
            raise RequestError(
                f"The model has the signatures {sorted(self._inputs)}. Received: {json.dumps(signature)[:60]}"
            )
        return self._inputs[signature]

    def predict(self, signature: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Calls a signature; may be called from several threads at once.

        Args:
            signature: Its name.
            arrays: Its inputs, of its dtypes and ranks.

        Returns:
            Its outputs; strings as arrays of `bytes`.

        Raises:
            RequestError: If the model refuses these inputs.
        """
        specs = self.inputs(signature)
        tensors = {name: tf.constant(array, specs[name].dtype) for name, array in arrays.items()}
        try:
            outputs = self._functions[signature](**tensors)
        except tuple(_STATUS) as error:
            # What stands before and after it names nodes of the graph.
            message = error.message.rpartition("<stack traces unavailable>\n")[2].partition("\n\t [[")[0]
            status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
            raise RequestError(f"The model refuses the inputs: {' '.join(message.split())}", status) from error
        return {name: np.asarray(output.numpy()) for name, output in outputs.items()}

    def metadata(self, name: str) -> dict[str, Any]:
        """The answer to `GET /v1/models/<name>/metadata`."""
        signatures = {
            key: {
                "inputs": {port: _tensor_info(info) for port, info in sorted(signature.inputs.items())},
                "outputs": {port: _tensor_info(info) for port, info in sorted(signature.outputs.items())},
                "method_name": signature.method_name,
            }
            for key, signature in sorted(self._proto.meta_graphs[0].signature_def.items())
        }
        return {
            "model_spec": {"name": name, "signature_name": "", "version": str(self.version)},
            "metadata": {"signature_def": {"signature_def": signatures}},
        }

    def example(self, signature: str) -> dict[str, Any]:
        """A request with one made-up row, good for a warm-up and as a pattern."""
        specs = self.inputs(signature)
        columns = {name: _example(spec) for name, spec in specs.items()}
        request = {} if signature == DEFAULT_SIGNATURE else {"signature_name": signature}
        if any(spec.shape == () for spec in specs.values()):
            return {**request, "inputs": columns}
        return {**request, "instances": [{name: column[0] for name, column in columns.items()}]}


def _entry(described: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of what `signatures.json` says; nothing where it says nothing that can be used."""
    entry = described.get(name)
    return entry if isinstance(entry, dict) else {}


def _text(described: Mapping[str, Any]) -> str:
    return str(described.get("description", ""))


def _input_specs(function: Any, described: Mapping[str, Any]) -> dict[str, InputSpec]:
    specs = function.structured_input_signature[1]
    # In the order of signatures.json where there is one: users first, and lists beside their weights.
    order = {name: number for number, name in enumerate(described)}
    return {
        name: InputSpec(
            name,
            specs[name].dtype.name,
            None if specs[name].shape.rank is None else tuple(specs[name].shape),
            _text(_entry(described, name)),
        )
        for name in sorted(specs, key=lambda name: (order.get(name, len(order)), name))
    }


def _tensor_info(info: Any) -> dict[str, Any]:
    return {
        "dtype": types_pb2.DataType.Name(info.dtype),
        "tensor_shape": {
            "dim": [{"size": str(dim.size), "name": dim.name} for dim in info.tensor_shape.dim],
            "unknown_rank": info.tensor_shape.unknown_rank,
        },
        "name": info.name,
    }


def _example(spec: InputSpec) -> Any:
    kind = tf.as_dtype(spec.dtype)
    value: Any = "a" if kind == tf.string else True if kind == tf.bool else 1.0 if kind.is_floating else 1
    for size in reversed(spec.shape if spec.shape is not None else (1,)):
        value = [value] * (1 if size is None else size)
    return value
