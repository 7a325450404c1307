# SPDX-License-Identifier: Apache-2.0
"""One run directory with what needs Keras: its data, model and training state."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Mapping
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mvke_tf.config import FORMAT, RunConfig
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.encoder import Encoder
from mvke_tf.data.files import Digests
from mvke_tf.data.store import PreparedDataset
from mvke_tf.data.tables import fingerprint
from mvke_tf.errors import DataError, RunError
from mvke_tf.io import CORRUPT_FILE_ERRORS, atomic_write, read_arrays, read_json, write_json
from mvke_tf.layers import LogitMap
from mvke_tf.models import TwoTowerModel, load_model, save_model
from mvke_tf.run_folder import History, RunFolder, quoted, resume_command

LOGGER = logging.getLogger(__name__)

# Of a variable that is written.
_BYTES_AT_A_TIME = 2**24


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an epoch has come.

    Args:
        step: Batches that it has done.
        sums: The variables of its metrics.
        known: What was wrong with gates after the epoch before: `(task, dead expert, or None for a collapsed gate)`.
    """

    step: int
    sums: list[np.ndarray]
    known: list[tuple[str, int | None]]


class Run(RunFolder):
    """A run directory.

    Args:
        folder: An existing run directory; `Run.create` makes one.
    """

    @classmethod
    def create(cls, folder: Path, config: RunConfig, prepared: PreparedDataset) -> Run:
        """Makes a run directory.

        Args:
            folder: Where; must not exist yet.
            config: Settings of the run.
            prepared: The data, which lie in a folder of their own (`PreparedDataset.save`).

        Raises:
            RunError: If the folder exists.
            ValueError: If the data are in memory only.
        """
        folder = Path(folder)
        exists = RunError(
            f"{folder} exists already, and a run is never overwritten. Choose another --run_name, continue it with "
            "--resume, or delete the folder."
        )
        if folder.exists():
            raise exists
        if prepared.folder is None:
            raise ValueError("A run refers to prepared data in a folder: save them before. Received: data in memory")
        data = {
            "format": FORMAT,
            "name": prepared.dataset.name,
            "digest": prepared.digest,
            "fingerprint": prepared.fingerprint,
            "folder": _relative(prepared.folder, folder),
            "source": _relative(prepared.dataset.folder, folder),
        }
        try:
            with atomic_write(folder, replace=False) as temporary:
                temporary.mkdir()
                write_json(temporary / "config.json", config.to_dict())
                write_json(temporary / "dataset.json", prepared.dataset.to_dict())
                write_json(temporary / "encoder.json", prepared.encoder.to_dict())
                write_json(temporary / "data.json", data)
        except OSError as error:
            # Another process has made it meanwhile.
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise exists from error
            raise
        run = cls(folder)
        run.__dict__["prepared"] = prepared
        return run

    @cached_property
    def dataset(self) -> Dataset:
        """The declaration of the dataset, as it was when the run was made.

        Raises:
            RunError: If the file is missing or damaged.
        """
        values = read_json(self.folder / "dataset.json", RunError)
        return self._understood(
            "dataset.json", lambda: Dataset.from_dict(values, self.folder / self.data["source"], self.data["name"])
        )

    @cached_property
    def encoder(self) -> Encoder:
        """How raw features become the inputs of the model.

        Raises:
            RunError: If the file is missing or damaged.
        """
        values = read_json(self.folder / "encoder.json", RunError, most_bytes=None)
        return self._understood("encoder.json", lambda: Encoder.from_dict(values))

    def _understood(self, name: str, read: Any) -> Any:
        try:
            return read()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{self.folder / name} is damaged ({error}). {self.train_anew('DATA')}") from error

    @property
    def prepared_folder(self) -> Path:
        """Where the prepared data of the run are."""
        return Path(os.path.normpath(self.folder / self.data["folder"]))

    @cached_property
    def prepared(self) -> PreparedDataset:
        """The data of the run.

        Raises:
            RunError: If they are no longer there, or are others; the message says how to make them again.
            DataError: If they are damaged.
        """
        folder = self.prepared_folder
        if not folder.is_dir():
            raise RunError(f"The prepared data of {self.folder} are not at {folder}. {self._prepare_again()}")
        prepared = PreparedDataset.load(folder)
        if prepared.digest != self.data["digest"]:
            raise RunError(
                f"The prepared data at {folder} are not those that {self.folder} was trained on. Expected the digest "
                f"{self.data['digest']}. Received: {prepared.digest}. {self._prepare_again()}"
            )
        if self._tables_have_changed():
            LOGGER.warning(
                "The tables of %s have changed since it was made: it goes on with the data prepared then. A run on "
                "those of now: %s",
                self.folder,
                self._train_on_those_of_now(),
            )
        return prepared

    def _prepare_again(self) -> str:
        if not self.dataset.source.path and self.dataset.split.by != "files":
            return "Make them again in Python, from the same tables: `mvke_tf.prepared_dataset`."
        data_dir = self.prepared_folder.parents[1]
        if self._tables_have_changed():
            return (
                f"They cannot be made again, because the tables have changed since: put those back, or train a run on "
                f"those of now: {self._train_on_those_of_now()}"
            )
        return f"Make them again: mvke prepare --data {quoted(self.folder)} --data_dir {quoted(data_dir)}"

    def _tables_have_changed(self) -> bool | None:
        """Whether the files of the tables are not those that the run was made of; None if there are none to read."""
        try:
            digests = Digests(self.prepared_folder.parent / "digests.json")
            return fingerprint(self.dataset, digests) != self.data["fingerprint"]
        except DataError:
            return None

    def _train_on_those_of_now(self) -> str:
        data_dir = self.prepared_folder.parents[1]
        return (
            f"mvke train --data {quoted(self.folder)} --data_dir {quoted(data_dir)} --config {quoted(self.config_file)}"
        )

    def load_model(self, calibrated: bool = False) -> TwoTowerModel:
        """The best checkpoint.

        Args:
            calibrated: Whether its predictions are calibrated, if the run is.

        Raises:
            RunError: If training has not finished an epoch yet, or the file is lost or damaged; likewise the file of
                the calibration.
        """
        model = self._load_model()
        if calibrated:
            model.calibration = self.calibration()
        return model

    def _load_model(self) -> TwoTowerModel:
        if not self.checkpoint.is_file():
            if self.history():
                raise self.lost_checkpoint()
            raise RunError(
                f"{self.folder} has no checkpoint yet: no epoch has finished. Train it: {resume_command(self)}; if its "
                "loss became infinite, train a new run with a lower --learning_rate."
            )
        try:
            model = load_model(self.checkpoint)
        except (RunError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{self.checkpoint} cannot be used: {error} {self.train_anew()}") from error
        return model

    def lost_checkpoint(self) -> RunError:
        """What to raise where epochs have finished and their best checkpoint is gone."""
        return RunError(
            f"{self.checkpoint} is lost, although epochs of the run have finished; only that file holds the weights of "
            f"the best one. {self.train_anew()}"
        )

    def save_calibration(self, method: str, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Keeps the calibration of the best checkpoint, `{task: arguments of LogitMap}`."""
        write_json(self.calibration_file, {"method": method, "checkpoint": self._checkpoint_digest(), "tasks": tasks})

    def calibration(self) -> dict[str, LogitMap]:
        """The calibration of the best checkpoint by task; empty if there is none.

        Raises:
            RunError: If the file is damaged, or that of an earlier checkpoint.
        """
        if not self.calibration_file.is_file():
            return {}
        values = read_json(self.calibration_file, RunError)
        again = f"Fit it again: mvke calibrate {quoted(self.folder)}"
        try:
            checkpoint, tasks = values["checkpoint"], values["tasks"]
            found = {task: LogitMap(**settings) for task, settings in tasks.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{self.calibration_file} is damaged ({error!r}). {again}") from error
        if checkpoint != self._checkpoint_digest():
            raise RunError(f"{self.calibration_file} is that of an earlier checkpoint. {again}")
        return found

    def _checkpoint_digest(self) -> str:
        with open(self.checkpoint, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def save_checkpoint(self, model: keras.Model) -> None:
        """Makes `model` the best checkpoint."""
        with atomic_write(self.checkpoint) as temporary:
            save_model(model, temporary)

    def save_state(self, model: keras.Model, history: History, progress: Progress | None = None) -> None:
        """Keeps everything that resuming needs in one file: variables, optimizer, seeds and history.

        Args:
            model: The compiled model.
            history: One dictionary per finished epoch.
            progress: How far the next epoch has come, if it has begun.
        """
        within: dict[str, Any] = {}
        if progress is not None:
            within = {f"sum_{index:04d}": values for index, values in enumerate(progress.sums)}
            within["progress"] = json.dumps([progress.step, progress.known])
        else:
            columns = list(dict.fromkeys(name for epoch in history for name in epoch))
            with atomic_write(self.log_file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(history)
        variables = _state_variables(model)
        said = {"history": json.dumps(history), "names": json.dumps(_stable_names(variables)), **within}
        # Last, because it is what makes the epoch count as finished.
        with atomic_write(self.state_file) as temporary, zipfile.ZipFile(temporary, "w") as file:
            for name, value in said.items():
                _add_array(file, name, np.asanyarray(value))
            for index, variable in enumerate(variables):
                _add_array(file, f"variable_{index:04d}", variable)

    def history(self) -> History:
        """One dictionary per epoch that has finished; empty if none has.

        Raises:
            RunError: If the state is damaged.
        """
        return self._read_state()[0] if self.state_file.is_file() else []

    def progress(self) -> Progress | None:
        """How far the epoch after the finished ones has come; None if it has not begun, or no state of it is kept.

        Raises:
            RunError: If the state is damaged.
        """
        return self._read_state()[3] if self.state_file.is_file() else None

    def restore_state(self, model: keras.Model) -> History:
        """Puts the kept state into a compiled model of the same settings.

        Returns:
            The history so far, one dictionary per finished epoch; empty if none has finished.

        Raises:
            RunError: If the state is damaged or belongs to another model.
        """
        if not self.state_file.is_file():
            return []
        history, names, arrays, _ = self._read_state()
        variables = _state_variables(model)
        kept = [(name, array.shape) for name, array in zip(names, arrays, strict=True)]
        shapes = (tuple(variable.shape) for variable in variables)
        own = list(zip(_stable_names(variables), shapes, strict=True))
        if kept != own:
            one, other = next(pair for pair in zip_longest(kept, own) if pair[0] != pair[1])
            raise RunError(
                f"{self.state_file} does not fit the model of config.json: its settings or the version have changed. "
                f"Expected {len(own)} variables with {other}. Received: {len(kept)} with {one}. {self.train_anew()}"
            )
        for variable, value in zip(variables, arrays, strict=True):
            variable.assign(value)
        return history

    def _read_state(self) -> tuple[History, list[str], list[np.ndarray], Progress | None]:
        progress = None
        try:
            arrays = read_arrays(self.state_file)
            history = json.loads(str(arrays.pop("history")))
            names = json.loads(str(arrays.pop("names")))
            if "progress" in arrays:
                step, known = json.loads(str(arrays.pop("progress")))
                sums = [arrays.pop(name) for name in sorted(arrays) if name.startswith("sum_")]
                progress = Progress(int(step), sums, [(task, expert) for task, expert in known])
        except (*CORRUPT_FILE_ERRORS, KeyError, TypeError, RecursionError) as error:
            raise self._damaged_state(str(error)) from error
        if not isinstance(history, list) or not (history or progress):
            raise self._damaged_state("its history is no list of epochs")
        for number, epoch in enumerate(history, start=1):
            if not (
                isinstance(epoch, dict)
                and epoch.get("epoch") == number
                and {"val_score", "examples_per_second"} <= set(epoch)
                and all(isinstance(value, (int, float)) for value in epoch.values())
            ):
                raise self._damaged_state(f"its history of epoch {number} is not what a training writes")
        if not isinstance(names, list) or len(names) != len(arrays):
            raise self._damaged_state("it does not name its variables")
        return history, names, list(arrays.values()), progress

    def _damaged_state(self, reason: str) -> RunError:
        kept = f" {self.checkpoint} can still be used." if self.checkpoint.is_file() else ""
        return RunError(f"{self.state_file} is damaged ({reason}), and resuming needs it.{kept} {self.train_anew()}")


def _add_array(file: zipfile.ZipFile, name: str, array: np.ndarray | keras.Variable) -> None:
    """Adds what `np.savez` would, without copies of all arrays, or of all rows of a large one."""
    size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
    with file.open(f"{name}.npy", "w", force_zip64=True) as opened:
        if size <= _BYTES_AT_A_TIME or not array.shape:
            np.lib.format.write_array(opened, keras.ops.convert_to_numpy(array), allow_pickle=False)
            return
        about = {"descr": np.dtype(array.dtype).str, "fortran_order": False, "shape": tuple(array.shape)}
        np.lib.format.write_array_header_1_0(opened, about)
        rows = max(1, array.shape[0] * _BYTES_AT_A_TIME // size)
        for start in range(0, array.shape[0], rows):
            opened.write(np.ascontiguousarray(keras.ops.convert_to_numpy(array[start : start + rows])).data)


def _relative(path: Path, start: Path) -> str:
    """The way from a folder to a path; absolute where there is none, between two drives of Windows."""
    path, start = Path(path).resolve(), Path(start).resolve()
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return path.as_posix()


def _state_variables(model: keras.Model) -> list[keras.Variable]:
    """Weights, seeds of dropout and the like, and the optimizer's moments, in a fixed order."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*model.variables, *model.optimizer.variables]


def _stable_names(variables: list[keras.Variable]) -> list[str]:
    """Layer and name of variables, without the numbers that Keras counts up in a process where a layer has no name."""
    # Optimizers in optimizers have longer paths, or not, depending on who built them.
    return [re.sub(r"_\d+(?=/|$)", "", "/".join(variable.path.split("/")[-2:])) for variable in variables]
