"""The doors of a SavedModel: one model, its encoder and its catalogue behind several signatures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mvke_tf.data.features import Encoder
from mvke_tf.models.two_tower import (
    conditional_tasks,
    gate_model,
    outputs_of_products,
    predictions,
    task_kinds,
    task_names,
    tower,
)
from mvke_tf.schema import TOWERS
from mvke_tf.serving.catalogue import Catalogue, StoredCatalogue
from mvke_tf.serving.ports import Port, Signature, checked, tower_inputs, with_inputs

Tensors = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Parts of a model, and the towers whose features each reads.

    A plain object, which TensorFlow does not track: it would save the same layers again by other paths.
    """

    user: keras.Model
    item: keras.Model
    gates: keras.Model | None
    gate_sides: tuple[str, ...]


class Serving(tf.Module):
    """Everything that the signatures of one model share, tracked by TensorFlow.

    Args:
        model: A two-tower model, `{feature: tensor} -> {task: output (B, 1)}`.
        encoder: The encoder of the data that the model was trained on.
        catalogue: Items to be known by id; without, there is neither `score_ids` nor `recommend`.

    Raises:
        ValueError: If the encoder does not make the inputs of the model, or the catalogue cannot be used.
    """

    def __init__(self, model: keras.Model, encoder: Encoder, catalogue: Catalogue | None = None) -> None:
        super().__init__(name="serving")
        schema = encoder.schema()
        made = {name for feature in schema.features for name in feature.inputs}
        if set(model.input) != made:
            raise ValueError(
                f"The encoder and the model do not belong together. The encoder makes {sorted(made)}. "
                f"The model takes {sorted(model.input)}"
            )
        self.model = model
        # TensorFlow saves the tables of these layers only if it can reach them from here.
        self.lookups = dict(encoder.layers)
        self.catalogue = None if catalogue is None else StoredCatalogue(model, encoder, catalogue)
        self._encoder = encoder
        self._tasks = task_names(model)
        gates = gate_model(model) if has_gates(model) else None
        read = set(gates.input) if gates else set()
        sides = tuple(side for side in TOWERS if read & set(schema.inputs(side)))
        self._parts = _Parts(tower(model, "user"), tower(model, "item"), gates, sides)

    def signatures(self) -> dict[str, Signature]:
        """All signatures by name."""
        features = {side: tower_inputs(self._encoder, side) for side in TOWERS}
        signatures = {
            "serving_default": Signature(
                "Probability of each task for each pair of a user and an item, from their raw features; all inputs "
                "have the same number of rows. Of a regression task, the value.",
                {**features["user"], **features["item"]},
                {task: Port("float32", (-1,), f"{self.meaning(task)}, one per row") for task in self._tasks},
                self.probabilities,
            ),
            "user_vectors": self._vectors_signature("user", features["user"]),
            "item_vectors": self._vectors_signature("item", features["item"]),
        }
        if self._parts.gates is not None:
            signatures["gate_weights"] = Signature(
                "Weights that each task gives to its experts, from the raw features that its gate reads; in MVKE those "
                "of the item. A task with a single expert has no gate.",
                {name: port for side in self._parts.gate_sides for name, port in features[side].items()},
                {
                    f"gate_{task}": Port("float32", (-1, output.shape[-1]), self._gate_meaning(task))
                    for task, output in self._parts.gates.output.items()
                },
                self.gate_weights,
            )
        if self.catalogue is not None:
            signatures["score_ids"] = self._score_ids_signature(features["user"])
            signatures["recommend"] = self._recommend_signature(features["user"])
        return signatures

    def describe_tasks(self) -> dict[str, dict[str, Any]]:
        """Kind and meaning of each task, for `signatures.json`."""
        kinds, given = task_kinds(self.model), conditional_tasks(self.model)
        return {
            task: {"kind": kinds[task], "given": given.get(task), "prediction": self.meaning(task)}
            for task in self._tasks
        }

    def describe_catalogue(self) -> dict[str, Any] | None:
        """Size of the catalogue and the id that fills lists up, for `signatures.json`."""
        if self.catalogue is None:
            return None
        return {"items": self.catalogue.size, "id_dtype": self.catalogue.dtype, "padding_id": self.catalogue.padding}

    def left_out(self) -> list[str]:
        """A line about each signature that this model cannot have."""
        lines = []
        if self._parts.gates is None:
            lines.append(f"Without the signature gate_weights: {self.model.name} has no gates.")
        if self.catalogue is None:
            lines.append("Without the signatures score_ids and recommend: no catalogue of items was given.")
        return lines

    def meaning(self, task: str) -> str:
        """What the prediction of a task is, in words."""
        if task_kinds(self.model)[task] == "regression":
            return f"value of {task}, in the unit of its label"
        first = conditional_tasks(self.model).get(task)
        return f"probability of {task}" + (f" (of {first} and then {task})" if first else "")

    def _vectors_signature(self, side: str, features: dict[str, Port]) -> Signature:
        part = getattr(self._parts, side)
        outputs = {
            f"{side}_vector_{task}": Port("float32", (-1, vector.shape[-1]), f"{side} vector, {self._product(task)}")
            for task, vector in part.output.items()
        }
        return Signature(
            f"Factorised {side} vectors of each task, from the raw features of the {side}; what the inner product of "
            "a user vector and an item vector is, each output says.",
            features,
            outputs,
            getattr(self, f"{side}_vectors"),
        )

    def _product(self, task: str) -> str:
        """What the inner product of the vectors of a task is, in words."""
        head, first = self.model.get_layer(task), conditional_tasks(self.model).get(task)
        if task_kinds(self.model)[task] == "regression":
            return f"user vector · item vector + {head.offset:g} is the value of {task}"
        if first:
            return f"user vector · item vector is the logit of {task} given {first}"
        return f"user vector · item vector is the logit of {task}"

    def _gate_meaning(self, task: str) -> str:
        gate = self.model.get_layer(f"gate_{task}")
        chosen = getattr(gate, "kernels", None) or gate.experts
        return f"weights of the experts {tuple(chosen)} in {task}, which sum to 1"

    def _score_ids_signature(self, features: dict[str, Port]) -> Signature:
        return Signature(
            f"Probability of each task for each of n users with m items each of the catalogue ({self.catalogue.size} "
            "items), as a ranker asks; one user with many items is n = 1. Of a regression task, the value. The item "
            "vectors are stored: only the user tower runs. Takes the memory of the vectors of n x m items.",
            with_inputs(
                features,
                item_ids=Port(
                    self.catalogue.dtype,
                    (-1, -1),
                    "ids of m items per user, (n, m); an id that is not in the catalogue is scored as an item of which "
                    f"nothing is known, and fills up shorter lists, for example {self.catalogue.padding!r}",
                ),
            ),
            {task: Port("float32", (-1, -1), f"{self.meaning(task)}, (n, m)") for task in self._tasks},
            self.score_ids,
        )

    def _recommend_signature(self, features: dict[str, Port]) -> Signature:
        padding = repr(self.catalogue.padding)
        places = f"(n, the lesser of k and {self.catalogue.size})"
        return Signature(
            f"The k items of the catalogue ({self.catalogue.size} items) that a task rates highest for each of n users,"
            " best first, by exact scoring of all; equal scores are in the order of the catalogue. A row in which fewer"
            f" items remain ends with empty places: id {padding}, title '', prediction 0. Takes 4 bytes of memory per"
            " user and item of the catalogue, a few times.",
            with_inputs(
                features,
                k=Port("int32", (), "number of items per user, at least 1; more than the catalogue holds means all"),
                task=Port("string", (), f"name of the task to rank by, one of: {', '.join(self._tasks)}"),
                exclude=Port(
                    self.catalogue.dtype,
                    (-1, -1),
                    "ids of items to leave out per user, (n, e); (n, 0) leaves out nothing; an id that is not in the "
                    f"catalogue has no effect and fills up shorter lists, for example {padding}",
                ),
            ),
            {
                "item_ids": Port(self.catalogue.dtype, (-1, -1), f"ids, best first, {places}"),
                "titles": Port("string", (-1, -1), "titles of these items"),
                "predictions": Port("float32", (-1, -1), "probability of the task, or value of a regression task"),
            },
            self.recommend,
        )

    def probabilities(self, **features: tf.Tensor) -> Tensors:
        """Predictions `{task: (B,)}` from the raw features of both towers."""
        outputs = predictions(self.model, self._apply(self.model, checked(features), TOWERS))
        return {task: output[:, 0] for task, output in outputs.items()}

    def user_vectors(self, **features: tf.Tensor) -> Tensors:
        """Vectors `{user_vector_<task>: (B, W_task)}` from the raw features of users."""
        return {f"user_vector_{task}": vector for task, vector in self._users(checked(features)).items()}

    def item_vectors(self, **features: tf.Tensor) -> Tensors:
        """Vectors `{item_vector_<task>: (B, W_task)}` from the raw features of items."""
        vectors = self._apply(self._parts.item, checked(features), ["item"])
        return {f"item_vector_{task}": vector for task, vector in vectors.items()}

    def gate_weights(self, **features: tf.Tensor) -> Tensors:
        """Weights `{gate_<task>: (B, n_task)}` from the raw features of the towers that the gates read."""
        weights = self._apply(self._parts.gates, checked(features), self._parts.gate_sides)
        return {f"gate_{task}": weight for task, weight in weights.items()}

    def score_ids(self, item_ids: tf.Tensor, **features: tf.Tensor) -> Tensors:
        """Predictions `{task: (n, m)}` from the raw features of n users and the ids `(n, m)` of items of each."""
        features = checked({**features, "item_ids": item_ids})
        items = self.catalogue.gather(self.catalogue.positions(features.pop("item_ids")))
        users = self._users(features)
        products = {task: tf.linalg.matvec(items[task], users[task]) for task in self._tasks}
        return predictions(self.model, outputs_of_products(self.model, products))

    def recommend(self, k: tf.Tensor, task: tf.Tensor, exclude: tf.Tensor, **features: tf.Tensor) -> Tensors:
        """The best k items of one task for n users, and what the task predicts of them, each `(n, k)`."""
        catalogue = self.catalogue
        features = checked({**features, "exclude": exclude})
        left_out = catalogue.positions(features.pop("exclude"))
        chosen = tf.equal(self._tasks, task)
        checks = [
            tf.debugging.Assert(k >= 1, ["k must be at least 1. Received:", k]),
            tf.debugging.Assert(
                tf.reduce_any(chosen), [f"task must be one of: {', '.join(self._tasks)}. Received:", task], summarize=-1
            ),
        ]
        with tf.control_dependencies(checks):
            index = tf.argmax(chosen, output_type=tf.int32)
        users = self._users(features)

        def best(name: str) -> tuple[tf.Tensor, tf.Tensor]:
            """Places in the catalogue and predictions; other tasks are computed only if this one needs them."""
            scores = outputs_of_products(self.model, catalogue.products(users))[name]
            scores = tf.tensor_scatter_nd_update(scores, places, tf.fill([tf.shape(places)[0]], -np.inf))
            scores, positions = tf.math.top_k(scores, tf.minimum(k, catalogue.size))
            remain = scores > -np.inf
            # A float32 sigmoid may be off by one in the last bit, and then not fall where the scores do.
            predicted = tf.cast(predictions(self.model, {name: tf.cast(scores, tf.float64)})[name], tf.float32)
            return tf.where(remain, positions, catalogue.size), tf.where(remain, predicted, 0.0)

        in_catalogue = left_out < catalogue.size
        places = tf.stack([tf.boolean_mask(axis, in_catalogue) for axis in _rows_and(left_out)], axis=1)
        positions, predicted = tf.switch_case(index, [functools.partial(best, name) for name in self._tasks])
        return {
            "item_ids": tf.gather(catalogue.ids, positions),
            "titles": tf.gather(catalogue.titles, positions),
            "predictions": predicted,
        }

    def _users(self, features: Tensors) -> Tensors:
        return self._apply(self._parts.user, features, ["user"])

    def _apply(self, part: keras.Model, features: Mapping[str, tf.Tensor], sides: Sequence[str]) -> Tensors:
        """The float32 outputs of a part of the model for the raw features of some towers."""
        encoded = {name: column for side in sides for name, column in self._encoder.encode(features, side).items()}
        outputs = part({name: encoded[name] for name in part.input}, training=False)
        return {name: tf.cast(output, tf.float32) for name, output in outputs.items()}


def has_gates(model: keras.Model) -> bool:
    """Whether a two-tower model has the gate of any task."""
    layers = {layer.name for layer in model.layers}
    return any(f"gate_{task}" in layers for task in task_names(model))


def _rows_and(positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Row and value of each entry of a matrix, both of its shape."""
    rows = tf.range(tf.shape(positions, out_type=positions.dtype)[0])
    return tf.broadcast_to(rows[:, None], tf.shape(positions)), positions
