# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import Experts, SelectExperts
from mvke_tf.layers.experts import check_indices
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients, relative_path

E, F, D, HIDDEN, UNITS = 5, 3, 4, 7, 2
SLICES = np.random.default_rng(0).normal(size=(BATCH, F, E, D)).astype("float32")
FLAT = np.random.default_rng(1).normal(size=(BATCH, F * D)).astype("float32")


def weights(stacked: int) -> dict[str, tuple[int, ...]]:
    return {
        "kernel_0": (stacked, F * D, HIDDEN),
        "bias_0": (stacked, 1, HIDDEN),
        "kernel_1": (stacked, HIDDEN, UNITS),
        "bias_1": (stacked, 1, UNITS),
    }


def with_random_weights(layer: Experts, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Builds the layer and returns the weights that it was given."""
    layer.build(inputs.shape)
    rng = np.random.default_rng(2)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return {relative_path(variable): ops.convert_to_numpy(variable) for variable in layer.trainable_variables}


@pytest.mark.parametrize(("shared", "inputs"), [(False, SLICES), (True, SLICES), (False, FLAT)])
def test_layer(shared, inputs, tmp_path):
    check_layer(Experts(E, (HIDDEN,), UNITS, shared=shared, seed=0), [inputs], weights(1 if shared else E), tmp_path)


@pytest.mark.parametrize(("shared", "inputs"), [(False, SLICES), (True, SLICES), (False, FLAT)])
def test_equals_separate_networks(shared, inputs):
    layer = Experts(E, (HIDDEN,), UNITS, shared=shared)
    given = with_random_weights(layer, inputs)
    for expert in range(E):
        own = 0 if shared else expert
        x = (inputs[:, :, expert] if inputs.ndim == 4 else inputs).reshape(BATCH, F * D)
        hidden = np.maximum(x @ given["kernel_0"][own] + given["bias_0"][own], 0.0)
        assert_close(layer(inputs)[:, expert], hidden @ given["kernel_1"][own] + given["bias_1"][own])


def test_without_hidden_layers_an_expert_is_linear():
    layer = Experts(2, (), UNITS)
    given = with_random_weights(layer, FLAT)
    expected = np.stack([FLAT @ given["kernel_0"][expert] + given["bias_0"][expert] for expert in range(2)], axis=1)
    assert_close(layer(FLAT), expected)


def test_an_expert_gets_no_gradient_from_the_outputs_of_others():
    layer = Experts(E, (HIDDEN,), UNITS)
    with_random_weights(layer, SLICES)

    def function(_):
        outputs = layer(SLICES)
        return ops.sum(outputs[:, 1]), outputs

    for gradient in loss_and_gradients(function, {}, layer.trainable_variables)[-1]:
        assert np.abs(gradient[1]).max() > 0.0
        np.testing.assert_array_equal(np.delete(gradient, 1, axis=0), 0.0)


@pytest.mark.parametrize("seed", [None, 3])
def test_every_expert_starts_like_a_network_of_its_own(seed):
    layer = Experts(4, (60,), 50, seed=seed)
    layer.build((None, 40))
    for variable, width, units in zip(layer.expert_kernels, (40, 60), (60, 50), strict=True):
        kernel = ops.convert_to_numpy(variable)
        limit = np.sqrt(6.0 / (width + units))
        for expert in range(4):
            assert 0.98 * limit < np.abs(kernel[expert]).max() <= limit
            assert abs(kernel[expert].std() / (limit / np.sqrt(3.0)) - 1.0) < 0.05
            for other in range(expert):
                assert abs(np.corrcoef(kernel[expert].ravel(), kernel[other].ravel())[0, 1]) < 0.1
    assert all(np.all(ops.convert_to_numpy(bias) == 0.0) for bias in layer.expert_biases)


def test_a_seed_repeats_the_weights():
    first, second, other = (Experts(E, (HIDDEN,), UNITS, seed=seed) for seed in (1, 1, 2))
    for layer in (first, second, other):
        layer.build(FLAT.shape)
    assert_close(first(FLAT), second(FLAT), 0.0)
    assert np.abs(ops.convert_to_numpy(first(FLAT) - other(FLAT))).max() > 0.1


def test_dropout_only_while_training():
    layer, plain = Experts(1, (200,), 200, dropout_rate=0.25, seed=0), Experts(1, (200,), 200)
    layer.build((None, 3))
    plain.build((None, 3))
    # Hidden units are all 1 and the last layer is the identity, so that outputs are the hidden units after dropout.
    for part in (layer, plain):
        values = (np.zeros((3, 200)), np.ones(200), np.eye(200), 0.0)
        part.set_weights(
            [np.broadcast_to(value, w.shape) for value, w in zip(values, part.trainable_variables, strict=True)]
        )
    inputs = np.ones((50, 3), "float32")
    assert_close(layer(inputs), np.ones((50, 1, 200)), 0.0)
    assert_close(plain(inputs, training=True), np.ones((50, 1, 200)), 0.0)
    dropped = ops.convert_to_numpy(layer(inputs, training=True))
    assert np.isclose(dropped, 0.0).mean() == pytest.approx(0.25, abs=0.03)
    assert np.isclose(dropped, 1.0 / 0.75).mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("shape", [(2, F, E + 1, D), (2, F, D)])
def test_rejects_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected inputs of shape \(B, I\) or \(B, F, 5, D\). Received: "):
        Experts(E, (HIDDEN,), UNITS)(np.ones(shape))


def test_rejects_shared_weights_on_a_common_input():
    with pytest.raises(ValueError, match=r"expected \(B, F, 5, D\). Received: \(6, 12\)"):
        Experts(E, (HIDDEN,), UNITS, shared=True)(FLAT)


def test_rejects_no_expert():
    with pytest.raises(ValueError, match=r"`num_experts` must be at least 1. Received: 0"):
        Experts(0, (HIDDEN,), UNITS)


def test_select_experts_layer(tmp_path):
    check_layer(SelectExperts((3, 0)), [SLICES[:, 0]], {}, tmp_path)


def test_select_experts_by_hand():
    outputs = np.arange(12.0).reshape(2, 3, 2)
    assert_close(SelectExperts((2, 0))(outputs), [[4.0, 5.0, 0.0, 1.0], [10.0, 11.0, 6.0, 7.0]])


@pytest.mark.parametrize("indices", [(), (1, 1), (-1,)])
def test_select_experts_rejects_empty_repeated_and_negative_indices(indices):
    with pytest.raises(ValueError, match=r"at least one index, none repeated or negative. Received: "):
        SelectExperts(indices)


def test_select_experts_rejects_an_index_that_does_not_exist():
    with pytest.raises(ValueError, match=r"Expected indices below 5. Received: \(5,\)"):
        SelectExperts((5,))(SLICES[:, 0])


def test_check_indices_returns_them():
    assert check_indices(range(1, 3), 3) == (1, 2)
