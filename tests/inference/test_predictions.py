# SPDX-License-Identifier: Apache-2.0
import dataclasses

import keras
import numpy as np
import pytest

from mvke_tf.data.batches import Interactions
from mvke_tf.errors import DataError, MvkeError
from mvke_tf.inference import predictions
from mvke_tf.inference.predictions import predict
from mvke_tf.models import MODELS, build_model
from mvke_tf.schema import Task
from tests.models.problems import CONFIG, SCHEMA, entities, numpy_outputs, randomize

TASKS = (
    Task("click"),
    Task("buy", given="click"),
    Task("share", given="buy"),
    Task("seconds", "regression", offset=1.5, transform="log1p"),
    Task("stars", "regression", offset=3.5),
)
RANDOM = np.random.default_rng(0)
PAIRS = Interactions(
    entities("user", 40, 1), entities("item", 17, 2), RANDOM.integers(3, 40, 500), RANDOM.integers(0, 15, 500), {}
)


def of_pairs() -> dict[str, np.ndarray]:
    """The features of all pairs, one by one."""
    features = {name: column[PAIRS.user_rows] for name, column in PAIRS.users.items()}
    return features | {name: column[PAIRS.item_rows] for name, column in PAIRS.items.items()}


def build(name, precision="float32"):
    keras.config.set_dtype_policy(precision)
    try:
        schema = SCHEMA.with_tasks(TASKS[:1] if name == "single_task" else TASKS)
        return randomize(build_model(name, schema, dataclasses.replace(CONFIG, name=name, num_experts=7)))
    finally:
        keras.config.set_dtype_policy("float32")


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_the_model_on_the_pairs(name):
    model = build(name)
    found = predict(model, PAIRS)
    assert list(found.values) == list(model.task_names)
    outputs = {task: output[:, 0].astype(np.float64) for task, output in numpy_outputs(model, of_pairs()).items()}
    for task, output in outputs.items():
        expected = {"binary": sigmoid, "regression": np.expm1 if task == "seconds" else np.asarray}[model.kinds[task]]
        assert found.values[task].dtype == np.float64
        # Relative to the largest: an inner product may nearly cancel out.
        tolerance = 1e-6 * max(1.0, np.abs(expected(output)).max())
        np.testing.assert_allclose(found.values[task], expected(output), rtol=1e-5, atol=tolerance)
    if name == "single_task":
        assert found.conditional == {}
        return
    given = numpy_outputs(model.conditional, of_pairs())
    assert list(found.conditional) == ["buy", "share"]
    for task, logit in given.items():
        np.testing.assert_allclose(found.conditional[task], sigmoid(logit[:, 0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.values["buy"], found.values["click"] * found.conditional["buy"], atol=1e-6)


def test_each_distinct_user_and_item_is_computed_once(monkeypatch):
    computed = []
    real = predictions.vectors_of

    def count(tower, table, rows, *batch):
        computed.append((tower.name, sorted(set(rows.tolist())), len(rows)))
        return real(tower, table, rows, *batch)

    monkeypatch.setattr(predictions, "vectors_of", count)
    predict(build("mvke"), PAIRS)
    users, items = (np.unique(rows).tolist() for rows in (PAIRS.user_rows, PAIRS.item_rows))
    assert computed == [("item_tower", items, len(items)), ("user_tower", users, len(users))]


@pytest.mark.slow
@pytest.mark.parametrize("held_rows", [5, 16])
def test_bounds_of_memory_change_nothing(monkeypatch, held_rows):
    """Neither items all at once nor users all at once; few pairs at a time."""
    model = build("mvke")
    whole = predict(model, PAIRS)
    width = sum(symbol.shape[-1] for symbol in model.user_tower.output.values())
    monkeypatch.setattr(predictions, "HELD_BYTES", held_rows * 4 * width)
    monkeypatch.setattr(predictions, "PAIRS", 7)
    parts = predict(model, PAIRS)
    for task, values in whole.values.items():
        np.testing.assert_allclose(parts.values[task], values, atol=1e-6)
    for task, values in whole.conditional.items():
        np.testing.assert_allclose(parts.conditional[task], values, atol=1e-6)


def test_half_precision_is_that_of_the_model():
    model = build("mmoe", "mixed_bfloat16")
    outputs = numpy_outputs(model, of_pairs())
    np.testing.assert_allclose(predict(model, PAIRS).values["click"], sigmoid(outputs["click"][:, 0]), atol=0.01)


def test_no_pairs():
    none = dataclasses.replace(PAIRS, user_rows=PAIRS.user_rows[:0], item_rows=PAIRS.item_rows[:0])
    assert {task: values.shape for task, values in predict(build("mmoe"), none).values.items()} == dict.fromkeys(
        (task.name for task in TASKS), (0,)
    )


def test_errors():
    model = build("mvke")
    with pytest.raises(DataError, match=r"Missing: \['age'\]"):
        predict(model, dataclasses.replace(PAIRS, users={n: c for n, c in PAIRS.users.items() if n != "age"}))
    model.set_weights([np.full_like(weight, np.inf) for weight in model.get_weights()])
    with pytest.raises(MvkeError, match="the weights are damaged, train anew with a lower learning rate"):
        predict(model, PAIRS)
