# SPDX-License-Identifier: Apache-2.0
"""Checks that every layer passes, and gradients under either backend."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

# The leading axis of this length is the batch; no other axis of a test's inputs may have it.
BATCH = 6

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Numbers are compared in full float32, on a GPU too.
    tf.config.experimental.enable_tensor_float_32_execution(False)
else:
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one computation under JAX, which would compile each of its operations apart otherwise."""
    return function if keras.backend.backend() == "tensorflow" else jax.jit(function)


def loss_and_gradients(
    function: Callable[[dict[str, Any]], tuple[Any, Any]],
    arrays: dict[str, Any],
    variables: Sequence[keras.Variable] = (),
) -> tuple[float, Any, dict[str, np.ndarray], list[np.ndarray | None]]:
    """Loss, outputs, and the gradients of the loss by `arrays` and by `variables`.

    Args:
        function: From `arrays` to the loss and to further outputs.
        arrays: Float arrays by name.
        variables: Weights that the function reads.

    Returns:
        The loss, the outputs, the gradients by name and the gradients in the order of `variables`, in NumPy. A
        weight that the loss does not depend on has the gradient None under TensorFlow, zeros under JAX.
    """
    arrays = {name: ops.convert_to_tensor(array) for name, array in arrays.items()}
    if keras.backend.backend() == "tensorflow":
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            loss, outputs = function(arrays)
        gradients = tape.gradient(loss, [arrays, [variable.value for variable in variables]])
    else:

        def stateless(arrays, values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(arrays)

        values = [variable.value for variable in variables]
        (loss, outputs), gradients = compiled(jax.value_and_grad(stateless, (0, 1), has_aux=True))(arrays, values)

    def to_numpy(tensor):
        return None if tensor is None else ops.convert_to_numpy(tensor)

    outputs, by_array, by_variable = (
        keras.tree.map_structure(to_numpy, part, none_is_leaf=True) for part in (outputs, *gradients)
    )
    return float(loss), outputs, by_array, by_variable


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5, floor: float = 0.0, name: str = "") -> None:
    """Asserts equal shapes, and differences of at most `tolerance` relative to the largest expected entry."""
    actual, expected = (np.asarray(ops.convert_to_numpy(array), "float32") for array in (actual, expected))
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    limit = max(tolerance * np.abs(expected).max(), floor)
    error = np.abs(actual - expected).max()
    assert error <= limit, f"{name}: differs by {error:.3g}, allowed {limit:.3g}"


def relative_path(variable: keras.Variable) -> str:
    """The path of a weight below its layer."""
    return variable.path.split("/", 1)[1]


def check_layer(
    layer: keras.Layer,
    inputs: Sequence[np.ndarray],
    weights: dict[str, tuple[int, ...]],
    folder: Path,
    no_gradient: Collection[str] = (),
) -> None:
    """Checks weights, shapes, config, gradients, mixed precision and saving of one layer with one output.

    Args:
        layer: The layer, not yet built.
        inputs: Its inputs; those with a leading axis of length `BATCH` are batches.
        weights: Shape of every weight that a bare `build()` must make, by its path below the layer.
        folder: Where a model may be saved.
        no_gradient: Weights whose gradient is mathematically zero.
    """

    def clone(**changes: Any) -> keras.Layer:
        return type(layer).from_config({**layer.get_config(), **changes})

    # The same weights every time: a check that holds by luck of the draw is none.
    keras.utils.set_random_seed(0)
    built = clone()
    # Keras' own `build` takes the shape of the first input only.
    shapes = [array.shape for array in inputs][: len(inspect.signature(built.build).parameters)]
    built.build(*shapes)
    assert {relative_path(weight): tuple(weight.shape) for weight in built.trainable_variables} == weights

    document = json.dumps(keras.saving.serialize_keras_object(layer))
    assert keras.saving.deserialize_keras_object(json.loads(document)).get_config() == layer.get_config()

    symbols = [
        keras.Input(batch_shape=[None if size == BATCH else size for size in array.shape], dtype=array.dtype)
        for array in inputs
    ]
    symbol = layer(*symbols)
    expected = compiled(layer)(*inputs)
    assert symbol.shape == layer.compute_output_shape(*(symbol.shape for symbol in symbols))
    assert tuple(expected.shape) == tuple(size or BATCH for size in symbol.shape)
    assert keras.backend.standardize_dtype(expected.dtype) == symbol.dtype == "float32"

    factors = np.random.default_rng(0).normal(size=expected.shape).astype("float32")

    def loss(_):
        outputs = layer(*inputs)
        return ops.sum(outputs * factors), outputs

    *_, gradients = loss_and_gradients(loss, {}, layer.trainable_variables)
    for variable, gradient in zip(layer.trainable_variables, gradients, strict=True):
        path = relative_path(variable)
        assert gradient is not None and np.isfinite(gradient).all(), f"{path}: no finite gradient"
        assert path in no_gradient or np.abs(gradient).max() > 1e-6, f"{path}: the gradient is zero"

    mixed = clone(dtype="mixed_bfloat16")
    mixed.build(*shapes)
    mixed.set_weights(layer.get_weights())
    rounded = compiled(mixed)(*inputs)
    assert keras.backend.standardize_dtype(rounded.dtype) == "bfloat16"
    assert mixed(*symbols).dtype == "bfloat16"
    assert {weight.dtype for weight in mixed.trainable_variables} <= {"float32"}
    assert_close(ops.cast(rounded, "float32"), expected, 3e-2)

    model = keras.Model(symbols, symbol)
    model.save(folder / "layer.keras")
    loaded = keras.saving.load_model(folder / "layer.keras")
    assert_close(compiled(loaded)(list(inputs)), expected, 1e-6)
