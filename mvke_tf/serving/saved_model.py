# SPDX-License-Identifier: Apache-2.0
"""The functions of a SavedModel: one model, its encoder and its catalogue behind several signatures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mvke_tf.data.encoder import Encoder
from mvke_tf.models import TwoTowerModel
from mvke_tf.schema import TOWERS
from mvke_tf.serving.catalogue import Catalogue, StoredCatalogue
from mvke_tf.serving.signatures import Fields, Signature, TensorField, checked, tower_inputs, with_inputs

Tensors = dict[str, tf.Tensor]
# Pairs of users and items that `recommend` scores at a time; each takes 4 bytes a few times over.
_PAIRS = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Parts of a model.

    A plain object, which TensorFlow does not track: it would save the same layers again by other paths.
    """

    user: keras.Model
    item: keras.Model
    gates: keras.Model | None


class ServingModule(tf.Module):
    """Everything that the signatures of one model share, tracked by TensorFlow.

    Args:
        model: A two-tower model.
        encoder: The encoder of the data that the model was trained on.
        catalogue: Items to be known by id; without, there is neither `score_ids` nor `recommend`.

    Raises:
        ValueError: If the encoder does not make the inputs of the model, or the catalogue cannot be used.
    """

    def __init__(self, model: TwoTowerModel, encoder: Encoder, catalogue: Catalogue | None = None) -> None:
        super().__init__(name="serving")
        made = {name for feature in encoder.schema_features() for name in feature.inputs}
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
        self._tasks, self._ranked = list(model.task_names), list(model.ranked_tasks)
        self._parts = _Parts(model.user_tower, model.item_tower, model.gates)
        self._features = {side: tower_inputs(encoder, side) for side in TOWERS}

    def signatures(self) -> dict[str, Signature]:
        """All signatures by name."""
        user, item = self._features["user"], self._features["item"]
        signatures = {
            "serving_default": Signature(
                f"Probability of each task for each {'pair of a user and an item' if item else 'user'}, from their raw "
                "features; all inputs have the same number of rows. Of a regression or count task, the value.",
                {**user, **item},
                {task: self._prediction_field(task, (-1,), "one per row") for task in self._tasks},
                self.probabilities,
            ),
            "user_vectors": self._vectors_signature("user"),
        }
        if item:
            signatures["item_vectors"] = self._vectors_signature("item")
        if self._gates is not None:
            gates, side = self._gates
            signatures["gate_weights"] = Signature(
                "Weights that each task gives to its experts, from the raw features of the "
                f"{side}. A task with a single expert has no gate.",
                self._features[side],
                {
                    f"gate_{task}": TensorField("float32", (-1, output.shape[-1]), self._gate_meaning(task))
                    for task, output in gates.output.items()
                },
                self.gate_weights,
            )
        if self.catalogue is not None:
            signatures["score_ids"] = self._score_ids_signature(user, self.catalogue)
            if self._ranked:
                signatures["recommend"] = self._recommend_signature(user, self.catalogue)
        return signatures

    def describe_tasks(self) -> dict[str, dict[str, Any]]:
        """Kind and meaning of each task, for `signatures.json`."""
        kinds, given = self.model.kinds, self.model.given
        described: dict[str, dict[str, Any]] = {
            task: {"kind": kinds[task], "given": given.get(task), "prediction": self.meaning(task)}
            for task in self._tasks
        }
        for task, calibration in self.model.calibration.items():
            described[task]["calibration"] = dataclasses.asdict(calibration)
        for task, (vectors, biases) in self.model.class_weights.items():
            described[task] |= {"classes": list(self.model.classes[task])}
            described[task] |= {"class_vectors": vectors.tolist(), "class_biases": biases.tolist()}
        return described

    def describe_catalogue(self) -> dict[str, Any] | None:
        """Size of the catalogue and the id that fills lists up, for `signatures.json`."""
        if self.catalogue is None:
            return None
        return {"items": self.catalogue.size, "id_dtype": self.catalogue.dtype, "padding_id": self.catalogue.padding}

    def left_out(self) -> list[str]:
        """A line about each signature that this model cannot have."""
        lines = []
        if not self._features["item"]:
            lines.append("Without the signature item_vectors: the data have no features of items.")
        if self._parts.gates is None:
            lines.append(f"Without the signature gate_weights: {self.model.name} has no gates.")
        elif self._gates is None:
            lines.append("Without the signature gate_weights: its gates read the item, which has no features.")
        if self.catalogue is None:
            lines.append("Without the signatures score_ids and recommend: [keys] names no item, or no item is known.")
        elif not self._ranked:
            lines.append("Without the signature recommend: a multi-class task does not rank items.")
        return lines

    def meaning(self, task: str) -> str:
        """What the prediction of a task is, in words."""
        if task in self.model.classes:
            return f"probability of each class of {task}: {', '.join(self.model.classes[task])}"
        if self.model.kinds[task] == "count":
            return f"expected count of {task}"
        if self.model.kinds[task] == "regression":
            return f"value of {task}, in the unit of its label"
        first = self.model.given.get(task)
        return f"probability of {task}" + (f" (of {first} and then {task})" if first else "")

    def _prediction_field(self, task: str, shape: tuple[int, ...], layout: str) -> TensorField:
        """What a signature says of the predictions of a task for pairs of this shape."""
        if task in self.model.classes:
            return TensorField("float32", (*shape, len(self.model.classes[task])), f"{self.meaning(task)}; {layout}")
        return TensorField("float32", shape, f"{self.meaning(task)}, {layout}")

    @property
    def _gates(self) -> tuple[keras.Model, str] | None:
        """The gates and the side that they read, if it has features."""
        gates, side = self._parts.gates, self.model.gate_side
        if gates is None or side is None or not self._features[side]:
            return None
        return gates, side

    @property
    def _items(self) -> StoredCatalogue:
        if self.catalogue is None:
            raise ValueError("Expected a module with a catalogue of items. Received: one without")
        return self.catalogue

    def _vectors_signature(self, side: str) -> Signature:
        part = getattr(self._parts, side)
        outputs = {
            f"{side}_vector_{task}": TensorField(
                "float32", (-1, vector.shape[-1]), f"{side} vector, {self._product(task)}"
            )
            for task, vector in part.output.items()
        }
        return Signature(
            f"Factorised {side} vectors of each task, from the raw features of the {side}; what the inner product of "
            "a user vector and an item vector is, each output says.",
            self._features[side],
            outputs,
            getattr(self, f"{side}_vectors"),
        )

    def _product(self, task: str) -> str:
        """What the inner product of the vectors of a task is, in words."""
        first, transform = self.model.given.get(task), self.model.transforms[task]
        if task in self.model.classes:
            return (
                f"user vector · (item vector * class_vectors[c]) + class_biases[c] is the logit of class c of {task}; "
                "this file says class_vectors and class_biases of the task"
            )
        if self.model.kinds[task] == "count":
            return f"user vector · item vector + {self.model.offsets[task]:g} is log(expected count of {task})"
        if self.model.kinds[task] == "regression":
            what = f"log(1 + value of {task})" if transform else f"the value of {task}"
            return f"user vector · item vector + {self.model.offsets[task]:g} is {what}"
        if first:
            return f"user vector · item vector is the logit of {task} given {first}"
        return f"user vector · item vector is the logit of {task}"

    def _gate_meaning(self, task: str) -> str:
        return f"weights of the experts {self.model.experts_of(task)} in {task}, which sum to 1"

    def _score_ids_signature(self, features: Fields, catalogue: StoredCatalogue) -> Signature:
        return Signature(
            f"Probability of each task for each of n users with m items each of the catalogue ({catalogue.size} "
            "items), as a ranker asks; one user with many items is n = 1. Of a regression task, the value. The item "
            "vectors are stored: only the user tower runs. Takes the memory of the vectors of n x m items.",
            with_inputs(
                features,
                item_ids=TensorField(
                    catalogue.dtype,
                    (-1, -1),
                    "ids of m items per user, (n, m); an id that is not in the catalogue is scored as an item of which "
                    f"nothing is known, and fills up shorter lists, for example {catalogue.padding!r}",
                ),
            ),
            {task: self._prediction_field(task, (-1, -1), "(n, m)") for task in self._tasks},
            self.score_ids,
            {"per_value": {"item_ids": catalogue.width}},
        )

    def _recommend_signature(self, features: Fields, catalogue: StoredCatalogue) -> Signature:
        padding, size = repr(catalogue.padding), catalogue.size
        places = f"(n, the lesser of k and {size})"
        return Signature(
            f"The k items of the catalogue ({size} items) that a task rates highest for each of n users, best first, by"
            " exact scoring of all; equal scores are in the order of the catalogue. A row in which fewer items remain"
            f" ends with empty places: id {padding}, name '', prediction 0.",
            with_inputs(
                features,
                k=TensorField(
                    "int32", (), "number of items per user, at least 1; more than the catalogue means all", example=10
                ),
                task=TensorField(
                    *("string", (), f"name of the task to rank by, one of: {', '.join(self._ranked)}"),
                    example=self._ranked[0],
                ),
                exclude=TensorField(
                    catalogue.dtype,
                    (-1, -1),
                    "ids of items to leave out per user, (n, e); (n, 0) leaves out nothing; an id that is not in the "
                    f"catalogue has no effect and fills up shorter lists, for example {padding}",
                    optional=True,
                ),
            ),
            {
                "item_ids": TensorField(catalogue.dtype, (-1, -1), f"ids, best first, {places}"),
                "item_names": TensorField("string", (-1, -1), "names of these items"),
                "predictions": TensorField(
                    "float32", (-1, -1), "probability of the task, or value of a regression task"
                ),
            },
            self.recommend,
            {"per_row": size, "answer_per_row": {"input": "k", "most": size}},
        )

    def probabilities(self, **features: tf.Tensor) -> Tensors:
        """Predictions `{task: (B,)}` from the raw features of both towers."""
        outputs = self.model.predictions(self._apply(self.model, checked(features), TOWERS))
        return {task: output if task in self.model.classes else output[:, 0] for task, output in outputs.items()}

    def user_vectors(self, **features: tf.Tensor) -> Tensors:
        """Vectors `{user_vector_<task>: (B, W_task)}` from the raw features of users."""
        return {f"user_vector_{task}": vector for task, vector in self._users(checked(features)).items()}

    def item_vectors(self, **features: tf.Tensor) -> Tensors:
        """Vectors `{item_vector_<task>: (B, W_task)}` from the raw features of items."""
        vectors = self._apply(self._parts.item, checked(features), ["item"])
        return {f"item_vector_{task}": vector for task, vector in vectors.items()}

    def gate_weights(self, **features: tf.Tensor) -> Tensors:
        """Weights `{gate_<task>: (B, n_task)}` from the raw features that the gates read."""
        if self._gates is None:
            raise ValueError(f"Expected a model with gates that read features. Received: {self.model.name!r}")
        gates, side = self._gates
        weights = self._apply(gates, checked(features), [side])
        return {f"gate_{task}": weight for task, weight in weights.items()}

    def score_ids(self, item_ids: tf.Tensor, **features: tf.Tensor) -> Tensors:
        """Predictions `{task: (n, m)}` (multi-class `(n, m, C)`) of n users and of items with ids `(n, m)`."""
        features = checked({**features, "item_ids": item_ids})
        items = self._items.gather(self._items.positions(features.pop("item_ids")))
        users = self._users(features)
        products = {task: tf.linalg.matvec(items[task], users[task]) for task in self._ranked}
        products |= self.model.products({task: users[task][:, None] for task in self.model.classes}, items)
        return self.model.predictions(self.model.outputs_of_products(products))

    def recommend(self, k: tf.Tensor, task: tf.Tensor, exclude: tf.Tensor, **features: tf.Tensor) -> Tensors:
        """The best k items of one task for n users, and what the task predicts of them, each `(n, k)`."""
        catalogue = self._items
        features = checked({**features, "exclude": exclude})
        left_out = catalogue.positions(features.pop("exclude"))
        chosen = tf.equal(self._ranked, task)
        # A message must be text, whatever the bytes of the name are.
        received = tf.strings.unicode_transcode(task, "UTF-8", "UTF-8")
        checks = [
            tf.debugging.Assert(k >= 1, ["k must be at least 1. Received:", k]),
            tf.debugging.Assert(
                tf.reduce_any(chosen),
                [f"task must be one of: {', '.join(self._ranked)}. Received:", received],
                summarize=-1,
            ),
        ]
        with tf.control_dependencies(checks):
            index = tf.argmax(chosen, output_type=tf.int32)
        k = tf.minimum(k, catalogue.size)
        users = {name: vectors for name, vectors in self._users(features).items() if name in self._ranked}
        positions, predicted = _in_blocks(
            lambda rows: self._best({name: rows(vectors) for name, vectors in users.items()}, rows(left_out), k, index),
            tf.shape(left_out)[0],
            max(1, _PAIRS // catalogue.size),
        )
        return {
            "item_ids": tf.gather(catalogue.ids, positions),
            "item_names": tf.gather(catalogue.names, positions),
            "predictions": predicted,
        }

    def _best(self, users: Tensors, left_out: tf.Tensor, k: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Places in the catalogue and predictions, `(n, k)` each, of the task of a number."""
        catalogue = self._items
        in_catalogue = left_out < catalogue.size
        places = tf.stack([tf.boolean_mask(axis, in_catalogue) for axis in _rows_and(left_out)], axis=1)

        def of_task(name: str) -> tuple[tf.Tensor, tf.Tensor]:
            # Other tasks are computed only if this one needs them.
            scores = self.model.outputs_of_products(catalogue.products(users))[name]
            scores = tf.tensor_scatter_nd_update(scores, places, tf.fill([tf.shape(places)[0]], -np.inf))
            scores, positions = tf.math.top_k(scores, k)
            remain = scores > -np.inf
            # A float32 sigmoid may be off by one in the last bit, and then not fall where the scores do.
            predicted = tf.cast(self.model.predictions({name: tf.cast(scores, tf.float64)})[name], tf.float32)
            return tf.where(remain, positions, catalogue.size), tf.where(remain, predicted, 0.0)

        return tf.switch_case(index, [functools.partial(of_task, name) for name in self._ranked])

    def _users(self, features: Tensors) -> Tensors:
        return self._apply(self._parts.user, features, ["user"])

    def _apply(self, part: keras.Model, features: Mapping[str, tf.Tensor], sides: Sequence[str]) -> Tensors:
        """The float32 outputs of a part of the model for the raw features of some towers."""
        rows = tf.shape(next(iter(features.values())))[0]
        encoded = {
            name: column for side in sides for name, column in self._encoder.encode(features, side, rows).items()
        }
        outputs = part({name: encoded[name] for name in part.input}, training=False)
        return {name: tf.cast(output, tf.float32) for name, output in outputs.items()}


def _in_blocks(function: Any, count: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Two results of a function for all rows, computed for `size` rows at a time.

    Args:
        function: Takes a function that cuts the rows out of any tensor of `count` rows, and gives an int32 and a
            float32 tensor of as many rows.
        count: Number of rows.
        size: Most rows at a time.
    """
    blocks = tf.maximum(1, -(-count // size))
    arrays = tuple(
        tf.TensorArray(dtype, blocks, infer_shape=False, element_shape=[None, None]) for dtype in (tf.int32, tf.float32)
    )

    def step(number: tf.Tensor, *arrays: tf.TensorArray) -> tuple[Any, ...]:
        results = function(lambda tensor: tensor[number * size : (number + 1) * size])
        return number + 1, *(array.write(number, result) for array, result in zip(arrays, results, strict=True))

    _, *arrays = tf.while_loop(lambda number, *_: number < blocks, step, (0, *arrays), parallel_iterations=1)
    first, second = (array.concat() for array in arrays)
    return first, second


def _rows_and(positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Row and value of each entry of a matrix, both of its shape."""
    rows = tf.range(tf.shape(positions, out_type=positions.dtype)[0])
    return tf.broadcast_to(rows[:, None], tf.shape(positions)), positions
