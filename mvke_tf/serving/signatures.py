# SPDX-License-Identifier: Apache-2.0
"""What a signature of a SavedModel takes and gives: named tensors, their description in words, and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from mvke_tf.data.encoder import RAW_UNKNOWN, EncodedFeature, Encoder
from mvke_tf.schema import WEIGHTS_SUFFIX

_UNKNOWN = {
    "string": "an unseen value is legal; '' means unknown",
    "integer": "an unseen value is legal",
    "number": "NaN means unknown",
    "vector": "a NaN in it means unknown",
}
_KEPT = {
    "first": "the first {length} count",
    "last": "the last {length} count",
    "heaviest": "the {length} of the largest weights count",
}


@dataclasses.dataclass(frozen=True)
class TensorField:
    """One named tensor that goes into a signature or comes out of it.

    Args:
        dtype: Name of the TensorFlow dtype.
        shape: Its axes; -1 is any size.
        description: What it means.
        unknown: What stands for "unknown" in it, `"NaN"` for that number; None if nothing does.
        example: A legal value of one row, if one is known.
        ones_like: Of weights, the list whose slots weigh 1 each where the server or the client is not given them.
        optional: Whether the server and the client take an empty list for each row where they are not given it.
    """

    dtype: str
    shape: tuple[int, ...]
    description: str
    unknown: str | int | None = None
    example: Any = None
    ones_like: str | None = None
    optional: bool | None = None

    def spec(self, name: str) -> tf.TensorSpec:
        """The same for TensorFlow."""
        return tf.TensorSpec([None if size == -1 else size for size in self.shape], self.dtype, name)

    def describe(self) -> dict[str, Any]:
        """A dictionary for `signatures.json`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


Fields = dict[str, TensorField]


@dataclasses.dataclass(frozen=True)
class Signature:
    """One function of a SavedModel.

    Args:
        description: What it answers.
        inputs: Its named inputs.
        outputs: Its named outputs.
        function: From inputs, as keyword arguments, to a dictionary of outputs.
        cost: What a request takes, for servers that bound it: `per_row` (numbers per row), `per_value` (numbers per
            value of an input, by its name), `answer_per_row` (the `input` that says how many values each row of the
            answer has, and the `most` there are).
    """

    description: str
    inputs: Fields
    outputs: Fields
    function: Callable[..., dict[str, tf.Tensor]]
    cost: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def concrete(self) -> Any:
        """The traced function."""
        specs = {name: field.spec(name) for name, field in self.inputs.items()}
        return tf.function(self.function, autograph=False).get_concrete_function(**specs)

    def describe(self) -> dict[str, Any]:
        """A dictionary for `signatures.json`."""
        described = {
            "description": self.description,
            # Each row of the outputs depends on the same row of the inputs only: servers may answer several requests
            # in one call.
            "by_row": True,
            "inputs": {name: field.describe() for name, field in self.inputs.items()},
            "outputs": {name: field.describe() for name, field in self.outputs.items()},
        }
        return {**described, "cost": dict(self.cost)} if self.cost else described


def tower_inputs(encoder: Encoder, tower: str) -> Fields:
    """The raw features of one tower by name; a list has a second input, `<name>_weights`."""
    fields = {}
    for name, (dtype, rank, feature) in encoder.raw_inputs(tower).items():
        field = TensorField(dtype, _shape(rank, feature), _describe(name, feature))
        if name == feature.name:
            unknown = "NaN" if dtype == "float32" else RAW_UNKNOWN[feature.raw]
            field = dataclasses.replace(field, unknown=unknown, example=encoder.example(feature))
        elif not feature.weighted:
            field = dataclasses.replace(field, ones_like=feature.name)
        fields[name] = field
    return fields


def _shape(rank: int, feature: EncodedFeature) -> tuple[int, ...]:
    if feature.raw == "vector":
        return (-1, feature.width)
    return (-1,) * rank


def _describe(name: str, feature: EncodedFeature) -> str:
    what = f"{feature.tower} feature, {feature.raw}"
    if name != feature.name:
        left_out = "" if feature.weighted else "; 1 each where they are left out, as JSON and client.py allow"
        return f"{feature.tower} feature, finite weight of each slot of {feature.name}; 0 is an empty slot{left_out}"
    if feature.raw == "vector":
        return f"{what} of {feature.width} numbers; {_UNKNOWN['vector']}"
    if feature.length == 1:
        return f"{what}; {_UNKNOWN[feature.raw]}"
    of = f", values of {feature.embedding}" if feature.embedding else ""
    kept = _KEPT[feature.keep].format(length=feature.length)
    return (
        f"{what}, list of any length{of}; {kept}; {_UNKNOWN[feature.raw]}; shorter lists of a batch are filled up with "
        "any value of weight 0"
    )


def with_inputs(features: Mapping[str, TensorField], **others: TensorField) -> Fields:
    """Fields of raw features and of what else a signature takes.

    Raises:
        ValueError: If a feature has the name of one of the others.
    """
    taken = sorted(set(features) & set(others))
    if taken:
        raise ValueError(
            f"A signature takes an input of this name already; rename the feature. Expected names other than "
            f"{sorted(others)}. Received: {taken}"
        )
    return {**features, **others}


def checked(tensors: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The same tensors, which have one row per user or item each, once their shapes are found to agree.

    Without this, one row on one side would silently be paired with all rows of the other. One assertion covers all
    tensors, for speed, and still names those that are wrong.
    """
    tensors = {name: tf.ensure_shape(tensor, tensor.shape, name=name) for name, tensor in tensors.items()}
    rows = tf.stack([tf.shape(tensor)[0] for tensor in tensors.values()])
    counts = tf.unique_with_counts(rows)
    checks = [_assert_equal(rows, counts.y[tf.argmax(counts.count)], list(tensors), "rows as the others")]
    checks += _list_checks(tensors)
    with tf.control_dependencies(checks):
        return {name: tf.identity(tensor) for name, tensor in tensors.items()}


def _list_checks(tensors: Mapping[str, tf.Tensor]) -> list[tf.Operation]:
    """That each list has as many weights as values, and finite ones."""
    lists = [name for name in tensors if name + WEIGHTS_SUFFIX in tensors]
    if not lists:
        return []
    weights = [name + WEIGHTS_SUFFIX for name in lists]
    slots = {name: tf.shape(tensors[name])[1] for name in (*lists, *weights)}
    finite = tf.stack([tf.reduce_all(tf.math.is_finite(tensors[name])) for name in weights])
    wrong = tf.boolean_mask(weights, ~finite)
    return [
        _assert_equal(
            tf.stack([slots[name] for name in weights]),
            tf.stack([slots[name] for name in lists]),
            weights,
            "slots as its list",
        ),
        tf.debugging.Assert(
            tf.reduce_all(finite), ["Weights must be finite. Received NaN or infinite ones in:", wrong], summarize=-1
        ),
    ]


def _assert_equal(received: tf.Tensor, expected: tf.Tensor, names: list[str], what: str) -> tf.Operation:
    expected = tf.broadcast_to(expected, [len(names)])
    wrong = received != expected
    names, expected, received = (tf.boolean_mask(values, wrong) for values in (names, expected, received))
    return tf.debugging.Assert(
        ~tf.reduce_any(wrong),
        [f"Each of these features must have as many {what}:", names, "Expected:", expected, "Received:", received],
        summarize=-1,
    )
