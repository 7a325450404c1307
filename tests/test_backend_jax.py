"""Layers, models and recorded numbers under JAX, where several hosts train through `keras.distribution`."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.golden import FOLDER


def passes_under_jax(*paths: str) -> None:
    # XLA would optimise for longer than these small computations run.
    environment = {
        **os.environ,
        **{"KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "MVKE_GOLDEN_DIR": str(FOLDER.resolve())},
    }
    command = [sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider"]
    completed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    output = completed.stdout + completed.stderr
    assert completed.returncode == 0, output
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", completed.stdout, re.MULTILINE), output


@pytest.mark.golden
def test_golden_numbers_under_jax():
    passes_under_jax("tests/test_golden.py")


def test_layers_and_models_under_jax():
    passes_under_jax("tests/layers", "tests/models", "tests/test_losses.py")
