"""Layers, models, training and recorded numbers under JAX, where several hosts train through `keras.distribution`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.golden import FOLDER

# Two of `test_tables.py`; every other test of a training step would cost one more compilation.
ROW_SPARSE = (
    "tests/training/test_tables.py::test_lazy_adam_is_the_dense_optimizer_where_every_row_is_touched[clipped]",
    "tests/training/test_tables.py::test_rows_that_are_not_touched_do_not_move_at_all[rowwise_adagrad]",
)


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
