# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test folders share."""

import gc
import shutil
from pathlib import Path

import keras
import pytest

from mvke_tf import cli
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.store import PreparedDataset
from mvke_tf.models import build_model
from mvke_tf.run import Run
from tests.small import small_prepared

REPOSITORY = Path(__file__).resolve().parents[1]
# A worker takes whole files, in this order and then that of their names: what takes longest must not be left for last.
LONGEST = (
    *(
        "test_backend_jax.py",
        "test_devices.py",
        "test_loop.py",
        "test_docs.py",
        "test_optimisation.py",
        "test_notebooks.py",
    ),
    *("test_kills.py", "test_wheel.py", "test_task_balance.py", "test_row_sparse.py", "test_tracking.py"),
    *("test_saving.py", "test_compare.py", "test_server.py", "test_monitoring.py"),
    "test_workers.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: every full collection of garbage would walk all of it, for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Path:
    """Where processes of JAX keep what they have compiled, which takes longer than to run it, for the next tests."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("jax")


@pytest.fixture(scope="session")
def tiny_prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """The small dataset of `tests/small.py`, prepared, in a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "prepared" / "small"
    small_prepared().save(folder)
    return PreparedDataset.load(folder)


@pytest.fixture(scope="session")
def tiny_run_template(tiny_prepared: PreparedDataset) -> Path:
    """Folder of a run of a small MVKE with an untrained checkpoint; for copies only, with its data beside it."""
    config = RunConfig(
        model=ModelConfig(embedding_dim=8, hidden_dims=(8,), virtual_kernel_stddev=1.0, embedding_stddev=1.0),
        training=TrainingConfig(epochs=2, batch_size=64),
    )
    run = Run.create(tiny_prepared.folder.parents[1] / "runs" / "tiny", config, tiny_prepared)
    keras.utils.set_random_seed(0)
    run.save_checkpoint(build_model(config.model.name, tiny_prepared.schema(), config.model))
    return run.folder


@pytest.fixture
def tiny_run(tiny_run_template: Path, tmp_path: Path) -> Run:
    """A run with an untrained MVKE as checkpoint, and its data, in a folder that the test may change."""
    shutil.copytree(tiny_run_template.parents[1], tmp_path / "tiny")
    return Run(tmp_path / "tiny" / "runs" / tiny_run_template.name)


@pytest.fixture
def mvke(capsys):
    """Runs one command line: its status, output and error output."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, arguments)))
        return ended.value.code, *capsys.readouterr()

    return call
