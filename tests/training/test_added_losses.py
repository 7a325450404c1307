# SPDX-License-Identifier: Apache-2.0
"""Training with what is added to the losses of the tasks, as a run."""

import dataclasses

import numpy as np
import pytest

from mvke_tf.config import RunConfig, TrainingConfig
from mvke_tf.data.batches import Interactions
from mvke_tf.errors import ConfigError
from mvke_tf.run import Run
from mvke_tf.schema import ITEM_SAMPLING
from mvke_tf.training import train_run
from mvke_tf.training.loop import _with_sampling, build_training_model
from tests.small import small_schema
from tests.training.helpers import MODEL, TRAINING, assert_same_history, assert_same_state, copy_of_state, state

pytestmark = pytest.mark.slow


DOUBLY_ROBUST = {"counterfactual": "dr", "counterfactual_weight": 1.0}


@pytest.mark.parametrize(
    ("added", "settings"),
    [
        (DOUBLY_ROBUST, {"checkpoint_steps": 2, "embedding_optimizer": "lazy_adam"}),
        ({"counterfactual": "ips", "in_batch_weight": 0.5}, {"loss_weighting": "uncertainty"}),
    ],
)
def test_it_resumes_bit_identically(added, settings, tiny_prepared, tmp_path, monkeypatch):
    model = dataclasses.replace(MODEL, tasks=("click", "buy"), objective="joint", embedding_stddev=0.5)
    plain = dataclasses.replace(TRAINING, epochs=2, batch_size=128, monitor_images_epochs=0, **settings)
    training = dataclasses.replace(plain, **added)
    interrupted = copy_of_state(tmp_path / "interrupted", monkeypatch)
    unbroken = train_run(Run.create(tmp_path / "unbroken", RunConfig(model, training), tiny_prepared))
    resumed = train_run(interrupted)
    assert_same_state(state(unbroken.run), state(interrupted))
    assert_same_history(resumed.history, unbroken.history)
    kept = unbroken.run.load_model()
    assert kept.task_names == ("click", "buy") and not kept.added_losses


def test_the_share_of_items_is_that_of_the_training_rows():
    key = np.array([7, 5, 7])
    items = {"age": np.zeros(3, np.int32)}
    data = Interactions({}, items, np.zeros(4, np.int32), np.array([0, 2, 2, 1], np.int32), {})
    column = _with_sampling(data, key).items[ITEM_SAMPLING]
    np.testing.assert_allclose(column, [[np.log(0.75), 1], [np.log(0.25), 0], [np.log(0.75), 1]], rtol=1e-6)
    assert ITEM_SAMPLING not in items


def test_what_has_nothing_to_add():
    for settings, message in (
        ({"counterfactual": "iqs"}, "one of"),
        ({"counterfactual": "ips", "loss_weighting": "famo"}, "balances the losses of the tasks alone"),
        ({"counterfactual_weight": 0.0}, "positive"),
        ({"max_inverse_propensity": 0.5}, "1 or more"),
        ({"in_batch_weight": -1.0}, "0 or more"),
        ({"in_batch_weight": 1.0, "loss_weighting": "pcgrad"}, "balances the losses of the tasks alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainingConfig(**settings)
    config = RunConfig(MODEL, TrainingConfig(counterfactual="dr"))
    with pytest.raises(ConfigError, match=r"needs a task with an event before it.*Received: the tasks \['click'"):
        build_training_model(config, small_schema(), 4)
