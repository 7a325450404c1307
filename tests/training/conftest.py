# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from mvke_tf.config import RunConfig
from mvke_tf.run import Run
from tests.training.helpers import MODEL, TRAINING


@pytest.fixture
def new_run(tiny_prepared, tmp_path):
    """Makes runs on the small data set, by name and training settings."""

    def make(name, model=MODEL, **settings):
        config = RunConfig(model, dataclasses.replace(TRAINING, **settings))
        return Run.create(tmp_path / "runs" / name, config, tiny_prepared)

    return make


@pytest.fixture
def eager():
    """Building graphs is most of the time of a training of few steps. What resumes, and what is compiled, has them."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
