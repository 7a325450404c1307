# SPDX-License-Identifier: Apache-2.0
"""Training: from a dataset and settings to the best checkpoint in a run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mvke_tf.config import BALANCED, RunConfig, TrainingConfig
from mvke_tf.data.batches import Batches, Interactions, Shards
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.groups import groups
from mvke_tf.data.preparation import prepared_dataset, stored
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError, DataError, RunError, missing_modules, require_extra
from mvke_tf.layers import CounterfactualRisk, InBatchSoftmax
from mvke_tf.losses import task_losses
from mvke_tf.models import TwoTowerModel, build_model, check_model, unread_settings, with_uncertainty
from mvke_tf.run import Run
from mvke_tf.run_folder import History, best_epoch, is_finished, resume_command
from mvke_tf.schema import ITEM_SAMPLING, Schema, Task
from mvke_tf.training.callbacks import EpochLine, EpochWatch, RunKeeper
from mvke_tf.training.devices import Devices, Led, chosen_devices, state_of
from mvke_tf.training.fused_adam import FusedAdam
from mvke_tf.training.memory import check_memory, describe_memory, table_memory
from mvke_tf.training.monitoring import MlflowLogger, Monitor
from mvke_tf.training.row_sparse import RowSparseAdam, row_sparse
from mvke_tf.training.task_balance import balanced
from mvke_tf.training.validation import Validation

LOGGER = logging.getLogger(__name__)

# Batches of an epoch below which a learning rate that falls with every epoch may fall before much is learned.
FEW_BATCHES = 100
# What file systems take, less what is added while it is written.
MOST_NAME_BYTES = 200
# Rows of distinct entities are filled up to a multiple, because every new shape costs a compilation.
DISTINCT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training made.

    Args:
        run: Its directory.
        history: One dictionary per epoch.
        best_epoch: Epoch of the best checkpoint, from 1.
        examples_per_second: Median over the epochs trained now, rows of the log per second of training; None if none
            was.
        peak_memory: Most memory the process has held, in bytes; on a GPU also `gpu_peak_memory`. None on Windows, and
            of a training in other processes.
        gpu_peak_memory: Most memory held on the first GPU, in bytes; None without one.
    """

    run: Run
    history: History
    best_epoch: int
    examples_per_second: float | None
    peak_memory: int | None = None
    gpu_peak_memory: int | None = None


def train(
    data: Dataset | PreparedDataset,
    config: RunConfig | None = None,
    run_name: str | None = None,
    runs_dir: Path = Path("runs"),
    data_dir: Path = Path("data"),
    callbacks: Sequence[keras.callbacks.Callback] = (),
    log: Sequence[str] = (),
    devices: int | str = 1,
) -> Result:
    """Prepares the data unless that has been done, makes a run directory and trains in it.

    Args:
        data: A dataset, or what `mvke_tf.data.preparation` has made of one.
        config: All settings; the defaults by default.
        run_name: Name of the run directory; the model and the time by default.
        runs_dir: Where runs are kept.
        data_dir: Where prepared data are kept, unless they are in a folder already.
        callbacks: More callbacks of the training, called when everything of an epoch is on the disk.
        log: Where its numbers go besides its folder: `"mlflow"`, or nowhere.
        devices: How many devices compute each batch together, or `"all"`; several under JAX only.

    Returns:
        What was made; everything else is in the run directory.

    Raises:
        ConfigError: If the settings do not fit the model or the tasks, or there are not so many devices. No run
            directory is left behind.
        MissingExtraError: If MLflow is wanted and not installed. No run directory is left behind.
        DataError: If the data cannot be used. No run directory is left behind.
        RunError: If the run exists.
        TrainingError: If the loss becomes NaN or infinite.
    """
    check_log(log)
    run, training = _new(data, config, run_name, runs_dir, data_dir, devices)
    return _train(run, training, callbacks, log, devices)


