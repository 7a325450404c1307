# SPDX-License-Identifier: Apache-2.0
"""Models with known gates, and a study of the small run."""

import numpy as np
import pytest

from mvke_tf.analysis import Study
from mvke_tf.data.batches import Interactions
from mvke_tf.models import build_model
from mvke_tf.run import Run
from tests.models.problems import CONFIG, ITEMS, ROWS, SCHEMA, USERS, labels, randomize


@pytest.fixture(scope="session")
def small_run(tiny_run_template):
    """A run with a small model, for reading only."""
    return Run(tiny_run_template)


@pytest.fixture(scope="session")
def run_study(small_run):
    """The small run's model on its test part."""
    return Study(small_run.load_model(), small_run.prepared.part("test"), small_run.prepared.catalogue)


@pytest.fixture(scope="session")
def pairs():
    """Seven pairs of four users and three items."""
    flat = {task: label[:, 0] for task, label in labels().items()}
    return Interactions(USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], flat)


@pytest.fixture(scope="session")
def many(pairs):
    """The same pairs a hundred times: enough of them to say something about."""
    return pairs.take(np.tile(np.arange(len(pairs)), 100))


@pytest.fixture
def make_model():
    """Builds a model of the shared problem with random weights."""

    def make(name, schema=SCHEMA, **settings):
        config = {"num_virtual_kernels": 3, "num_experts": 4, **settings}
        return randomize(build_model(name, schema, CONFIG.__class__(**{**CONFIG.__dict__, "name": name, **config})))

    return make


def set_gate(model, task, bias, scale=0.0):
    """Makes the gate of an MMoE `softmax(scale * x Wg + bias)`."""
    dense = model.get_layer(f"gate_{task}").dense
    dense.kernel.assign(scale * np.asarray(dense.kernel))
    dense.bias.assign(np.asarray(bias, "float32"))
