# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import ClassHead, CountHead, GatherRows, JointLogit, RegressionHead, RowDot
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


def test_regression_head_layer(tmp_path):
    check_layer(RegressionHead(offset=3.5), [VECTORS, VECTORS[::-1].copy()], {}, tmp_path)


def test_regression_head_by_hand():
    head = RegressionHead(offset=0.5)
    assert_close(head(np.array([[1.0, 2.0]]), np.array([[4.0, 5.0]])), [[14.5]])
    assert_close(head.from_product(np.array([[1.0, -1.0]])), [[1.5, -0.5]])


def test_predictions_of_the_heads():
    outputs = np.array([[0.0], [np.log(3.0)]], "float32")
    for head in (RowDot(), JointLogit("click")):
        assert head.kind == "binary"
        assert_close(head.prediction(outputs), [[0.5], [0.75]])
    assert RegressionHead().kind == "regression"
    assert_close(RegressionHead(2.0).prediction(outputs), outputs)


def test_a_transformed_regression_by_hand(tmp_path):
    """Training compares with log(1 + label); a prediction is in the unit of the label."""
    head = RegressionHead(offset=np.log(2.0), transform="log1p")
    check_layer(head, [VECTORS, VECTORS[::-1].copy()], {}, tmp_path)
    output = head(np.array([[np.log(2.0)]]), np.array([[1.0]]))
    assert_close(output, [[np.log(4.0)]])
    assert_close(head.prediction(output), [[3.0]])
    with pytest.raises(ValueError, match=r"None or one of \('log1p',\). Received: 'sqrt'"):
        RegressionHead(transform="sqrt")


def test_joint_logit_keeps_its_objective():
    assert JointLogit("click", "conditional").get_config()["objective"] == "conditional"
    with pytest.raises(ValueError, match=r"'joint' or 'conditional'. Received: 'marginal'"):
        JointLogit("click", "marginal")


def test_joint_logit_layer(tmp_path):
    check_layer(JointLogit("click"), [VECTORS[:, :1].copy(), VECTORS[:, 1:2].copy()], {}, tmp_path)


def test_joint_logit_is_the_logit_of_the_product():
    first, second = np.meshgrid(np.linspace(-6, 6, 7), np.linspace(-6, 6, 7))
    both = 1 / (1 + np.exp(-first)) / (1 + np.exp(-second))
    assert_close(JointLogit("click")(first.astype("float32"), second.astype("float32")), np.log(both / (1 - both)))


def test_joint_logit_of_extreme_logits_is_finite_and_so_are_its_gradients():
    def function(arrays):
        outputs = JointLogit("click")(arrays["first"], arrays["second"])
        return ops.sum(outputs), outputs

    extremes = np.array([-200.0, 200.0], "float32")
    arrays = {"first": np.repeat(extremes, 2), "second": np.tile(extremes, 2)}
    _, outputs, gradients, _ = loss_and_gradients(function, arrays)
    assert_close(outputs, [-400.0, -200.0, -200.0, 200.0 - np.log(2.0)])
    assert_close(gradients["first"], [1.0, 1.0, 0.0, 0.5])
    assert_close(gradients["second"], [1.0, 0.0, 1.0, 0.5])


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


def test_count_head_by_hand(tmp_path):
    check_layer(CountHead(0.5), [VECTORS, VECTORS[::-1].copy()], {}, tmp_path)
    output = CountHead(offset=np.log(2.0))(np.array([[np.log(3.0)]]), np.array([[1.0]]))
    assert_close(output, [[np.log(6.0)]])
    assert_close(CountHead().prediction(output), [[6.0]])


def test_class_head_by_hand(tmp_path):
    """logit_c = Σ_w user_w item_w a_cw + b_c."""
    head, shapes = ClassHead(("a", "b", "c")), {"class_vectors": (3, 4), "class_biases": (3,)}
    check_layer(ClassHead(("a", "b", "c")), [VECTORS, VECTORS[::-1].copy()], shapes, tmp_path)
    user, item = np.array([[1.0, 2.0]]), np.array([[3.0, -1.0]])
    head.build((1, 2), (1, 2))
    head.set_weights([np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([0.0, 2.0, -1.0])])
    assert_close(head.product(user, item), [[3.0, -2.0, 1.0]])
    assert_close(head(user, item), [[3.0, 0.0, 0.0]])
    odds = np.array([np.exp(3.0), 1.0, 1.0])
    assert_close(head.prediction(head(user, item)), [odds / odds.sum()])
