# SPDX-License-Identifier: Apache-2.0
"""What several tests of training share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mvke_tf.config import ModelConfig, TrainingConfig
from mvke_tf.run import Run

MODEL = ModelConfig(embedding_dim=8, hidden_dims=(8,), dropout_rate=0.3)
TRAINING = TrainingConfig(epochs=3, batch_size=32, patience=0, seed=5)


def eagerly(test: Callable) -> Callable:
    """Marks a test that trains without building graphs; those of pipelines are built all the same."""
    ignored = pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`")
    return pytest.mark.usefixtures("eager")(ignored(test))


def state(run):
    with np.load(run.state_file) as file:
        return {name: file[name] for name in file.files if name not in ("history", "names")}


def copy_of_state(folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: Callable = lambda history, progress: True):
    """The run that is left where training is killed after the first state that is wanted; train another to get it."""
    copied, save_state = Run(folder), Run.save_state

    def save_and_copy(run, model, history, progress=None):
        save_state(run, model, history, progress)
        if not folder.exists() and wanted(history, progress):
            shutil.copytree(run.folder, folder)

    monkeypatch.setattr(Run, "save_state", save_and_copy)
    return copied


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def assert_same_history(first, second):
    """All but the speed."""
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_equal(
            {name: value for name, value in ours.items() if name != "examples_per_second"},
            {name: value for name, value in theirs.items() if name != "examples_per_second"},
        )
