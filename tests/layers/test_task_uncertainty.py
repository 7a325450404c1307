# SPDX-License-Identifier: Apache-2.0
import keras
import numpy as np
from keras import ops

from mvke_tf.layers import TaskUncertainty


def test_outputs_pass_unchanged_and_log_variances_are_saved(tmp_path):
    layer = TaskUncertainty(("click", "stars"), name="uncertainty")
    inputs = {name: keras.Input((1,), name=name) for name in ("click", "stars", "other")}
    model = keras.Model(inputs, layer(inputs))
    layer.log_variances.assign([0.25, -1.0])
    arrays = {name: np.full((2, 1), value, "float32") for value, name in enumerate(inputs)}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for either in (model, loaded):
        assert either.get_layer("uncertainty").by_task() == {"click": 0.25, "stars": -1.0}
        for name, output in either(arrays).items():
            np.testing.assert_array_equal(ops.convert_to_numpy(output), arrays[name])


def test_outputs_stay_float32_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = TaskUncertainty(("click",))
    finally:
        keras.config.set_dtype_policy("float32")
    symbol = keras.Input((1,), dtype="float32")
    assert layer({"click": symbol})["click"].dtype == "float32"
    assert layer.log_variances.dtype == "float32"
