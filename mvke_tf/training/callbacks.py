"""What happens after every batch and epoch: divergence stops the training, the validation is measured, the run kept."""

from __future__ import annotations

import math
import time

import keras
import numpy as np

from mvke_tf.config import TrainingConfig
from mvke_tf.errors import TrainingError
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import History, Run
from mvke_tf.training.balancing import BalancedModel
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
    """

    def __init__(self, run: Run, config: TrainingConfig, rows: int, validation: Validation) -> None:
        super().__init__()
        self.run, self.config, self.rows, self.validation = run, config, rows, validation
        self._epoch, self._started, self._stopped = 0, 0.0, 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._started = epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["loss"])
        self._stopped = time.perf_counter()
        self._check_finite("loss", loss, f"step {batch + 1}")

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
        if isinstance(self.model, BalancedModel):
            logs |= {f"loss_weight_{task}": weight for task, weight in self.model.balance.by_task().items()}
        logs["examples_per_second"] = self.rows / (self._stopped - self._started)


class RunKeeper(keras.callbacks.Callback):
    """Keeps a run directory up to date. The last of the callbacks: what they wrote of an epoch counts with its state.

    The state file is written last: a process killed at any moment resumes at the last epoch that finished, whose
    successors it repeats exactly.

    Args:
        run: The run.
        plain: The model to checkpoint; the model in training shares its weights.
        history: The epochs that finished before.
    """

    def __init__(self, run: Run, plain: TwoTowerModel, history: History) -> None:
        super().__init__()
        self.run, self.plain, self.history = run, plain, history

    def on_epoch_end(self, epoch, logs=None):
        self.history.append({"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}})
        if best_epoch(self.history) == epoch:
            self.run.save_checkpoint(self.plain)
        self.run.save_state(self.model, self.history)
        # The data are those of one epoch.
        self.model.stop_training = True
