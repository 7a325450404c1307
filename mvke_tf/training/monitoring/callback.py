# SPDX-License-Identifier: Apache-2.0
"""The callback that follows a training."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import keras

from mvke_tf.data.batches import Interactions
from mvke_tf.data.groups import Grouping
from mvke_tf.errors import RunError
from mvke_tf.inference.gates import GateUse, GateView, Thresholds
from mvke_tf.io import atomic_write
from mvke_tf.losses import uncertainty_weight
from mvke_tf.models import TwoTowerModel
from mvke_tf.training.monitoring.gates import MOST_ENTITIES, gate_events, heat_map

if TYPE_CHECKING:
    from mvke_tf.training.monitoring.events import EventFolder

LOGGER = logging.getLogger(__name__)
# Columns of the log that are about the training itself, and not about what the model has learned.
OF_TRAINING = ("examples_per_second", "log_variance_")


class Monitor(keras.callbacks.Callback):
    """Writes to a folder of TensorBoard what a training does, and warns when a gate collapses or an expert dies.

    It draws no random number and changes no variable. When `on_epoch_end` returns, everything of that epoch is on the
    disk; a training that goes on at an epoch replaces what an interrupted one left of it. Call `close` at the end.

    Args:
        folder: The TensorBoard folder of one run; without one there are no curves, only warnings.
        model: The two-tower model that is trained, which shares its weights with the model that `fit` is called on.
        data: Interactions on which the gates are looked at; without them, or without gates, there is nothing about
            gates.
        groups: Groups of items or users: one heat map per task and variable.
        images_epochs: Epochs from one heat map to the next, the first after epoch 1; 0 draws none.
        warnings_file: A text file with one line per warning, kept in step with the epochs; none by default.
        thresholds: Where a gate counts as collapsed and an expert as dead.
        known: What has been said of gates already; by default what is true of them when a later epoch begins.
    """

    def __init__(
        self,
        folder: Path | None,
        model: TwoTowerModel,
        data: Interactions | None = None,
        groups: Sequence[Grouping] = (),
        images_epochs: int = 5,
        warnings_file: Path | None = None,
        thresholds: Thresholds | None = None,
        known: Sequence[tuple[str, int | None]] | None = None,
    ) -> None:
        super().__init__()
        self.folder = None if folder is None else Path(folder)
        self.images_epochs, self.warnings_file = images_epochs, warnings_file
        self._trained, self._thresholds = model, thresholds
        self._gates = None
        if data is not None and model.gate_side is not None:
            self._gates = GateView(model, data, groups, MOST_ENTITIES[model.gate_side])
        self._started = False
        self._folders: dict[str, EventFolder] = {}
        self._known: set[tuple[str, int | None]] | None = None if known is None else set(known)
        self._warnings: list[str] = []
        self._learning_rate = float("nan")

    def on_epoch_begin(self, epoch, logs=None):
        if not self._started:
            self._start(epoch)
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        # Now, because at the end it is that of the next epoch.
        self._learning_rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))

    def _start(self, epoch: int) -> None:
        warnings = self._read_warnings(epoch)
        self._started = True
        if self.folder is not None:
            from mvke_tf.training.monitoring.events import EventFolder

            self._folders = {name: EventFolder(self.folder / name, epoch) for name in ("train", "validation")}
            if (self.folder / "best").exists():
                # Of a training that ended earlier.
                shutil.rmtree(self.folder / "best")
        if warnings is not None:
            self._write_warnings(warnings)
        if self._known is None:
            # Was said before the interruption.
            said = gate_events(self._gates.look(), self._thresholds) if epoch and self._gates else ()
            self._known = set(said)

    @property
    def known(self) -> list[tuple[str, int | None]]:
        """What has been said of gates that is still true: `(task, dead expert, or None for a collapsed gate)`."""
        return sorted(self._known or (), key=str)

    def _read_warnings(self, epoch: int) -> list[str] | None:
        """The lines of the epochs before; those of an epoch that did not finish come again."""
        path = self.warnings_file
        if path is None or not path.is_file():
            return None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept: list[str] = []
        for number, line in enumerate(lines, start=1):
            match = re.match(r"epoch (\d{1,9}): ", line)
            if match is None:
                raise RunError(
                    f"{path}, line {number}, is not of a training. Expected lines such as 'epoch 3: ...'. "
                    "Delete the file, in which nothing is that resuming needs, and resume again."
                )
            if int(match[1]) <= epoch:
                kept.append(line)
        return kept

    def _write_warnings(self, lines: list[str]) -> None:
        self._warnings = lines
        if self.warnings_file is not None:
            with atomic_write(self.warnings_file) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def on_epoch_end(self, epoch, logs=None):
        uses = self._gates.look() if self._gates else {}
        if self._folders:
            self._write_curves(logs or {}, uses, epoch)
        events = gate_events(uses, self._thresholds)
        new = [text for key, text in events.items() if key not in (self._known or ())]
        self._known = set(events)
        if new:
            self._write_warnings([*self._warnings, *(f"epoch {epoch + 1}: {text}" for text in new)])
        for text in new:
            LOGGER.warning("After epoch %d, %s", epoch + 1, text)
        for folder in self._folders.values():
            if new and folder is self._folders["validation"]:
                lines = "\n\n".join(f"After epoch {epoch + 1}, {text}" for text in new)
                folder.text("gates/warnings", lines, epoch)
            folder.flush()

    def _write_curves(self, logs: Mapping[str, float], uses: Mapping[str, GateUse], epoch: int) -> None:
        train: dict[str, float] = {}
        validation: dict[str, float] = {}
        for name, value in logs.items():
            if name.startswith("val_"):
                validation[f"epoch_{name[4:]}"] = value
            else:
                train[f"training/{name}" if name.startswith(OF_TRAINING) else f"epoch_{name}"] = value
        train["training/learning_rate"] = self._learning_rate
        log_variances = self._trained.log_variances
        if log_variances is not None:
            for task, value in log_variances.by_task().items():
                weight = uncertainty_weight(value, self._trained.kinds[task])
                train[f"training/loss_weight_{task}"] = float(weight)
        self._folders["train"].scalars(train, epoch)
        folder = self._folders["validation"]
        folder.scalars(validation, epoch)
        for task, use in uses.items():
            folder.scalars({f"gate_{task}/{name}": value for name, value in use.scalars().items()}, epoch)
        if self._gates and self.images_epochs and epoch % self.images_epochs == 0:
            self._write_images(self._gates, uses, epoch)

    def _write_images(self, gates: GateView, uses: Mapping[str, GateUse], epoch: int) -> None:
        for task, use in uses.items():
            for group in gates.groups:
                png = heat_map(use, group, *gates.by_group(use, group.variable), epoch)
                self._folders["validation"].image(f"gate_{task}/by_{group.variable}", png, epoch)

    def close(self) -> None:
        """Closes the files."""
        for folder in self._folders.values():
            folder.close()
        self._folders, self._started = {}, False
