# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.config import ModelConfig, RunConfig
from mvke_tf.data.store import PreparedDataset
from mvke_tf.models import TwoTowerModel, build_model
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from mvke_tf.serving.rest.model import ServedModel
from tests.serving.helpers import Elsewhere, pair_rows, prepared_with_twins, rows_of
from tests.serving.rest_helpers import export_toy


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Run:
    """An untrained run whose probabilities spread."""
    folder = tmp_path_factory.mktemp("serving")
    config = RunConfig(model=ModelConfig(embedding_dim=8, hidden_dims=(8,), embedding_stddev=1.0))
    prepared_with_twins().save(folder / "prepared")
    prepared = PreparedDataset.load(folder / "prepared")
    run = Run.create(folder / "run", config, prepared)
    keras.utils.set_random_seed(0)
    run.save_checkpoint(build_model("mvke", prepared.schema(), config.model))
    return run


@pytest.fixture(scope="package")
def model(run) -> TwoTowerModel:
    return run.load_model()


@pytest.fixture(scope="package")
def exported(run) -> Path:
    return export_run(run)


@pytest.fixture(scope="package")
def signatures(exported):
    """The signatures of the small run, loaded in this process."""
    return tf.saved_model.load(exported).signatures


@pytest.fixture(scope="package")
def elsewhere(tmp_path_factory):
    """A process that has TensorFlow but nothing of ours."""
    process = Elsewhere(tmp_path_factory.mktemp("elsewhere"), {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"})
    yield process
    assert process.close() == 0


@pytest.fixture(scope="package")
def serve(elsewhere, exported):
    """Asks a signature of the small run in the other process; outputs, or the message of the error."""

    def serve(inputs: dict, signature: str = "serving_default", way: str = "signature"):
        return elsewhere.ask(exported, signature, inputs, way)

    return serve


@pytest.fixture
def raw(run) -> dict[str, np.ndarray]:
    """The raw features of every pair of the test part."""
    return pair_rows(run.prepared, "test")


@pytest.fixture
def user(run) -> dict[str, np.ndarray]:
    """The raw features of three users."""
    return rows_of(run.prepared.users.raw, [0, 7, 20])


@pytest.fixture(scope="session")
def toy_export(tmp_path_factory) -> Path:
    """A folder of versions with one, 7, of known answers."""
    folder = tmp_path_factory.mktemp("toy")
    export_toy(folder / "7")
    return folder


@pytest.fixture(scope="session")
def toy_model(toy_export) -> ServedModel:
    return ServedModel(toy_export / "7")
