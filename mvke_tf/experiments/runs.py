"""Runs as one step of a longer job: trained if need be, continued if interrupted, quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras

from mvke_tf.config import RunConfig
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import RunError
from mvke_tf.run import Run
from mvke_tf.training import train, train_run


def finished_run(config: RunConfig, folder: Path, prepared: PreparedDataset, log: Path) -> Run:
    """The finished run of these settings: trained anew, continued where it was interrupted, or found as it is.

    What it computes does not depend on what the process computed before: layers and graphs of earlier runs are
    forgotten, and training sets all seeds.

    Args:
        config: All settings.
        folder: The run directory.
        prepared: The data.
        log: A text file; what training says is added to it.

    Raises:
        RunError: If the folder holds a run of other settings or other data, or is damaged.
        TrainingError: If the loss becomes NaN or infinite.
    """
    keras.utils.clear_session()
    with _into(log):
        if not folder.exists():
            return train(prepared, config, folder.name, folder.parent).run
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
        return train_run(run).run


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
