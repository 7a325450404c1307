import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import GatherRows, RowDot
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients

VECTORS = np.random.default_rng(0).normal(size=(BATCH, 4)).astype("float32")


def test_row_dot_layer(tmp_path):
    check_layer(RowDot(), [VECTORS, VECTORS[::-1].copy()], {}, tmp_path)


def test_row_dot_by_hand():
    user, item = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[4.0, 5.0], [1.0, 3.0]])
    assert_close(RowDot()(user, item), [[14.0], [0.0]])


def test_row_dot_rejects_other_widths():
    with pytest.raises(ValueError, match=r"need the same width. Received: \(6, 4\) and \(6, 3\)"):
        RowDot()(VECTORS, VECTORS[:, :3])


def test_gather_rows_layer(tmp_path):
    check_layer(GatherRows(), [VECTORS[:3], np.array([2, 0, 1, 1, 0, 2], "int32")], {}, tmp_path)


def test_gathered_rows_and_their_gradients_by_hand():
    def function(arrays):
        outputs = GatherRows()(arrays["vectors"], np.array([2, 0, 2], "int32"))
        return ops.sum(outputs[:, 0] * np.array([1.0, 10.0, 100.0], "float32")), outputs

    vectors = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "float32")
    _, outputs, gradients, _ = loss_and_gradients(function, {"vectors": vectors})
    assert_close(outputs, [[5.0, 6.0], [1.0, 2.0], [5.0, 6.0]])
    assert_close(gradients["vectors"], [[10.0, 0.0], [0.0, 0.0], [101.0, 0.0]])