def new_run(
    data: Dataset | PreparedDataset,
    config: RunConfig | None = None,
    run_name: str | None = None,
    runs_dir: Path = Path("runs"),
    data_dir: Path = Path("data"),
) -> Run:
    """A new run directory of checked settings and data, to be trained by `train_run` or `train_on_ray`: see `train`."""
    return _new(data, config, run_name, runs_dir, data_dir, 1)[0]


def _new(
    data: Dataset | PreparedDataset,
    config: RunConfig | None,
    run_name: str | None,
    runs_dir: Path,
    data_dir: Path,
    devices: int | str,
) -> tuple[Run, _Training]:
    config = config or RunConfig()
    check_model(config.model.name, len(config.model.tasks) or None)
    folder = _new_folder(Path(runs_dir), run_name, config.model.name)
    if folder.exists():
        # Before hours of preparing.
        raise RunError(f"{folder} exists already, and a run is never overwritten. Choose another --run_name.")
    prepared = data if isinstance(data, PreparedDataset) else prepared_dataset(data, data_dir)
    for note in training_notes(config):
        LOGGER.info("Note: %s", note)
    training = _Training.of(prepared, config, devices)
    return Run.create(folder, config, stored(prepared, data_dir)), training


def _new_folder(runs_dir: Path, name: str | None, model: str) -> Path:
    """The folder of a new run; its name is by default the model and the time."""
    if runs_dir.exists() and not runs_dir.is_dir():
        raise RunError(f"Runs are kept in a folder. Received: {runs_dir}, a file. Choose another --runs_dir.")
    if name is None:
        return runs_dir / f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[^\W_]([\w .,=+@-]*[\w.,=+@-])?", name) or len(os.fsencode(name)) > MOST_NAME_BYTES:
        raise ConfigError(
            "The name of a run is that of one folder: letters, digits and .,=+@-_, the first a letter or a digit. "
            f"Received: {name[:100]!r}. Choose another --run_name; --runs_dir says where the folder lies."
        )
    return runs_dir / name


def train_run(
    run: Run,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    log: Sequence[str] = (),
    devices: int | str = 1,
    take_over: bool = False,
) -> Result:
    """Trains the model of a run, new or interrupted, from its last finished epoch on.

    Args:
        run: A run directory.
        callbacks: As in `train`.
        log: As in `train`; a run that is logged to MLflow stays so.
        devices: As in `train`; with the same number as before, a resumed training ends with the same bits.
        take_over: Whether the process that trained it on another machine is known to have ended.

    Returns:
        What was made; everything else is in the run directory.

    Raises:
        RunError: If the run is damaged, its data are lost, or another process trains it.
        DataError: If the data cannot be used.
        TrainingError: If the loss becomes NaN or infinite.
        KeyboardInterrupt: After Ctrl-C, with the command that continues; nothing is left half-written.
    """
    check_log(log)
    return _train(run, None, callbacks, log, devices, take_over)


def check_log(log: Sequence[str]) -> None:
    """Raises `ConfigError` or `MissingExtraError` unless trainings can be logged there."""
    if unknown := set(log) - {"mlflow"}:
        raise ConfigError(f"Trainings can be logged to 'mlflow'. Received: {sorted(unknown)}")
    if log:
        require_extra("mlflow", "mlflow")


def follow(run: Run) -> None:
    """Trains a run with all other processes of a training, but for the first, which keeps and says everything.

    Args:
        run: The run that `train_run` trains in the first process, with the devices of all.

    Raises:
        TrainingError: If the first process fails.
    """
    _Training.of(run.prepared, run.config, "all").fit(run)


