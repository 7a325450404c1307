# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Serving's JSON for `predict`: requests into arrays, and arrays into answers.

Follows https://www.tensorflow.org/tfx/serving/api_rest and, where that page is silent, what the official server does,
with these exceptions, all of them stricter or valid JSON:

- a key that is unknown at the top level, in `inputs`, or twice in one object, is an error and not ignored;
- an output that is not finite is `null`: bare `NaN` and `Infinity` are not JSON. In requests they are allowed.

Whatever a body of n bytes holds, reading it takes time and memory proportional to n.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

SIGNATURE, INSTANCES, INPUTS = "signature_name", "instances", "inputs"
DEFAULT_SIGNATURE = "serving_default"
# Describes the signatures of a version, beside its `saved_model.pb`.
DESCRIPTIONS_FILE = "signatures.json"
# TensorFlow Serving takes the strings of such outputs for bytes.
_BYTES_SUFFIX = "_bytes"
# Keys of one object: an object has one per input, and a few of its own.
MOST_KEYS = 4096
# Levels of lists and objects: a request needs five, and one more per axis of an input beyond the second.
MOST_LEVELS = 32
# Characters of one number; a double has at most 17 significant digits.
MOST_DIGITS = 400
# A string of JSON, or what begins like one: never looked at twice, whatever is in it.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a whole number",
    float: "a decimal number",
    type(None): "null",
}


class RequestError(ValueError):
    """A request that cannot be answered.

    Args:
        message: What was received, what was expected, what to do.
        status: The HTTP status.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One input of a signature.

    Args:
        name: Its name.
        dtype: Name of the TensorFlow dtype.
        shape: Its axes, None for any size; None if even their number is free.
        description: What it means, if that is known.
        unknown: The value that `null` stands for; None if it stands for nothing.
        example: A legal value of one row, if one is known.
        ones_like: The list whose slots it gives a weight of 1 each where it is left out; None if it may not be.
        optional: Whether it is an empty list for each row where it is left out.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    description: str = ""
    unknown: Any = None
    example: Any = None
    ones_like: str | None = None
    optional: bool = False

    def __str__(self) -> str:
        axes = (
            "any shape" if self.shape is None else f"[{', '.join('any' if n is None else str(n) for n in self.shape)}]"
        )
        about = f"; {self.description}" if self.description else ""
        return f"{self.name!r} ({self.dtype} {axes}{about})"


@dataclasses.dataclass(frozen=True)
class PredictRequest:
    """A parsed request.

    Args:
        signature: Name of the signature that it asks for.
        by_rows: Whether it came as `instances` and is answered with `predictions`.
        values: What stood there.
    """

    signature: str
    by_rows: bool
    values: Any


def parse_request(body: bytes) -> PredictRequest:
    """Reads the body of a request.

    Raises:
        RequestError: If it is not UTF-8, not JSON, or not an object of the known keys.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"The body must be JSON in UTF-8. Received: byte {error.start} is not UTF-8") from error
    if (levels := _levels(body)) > MOST_LEVELS:
        raise RequestError(f"The body must be JSON of at most {MOST_LEVELS} levels. Received: {levels} levels")
    try:
        request = json.loads(text, object_pairs_hook=_object, parse_float=_decimal, parse_int=_whole)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"The body must be JSON. Received: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(f"The body must be a JSON object. Received: {_JSON_NAMES[type(request)]}")
    unknown = sorted(set(request) - {SIGNATURE, INSTANCES, INPUTS})
    if unknown:
        raise RequestError(f"The keys of a request are {[SIGNATURE, INSTANCES, INPUTS]}. Received: {_quoted(unknown)}")
    if (INSTANCES in request) == (INPUTS in request):
        raise RequestError(
            f"A request has one of {INSTANCES!r} (rows) and {INPUTS!r} (columns). "
            f"Received: {'both' if INPUTS in request else 'neither'}"
        )
    signature = request.get(SIGNATURE, DEFAULT_SIGNATURE)
    if not isinstance(signature, str):
        raise RequestError(f"{SIGNATURE!r} must be a string. Received: {_JSON_NAMES[type(signature)]}")
    by_rows = INSTANCES in request
    # TensorFlow Serving, too, takes an empty name for the default.
    return PredictRequest(signature or DEFAULT_SIGNATURE, by_rows, request[INSTANCES if by_rows else INPUTS])


