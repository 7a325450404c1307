# SPDX-License-Identifier: Apache-2.0
import keras
import numpy as np
import pytest

from mvke_tf.layers import FieldEmbedding
from mvke_tf.training.fused_adam import FusedAdam

SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"global_clipnorm": 0.05},
    {"gradient_accumulation_steps": 2},
    {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5, staircase=True)},
    {"amsgrad": True},
]


def trained(optimizer):
    """Weights and optimizer state after some steps."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((), dtype="int32")
    model = keras.Model(inputs, keras.layers.Dense(1, name="dense")(FieldEmbedding(7, 3, name="embedding")(inputs)))
    model.compile(optimizer, loss="mse")
    random = np.random.default_rng(0)
    for step in range(6):
        # Rows that are not looked up any more move on by their momentum.
        model.train_on_batch(random.integers(0, 7 - step, 4), random.normal(size=(4, 1)))
    return model.get_weights(), {variable.path: variable.numpy() for variable in optimizer.variables}


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_the_adam_of_keras(settings):
    kind = keras.optimizers.AdamW if "weight_decay" in settings else keras.optimizers.Adam
    settings = {"name": kind.__name__.lower(), "learning_rate": 0.1, **settings}
    weights, state = trained(FusedAdam(**settings))
    expected, expected_state = trained(kind(**settings))
    assert len(weights) == 3
    for ours, theirs in zip(weights, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    # A run that an earlier version began goes on.
    assert state.keys() == expected_state.keys()
    for name, value in state.items():
        np.testing.assert_allclose(value, expected_state[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_it_is_one_operation_per_variable():
    import tensorflow as tf

    variables = [keras.Variable(np.ones(3, "float32")) for _ in range(3)]
    optimizer = FusedAdam(0.1)
    optimizer.build(variables)
    graph = tf.function(lambda: optimizer.apply([tf.ones(3)] * 3)).get_concrete_function().graph
    names = [operation.type for operation in graph.get_operations()]
    assert names.count("ResourceApplyAdam") == 3 and "Sqrt" not in names
    # The powers of both betas are the same for all of them.
    assert names.count("Pow") == 2