def _train(
    run: Run,
    training: _Training | None,
    callbacks: Sequence[keras.callbacks.Callback],
    log: Sequence[str],
    devices: int | str,
    take_over: bool = False,
) -> Result:
    history = _history(run)
    finished = len(history)
    missing = missing_modules("tensorboard", "tqdm")
    curves = "tensorboard" not in missing
    follow = f"   (follow it: tensorboard --logdir {run.folder.parent})" if curves else ""
    LOGGER.info("Run: %s%s", run.folder, follow)
    for module in missing:
        what = {"tensorboard": "curves for TensorBoard", "tqdm": "progress bars"}[module]
        LOGGER.info("Note: no %s; they need %s: pip install 'mvke_tf[train]'", what, module)
    if is_finished(history, run.config.training) and (not curves or (run.logs / "best").exists()):
        # May be on a disk that is only read.
        run.clear_temporary()
        LOGGER.info("All %d epochs of %s have finished already.", finished, run.folder)
    else:
        with run.lock(take_over=take_over):
            try:
                history = _trained(run, training, callbacks, log, devices)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"Continue with: {resume_command(run)}") from None
    return dataclasses.replace(
        result_of(run, history, finished), peak_memory=_peak_memory(), gpu_peak_memory=_gpu_peak_memory()
    )


def result_of(run: Run, history: History, before: int = 0) -> Result:
    """What a training has made of which so many epochs were there before; without the memory that was used."""
    speeds = [epoch["examples_per_second"] for epoch in history[before:]]
    return Result(run, history, best_epoch(history) + 1, float(np.median(speeds)) if speeds else None)


def _history(run: Run) -> History:
    history = run.history()
    if history and not run.checkpoint.is_file():
        raise run.lost_checkpoint()
    return history


def _trained(
    run: Run,
    training: _Training | None,
    callbacks: Sequence[keras.callbacks.Callback],
    log: Sequence[str],
    devices: int | str,
) -> History:
    """The history of a run that no other process trains, when all its epochs are done."""
    history = _history(run)
    if not is_finished(history, run.config.training):
        return (training or _Training.of(run.prepared, run.config, devices)).fit(run, callbacks, log)
    LOGGER.info("All %d epochs of %s have finished already.", len(history), run.folder)
    _write_best(run, history, run.load_model())
    return history


