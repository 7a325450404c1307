import keras
import keras_rs
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import FieldEmbedding
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients

D, LENGTH = 4, 3
# A field of LENGTH slots is a product with a bag below LENGTH * D indices, a gather from there on.
VOCABULARIES = (5, LENGTH * D - 1, LENGTH * D, 40)


def many(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, with a repeated index, an empty slot and an empty list."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, vocabulary, (BATCH, LENGTH)).astype("int32")
    weights = rng.uniform(0.5, 2.0, (BATCH, LENGTH)).astype("float32")
    indices[0] = 2
    weights[1, 1] = 0.0
    weights[2] = 0.0
    return indices, weights


@pytest.mark.parametrize("vocabulary", [5, 40])
@pytest.mark.parametrize("unknown_rate", [0.0, 0.5])
def test_layer_of_a_multi_valued_field(vocabulary, unknown_rate, tmp_path):
    layer = FieldEmbedding(vocabulary, D, unknown_rate=unknown_rate)
    check_layer(layer, many(vocabulary), {"embeddings": (vocabulary, D)}, tmp_path)


def test_layer_of_a_single_valued_field(tmp_path):
    check_layer(FieldEmbedding(5, D), [many(5)[0][:, 0]], {"embeddings": (5, D)}, tmp_path)


def embedding_and_gradient(layer: keras.Layer, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    layer.build(inputs[0].shape)
    layer.set_weights([np.random.default_rng(1).normal(size=(layer.input_dim, D))])
    factors = np.random.default_rng(2).normal(size=(BATCH, D)).astype("float32")

    def function(_):
        outputs = layer(*inputs)
        return ops.sum(outputs * factors), outputs

    _, outputs, _, gradients = loss_and_gradients(function, {}, layer.trainable_variables)
    return outputs, gradients[0]


@pytest.mark.parametrize("combiner", ["mean", "sum"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_value_and_gradient_equal_keras_rs(vocabulary, combiner):
    outputs, gradient = embedding_and_gradient(FieldEmbedding(vocabulary, D, combiner=combiner), *many(vocabulary))
    expected = embedding_and_gradient(keras_rs.layers.EmbedReduce(vocabulary, D, combiner=combiner), *many(vocabulary))
    assert_close(outputs, expected[0])
    assert_close(gradient, expected[1])


def test_a_single_value_is_a_row_of_the_table():
    indices = np.array([3, 0, 3, 1, 2, 4], "int32")
    layer = FieldEmbedding(5, D)
    outputs, _ = embedding_and_gradient(layer, indices)
    np.testing.assert_array_equal(outputs, layer.get_weights()[0][indices])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_weighted_mean_by_hand(vocabulary):
    layer = FieldEmbedding(vocabulary, D)
    layer.build((None, LENGTH))
    layer.set_weights([np.arange(vocabulary)[:, None] * np.ones(D)])
    indices = np.array([[1, 3, 2], [4, 4, 0]], "int32")
    weights = np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], "float32")
    assert_close(layer(indices, weights), [[2.5] * D, [0.0] * D])


@pytest.mark.parametrize("vocabulary", [5, 40])
def test_everything_is_unknown_while_training_at_rate_one(vocabulary):
    indices, weights = many(vocabulary)
    layer = FieldEmbedding(vocabulary, D, unknown_rate=1.0, seed=0)
    plain = FieldEmbedding(vocabulary, D)
    plain.build(indices.shape)
    layer.build(indices.shape)
    plain.trainable_variables[0].assign(layer.trainable_variables[0])
    assert_close(layer(indices, weights, training=True), plain(np.zeros_like(indices), weights))
    assert_close(layer(indices, weights, training=False), plain(indices, weights))
    assert_close(layer(indices, weights), plain(indices, weights))


def test_share_of_unknown_indices():
    layer = FieldEmbedding(5, 1, unknown_rate=0.3, seed=0, embeddings_initializer="ones")
    layer.build((None,))
    layer.trainable_variables[0].assign([[0.0]] + [[1.0]] * 4)
    known = ops.convert_to_numpy(layer(np.full(5000, 3, "int32"), training=True))
    assert known.mean() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_rejects_a_rate_outside_the_unit_interval(rate):
    with pytest.raises(ValueError, match=r"`unknown_rate` must lie in \[0, 1\]. Received: "):
        FieldEmbedding(5, D, unknown_rate=rate)
