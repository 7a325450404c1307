"""The callback that follows a training."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
from tensorboard.plugins.text.summary_v2 import text_pb

from mvke_tf.data.dataset import PairData
from mvke_tf.data.groups import Grouping
from mvke_tf.files import written_whole
from mvke_tf.gate_statistics import COLLAPSED_WEIGHT, DEAD_WEIGHT
from mvke_tf.losses import uncertainty_layer, uncertainty_weight
from mvke_tf.models.two_tower import gated_tasks, task_kinds
from mvke_tf.monitoring.events import EventFolder
from mvke_tf.monitoring.gates import GateUse, GateView, gate_events, heat_map

LOGGER = logging.getLogger("mvke_tf.monitoring")


class Monitor(keras.callbacks.Callback):
    """Writes to a folder of TensorBoard what a training does, and warns when a gate collapses or an expert dies.

    It draws no random number and changes no variable. When `on_epoch_end` returns, everything of that epoch is on the
    disk; a training that goes on at an epoch replaces what an interrupted one left of it. Call `close` at the end.

    Args:
        folder: The TensorBoard folder of one run.
        model: The two-tower model that is trained, which shares its weights with the model that `fit` is called on.
        data: Pairs on which the gates are looked at; without them, or without gates, there is nothing about gates.
        groups: Groups of items or users: one heat map per task and variable.
        images_epochs: Epochs from one heat map to the next, the first after epoch 1; 0 draws none.
        warnings_file: A text file with one line per warning, kept in step with the epochs; none by default.
        report: Receives a line per warning; by default Python's logging, logger `mvke_tf.monitoring`.
        collapsed_weight: See `gate_events`.
        dead_weight: See `gate_events`.
    """

    def __init__(
        self,
        folder: Path,
        model: keras.Model,
        data: PairData | None = None,
        groups: Sequence[Grouping] = (),
        images_epochs: int = 5,
        warnings_file: Path | None = None,
        report: Callable[[str], object] = LOGGER.warning,
        collapsed_weight: float = COLLAPSED_WEIGHT,
        dead_weight: float = DEAD_WEIGHT,
    ) -> None:
        super().__init__()
        self.folder, self.best = Path(folder), Path(folder) / "best"
        self.images_epochs, self.warnings_file, self.report = images_epochs, warnings_file, report
        self._kinds = task_kinds(model)
        self._gates = GateView(model, data, groups) if data is not None and gated_tasks(model) else None
        self._thresholds = collapsed_weight, dead_weight
        self._folders: dict[str, EventFolder] = {}
        self._known: set[tuple[str, int | None]] = set()
        self._warnings: list[str] = []
        self._learning_rate = float("nan")

    def on_epoch_begin(self, epoch, logs=None):
        if not self._folders:
            self._start(epoch)
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        # Now, because at the end it is that of the next epoch.
        self._learning_rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))

    def _start(self, epoch: int) -> None:
        self._folders = {name: EventFolder(self.folder / name, epoch) for name in ("train", "validation")}
        if self.best.exists():
            # Of a training that ended earlier.
            shutil.rmtree(self.best)
        if self.warnings_file is not None and self.warnings_file.is_file():
            lines = self.warnings_file.read_text(encoding="utf-8").splitlines()
            # Those of an epoch that did not finish come again.
            self._write_warnings([line for line in lines if int(line.split(":")[0].removeprefix("epoch ")) <= epoch])
        if epoch and self._gates:
            # Was said before the interruption.
            self._known = set(gate_events(self._gates.look(), *self._thresholds))

    def _write_warnings(self, lines: list[str]) -> None:
        self._warnings = lines
        if self.warnings_file is not None:
            with written_whole(self.warnings_file) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def on_epoch_end(self, epoch, logs=None):
        train = {f"epoch_{name}": value for name, value in logs.items() if not name.startswith("val_")}
        train["epoch_learning_rate"] = self._learning_rate
        uncertainty = uncertainty_layer(self.model)
        if uncertainty is not None:
            for task, value in uncertainty.by_task().items():
                train[f"epoch_log_variance_{task}"] = float(value)
                train[f"epoch_loss_weight_{task}"] = float(uncertainty_weight(value, self._kinds[task]))
        self._folders["train"].scalars(train, epoch)
        validation = {f"epoch_{name[4:]}": value for name, value in logs.items() if name.startswith("val_")}
        self._folders["validation"].scalars(validation, epoch)
        if self._gates:
            self._write_gates(self._gates, epoch)
        for folder in self._folders.values():
            folder.flush()

    def _write_gates(self, gates: GateView, epoch: int) -> None:
        uses = gates.look()
        folder = self._folders["validation"]
        for task, use in uses.items():
            folder.scalars({f"gate_{task}/{name}": value for name, value in use.scalars().items()}, epoch)
        if self.images_epochs and epoch % self.images_epochs == 0:
            self._write_images(gates, uses, epoch)
        events = gate_events(uses, *self._thresholds)
        new = [text for key, text in events.items() if key not in self._known]
        self._known = set(events)
        if not new:
            return
        folder.add(text_pb("gates/warnings", "\n\n".join(f"After epoch {epoch + 1}, {text}" for text in new)), epoch)
        self._write_warnings([*self._warnings, *(f"epoch {epoch + 1}: {text}" for text in new)])
        for text in new:
            self.report(f"Warning: after epoch {epoch + 1}, {text}")

    def _write_images(self, gates: GateView, uses: Mapping[str, GateUse], epoch: int) -> None:
        for task, use in uses.items():
            for group in gates.groups:
                png = heat_map(task, use, group, *gates.by_group(use, group.variable), epoch)
                self._folders["validation"].image(f"gate_{task}/by_{group.variable}", png, epoch)

    def close(self) -> None:
        """Closes the files."""
        for folder in self._folders.values():
            folder.close()
        self._folders = {}
