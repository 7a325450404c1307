"""A trained model as a TensorFlow SavedModel: raw features in, probabilities out.

The encoder is inside, so that a client sends strings and numbers, and needs TensorFlow alone.

    <path>/<version>/
        saved_model.pb, variables/   for `tf.saved_model.load` and TensorFlow Serving
        signatures.json              what each signature takes and gives, in words
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from mvke_tf.data.features import Encoder, RawFeature
from mvke_tf.files import write_json, written_whole
from mvke_tf.run import Run
from mvke_tf.schema import TOWERS, WEIGHTS_SUFFIX

SIGNATURES_FILE = "signatures.json"
_DTYPES = {"integer": "int64", "string": "string", "number": "float32"}
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


class Serving(tf.Module):
    """Everything that the signatures of one model share, tracked by TensorFlow.

    Args:
        model: A two-tower model, `{feature: tensor} -> {task: logit (B, 1)}`.
        encoder: The encoder of the data that the model was trained on.

    Raises:
        ValueError: If the encoder does not make the inputs of the model.
    """

    def __init__(self, model: keras.Model, encoder: Encoder) -> None:
        super().__init__(name="serving")
        made = {name for feature in encoder.schema().features for name in feature.inputs}
        if set(model.input) != made:
            raise ValueError(
                f"The encoder and the model do not belong together. The encoder makes {sorted(made)}. "
                f"The model takes {sorted(model.input)}"
            )
        self.model = model
        # TensorFlow saves the tables of these layers only if it can reach them from here.
        self.lookups = dict(encoder.layers)
        self._encoder = encoder

    def signatures(self) -> dict[str, Signature]:
        """All signatures by name."""
        inputs = {name: port for tower in TOWERS for name, port in tower_inputs(self._encoder, tower).items()}
        outputs = {task: Port("float32", (-1,), f"probability of {task}, one per row") for task in self.model.output}
        return {
            "serving_default": Signature(
                "Probability of each task for each pair of a user and an item, from their raw features; all inputs "
                "have the same number of rows.",
                inputs,
                outputs,
                self.probabilities,
            )
        }

    def probabilities(self, **features: tf.Tensor) -> dict[str, tf.Tensor]:
        """Probabilities `{task: (B,)}` from the raw features of both towers."""
        features = _checked(features)
        encoded = {name: column for tower in TOWERS for name, column in self._encoder.encode(features, tower).items()}
        logits = self.model(encoded, training=False)
        return {task: tf.sigmoid(logit[:, 0]) for task, logit in logits.items()}


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
        return {feature.name: Port(_DTYPES[kind], (-1,), f"{what}; {_UNKNOWN[kind]}")}
    of = f", values of {feature.shares}" if feature.shares else ""
    return {
        feature.name: Port(
            _DTYPES[kind],
            (-1, -1),
            f"{what}, list of any length{of}; the first {feature.length} count, in a history the most recent; "
            f"{_UNKNOWN[kind]}",
        ),
        feature.name + WEIGHTS_SUFFIX: Port(
            "float32", (-1, -1), f"{feature.tower} feature, weight of each slot of {feature.name}; 0 is an empty slot"
        ),
    }


def _checked(features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The same features, once their shapes are found to agree.

    Without this, one row on one side would silently be paired with all rows of the other. One assertion covers all
    features, for speed, and still names those that are wrong.
    """
    features = {name: tf.ensure_shape(tensor, tensor.shape, name=name) for name, tensor in features.items()}
    rows = tf.stack([tf.shape(tensor)[0] for tensor in features.values()])
    counts = tf.unique_with_counts(rows)
    checks = [_assert_equal(rows, counts.y[tf.argmax(counts.count)], list(features), "rows as the others")]
    lists = [name for name in features if name + WEIGHTS_SUFFIX in features]
    if lists:
        weights = [name + WEIGHTS_SUFFIX for name in lists]
        slots = {name: tf.shape(features[name])[1] for name in (*lists, *weights)}
        checks.append(
            _assert_equal(
                tf.stack([slots[name] for name in weights]),
                tf.stack([slots[name] for name in lists]),
                weights,
                "slots as its list",
            )
        )
    with tf.control_dependencies(checks):
        return {name: tf.identity(tensor) for name, tensor in features.items()}


def _assert_equal(received: tf.Tensor, expected: tf.Tensor, names: list[str], what: str) -> tf.Operation:
    expected = tf.broadcast_to(expected, [len(names)])
    wrong = received != expected
    names, expected, received = (tf.boolean_mask(values, wrong) for values in (names, expected, received))
    return tf.debugging.Assert(
        ~tf.reduce_any(wrong),
        [f"Each of these features must have as many {what}:", names, "Expected:", expected, "Received:", received],
        summarize=-1,
    )


def export_saved_model(model: keras.Model, encoder: Encoder, path: Path) -> Path:
    """Writes the next version of a SavedModel, whole or not at all.

    Args:
        model: A two-tower model, `{feature: tensor} -> {task: logit (B, 1)}`, of binary tasks.
        encoder: The encoder of the data that the model was trained on.
        path: Folder of all versions, as TensorFlow Serving expects it; it may not exist yet.

    Returns:
        `<path>/<version>`: version 1, or one more than the highest there is.

    Raises:
        ValueError: If Keras does not run on TensorFlow, if `path` is a file, or if model and encoder do not match.
    """
    _check_backend()
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a folder to write the export to. Received a file: {path}")
    serving = Serving(model, encoder)
    signatures = serving.signatures()
    target = path / str(_next_version(path))
    with written_whole(target) as temporary:
        tf.saved_model.save(
            serving, str(temporary), signatures={name: signature.concrete() for name, signature in signatures.items()}
        )
        described = {name: signature.describe() for name, signature in signatures.items()}
        write_json(temporary / SIGNATURES_FILE, described)
    return target


def _check_backend() -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            f"A SavedModel can only be written while Keras runs on TensorFlow. Received: the backend {backend!r}. "
            "Set KERAS_BACKEND=tensorflow for this command; the checkpoint itself serves every backend."
        )


def _next_version(path: Path) -> int:
    """One more than the highest version in `path`, 1 if there is none."""
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def export_run(run: Run, export_dir: Path | None = None) -> Path:
    """Writes the best checkpoint of a run as the next version of a SavedModel.

    Args:
        run: The run.
        export_dir: Folder of all versions; `export` in the run directory by default.

    Returns:
        `<export_dir>/<version>`.

    Raises:
        RunError: If the run has no checkpoint yet.
        ValueError: See `export_saved_model`.
    """
    _check_backend()
    return export_saved_model(run.load_model(), run.prepared.encoder, export_dir or run.export)