def _levels(body: bytes) -> int:
    """How deep lists and objects are nested, 0 without any."""
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NO_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1).astype(np.int32)
    return max(0, int(np.cumsum(steps).max(initial=0)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_KEYS:
        raise RequestError(f"An object must have at most {MOST_KEYS} keys. Received: {len(pairs)} keys")
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [name for name, count in counts.items() if count > 1]
        raise RequestError(f"An object must name each key once. Received twice: {_quoted(sorted(twice))}")
    return values


def _decimal(text: str) -> float:
    if len(text) > MOST_DIGITS:
        raise RequestError(f"A number must have at most {MOST_DIGITS} characters. Received: {_short(text)}")
    value = float(text)
    if math.isinf(value):
        raise RequestError(f"A number must fit a double. Received: {_short(text)}")
    return value


def _whole(text: str) -> int:
    # The longest legal one is -2**63; much longer ones take Python long to read.
    if len(text) > 20:
        raise RequestError(f"A whole number must fit 64 bits. Received: {_short(text)}")
    return int(text)


def read_arrays(
    request: PredictRequest, inputs: Mapping[str, InputSpec], max_rows: int, max_values: int
) -> dict[str, np.ndarray]:
    """The inputs of a signature, of exactly their dtypes, ranks and fixed sizes.

    Args:
        request: The request.
        inputs: What the signature takes.
        max_rows: Most rows.
        max_values: Most values of one input, for example rows x slots.

    Raises:
        RequestError: If an input is missing, unknown, or not what the signature takes; the message says which and
            where.
    """
    columns = (
        _columns_of_rows(request.values, inputs, max_rows) if request.by_rows else _columns(request.values, inputs)
    )
    arrays = {}
    for name, spec in inputs.items():
        if isinstance(columns[name], list) and len(columns[name]) > max_rows:
            _too_many(len(columns[name]), max_rows)
        arrays[name] = _array(spec, columns[name], request.by_rows, max_values)
    return arrays


def _too_many(rows: int, most: int) -> NoReturn:
    raise RequestError(f"At most {most} rows in a request; send several. Received: {rows} rows", 413)


def check_sizes(sizes: Mapping[str, int], most: int) -> None:
    """Does nothing if no output, by name, has more values than `most`.

    Raises:
        RequestError: If one has.
    """
    for name, values in sizes.items():
        if values > most:
            raise RequestError(
                f"At most {most} values in an output; ask for fewer rows. "
                f"Received: a request that makes {values} values of {name!r}",
                413,
            )


def _is_b64(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"]


def _columns(values: Any, inputs: Mapping[str, InputSpec]) -> dict[str, Any]:
    if isinstance(values, dict) and not _is_b64(values):
        weights = {
            spec.name: [_ones(slots) for slots in values[spec.ones_like]]
            for spec in _left_out(values, inputs)
            if isinstance(values[spec.ones_like], list)
        }
        rows = next((len(values[n]) for n, s in inputs.items() if s.shape != () and isinstance(values.get(n), list)), 0)
        empty: dict[str, Any] = {
            name: [[]] * rows for name, spec in inputs.items() if spec.optional and name not in values
        }
        _check_names(values, inputs, INPUTS, {**weights, **empty})
        return {**values, **weights, **empty}
    if len(inputs) != 1:
        raise RequestError(
            f"{INPUTS!r} must be an object, because the signature has the inputs {sorted(inputs)}. "
            f"Received: {_JSON_NAMES[type(values)]}"
        )
    return dict.fromkeys(inputs, values)


def _columns_of_rows(rows: Any, inputs: Mapping[str, InputSpec], max_rows: int) -> dict[str, list]:
    if not isinstance(rows, list) or not rows:
        raise RequestError(
            f"{INSTANCES!r} must be a list of at least one row. "
            f"Received: {'an empty list' if rows == [] else _JSON_NAMES[type(rows)]}"
        )
    if len(rows) > max_rows:
        _too_many(len(rows), max_rows)
    scalars = [name for name, spec in inputs.items() if spec.shape == ()]
    if scalars:
        raise RequestError(f"{scalars} take one value, not one per row: send {INPUTS!r}. Received: {INSTANCES!r}")
    named = [isinstance(row, dict) and not _is_b64(row) for row in rows]
    if not any(named) and len(inputs) == 1:
        return dict.fromkeys(inputs, rows)
    if not all(named):
        first = named.index(False)
        raise RequestError(
            f"Every row of {INSTANCES!r} must be an object of the inputs {sorted(inputs)}. "
            f"Received: {INSTANCES}[{first}] is {_JSON_NAMES[type(rows[first])]}"
        )
    rows = list(rows)
    for number, row in enumerate(rows):
        if row.keys() != inputs.keys():
            none: dict[str, Any] = {name: [] for name, spec in inputs.items() if spec.optional and name not in row}
            none |= {spec.name: _ones(row[spec.ones_like]) for spec in _left_out(row, inputs)}
            _check_names(row, inputs, f"{INSTANCES}[{number}]", none)
            rows[number] = row | none
    return {name: [row[name] for row in rows] for name in inputs}


def _left_out(values: Mapping[str, Any], inputs: Mapping[str, InputSpec]) -> list[InputSpec]:
    """Weights that a request leaves out, of lists that it has."""
    return [spec for name, spec in inputs.items() if name not in values and spec.ones_like in values]


def _ones(slots: Any) -> Any:
    """A weight of 1 for each slot; what is no list stays, and is refused under the name of the list."""
    return [1.0] * len(slots or ()) if isinstance(slots, list) or slots is None else slots


def _check_names(
    values: Mapping[str, Any], inputs: Mapping[str, InputSpec], where: str, filled: Mapping[str, Any]
) -> None:
    """That a request has all inputs but those that are filled in, and no others."""
    # Weights that may be left out are not asked for beside their list.
    missing = [spec for name, spec in inputs.items() if name not in {**values, **filled} and spec.ones_like is None]
    if missing:
        # In full where that helps, by name where it would bury the message.
        listed = ", ".join(str(spec) if len(missing) <= 3 else repr(spec.name) for spec in missing)
        raise RequestError(f"{where} lacks {listed}. Received: {_quoted(sorted(values)) or 'an empty object'}")
    extra = sorted(set(values) - set(inputs))
    if extra:
        raise RequestError(f"{where} must have the inputs {sorted(inputs)} only. Received also: {_quoted(extra)}")


def _array(spec: InputSpec, value: Any, by_rows: bool, max_values: int) -> np.ndarray:
    """A nested list as an array, level by level."""
    flat: list[Any] = [value]
    shape: list[int] = []
    while len(shape) < len(spec.shape) if spec.shape is not None else flat and isinstance(flat[0], list):
        if shape and spec.unknown is not None:
            # Of a list, null is the empty one.
            flat = [[] if item is None else item for item in flat]
        wrong = _first(flat, lambda item: type(item) is not list)
        if wrong is not None:
            raise RequestError(
                f"{_place(spec, wrong, shape, by_rows)} must be a list: the input is {spec}. "
                f"Received: {_JSON_NAMES[type(flat[wrong])]}"
            )
        fixed = spec.shape[len(shape)] if spec.shape is not None else None
        size = len(flat[0]) if fixed is None and flat else fixed or 0
        wrong = _first(flat, lambda item, size=size: len(item) != size)
        if wrong is not None:
            why = "the input is" if fixed is not None else "all lists of one axis need the same length; the input is"
            raise RequestError(
                f"{_place(spec, wrong, shape, by_rows)} must have {size} values: {why} {spec}. "
                f"Received: {len(flat[wrong])} values"
            )
        shape.append(size)
        flat = list(itertools.chain.from_iterable(flat))
        if len(flat) > max_values:
            raise RequestError(
                f"At most {max_values} values of one input in a request; send several. "
                f"Received: {len(flat)} values of {spec.name!r}",
                413,
            )
    kind = _KINDS.get(spec.dtype)
    if kind is None:
        raise RequestError(f"JSON has no values for the input {spec}. Use another signature. Received: a value", 501)
    if spec.unknown is not None:
        flat = [spec.unknown if item is None else item for item in flat]
    wrong = _first(flat, lambda item: not kind.valid(item))
    if wrong is not None:
        raise RequestError(
            f"{_place(spec, wrong, shape, by_rows)} must be {kind.expected}: the input is {spec}. "
            f"Received: {_short(json.dumps(flat[wrong]))}"
        )
    return kind.array(flat).reshape(shape)


def _first(items: Sequence[Any], test: Any) -> int | None:
    return next((number for number, item in enumerate(items) if test(item)), None)


def _place(spec: InputSpec, number: int, shape: Sequence[int], by_rows: bool) -> str:
    """Where in the request the `number`-th item of a level stands that has the sizes `shape` above it."""
    path = [int(index) for index in np.unravel_index(number, shape)] if shape else []
    if by_rows and path:
        return f"{INSTANCES}[{path[0]}].{spec.name}" + "".join(f"[{index}]" for index in path[1:])
    return f"{INPUTS}.{spec.name}" + "".join(f"[{index}]" for index in path)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the values of one dtype look like in JSON."""

    expected: str
    valid: Callable[[Any], bool]
    array: Callable[[list], np.ndarray]


def _is_string(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False  # A lone half of a surrogate pair is legal JSON and not legal text.
        return True
    if not _is_b64(value) or not isinstance(value["b64"], str):
        return False
    try:
        base64.b64decode(value["b64"], validate=True)
    except ValueError:
        return False
    return True


def _strings(flat: list) -> np.ndarray:
    array = np.empty(len(flat), object)
    array[:] = [item.encode() if isinstance(item, str) else base64.b64decode(item["b64"]) for item in flat]
    return array


def _whole_numbers(dtype: str) -> _Kind:
    lowest, highest = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return _Kind(
        f"a whole number from {lowest} to {highest}",
        lambda value: type(value) is int and lowest <= value <= highest,
        lambda flat: np.array(flat, dtype),
    )


def _decimal_numbers(dtype: str) -> _Kind:
    # As TensorFlow Serving has it: a whole number must not lose digits.
    highest, whole = float(np.finfo(dtype).max), 2 ** (np.finfo(dtype).nmant + 1)

    def valid(value: Any) -> bool:
        if type(value) is int:
            return -whole < value < whole
        return type(value) is float and not highest < abs(value) < math.inf

    expected = f"a number (whole ones below {whole}) or NaN, Infinity, -Infinity"
    return _Kind(expected, valid, lambda flat: np.array(flat, dtype))


_KINDS = {
    "string": _Kind('a string, or {"b64": base64 of its bytes}', _is_string, _strings),
    "bool": _Kind("true or false", lambda value: type(value) is bool, lambda flat: np.array(flat, bool)),
    **{f"{sign}int{bits}": _whole_numbers(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{dtype: _decimal_numbers(dtype) for dtype in ("float32", "float64")},
}


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
        answer: dict[str, Any] = {
            "predictions": [row[0] if single else dict(zip(columns, row, strict=True)) for row in rows]
        }
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
    return np.where(np.isfinite(exact), exact.astype(object), np.array(None, object)).tolist()


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


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(_short(json.dumps(name)) for name in names[:8]) + (", ..." if len(names) > 8 else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
