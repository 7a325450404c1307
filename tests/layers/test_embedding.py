# SPDX-License-Identifier: Apache-2.0
import io
import zipfile

import h5py
import keras
import keras_rs
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import FieldEmbedding, ReplaceByUnknown, StackFields
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


@pytest.mark.slow
def test_large_tables_are_saved_in_parts_and_earlier_ones_are_read(tmp_path, monkeypatch):
    def model():
        ids = keras.Input((), dtype="int32")
        return keras.Model(ids, FieldEmbedding(40, D, name="field")(ids))

    def parts(path):
        with zipfile.ZipFile(path) as file, h5py.File(io.BytesIO(file.read("model.weights.h5"))) as weights:
            return [
                weights[f"layers/field_embedding/vars/{part}"].shape for part in weights["layers/field_embedding/vars"]
            ]

    whole, saved = model(), tmp_path / "model.keras"
    expected = whole.get_weights()[0]
    whole.save(saved)
    assert parts(saved) == [(40, D)]
    monkeypatch.setattr("mvke_tf.layers.embedding.BYTES_OF_A_PART", 15 * 4 * D)
    loaded = keras.saving.load_model(saved)
    np.testing.assert_array_equal(loaded.get_weights()[0], expected)
    loaded.save(saved)
    assert parts(saved) == [(15, D), (15, D), (10, D)]
    for again in (keras.saving.load_model(saved), model()):
        again.load_weights(saved)
        np.testing.assert_array_equal(again.get_weights()[0], expected)
    with h5py.File(tmp_path / "other.weights.h5", "w") as other, zipfile.ZipFile(saved) as file:
        with h5py.File(io.BytesIO(file.read("model.weights.h5"))) as weights:
            for name in weights:
                weights.copy(weights[name], other)
        del other["layers/field_embedding/vars/2"]
    with pytest.raises(ValueError, match=r"expected a table of 40 rows\. Received: 30|shape"):
        model().load_weights(tmp_path / "other.weights.h5")
    adapted = model()
    adapted.layers[1].enable_lora(2)
    adapted.load_weights(saved)
    adapted.save_weights(tmp_path / "adapted.weights.h5")
    again.load_weights(tmp_path / "adapted.weights.h5")
    np.testing.assert_array_equal(again.get_weights()[0], expected)
    again.layers[1].quantize("int8", type_check=False)
    again.save_weights(tmp_path / "quantized.weights.h5")
    quantized = model()
    quantized.layers[1].quantize("int8", type_check=False)
    quantized.load_weights(tmp_path / "quantized.weights.h5")
    assert [variable.dtype for variable in again.weights] == ["int8", "float32"]
    for one, other in zip(quantized.weights, again.weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("vocabulary", [5, 40])
def test_layer_of_a_multi_valued_field(vocabulary, tmp_path):
    check_layer(FieldEmbedding(vocabulary, D), many(vocabulary), {"embeddings": (vocabulary, D)}, tmp_path)


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


IDS, COUNTS = np.arange(1, 5001, dtype="int32"), np.full(5000, 7, "int32")


def test_rows_become_unknown_together():
    ids, counts = (ops.convert_to_numpy(x) for x in ReplaceByUnknown(0.3, seed=0)([IDS, COUNTS], training=True))
    assert (ids == 0).mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(counts, np.where(ids == 0, 0, 7))
    np.testing.assert_array_equal(ids[ids > 0], IDS[ids > 0])


def test_other_rows_every_time():
    layer = ReplaceByUnknown(0.3, seed=0)
    first, second = (ops.convert_to_numpy(layer([IDS], training=True)[0]) for _ in range(2))
    assert 0.3 < (first != second).mean() < 0.55


@pytest.mark.parametrize("training", [False, None])
def test_nothing_becomes_unknown_at_inference(training):
    for output, expected in zip(ReplaceByUnknown(1.0)([IDS, COUNTS], training=training), (IDS, COUNTS), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(output), expected)


def test_replacement_survives_saving(tmp_path):
    inputs = [keras.Input((), dtype="int32"), keras.Input((), dtype="int32")]
    model = keras.Model(inputs, ReplaceByUnknown(0.4, seed=3, name="unknown")(inputs))
    assert [(output.shape, output.dtype) for output in model.outputs] == [((None,), "int32")] * 2
    model.save(tmp_path / "model.keras")
    layer = keras.saving.load_model(tmp_path / "model.keras").get_layer("unknown")
    assert (layer.rate, layer.seed) == (0.4, 3)


def test_dense_inputs_become_unknown_with_the_indices_of_their_row():
    dense = np.random.default_rng(0).normal(size=(5000, 3)).astype("float32")
    for inputs in ([IDS, dense], [dense, IDS]):
        outputs = ReplaceByUnknown(0.3, seed=0)(inputs, training=True)
        ids, values = sorted((ops.convert_to_numpy(output) for output in outputs), key=lambda array: array.ndim)
        unknown = ids == 0
        assert unknown.mean() == pytest.approx(0.3, abs=0.03)
        np.testing.assert_array_equal(values[unknown], np.tile([1.0, 0.0, 0.0], (unknown.sum(), 1)))
        np.testing.assert_array_equal(values[~unknown], dense[~unknown])
    for output, expected in zip(ReplaceByUnknown(1.0)([IDS, dense]), (IDS, dense), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(output), expected)


def test_replacement_of_dense_inputs_survives_saving(tmp_path):
    inputs = [keras.Input((), dtype="int32"), keras.Input((3,))]
    model = keras.Model(inputs, ReplaceByUnknown(1.0, name="unknown")(inputs))
    assert [(output.shape, output.dtype) for output in model.outputs] == [((None,), "int32"), ((None, 3), "float32")]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ids, values = loaded([IDS[:2], np.ones((2, 3), "float32")], training=True)
    assert ops.convert_to_numpy(ids).tolist() == [0, 0]
    assert ops.convert_to_numpy(values).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_stacked_fields_by_hand_and_after_saving(tmp_path):
    fields = [np.full((2, 3), value, "float32") for value in (1, 5)]
    inputs = [keras.Input((3,)), keras.Input((3,))]
    model = keras.Model(inputs, StackFields(("age", "city"), name="fields")(inputs))
    assert model.output.shape == (None, 2, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("fields").fields == ("age", "city")
    assert ops.convert_to_numpy(loaded(fields)).tolist() == [[[1] * 3, [5] * 3]] * 2


@pytest.mark.parametrize("widths", [(3, 4), (3,)])
def test_fields_of_another_number_or_width_are_refused(widths):
    with pytest.raises(ValueError, match=r"one width D for each of the fields \('age', 'city'\). Received: \[\(2, 3\)"):
        StackFields(("age", "city"))([np.ones((2, width), "float32") for width in widths])


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_rejects_a_rate_outside_the_unit_interval(rate):
    with pytest.raises(ValueError, match=r"`rate` must lie in \[0, 1\]. Received: "):
        ReplaceByUnknown(rate)
