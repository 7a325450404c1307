# SPDX-License-Identifier: Apache-2.0
"""Raw values of an entity as text that people can edit, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from mvke_tf.data.encoder import INT64_MIN, NUMPY_DTYPES, RAW_UNKNOWN, EncodedFeature
from mvke_tf.errors import DataError
from mvke_tf.schema import SUMMARY_SUFFIX, WEIGHTS_SUFFIX

# Between a value and its weight, on a line of a list.
_WEIGHT = " = "
_EXPECTED = {"integer": "a whole number", "number": "a number", "vector": "a number", "string": "a text"}


def hint(feature: EncodedFeature) -> str:
    """How to write a value of a feature, in words."""
    return ("at the moment of a request; " if feature.context else "") + _form(feature)


def _form(feature: EncodedFeature) -> str:
    if feature.raw == "vector":
        return f"{feature.width} numbers with spaces between; empty: unknown"
    if feature.is_list:
        form = f"value{_WEIGHT}weight" if feature.weighted else "one value"
        kept = {"first": "the first", "last": "the last", "heaviest": "the heaviest"}[feature.keep]
        return f"{form} per line, {kept} {feature.length} count; empty: none"
    return f"{_EXPECTED[feature.raw]}; empty: unknown"


def to_text(feature: EncodedFeature, table: Mapping[str, np.ndarray], row: int) -> str:
    """The value of one row of a raw table; `""` of an unknown one."""
    value = table[feature.name][row]
    if feature.raw == "vector":
        return "" if np.isnan(value).any() else " ".join(map(_number, value))
    if not feature.is_list:
        return _one(feature, value)
    weights = table[feature.name + WEIGHTS_SUFFIX][row]
    filled = np.flatnonzero(np.isfinite(weights) & (weights > 0))
    return "\n".join(
        _one(feature, value[slot]) + (_WEIGHT + _number(weights[slot]) if feature.weighted else "") for slot in filled
    )


def from_text(feature: EncodedFeature, text: str) -> dict[str, np.ndarray]:
    """Raw columns of one row.

    Raises:
        DataError: If the text is no value of the feature; says where, and what one is.
    """
    # Spaces stay: values of the data may begin with one.
    lines = [line for line in re.split(r"\r?\n", text) if line.strip()]
    if not lines:
        return feature.unknown_raw()
    dtype = NUMPY_DTYPES[feature.raw]
    if feature.raw == "vector":
        numbers = [_value(feature, word) for word in re.split(r"[\s,;]+", text.strip()) if word]
        if len(numbers) != feature.width:
            raise DataError(f"{feature.name}: expected {feature.width} numbers. Received: {len(numbers)}")
        return {feature.name: np.array([numbers], dtype)}
    if not feature.is_list:
        if len(lines) > 1:
            raise DataError(f"{feature.name}: expected one value. Received: {len(lines)} lines")
        return {feature.name: np.array([_value(feature, lines[0])], dtype)}
    values, weights = [], []
    for line in lines:
        value, separator, weight = line.rpartition(_WEIGHT) if feature.weighted else ("", "", line)
        values.append(_value(feature, value if separator else weight))
        weights.append(_weight(feature, weight) if separator else 1.0)
    return {
        feature.name: np.array([values], dtype),
        feature.name + WEIGHTS_SUFFIX: np.array([weights], np.float32),
    }


def is_unknown(feature: EncodedFeature, encoded: Mapping[str, np.ndarray]) -> bool:
    """Whether some value in the one row of an encoded table is one that the encoder does not know, or is none."""
    column = encoded[feature.name][0]
    if feature.is_dense:
        return bool(column[0] == 1)
    if feature.is_list:
        return bool((column[encoded[feature.name + WEIGHTS_SUFFIX][0] > 0] == 0).any())
    return bool(column == 0)


def inputs_of(feature: EncodedFeature) -> tuple[str, ...]:
    """Names of the encoded columns of a feature."""
    return (*feature.raw_inputs, feature.name + SUMMARY_SUFFIX) if feature.summary else feature.raw_inputs


def _one(feature: EncodedFeature, value: object) -> str:
    if feature.raw == "number":
        return "" if np.isnan(value) else _number(value)  # type: ignore[call-overload]
    return "" if value == RAW_UNKNOWN[feature.raw] else str(value)


def _number(value: object) -> str:
    """The shortest decimal that is the same float32."""
    return np.format_float_positional(np.float32(value), trim="-")  # type: ignore[arg-type]


def _value(feature: EncodedFeature, text: str) -> str | int | float:
    if feature.raw == "string":
        return text
    try:
        value = int(text) if feature.raw == "integer" else float(text)
    except ValueError:
        value = math.nan
    most = -INT64_MIN if feature.raw == "integer" else float(np.finfo(np.float32).max)
    if not -most < value < most:
        raise DataError(f"{feature.name}: expected {_EXPECTED[feature.raw]}. Received: {text[:60]!r}")
    return value


def _weight(feature: EncodedFeature, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < float(np.finfo(np.float32).max):
        raise DataError(f"{feature.name}: expected a weight above 0 after '{_WEIGHT}'. Received: {text[:60]!r}")
    return weight
