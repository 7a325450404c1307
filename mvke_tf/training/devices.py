# SPDX-License-Identifier: Apache-2.0
"""Training on several devices, of one process or of many, under JAX.

Every device computes its slice of each batch, and holds all weights but those of large embedding tables, of which it
holds a share of the rows, or of each row. What a training keeps and says is the work of the first process, on a model
of its own, which lies on one device.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from mvke_tf.errors import ConfigError, TrainingError
from mvke_tf.run import Progress
from mvke_tf.run_folder import History
from mvke_tf.training.callbacks import is_due
from mvke_tf.training.memory import TableMemory

# Bytes of an embedding table from which on devices share it. Smaller tables are held by each.
SHARED_BYTES = 1 << 22
# Room for the metrics of an epoch, which all processes get from the first one.
_EPOCH_BYTES = 1 << 16


def chosen_devices(wanted: int | str, tables: Sequence[TableMemory]) -> Devices | None:
    """The devices of a training; None if it is one, on which nothing has to be shared.

    Args:
        wanted: How many, or `"all"`; of several processes always all.
        tables: The embedding tables of the model.

    Raises:
        ConfigError: If there are fewer, or the backend is TensorFlow.
    """
    if wanted != "all" and int(wanted) < 1:
        raise ConfigError(f"Expected one device or more, or 'all'. Received: {wanted}")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        found = max(1, len(tf.config.list_physical_devices("GPU")))
        if (found if wanted == "all" else int(wanted)) > 1:
            raise ConfigError(
                f"Several devices train under JAX only. Received: devices {wanted}, of {found}, under TensorFlow. Set "
                "the environment variable KERAS_BACKEND=jax; checkpoints are the same."
            )
        return None
    import jax

    every = jax.devices()
    number = len(every) if wanted == "all" or jax.process_count() > 1 else int(wanted)
    if number > len(every):
        raise ConfigError(
            f"There are {len(every)} devices ({every[0].platform}). Received: {number}. Ask for at most as many, or "
            "for all; on a CPU the environment variable JAX_NUM_CPU_DEVICES says how many there are."
        )
    return Devices(every[:number], tables) if number > 1 else None


class Devices:
    """Devices that train one model together.

    Args:
        devices: Those of JAX, of all processes.
        tables: The embedding tables of the model. Devices share those of `SHARED_BYTES` or more: the rows where their
            number is a multiple of that of the devices, else the columns where that of these is.
    """

    def __init__(self, devices: Sequence[Any], tables: Sequence[TableMemory]) -> None:
        import jax

        self._number = len(devices)
        local = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
        if local != list(range(local[0], local[-1] + 1)):
            raise ConfigError(f"Expected the devices of a process to follow each other. Received: {devices}")
        self.own = range(local[0], local[-1] + 1)
        self.is_first, self._alone = jax.process_index() == 0, jax.process_count() == 1
        names = [f"{device.platform}:{device.id}" for device in devices]
        mesh = keras.distribution.DeviceMesh((len(names),), ("batch",), names)
        layout = keras.distribution.LayoutMap(mesh)
        self._held: dict[str, list[str]] = {}
        for table in tables:
            if table.weights >= SHARED_BYTES:
                split = "rows" if table.rows % len(names) == 0 else "columns" if table.width % len(names) == 0 else ""
                self._held.setdefault(split, []).append(table.name)
                if split:
                    axes = ("batch", None) if split == "rows" else (None, "batch")
                    layout[rf"embedding_{re.escape(table.name)}/embeddings"] = axes
        self._distribution = keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
        )

    def __len__(self) -> int:
        return self._number

    def describe(self) -> str:
        """What lies where, in lines."""
        import jax

        kind, processes = self._distribution.device_mesh.devices.flat[0].partition(":")[0], jax.process_count()
        lines = [f"{len(self)} devices ({kind}), of {processes} process{'es' * (processes > 1)}, share each batch."]
        for split, names in self._held.items():
            shared = f"They share the {split} of the tables of" if split else "Each holds the whole tables of"
            lines.append(f"{shared} {', '.join(names)}.")
        return "\n".join(lines)

    def scope(self) -> Any:
        """Variables that are made meanwhile, and batches that are read, lie on these devices."""
        return self._distribution.scope()

    def arrays(self, variables: Sequence[keras.Variable]) -> Iterator[np.ndarray]:
        """The values of variables, each whole; all processes have to ask."""
        from jax.experimental import multihost_utils

        for variable in variables:
            value = variable.value
            if not value.is_fully_addressable and not value.is_fully_replicated:
                value = multihost_utils.process_allgather(value, tiled=True)
            yield np.asarray(value)

    def from_first(self, message: str) -> str:
        """What the first process says, in all of them."""
        if self._alone:
            return message
        from jax.experimental import multihost_utils

        sent = np.zeros(_EPOCH_BYTES, np.uint8)
        text = message.encode()
        sent[: len(text)] = np.frombuffer(text, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes().rstrip(b"\0").decode()


def state_of(model: keras.Model) -> list[keras.Variable]:
    """All variables of a compiled model: weights, seeds, those of optimizer and metrics."""
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]


class Led(keras.callbacks.Callback):
    """Lets the first of several processes keep and say what a training of one does; the others learn how it went.

    Args:
        devices: The devices.
        callbacks: Callbacks of a training on one device, the last of which keeps the run; none in other processes.
        kept: The compiled model that these are given, on one device; it gets the state of the one in training.
        history: The epochs that have finished; those to come are added.
        every, steps: The steps after which the state is kept, see `is_due`, and those of an epoch.
        progress: How far the next epoch has come.
    """

    def __init__(
        self,
        devices: Devices,
        callbacks: Sequence[keras.callbacks.Callback],
        kept: keras.Model,
        history: History,
        every: int,
        steps: int,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._devices, self._callbacks, self._kept, self._history = devices, callbacks, kept, history
        self._every, self._steps, self._progress = every, steps, progress
        self.start = self._last = progress.step if progress else 0
        self._has_begun = False

    def set_params(self, params):
        super().set_params(params)
        for callback in self._callbacks:
            callback.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        for callback in self._callbacks:
            callback.set_model(self._kept)

    def _call(self, name: str, *arguments: Any) -> None:
        with _without_distribution():
            for callback in self._callbacks:
                getattr(callback, name)(*arguments)

    def _copy(self) -> None:
        self.model.jax_state_sync()
        arrays = self._devices.arrays(state_of(self.model))
        for array, variable in zip(arrays, state_of(self._kept), strict=True):
            if self._devices.is_first:
                variable.assign(array)

    def on_train_begin(self, logs=None):
        if not self._has_begun:
            # What is continued: curves and warnings begin with its learning rate and its gates.
            self._has_begun = True
            self._copy()
        self._call("on_train_begin", logs)

    def on_train_end(self, logs=None):
        self._call("on_train_end", logs)

    def on_epoch_begin(self, epoch, logs=None):
        if self._progress is not None:
            # `fit` has set them to zero.
            for variable, value in zip(self.model.metrics_variables, self._progress.sums, strict=True):
                variable.assign(value)
            self._progress = None
        self._call("on_epoch_begin", epoch, logs)

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["loss"])
        if not self._devices.is_first and not math.isfinite(loss):
            raise TrainingError(f"The loss became {loss}, which the first process reports.")
        step = self.start + batch + 1
        # The first process, too, ends at a loss that is not finite: nobody would join it in copying.
        if math.isfinite(loss) and is_due(step, self._last, self._every, self._steps):
            self._last = step
            self._copy()
        self._call("on_train_batch_end", batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        self._copy()
        failed: Exception | None = None
        try:
            self._call("on_epoch_end", epoch, logs)
        except Exception as error:
            failed = error
        finished = self._history[-1] if self._devices.is_first and failed is None else None
        finished = json.loads(self._devices.from_first(json.dumps(finished)))
        if failed is not None:
            raise failed
        if finished is None:
            raise TrainingError("The first process of this training has failed; it says why.")
        if not self._devices.is_first:
            self._history.append(finished)
        self.start = self._last = 0
        # The data are those of one epoch.
        self.model.stop_training = True


@contextlib.contextmanager
def _without_distribution() -> Iterator[None]:
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)
