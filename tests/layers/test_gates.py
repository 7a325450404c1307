# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from keras import ops

from mvke_tf.errors import ConfigError
from mvke_tf.layers import ExpertGate, GatedTag, GateSoftmax, MixExperts, SelectExperts, VirtualKernelGate
from tests.layer_checks import BATCH, assert_close, check_layer, compiled, loss_and_gradients

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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_a_single_expert_has_all_weight_without_a_warning(dtype):
    gate = GateSoftmax(load_balancing_weight=1.0, dtype=dtype)
    weights = gate(np.array([[3.0], [-2.0]], "float32"), training=True)
    assert weights.dtype.name == ("float32" if dtype == "float32" else "float16")
    assert ops.convert_to_numpy(weights).tolist() == [[1.0], [1.0]]
    assert [float(loss) for loss in gate.losses] == [0.0]
    # A gradient of zero, and not none, of which an optimizer would warn.
    expert_gate = ExpertGate(experts=[0], seed=0)
    inputs = {"x": np.ones((2, 3), "float32")}
    expert_gate(inputs["x"])
    _, _, _, gradients = loss_and_gradients(
        lambda arrays: (ops.sum(expert_gate(arrays["x"])), None), inputs, expert_gate.trainable_variables
    )
    assert [gradient.tolist() for gradient in gradients] == [[[0.0]] * 3, [0.0]]


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


def test_gated_tag_layer(tmp_path):
    gate = np.random.default_rng(3).uniform(size=(BATCH, 2)).astype("float32")
    check_layer(GatedTag(), [TAG, gate], {}, tmp_path)


def test_gated_tag_and_selected_experts_give_the_published_logit():
    tag, gate = OUTPUTS[:, 0], np.random.default_rng(3).uniform(size=(BATCH, 2)).astype("float32")
    item, user = GatedTag()(tag, gate), SelectExperts((4, 1))(OUTPUTS)
    mixed = gate[:, :1] * OUTPUTS[:, 4] + gate[:, 1:] * OUTPUTS[:, 1]
    assert_close(ops.sum(user * item, axis=1), np.sum(mixed * tag, axis=1))


SCORES = np.array(
    [[0.0, 2.0, 1.0, -1.0], [3.0, 3.0, 3.0, 3.0], [1.0, 0.0, 1.0, 1.0], [-5.0, -6.0, -7.0, -4.0]], "float32"
)
# The two highest scores of each row, of equal ones those that come first.
KEPT = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]], bool)


@pytest.mark.parametrize("top_k", [None, 0, 2, 4])
def test_gate_softmax_layer(top_k, tmp_path):
    scores = np.random.default_rng(4).normal(size=(BATCH, 4)).astype("float32")
    check_layer(GateSoftmax(top_k, load_balancing_weight=0.5), [scores], {}, tmp_path)


@pytest.mark.parametrize(
    ("layer", "inputs", "weights"),
    [
        (
            ExpertGate((0, 2, 3), 1.0, 0, top_k=2, load_balancing_weight=0.1),
            [TAG],
            {"dense/kernel": (D, 3), "dense/bias": (3,)},
        ),
        (VirtualKernelGate((0, 2, 3), top_k=2, load_balancing_weight=0.1), [TAG, KERNELS], {}),
    ],
)
def test_sparse_gates_are_layers(layer, inputs, weights, tmp_path):
    check_layer(layer, inputs, weights, tmp_path)
    assert layer.get_config()["top_k"] == 2 and layer.get_config()["load_balancing_weight"] == 0.1
    gate = ops.convert_to_numpy(layer(*inputs))
    assert ((gate > 0).sum(axis=1) == 2).all()
    assert_close(gate.sum(axis=1), np.ones(BATCH))


def test_top_k_by_hand():
    weights = ops.convert_to_numpy(GateSoftmax(top_k=2)(SCORES))
    np.testing.assert_array_equal(weights > 0, KEPT)
    np.testing.assert_array_equal(weights[~KEPT], 0.0)
    half, high = 0.5, 1.0 / (1.0 + np.exp(-1.0))
    assert_close(weights[KEPT], [high, 1 - high, half, half, half, half, 1 - high, high])