@dataclasses.dataclass(frozen=True)
class _Training:
    """Data, model and settings, checked and built, before anything is written.

    Args:
        prepared: The data.
        config: All settings.
        schema: Features, and the tasks of the model.
        parts: The training and the validation part.
        batches: Batches of the training part.
        plain: The model to checkpoint.
        model: The compiled model to train, which shares its weights.
        devices: The devices that train together; None for one.
        shared: The compiled model to train on several devices; `model` gets its weights.
    """

    prepared: PreparedDataset
    config: RunConfig
    schema: Schema
    parts: dict[str, Interactions | Shards]
    batches: Batches
    plain: TwoTowerModel
    model: keras.Model
    devices: Devices | None = None
    shared: keras.Model | None = None

    @classmethod
    def of(cls, prepared: PreparedDataset, config: RunConfig, devices: int | str) -> _Training:
        """Sets all seeds, checks the data and builds the model.

        Raises:
            ConfigError: If the settings do not fit the tasks of the data, or there are not so many devices.
            DataError: If there is nothing to learn from.
        """
        set_seed(config.training)
        names = prepared.task_names(config.model.tasks)
        check_model(config.model.name, len(names))
        config.check_tasks(names)
        schema = prepared.schema(names, config.model.objective)
        check_memory(table_memory(schema, config))
        together = chosen_devices(devices, table_memory(schema, config))
        parts = {part: prepared.shards(part, names, config.model.objective) for part in ("train", "validation")}
        _check_parts(prepared.dataset.name, parts, schema.tasks)
        data = parts["train"]
        if config.training.in_batch_weight:
            data = _with_sampling(data, prepared.items.key)
        batches = Batches(
            *(data, config.training.batch_size, config.training.deduplicate, DISTINCT_MULTIPLE),
            *(() if together is None else (len(together), together.own)),
        )
        plain, model = build_training_model(config, schema, batches.steps)
        shared = None
        if together is not None:
            with together.scope():
                shared_plain, shared = build_training_model(config, schema, batches.steps)
            for variable, own in zip(state_of(shared), state_of(model), strict=True):
                variable.assign(keras.ops.convert_to_numpy(own))
            if not together.is_first:
                # Which keeps nothing else.
                plain, model = shared_plain, shared
        return cls(prepared, config, schema, parts, batches, plain, model, together, shared)

    def _megabytes(self) -> tuple[float, float]:
        """Size of the weights alone, and with the state of the optimizer."""
        weights, state = (
            sum(math.prod(variable.shape) for variable in variables) * 4e-6
            for variables in (self.plain.variables, self.model.optimizer.variables)
        )
        return weights, weights + state

    def fit(self, run: Run, callbacks: Sequence[keras.callbacks.Callback] = (), log: Sequence[str] = ()) -> History:
        """Trains from the last finished epoch of the run on, and writes what a finished training ends with.

        Returns:
            The whole history.
        """
        config, model, data = self.config.training, self.shared or self.model, self.parts["train"]
        history, progress = run.restore_state(model), run.progress()
        start = progress.step if progress else 0
        if self.devices is not None and not self.devices.is_first:
            led = Led(self.devices, (), self.model, history, config.checkpoint_steps, self.batches.steps, progress)
            self._fit_epochs(model, history, [led], led)
            return history
        if start:
            LOGGER.info("Continuing %s after batch %s of epoch %d.", run.folder, f"{start:,}", len(history) + 1)
        elif history:
            LOGGER.info("Continuing %s after epoch %d.", run.folder, len(history))
        LOGGER.info("%s", describe_memory(table_memory(self.schema, self.config)))
        LOGGER.info(
            "%s: %s parameters (%.1f MB, with the optimizer %.1f MB), %s training rows in %s batches, %s validation "
            "rows",
            *(self.plain.name, f"{self.plain.count_params():,}", *self._megabytes()),
            *(f"{len(data):,}", f"{self.batches.steps:,}", f"{len(self.parts['validation']):,}"),
        )
        if self.batches.steps * config.learning_rate_decay_epochs < FEW_BATCHES and config.learning_rate_decay < 0.9:
            LOGGER.info(
                "Note: the learning rate falls to %g of itself after every %d batches. If the score soon stands still, "
                "try --learning_rate_decay 0.95.",
                *(config.learning_rate_decay, self.batches.steps * config.learning_rate_decay_epochs),
            )
        if config.gradient_accumulation_steps > self.batches.steps:
            LOGGER.info(
                "Note: gradient_accumulation_steps %d is more than the %d batches of an epoch; some epochs end without "
                "an update.",
                *(config.gradient_accumulation_steps, self.batches.steps),
            )
        weights = loss_weights(self.config, self.schema)
        validation = Validation(self.plain, self.parts["validation"], self.schema.tasks, weights)
        images = config.monitor_images_epochs
        if images and self.plain.gates is not None and missing_modules("matplotlib"):
            LOGGER.info("Note: no heat maps of the gates; they need matplotlib: pip install 'mvke_tf[analysis]'")
            images = 0
        looked_at, pairs = self.prepared, self.parts["validation"]
        if isinstance(pairs, Shards):
            # The gates are looked at on those users that one bucket has.
            looked_at = self.prepared.bucket_with("validation")
            pairs = looked_at.part("validation", self.schema.task_names, self.config.model.objective)
        monitor = Monitor(
            None if missing_modules("tensorboard") else run.logs,
            self.plain,
            pairs,
            groups(looked_at) if images and self.plain.gates is not None else (),
            images,
            run.warnings_file,
            known=progress.known if progress else None,
        )
        keeper = RunKeeper(run, self.plain, history, self.batches.steps, monitor, progress)
        every = [
            *(EpochWatch(run, config, len(data), validation, start), monitor, keeper),
            *(EpochLine(self.batches.steps, history, start), *callbacks),
        ]
        tracker = MlflowLogger(run) if log or run.mlflow_file.is_file() else None
        if tracker is not None:
            tracker.catch_up(history)
            every.append(tracker)
        if self.devices is not None:
            LOGGER.info("%s", self.devices.describe())
            steps = config.checkpoint_steps, self.batches.steps
            every = [Led(self.devices, every, self.model, history, *steps, progress)]
        status = "FAILED"
        try:
            self._fit_epochs(model, history, every, keeper)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            monitor.close()
            if tracker is not None:
                tracker.close(status)
        if best_epoch(history) + 1 < len(history):
            # The weights are those of the last epoch.
            self.plain.load_weights(run.checkpoint)
        _write_best(run, history, self.plain)
        return history

    def _fit_epochs(
        self, model: keras.Model, history: History, callbacks: list[keras.callbacks.Callback], keeper: RunKeeper | Led
    ) -> None:
        config = self.config.training
        with contextlib.nullcontext() if self.devices is None else self.devices.scope():
            # One call per epoch, whose data end with it: steps_per_execution would read on into the next one otherwise.
            while not is_finished(history, config):
                model.fit(
                    self.batches.epoch(config.seed, len(history), keeper.start),
                    epochs=config.epochs,
                    initial_epoch=len(history),
                    shuffle=False,
                    verbose=0,
                    callbacks=callbacks,
                )


