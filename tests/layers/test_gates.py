import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import ExpertGate, MixExperts, VirtualKernelGate
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients

K, D = 5, 4
TAG = np.random.default_rng(0).normal(size=(BATCH, D)).astype("float32")
KERNELS = np.random.default_rng(1).normal(size=(K, D)).astype("float32")


def test_layer(tmp_path):
    check_layer(VirtualKernelGate((0, 2, 3)), [TAG, KERNELS], {}, tmp_path)


def test_weights_by_hand():
    tag = np.array([[1.0, 0.0], [0.0, np.log(3.0)]], "float32")
    kernels = np.array([[np.log(2.0), 1.0], [9.0, 9.0], [0.0, 0.0]], "float32")
    assert_close(VirtualKernelGate((0, 2))(tag, kernels), [[2 / 3, 1 / 3], [3 / 4, 1 / 4]])


def test_weights_sum_to_one():
    weights = VirtualKernelGate((4, 1, 2))(TAG, KERNELS)
    assert_close(ops.sum(weights, axis=-1), np.ones(BATCH))


def test_a_single_kernel_is_the_identity():
    np.testing.assert_array_equal(ops.convert_to_numpy(VirtualKernelGate((3,))(TAG, KERNELS)), np.ones((BATCH, 1)))


def test_kernels_that_are_permuted_with_their_indices_change_nothing():
    order = [3, 0, 4, 1, 2]
    permuted = VirtualKernelGate([order.index(kernel) for kernel in (0, 2, 3)])(TAG, KERNELS[order])
    assert_close(permuted, VirtualKernelGate((0, 2, 3))(TAG, KERNELS))


def test_other_kernels_get_no_gradient():
    gate = VirtualKernelGate((1, 3))

    def function(arrays):
        weights = gate(TAG, arrays["kernels"])
        return ops.sum(weights[:, 0]), weights

    gradient = loss_and_gradients(function, {"kernels": KERNELS})[2]["kernels"]
    np.testing.assert_array_equal(gradient[[0, 2, 4]], np.zeros((3, D)))
    assert np.abs(gradient[[1, 3]]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("kernels", [(), (1, 1), (-1, 0)])
def test_rejects_empty_repeated_and_negative_kernels(kernels):
    with pytest.raises(ValueError, match=r"at least one index, none repeated or negative. Received: "):
        VirtualKernelGate(kernels)


def test_rejects_a_kernel_that_does_not_exist():
    with pytest.raises(ValueError, match=r"Expected indices below 5. Received: \(0, 5\)"):
        VirtualKernelGate((0, 5))(TAG, KERNELS)


def test_rejects_another_width():
    with pytest.raises(ValueError, match=r"one width D. Received: \(6, 3\) and \(5, 4\)"):
        VirtualKernelGate((0, 1))(TAG[:, :3], KERNELS)


OUTPUTS = np.random.default_rng(2).normal(size=(BATCH, K, 3)).astype("float32")


def test_expert_gate_layer(tmp_path):
    weights = {"dense/kernel": (D, 3), "dense/bias": (3,)}
    check_layer(ExpertGate((0, 2, 3)), [TAG], weights, tmp_path)


def test_expert_gate_by_hand():
    gate = ExpertGate((0, 1))
    gate.build((None, 1))
    gate.set_weights([np.log([[2.0, 1.0]]), np.log([1.0, 4.0])])
    assert_close(gate(np.array([[0.0], [1.0]], "float32")), [[1 / 5, 4 / 5], [2 / 6, 4 / 6]])


def test_mix_experts_layer(tmp_path):
    gate = np.random.default_rng(3).uniform(size=(BATCH, 2)).astype("float32")
    check_layer(MixExperts((4, 1)), [OUTPUTS, gate], {}, tmp_path)
    expected = gate[:, :1] * OUTPUTS[:, 4] + gate[:, 1:] * OUTPUTS[:, 1]
    assert_close(MixExperts((4, 1))(OUTPUTS, gate), expected)


def test_a_single_expert_needs_no_gate():
    np.testing.assert_array_equal(ops.convert_to_numpy(MixExperts((2,))(OUTPUTS)), OUTPUTS[:, 2])


def test_mix_experts_rejects_another_number_of_weights():
    with pytest.raises(ValueError, match=r"a gate weight for each of the 2 experts. Received: 3"):
        MixExperts((0, 1))(OUTPUTS, np.ones((BATCH, 3), "float32"))
    with pytest.raises(ValueError, match=r"a gate weight for each of the 2 experts. Received: 1"):
        MixExperts((0, 1))(OUTPUTS)
