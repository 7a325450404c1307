# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import roc_auc_score

from mvke_tf.metrics import (
    auc,
    binary_metrics,
    calibration_error,
    count_metrics,
    gauc,
    log_loss,
    multiclass_metrics,
    poisson_deviance,
    regression_metrics,
    roc_curve,
    value_bins,
)

LABELS = np.array([0, 0, 1, 1])
SCORES = np.array([0.1, 0.4, 0.35, 0.8])


def test_auc_is_the_share_of_ordered_pairs():
    assert auc(LABELS, SCORES) == pytest.approx(3 / 4)
    assert auc(LABELS, np.zeros(4)) == pytest.approx(1 / 2)
    assert auc(LABELS, -SCORES) == pytest.approx(1 / 4)


@pytest.mark.parametrize("labels", [np.zeros(3), np.ones(3), np.zeros(0)])
def test_auc_of_one_class_is_undefined(labels):
    assert math.isnan(auc(labels, np.arange(len(labels))))


def test_gauc_weights_groups_by_their_rows():
    # Group a: 4 rows, AUC 3/4. Group b: 2 rows, AUC 0. Group c: one class, does not count.
    labels = np.array([*LABELS, 1, 0, 1, 1, 1])
    scores = np.array([*SCORES, 0.2, 0.3, 0.9, 0.9, 0.1])
    groups = np.array(["a"] * 4 + ["b"] * 2 + ["c"] * 3)
    assert gauc(labels, scores, groups) == pytest.approx((4 * 3 / 4 + 2 * 0) / 6)


def test_gauc_equals_a_loop_over_the_groups():
    random = np.random.default_rng(1)
    groups = random.integers(0, 60, 400)
    labels = random.random(400) < 0.15
    scores = random.integers(0, 6, 400) / 5
    total = weight = ties = single = 0
    for group in np.unique(groups):
        chosen = groups == group
        ties += len(np.unique(scores[chosen])) < chosen.sum()
        if len(np.unique(labels[chosen])) < 2:
            single += 1
            continue
        total += chosen.sum() * roc_auc_score(labels[chosen], scores[chosen])
        weight += chosen.sum()
    assert ties > 10 and single > 10
    assert gauc(labels, scores, groups) == pytest.approx(total / weight, abs=1e-12)


