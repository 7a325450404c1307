# SPDX-License-Identifier: Apache-2.0
"""Each option of training does what it says."""

import csv
import dataclasses
import gc
import weakref

import keras
import numpy as np
import pytest
from tensorflow.python.framework import config as tensorflow_config

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError
from mvke_tf.run import Run
from mvke_tf.schema import Task
from mvke_tf.training.loop import build_optimizer, build_training_model, loss_weights, train_run
from tests.layer_checks import assert_close
from tests.models.problems import CONFIG, ITEMS, PAIRS, ROWS, SCHEMA, USERS, labels, numpy_outputs
from tests.training.helpers import MODEL, assert_same_state, eagerly, state

pytestmark = pytest.mark.slow

# Without the user whose list is empty: their zero vector has no direction, and its gradients are nothing but rounding.
CHOSEN = [0, 2, 3, 4, 5, 0]
SIX = {name: column[CHOSEN] for name, column in PAIRS.items()}
LABELS = {task: label[CHOSEN] for task, label in labels().items()}
HALVES = [slice(0, 3), slice(3, 6)]


def cut_rows(columns, rows):
    return {name: column[rows] for name, column in columns.items()}


# Nothing by chance but the first weights.
PLAIN = dataclasses.replace(CONFIG, embedding_dropout_rate=0.0)


def build(schema=SCHEMA, model=PLAIN, **settings):
    """A plain and a compiled model, always of the same first weights."""
    keras.utils.set_random_seed(0)
    return build_training_model(RunConfig(model=model, training=TrainingConfig(**settings)), schema, steps_per_epoch=4)


def weights_after(batches, **settings):
    plain, model = build(deduplicate=False, **settings)
    for rows in batches:
        model.train_on_batch(cut_rows(SIX, rows), cut_rows(LABELS, rows))
    return plain.get_weights()


def test_a_training_that_is_over_lets_go_of_its_variables():
    model = build(deduplicate=False)[1]
    model.train_on_batch(SIX, LABELS)
    kept = [weakref.ref(variable.value.handle) for variable in model.optimizer.variables]
    assert all(handle() is not None for handle in kept)
    del model
    keras.utils.clear_session(free_memory=True)
    gc.collect()
    assert [handle() for handle in kept] == [None] * len(kept)


def gradients_after(batches, **settings):
    """Gradients of one update, from Adam's first moments, a tenth of them (its update has little but their signs)."""
    model = build(deduplicate=False, **settings)[1]
    for rows in batches:
        model.train_on_batch(cut_rows(SIX, rows), cut_rows(LABELS, rows))
    moments = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables if "momentum" in v.path]
    assert len(moments) == len(model.trainable_variables)
    return [10 * moment for moment in moments]


def assert_all_close(first, second, tolerance=1e-5):
    for ours, theirs in zip(first, second, strict=True):
        assert_close(ours, theirs, tolerance, floor=1e-6)


@eagerly
def test_two_accumulated_half_batches_equal_one_whole_batch():
    whole = gradients_after([slice(0, 6)])
    assert max(np.abs(gradient).max() for gradient in whole) > 1e-2
    assert_all_close(gradients_after(HALVES, gradient_accumulation_steps=2), whole)
    assert not any(gradient.any() for gradient in gradients_after(HALVES[:1], gradient_accumulation_steps=2))
    assert_all_close(weights_after(HALVES[:1], gradient_accumulation_steps=2), weights_after([]))


@eagerly
def test_adamw_decays_the_weights():
    start, adam, adamw = (
        weights_after([slice(0, 6)] * steps, learning_rate=0.1, optimizer=optimizer, weight_decay=0.01)
        for steps, optimizer in ((0, "adam"), (1, "adam"), (1, "adamw"))
    )
    assert_all_close(adamw, [new - 0.1 * 0.01 * old for new, old in zip(adam, start, strict=True)])


