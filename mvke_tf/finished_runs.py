"""Runs as one step of a longer job: trained if need be, continued if interrupted, quiet."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import keras

from mvke_tf.config import RunConfig
from mvke_tf.run import Run, RunError
from mvke_tf.training import train, train_run


def finished_run(config: RunConfig, folder: Path, data_dir: Path, log: Path) -> Run:
    """The finished run of these settings: trained anew, continued where it was interrupted, or found as it is.

    What it computes does not depend on what the process computed before: layers and graphs of earlier runs are
    forgotten, and training sets all seeds.

    Args:
        config: All settings.
        folder: The run directory.
        data_dir: Where raw and prepared data are kept.
        log: A text file; what training prints is added to it.

    Raises:
        RunError: If the folder holds a run of other settings, or is damaged.
        TrainingError: If the loss becomes NaN or infinite.
    """
    keras.utils.clear_session()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        if not folder.exists():
            return train(config, folder.name, data_dir, folder.parent).run
        run = Run.open(folder)
        if run.config != config:
            raise RunError(
                f"{folder} holds a run of other settings, see its config.json. Delete it or choose another folder. "
                f"Expected: {config}. Received: {run.config}"
            )
        return train_run(run).run


def configs_of_runs(config: RunConfig) -> dict[str, RunConfig]:
    """The runs that settings stand for where models are compared or searched, `{suffix of the name: settings}`.

    One run without a suffix, but one per task for single_task: each learns its task by itself, conversions on all
    impressions, for there is no probability of a click to multiply with, and without weights of tasks.
    """
    if config.model.name != "single_task":
        return {"": config}
    alone = {"conversion": "impressions"} if len(config.model.tasks) > 1 else {}
    return {
        f"_{task}": dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, tasks=(task,), task_kernels=(), task_experts=(), **alone),
            training=dataclasses.replace(config.training, task_weights=()),
        )
        for task in config.model.tasks
    }
