# SPDX-License-Identifier: Apache-2.0
import logging

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.errors import DataError, MvkeError
from mvke_tf.inference.vectors import filled, run_model, slices, vectors_of
from mvke_tf.models import TwoTowerModel, build_model
from tests.layer_checks import assert_close
from tests.models.problems import CONFIG, SCHEMA, entities, numpy_outputs, randomize

USERS = entities("user", 10)


@pytest.fixture(scope="module")
def model() -> TwoTowerModel:
    return randomize(build_model("mvke", SCHEMA, CONFIG))


def test_slices_cover_everything_once():
    assert [list(range(7))[rows] for rows in slices(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [(rows.start, rows.stop) for rows in slices(4, 4)] == [(0, 4)] and list(slices(0, 4)) == []


def test_filled():
    assert filled(np.array([[1, 2]]), 3).tolist() == [[1, 2], [0, 0], [0, 0]]
    assert filled(np.array([1.5]), 1).tolist() == [1.5]


def test_vectors_of_all_rows_in_steps_that_are_filled_up(model):
    vectors = vectors_of(model.user_tower, USERS | {"of no interest": np.zeros(10)}, batch=4)
    for task, expected in numpy_outputs(model.user_tower, USERS).items():
        assert vectors[task].dtype == np.float32
        assert_close(vectors[task], expected)


def test_vectors_of_some_rows(model):
    rows = np.array([7, 0, 7])
    everything, some = vectors_of(model.user_tower, USERS, batch=4), vectors_of(model.user_tower, USERS, rows, batch=4)
    for task in everything:
        # A row is rounded by its place in a batch.
        assert_close(some[task], everything[task][rows])
    assert vectors_of(model.user_tower, USERS, rows[:0], batch=4)["ctr"].shape == (0, 24)


def test_no_result_depends_on_how_many_rows_are_computed(model):
    whole = vectors_of(model.user_tower, USERS, batch=4)
    for count in (1, 3, 5):
        part = vectors_of(model.user_tower, {name: column[:count] for name, column in USERS.items()}, batch=4)
        for task, vectors in part.items():
            np.testing.assert_array_equal(vectors, whole[task][:count])


def test_any_part_of_a_model(model):
    attention = run_model(model.field_attention, USERS, batch=4)
    assert attention.shape == (10, 3, 5)
    assert_close(attention, model.field_attention(USERS))
    gates = run_model(model.gates, entities("item", 5), batch=4)
    assert {task: gate.shape for task, gate in gates.items()} == {"ctr": (5, 3), "cvr": (5, 4)}


def test_half_precision_becomes_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = randomize(build_model("mvke", SCHEMA, CONFIG))
    finally:
        keras.config.set_dtype_policy("float32")
    vectors = vectors_of(mixed.user_tower, USERS, batch=4)
    for task, expected in mixed.user_tower(USERS).items():
        assert vectors[task].dtype == np.float32
        assert_close(vectors[task], ops.cast(expected, "float32"), 2e-2)


def test_missing_columns_are_named(model):
    table = {name: column for name, column in USERS.items() if name != "history_weights"}
    with pytest.raises(DataError, match=r"user_tower reads .* Missing: \['history_weights'\]"):
        vectors_of(model.user_tower, table)


def test_damaged_weights_are_an_error(model):
    damaged = keras.models.clone_model(model)
    damaged.set_weights([np.full_like(weight, np.nan) for weight in damaged.get_weights()])
    with pytest.raises(MvkeError, match=r"finite outputs of task 'ctr' from the item_tower.* the weights are damaged"):
        vectors_of(damaged.item_tower, entities("item", 2))
    with pytest.raises(MvkeError, match="finite outputs from the field_attention"):
        run_model(damaged.field_attention, USERS)


def test_many_parts_in_a_row_warn_of_nothing(model, caplog):
    """TensorFlow would take them for one function that is traced again and again."""
    logger = logging.getLogger("tensorflow")
    logger.addHandler(caplog.handler)
    try:
        for _ in range(7):
            run_model(model.part(model.gates.output), entities("item", 2), batch=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert "retracing" not in caplog.text
