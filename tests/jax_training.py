"""Training under JAX. `test_backend_jax.py` runs this file in a process of that backend; nothing else collects it."""

import shutil

import keras
import numpy as np
import pytest

from mvke_tf.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.prepared import prepare, prepared_path
from mvke_tf.losses import uncertainty_layer
from mvke_tf.run import Run
from mvke_tf.training import train, train_run
from tests.conftest import random_movielens
from tests.test_training import assert_same_state, quiet, state

# Batches of one shape, because each costs a compilation: this split has 7 x 48 training rows, and 48 rows hold no more
# distinct users or items than the multiple to which they are filled up. After seven batches of which two make an
# update, the gradients of one wait, which resuming has to know.
CONFIG = RunConfig(
    DataConfig(split="random", history_length=5),
    ModelConfig(embedding_dim=4, hidden_dims=(6,), num_virtual_kernels=3, kernel_stddev=0.5, embedding_stddev=0.5),
    TrainingConfig(
        epochs=3,
        batch_size=48,
        learning_rate=0.03,
        accumulation_steps=2,
        loss_weighting="uncertainty",
        distinct=True,
        patience=0,
        monitor_images_epochs=0,
    ),
)


def test_distinct_accumulated_training_with_uncertainty_weights_learns_and_resumes_bit_identically(
    tmp_path, monkeypatch
):
    assert keras.backend.backend() == "jax"
    data = prepared_path(tmp_path / "data", CONFIG.data)
    data.parent.mkdir(parents=True)
    prepare(random_movielens(), CONFIG.data).save(data)
    save_state, interrupted = Run.save_state, Run(tmp_path / "interrupted")

    def save_and_copy(run, *args):
        save_state(run, *args)
        if not interrupted.folder.exists():
            shutil.copytree(run.folder, interrupted.folder)

    monkeypatch.setattr(Run, "save_state", save_and_copy)
    unbroken = train(CONFIG, "unbroken", tmp_path / "data", tmp_path / "runs", report=quiet)
    losses = [epoch["loss"] for epoch in unbroken.history]
    assert losses[2] < losses[1] < losses[0] - 0.05
    log_variances = np.array([[epoch[f"log_variance_{task}"] for task in ("ctr", "cvr")] for epoch in unbroken.history])
    assert np.abs(np.diff(log_variances, axis=0)).min() > 1e-4
    kept = uncertainty_layer(unbroken.run.load_model()).by_task()
    assert list(kept.values()) == pytest.approx(log_variances[unbroken.best_epoch - 1], rel=1e-6)

    lines = []
    resumed = train_run(interrupted, report=lines.append)
    assert f"Continuing {interrupted.folder} after epoch 1." in lines
    assert_same_state(state(unbroken.run), state(interrupted))
    assert resumed.best_epoch == unbroken.best_epoch
