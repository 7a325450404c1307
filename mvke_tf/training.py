"""Training: from a run directory with settings and data to its best checkpoint."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mvke_tf.config import RunConfig, TrainingConfig
from mvke_tf.data.dataset import Batches
from mvke_tf.data.groups import movielens_groups
from mvke_tf.data.prepared import Prepared, prepare_movielens
from mvke_tf.losses import task_losses, uncertainty_layer, with_uncertainty
from mvke_tf.models import build_model, check_model, unread_settings
from mvke_tf.models.two_tower import task_kinds, training_model
from mvke_tf.monitoring import Monitor, item_columns, write_best
from mvke_tf.run import History, Run
from mvke_tf.schema import Schema

EVALUATION_BATCH = 4096
# Rows of distinct entities are filled up to a multiple, because every new shape costs a compilation.
DISTINCT_MULTIPLE = 64


class TrainingError(ValueError):
    """Training that cannot go on; the message says where, and what is kept."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training made.

    Args:
        run: Its directory.
        history: One dictionary per epoch.
        best_epoch: Epoch of the best checkpoint, from 1.
        rows_per_second: Median over the epochs trained now, pairs per second of training; None if none was.
        peak_memory: Most memory the process has held, in bytes; on a GPU also `gpu_peak_memory`.
        gpu_peak_memory: Most memory held on the first GPU, in bytes; None without one.
    """

    run: Run
    history: History
    best_epoch: int
    rows_per_second: float | None
    peak_memory: int
    gpu_peak_memory: int | None


def set_seed(config: TrainingConfig) -> None:
    """Makes everything that follows in this process depend on the seed; if `deterministic`, to the last bit."""
    keras.utils.set_random_seed(config.seed)
    if config.deterministic and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def build_optimizer(config: TrainingConfig, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    """The optimizer of these settings; its learning rate falls in steps of whole epochs of so many batches."""
    batches = steps_per_epoch * config.learning_rate_decay_epochs
    settings: dict[str, Any] = {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(
            config.learning_rate, batches, config.learning_rate_decay, staircase=True
        ),
        "global_clipnorm": config.clipnorm or None,
        "gradient_accumulation_steps": config.accumulation_steps if config.accumulation_steps > 1 else None,
    }
    if config.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(weight_decay=config.weight_decay, **settings)
        # Decay would pull the learned weights of the tasks towards 1.
        optimizer.exclude_from_weight_decay(var_names=["log_variances"])
        return optimizer
    return keras.optimizers.Adam(**settings)


def compile_model(model: keras.Model, kinds: dict[str, str], config: TrainingConfig, steps_per_epoch: int) -> None:
    """Compiles a model of `{task: output}`: optimizer, loss per kind of task, AUC or RMSE and MAE per task.

    Losses and metrics are means over the rows that have a weight in their task.

    Args:
        model: A model of `mvke_tf.models.two_tower.training_model`.
        kinds: `{task: "binary" or "regression"}`.
        config: Settings.
        steps_per_epoch: Batches per epoch.
    """

    def metrics(kind: str) -> list[keras.metrics.Metric]:
        if kind == "binary":
            return [keras.metrics.AUC(from_logits=True, name="auc")]
        return [keras.metrics.RootMeanSquaredError(name="rmse"), keras.metrics.MeanAbsoluteError(name="mae")]

    model.compile(
        optimizer=build_optimizer(config, steps_per_epoch),
        loss=task_losses(model, kinds),
        loss_weights=dict(zip(kinds, config.task_weights, strict=True)) if config.task_weights else None,
        weighted_metrics={task: metrics(kind) for task, kind in kinds.items()},
        steps_per_execution=config.steps_per_execution,
        jit_compile=True if config.xla else "auto" if keras.backend.backend() == "jax" else False,
    )
    if config.xla and not model.jit_compile:
        raise ValueError(
            "XLA cannot compile this training: an earlier one of this process has switched determinism on, which "
            "cannot be undone, or a layer does not allow it. Train in a new process. Received: xla=True"
        )


@contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Layers made inside have this dtype policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def build_training_model(config: RunConfig, schema: Schema, steps_per_epoch: int) -> tuple[keras.Model, keras.Model]:
    """The model to checkpoint, and the compiled model to train, which share their weights.

    The first stays uncompiled, so that checkpoints are free of optimizer state.

    Args:
        config: All settings.
        schema: The schema of the data with the tasks of the model, `Prepared.schema_for(config.model)`.
        steps_per_epoch: Batches per epoch.
    """
    with _dtype_policy(config.training.precision):
        plain = build_model(config.model.name, schema, config.model)
        kinds = task_kinds(plain)
        if config.training.loss_weighting == "uncertainty":
            plain = with_uncertainty(plain)
        model = training_model(plain, config.training.distinct, conditional=config.model.conversion == "clicked")
        compile_model(model, kinds, config.training, steps_per_epoch)
    return plain, model


def validation_score(logs: dict[str, Any]) -> float:
    """What the best checkpoint has most of: the mean validation AUC over tasks, or minus the mean RMSE without one."""
    values = {
        metric: [value for name, value in logs.items() if name.startswith("val_") and name.endswith(f"_{metric}")]
        for metric in ("auc", "rmse")
    }
    return float(np.mean(values["auc"]) if values["auc"] else -np.mean(values["rmse"]))


def best_epoch(history: History) -> int:
    """Index of the epoch with the best validation score, the first of equals."""
    return int(np.argmax([epoch["val_score"] for epoch in history]))


def is_finished(history: History, config: TrainingConfig) -> bool:
    """Whether all epochs are done, or `patience` epochs have passed without a better one."""
    if len(history) >= config.epochs:
        return True
    return bool(config.patience and history) and len(history) - 1 - best_epoch(history) >= config.patience


class EpochWatch(keras.callbacks.Callback):
    """Stops training that has diverged, and adds to the logs of an epoch what `fit` does not know.

    Args:
        run: The run.
        config: Settings of the training.
        rows: Pairs per epoch.
    """

    def __init__(self, run: Run, config: TrainingConfig, rows: int) -> None:
        super().__init__()
        self.run, self.config, self.rows = run, config, rows
        self._epoch = self._started = self._stopped = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._started = epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["loss"])
        self._stopped = time.perf_counter()
        self._check_finite("loss", loss, f"step {batch + 1}")

    def _check_finite(self, name: str, value: float, where: str) -> None:
        if not math.isfinite(value):
            kept = (
                f"The best checkpoint so far, {self.run.checkpoint}, is kept."
                if self.run.checkpoint.is_file()
                else "No epoch had finished, so there is no checkpoint."
            )
            raise TrainingError(
                f"The {name} became {value} in epoch {self._epoch + 1}, {where}. {kept} Try a lower "
                f"--learning_rate; it was {self.config.learning_rate}."
            )

    def on_epoch_end(self, epoch, logs=None):
        # The last step's update shows in the validation only.
        self._check_finite("validation loss", float(logs["val_loss"]), "after the last step")
        logs["val_score"] = validation_score(logs)
        uncertainty = uncertainty_layer(self.model)
        if uncertainty is not None:
            logs |= {f"log_variance_{task}": float(value) for task, value in uncertainty.by_task().items()}
        logs["rows_per_second"] = self.rows / (self._stopped - self._started)


class RunKeeper(keras.callbacks.Callback):
    """Keeps a run directory up to date. The last of the callbacks: what they wrote of an epoch counts with its state.

    The state file is written last: a process killed at any moment resumes at the last epoch that finished, whose
    successors it repeats exactly.

    Args:
        run: The run.
        plain: The model to checkpoint; the model in training may be its `distinct_model`.
        history: The epochs that finished before.
    """

    def __init__(self, run: Run, plain: keras.Model, history: History) -> None:
        super().__init__()
        self.run, self.plain, self.history = run, plain, history

    def on_epoch_end(self, epoch, logs=None):
        self.history.append({"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}})
        if best_epoch(self.history) == epoch:
            self.run.save_checkpoint(self.plain)
        self.run.save_state(self.model, self.history)
        # The data are those of one epoch.
        self.model.stop_training = True


def train(
    config: RunConfig,
    run_name: str | None = None,
    data_dir: Path = Path("data"),
    runs_dir: Path = Path("runs"),
    report: Callable[[str], object] = print,
) -> Result:
    """Obtains and prepares the data unless that has been done, makes a run directory and trains in it.

    Args:
        config: All settings.
        run_name: Name of the run directory; the model and the time by default.
        data_dir: Where raw and prepared data are kept.
        runs_dir: Where runs are kept.
        report: Called with lines of text.

    Returns:
        What was made; everything else is in the run directory.

    Raises:
        ValueError: If the model is unknown (`ValueError`), the data cannot be used (`DataError`), the run exists
            (`RunError`), or the loss becomes NaN or infinite (`TrainingError`).
    """
    check_model(config.model.name, len(config.model.tasks))
    for note in training_notes(config):
        report(f"Note: {note}")
    name = run_name or f"{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    prepared = prepare_movielens(data_dir, config.data, report=report)
    # A shape that cannot be built must not leave a run behind.
    build_model(config.model.name, Prepared.load(prepared).schema_for(config.model), config.model)
    return train_run(Run.create(runs_dir / name, config, prepared), report)


def training_notes(config: RunConfig) -> Iterator[str]:
    """What the settings say without effect."""
    unread = unread_settings(config.model)
    if unread:
        yield f"{config.model.name} does not read {', '.join(unread)}; this has no influence."
    if config.training.optimizer == "adam" and config.training.weight_decay != TrainingConfig().weight_decay:
        yield "adam does not read weight_decay; adamw does."
    if config.model.gate_top_k == 1 and "gate_top_k" not in unread:
        yield "with gate_top_k 1 the kept weight is always 1, so that only balance_coefficient trains the gates."


def train_run(run: Run, report: Callable[[str], object] = print) -> Result:
    """Trains the model of a run, new or interrupted, from its last finished epoch on.

    Args:
        run: A run directory.
        report: Called with lines of text.

    Returns:
        What was made; everything else is in the run directory.

    Raises:
        TrainingError: If the loss becomes NaN or infinite.
    """
    report(f"Run: {run.folder}   (follow it: tensorboard --logdir {run.folder.parent})")
    config = run.config.training
    set_seed(config)
    schema = run.prepared.schema_for(run.config.model)
    parts = {
        part: run.prepared.part(part, schema.task_names, clicked=run.config.model.conversion == "clicked")
        for part in ("train", "validation")
    }
    for data in parts.values():
        data.check_labels(schema.tasks)
    training = Batches(parts["train"], config.batch_size, config.distinct, DISTINCT_MULTIPLE)
    if config.accumulation_steps > training.steps:
        report(
            f"Note: accumulation_steps {config.accumulation_steps} is more than the {training.steps} batches of an "
            "epoch; some epochs end without an update."
        )
    plain, model = build_training_model(run.config, schema, training.steps)
    history = run.restore_state(model)
    finished = len(history)
    validation = Batches(parts["validation"], EVALUATION_BATCH, config.distinct, DISTINCT_MULTIPLE)
    report(
        f"{plain.name}: {plain.count_params():,} parameters, {len(training.data):,} training pairs in "
        f"{training.steps:,} batches, {len(validation.data):,} validation pairs"
    )
    monitor = Monitor(
        run.logs,
        plain,
        parts["validation"],
        [group for group in movielens_groups(run.prepared) if group.variable == "genre"],
        config.monitor_images_epochs,
        run.warnings_file,
        report,
    )
    if is_finished(history, config):
        report(f"All {finished} epochs of {run.folder} have finished already.")
    else:
        if finished:
            report(f"Continuing {run.folder} after epoch {finished}.")
        callbacks = [EpochWatch(run, config, len(training.data)), monitor, RunKeeper(run, plain, history)]
        try:
            # One call per epoch, whose data end with it: steps_per_execution would read on into the next one otherwise.
            while not is_finished(history, config):
                model.fit(
                    training.epoch(config.seed, len(history)),
                    epochs=config.epochs,
                    initial_epoch=len(history),
                    validation_data=validation.in_order(),
                    shuffle=False,
                    verbose=1 if sys.stdout.isatty() else 2,
                    callbacks=callbacks,
                )
        finally:
            monitor.close()
    if not monitor.best.exists():
        _write_best(run, history, monitor.best)
    speeds = [epoch["rows_per_second"] for epoch in history[finished:]]
    return Result(
        run,
        history,
        best_epoch(history) + 1,
        float(np.median(speeds)) if speeds else None,
        # Kilobytes on Linux, bytes on macOS.
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        _gpu_peak_memory(),
    )


def _write_best(run: Run, history: History, folder: Path) -> None:
    best = best_epoch(history)
    metrics = {name: value for name, value in history[best].items() if name.startswith("val_")}
    speed = float(np.median([epoch["rows_per_second"] for epoch in history]))
    prepared = run.prepared
    write_best(
        folder,
        run.folder.resolve().name,
        run.config,
        {**metrics, "epoch": best + 1, "rows_per_second": speed},
        best,
        run.load_model(),
        prepared.encoded["item"],
        item_columns(prepared.titles, movielens_groups(prepared)),
    )


def _gpu_peak_memory() -> int | None:
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]
