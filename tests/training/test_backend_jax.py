# SPDX-License-Identifier: Apache-2.0
"""Layers, models, training and recorded numbers under JAX, where several hosts train through `keras.distribution`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.golden import FOLDER
from tests.small import small_prepared

# Two of `test_row_sparse.py`; every other test of a training step would cost one more compilation.
ROW_SPARSE = (
    "tests/training/test_row_sparse.py::test_lazy_adam_is_the_dense_optimizer_where_every_row_is_touched[clipped]",
    "tests/training/test_row_sparse.py::test_rows_that_are_not_touched_do_not_move_at_all[rowwise_adagrad]",
)

pytestmark = pytest.mark.slow


def passes_under_jax(cache: Path, *paths: str) -> None:
    # XLA would optimise for longer than these small computations run, and compile again what another test did before.
    environment = {
        **os.environ,
        **{"KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "MVKE_GOLDEN_DIR": str(FOLDER.resolve())},
        **{"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    }
    command = [sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider"]
    completed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    output = completed.stdout + completed.stderr
    assert completed.returncode == 0, output
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", completed.stdout, re.MULTILINE), output


@pytest.mark.golden
def test_golden_numbers_under_jax(tmp_path):
    passes_under_jax(tmp_path, "tests/test_golden.py")


def test_layers_models_and_training_under_jax(tmp_path):
    passes_under_jax(
        tmp_path, "tests/layers", "tests/models", "tests/test_losses.py", "tests/training/jax_training.py", *ROW_SPARSE
    )


# Trains from a folder where nobody can import TensorFlow.
WITHOUT_TENSORFLOW = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError("TensorFlow is not to be used.")

sys.meta_path.insert(0, Blocked())
from pathlib import Path
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.store import PreparedDataset
from mvke_tf.training import train

model = ModelConfig("hard_sharing", ("click",), embedding_dim=2, hidden_dims=(2,))
training = TrainingConfig(epochs=1, batch_size=48, monitor_images_epochs=0)
result = train(PreparedDataset.load(Path(sys.argv[1])), RunConfig(model, training), "run", Path(sys.argv[2]))
assert "tensorflow" not in sys.modules
print("loss", result.history[0]["loss"])
"""


def test_training_under_jax_needs_no_tensorflow(tmp_path):
    small_prepared().save(tmp_path / "prepared")
    completed = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, tmp_path / "prepared", tmp_path / "runs"],
        cwd=REPOSITORY,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert 0 < float(completed.stdout.split("loss")[-1]) < 1
