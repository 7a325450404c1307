# SPDX-License-Identifier: Apache-2.0
"""A small problem that the tests of all models share."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from mvke_tf.config import ModelConfig
from mvke_tf.schema import Feature, Schema, Task
from tests.layer_checks import loss_and_gradients

SCHEMA = Schema(
    (
        Feature("user_id", "user", 12),
        Feature("age", "user", 5),
        Feature("history", "user", 9, length=4, embedding="item_id"),
        Feature("item_id", "item", 9),
        Feature("genres", "item", 6, length=3),
    ),
    (Task("ctr"), Task("cvr")),
)
# Embeddings as large as these make every part of the model count.
CONFIG = ModelConfig(
    "mvke", embedding_dim=8, hidden_dims=(6, 5), dropout_rate=0.0, virtual_kernel_stddev=0.5, embedding_stddev=0.5
)
# For `compile`: without XLA small models train sooner under TensorFlow, and JAX would run operation by operation.
JIT_COMPILE = keras.backend.backend() == "jax"
NUM_USERS, NUM_ITEMS = 4, 3


def entities(side: str, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random features of some users or items; the last one has an empty list."""
    rng = np.random.default_rng(seed)
    features = {}
    for feature in SCHEMA.of_tower(side):
        shape = (count,) if feature.length == 1 else (count, feature.length)
        features[feature.name] = rng.integers(0, feature.vocabulary_size, shape).astype("int32")
        if feature.length > 1:
            weights = rng.uniform(0.5, 2.0, shape).astype("float32")
            weights[-1] = 0.0
            features[feature.inputs[1]] = weights
    return features


USERS, ITEMS = entities("user", NUM_USERS), entities("item", NUM_ITEMS)
# Every user and item occurs, some of them more than once.
ROWS = {
    "user_rows": np.array([0, 3, 1, 1, 2, 0, 3], "int32"),
    "item_rows": np.array([2, 0, 1, 1, 0, 0, 2], "int32"),
}
PAIRS = {name: array[ROWS["user_rows"]] for name, array in USERS.items()} | {
    name: array[ROWS["item_rows"]] for name, array in ITEMS.items()
}


def labels() -> dict[str, np.ndarray]:
    """Random binary labels `(B, 1)` of the pairs."""
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, 2, (len(ROWS["user_rows"]), 1)).astype("float32") for name in SCHEMA.task_names}


def randomize(model: keras.Model) -> keras.Model:
    """Gives every weight, biases included, random values."""
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=0.5, size=variable.shape))
    return model


def numpy_outputs(model: keras.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Operation by operation: JAX keeps each compiled one for all models, and would compile every model whole.
    return keras.tree.map_structure(ops.convert_to_numpy, model(inputs))


def in_training(model: keras.Model, inputs: Any) -> tuple[Any, list[float]]:
    """Outputs of a model without dropout in training, and what its layers add to the loss, in NumPy."""
    outputs, losses = model(inputs, training=True), model.losses
    return keras.tree.map_structure(ops.convert_to_numpy, outputs), [float(loss) for loss in losses]


def task_losses_and_gradients(
    model: keras.Model, inputs: dict[str, np.ndarray], tasks: tuple[str, ...], variables: list[keras.Variable]
) -> tuple[dict[str, np.ndarray], list[np.ndarray | None]]:
    """The loss of each of the tasks, and the gradients of their sum."""

    def function(_):
        logits = model(inputs)
        losses = {
            task: ops.mean(ops.binary_crossentropy(labels()[task], logits[task], from_logits=True)) for task in tasks
        }
        return sum(losses.values()), losses

    _, losses, _, gradients = loss_and_gradients(function, {}, variables)
    return losses, gradients
