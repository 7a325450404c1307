"""One run directory: settings, data, checkpoints, logs, report, export.

runs/<name>/
    config.json      settings of model and training
    dataset.json     the declaration of the dataset
    encoder.json     how raw features become the inputs of the model
    data.json        which prepared data the run is trained on: their folder, relative to the run, and their digest
    best.keras       the model of the epoch with the best validation score
    state.npz        everything that resuming needs: weights, optimizer, seeds, history
    log.csv          one row per epoch
    tensorboard/     for `tensorboard --logdir runs`
    warnings.txt     gates that collapsed and experts that died, by epoch; absent if there was none
    report.json      what `mvke evaluate` measured; figures/ holds its pictures
    export/          what `mvke export` wrote; analysis/, profiles/ and onnx/ what those commands wrote
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import logging
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mvke_tf.config import FORMAT, RunConfig
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.encoder import Encoder
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError, RunError
from mvke_tf.io import CORRUPT_FILE_ERRORS, atomic_write, read_arrays, read_json, remove_temporary, write_json
from mvke_tf.models import TwoTowerModel, load_model

LOGGER = logging.getLogger(__name__)

History = list[dict[str, float]]
OLDER_VERSION = "0.1"


class Run:
    """A run directory.

    Args:
        folder: An existing run directory; `Run.create` makes one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.json"
        self.checkpoint = self.folder / "best.keras"
        self.state_file = self.folder / "state.npz"
        self.report_file = self.folder / "report.json"
        self.figures = self.folder / "figures"
        self.logs = self.folder / "tensorboard"
        self.log_file = self.folder / "log.csv"
        self.warnings_file = self.folder / "warnings.txt"
        self.export = self.folder / "export"

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

    @classmethod
    def open(cls, path: Path, model: str | None = None) -> Run:
        """Opens a run.

        Args:
            path: Its directory, or a checkpoint in it.
            model: Name of the model that it must hold; any by default.

        Raises:
            RunError: If there is no run, an older version has made it, or it holds another model.
        """
        path = Path(path)
        run = cls(path.parent if path.is_file() else path)
        if not run.config_file.is_file():
            raise RunError(
                f"There is no run at {path}. Expected a folder such as runs/<name> with a config.json, as "
                "`mvke train` makes it, or the best.keras in it."
            )
        if model not in (None, run.config.model.name):
            raise RunError(
                f"--model does not fit the run {run.folder}. Expected: {run.config.model.name}. Received: {model}"
            )
        return run

    def contents(self) -> str:
        """What the run has made so far, one line each with its path."""
        made = {
            "settings": self.config_file,
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
        """Settings of the run.

        Raises:
            RunError: If they cannot be used.
        """
        values = read_json(self.config_file, RunError)
        if isinstance(values, dict) and "format" not in values and ("data" in values or self._is_old):
            raise RunError(
                f"{self.folder} was made by mvke_tf {OLDER_VERSION}. Train again with this version, or use the run "
                f"with mvke_tf {OLDER_VERSION}."
            )
        if isinstance(values, dict) and values.get("format") != FORMAT:
            raise RunError(
                f"{self.config_file} has another format than this version of mvke_tf reads; another version has made "
                f"the run. Expected: {FORMAT}. Received: {values.get('format')!r}"
            )
        try:
            return RunConfig.from_dict(values)
        except ConfigError as error:
            raise RunError(f"{self.config_file} cannot be used: {error}") from error

    @property
    def _is_old(self) -> bool:
        return (self.folder / "prepared.npz").exists()

    @cached_property
    def data(self) -> dict[str, str]:
        """Which prepared data the run is trained on: `name`, `digest`, `fingerprint`, `folder` and `source`.

        Raises:
            RunError: If the file is missing or damaged.
        """
        path = self.folder / "data.json"
        values = read_json(path, RunError)
        names = ("name", "digest", "fingerprint", "folder", "source")
        if not isinstance(values, dict) or any(not isinstance(values.get(name), str) for name in names):
            raise RunError(f"{path} is damaged. Expected texts {names}. {self._train_anew('DATA')}")
        return values

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
            raise RunError(f"{self.folder / name} is damaged ({error}). {self._train_anew('DATA')}") from error

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
        return prepared

    def _prepare_again(self) -> str:
        if not self.dataset.source.path and self.dataset.split.by != "files":
            return "Make them again in Python, from the same tables: `mvke_tf.prepared_dataset`."
        data_dir = self.prepared_folder.parents[1]
        return f"Make them again: mvke prepare --data {_quoted(self.folder)} --data_dir {_quoted(data_dir)}"

    def _train_anew(self, data: str | None = None) -> str:
        """The command that trains a new run of the same settings, of the declaration in the run by default."""
        data = data or _quoted(self.folder)
        return f"Train a new run of its settings: mvke train --data {data} --config {_quoted(self.config_file)}"

    def load_model(self) -> TwoTowerModel:
        """The best checkpoint.

        Raises:
            RunError: If training has not finished an epoch yet, or the file is lost or damaged.
        """
        if not self.checkpoint.is_file():
            if self.history():
                raise self.lost_checkpoint()
            raise RunError(f"{self.folder} has no checkpoint yet. Train it: {resume_command(self)}")
        try:
            return load_model(self.checkpoint)
        except (RunError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{self.checkpoint} cannot be used: {error} {self._train_anew()}") from error

    def lost_checkpoint(self) -> RunError:
        """What to raise where epochs have finished and their best checkpoint is gone."""
        return RunError(
            f"{self.checkpoint} is lost, although epochs of the run have finished; only that file holds the weights of "
            f"the best one. {self._train_anew()}"
        )

    def save_checkpoint(self, model: keras.Model) -> None:
        """Makes `model` the best checkpoint."""
        with atomic_write(self.checkpoint) as temporary:
            model.save(temporary)

    def save_state(self, model: keras.Model, history: History) -> None:
        """Keeps everything that resuming needs in one file: variables, optimizer, seeds and history."""
        columns = list(dict.fromkeys(name for epoch in history for name in epoch))
        with atomic_write(self.log_file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
        variables = _state_variables(model)
        arrays = {
            f"variable_{index:04d}": keras.ops.convert_to_numpy(variable) for index, variable in enumerate(variables)
        }
        # Last, because it is what makes the epoch count as finished.
        with atomic_write(self.state_file) as temporary, open(temporary, "wb") as file:
            np.savez(file, history=json.dumps(history), names=json.dumps(_stable_names(variables)), **arrays)

    def history(self) -> History:
        """One dictionary per epoch that has finished; empty if none has.

        Raises:
            RunError: If the state is damaged.
        """
        return self._read_state()[0] if self.state_file.is_file() else []

    def restore_state(self, model: keras.Model) -> History:
        """Puts the kept state into a compiled model of the same settings.

        Returns:
            The history so far, one dictionary per finished epoch; empty if none has finished.

        Raises:
            RunError: If the state is damaged or belongs to another model.
        """
        if not self.state_file.is_file():
            return []
        history, names, arrays = self._read_state()
        variables = _state_variables(model)
        kept = [(name, array.shape) for name, array in zip(names, arrays, strict=True)]
        shapes = (tuple(variable.shape) for variable in variables)
        own = list(zip(_stable_names(variables), shapes, strict=True))
        if kept != own:
            one, other = next(pair for pair in zip_longest(kept, own) if pair[0] != pair[1])
            raise RunError(
                f"{self.state_file} does not fit the model of config.json: its settings or the version have changed. "
                f"Expected {len(own)} variables with {other}. Received: {len(kept)} with {one}. {self._train_anew()}"
            )
        for variable, value in zip(variables, arrays, strict=True):
            variable.assign(value)
        return history

    def _read_state(self) -> tuple[History, list[str], list[np.ndarray]]:
        try:
            arrays = read_arrays(self.state_file)
            history = json.loads(str(arrays.pop("history")))
            names = json.loads(str(arrays.pop("names")))
        except (*CORRUPT_FILE_ERRORS, KeyError, RecursionError) as error:
            raise self._damaged_state(str(error)) from error
        if not isinstance(history, list) or not history:
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
        return history, names, list(arrays.values())

    def _damaged_state(self, reason: str) -> RunError:
        kept = f" {self.checkpoint} can still be used." if self.checkpoint.is_file() else ""
        return RunError(f"{self.state_file} is damaged ({reason}), and resuming needs it.{kept} {self._train_anew()}")

    def clear_temporary(self) -> None:
        """Clears away what a killed process left half-written."""
        for folder in (self.folder.parent, self.folder, self.logs):
            remove_temporary(folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes this process the only one that trains the run, and clears away what a killed one left half-written.

        A lock ends with its process, however that ends.

        Raises:
            RunError: If another process trains it.
        """
        path = self.folder / ".lock"
        with open(path, "a+", encoding="utf-8") as file:
            file.seek(0)
            owner = file.read(256).strip()
            host = owner.rpartition(" ")[2]
            taken = not _try_lock(file)
            # The system knows the processes of this host only.
            if taken or (owner and host != socket.gethostname()):
                raise RunError(
                    f"{self.folder} is being trained by another process ({owner or 'just started'}). Wait for it, or "
                    f"end it. If it no longer exists, delete {path}."
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                self.clear_temporary()
                yield
            finally:
                # The empty file stays: who deletes a lock may delete that of the next process.
                file.truncate(0)


def resume_command(run: Run) -> str:
    """The command line that continues the training of a run."""
    return f"mvke train --resume {_quoted(run.folder)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _relative(path: Path, start: Path) -> str:
    """The way from a folder to a path; absolute where there is none, between two drives of Windows."""
    path, start = Path(path).resolve(), Path(start).resolve()
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return path.as_posix()


def _try_lock(file: Any) -> bool:
    """Whether the open file could be locked against other processes until it is closed."""
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte far behind the text, which others may still read.
            file.seek(2**20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _state_variables(model: keras.Model) -> list[keras.Variable]:
    """Weights, seeds of dropout and the like, and the optimizer's moments, in a fixed order."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*model.variables, *model.optimizer.variables]


def _stable_names(variables: list[keras.Variable]) -> list[str]:
    """Layer and name of variables, without the numbers that Keras counts up in a process where a layer has no name."""
    # Optimizers in optimizers have longer paths, or not, depending on who built them.
    return [re.sub(r"_\d+(?=/|$)", "", "/".join(variable.path.split("/")[-2:])) for variable in variables]
