"""What happens after every batch and epoch: divergence stops the training, the validation is measured, the run kept."""

from __future__ import annotations

import math
import time

import keras
import numpy as np

from mvke_tf.config import TrainingConfig
from mvke_tf.errors import TrainingError
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import History, Progress, Run
from mvke_tf.training.monitoring import Monitor
from mvke_tf.training.validation import Validation


def best_epoch(history: History) -> int:
    """Index of the epoch with the best validation score, the first of equals."""
    return int(np.argmax([epoch["val_score"] for epoch in history]))


def is_finished(history: History, config: TrainingConfig) -> bool:
    """Whether all epochs are done, or `patience` epochs have passed without a better one."""
    if len(history) >= config.epochs:
        return True
    return bool(config.patience and history) and len(history) - 1 - best_epoch(history) >= config.patience


class EpochWatch(keras.callbacks.Callback):
    """Stops training that has diverged, and adds to the logs of an epoch what `fit` does not know.

    Args:
        run: The run.
        config: Settings of the training.
        rows: Rows of the log per epoch.
        validation: Measures the model after each epoch.
        start: Batches of the first epoch that were done before.
    """

    def __init__(self, run: Run, config: TrainingConfig, rows: int, validation: Validation, start: int = 0) -> None:
        super().__init__()
        self.run, self.config, self.rows, self.validation, self.start = run, config, rows, validation, start
        self._epoch, self._started, self._stopped = 0, 0.0, 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._started = epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["loss"])
        self._stopped = time.perf_counter()
        self._check_finite("loss", loss, f"step {self.start + batch + 1}")

    def _check_finite(self, name: str, value: float, where: str) -> None:
        if not math.isfinite(value):
            kept = (
                f"The best checkpoint so far, {self.run.checkpoint}, is kept."
                if self.run.checkpoint.is_file()
                else "No epoch had finished, so there is no checkpoint."
            )
            raise TrainingError(
                f"The {name} became {value} in epoch {self._epoch + 1}, {where}. {kept} Try a lower "
                f"--learning_rate; it was {self.config.learning_rate}."
            )

    def on_epoch_end(self, epoch, logs=None):
        measured = self.validation.measure()
        # The last step's update shows in the validation only.
        self._check_finite("validation loss", measured["val_loss"], "after the last step")
        logs |= measured
        log_variances = self.validation.model.log_variances
        if log_variances is not None:
            logs |= {f"log_variance_{task}": float(value) for task, value in log_variances.by_task().items()}
        rows = self.rows - self.start * self.config.batch_size
        logs["examples_per_second"] = rows / (self._stopped - self._started)
        self.start = 0


class RunKeeper(keras.callbacks.Callback):
    """Keeps a run directory up to date. The last of the callbacks: what they wrote of an epoch counts with its state.

    The state file is written last: a process killed at any moment resumes at the last state, from where on it repeats
    everything exactly.

    Args:
        run: The run.
        plain: The model to checkpoint; the model in training shares its weights.
        history: The epochs that finished before.
        steps: Batches per epoch.
        monitor: Knows what has been said of gates.
        progress: How far the next epoch has come.
    """

    def __init__(
        self,
        run: Run,
        plain: TwoTowerModel,
        history: History,
        steps: int,
        monitor: Monitor,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.run, self.plain, self.history, self.steps, self.monitor = run, plain, history, steps, monitor
        self._every = run.config.training.checkpoint_steps
        self._progress, self.start = progress, progress.step if progress else 0
        self._kept = self.start

    def on_epoch_begin(self, epoch, logs=None):
        if self._progress is not None:
            # `fit` has set them to zero.
            for variable, value in zip(self.model.metrics_variables, self._progress.sums, strict=True):
                variable.assign(value)
            self._progress = None

    def on_train_batch_end(self, batch, logs=None):
        step = self.start + batch + 1
        if not self._every or step - self._kept < self._every or step == self.steps:
            return
        self._kept = step
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        sums = [keras.ops.convert_to_numpy(variable) for variable in self.model.metrics_variables]
        self.run.save_state(self.model, self.history, Progress(step, sums, self.monitor.known))

    def on_epoch_end(self, epoch, logs=None):
        self.history.append({"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}})
        if best_epoch(self.history) == epoch:
            self.run.save_checkpoint(self.plain)
        self.run.save_state(self.model, self.history)
        self.start = self._kept = 0
        # The data are those of one epoch.
        self.model.stop_training = True
