# SPDX-License-Identifier: Apache-2.0
"""Training under JAX. `test_backend_jax.py` runs this file in a process of that backend; nothing else collects it."""

import logging

import keras
import numpy as np
import pytest

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.training import train, train_run
from tests.small import small_prepared
from tests.training.helpers import assert_same_state, copy_of_state, state

# Batches of one shape, because each costs a compilation: there are 7 x 48 training rows, and 48 rows hold no more
# distinct users or items than the multiple to which they are filled up. After seven batches of which two make an
# update, the gradients of one wait, which resuming has to know.
CONFIG = RunConfig(
    ModelConfig(
        embedding_dim=4, hidden_dims=(6,), num_virtual_kernels=3, virtual_kernel_stddev=0.5, embedding_stddev=0.5
    ),
    TrainingConfig(
        epochs=3,
        batch_size=48,
        learning_rate=0.03,
        gradient_accumulation_steps=2,
        loss_weighting="uncertainty",
        patience=0,
        monitor_images_epochs=0,
        checkpoint_steps=3,
    ),
)


def test_deduplicated_accumulated_training_with_uncertainty_weights_learns_and_resumes_bit_identically(
    tmp_path, monkeypatch, caplog
):
    assert keras.backend.backend() == "jax"
    prepared = small_prepared()
    assert len(prepared.part_rows("train")) == 7 * 48
    interrupted = copy_of_state(
        tmp_path / "runs" / "interrupted", monkeypatch, lambda history, progress: len(history) == 1 and progress
    )
    unbroken = train(prepared, CONFIG, "unbroken", tmp_path / "runs", tmp_path / "data")
    losses = [epoch["loss"] for epoch in unbroken.history]
    assert losses[2] < losses[1] < losses[0] - 0.05
    tasks = prepared.task_names()
    log_variances = np.array([[epoch[f"log_variance_{task}"] for task in tasks] for epoch in unbroken.history])
    assert np.abs(np.diff(log_variances, axis=0)).min() > 1e-4
    kept = unbroken.run.load_model().log_variances.by_task()
    assert list(kept.values()) == pytest.approx(log_variances[unbroken.best_epoch - 1], rel=1e-6)

    with caplog.at_level(logging.INFO, "mvke_tf"):
        resumed = train_run(interrupted)
    assert f"Continuing {interrupted.folder} after batch 3 of epoch 2." in caplog.messages
    assert_same_state(state(unbroken.run), state(interrupted))
    assert resumed.best_epoch == unbroken.best_epoch