def _check_parts(name: str, parts: dict[str, Interactions | Shards], tasks: tuple[Task, ...]) -> None:
    """Raises `DataError` unless there is something to learn from, in every task, and something to validate on."""
    for part, data in parts.items():
        if not len(data):
            raise DataError(
                f"The {part} part of {name} has no row. Change [split] so that it gets some, or add rows to the log."
            )
    for part, data in parts.items():
        counting: set[str] = set()
        for piece in data.pieces():
            piece.check_labels(tasks)
            counting |= {
                task.name for task in tasks if task.name not in piece.weights or np.any(piece.weights[task.name] > 0)
            }
        empty = [task.name for task in tasks if task.name not in counting]
        if len(empty) == len(tasks) or (empty and part == "train"):
            raise DataError(
                f"No row of the {part} part of {name} counts for the tasks {empty}: each has no label, or a weight of "
                "0. Change their label, `where` or weight, or leave them out with --tasks."
            )


def set_seed(config: TrainingConfig) -> None:
    """Makes everything that follows in this process depend on the seed; if `deterministic`, to the last bit."""
    keras.utils.set_random_seed(config.seed)
    if config.deterministic and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def training_notes(config: RunConfig) -> Iterator[str]:
    """What the settings say without effect."""
    unread = unread_settings(config.model)
    if unread:
        yield f"{config.model.name} does not read {', '.join(unread)}; this has no influence."
    if config.training.optimizer == "adam" and config.training.weight_decay != TrainingConfig().weight_decay:
        yield "adam does not read weight_decay; adamw does."
    if config.model.gate_top_k == 1 and "gate_top_k" not in unread:
        yield "with gate_top_k 1 the kept weight is always 1, so that only load_balancing_weight trains the gates."


def build_training_model(config: RunConfig, schema: Schema, steps_per_epoch: int) -> tuple[TwoTowerModel, keras.Model]:
    """The model to checkpoint, and the compiled model to train, which share their weights.

    The first stays uncompiled, so that checkpoints are free of optimizer state.

    Args:
        config: All settings.
        schema: The schema of the data with the tasks of the model.
        steps_per_epoch: Batches per epoch.
    """
    with _dtype_policy(config.training.precision):
        plain = build_model(config.model.name, schema, config.model)
        if config.training.loss_weighting == "uncertainty":
            plain = with_uncertainty(plain)
        model = plain.training_model(
            config.training.deduplicate, risk=_risk(config.training, plain), softmax=_softmax(config.training, plain)
        )
        tables: list[str] = []
        if config.training.loss_weighting in BALANCED:
            _check_balanced(config.training.loss_weighting, plain.kinds)
            model = balanced(model, config.training.loss_weighting, config.training.seed)
        elif config.training.embedding_optimizer != "same":
            model, tables = row_sparse(model, schema)
        compile_model(model, plain.kinds, config.training, steps_per_epoch, loss_weights(config, schema), tables)
    return plain, model


