# SPDX-License-Identifier: Apache-2.0
"""The scores of the validation part, by hand."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from mvke_tf.data.batches import Interactions
from mvke_tf.layers import TaskUncertainty
from mvke_tf.losses import task_loss
from mvke_tf.schema import Task
from mvke_tf.training import validation as module
from mvke_tf.training.validation import Validation

CLICK = Task("click")
INSTALL = Task("install", given="click", objective="conditional")
STARS = Task("stars", "regression", offset=3.0)
SPEND = Task("spend", "regression", transform="log1p")


def interactions(labels, weights=None):
    rows = np.zeros(len(next(iter(labels.values()))), np.int32)
    labels = {task: np.asarray(label, np.float32) for task, label in labels.items()}
    weights = {task: np.asarray(weight, np.float32) for task, weight in (weights or {}).items()}
    return Interactions({}, {}, rows, rows, labels, weights)


@pytest.fixture
def measure(monkeypatch):
    """Measures given predictions."""

    def measured(tasks, data, values, conditional=None, loss_weights=None, log_variances=None):
        predictions = SimpleNamespace(values=values, conditional=conditional or {})
        monkeypatch.setattr(module, "predict", lambda model, data: predictions)
        return Validation(SimpleNamespace(log_variances=log_variances), data, tasks, loss_weights).measure()

    return measured


def test_scores_of_a_binary_task(measure):
    predicted = np.array([0.9, 0.6, 0.7, 0.2])
    data = interactions({"click": [1, 0, 0, 1]})
    entropy = -np.log([0.9, 0.4, 0.3, 0.2]).mean()
    # Two of the four pairs of a positive and a negative are in order.
    assert measure([CLICK], data, {"click": predicted}) == {
        "val_loss": pytest.approx(entropy),
        "val_click_loss": pytest.approx(entropy),
        "val_click_auc": 0.5,
        "val_score": 0.5,
    }


def test_weights_choose_the_rows_and_weigh_the_loss(measure):
    data = interactions({"click": [1, 0, 1, 0]}, {"click": [2.0, 1.0, 1.0, 0.0]})
    scores = measure([CLICK], data, {"click": np.array([0.5, 0.4, 0.2, 0.9])})
    assert scores["val_loss"] == pytest.approx((-2 * np.log(0.5) - np.log(0.6) - np.log(0.2)) / 4)
    assert scores["val_click_auc"] == 0.5


def test_scores_of_a_conditional_task_are_those_given_its_event(measure):
    labels = {"click": [1, 1, 1, 0], "install": [1, 0, 1, 0]}
    data = interactions(labels, {"install": [1, 1, 1, 0]})
    given = {"install": np.array([0.8, 0.5, 0.6, 0.1])}
    joint = {"click": np.array([0.9, 0.8, 0.7, 0.1]), "install": np.full(4, 0.5)}
    scores = measure([CLICK, INSTALL], data, joint, given)
    assert scores["val_install_auc"] == 1.0 and scores["val_click_auc"] == 1.0
    assert scores["val_install_loss"] == pytest.approx(-np.log([0.8, 0.5, 0.6]).mean())
    learned_jointly = Task("install", given="click")
    assert measure([CLICK, learned_jointly], data, joint, given)["val_install_auc"] == 0.5


def test_scores_of_regressions_are_in_the_unit_of_the_label(measure):
    labels = {"stars": [1.0, 5.0, 0.0], "spend": np.log1p([0.0, 3.0, 9.0])}
    data = interactions(labels, {"stars": [1, 1, 0]})
    values = {"stars": np.array([2.0, 5.0, 9.0]), "spend": np.array([1.0, 3.0, 4.0])}
    scores = measure([STARS, SPEND], data, values)
    assert scores["val_stars_rmse"] == pytest.approx(np.sqrt(0.5))
    assert scores["val_stars_mae"] == scores["val_stars_loss"] == 0.5
    assert scores["val_spend_rmse"] == pytest.approx(np.sqrt(26 / 3), rel=1e-6)
    assert scores["val_spend_mae"] == pytest.approx(2.0, rel=1e-6)
    assert scores["val_spend_loss"] == pytest.approx((np.log(2) ** 2 + np.log(2) ** 2) / 3, rel=1e-6)
    assert scores["val_score"] == pytest.approx(-(np.sqrt(0.5) + np.sqrt(26 / 3)) / 2, rel=1e-6)


def test_losses_are_those_of_the_training(measure):
    random = np.random.default_rng(0)
    logits, label, weight = random.normal(0, 3, 50), random.integers(0, 2, 50), random.uniform(0, 2, 50)
    data = interactions({"click": label}, {"click": weight})
    scores = measure([CLICK], data, {"click": 1 / (1 + np.exp(-logits))})
    expected = task_loss("binary")(label[:, None].astype("float32"), logits[:, None].astype("float32"), weight)
    assert scores["val_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_sums_the_tasks_with_their_weights(measure):
    data = interactions({"click": [1, 0], "stars": [3.0, 4.0]})
    values = {"click": np.array([0.5, 0.5]), "stars": np.array([1.0, 4.0])}
    fixed = measure([CLICK, STARS], data, values, loss_weights={"click": 2.0, "stars": 0.5})
    assert fixed["val_loss"] == pytest.approx(2 * np.log(2) + 0.5 * 2.0)
    layer = TaskUncertainty(("click", "stars"))
    layer.build()
    layer.log_variances.assign([0.5, -1.0])
    learned = measure([CLICK, STARS], data, values, log_variances=layer)
    assert learned["val_loss"] == pytest.approx(np.exp(-0.5) * np.log(2) + 0.25 + np.exp(1.0) * 2.0 / 2 - 0.5, rel=1e-6)


def test_a_task_of_one_class_is_left_out_of_the_score_and_said_once(measure, caplog):
    data = interactions({"click": [1, 0, 1], "install": [0, 0, 0]})
    values = {"click": np.array([0.9, 0.1, 0.8]), "install": np.array([0.5, 0.1, 0.2])}
    tasks = [CLICK, Task("install")]
    with caplog.at_level(logging.WARNING, "mvke_tf"):
        scores = measure(tasks, data, values)
    assert np.isnan(scores["val_install_auc"]) and scores["val_score"] == scores["val_click_auc"] == 1.0
    assert np.isfinite(scores["val_loss"])
    (record,) = caplog.records
    assert "has only the label 0 for the task 'install'" in record.message
    alone = measure([Task("install")], data, values)
    assert alone["val_score"] == -alone["val_loss"]


def test_a_task_without_rows_is_left_out(measure, caplog):
    data = interactions({"click": [1, 0], "stars": [1.0, 2.0]}, {"stars": [0, 0]})
    values = {"click": np.array([0.9, 0.1]), "stars": np.array([1.0, 2.0])}
    scores = measure([CLICK, STARS], data, values)
    assert np.isnan([scores["val_stars_rmse"], scores["val_stars_mae"], scores["val_stars_loss"]]).all()
    assert scores["val_loss"] == scores["val_click_loss"] and scores["val_score"] == 1.0
    assert "has no row that counts for the task 'stars'" in caplog.text


def test_predictions_that_are_not_finite_give_no_score(measure):
    scores = measure([CLICK], interactions({"click": [1, 0]}), {"click": np.array([0.5, np.nan])})
    assert list(scores) == ["val_loss"] and np.isnan(scores["val_loss"])


def test_a_probability_rounded_to_one_costs_much_and_not_infinitely_much(measure):
    scores = measure([CLICK], interactions({"click": [1, 0]}), {"click": np.array([0.0, 1.0])})
    assert 300 < scores["val_loss"] < 500
