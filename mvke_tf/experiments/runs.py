# SPDX-License-Identifier: Apache-2.0
"""Runs as one step of a longer job: trained if need be, continued if interrupted, quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
from tqdm import tqdm

from mvke_tf.config import RunConfig
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import RunError
from mvke_tf.run import Run
from mvke_tf.training import train, train_run

LOGGER = logging.getLogger(__name__)


def finished_run(
    config: RunConfig, folder: Path, prepared: PreparedDataset, log: Path, progress: Progress | None = None
) -> Run:
    """The finished run of these settings: trained anew, continued where it was interrupted, or found as it is.

    What it computes does not depend on what the process computed before: layers and graphs of earlier runs are
    forgotten, and training sets all seeds.

    Args:
        config: All settings.
        folder: The run directory.
        prepared: The data.
        log: A text file; what training says is added to it.
        progress: Is shown the epochs.

    Raises:
        RunError: If the folder holds a run of other settings or other data, or is damaged.
        TrainingError: If the loss becomes NaN or infinite.
    """
    keras.utils.clear_session()
    callbacks = [] if progress is None else [progress]
    with _into(log):
        if not folder.exists():
            return train(prepared, config, folder.name, folder.parent, callbacks=callbacks).run
        run = Run.open(folder)
        if run.config != config:
            raise RunError(
                f"{folder} holds a run of other settings, see its config.json. Delete it or choose another folder. "
                f"Expected: {config}. Received: {run.config}"
            )
        if run.prepared.digest != prepared.digest:
            raise RunError(
                f"{folder} holds a run on other data, see its data.json. Delete it or choose another folder. "
                f"Expected: {prepared.digest}. Received: {run.prepared.digest}"
            )
        return train_run(run, callbacks).run


class Progress(keras.callbacks.Callback):
    """Says which run of a longer job is on: on a terminal one line with epoch and time left, else a line per run.

    The time left is that of the runs and epochs so far, as if no training stopped early.

    Args:
        runs: Number of all runs, those included that are found finished.
    """

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.runs = runs
        self._bar = tqdm(total=runs, disable=None, bar_format="{desc}")
        self._begun, self._done = time.perf_counter(), -1
        self._number, self._name, self._first = 0, "", 0

    def start(self, number: int, name: str) -> None:
        """Says that a run begins that is not found finished.

        Args:
            number: From 1.
            name: Its name.
        """
        self._number, self._name, self._first = number, name, -1
        self._done += 1
        self._bar.set_description_str(self.line())
        if self._bar.disable:
            LOGGER.info(self.line())

    def on_epoch_begin(self, epoch, logs=None):
        if self._first < 0:
            # An interrupted run goes on there.
            self._first = epoch
        self._bar.set_description_str(self.line(epoch, self.params["epochs"]))

    def line(self, epoch: int = -1, epochs: int = 0) -> str:
        """`"Run 2 of 15: mvke-seed0, epoch 3 of 50, about 12:31 left"`.

        Args:
            epoch: The epoch that begins, from 0; none by default.
            epochs: Most epochs of the run.
        """
        line = f"Run {self._number} of {self.runs}: {self._name}"
        share = 0.0
        if epoch >= 0:
            line += f", epoch {epoch + 1} of {epochs}"
            share = (epoch - self._first) / (epochs - self._first)
        if self._done + share:
            left = (self.runs - self._number + 1 - share) / (self._done + share)
            line += f", about {tqdm.format_interval(left * (time.perf_counter() - self._begun))} left"
        return line

    def say(self, text: str) -> None:
        """A line that stays."""
        self._bar.write(text)

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """What is printed and logged inside is added to a file instead."""
    log.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("mvke_tf")
    handlers, propagate = logger.handlers, logger.propagate
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        logger.handlers, logger.propagate = [logging.StreamHandler(file)], False
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate


def configs_of_runs(config: RunConfig, tasks: Sequence[str]) -> dict[str, RunConfig]:
    """The runs that settings stand for where models are compared or searched, `{suffix of the name: settings}`.

    One run without a suffix, but one per task for single_task: each learns its task by itself, over all rows, for there
    is no probability of an earlier event to multiply with, and without weights of tasks.

    Args:
        config: The settings.
        tasks: Names of the tasks, `prepared.task_names(config.model.tasks)`.
    """
    if config.model.name != "single_task":
        return {"": config}
    alone: dict[str, Any] = {"objective": "marginal"} if len(tasks) > 1 else {}
    return {
        f"_{task}": dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, tasks=(task,), task_kernels=(), task_experts=(), **alone),
            training=dataclasses.replace(config.training, task_weights=()),
        )
        for task in tasks
    }