@eagerly
def test_adamw_leaves_the_log_variances_alone():
    decayed = []
    for weight_decay in (0.0, 0.5):
        settings = {"optimizer": "adamw", "loss_weighting": "uncertainty", "learning_rate": 0.1, "deduplicate": False}
        plain, model = build(weight_decay=weight_decay, **settings)
        plain.log_variances.log_variances.assign([2.0, -2.0])
        model.train_on_batch(SIX, LABELS)
        decayed.append(list(plain.log_variances.by_task().values()))
    assert decayed[0] == decayed[1]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_conditional_task_alone_is_its_own_output(deduplicate):
    """Without the task of the event before, the output is the conditional itself."""
    schema = SCHEMA.with_tasks([Task("cvr", objective="conditional")])
    plain, trained = build(schema, deduplicate=deduplicate)
    inputs = {**USERS, **ITEMS, **ROWS} if deduplicate else PAIRS
    assert_close(numpy_outputs(trained, inputs)["cvr"], numpy_outputs(plain, PAIRS)["cvr"])


@pytest.mark.parametrize("steps", [1, 2])
def test_step_decay(steps):
    """Every 2 epochs of 10 batches, factor 0.8; the optimizer counts its updates."""
    settings = TrainingConfig(
        learning_rate=1.0,
        learning_rate_decay=0.8,
        learning_rate_decay_epochs=2,
        gradient_accumulation_steps=steps,
    )
    optimizer = build_optimizer(settings, steps_per_epoch=10)
    optimizer.build([])
    rates = []
    for batch in (0, 19, 20, 39, 40):
        optimizer._iterations.assign(batch)
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([1.0, 1.0, 0.8, 0.8, 0.64])


@eagerly
def test_gradients_are_clipped_by_their_global_norm():
    def gradient_norm(**settings):
        return np.sqrt(sum(np.sum(np.square(gradient)) for gradient in gradients_after([slice(0, 6)], **settings)))

    free = gradient_norm()
    assert free > 0.02
    assert gradient_norm(global_clipnorm=0.01) == pytest.approx(0.01, rel=1e-3)
    assert gradient_norm(global_clipnorm=100.0) == pytest.approx(free, rel=1e-3)