def test_gauc_without_a_mixed_group_is_undefined():
    assert math.isnan(gauc(np.array([0, 1]), np.array([0.1, 0.9]), np.array([1, 2])))
    assert math.isnan(gauc(np.zeros(0), np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    labels = random.random(3000) < 0.2
    # Rounded: many ties, and certainties.
    scores = np.round(random.beta(1, 3, 3000), 2).astype(np.float32)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-13)
    expected = sklearn_metrics.log_loss(labels, scores.astype(np.float64))
    assert log_loss(labels, scores) == pytest.approx(expected, rel=1e-12)
    x, y = roc_curve(labels, scores)
    every = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert set(zip(x, y, strict=True)) < set(zip(*every[:2], strict=True))
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(labels, scores), abs=1e-13)
    counts, rates = random.poisson(0.7, 3000), random.gamma(1.0, 1.0, 3000) + 1e-3
    expected = sklearn_metrics.mean_poisson_deviance(counts, rates)
    assert poisson_deviance(counts, rates) == pytest.approx(expected, rel=1e-12)
    measured = regression_metrics(counts, rates)
    assert measured["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(counts, rates), rel=1e-12)
    assert measured["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(counts, rates), rel=1e-12)


def test_log_loss_in_nats():
    expected = -(math.log(0.9) + math.log(0.6) + math.log(0.35) + math.log(0.8)) / 4
    assert log_loss(LABELS, SCORES) == pytest.approx(expected)
    assert log_loss(np.array([1, 1]), np.array([0.5, 0.25])) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_log_loss_of_a_certain_mistake_is_finite():
    assert 30 < log_loss(np.array([1]), np.array([0.0])) < 40


def test_bins_by_hand():
    labels = np.array([0, 1, 0, 1, 1, 1])
    probabilities = np.array([0.6, 0.8, 0.1, 0.3, 0.9, 0.5])
    predicted, observed, rows = value_bins(labels, probabilities, bins=3)
    np.testing.assert_allclose(predicted, [0.2, 0.55, 0.85])
    np.testing.assert_allclose(observed, [0.5, 0.5, 1.0])
    np.testing.assert_array_equal(rows, [2, 2, 2])
    assert calibration_error(labels, probabilities, bins=3) == pytest.approx((0.3 + 0.05 + 0.15) / 3)


def test_calibration_of_perfect_and_shifted_predictions():
    # 1,000 rows per level, of which exactly that share is positive.
    levels = np.arange(10) / 20
    probabilities = np.repeat(levels, 1000)
    labels = np.concatenate([np.arange(1000) < round(1000 * level) for level in levels]).astype(int)
    assert calibration_error(labels, probabilities) == pytest.approx(0, abs=1e-12)
    assert calibration_error(labels, probabilities + 0.3) == pytest.approx(0.3)


def test_calibration_does_not_depend_on_the_order_of_ties():
    labels = np.array([0, 0, 0, 1, 1, 1])
    tied = np.full(6, 0.5)
    assert calibration_error(labels, tied, bins=2) == pytest.approx(0, abs=1e-12)
    assert calibration_error(labels[::-1], tied, bins=2) == pytest.approx(0, abs=1e-12)


def test_bins_are_at_least_one():
    with pytest.raises(ValueError, match=r"at least 1\. Received: 0"):
        value_bins(LABELS, SCORES, bins=0)


def test_binary_metrics_has_json_values():
    users = np.array([7, 7, 7, 8])
    metrics = binary_metrics(LABELS, SCORES, users)
    assert metrics == {
        "auc": pytest.approx(0.75),
        "accuracy": 0.75,
        "gauc": pytest.approx(0.5),
        "log_loss": pytest.approx(log_loss(LABELS, SCORES)),
        "calibration_error": pytest.approx((0.1 + 0.4 + 0.65 + 0.2) / 4),
        "rows": 4,
        "positives": 2,
    }
    assert all(type(value) in (float, int) for value in metrics.values())


def test_binary_metrics_has_none_for_what_is_undefined():
    one_class = binary_metrics(np.ones(2), np.array([0.5, 0.5]), np.array([1, 1]))
    assert one_class["auc"] is None and one_class["gauc"] is None
    assert one_class["log_loss"] == pytest.approx(math.log(2))
    none = np.zeros(0)
    assert binary_metrics(none, none, none) == {
        **dict.fromkeys(("auc", "gauc", "accuracy", "log_loss", "calibration_error")),
        "rows": 0,
        "positives": 0,
    }


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 2], [0.1, 0.2], r"Labels must be 0 or 1. Received: \[0 2\]"),
        ([0, 1], [0.1, 1.5], r"lie in \[0, 1\]. Received: \[1.5\]"),
        ([0, 1], [0.1, math.nan], r"lie in \[0, 1\]. Received: \[nan\]"),
        ([0, 1], [0.1], "one shape"),
    ],
)
def test_binary_metrics_rejects_what_is_no_binary_prediction(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        binary_metrics(np.array(labels), np.array(probabilities), np.zeros(2))


def test_accuracy_by_hand():
    metrics = binary_metrics(np.array([1, 0, 1, 0]), np.array([0.9, 0.6, 0.4, 0.1]), np.zeros(4))
    assert metrics["accuracy"] == 0.5


def test_regression_metrics_by_hand():
    metrics = regression_metrics(np.array([1.0, 5.0]), np.array([2.0, 2.0]))
    assert metrics == {"mse": 5.0, "rmse": math.sqrt(5.0), "mae": 2.0, "rows": 2}
    assert regression_metrics(np.array([]), np.array([])) == {"mse": None, "rmse": None, "mae": None, "rows": 0}


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [([1.0], [1.0, 2.0], r"one shape \(n,\). Received: \(1,\) and \(2,\)"), ([1.0], [np.nan], "must be finite")],
)
def test_regression_metrics_rejects_what_is_no_prediction(labels, values, message):
    with pytest.raises(ValueError, match=message):
        regression_metrics(np.array(labels), np.array(values))


def test_without_users_there_is_no_gauc():
    users = np.array([7, 7, 7, 8])
    expected = binary_metrics(LABELS, SCORES, users)
    expected.pop("gauc")
    assert binary_metrics(LABELS, SCORES) == expected


def test_count_metrics_by_hand():
    """2 (y ln(y / rate) - y + rate): 2 (2 ln 2 - 1), and 2 of a 0 at rate 1."""
    measured = count_metrics(np.array([2, 0]), np.array([1.0, 1.0]))
    assert measured["poisson_deviance"] == pytest.approx((2 * (2 * np.log(2) - 1) + 2) / 2)
    assert measured["mae"] == 1.0 and measured["rows"] == 2
    assert count_metrics(np.array([]), np.array([]))["poisson_deviance"] is None
    with pytest.raises(ValueError, match="whole numbers of at least 0"):
        count_metrics(np.array([0.5]), np.array([1.0]))


def test_multiclass_metrics_by_hand():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1]])
    measured = multiclass_metrics(np.array([0, 1, 1]), probabilities)
    # Class 0 is above both others, class 1 once below the row of class 0 and never; no row has class 2.
    assert measured["macro_auc"] == pytest.approx((1.0 + 1.0) / 2)
    assert measured["accuracy"] == pytest.approx(2 / 3)
    assert measured["log_loss"] == pytest.approx(-np.log([0.6, 0.5, 0.4]).mean())
    assert multiclass_metrics(np.array([]), np.zeros((0, 3)))["macro_auc"] is None
    with pytest.raises(ValueError, match="indices below 3"):
        multiclass_metrics(np.array([3]), probabilities[:1])
    with pytest.raises(ValueError, match="sum to 1"):
        multiclass_metrics(np.array([0]), np.array([[0.5, 0.6]]))
