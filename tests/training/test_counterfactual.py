# SPDX-License-Identifier: Apache-2.0
"""Training with a counterfactual risk as a run."""

import dataclasses
import shutil

import pytest

from mvke_tf.config import RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError
from mvke_tf.run import Run
from mvke_tf.training import train_run
from mvke_tf.training.loop import build_training_model
from tests.small import small_schema
from tests.training.helpers import MODEL, TRAINING, assert_same_history, assert_same_state, state

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "settings"),
    [("dr", {"checkpoint_steps": 2, "embedding_optimizer": "lazy_adam"}), ("ips", {"loss_weighting": "uncertainty"})],
)
def test_it_changes_the_training_and_resumes_bit_identically(method, settings, tiny_prepared, tmp_path, monkeypatch):
    model = dataclasses.replace(MODEL, tasks=("click", "buy"), objective="joint", embedding_stddev=0.5)
    plain = dataclasses.replace(TRAINING, epochs=2, batch_size=128, monitor_images_epochs=0, **settings)
    training = dataclasses.replace(plain, counterfactual=method, counterfactual_weight=1.0)
    without = train_run(Run.create(tmp_path / "without", RunConfig(model, plain), tiny_prepared))
    interrupted, save_state = Run(tmp_path / "interrupted"), Run.save_state

    def save_and_copy(run, *args):
        save_state(run, *args)
        if not interrupted.folder.exists():
            shutil.copytree(run.folder, interrupted.folder)

    monkeypatch.setattr(Run, "save_state", save_and_copy)
    unbroken = train_run(Run.create(tmp_path / "unbroken", RunConfig(model, training), tiny_prepared))
    resumed = train_run(interrupted)
    assert_same_state(state(unbroken.run), state(interrupted))
    assert_same_history(resumed.history, unbroken.history)
    # The logged loss holds the risk; the validation has the losses of the tasks alone.
    first, plain_first = unbroken.history[0], without.history[0]
    assert first["loss"] > plain_first["loss"] + 0.1
    assert abs(first["val_loss"] - plain_first["val_loss"]) > 1e-6
    kept = unbroken.run.load_model()
    assert kept.task_names == ("click", "buy") and not kept.counterfactual_risks


def test_what_has_no_risk():
    for settings, message in (
        ({"counterfactual": "iqs"}, "one of"),
        ({"counterfactual": "ips", "loss_weighting": "famo"}, "balances the losses of the tasks alone"),
        ({"counterfactual_weight": 0.0}, "positive"),
        ({"max_inverse_propensity": 0.5}, "1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainingConfig(**settings)
    config = RunConfig(MODEL, TrainingConfig(counterfactual="dr"))
    with pytest.raises(ConfigError, match=r"needs a task with an event before it.*Received: the tasks \['click'"):
        build_training_model(config, small_schema(), 4)
