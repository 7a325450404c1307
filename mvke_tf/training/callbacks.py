# SPDX-License-Identifier: Apache-2.0
"""What happens after every batch and epoch: divergence stops the training, the validation is measured, the run kept."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import keras

from mvke_tf.config import TrainingConfig
from mvke_tf.errors import TrainingError, missing_modules
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import Progress, Run
from mvke_tf.run_folder import History, best_epoch
from mvke_tf.training.monitoring import Monitor
from mvke_tf.training.task_balance import BalancedModel
from mvke_tf.training.validation import Validation

LINE_WIDTH = 100


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
        if isinstance(self.model, BalancedModel):
            logs |= {f"loss_weight_{task}": weight for task, weight in self.model.balance.by_task().items()}
        rows = self.rows - self.start * self.config.batch_size
        logs["examples_per_second"] = rows / (self._stopped - self._started)
        self.start = 0


def is_due(step: int, kept: int, every: int, steps: int) -> bool:
    """Whether the state is to be kept after a step, having been kept after another; not after the last of an epoch."""
    return every > 0 and step - kept >= every and step != steps


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
        if not is_due(step, self._kept, self._every, self.steps):
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


class EpochLine(keras.callbacks.Callback):
    """Says a line after each epoch, and shows a bar meanwhile where the output is a terminal.

    Args:
        steps: Batches per epoch.
        history: The epochs that have finished, the present one included.
        start: Batches of the first epoch that were done before.
    """

    def __init__(self, steps: int, history: History, start: int = 0) -> None:
        super().__init__()
        self.steps, self.history, self.start = steps, history, start
        self._bar: Any = None
        self._started = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()
        if sys.stdout.isatty() and not missing_modules("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.steps,
                initial=self.start,
                desc=f"Epoch {epoch + 1}",
                unit="batch",
                leave=False,
                file=sys.stdout,
                dynamic_ncols=True,
            )

    def on_train_batch_end(self, batch, logs=None):
        if self._bar is not None:
            # Of several batches in one step, the last.
            self._bar.update(self.start + batch + 1 - self._bar.n)

    def on_epoch_end(self, epoch, logs=None):
        if self._bar is not None:
            self._bar.close()
        self.start = 0
        seconds = time.perf_counter() - self._started
        is_best = best_epoch(self.history) == epoch
        sys.stdout.write(epoch_line(self.history[-1], self.params["epochs"], seconds, is_best) + "\n")
        sys.stdout.flush()


def epoch_line(logs: Mapping[str, float], epochs: int, seconds: float, is_best: bool) -> str:
    """An epoch in at most `LINE_WIDTH` columns: losses, score, then so many metrics of tasks as there is room for.

    Args:
        logs: The epoch, as in log.csv.
        epochs: Most epochs of the training.
        seconds: How long it took.
        is_best: Whether its score is the best so far.

    >>> epoch_line({"epoch": 3, "loss": 0.5, "val_loss": 0.6, "val_score": 0.8, "val_click_auc": 0.8}, 50, 12, True)
    'Epoch  3/50  12 s  loss 0.5000  val_loss 0.6000  score 0.8000 (best)  click_auc 0.8000'
    """
    line = f"Epoch {logs['epoch']:>{len(str(epochs))}.0f}/{epochs}  {seconds:.0f} s"
    for name, title in (("loss", "loss"), ("val_loss", "val_loss"), ("val_score", "score")):
        line += f"  {title} {logs[name]:#.4g}"
    if is_best:
        line += " (best)"
    metrics = {
        name.removeprefix("val_"): value
        for name, value in logs.items()
        if name.startswith("val_") and not name.endswith(("_loss", "_mae")) and name != "val_score"
    }
    left = len(metrics)
    for name, value in metrics.items():
        entry = f"  {name} {value:#.4g}"
        # Room for the note on those that are left out.
        if len(line) + len(entry) + (len(_rest(left - 1)) if left > 1 else 0) > LINE_WIDTH:
            break
        line, left = line + entry, left - 1
    return line + (_rest(left) if left else "")


def _rest(number: int) -> str:
    return f"  ({number} more)"
