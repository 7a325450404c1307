# SPDX-License-Identifier: Apache-2.0
"""A SavedModel with all its signatures, by arrays; needs TensorFlow and nothing else of this package's dependencies."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from mvke_tf.config import EXPORT_FORMAT
from mvke_tf.errors import DataError
from mvke_tf.io import checksums, read_json
from mvke_tf.serving.rest.protocol import (
    DEFAULT_SIGNATURE,
    DESCRIPTIONS_FILE,
    InputSpec,
    RequestError,
    check_sizes,
)

# As TensorFlow Serving maps TensorFlow's errors; any other is a defect of the model or of the server.
_STATUS = {
    tf.errors.InvalidArgumentError: 400,
    tf.errors.FailedPreconditionError: 400,
    tf.errors.OutOfRangeError: 400,
    tf.errors.ResourceExhaustedError: 429,
    tf.errors.UnimplementedError: 501,
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a request for a signature takes beyond its inputs, in numbers that are held or computed.

    Args:
        per_row: Numbers per row, as the scores of a whole catalogue.
        per_value: Numbers per value of an input, as the vector of each item.
        answer_input: The input without rows that says how many values each row of the answer has; None without.
        answer_most: Most such values, whatever that input says.
    """

    per_row: int = 0
    per_value: Mapping[str, int] = dataclasses.field(default_factory=dict)
    answer_input: str | None = None
    answer_most: int = 0

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Cost:
        """Reads `cost` of a signature in `signatures.json`; what cannot be used costs nothing."""
        answer = _entry(described, "answer_per_row")
        name = answer.get("input")
        return cls(
            _count(described.get("per_row")),
            {name: _count(value) for name, value in _entry(described, "per_value").items()},
            name if isinstance(name, str) else None,
            _count(answer.get("most")),
        )

    def check(self, arrays: Mapping[str, np.ndarray], max_values: int, max_numbers: int) -> int:
        """How many numbers a request that stays within its bounds makes the model hold or compute.

        Args:
            arrays: The inputs of the request.
            max_values: Most values of one output.
            max_numbers: Most numbers that are held or computed.

        Raises:
            RequestError: If it does not.
        """
        rows = max((len(array) for array in arrays.values() if array.ndim), default=0)
        if self.answer_input is not None and self.answer_input in arrays:
            asked = int(arrays[self.answer_input].max(initial=0))
            values = rows * min(asked, self.answer_most)
            if values > max_values:
                raise RequestError(
                    f"At most {max_values} values in an output; ask for fewer rows or a lower {self.answer_input!r}. "
                    f"Received: {rows} rows, {self.answer_input}={asked}, which make {values} values",
                    413,
                )
        numbers = rows * self.per_row
        numbers += sum(arrays[name].size * cost for name, cost in self.per_value.items() if name in arrays)
        if numbers > max_numbers:
            raise RequestError(
                f"The signature computes {self.per_row} numbers per row"
                + "".join(f" and {cost} per value of {name!r}" for name, cost in self.per_value.items())
                + f", at most {max_numbers} in a request; send several. Received: {rows} rows, {numbers} numbers",
                413,
            )
        return numbers


