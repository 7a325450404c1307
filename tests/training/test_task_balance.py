# SPDX-License-Identifier: Apache-2.0
"""Balanced training as a run: it learns, says its weights, and resumes bit-identically."""

import dataclasses

import numpy as np
import pytest

from mvke_tf.config import BALANCED, RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError
from mvke_tf.run import Run
from mvke_tf.schema import Task
from mvke_tf.training import train_run
from mvke_tf.training.loop import build_training_model
from tests.small import small_schema
from tests.training.helpers import MODEL, TRAINING, assert_same_history, assert_same_state, copy_of_state, state

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("method", "steps"), [("famo", 2), ("gradnorm", 2), ("pcgrad", 0)])
def test_a_balanced_run_resumes_bit_identically(method, steps, tiny_prepared, tmp_path, monkeypatch):
    """In the middle of an epoch, too."""
    assert method in BALANCED and len(BALANCED) == 3
    model = dataclasses.replace(
        MODEL, name="mmoe", num_experts=2, tasks=("click", "buy", "stars"), embedding_stddev=0.5
    )
    training = dataclasses.replace(
        TRAINING, epochs=2, batch_size=128, learning_rate=0.01, loss_weighting=method, monitor_images_epochs=0
    )
    training = dataclasses.replace(training, checkpoint_steps=steps)
    interrupted = copy_of_state(tmp_path / "interrupted", monkeypatch)
    unbroken = train_run(Run.create(tmp_path / "unbroken", RunConfig(model, training), tiny_prepared))
    weights = np.array([[epoch[f"loss_weight_{task}"] for task in model.tasks] for epoch in unbroken.history])
    # The last step of an epoch; where no gradients conflict, PCGrad's weights are 1.
    assert (weights > 0).all() and np.ptp(weights, axis=1).max() > 0
    assert unbroken.history[1]["loss"] < unbroken.history[0]["loss"]
    assert (interrupted.progress() is None) == (steps == 0) and len(interrupted.history()) == (steps == 0)
    resumed = train_run(interrupted)
    assert_same_state(state(unbroken.run), state(interrupted))
    assert_same_history(resumed.history, unbroken.history)
    assert unbroken.run.load_model().task_names == model.tasks


def test_what_cannot_be_balanced():
    settings = {"mixed_float16": "gradients unscaled", "mixed_bfloat16": None}
    for precision, message in settings.items():
        if message is None:
            TrainingConfig(loss_weighting="pcgrad", precision=precision)
            continue
        with pytest.raises(ConfigError, match=message):
            TrainingConfig(loss_weighting="pcgrad", precision=precision)
    with pytest.raises(ConfigError, match="before and after every step"):
        TrainingConfig(loss_weighting="famo", gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="'gradnorm' weighs the tasks"):
        TrainingConfig(loss_weighting="gradnorm", task_weights=(1.0, 2.0))
    schema = small_schema()
    for tasks, method, message in (
        ((Task("click"),), "famo", "balances two tasks or more"),
        ((Task("click"), Task("visits", "count")), "gradnorm", "may be negative; choose 'pcgrad'"),
    ):
        config = RunConfig(MODEL, TrainingConfig(loss_weighting=method))
        with pytest.raises(ConfigError, match=message):
            build_training_model(config, schema.with_tasks(tasks), 1)
