"""What a signature takes and gives: its ports, their description in words, and checks of what comes in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from mvke_tf.data.features import RAW_DTYPES, Encoder, RawFeature
from mvke_tf.schema import WEIGHTS_SUFFIX

_UNKNOWN = {"number": "NaN means unknown", "integer": "an unseen value is legal", "string": "an unseen value is legal"}


@dataclasses.dataclass(frozen=True)
class Port:
    """One named tensor that goes into a signature or comes out of it.

    Args:
        dtype: Name of the TensorFlow dtype.
        shape: Its axes; -1 is any size.
        description: What it means.
    """

    dtype: str
    shape: tuple[int, ...]
    description: str

    def spec(self, name: str) -> tf.TensorSpec:
        """The same for TensorFlow."""
        return tf.TensorSpec([None if size == -1 else size for size in self.shape], self.dtype, name)


@dataclasses.dataclass(frozen=True)
class Signature:
    """One door of a SavedModel.

    Args:
        description: What it answers.
        inputs: Its named inputs.
        outputs: Its named outputs.
        function: From inputs, as keyword arguments, to a dictionary of outputs.
    """

    description: str
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    function: Callable[..., dict[str, tf.Tensor]]

    def concrete(self) -> Any:
        """The traced function."""
        specs = {name: port.spec(name) for name, port in self.inputs.items()}
        return tf.function(self.function, autograph=False).get_concrete_function(**specs)

    def describe(self) -> dict[str, Any]:
        """A dictionary for `signatures.json`."""
        return {
            "description": self.description,
            "inputs": {name: dataclasses.asdict(port) for name, port in self.inputs.items()},
            "outputs": {name: dataclasses.asdict(port) for name, port in self.outputs.items()},
        }


def tower_inputs(encoder: Encoder, tower: str) -> dict[str, Port]:
    """The raw features of one tower by name; a list has a second input, `<name>_weights`."""
    kinds = {feature.name: feature.kind for feature in encoder.features}
    ports: dict[str, Port] = {}
    for feature in encoder.features:
        if feature.tower == tower:
            ports |= _feature_inputs(feature, kinds[feature.shares or feature.name])
    return ports


def _feature_inputs(feature: RawFeature, kind: str) -> dict[str, Port]:
    what = f"{feature.tower} feature, {kind}"
    if feature.length == 1:
        return {feature.name: Port(RAW_DTYPES[kind], (-1,), f"{what}; {_UNKNOWN[kind]}")}
    of = f", values of {feature.shares}" if feature.shares else ""
    return {
        feature.name: Port(
            RAW_DTYPES[kind],
            (-1, -1),
            f"{what}, list of any length{of}; the first {feature.length} count, in a history the most recent; "
            f"{_UNKNOWN[kind]}; shorter lists of a batch are filled up with any value of weight 0",
        ),
        feature.name + WEIGHTS_SUFFIX: Port(
            "float32",
            (-1, -1),
            f"{feature.tower} feature, finite weight of each slot of {feature.name}; 0 is an empty slot",
        ),
    }


def with_inputs(features: Mapping[str, Port], **others: Port) -> dict[str, Port]:
    """Ports of raw features and of what else a signature takes.

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
