"""Models with known gates, and a study of the small run."""

import numpy as np
import pytest

from mvke_tf.analysis import Study
from mvke_tf.data.dataset import PairData
from mvke_tf.models import build_model
from mvke_tf.run import Run
from tests.models.problems import CONFIG, ITEMS, ROWS, SCHEMA, USERS, labels, randomize


@pytest.fixture(scope="session")
def small_run(tiny_run_template):
    """The finished small run, for reading only."""
    return Run(tiny_run_template)


@pytest.fixture(scope="session")
def run_study(small_run):
    """The small run's model on its test part."""
    return Study(small_run.load_model(), small_run.prepared.part("test"))


@pytest.fixture(scope="session")
def pairs():
    """Seven pairs of four users and three items."""
    flat = {task: label[:, 0] for task, label in labels().items()}
    return PairData(USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], flat)


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
