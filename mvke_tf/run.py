"""One run directory: settings, data, checkpoints, logs, report, export.

runs/<name>/
    config.json      settings of data, model and training
    prepared.npz     the prepared data, encoders included (a hard link where the file system has them)
    best.keras       the model of the epoch with the best validation score
    state.npz        everything that resuming needs: weights, optimizer, seeds, history
    log.csv          one row per epoch
    tensorboard/     for `tensorboard --logdir runs`
    warnings.txt     gates that collapsed and experts that died, by epoch; absent if there was none
    report.json      what scripts/evaluate.py measured; figures/ holds its pictures
    export/          what scripts/export.py wrote; analysis/, profiles/ and onnx/ what those scripts wrote
"""

from __future__ import annotations

import json
import os
import shutil
from functools import cached_property
from pathlib import Path

import keras
import numpy as np
import pandas as pd

import mvke_tf.layers  # noqa: F401  (registers the layers that a saved model needs)
from mvke_tf.config import RunConfig
from mvke_tf.data.prepared import Prepared
from mvke_tf.files import DAMAGED, read_arrays, write_json, written_whole

History = list[dict[str, float]]


class RunError(ValueError):
    """A run directory that cannot be used; the message says why and what to do."""


class Run:
    """A run directory.

    Args:
        folder: An existing run directory; `Run.create` makes one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.checkpoint = self.folder / "best.keras"
        self.state_file = self.folder / "state.npz"
        self.report_file = self.folder / "report.json"
        self.figures = self.folder / "figures"
        self.logs = self.folder / "tensorboard"
        self.log_file = self.folder / "log.csv"
        self.warnings_file = self.folder / "warnings.txt"
        self.export = self.folder / "export"

    @classmethod
    def create(cls, folder: Path, config: RunConfig, prepared: Path) -> Run:
        """Makes a run directory.

        Args:
            folder: Where; must not exist yet.
            config: Settings of the run.
            prepared: The file of prepared data that the run keeps.

        Raises:
            RunError: If the folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise RunError(
                f"{folder} exists already, and a run is never overwritten. Choose another --run_name, continue it "
                "with --resume, or delete the folder."
            )
        with written_whole(folder) as temporary:
            temporary.mkdir()
            write_json(temporary / "config.json", config.to_dict())
            try:
                os.link(prepared, temporary / "prepared.npz")
            except OSError:
                # No hard links here (another file system): the copy holds the same.
                shutil.copyfile(prepared, temporary / "prepared.npz")
        return cls(folder)

    @classmethod
    def open(cls, path: Path, model: str | None = None) -> Run:
        """Opens a run.

        Args:
            path: Its directory, or a checkpoint in it.
            model: Name of the model that it must hold; any by default.

        Raises:
            RunError: If there is no run, or it holds another model.
        """
        path = Path(path)
        folder = path.parent if path.is_file() else path
        if not (folder / "config.json").is_file():
            raise RunError(
                f"There is no run at {path}. Expected a folder such as runs/<name> with a config.json, as "
                "scripts/train.py makes it, or the best.keras in it."
            )
        run = cls(folder)
        if model not in (None, run.config.model.name):
            raise RunError(
                f"--model does not fit the run {folder}. Expected: {run.config.model.name}. Received: {model}"
            )
        return run

    def contents(self) -> str:
        """What the run has made so far, one line each with its path."""
        made = {
            "settings": self.folder / "config.json",
            "best checkpoint": self.checkpoint,
            "log": self.log_file,
            "warnings": self.warnings_file,
            "TensorBoard": self.logs,
            "report": self.report_file,
            "figures": self.figures,
            "SavedModel": self.export,
        }
        return "\n".join(f"{what + ':':<17}{path}" for what, path in made.items() if path.exists())

    @cached_property
    def config(self) -> RunConfig:
        """Settings of the run."""
        path = self.folder / "config.json"
        try:
            return RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise RunError(f"{path} cannot be used: {error}") from error

    @cached_property
    def prepared(self) -> Prepared:
        """The data of the run."""
        return Prepared.load(self.folder / "prepared.npz")

    def load_model(self) -> keras.Model:
        """The best checkpoint.

        Raises:
            RunError: If training has not finished an epoch yet, or the file is damaged.
        """
        if not self.checkpoint.is_file():
            raise RunError(f"{self.folder} has no checkpoint yet. Train it: scripts/train.py --resume {self.folder}")
        try:
            return keras.saving.load_model(self.checkpoint, compile=False)
        except DAMAGED as error:
            raise RunError(f"{self.checkpoint} is damaged ({error}). Train again.") from error

    def save_checkpoint(self, model: keras.Model) -> None:
        """Makes `model` the best checkpoint."""
        with written_whole(self.checkpoint) as temporary:
            model.save(temporary)

    def save_state(self, model: keras.Model, history: History) -> None:
        """Keeps everything that resuming needs in one file: variables, optimizer, seeds and history."""
        with written_whole(self.log_file) as temporary:
            pd.DataFrame(history).to_csv(temporary, index=False)
        arrays = {
            f"variable_{index:04d}": keras.ops.convert_to_numpy(variable)
            for index, variable in enumerate(_state_variables(model))
        }
        # Last, because it is what makes the epoch count as finished.
        with written_whole(self.state_file) as temporary, open(temporary, "wb") as file:
            np.savez(file, history=json.dumps(history), **arrays)

    def restore_state(self, model: keras.Model) -> History:
        """Puts the kept state into a compiled model of the same settings.

        Returns:
            The history so far, one dictionary per finished epoch; empty if none has finished.

        Raises:
            RunError: If the state is damaged or belongs to another model.
        """
        if not self.state_file.is_file():
            return []
        variables = _state_variables(model)
        try:
            arrays = read_arrays(self.state_file)
            history = json.loads(str(arrays.pop("history")))
        except (*DAMAGED, KeyError) as error:
            raise RunError(f"{self.state_file} is damaged ({error}). Train anew.") from error
        if [array.shape for array in arrays.values()] != [tuple(variable.shape) for variable in variables]:
            raise RunError(
                f"{self.state_file} holds {len(arrays)} variables that are not those of the model of config.json "
                f"({len(variables)} variables). The settings or the version have changed; train anew."
            )
        for variable, value in zip(variables, arrays.values(), strict=True):
            variable.assign(value)
        return history


def _state_variables(model: keras.Model) -> list[keras.Variable]:
    """Weights, seeds of dropout and the like, and the optimizer's moments, in a fixed order."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*model.variables, *model.optimizer.variables]
