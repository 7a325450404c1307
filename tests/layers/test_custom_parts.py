# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import AttentionGate, ConvolutionalExpert
from tests.layer_checks import BATCH, assert_close, check_layer, compiled, relative_path

WIDTH, L, C = 5, 4, 3
FLAT = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype("float32")
SEQUENCE = np.random.default_rng(1).normal(size=(BATCH, L, C)).astype("float32")


def with_random_weights(layer, inputs):
    """Builds the layer and returns the weights that it was given, by path."""
    layer.build(inputs.shape)
    rng = np.random.default_rng(2)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return {relative_path(variable): ops.convert_to_numpy(variable) for variable in layer.trainable_variables}


@pytest.mark.parametrize(
    ("layer", "inputs", "channels", "windows"),
    [
        (ConvolutionalExpert(2, 7), FLAT, 1, 3),
        (ConvolutionalExpert(2, 7, pool_size=None, pooling="average", activation="tanh"), SEQUENCE, C, 1),
    ],
)
def test_convolutional_expert_layer(layer, inputs, channels, windows, tmp_path):
    weights = {
        "convolution/kernel": (3, channels, 7),
        "convolution/bias": (7,),
        "projection/kernel": (windows * 7, 2),
        "projection/bias": (2,),
    }
    check_layer(layer, [inputs], weights, tmp_path)


@pytest.mark.parametrize(("pooling", "expected"), [("max", [644.5, 0.5]), ("average", [622.5, 0.5])])
def test_convolutional_expert_by_hand(pooling, expected):
    layer = ConvolutionalExpert(1, 1, pooling=pooling)
    layer.build((None, 5))
    weights = ([[[1.0]], [[2.0]], [[-1.0]]], [0.0], [[1.0], [10.0], [100.0]], [0.5])
    layer.set_weights([np.array(weight) for weight in weights])
    # Zeros beyond the ends: the filter (1, 2, -1) gives 0, 4, 4, -2, 6 and, in the second row, nothing positive.
    # Windows of two, the last one shorter, have the maxima 4, 4, 6 and the means 2, 2, 6.
    inputs = np.array([[1.0, 2.0, 1.0, 0.0, 3.0], [-1.0, -2.0, -4.0, -9.0, -20.0]], "float32")
    assert_close(layer(inputs), np.reshape(expected, (2, 1)))


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_pooling_of_the_whole_sequence(pooling):
    layer = ConvolutionalExpert(2, 4, pool_size=None, pooling=pooling)
    weights = with_random_weights(layer, SEQUENCE)
    padded = np.pad(SEQUENCE, ((0, 0), (1, 1), (0, 0)))
    windows = np.stack([padded[:, step : step + 3] for step in range(L)], axis=1)
    hidden = np.einsum("blkc,kcf->blf", windows, weights["convolution/kernel"]) + weights["convolution/bias"]
    hidden = np.maximum(hidden, 0.0)
    pooled = hidden.max(axis=1) if pooling == "max" else hidden.mean(axis=1)
    assert_close(layer(SEQUENCE), pooled @ weights["projection/kernel"] + weights["projection/bias"])


def attention_weights(width):
    """Shapes of the weights of an `AttentionGate(4, 2, 3)` on tokens of a width."""
    heads = [f"attention/{name}" for name in ("query", "key", "value")]
    return {
        **{f"{name}/kernel": (width, 2, 3) for name in heads},
        **{f"{name}/bias": (2, 3) for name in heads},
        "attention/attention_output/kernel": (2, 3, width),
        "attention/attention_output/bias": (width,),
        "projection/kernel": (width, 4),
        "projection/bias": (4,),
    }


@pytest.mark.parametrize(
    ("inputs", "weights"),
    [
        (SEQUENCE, attention_weights(C)),
        (FLAT, {**attention_weights(6), "token_kernel": (WIDTH, 6), "token_bias": (WIDTH, 6)}),
    ],
)
def test_attention_gate_layer(inputs, weights, tmp_path):
    # A constant added to all keys shifts all scores alike.
    check_layer(AttentionGate(4, 2, 3), [inputs], weights, tmp_path, no_gradient={"attention/key/bias"})


def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("inputs", [FLAT, SEQUENCE])
def test_attention_gate_by_hand(inputs):
    gate = AttentionGate(4, num_heads=2, key_dim=3)
    weights = with_random_weights(gate, inputs)
    tokens = inputs if inputs.ndim == 3 else inputs[:, :, None] * weights["token_kernel"] + weights["token_bias"]
    query, key, value = (
        np.einsum("blc,chd->bhld", tokens, weights[f"attention/{name}/kernel"])
        + weights[f"attention/{name}/bias"][:, None]
        for name in ("query", "key", "value")
    )
    attended = softmax(query @ key.swapaxes(2, 3) / np.sqrt(3.0)) @ value
    mixed = np.einsum("bhld,hdc->blc", attended, weights["attention/attention_output/kernel"])
    pooled = mixed.mean(axis=1) + weights["attention/attention_output/bias"]
    assert_close(compiled(gate)(inputs), pooled @ weights["projection/kernel"] + weights["projection/bias"])


def test_attention_gate_tells_values_apart_but_not_the_order_of_tokens():
    gate = AttentionGate(4, 2, 3)
    with_random_weights(gate, FLAT)
    assert np.abs(ops.convert_to_numpy(compiled(gate)(FLAT) - compiled(gate)(FLAT[:, ::-1]))).max() > 0.1
    gate = AttentionGate(4, 2, 3)
    with_random_weights(gate, SEQUENCE)
    assert_close(compiled(gate)(SEQUENCE), compiled(gate)(SEQUENCE[:, ::-1]))


def test_sequences_of_any_length():
    for layer in (AttentionGate(4), ConvolutionalExpert(4, pool_size=None)):
        layer.build((None, None, C))
        assert [compiled(layer)(SEQUENCE[:, :length]).shape for length in (L, 2)] == [(BATCH, 4)] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvolutionalExpert(2, filters=0), "Sizes must be at least 1. Received: .*'filters': 0"),
        (lambda: ConvolutionalExpert(2, pool_size=0), "Sizes must be at least 1. Received: .*'pool_size': 0"),
        (lambda: ConvolutionalExpert(2, pooling="sum"), r"one of \('max', 'average'\). Received: 'sum'"),
        (lambda: ConvolutionalExpert(2).build((None, None, 3)), r"known length.* Received: \(None, None, 3\)"),
        (lambda: ConvolutionalExpert(2).build((4,)), r"\(B, I\) or \(B, L, C\). Received: \(4,\)"),
        (lambda: AttentionGate(0), "Sizes must be at least 1. Received: num_experts=0"),
        (lambda: AttentionGate(3).build((2, 3, 4, 5)), r"\(B, I\) or \(B, L, C\). Received: \(2, 3, 4, 5\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
