"""Layers, models and recorded numbers under JAX, where several hosts train through `keras.distribution`."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_layers_models_and_golden_numbers_pass_under_jax():
    # XLA would optimise for longer than these small computations run.
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    paths = ["tests/layers", "tests/models", "tests/test_golden.py"]
    command = [sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider"]
    completed = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    output = completed.stdout + completed.stderr
    assert completed.returncode == 0, output
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", completed.stdout, re.MULTILINE), output
