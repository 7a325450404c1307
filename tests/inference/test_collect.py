# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.data.batches import Batches, Interactions
from mvke_tf.inference.collect import as_interactions, collect, known_labels
from mvke_tf.models import build_mmoe, build_model
from tests.models.problems import CONFIG, ITEMS, PAIRS, ROWS, SCHEMA, USERS, labels

DATA = Interactions(
    USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], {task: label[:, 0] for task, label in labels().items()}
)
WEIGHTS = {"cvr": np.array([1, 0, 1, 1, 0, 1, 1], "float32")}


@pytest.fixture(scope="module")
def model():
    return build_model("mvke", SCHEMA, CONFIG)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_dataset_gives_the_same_as_its_interactions(model, deduplicate):
    collected = as_interactions(model, Batches(DATA, 3, deduplicate=deduplicate, pad=4).in_order())
    assert len(collected.users["user_id"]) == 4 and len(collected.items["item_id"]) == 3
    for name, column in PAIRS.items():
        is_user = name in collected.users
        table, rows = (collected.users, collected.user_rows) if is_user else (collected.items, collected.item_rows)
        np.testing.assert_array_equal(table[name][rows], column)
    for task, label in DATA.labels.items():
        np.testing.assert_array_equal(collected.labels[task], label)


def test_interactions_stay_as_they_are(model):
    assert as_interactions(model, Batches(DATA, 3)) is DATA is as_interactions(model, DATA)


def test_labels_of_no_weight_are_unknown(model):
    columns = {task: label[:, None] for task, label in DATA.labels.items()}
    collected = as_interactions(model, tf.data.Dataset.from_tensors((PAIRS, columns, WEIGHTS)))
    weighted = Interactions(USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], DATA.labels, WEIGHTS)
    for known in (collected.labels, known_labels(weighted)):
        assert np.flatnonzero(np.isnan(known["cvr"])).tolist() == [1, 4]
        np.testing.assert_array_equal(known["ctr"], DATA.labels["ctr"])


def test_a_plain_mmoe_has_users_only():
    features = np.array([[1, 2], [3, 4], [1, 2]], "float32")
    dataset = tf.data.Dataset.from_tensors((features, np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0])))
    collected = as_interactions(build_mmoe(2), dataset)
    assert len(collected.users["features"]) == 2 and collected.items == {}
    assert collected.users["features"][collected.user_rows].tolist() == features.tolist()
    assert collected.item_rows.tolist() == [0, 0, 0]
    # Labels and weights without a name are those of the first task.
    np.testing.assert_array_equal(collected.labels["task_0"], [1, np.nan, 1])


def test_labels_of_several_numbers_are_left_out():
    features, found = collect(
        tf.data.Dataset.from_tensor_slices((np.arange(5), {"a": np.eye(5), "b": np.ones(5)})).batch(2), ("a", "b")
    )
    assert features.tolist() == [0, 1, 2, 3, 4]
    assert set(found) == {"b"} and found["b"].tolist() == [1] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: data.repeat(), "Expected a dataset that ends"),
        (lambda data: data.take(0), "an empty dataset"),
        (lambda data: data.map(lambda x, y: x), "dataset of (features, labels)"),
        (lambda data: data.map(lambda x, y: ({"age": x["age"]}, y)), "lacks features"),
        (lambda data: [1], "Received: builtins.list"),
    ],
)
def test_data_that_do_not_fit_are_an_error(model, make, message):
    with pytest.raises(ValueError) as raised:
        as_interactions(model, make(Batches(DATA, 3).in_order()))
    assert message in str(raised.value) and "Received: " in str(raised.value)
