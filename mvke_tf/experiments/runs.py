# SPDX-License-Identifier: Apache-2.0
"""Runs as one step of a longer job: trained if need be, continued if interrupted, quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import keras
from tqdm import tqdm

from mvke_tf.config import RunConfig
from mvke_tf.data.store import PreparedDataset
from mvke_tf.engine import Engine
from mvke_tf.errors import RunError
from mvke_tf.run import Run
from mvke_tf.training import train, train_run

LOGGER = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        progress: Is shown the epochs. None in another process of an engine, which gets a run anew only when the one
            that trained it, perhaps on another machine, has ended: its lock is taken over.

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
        return train_run(run, callbacks, take_over=progress is None).run


@dataclasses.dataclass(frozen=True)
class _OfFolder(Generic[Item, Result]):
    """A function of prepared data for other processes, each of which loads them once."""

    function: Callable[[Item, PreparedDataset, Progress | None], Result]
    folder: Path

    @functools.cached_property
    def prepared(self) -> PreparedDataset:
        return PreparedDataset.load(self.folder)

    def __call__(self, item: Item) -> Result:
        return self.function(item, self.prepared, None)


def spread(
    engine: Engine,
    function: Callable[[Item, PreparedDataset, Progress | None], Result],
    items: Iterable[Item],
    prepared: PreparedDataset,
    progress: Progress,
) -> Iterator[Result]:
    """Results of independent trainings in the order of the items, of which an engine does several at a time.

    Args:
        engine: Who calls the function.
        function: Called with an item, the data and the progress of epochs, which is None in other processes.
        items: Its items, each asked for when its training begins.
        prepared: The data, in a folder where the engine has other processes.
        progress: Is shown the epochs of trainings in this process.
    """
    if engine.is_alone:
        return engine.map(lambda item: function(item, prepared, progress), items)
    if prepared.folder is None:
        raise ValueError("Other processes need prepared data in a folder: save them before. Received: data in memory")
    return engine.map(_OfFolder(function, prepared.folder.resolve()), items)


def log_of(folder: Path, name: str, progress: Progress | None) -> Path:
    """Where a training of a longer job logs: all of this process in one file, those of others in a file each."""
    return folder / "training.log" if progress is not None else folder / "logs" / f"{name}.log"


class Progress(keras.callbacks.Callback):
    """Says which run of a longer job is on: on a terminal one line with epoch and time left, else a line per run.

    The time left is that of the runs and epochs so far, as if no training stopped early.

    Args:
        runs: Number of all runs, those included that are found finished.
        workers: How many are on at a time; of several no epochs are shown.
    """

    def __init__(self, runs: int, workers: int = 1) -> None:
        super().__init__()
        self.runs, self.workers = runs, workers
        self._bar = tqdm(total=runs, disable=None, bar_format="{desc}")
        self._begun, self._done = time.perf_counter(), -workers
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
        if self._done + share > 0:
            left = (self.runs - self._number + self.workers - share) / (self._done + share)
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
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        logger.handlers, logger.propagate = [logging.StreamHandler(file)], False
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


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