def _risk(config: TrainingConfig, plain: TwoTowerModel) -> Callable[[str, str], CounterfactualRisk] | None:
    """What makes the layer of a task's counterfactual risk, if one is wanted.

    Raises:
        ConfigError: If no task has one.
    """
    if config.counterfactual == "none":
        return None
    if not any(task.given and task.objective == "joint" for task in plain.schema_tasks):
        raise ConfigError(
            f"counterfactual={config.counterfactual!r} needs a task with an event before it (`given`) and the "
            f"objective 'joint'. Received: the tasks {list(plain.task_names)} without one"
        )

    def make(task: str, given: str) -> CounterfactualRisk:
        return CounterfactualRisk(
            *(task, given, config.counterfactual, config.counterfactual_weight, config.max_inverse_propensity),
            name=f"counterfactual_{task}",
        )

    return make


def _softmax(config: TrainingConfig, plain: TwoTowerModel) -> Callable[[str], InBatchSoftmax] | None:
    """What makes the layer of a task's softmax over the items of a batch, if one is wanted.

    Raises:
        ConfigError: If no task has one.
    """
    if not config.in_batch_weight:
        return None
    if not any(kind == "binary" and task not in plain.given for task, kind in plain.kinds.items()):
        raise ConfigError(
            "in_batch_weight needs a binary task without an event before it. Received: the tasks "
            f"{list(plain.task_names)} without one"
        )
    return lambda task: InBatchSoftmax(task, config.in_batch_weight, name=f"in_batch_{task}")


def _with_sampling(data: Interactions | Shards, key: np.ndarray) -> Interactions | Shards:
    """With what `InBatchSoftmax` reads of each item, whose keys are given by row of the items."""
    _, number = np.unique(key, return_inverse=True)
    counts = np.zeros(number.max() + 1, np.int64)
    for piece in data.pieces():
        counts += np.bincount(number[piece.item_rows], minlength=len(counts))
    # Of an item without a training row nothing is read.
    shares = np.log(np.maximum(counts, 1) / len(data))
    column = np.stack([shares[number], number], axis=-1).astype(np.float32)

    def with_column(piece: Interactions) -> Interactions:
        return dataclasses.replace(piece, items={**piece.items, ITEM_SAMPLING: column})

    return data.map(with_column) if isinstance(data, Shards) else with_column(data)


def _check_balanced(method: str, kinds: dict[str, str]) -> None:
    """Raises `ConfigError` if a method cannot balance tasks of these kinds."""
    if len(kinds) < 2:
        raise ConfigError(f"loss_weighting={method!r} balances two tasks or more. Received: {list(kinds)}")
    counts = [task for task, kind in kinds.items() if kind == "count"]
    if method != "pcgrad" and counts:
        raise ConfigError(
            f"loss_weighting={method!r} compares losses by their ratios, and that of a count task may be negative; "
            f"choose 'pcgrad', 'uncertainty' or 'fixed'. Received: the count tasks {counts}"
        )


