# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import InBatchSoftmax
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients

RNG = np.random.default_rng(0)
USER, ITEM = (RNG.normal(size=(BATCH, 4)).astype("float32") for _ in range(2))
# Rows 0, 2 and 5 are of one item.
NUMBERS = np.array([3, 1, 3, 0, 2, 3])
ITEM[[2, 5]] = ITEM[0]
SHARES = np.array([0.1, 0.2, 0.05, 0.65])
SAMPLING = np.stack([np.log(SHARES)[NUMBERS], NUMBERS], axis=-1).astype("float32")
LABELS = np.array([[1], [0], [1], [1], [0], [1]], "float32")
WEIGHTS = np.array([1.0, 5.0, 0.5, 2.0, 1.0, 0.0], "float32")


def by_hand():
    losses = []
    for row in range(BATCH):
        scores = ITEM.astype("float64") @ USER[row] - np.log(SHARES)[NUMBERS]
        others = scores[NUMBERS[row] != NUMBERS]
        losses.append(np.log(np.exp(others).sum() + np.exp(scores[row])) - scores[row])
    return np.array(losses)


def test_layer(tmp_path):
    check_layer(InBatchSoftmax("click", 0.5), [USER, ITEM, SAMPLING], {}, tmp_path)


@pytest.mark.parametrize("weights", [False, True])
def test_the_mean_over_positive_rows_by_hand(weights):
    layer = InBatchSoftmax("click")
    values = layer(USER, ITEM, SAMPLING)
    assert_close(values[:, 0], by_hand())
    counted = LABELS[:, 0] * (WEIGHTS if weights else 1)
    loss = layer.added_loss({"click": LABELS}, values, {"click": WEIGHTS} if weights else None)
    assert_close(loss, np.average(by_hand(), weights=counted))
    assert float(layer.added_loss({"click": 0 * LABELS}, values)) == 0.0


def test_an_item_is_no_negative_of_itself():
    """Its vector gets gradient as the positive alone, however many rows have it."""
    layer = InBatchSoftmax("click")
    same = np.zeros_like(SAMPLING)

    def function(arrays):
        values = layer(arrays["user"], arrays["item"], same)
        return ops.sum(values), values

    loss, _, gradients, _ = loss_and_gradients(function, {"user": USER, "item": ITEM})
    assert loss == pytest.approx(0, abs=1e-5)
    assert np.abs(gradients["item"]).max() < 1e-6
