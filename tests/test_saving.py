# SPDX-License-Identifier: Apache-2.0
"""What files keep of every way to build a model: `.keras` files, and the SavedModels of `keras.Model.export`.

Under TensorFlow alone: other backends load the same files, and the tests of the models have round trips under JAX.
"""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.layers import AttentionGate, ConvolutionalExpert, Experts
from mvke_tf.losses import task_losses
from mvke_tf.models import MODELS, build_mmoe, build_mmoe_recommender, build_model, with_uncertainty
from mvke_tf.schema import Task
from tests.models.problems import (
    CONFIG,
    ITEMS,
    PAIRS,
    ROWS,
    SCHEMA,
    USERS,
    labels,
    numpy_outputs,
    randomize,
)

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
ROW_COUNT = 7
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(ROW_COUNT, 8)).astype("float32")
WIDE_FEATURES = RANDOM.normal(size=(ROW_COUNT, 128)).astype("float32")


def two_tower(name, tasks=SCHEMA.tasks, **settings):
    config = dataclasses.replace(CONFIG, name=name, **{"num_experts": 5} | settings)
    return build_model(name, SCHEMA.with_tasks(tasks), config), PAIRS


def dense(**settings):
    small = {"num_experts": 3, "expert_hidden_dims": (5, 4), "tower_hidden_dims": (6,)}
    return build_mmoe(8, return_expert_weights=True, **small | settings), FEATURES


def own_parts():
    experts = [ConvolutionalExpert(4, 2), keras.layers.Dense(4, "relu"), ConvolutionalExpert(4, 3, pool_size=None)]
    return {"experts": experts, "gates": [AttentionGate(3, 2, 3), keras.layers.Dense(3)], "gate_top_k": 2}


def one_gate():
    return dense(gates=[keras.layers.Dense(3, name="one_gate")] * 2)


def recommender(num_dense_features, **settings):
    model = build_mmoe_recommender(5, 4, 3, num_dense_features, tower_hidden_dims=(6,), **settings)
    inputs = {
        "user_id": np.arange(ROW_COUNT, dtype="int32") % 5,
        "item_id": np.arange(ROW_COUNT, dtype="int32") % 4,
        "dense_features": FEATURES[:, :num_dense_features],
    }
    return model, {name: inputs[name] for name in model.input}


# Own kernels and experts have gaps and an order of their own: what a file keeps is a list and not a range.
CASES = {
    "mvke_shared_experts": lambda: two_tower("mvke", shared_experts=True),
    "mvke_own_kernels": lambda: two_tower("mvke", (Task("ctr", kernels=(0, 3)), Task("cvr", kernels=(4, 1, 2)))),
    "mmoe_own_experts": lambda: two_tower("mmoe", (Task("ctr", experts=(0, 1, 3)), Task("cvr", experts=(4, 2)))),
    "mmoe_one_expert": lambda: two_tower("mmoe", num_experts=1),
    "cgc_own_experts": lambda: two_tower("cgc", (Task("ctr", experts=(0, 1, 3)), Task("cvr", experts=(4, 3)))),
    "ple_one_level": lambda: two_tower("ple", num_levels=1),
    "ple_three_levels": lambda: two_tower("ple", num_levels=3),
    "dense_defaults": lambda: (build_mmoe(), WIDE_FEATURES),
    "dense_gate_hidden_dims": lambda: dense(gate_hidden_dims=(6, 5)),
    "dense_task_output_dims": lambda: dense(task_output_dims=(2, 3)),
    "dense_linear_towers": lambda: dense(tower_hidden_dims=[]),
    "dense_own_parts": lambda: dense(**own_parts()),
    "dense_one_gate": one_gate,
    "recommender_ids_only": lambda: recommender(0),
    "recommender_own_parts": lambda: recommender(2, **own_parts()),
    "recommender_gate_hidden_dims": lambda: recommender(2, gate_hidden_dims=(6,)),
}


