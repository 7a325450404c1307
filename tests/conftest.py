"""Fixtures that several test folders share."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from mvke_tf.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.movielens import GENRES, MovieLens
from mvke_tf.data.prepared import prepare
from mvke_tf.data.sources import obtain_movielens
from mvke_tf.models.mvke import build_mvke
from mvke_tf.run import Run

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def movielens_folder() -> Path:
    """The real ML-100K in the repository's `data/`; the first run downloads it."""
    return obtain_movielens(REPOSITORY / "data")


@pytest.fixture(scope="session")
def tiny_run_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of a small MVKE on random ratings; for copies only."""
    folder = tmp_path_factory.mktemp("tiny")
    config = RunConfig(
        data=DataConfig(history_length=5),
        model=ModelConfig(embedding_dim=8, hidden_dims=(8,), kernel_stddev=1.0, embedding_stddev=1.0),
        training=TrainingConfig(epochs=2, batch_size=64),
    )
    prepared = prepare(random_movielens(), config.data)
    prepared.save(folder / "prepared.npz")
    run = Run.create(folder / "run", config, folder / "prepared.npz")
    keras.utils.set_random_seed(0)
    run.save_checkpoint(build_mvke(prepared.schema, config.model))
    return run.folder


@pytest.fixture
def tiny_run(tiny_run_template: Path, tmp_path: Path) -> Run:
    """A run with an untrained MVKE as checkpoint, in a folder of the test's own.

    Its 12 users rate in turn, each overlapping the next, so the test part has known and new users.
    """
    return Run(Path(shutil.copytree(tiny_run_template, tmp_path / "tiny_run")))


def random_movielens() -> MovieLens:
    """240 random ratings by 12 users of 30 items."""
    random = np.random.default_rng(0)
    users = pd.DataFrame(
        [(user, 18 + user, "MF"[user % 2], "artist", "00000") for user in range(1, 13)],
        columns=["user_id", "age", "gender", "occupation", "zip_code"],
    )
    items = pd.DataFrame(
        [(item, f"Film {item}", 1960 + item, (GENRES[1 + item % 5], GENRES[7 + item % 3])) for item in range(1, 31)],
        columns=["item_id", "title", "release_year", "genres"],
    )
    ratings = pd.DataFrame(
        [
            (user, item, random.integers(1, 6), 1000 + 20 * user + random.integers(60))
            for user in users["user_id"]
            for item in random.choice(items["item_id"], 20, replace=False)
        ],
        columns=["user_id", "item_id", "rating", "timestamp"],
    )
    return MovieLens(ratings, users, items.astype({"release_year": "Int64"}))
