# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.data.batches import Batches, Interactions
from mvke_tf.evaluation import evaluate_multitask_model
from mvke_tf.metrics import auc, binary_metrics, regression_metrics
from mvke_tf.models import build_mmoe, build_model
from mvke_tf.schema import Task
from tests.models.problems import CONFIG, ITEMS, PAIRS, ROWS, SCHEMA, USERS, labels, randomize

DATA = Interactions(
    USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], {task: label[:, 0] for task, label in labels().items()}
)


@pytest.fixture(scope="module")
def model():
    return randomize(build_model("mvke", SCHEMA, dataclasses.replace(CONFIG, num_virtual_kernels=3)))


@pytest.mark.parametrize("user_feature", [None, "age"])
def test_equals_the_metrics(model, user_feature):
    measured = evaluate_multitask_model(model, Batches(DATA, 3).in_order(), user_feature, batch_size=2)
    users = ROWS["user_rows"] if user_feature is None else PAIRS["age"]
    for task, logits in model(PAIRS).items():
        probability = 1 / (1 + np.exp(-np.asarray(logits, np.float64)[:, 0]))
        expected = binary_metrics(DATA.labels[task], probability, users)
        assert measured[task].keys() == expected.keys()
        for name, value in expected.items():
            # GAUC is None where no user has both labels.
            assert measured[task][name] == (value if value is None else pytest.approx(value, rel=1e-5)), name


def test_rows_without_a_label_do_not_count_and_values_are_in_the_unit_of_the_label():
    tasks = (Task("ctr"), Task("cvr", given="ctr"), Task("spent", "regression", offset=0.5, transform="log1p"))
    model = randomize(build_model("mvke", SCHEMA.with_tasks(tasks), CONFIG))
    spent = np.array([1, 5, np.nan, 3, 2, 4, 0])
    data = dataclasses.replace(
        DATA, labels={**DATA.labels, "spent": np.log1p(spent)}, weights={"spent": np.array([1, 1, 1, 1, 1, 1, 0.0])}
    )
    measured = evaluate_multitask_model(model, data)
    outputs = model(PAIRS)
    known = np.array([0, 1, 3, 4, 5])
    expected = regression_metrics(spent[known], np.expm1(np.asarray(outputs["spent"], float)[known, 0]))
    assert measured["spent"] == pytest.approx(expected, rel=1e-4) and measured["spent"]["rows"] == 5
    assert measured["cvr"]["auc"] == pytest.approx(auc(DATA.labels["cvr"], np.asarray(outputs["cvr"])[:, 0]))


def test_the_plain_mmoe():
    """With the kinds of its tasks; the gate weights among its outputs are no task."""
    model = build_mmoe(input_dim=3, return_expert_weights=True)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    y = {"task_0": (x[:, :1] > 0).astype("float32"), "task_1": x[:, 1:2]}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    measured = evaluate_multitask_model(model, dataset, kinds={"task_0": "binary", "task_1": "regression"})
    outputs = {task: np.asarray(output, np.float64) for task, output in model(x).items()}
    assert set(measured) == {"task_0", "task_1"} and "gauc" not in measured["task_0"]
    assert measured["task_0"]["auc"] == pytest.approx(auc(y["task_0"][:, 0], outputs["task_0"][:, 0]))
    assert measured["task_1"]["mse"] == pytest.approx(np.mean((outputs["task_1"] - x[:, 1:2]) ** 2), rel=1e-5)
    with pytest.raises(ValueError, match=r"lacks the labels of \['task_2'\]"):
        evaluate_multitask_model(model, dataset, kinds={"task_2": "binary"})
    with pytest.raises(ValueError, match=r"Expected `kinds`.* Received: 'mmoe' without them"):
        evaluate_multitask_model(model, dataset)


def test_data_that_do_not_fit_are_an_error(model):
    with pytest.raises(ValueError, match=r"lacks the labels of \['cvr'\]"):
        evaluate_multitask_model(model, dataclasses.replace(DATA, labels={"ctr": DATA.labels["ctr"]}))
    with pytest.raises(ValueError, match=r"`user_feature`, one of \['age', .* Received: 'user'"):
        evaluate_multitask_model(model, DATA, "user")