@pytest.mark.parametrize("loss_weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(precision, loss_weighting):
    settings = {"loss_weighting": loss_weighting, "learning_rate": 0.01, "deduplicate": False}
    plain, model = build(precision=precision, **settings)
    assert {variable.dtype for variable in plain.trainable_variables} == {"float32"}
    assert plain.get_layer("virtual_kernel_experts").compute_dtype == precision.removeprefix("mixed_")
    assert keras.config.dtype_policy().name == "float32"
    outputs = numpy_outputs(plain, SIX)
    assert {output.dtype for output in outputs.values()} == {np.dtype("float32")}
    same = build(**settings)[0]
    same.set_weights(plain.get_weights())
    for task, output in numpy_outputs(same, SIX).items():
        assert_close(outputs[task], output, 0.1)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (precision == "mixed_float16")
    losses = [float(model.train_on_batch(SIX, LABELS)[0]) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_xla_compiles_the_same_training_step(monkeypatch):
    # Another test may have made this process deterministic, in which Keras refuses XLA.
    monkeypatch.setattr(tensorflow_config, "is_op_determinism_enabled", lambda: False)
    xla = {"xla": True, "deterministic": False}
    assert build(**xla)[1].jit_compile is True
    assert build()[1].jit_compile is False
    assert_all_close(gradients_after([slice(0, 6)], **xla), gradients_after([slice(0, 6)]))


def test_xla_that_cannot_be_had_is_an_error(monkeypatch):
    monkeypatch.setattr(tensorflow_config, "is_op_determinism_enabled", lambda: True)
    with pytest.warns(UserWarning, match="jit_compile"), pytest.raises(ConfigError, match="Train in a new process"):
        build(xla=True, deterministic=False)


def test_steps_per_execution_trains_the_same_in_fewer_calls():
    class Calls(keras.callbacks.Callback):
        count = 0

        def on_train_batch_end(self, batch, logs=None):
            self.count += 1

    weights, calls = [], []
    for steps in (1, 3):
        plain, model = build(steps_per_execution=steps, deduplicate=False)
        counter = Calls()
        model.fit(SIX, LABELS, batch_size=1, shuffle=False, verbose=0, callbacks=[counter])
        weights.append(plain.get_weights())
        calls.append(counter.count)
    assert calls == [6, 2]
    assert_all_close(weights[1], weights[0])


def test_a_step_is_traced_once(monkeypatch):
    """Variables of the optimizer and of the losses, made on the way, once made it trace all of it again."""
    model = build(deduplicate=False)[1]
    traced, apply = [], type(model.optimizer).apply

    def counted(self, *arguments):
        traced.append(len(arguments[0]))
        return apply(self, *arguments)

    monkeypatch.setattr(type(model.optimizer), "apply", counted)
    for _ in range(2):
        model.train_on_batch(SIX, LABELS)
    assert traced == [len(model.trainable_variables)]


@eagerly
def test_task_weights():
    model = build(task_weights=(2.0, 0.5), deduplicate=False)[1]
    logs = model.evaluate(SIX, LABELS, return_dict=True, verbose=0)
    assert logs["loss"] == pytest.approx(2.0 * logs["ctr_loss"] + 0.5 * logs["cvr_loss"], rel=1e-5)


def test_task_weights_are_in_the_order_of_the_tasks_in_the_settings():
    def weights(**model):
        return loss_weights(RunConfig(ModelConfig(**model), TrainingConfig(task_weights=(2.0, 0.5))), SCHEMA)

    assert weights() == {"ctr": 2.0, "cvr": 0.5}
    assert weights(tasks=("cvr", "ctr")) == {"cvr": 2.0, "ctr": 0.5}
    assert loss_weights(RunConfig(), SCHEMA) is None


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_conditional_task_is_learned_from_the_rows_with_its_event_only(deduplicate):
    clicked = labels()["ctr"]
    weights = {"ctr": np.ones_like(clicked), "cvr": clicked}
    inputs = {**USERS, **ITEMS, **ROWS} if deduplicate else PAIRS
    losses = {}
    for objective in ("conditional", "joint"):
        schema = SCHEMA.with_tasks([Task("ctr"), Task("cvr", given="ctr", objective=objective)])
        plain, model = build(schema, deduplicate=deduplicate)
        outputs = {task: np.asarray(output, "float64") for task, output in numpy_outputs(model, inputs).items()}
        losses[objective] = [
            float(model.loss[task](labels()[task], outputs[task], sample_weight=weights[task]))
            for task in ("ctr", "cvr")
        ]
        joint = numpy_outputs(plain, PAIRS)
        click = 1 / (1 + np.exp(-outputs["ctr"]))
        if objective == "conditional":
            given = 1 / (1 + np.exp(-outputs["cvr"]))
            assert_close(1 / (1 + np.exp(-joint["cvr"])), click * given)
            label = labels()["cvr"]
            entropy = -label * np.log(given) - (1 - label) * np.log(1 - given)
            assert losses["conditional"][1] == pytest.approx(entropy[clicked == 1].mean(), rel=1e-5)
        else:
            assert_close(outputs["cvr"], joint["cvr"])
    assert losses["conditional"][0] == pytest.approx(losses["joint"][0], rel=1e-5)


def test_options_together_resume_bit_identically(new_run, monkeypatch):
    """All tasks, uncertainty weights, accumulated float16 gradients: everything with a state of its own."""
    model = dataclasses.replace(MODEL, tasks=("click", "buy", "stars"), objective="joint")
    options = {
        **{"loss_weighting": "uncertainty", "gradient_accumulation_steps": 3, "optimizer": "adamw"},
        **{"precision": "mixed_float16", "steps_per_execution": 2, "learning_rate": 0.01, "global_clipnorm": 1.0},
    }
    unbroken = train_run(new_run("unbroken", model, **options))
    broken = new_run("broken", model, **options, checkpoint_steps=3)
    real = Run.save_state

    def interrupt(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(broken)
    assert broken.history() == [] and broken.progress().step == 4
    monkeypatch.setattr(Run, "save_state", real)
    train_run(broken)
    assert_same_state(state(unbroken.run), state(broken))

    with open(unbroken.run.log_file) as file:
        rows = list(csv.DictReader(file))
    kept = unbroken.run.load_model().log_variances.by_task()
    logged = np.array([[float(row[f"log_variance_{task}"]) for task in kept] for row in rows])
    assert np.isfinite(logged).all() and (np.abs(np.diff(logged, axis=0)) > 1e-6).all()
    np.testing.assert_allclose(list(kept.values()), logged[unbroken.best_epoch - 1], rtol=1e-6)
