# SPDX-License-Identifier: Apache-2.0
"""Calls a SavedModel by the names of its inputs, and checks them first. Needs TensorFlow and nothing else.

A copy of this file lies beside every exported model:

    python -c "import sys; sys.path.insert(0, 'runs/mine/export/1'); import client; help(client.Client)"

TensorFlow itself says which input is missing or unknown, but of a wrong type only the position ("input #1"). Here
every error names the input.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# NumPy kinds that each dtype is made from without loss.
_KINDS = {"int32": "iu", "int64": "iu", "float32": "iuf", "string": "US"}


class Client:
    """An exported model in this process.

    Args:
        path: `<path>/<version>`, a folder with a `signatures.json`; by default the one of this file.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        import tensorflow as tf

        path = Path(__file__).parent if path is None else Path(path)
        self.described = json.loads((path / "signatures.json").read_text(encoding="utf-8"))
        self._signatures = tf.saved_model.load(str(path)).signatures

    def __call__(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Answers a request.

        Args:
            signature: Name of a signature.
            inputs: All its inputs by name: lists, NumPy arrays or tensors. Weights of unweighted lists may be left out.

        Returns:
            Its outputs by name; strings are bytes, as TensorFlow gives them.

        Raises:
            ValueError: If there is no such signature, or an input is missing, unknown or of a wrong type or shape.
        """
        if signature not in self.described["signatures"]:
            raise ValueError(
                f"There is no such signature. Expected one of {sorted(self.described['signatures'])}. "
                f"Received: {signature!r}"
            )
        arrays = checked_inputs(self.described["signatures"][signature], inputs)
        return {name: tensor.numpy() for name, tensor in self._signatures[signature](**arrays).items()}


def checked_inputs(signature: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of a request as arrays of the dtypes that a signature takes.

    Args:
        signature: Its description in `signatures.json`.
        inputs: Lists, NumPy arrays or tensors by name.

    Raises:
        ValueError: If one is missing, unknown, or of a wrong type, range or number of axes. The message names it.
    """
    fields = signature["inputs"]
    left_out = {
        name: field["ones_like"] for name, field in fields.items() if "ones_like" in field and name not in inputs
    }
    inputs = {**inputs, **{name: _ones(inputs[of]) for name, of in left_out.items() if of in inputs}}
    rows = next((len(inputs[name]) for name, field in fields.items() if field["shape"] and name in inputs), 0)
    optional = [name for name, field in fields.items() if field.get("optional") and name not in inputs]
    inputs |= {name: np.zeros((rows, 0), fields[name]["dtype"].replace("string", "U1")) for name in optional}
    missing = sorted(set(fields) - set(inputs))
    unknown = {
        name: difflib.get_close_matches(name, missing or fields, 1) for name in sorted(set(inputs) - set(fields))
    }
    problems = [f"{name!r} is missing" for name in missing]
    for name, similar in unknown.items():
        problems.append(f"{name!r} is no input of it" + (f"; did you mean {similar[0]!r}?" if similar else ""))
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Expected: {sorted(fields)}. Received: {sorted(inputs)}")
    return {name: _array(name, inputs[name], field) for name, field in fields.items()}


def _ones(values: Any) -> Any:
    """A weight of 1 for each slot; lists of different lengths stay, and are refused under their own name."""
    try:
        return np.ones(np.shape(values), np.float32)
    except ValueError:
        return values


def _array(name: str, values: Any, field: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = field["dtype"], field["shape"]
    axes = f"{len(shape)} axes" + "".join(f", {size} values in the last" for size in shape[-1:] if size != -1)
    expected = f"{name!r} must be {dtype} with {axes} ({field['description']})"
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{expected}. Received: lists of different lengths") from error
    # TensorFlow's own strings, and those of pandas, are objects.
    strings = array.dtype == object and all(isinstance(value, (str, bytes)) for value in array.flat)
    kind = "S" if strings else array.dtype.kind
    if array.ndim != len(shape) or any(size not in (-1, n) for size, n in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{expected}. Received: {array.ndim} axes, shape {array.shape}")
    # An empty list has no type of its own.
    if array.size and kind not in _KINDS[dtype]:
        raise ValueError(f"{expected}. Received: {array.dtype}, for example {array.flat[:1].tolist()[0]!r}")
    if dtype == "string":
        return array.astype(object) if array.size else np.zeros(array.shape, "U1")
    converted = array.astype(dtype)
    if array.dtype.kind in "iu" and dtype in ("int32", "int64") and not np.array_equal(converted, array):
        raise ValueError(f"{expected}. Received: numbers beyond its range, up to {array.max()}")
    return converted