def saved_and_loaded(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def float32_outputs(model, inputs):
    return {task: output.astype("float32") for task, output in numpy_outputs(model, inputs).items()}


def dropout_rates(model):
    """Rates by layer; in inference none of them shows."""
    kinds = (keras.layers.Dropout, Experts)
    return {layer.name: getattr(layer, "dropout", layer).rate for layer in model.layers if isinstance(layer, kinds)}


def assert_same(loaded, model, inputs):
    """Asserts equal settings, weights and outputs, none of which is a constant that other weights would give too."""
    settings, expected_settings = (json.dumps(either.get_config(), sort_keys=True) for either in (loaded, model))
    assert settings == expected_settings
    assert dropout_rates(loaded) == dropout_rates(model)
    assert [weight.path for weight in loaded.weights] == [weight.path for weight in model.weights]
    for weight, expected in zip(loaded.weights, model.weights, strict=True):
        assert weight.dtype == expected.dtype
        np.testing.assert_array_equal(weight.numpy(), expected.numpy(), err_msg=expected.path)
    assert {task: symbol.dtype for task, symbol in loaded.output.items()} == {
        task: symbol.dtype for task, symbol in model.output.items()
    }
    outputs = float32_outputs(loaded, inputs)
    for task, expected in float32_outputs(model, inputs).items():
        assert np.ptp(expected, axis=0).min() > 1e-3, f"{task} is a constant"
        np.testing.assert_allclose(outputs[task], expected, rtol=0, atol=1e-6, err_msg=task)


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_has_the_settings_weights_and_outputs_of_the_saved_one(case, tmp_path):
    model, inputs = CASES[case]()
    assert_same(saved_and_loaded(randomize(model), tmp_path), model, inputs)


@contextlib.contextmanager
def dtype_policy(name):
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("case", ["mvke_own_kernels", "ple_three_levels", "dense_own_parts", "recommender_ids_only"])
def test_a_half_precision_model_is_loaded_as_such_whatever_the_policy_is_then(case, tmp_path):
    with dtype_policy("mixed_bfloat16"):
        model, inputs = CASES[case]()
    single = randomize(CASES[case]()[0])
    assert_same(saved_and_loaded(randomize(model), tmp_path), model, inputs)
    # A model that forgot its policy would be this one.
    expected = float32_outputs(single, inputs)
    for task, output in float32_outputs(model, inputs).items():
        assert np.abs(output - expected[task]).max() > 1e-4


def test_one_gate_of_all_tasks_is_still_one_after_loading(tmp_path):
    model, inputs = one_gate()
    loaded = saved_and_loaded(randomize(model), tmp_path)
    before = numpy_outputs(loaded, inputs)
    loaded.get_layer("one_gate").bias.assign([0.0, 3.0, -3.0])
    after = numpy_outputs(loaded, inputs)
    np.testing.assert_array_equal(after["task_0_expert_weights"], after["task_1_expert_weights"])
    for name, output in before.items():
        assert np.abs(after[name] - output).max() > 1e-2


CHAIN = (Task("click"), Task("buy", given="click"), Task("stars", "regression", offset=3.5))
CHAIN_LABELS = {"click": labels()["ctr"], "buy": labels()["cvr"], "stars": 1.0 + 4.0 * labels()["ctr"]}


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_model_with_uncertainty_weights_goes_on_training_where_it_was_saved(deduplicate, tmp_path):
    plain = with_uncertainty(randomize(two_tower("mvke", CHAIN, embedding_dropout_rate=0.0)[0]))
    plain.log_variances.log_variances.assign([0.3, -0.2, 1.1])
    model = plain.training_model(deduplicate)
    inputs = {**USERS, **ITEMS, **ROWS} if deduplicate else PAIRS
    # Tracing would take longer than these few steps.
    model.compile(keras.optimizers.Adam(0.01), loss=task_losses(plain.kinds), run_eagerly=True)

    def losses(either):
        return [float(either.train_on_batch(inputs, CHAIN_LABELS)[0]) for _ in range(3)]

    # The moments of the optimizer are part of what is saved.
    before = losses(model)
    loaded = saved_and_loaded(model, tmp_path)
    assert_same(loaded, model, inputs)
    assert loaded.log_variances.by_task() == plain.log_variances.by_task()
    model.reset_metrics()
    loaded.run_eagerly = True
    after = losses(model)
    assert losses(loaded) == pytest.approx(after, rel=1e-6)
    assert after[-1] < after[0] < before[-1]
    assert loaded.log_variances.by_task() == pytest.approx(plain.log_variances.by_task(), abs=1e-6)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_loaded_compiled_model_has_the_fixed_weights_of_the_tasks(deduplicate, tmp_path):
    plain = randomize(two_tower("mvke")[0])
    model = plain.training_model(deduplicate)
    model.compile("adam", task_losses(plain.kinds), loss_weights={"ctr": 2.0, "cvr": 0.5}, run_eagerly=True)
    inputs = {**USERS, **ITEMS, **ROWS} if deduplicate else PAIRS
    model.train_on_batch(inputs, labels())
    loaded = saved_and_loaded(model, tmp_path)
    assert_same(loaded, model, inputs)
    loaded.run_eagerly = True
    model.reset_metrics()
    expected, logs = (either.test_on_batch(inputs, labels(), return_dict=True) for either in (model, loaded))
    assert logs == pytest.approx(expected, rel=1e-6)
    assert logs["loss"] == pytest.approx(2.0 * logs["ctr_loss"] + 0.5 * logs["cvr_loss"], rel=1e-5)


LOADER = """
import sys
import numpy as np
from pathlib import Path
from mvke_tf.models import TwoTowerModel, load_model

folder = Path(sys.argv[1])
with np.load(folder / "inputs.npz") as file:
    inputs = dict(file)
for path in sorted(folder.glob("*.keras")):
    model = load_model(path)
    assert type(model) is TwoTowerModel, path
    with np.load(path.with_suffix(".npz")) as file:
        expected = dict(file)
    assert {task: task in model.given for task in expected} == {task: task == "buy" for task in expected}, path
    assert (model.log_variances is not None) == ("uncertainty" in path.stem), path
    assert ("bfloat16" in path.stem) == ("bfloat16" in {vector.dtype for vector in model.user_tower.output.values()})
    for task, output in model(inputs).items():
        np.testing.assert_allclose(output, expected[task], rtol=0, atol=1e-5, err_msg=f"{path} {task}")
    model.training_model()
    print(path.stem)
"""


def test_every_model_is_loaded_by_a_process_that_imports_the_models_alone(tmp_path):
    """With each weighting of the losses, in each precision; and it knows itself there."""
    saved = set()
    np.savez(tmp_path / "inputs.npz", **PAIRS)
    for name, weighting, precision in itertools.product(
        MODELS, ("fixed", "uncertainty"), ("float32", "mixed_bfloat16")
    ):
        with dtype_policy(precision):
            model = randomize(two_tower(name, CHAIN[:1] if name == "single_task" else CHAIN)[0])
            if weighting == "uncertainty":
                model = with_uncertainty(model)
        stem = f"{name}_{weighting}_{precision}"
        model.save(tmp_path / f"{stem}.keras")
        np.savez(tmp_path / f"{stem}.npz", **float32_outputs(model, PAIRS))
        saved.add(stem)
    process = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert process.returncode == 0, process.stderr
    assert set(process.stdout.split()) == saved and len(saved) == 4 * len(MODELS)


@pytest.mark.parametrize("case", ["dense_defaults", "dense_own_parts", "recommender_ids_only", "recommender_own_parts"])
def test_an_exported_model_predicts_what_the_keras_model_predicts(case, tmp_path):
    model, inputs = CASES[case]()
    expected = numpy_outputs(randomize(model), inputs)
    model.export(tmp_path / "saved_model", verbose=False)
    served = tf.saved_model.load(tmp_path / "saved_model")
    for rows in (slice(None), slice(2, 3)):
        answer = served.serve(keras.tree.map_structure(lambda array, rows=rows: array[rows], inputs))
        assert set(answer) == set(expected)
        for task, output in expected.items():
            assert np.ptp(output, axis=0).min() > 1e-3
            np.testing.assert_allclose(answer[task], output[rows], rtol=1e-6, atol=1e-6, err_msg=task)
