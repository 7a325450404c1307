"""TensorFlow Serving's JSON for `predict`: arrays into answers. See `protocol.py`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mvke_tf.server.protocol import INPUTS, INSTANCES, RequestError

# TensorFlow Serving takes the strings of such outputs for bytes.
_BYTES_SUFFIX = "_bytes"


def write_answer(outputs: Mapping[str, np.ndarray], by_rows: bool) -> bytes:
    """The body of an answer; the name of a single output is left out.

    Args:
        outputs: What the signature put out; strings are arrays of `bytes`.
        by_rows: Whether to answer with `predictions`, one per row, or with `outputs`.

    Raises:
        RequestError: If rows are asked for and the outputs do not have the same number of them.
    """
    sizes = {name: array.shape[0] if array.ndim else None for name, array in outputs.items()}
    if by_rows and (None in sizes.values() or len(set(sizes.values())) > 1):
        raise RequestError(
            f"The signature does not put out one value per row; send {INPUTS!r} instead of {INSTANCES!r}. "
            f"Received: outputs with the first axes {sizes}"
        )
    columns = {name: _values(outputs[name], name.endswith(_BYTES_SUFFIX)) for name in sorted(outputs)}
    single = len(columns) == 1
    if by_rows:
        rows = zip(*columns.values(), strict=True)
        answer = {"predictions": [row[0] if single else dict(zip(columns, row, strict=True)) for row in rows]}
    else:
        answer = {"outputs": next(iter(columns.values())) if single else columns}
    return json.dumps(answer, allow_nan=False).encode()


def _values(array: np.ndarray, as_bytes: bool) -> Any:
    """Nested lists that JSON can hold."""
    if array.dtype == object:
        texts = np.empty(array.size, object)
        texts[:] = [_text(item, as_bytes) for item in array.ravel()]
        return texts.reshape(array.shape).tolist()
    if array.dtype.kind != "f":
        return array.tolist()
    # By way of the shortest decimal number that reads back as the same float32; as a double it would have 17 digits.
    exact = array if array.dtype == np.float64 else array.astype("U32").astype(np.float64)
    if np.isfinite(exact).all():
        return exact.tolist()
    return np.where(np.isfinite(exact), exact.astype(object), None).tolist()


def _text(item: bytes, as_bytes: bool) -> str | dict[str, str]:
    if not as_bytes:
        try:
            return item.decode()
        except UnicodeDecodeError:
            pass  # Bytes in an output that its name does not announce as such.
    return {"b64": base64.b64encode(item).decode()}


def write_error(message: str) -> bytes:
    """The body of an answer that says what is wrong."""
    return json.dumps({"error": message}).encode()