def test_all_experts_by_default():
    expected = np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)
    for top_k in (None, 0, 4):
        assert_close(GateSoftmax(top_k)(SCORES), expected)


def test_outside_the_top_k_scores_and_experts_get_no_gradient():
    gate, mix = GateSoftmax(top_k=2), MixExperts(range(4))
    outputs = np.random.default_rng(5).normal(size=(4, 4, 3)).astype("float32")

    def function(arrays):
        mixed = mix(arrays["outputs"], gate(arrays["scores"]))
        return ops.sum(mixed * outputs[:, 0]), mixed

    gradients = loss_and_gradients(function, {"scores": SCORES, "outputs": outputs})[2]
    for gradient in (gradients["scores"], np.abs(gradients["outputs"]).sum(axis=-1)):
        np.testing.assert_array_equal(gradient[~KEPT], 0.0)
        assert np.abs(gradient[KEPT]).min() > 1e-4


def load_balancing_losses(layer, *inputs, training=True):
    """What the layer adds to the loss, in NumPy."""
    return [float(loss) for loss in compiled(lambda: (layer(*inputs, training=training), layer.losses)[1])()]


def test_load_balancing_by_hand():
    scores = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).astype("float32")
    importance = np.array([0.6, 0.35, 1.05])
    expected = 0.3 * importance.var() / importance.mean() ** 2
    assert load_balancing_losses(GateSoftmax(load_balancing_weight=0.3), scores) == pytest.approx([expected], rel=1e-5)
    # One expert alone: E - 1. All alike: 0.
    alone = np.array([[0.0, 50.0, 0.0]] * 2, "float32")
    assert load_balancing_losses(GateSoftmax(load_balancing_weight=1.0), alone) == pytest.approx([2.0], rel=1e-5)
    assert load_balancing_losses(GateSoftmax(load_balancing_weight=1.0), np.zeros((2, 3), "float32")) == pytest.approx(
        [0.0], abs=1e-12
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_reads_the_scores_that_top_k_cuts_off(top_k):
    """Or an expert that no row chooses would never be chosen again."""
    for scores in (SCORES, np.array([[3.0, 2.0, -2.0, -3.0]] * 2, "float32")):
        (loss,) = load_balancing_losses(GateSoftmax(top_k, load_balancing_weight=1.0), scores)
        assert [loss] == load_balancing_losses(GateSoftmax(load_balancing_weight=1.0), scores) and loss > 0.01


def test_load_balancing_only_while_training_and_only_with_a_coefficient():
    assert load_balancing_losses(GateSoftmax(load_balancing_weight=0.3), SCORES, training=False) == []
    assert load_balancing_losses(GateSoftmax(), SCORES) == []
    assert load_balancing_losses(ExpertGate(range(4)), SCORES) == []
    assert len(load_balancing_losses(ExpertGate(range(4), load_balancing_weight=0.1), SCORES)) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateSoftmax(-1), r"`top_k` must be 0 \(all experts\) or the number that keep weight. Received: -1"),
        (lambda: GateSoftmax(1.5), r"`top_k` must be 0 \(all experts\) or the number that keep weight. Received: 1.5"),
        (lambda: GateSoftmax(load_balancing_weight=-0.1), "`load_balancing_weight` must be 0 or more. Received: -0.1"),
        (lambda: GateSoftmax(5)(SCORES), r"that this gate weighs, 4; 0 keeps all. Received: 5"),
        (lambda: ExpertGate((1, 2), top_k=3), r"that this gate weighs, 2; 0 keeps all. Received: 3"),
        (lambda: VirtualKernelGate((1, 2), top_k=3), r"that this gate weighs, 2; 0 keeps all. Received: 3"),
    ],
)
def test_sparse_gate_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_setting_that_a_user_can_mend_is_a_config_error():
    with pytest.raises(ConfigError, match="0 keeps all"):
        ExpertGate((1, 2), top_k=3)
