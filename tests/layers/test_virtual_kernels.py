# SPDX-License-Identifier: Apache-2.0
import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import VirtualKernelAttention, VirtualKernels
from mvke_tf.layers.virtual_kernels import normalized_mixture
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients

K, F, D = 5, 3, 4


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_virtual_kernels_layer(tmp_path):
    check_layer(VirtualKernels(K, D), [normal(BATCH, 2)], {"kernels": (K, D)}, tmp_path)


def test_virtual_kernels_start_from_their_distribution():
    layer = VirtualKernels(50, 40, stddev=0.5, seed=1)
    table = ops.convert_to_numpy(layer(np.zeros((2, 3))))
    np.testing.assert_array_equal(table, ops.convert_to_numpy(layer.kernels))
    assert abs(table.mean()) < 0.05 and abs(table.std() - 0.5) < 0.03


@pytest.mark.parametrize("arguments", [(0, 4), (3, 0)])
def test_virtual_kernels_reject_an_empty_table(arguments):
    with pytest.raises(ValueError, match=r"`num_kernels` and `dim` must be at least 1. Received: "):
        VirtualKernels(*arguments)


def test_attention_layer(tmp_path):
    weights = {f"{name}/kernel": (D, D) for name in ("query", "key", "value")}
    weights |= {f"{name}/bias": (D,) for name in ("query", "key", "value")}
    weights |= {"gamma": (D,), "beta": (D,)}
    inputs = [normal(BATCH, F, D), normal(K, D, seed=1)]
    check_layer(VirtualKernelAttention(stddev=0.5), inputs, weights, tmp_path, no_gradient=("key/bias",))


def attention_with_random_weights() -> VirtualKernelAttention:
    layer = VirtualKernelAttention()
    layer.build((None, F, D), (K, D))
    layer.set_weights([normal(*weight.shape, seed=index) for index, weight in enumerate(layer.weights)])
    return layer


def test_attention_equals_the_formula():
    layer, fields, kernels = attention_with_random_weights(), normal(2, F, D), normal(K, D, seed=1)
    outputs, scores = layer(fields, kernels, return_attention_scores=True)
    dense = {name: [ops.convert_to_numpy(weight) for weight in part.weights] for name, part in layer.dense.items()}
    inputs = {"query": kernels, "key": fields, "value": fields}
    query, key, value = (array @ dense[name][0] + dense[name][1] for name, array in inputs.items())
    exponentials = np.exp(key @ query.T / np.sqrt(D))
    expected_scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    assert_close(scores, expected_scores)
    rows = expected_scores[..., None] * value[:, :, None] + fields[:, :, None]
    rows = (rows - rows.mean(-1, keepdims=True)) / rows.std(-1, keepdims=True)
    assert_close(outputs, rows * ops.convert_to_numpy(layer.gamma) + ops.convert_to_numpy(layer.beta))
    assert_close(layer(fields, kernels), outputs, 0.0)


def test_attention_scores_sum_to_one_over_the_fields():
    layer = attention_with_random_weights()
    _, scores = layer(normal(2, F, D), normal(K, D, seed=1), return_attention_scores=True)
    assert_close(ops.sum(scores, axis=1), np.ones((2, K)))
    symbols = layer(keras.Input((F, D)), keras.Input(batch_shape=(K, D)), return_attention_scores=True)
    assert [symbol.shape for symbol in symbols] == [(None, F, K, D), (None, F, K)]


@pytest.mark.filterwarnings("error")
def test_a_single_field_has_all_attention_without_a_warning():
    fields, kernels = np.ones((2, 1, 4), "float32"), np.ones((3, 4), "float32")
    _, scores = VirtualKernelAttention(seed=0)(fields, kernels, return_attention_scores=True)
    assert ops.convert_to_numpy(scores).tolist() == [[[1.0, 1.0, 1.0]]] * 2


def test_permuted_kernels_permute_the_output():
    layer, fields, kernels = attention_with_random_weights(), normal(2, F, D), normal(K, D, seed=1)
    order = [3, 0, 4, 1, 2]
    assert_close(layer(fields, kernels[order]), ops.convert_to_numpy(layer(fields, kernels))[:, :, order])


def test_projections_start_apart_from_each_other():
    layer = VirtualKernelAttention(stddev=0.1, seed=3)
    layer.build((None, F, 40), (K, 40))
    query, key, value = (ops.convert_to_numpy(layer.dense[name].kernel) for name in ("query", "key", "value"))
    assert all(abs(kernel.std() - 0.1) < 0.01 for kernel in (query, key, value))
    assert all(np.abs(left - right).max() > 0.1 for left, right in ((query, key), (key, value), (query, value)))


@pytest.mark.parametrize("shapes", [((2, F, D), (K, D + 1)), ((2, D), (K, D)), ((2, F, D), (2, K, D))])
def test_attention_rejects_other_shapes(shapes):
    with pytest.raises(ValueError, match=r"fields \(B, F, D\) and kernels \(K, D\) of one width D. Received: "):
        VirtualKernelAttention()(*(normal(*shape) for shape in shapes))


def test_normalized_mixture_equals_the_layer_norm():
    scores, values, fields = normal(2, F, K), normal(2, F, D, seed=1), normal(2, F, D, seed=2)
    gamma, beta = normal(D, seed=3), normal(D, seed=4)
    rows = scores[..., None] * values[:, :, None] + fields[:, :, None]
    expected = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-12) * gamma + beta
    assert_close(normalized_mixture(*map(ops.convert_to_tensor, (scores, values, fields, gamma, beta))), expected)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1])
def test_normalized_mixture_of_rows_without_variance_is_beta(constant):
    gamma, beta = normal(D), normal(D, seed=1)
    arrays = {"scores": normal(1, F, K), "values": np.full((1, F, D), constant, "float32")}
    arrays["fields"] = 3.0 * arrays["values"]

    def function(arrays):
        outputs = normalized_mixture(**arrays, gamma=ops.convert_to_tensor(gamma), beta=ops.convert_to_tensor(beta))
        return ops.sum(outputs), outputs

    _, outputs, gradients, _ = loss_and_gradients(function, arrays)
    assert_close(outputs, np.broadcast_to(beta, outputs.shape))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
