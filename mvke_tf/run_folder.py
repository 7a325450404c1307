# SPDX-License-Identifier: Apache-2.0
"""One run directory, as far as it can be read without TensorFlow: settings, log, report, state.

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
    mlflow.json      which MLflow run it is logged to; absent without --log mlflow
    calibration.json the calibration of the best checkpoint, as `mvke calibrate` fitted it
    report.json      what `mvke evaluate` measured; figures/ holds its pictures
    export/          what `mvke export` wrote; analysis/, profiles/ and onnx/ what those commands wrote
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
import shlex
import socket
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Self

from mvke_tf.config import BASELINE_NAMES, FORMAT, RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError, RunError
from mvke_tf.io import process_exists, read_json, remove_temporary, try_lock

History = list[dict[str, float]]
Metrics = dict[str, float | int | None]
Report = dict[str, dict[str, Metrics]]

USERS = {"all": "{part}", "warm": "{part}_warm_users", "cold": "{part}_cold_users"}
_COLUMNS = (
    *("rows", "positives", "auc", "auc_given", "gauc", "accuracy", "log_loss", "calibration_error"),
    *("macro_auc", "poisson_deviance", "mse", "rmse", "mae"),
)
OLDER_VERSION = "0.1"


class RunFolder:
    """A run directory.

    Args:
        folder: An existing run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.json"
        self.checkpoint = self.folder / "best.keras"
        self.state_file = self.folder / "state.npz"
        self.report_file = self.folder / "report.json"
        self.calibration_file = self.folder / "calibration.json"
        self.figures = self.folder / "figures"
        self.logs = self.folder / "tensorboard"
        self.log_file = self.folder / "log.csv"
        self.warnings_file = self.folder / "warnings.txt"
        self.mlflow_file = self.folder / "mlflow.json"
        self.analysis = self.folder / "analysis"
        self.export = self.folder / "export"
        self.profiles = self.folder / "profiles"

    def groups_file(self, part: str) -> Path:
        """Metrics of one part by group."""
        return self.folder / f"{part}_groups.csv"

    @classmethod
    def open(cls, path: Path, model: str | None = None) -> Self:
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

    def changed(self) -> float:
        """When settings or log were written last, in seconds since the epoch of the system."""
        return max(path.stat().st_mtime for path in (self.config_file, self.log_file) if path.is_file())

    def contents(self) -> str:
        """What the run has made so far, one line each with its path."""
        made = {
            "settings": self.config_file,
            "best checkpoint": self.checkpoint,
            "log": self.log_file,
            "warnings": self.warnings_file,
            "TensorBoard": self.logs,
            "report": self.report_file,
            **{path.stem.replace("_", " "): path for path in sorted(self.folder.glob(self.groups_file("*").name))},
            "calibration": self.calibration_file,
            "figures": self.figures,
            "analysis": self.analysis,
            "SavedModel": self.export,
            "profiles": self.profiles,
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
            raise RunError(f"{path} is damaged. Expected texts {names}. {self.train_anew('DATA')}")
        return values

    def train_anew(self, data: str | None = None) -> str:
        """The command that trains a new run of the same settings, of the declaration in the run by default."""
        data = data or quoted(self.folder)
        return f"Train a new run of its settings: mvke train --data {data} --config {quoted(self.config_file)}"

    @property
    def has_data(self) -> bool:
        """Whether the run names its data; one of a comparison's baselines does not."""
        return (self.folder / "data.json").exists()

    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the run learns."""
        if self.config.model.tasks or not self.has_data:
            return self.config.model.tasks
        declared = read_json(self.folder / "dataset.json", RunError).get("tasks", {})
        return tuple(name for name, task in declared.items() if task.get("default", True))

    def log(self) -> History:
        """The rows of log.csv, one per finished epoch; empty if none has finished.

        Raises:
            RunError: If the file is damaged.
        """
        if not self.log_file.is_file():
            return []
        try:
            with open(self.log_file, encoding="utf-8", newline="") as file:
                rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise RunError(f"{self.log_file} is damaged: {error}") from error
        if not all({"epoch", "val_score"} <= row.keys() for row in rows):
            raise RunError(f"{self.log_file} is damaged: it has a row without epoch or val_score")
        return rows

    def report(self) -> Report:
        """What `mvke evaluate` measured, `{split: {task: {metric: value}}}`; empty before.

        Raises:
            RunError: If the file is damaged.
        """
        path = self.report_file
        if not path.is_file():
            return {}
        try:
            report = read_json(path, RunError)
        except RunError as error:
            raise RunError(f"{error} Delete it and evaluate again.") from error
        if not isinstance(report, dict) or not all(isinstance(tasks, dict) for tasks in report.values()):
            raise RunError(f"{path} is no report {{split: {{task: {{metric: value}}}}}}. Delete it and evaluate again.")
        return report

    def state(self) -> str:
        """`"finished"`, `"interrupted"`, `"running (process 12)"`, or `"damaged"`: what stands in it cannot be used."""
        try:
            config, history = self.config, self.log()
        except RunError:
            return "damaged"
        if owner := self.owner():
            return f"running ({owner})"
        if config.model.name in BASELINE_NAMES:
            # Fitted at once, and written with its report.
            return "finished" if self.report_file.is_file() else "damaged"
        has_state = self.state_file.is_file()
        if (history and not self.checkpoint.is_file()) or (has_state and not zipfile.is_zipfile(self.state_file)):
            return "damaged"
        return "finished" if is_finished(history, config.training) else "interrupted"

    def owner(self) -> str:
        """Who trains the run now, as `"process 12"`, on another host with its name; empty if nobody does."""
        try:
            with open(self.folder / ".lock", encoding="utf-8", errors="replace") as file:
                owner, number, is_elsewhere = _owner_of(file.read(256))
                if not owner or is_elsewhere:
                    return owner
                # The number may be that of another process by now.
                return f"process {number}" if process_exists(number) and not try_lock(file) else ""
        except FileNotFoundError:
            return ""

    def clear_temporary(self) -> None:
        """Clears away what a killed process left half-written."""
        for folder in (self.folder.parent, self.folder, self.logs):
            remove_temporary(folder)

    @contextlib.contextmanager
    def lock(self, name: str = ".lock", take_over: bool = False) -> Iterator[None]:
        """Makes this process the only one that trains the run, and clears away what a killed one left half-written.

        A lock ends with its process, however that ends.

        Args:
            name: Of the file.
            take_over: Whether a process of another machine that the file names is known to have ended, where the file
                system does not say that it has not.

        Raises:
            RunError: If another process trains it.
        """
        path = self.folder / name
        with open(path, "a+", encoding="utf-8") as file:
            file.seek(0)
            owner, _, is_elsewhere = _owner_of(file.read(256))
            # The system knows the processes of this host only.
            if not try_lock(file) or (is_elsewhere and not take_over):
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


def best_epoch(history: History) -> int:
    """Index of the epoch with the best validation score, the first of equals."""
    scores = [epoch["val_score"] for epoch in history]
    # As NumPy has it, a score that is not defined is the largest.
    return max(range(len(scores)), key=lambda index: math.inf if math.isnan(scores[index]) else scores[index])


def is_finished(history: History, config: TrainingConfig) -> bool:
    """Whether all epochs are done, or `patience` epochs have passed without a better one."""
    if len(history) >= config.epochs:
        return True
    return bool(config.patience and history) and len(history) - 1 - best_epoch(history) >= config.patience


def list_runs(folder: Path) -> list[RunFolder]:
    """The runs directly in a folder, that whose files changed last first."""
    runs = [RunFolder(path.parent) for path in Path(folder).glob("*/config.json")]
    return sorted(runs, key=RunFolder.changed, reverse=True)


def resume_command(run: RunFolder) -> str:
    """The command line that continues the training of a run."""
    return f"mvke train --resume {quoted(run.folder)}"


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _owner_of(text: str) -> tuple[str, int, bool]:
    """What a lock says: its owner, the number of the process, and whether that is one of another host.

    A process that was killed while it wrote has left a part of it, which says nothing of another host.
    """
    match = re.fullmatch(r"process (\d{1,9}) on (.+)", text.strip())
    if match is None:
        return "", 0, False
    return match[0], int(match[1]), not socket.gethostname().startswith(match[2])


def results_table(report: Report, part: str) -> str:
    """The results on one part as a plain-text table: per task, for all, for known and for new users.

    Args:
        report: As `evaluate_run` returns it.
        part: Its part.

    Raises:
        ConfigError: If the report does not have the part.
    """
    if part not in report:
        raise ConfigError(f"The report has no split {part!r}. It has: {sorted(report)}")
    splits = {
        users: report[split] for users, pattern in USERS.items() if (split := pattern.format(part=part)) in report
    }
    columns = [name for name in _COLUMNS if any(name in metrics for metrics in report[part].values())]
    names = ["task", "users"] if len(splits) > 1 else ["task"]
    cells = [[*names, *(name.replace("_", " ") for name in columns)]]
    for task in report[part]:
        for users, tasks in splits.items():
            # No row of new users, say, is no row of the table, and then known ones are all.
            if task not in tasks:
                continue
            rows, every = (table[task].get("rows") for table in (tasks, report[part]))
            if users == "all" or rows is None or every is None or 0 < rows < every:
                cells.append([*[task, users][: len(names)], *(cell(tasks[task].get(name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if column < len(names) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def cell(value: float | int | None) -> str:
    """A metric as text of a table: four decimals, `-` for one that is not defined."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
