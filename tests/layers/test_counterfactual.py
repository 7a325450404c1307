# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import CounterfactualRisk
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients

RNG = np.random.default_rng(0)
LOGITS = {name: RNG.normal(size=(BATCH, 1)).astype("float32") for name in ("propensity", "conditional")}
VECTORS = {name: RNG.normal(size=(BATCH, 4)).astype("float32") for name in ("user", "item")}
EVENTS = np.array([[1], [0], [1], [1], [0], [0]], "float32")
# Where the event did not happen, any label will do.
LABELS = np.array([[1], [1], [0], [1], [0], [1]], "float32")
BY_TASK = {"buy": LABELS, "click": EVENTS}
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0, 1.0, 3.0], "float32")


def numpy_error(labels, logits):
    return np.log1p(np.exp(logits)) - labels * logits


@pytest.mark.parametrize("method", ["ips", "dr"])
def test_layer(method, tmp_path):
    weights = {"hidden/kernel": (8, 64), "hidden/bias": (64,), "imputed/kernel": (64, 1), "imputed/bias": (1,)}
    layer = CounterfactualRisk("buy", "click", method, 0.5, 3.0)
    check_layer(layer, [*LOGITS.values(), *VECTORS.values()], weights if method == "dr" else {}, tmp_path)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("method", ["ips", "dr"])
def test_risk_by_hand(method, weights):
    layer = CounterfactualRisk("buy", "click", method, most_inverse=2.0)
    values = ops.convert_to_numpy(layer(**LOGITS, **VECTORS)).astype("float64")
    inverse = np.minimum(1 + np.exp(-LOGITS["propensity"][:, 0].astype("float64")), 2.0)
    assert 0 < np.sum(inverse == 2.0) < BATCH
    assert_close(values[:, 0], inverse)
    assert_close(values[:, 1], LOGITS["conditional"][:, 0])
    error = numpy_error(LABELS[:, 0], LOGITS["conditional"][:, 0].astype("float64"))
    rows = EVENTS[:, 0] * error * inverse
    if method == "dr":
        kernels = [ops.convert_to_numpy(variable).astype("float64") for variable in layer.trainable_variables]
        both = np.concatenate([VECTORS["user"], VECTORS["item"]], axis=-1)
        hidden = np.maximum(both @ kernels[0] + kernels[1], 0)
        imputed = np.log1p(np.exp(hidden @ kernels[2] + kernels[3]))[:, 0]
        assert_close(values[:, 2], imputed)
        left = error - imputed
        rows = imputed + EVENTS[:, 0] * inverse * (left + left**2)
    counted = {"buy": WEIGHTS} if weights else None
    expected = np.average(rows, weights=WEIGHTS if weights else None)
    assert_close(layer.added_loss(BY_TASK, values.astype("float32"), counted), expected)


@pytest.mark.parametrize("method", ["ips", "dr"])
def test_the_estimate_is_unbiased_where_the_propensity_is_right(method):
    """The mean over all outcomes of the event, each as likely as it is, is the loss over all rows."""
    layer = CounterfactualRisk("buy", "click", method, most_inverse=1e6)
    values = layer(**LOGITS, **VECTORS)
    likely = 1 / (1 + np.exp(-LOGITS["propensity"].astype("float64")))
    expected = np.zeros(BATCH)
    for happened in (0.0, 1.0):
        for row in range(BATCH):
            event = np.full((BATCH, 1), happened, "float32")
            risk = float(layer.added_loss({"buy": LABELS[row : row + 1], "click": event[:1]}, values[row : row + 1]))
            if method == "dr":
                # All but the loss of the imputation, of which the propensity is no part.
                left = numpy_error(LABELS[row, 0], LOGITS["conditional"][row, 0]) - float(values[row, 2])
                risk -= happened / likely[row, 0] * left**2
            expected[row] += (likely[row, 0] if happened else 1 - likely[row, 0]) * risk
    assert_close(expected, numpy_error(LABELS[:, 0], LOGITS["conditional"][:, 0]), tolerance=1e-4)


def test_no_gradient_flows_through_the_propensity():
    layer = CounterfactualRisk("buy", "click", "dr")
    layer(**LOGITS, **VECTORS)

    def function(arrays):
        values = layer(**arrays)
        return layer.added_loss(BY_TASK, values), values

    _, _, by_input, by_variable = loss_and_gradients(function, {**LOGITS, **VECTORS}, layer.trainable_variables)
    propensity = by_input["propensity"]
    assert propensity is None or not np.any(propensity)
    moved = np.abs(by_input["conditional"][:, 0]) > 1e-6
    np.testing.assert_array_equal(moved, EVENTS[:, 0] == 1)
    assert all(np.abs(gradient).max() > 0 for gradient in by_variable)


def test_rows_of_no_weight_cost_nothing():
    layer = CounterfactualRisk("buy", "click")
    assert float(layer.added_loss(BY_TASK, layer(**LOGITS, **VECTORS), {"buy": np.zeros(BATCH)})) == 0.0


def test_there_are_two_methods():
    with pytest.raises(ValueError, match=r"'ips' or 'dr'\. Received: 'mips'"):
        CounterfactualRisk("buy", "click", "mips")
