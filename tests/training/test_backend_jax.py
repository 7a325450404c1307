# SPDX-License-Identifier: Apache-2.0
"""Layers, models, training and recorded numbers under JAX, where several hosts train through `keras.distribution`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.golden import FOLDER

# Two of `test_row_sparse.py`; every other test of a training step would cost one more compilation.
ROW_SPARSE = (
    "tests/training/test_row_sparse.py::test_lazy_adam_is_the_dense_optimizer_where_every_row_is_touched[clipped]",
    "tests/training/test_row_sparse.py::test_rows_that_are_not_touched_do_not_move_at_all[rowwise_adagrad]",
)

pytestmark = pytest.mark.slow


def passes_under_jax(compiled: Path, *paths: str) -> None:
    # XLA would optimise for longer than these small computations run, and compile again what another test did before.
    environment = {
        **os.environ,
        **{"KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "MVKE_GOLDEN_DIR": str(FOLDER.resolve())},
        **{"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    }
    command = [sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider", "-m", "not one_backend"]
    completed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    output = completed.stdout + completed.stderr
    assert completed.returncode == 0, output
    assert re.search(r"^\d+ passed(, \d+ deselected)?(, \d+ warnings?)? in ", completed.stdout, re.MULTILINE), output


@pytest.mark.golden
def test_golden_numbers_under_jax(compiled):
    passes_under_jax(compiled, "tests/test_golden.py")


def test_layers_models_and_training_under_jax(compiled):
    passes_under_jax(
        compiled, "tests/layers", "tests/models", "tests/test_losses.py", "tests/training/jax_training.py", *ROW_SPARSE
    )


# Runs command lines where nobody can import TensorFlow.
WITHOUT_TENSORFLOW = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError("TensorFlow is not to be used.")

sys.meta_path.insert(0, Blocked())
from mvke_tf.cli import main

for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as ended:
        print("status", ended.code, line.partition(" ")[0])
assert "tensorflow" not in sys.modules and "jax" in sys.modules
"""


def test_training_and_evaluation_under_jax_need_no_tensorflow(tmp_path):
    rows = [f"u{row % 40},i{row % 23},{row},{row % 7},{int(row % 7 > 3 or row % 5 == 0)}" for row in range(600)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,ts,age,click", *rows]) + "\n")
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(REPOSITORY)}

    def run(*arguments, **more):
        completed = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    # The raw values are encoded by the graph that the export has.
    run("-m", "mvke_tf", "init", "log.csv")
    run("-m", "mvke_tf", "prepare", "--data", "log.toml")
    prepared = run("-m", "mvke_tf", "prepare", "--data", "log.toml", "--data_dir", "small", "--memory_mb", "1")
    assert "in 9 buckets of users" in prepared
    train = "train --data log.toml --epochs 1 --embedding_dim 2 --hidden_dims 2 --num_virtual_kernels 2 --run_name"
    commands = f"{train} mine", "evaluate runs/mine", f"{train} buckets --data_dir small", "evaluate runs/buckets"
    said = run("-c", WITHOUT_TENSORFLOW, *commands, KERAS_BACKEND="jax")
    assert re.findall(r"^status (\d) (\w+)$", said, re.M) == [("0", "train"), ("0", "evaluate")] * 2
    report = tmp_path / "runs" / "mine" / "report.json"
    under_jax = json.loads(report.read_text())["test"]["click"]
    run("-m", "mvke_tf", "evaluate", "runs/mine")
    under_tensorflow = json.loads(report.read_text())["test"]["click"]
    # A pair of nearly equal scores may change its order.
    assert under_jax["auc"] == pytest.approx(under_tensorflow["auc"], abs=0.002)
    assert under_jax["log_loss"] == pytest.approx(under_tensorflow["log_loss"], rel=1e-5)
    assert 0 < under_jax["auc"] < 1
