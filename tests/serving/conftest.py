import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.config import DataConfig, ModelConfig, RunConfig
from mvke_tf.data.prepared import prepare
from mvke_tf.models.mvke import build_mvke
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from tests.serving.helpers import LENGTH, Elsewhere, rows_of, small_frames


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Run:
    """An untrained run whose probabilities spread."""
    folder = tmp_path_factory.mktemp("serving")
    config = RunConfig(
        DataConfig(history_length=LENGTH), ModelConfig(embedding_dim=8, hidden_dims=(8,), embedding_stddev=1.0)
    )
    prepared = prepare(small_frames(np.random.default_rng(0)), config.data)
    prepared.save(folder / "prepared.npz")
    run = Run.create(folder / "run", config, folder / "prepared.npz")
    keras.utils.set_random_seed(0)
    run.save_checkpoint(build_mvke(prepared.schema, config.model))
    return run


@pytest.fixture(scope="package")
def model(run) -> keras.Model:
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
    prepared = run.prepared
    pairs = prepared.pairs.iloc[prepared.part_rows("test")]
    return {
        name: column
        for tower in ("user", "item")
        for name, column in rows_of(prepared.raw[tower], pairs[f"{tower}_row"]).items()
    }


@pytest.fixture
def user(run) -> dict[str, np.ndarray]:
    """The raw features of three users."""
    return rows_of(run.prepared.raw["user"], [0, 7, 20])