def loss_weights(config: RunConfig, schema: Schema) -> dict[str, float] | None:
    """`{task: weight of its loss}`, whose order in the settings is that of their tasks; None if all are 1."""
    weights = config.training.task_weights
    return dict(zip(config.model.tasks or schema.task_names, weights, strict=True)) if weights else None


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Layers made inside have this dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def compile_model(
    model: keras.Model,
    kinds: dict[str, str],
    config: TrainingConfig,
    steps_per_epoch: int,
    weights: dict[str, float] | None = None,
    tables: Sequence[str] = (),
) -> None:
    """Compiles a model of `{task: output}`: optimizer, and a loss per kind of task.

    Losses are means over the rows that have a weight in their task. Metrics of training batches, whose weights change
    from step to step, are left out: exact ones are measured on the validation part after each epoch.

    Args:
        model: A model of `TwoTowerModel.training_model`.
        kinds: `{task: "binary" or "regression"}`.
        config: Settings; `task_weights` is not read.
        steps_per_epoch: Batches per epoch.
        weights: Weight of the loss of each task; 1 each by default.
        tables: Paths of the variables that `embedding_optimizer` updates, of a model of `row_sparse`.

    Raises:
        ConfigError: If XLA is wanted and cannot be had in this process.
    """
    model.compile(
        optimizer=build_optimizer(config, steps_per_epoch, tables),
        loss=task_losses(kinds),
        loss_weights=weights,
        steps_per_execution=config.steps_per_execution,
        jit_compile=True if config.xla else "auto" if keras.backend.backend() == "jax" else False,
    )
    make_step_variables(model)
    if config.xla and not model.jit_compile:
        raise ConfigError(
            "XLA cannot compile this training: an earlier one of this process has switched determinism on, which "
            "cannot be undone, or a layer does not allow it. Train in a new process. Received: xla=True"
        )


def make_step_variables(model: keras.Model) -> None:
    """Makes the variables of the optimizer and of the losses: TensorFlow traces a step twice that makes its own."""
    model.optimizer.build(model.trainable_variables)
    labels = {name: keras.ops.zeros((1, 1)) for name in model.output}
    outputs = {name: keras.ops.zeros((1, *output.shape[1:])) for name, output in model.output.items()}
    model.compute_loss(y=labels, y_pred=outputs)
    model.reset_metrics()


def build_optimizer(
    config: TrainingConfig, steps_per_epoch: int, tables: Sequence[str] = ()
) -> keras.optimizers.Optimizer:
    """The optimizer of these settings; its learning rate falls in steps of whole epochs of so many batches.

    Args:
        config: Settings.
        steps_per_epoch: Batches per epoch.
        tables: Paths of the variables that `embedding_optimizer` updates row by row.
    """
    batches = steps_per_epoch * config.learning_rate_decay_epochs
    settings: dict[str, Any] = {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(
            config.learning_rate, batches, config.learning_rate_decay, staircase=True
        ),
        "global_clipnorm": config.global_clipnorm or None,
    }
    if config.optimizer == "adamw":
        settings["weight_decay"] = config.weight_decay
    if tables:
        rate = (config.embedding_learning_rate or config.learning_rate) / config.learning_rate
        optimizer = RowSparseAdam(tables, config.embedding_optimizer, rate, **settings)
    else:
        if config.gradient_accumulation_steps > 1:
            settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        optimizer = FusedAdam(name=config.optimizer, **settings)
    if config.optimizer == "adamw":
        # Decay would pull the learned weights of the tasks towards 1.
        optimizer.exclude_from_weight_decay(var_names=["log_variances"])
    return optimizer


def _write_best(run: Run, history: History, model: TwoTowerModel) -> None:
    """Hyperparameters, metrics and item vectors of the best epoch, whose weights `model` has, for TensorBoard."""
    if missing_modules("tensorboard"):
        return
    from mvke_tf.training.monitoring.plugins import write_best

    best = best_epoch(history)
    metrics = {name: value for name, value in history[best].items() if name.startswith("val_")}
    speed = float(np.median([epoch["examples_per_second"] for epoch in history]))
    write_best(
        run.logs / "best",
        run.folder.resolve().name,
        run.config,
        {**metrics, "epoch": best + 1, "examples_per_second": speed},
        best,
        model,
        run.prepared,
    )


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:
        # Windows.
        return None
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gpu_peak_memory() -> int | None:
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]
