# SPDX-License-Identifier: Apache-2.0
"""Balancing of tasks by hand: the weights, and a whole step of training under either backend."""

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import TaskBalance
from mvke_tf.losses import task_losses
from mvke_tf.models import MultiTaskModel
from mvke_tf.training.task_balance import balanced
from tests.layer_checks import assert_close
from tests.models.problems import JIT_COMPILE


def balance(method, tasks=("a", "b")) -> TaskBalance:
    layer = TaskBalance(tasks, method)
    layer.build()
    return layer


def test_pcgrad_of_three_tasks_equals_the_projections():
    """The weights of the gradients sum up what projecting the gradients one by one gives."""
    gradients = np.array([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0], [0.2, -1.0, -0.3]])
    layer = balance("pcgrad", ("a", "b", "c"))
    generator = keras.random.SeedGenerator(0)
    expected = np.zeros(3)
    for task in range(3):
        own = gradients[task].copy()
        for other in ops.convert_to_numpy(keras.random.shuffle(ops.arange(3), seed=generator)):
            if other != task and own @ gradients[other] < 0:
                own -= own @ gradients[other] / (gradients[other] @ gradients[other]) * gradients[other]
        expected += own
    weights = ops.convert_to_numpy(layer.step_weights(np.ones(3), gradients @ gradients.T))
    assert_close(weights @ gradients, expected, 1e-5)


def test_gradnorm_slows_the_task_that_learns_faster():
    layer = balance("gradnorm")
    products = np.diag([4.0, 1.0])
    assert_close(layer.step_weights(np.array([2.0, 8.0], "float32"), products), [1.0, 1.0])
    # Norms 2 and 1, both with all of their first loss: the target is 1.5 for both.
    changed = np.array([1 - 0.025 * 2, 1 + 0.025])
    assert_close(list(layer.by_task().values()), 2 * changed / changed.sum())
    # Then the first task has half of its loss, the second one all: r = 2/3 and 4/3.
    layer.weights_of_tasks.assign([1.0, 1.0])
    layer.step_weights(np.array([1.0, 8.0], "float32"), np.diag([1.0, 1.0]))
    assert layer.by_task()["a"] < 1 < layer.by_task()["b"]


def test_methods_are_known():
    with pytest.raises(ValueError, match=r"one of \('famo', 'pcgrad', 'gradnorm'\). Received: 'sgd'"):
        TaskBalance(("a", "b"), "sgd")
    layer = balance("pcgrad")
    assert TaskBalance.from_config(layer.get_config()).get_config() == layer.get_config()
    outputs = {"a": np.ones((2, 1)), "b": np.zeros((2, 1))}
    assert set(layer(outputs)) == {"a", "b"}


@pytest.mark.parametrize("method", ["famo", "pcgrad", "gradnorm"])
def test_a_step_by_hand(method):
    """Both tasks put out w·x; a counts on the row (1, 0), b on (-1, 1). With labels -1/2 and w = 0 the gradients are
    (1, 0) and (-1, 1), and both losses 1/4."""
    inputs = keras.Input((2,), name="x")
    shared = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="shared")(inputs)
    outputs = {task: keras.layers.Identity(name=task)(shared) for task in ("a", "b")}
    model = balanced(MultiTaskModel(inputs, outputs), method)
    assert model.read_by_several() == [True]
    kinds = dict.fromkeys(("a", "b"), "regression")
    model.compile(keras.optimizers.SGD(0.1), loss=task_losses(kinds), jit_compile=JIT_COMPILE)
    x = np.array([[1.0, 0.0], [-1.0, 1.0]], "float32")
    labels = {task: np.full((2, 1), -0.5, "float32") for task in kinds}
    weights = {"a": np.array([[1.0], [0.0]], "float32"), "b": np.array([[0.0], [1.0]], "float32")}
    logs = model.train_on_batch(x, labels, weights, return_dict=True)
    assert logs["loss"] == pytest.approx(0.5) and logs["a_loss"] == pytest.approx(0.25)
    moved = -10 * model.trainable_variables[0].numpy()[:, 0]
    if method == "pcgrad":
        # (1, 0) + (-1, 1) / 2 and (-1, 1) + (1, 0).
        assert_close(moved, [0.5, 1.5])
    elif method == "gradnorm":
        assert_close(moved, [0.0, 1.0])
        changed = np.array([1 + 0.025, 1 - 0.025 * np.sqrt(2)])
        assert_close(list(model.balance.by_task().values()), 2 * changed / changed.sum())
    else:
        # Weights 1/2 each. The loss of a stays, that of b becomes 0.45².
        assert_close(moved, [0.0, 0.5])
        slope = np.array([-1.0, 1.0]) / 4 * np.log(0.25 / 0.45**2)
        assert_close(model.balance.logits, -0.025 * slope, 1e-4)