class ServedModel:
    """One version of a SavedModel.

    Args:
        folder: Its folder; the name is the version, as in `export/3`. A `signatures.json` in it describes the
            signatures, their inputs and what they cost.

    Raises:
        DataError: If TensorFlow finds no SavedModel there, or one without signatures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.version = int(self.folder.name) if self.folder.name.isdecimal() else 1
        described = self._described()
        try:
            # Kept: the functions stop working when the object that owns their variables is gone.
            self._loaded = tf.saved_model.load(str(self.folder))
            self._proto = saved_model_pb2.SavedModel()
            self._proto.ParseFromString((self.folder / "saved_model.pb").read_bytes())
        except (OSError, tf.errors.OpError, ValueError, KeyError, DecodeError) as error:
            raise DataError(f"There is no SavedModel that can be loaded at {self.folder}: {error}") from error
        self._functions = dict(self._loaded.signatures)
        if not self._functions:
            raise DataError(f"Expected a SavedModel with signatures. Received: {self.folder}, which has none")
        described = _entry(described, "signatures") or described
        self.descriptions = {name: _text(_entry(described, name)) for name in sorted(self._functions)}
        self._inputs = {
            name: _input_specs(function, _entry(_entry(described, name), "inputs"))
            for name, function in self._functions.items()
        }
        self._by_row = {name for name in self._functions if _entry(described, name).get("by_row") is True}
        self._costs = {name: Cost.from_dict(_entry(_entry(described, name), "cost")) for name in self._functions}

    def _described(self) -> dict[str, Any]:
        """What `signatures.json` says, if there is one.

        Raises:
            DataError: If a newer version has written it, or another file of the export is not as it was written.
        """
        path = self.folder / DESCRIPTIONS_FILE
        if not path.is_file():
            return {}
        described = read_json(path)
        described = described if isinstance(described, dict) else {}
        written = described.get("format")
        if type(written) is int and written > EXPORT_FORMAT:
            raise DataError(
                f"{path} was written by a newer version of mvke_tf. Update mvke_tf, or export the run again with this "
                f"one: mvke export. Expected: format {EXPORT_FORMAT} or less. Received: {written}"
            )
        files = _entry(described, "files")
        found = checksums(self.folder) if files else {}
        damaged = [name for name, checksum in files.items() if found.get(name) != checksum]
        if damaged:
            raise DataError(
                f"{self.folder / damaged[0]} is damaged: it is not what {DESCRIPTIONS_FILE} says. Export the run "
                "again: mvke export."
            )
        return described

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

    def cost(self, signature: str) -> Cost:
        """What a request for a signature, one of the model's, takes."""
        return self._costs[signature]

    def is_by_row(self, signature: str) -> bool:
        """Whether each row of an answer depends on the same row of the inputs only, as `signatures.json` states."""
        return signature in self._by_row

    def predict(
        self, signature: str, arrays: Mapping[str, np.ndarray], max_values: int | None = None
    ) -> dict[str, np.ndarray]:
        """Calls a signature; may be called from several threads at once.

        Args:
            signature: Its name.
            arrays: Its inputs, of its dtypes and ranks.
            max_values: Most values of one output; any number by default.

        Returns:
            Its outputs; strings as arrays of `bytes`.

        Raises:
            RequestError: If the model refuses these inputs, or puts out more values.
        """
        specs = self.inputs(signature)
        tensors = {name: tf.constant(array, specs[name].dtype) for name, array in arrays.items()}
        try:
            outputs = self._functions[signature](**tensors)
        except tuple(_STATUS) as error:
            # What stands before and after it names nodes of the graph.
            message = error.message.rpartition("<stack traces unavailable>\n")[2].partition("\n\t [[")[0]
            status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
            message = re.sub(r"^assertion failed: \[(.*)\]$", r"\1", " ".join(message.split())).replace("] [", " ")
            raise RequestError(f"The model refuses the inputs: {message}", status) from error
        except UnicodeDecodeError as error:
            # TensorFlow repeats the inputs in its message, which it then cannot read.
            raise RequestError(
                "The model refuses the inputs, of which one is no text. Received: bytes that are not UTF-8"
            ) from error
        if max_values is not None:
            check_sizes({name: int(tf.size(output)) for name, output in outputs.items()}, max_values)
        return {name: np.asarray(output.numpy()) for name, output in outputs.items()}

    def metadata(self, name: str) -> dict[str, Any]:
        """The answer to `GET /v1/models/<name>/metadata`."""
        signatures = {
            key: {
                "inputs": {field: _tensor_info(info) for field, info in sorted(signature.inputs.items())},
                "outputs": {field: _tensor_info(info) for field, info in sorted(signature.outputs.items())},
                "method_name": signature.method_name,
            }
            for key, signature in sorted(self._proto.meta_graphs[0].signature_def.items())
        }
        return {
            "model_spec": {"name": name, "signature_name": "", "version": str(self.version)},
            "metadata": {"signature_def": {"signature_def": signatures}},
        }

    def example(self, signature: str) -> dict[str, Any]:
        """A request with one row, of the examples in `signatures.json` or made up: a warm-up and a pattern."""
        specs = self.inputs(signature)
        columns = {name: _example(spec) for name, spec in specs.items() if spec.ones_like is None and not spec.optional}
        request = {} if signature == DEFAULT_SIGNATURE else {"signature_name": signature}
        if any(spec.shape == () for spec in specs.values()):
            return {**request, "inputs": columns}
        return {**request, "instances": [{name: column[0] for name, column in columns.items()}]}


def _entry(described: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of what `signatures.json` says; nothing where it says nothing that can be used."""
    entry = described.get(name)
    return entry if isinstance(entry, dict) else {}


def _count(value: Any) -> int:
    """A number of things; 0 of what is none."""
    return value if type(value) is int and value > 0 else 0


def _text(described: Mapping[str, Any]) -> str:
    return str(described.get("description", ""))


def _input_specs(function: Any, described: Mapping[str, Any]) -> dict[str, InputSpec]:
    specs = function.structured_input_signature[1]
    # In the order of signatures.json where there is one: users first, and lists beside their weights.
    order = {name: number for number, name in enumerate(described)}
    inputs = {}
    for name in sorted(specs, key=lambda name: (order.get(name, len(order)), name)):
        entry, shape = _entry(described, name), specs[name].shape
        unknown = math.nan if entry.get("unknown") == "NaN" else entry.get("unknown")
        inputs[name] = InputSpec(
            name,
            specs[name].dtype.name,
            None if shape.rank is None else tuple(shape),
            _text(entry),
            unknown,
            entry.get("example"),
            entry["ones_like"] if isinstance(entry.get("ones_like"), str) and entry["ones_like"] in specs else None,
            entry.get("optional") is True and shape.rank == 2,
        )
    return inputs


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
    if spec.shape is not None and spec.example is not None:
        return [spec.example] if spec.shape else spec.example
    kind = tf.as_dtype(spec.dtype)
    value: Any = "a" if kind == tf.string else True if kind == tf.bool else 1.0 if kind.is_floating else 1
    for size in reversed(spec.shape if spec.shape is not None else (1,)):
        value = [value] * (1 if size is None else size)
    return value
