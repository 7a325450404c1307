# SPDX-License-Identifier: Apache-2.0
"""The MMoE paper's own experiment: shared bottom, one-gate MoE and MMoE on two tasks as related as one asks.

Ma et al., KDD 2018, sections 3.3 and 5. Sizes are the paper's: 100 features, 8 experts of one layer of 16 units, towers
of 8 units, and a shared bottom with which bottom and towers have as many weights as experts and towers. No example is
seen twice, so that the loss on the test rows measures what a model can represent and how fast it learns it, not how it
overfits. As in the paper the learning rate is searched, for each model by itself: that of the lowest loss on validation
rows, on average over the seeds, counts. It falls to 0 along a cosine. All seeds are trained at once, as one model of
stacked weights, which learns what the models would learn one by one.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from matplotlib.figure import Figure
from tqdm import tqdm

from mvke_tf.data.batches import without_autotuning
from mvke_tf.errors import ConfigError, RunError, TrainingError
from mvke_tf.experiments.significance import mean_interval
from mvke_tf.experiments.two_tasks import TwoTaskRegression, two_task_regression
from mvke_tf.figures import line_styles, save_figure
from mvke_tf.io import atomic_write, write_json
from mvke_tf.models.dense_mmoe import build_mmoe

NUM_EXPERTS, EXPERT_UNITS, TOWER_UNITS = 8, 16, 8
# So many are held in memory and trained at a time.
SEEDS_AT_ONCE = 10
MODELS = {"mmoe": "MMoE", "omoe": "one-gate MoE", "shared_bottom": "shared bottom"}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """The budget of one training.

    Args:
        steps: Steps of training.
        points: Points of the curve, at equal distances; divides `steps`.
        batch_size: Rows per step.
        test_rows: Rows of the test loss; as many others are for the validation loss.
        learning_rates: Learning rates of Adam that are tried.
        num_features: Width of the input.
    """

    steps: int = 4000
    points: int = 20
    batch_size: int = 64
    test_rows: int = 4096
    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    num_features: int = 100

    def __post_init__(self) -> None:
        counts = (self.steps, self.points, self.batch_size, self.test_rows, self.num_features)
        if min(*counts, *self.learning_rates) <= 0 or not self.learning_rates or self.steps % self.points:
            raise ConfigError(f"Settings must be positive, and `points` divide `steps`. Received: {self}")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: a model on the data of one correlation and one seed.

    Args:
        model: A name of `MODELS`.
        correlation: Cosine of the two tasks' weights.
        seed: Seed of the data and of the weights.
        learning_rate: Learning rate at the start.
        parameters: Number of the model's parameters.
        steps: Steps after which the loss was measured.
        losses: Test loss there, the mean squared error averaged over both tasks.
        validation: Validation loss at the end.
    """

    model: str
    correlation: float
    seed: int
    learning_rate: float
    parameters: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    validation: float


def build_experiment_model(name: str, num_features: int = 100) -> keras.Model:
    """One of the three models, `(B, num_features) -> {"task_0": (B, 1), "task_1": (B, 1)}`.

    Raises:
        ConfigError: If the name is not one of `MODELS`.
    """
    if name not in MODELS:
        raise ConfigError(f"Unknown model. Expected one of {sorted(MODELS)}. Received: {name!r}")
    # Bottom and towers have as many weights as the experts and towers of the other two.
    weights = num_features * EXPERT_UNITS * NUM_EXPERTS + 2 * EXPERT_UNITS * TOWER_UNITS
    if name == "shared_bottom":
        return _build_shared_bottom(num_features, round(weights / (num_features + 2 * TOWER_UNITS)))
    # One layer that serves both tasks is one gate.
    gates = [keras.layers.Dense(NUM_EXPERTS, name="gate")] * 2 if name == "omoe" else None
    return build_mmoe(num_features, NUM_EXPERTS, 2, (EXPERT_UNITS,), (TOWER_UNITS,), dropout_rate=0.0, gates=gates)


def _build_shared_bottom(num_features: int, units: int) -> keras.Model:
    inputs = keras.Input((num_features,), name="features")
    shared = keras.layers.Dense(units, activation="relu", name="shared_bottom")(inputs)
    outputs = {}
    for task in ("task_0", "task_1"):
        tower = keras.layers.Dense(TOWER_UNITS, activation="relu", name=f"tower_{task}")(shared)
        outputs[task] = keras.layers.Dense(1, name=task)(tower)
    return keras.Model(inputs, outputs, name="shared_bottom")


@keras.saving.register_keras_serializable(package="mvke_tf")
class StackedModels(keras.Model):
    """Models of one name and several seeds as one, `(B, S, num_features) -> (B, S, 2)`.

    Args:
        name: A name of `MODELS`.
        models: The S models, as `build_experiment_model` makes them; their weights are copied, one axis in front.
    """

    def __init__(self, name: str, models: Sequence[keras.Model]) -> None:
        super().__init__(name=name)
        paths = [variable.path for variable in models[0].trainable_variables]
        weights = zip(*(model.get_weights() for model in models), strict=True)
        self.stacked = {
            path.replace("/", "_"): self.add_weight(
                shape=(len(models), *values[0].shape),
                initializer=lambda shape, dtype=None, values=values: ops.convert_to_tensor(np.stack(values), dtype),
                name=path.replace("/", "_"),
            )
            for path, values in zip(paths, weights, strict=True)
        }

    def _dense(self, layer: str, x: Any) -> Any:
        return ops.matmul(x, self.stacked[f"{layer}_kernel"]) + self.stacked[f"{layer}_bias"][:, None]

    def call(self, inputs):
        x = ops.transpose(inputs, (1, 0, 2))
        outputs = []
        for task in ("task_0", "task_1"):
            if self.name == "shared_bottom":
                shared, tower = ops.relu(self._dense("shared_bottom", x)), f"tower_{task}"
            else:
                experts = ops.einsum("sbf,sefu->sbeu", x, self.stacked["experts_kernel_0"])
                experts = ops.relu(experts + ops.transpose(self.stacked["experts_bias_0"], (0, 2, 1, 3)))
                gate = ops.softmax(self._dense("gate" if self.name == "omoe" else f"gate_{task}_dense", x), axis=-1)
                shared, tower = ops.einsum("sbe,sbeu->sbu", gate, experts), f"tower_{task}_0"
            outputs.append(self._dense(task, ops.relu(self._dense(tower, shared))))
        return ops.transpose(ops.concatenate(outputs, axis=-1), (1, 0, 2))


def _summed(labels: Any, predicted: Any) -> Any:
    """The squared errors of all seeds and tasks of each row: no seed's gradient depends on another seed."""
    return ops.sum(ops.square(predicted - labels), axis=(1, 2))


class _TestLosses(keras.callbacks.Callback):
    """Measures the loss of each seed on held-out rows whenever an execution of steps has ended."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        super().__init__()
        self.features, self.labels = features, labels
        self.losses: list[np.ndarray] = []

    def on_train_batch_end(self, batch, logs=None):
        predicted = self.model.predict_on_batch(self.features)
        self.losses.append(np.square(predicted - self.labels, dtype=np.float64).mean(axis=-1))


def train_cells(
    model: str,
    correlation: float,
    data: Mapping[int, TwoTaskRegression],
    learning_rate: float,
    config: ExperimentConfig,
) -> list[Cell]:
    """Trains one model with every seed of `{seed: data}` at one learning rate.

    The last `config.test_rows` rows of the data are for the test loss, as many before them for the validation loss.

    Raises:
        TrainingError: If a loss becomes NaN or infinite.
    """
    keras.backend.clear_session()
    built = []
    for seed in data:
        keras.utils.set_random_seed(seed)
        built.append(build_experiment_model(model, config.num_features))
    stacked = StackedModels(model, built)
    every = config.steps // config.points
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, config.steps)
    stacked.compile(
        keras.optimizers.Adam(schedule),
        loss=_summed,
        steps_per_execution=every,
        jit_compile=keras.backend.backend() == "jax",
    )
    rows = config.steps * config.batch_size
    features = np.stack([each.features for each in data.values()], axis=1)
    labels = np.stack([each.labels for each in data.values()], axis=1)
    test = _TestLosses(features[rows:], labels[rows:])
    batches = tf.data.Dataset.from_tensor_slices((features[:rows], labels[:rows])).batch(config.batch_size)
    stacked.fit(without_autotuning(batches), shuffle=False, verbose=0, callbacks=[test])
    losses = np.stack(test.losses)
    if not np.isfinite(losses).all():
        raise TrainingError(
            f"The test losses of {model} at correlation {correlation} must be finite; try lower learning rates than "
            f"{learning_rate:g}. Received: {losses[-1].mean(axis=0)}"
        )
    of_test, of_validation = losses[:, config.test_rows :].mean(axis=1), losses[-1, : config.test_rows].mean(axis=0)
    steps, parameters = tuple(range(every, config.steps + 1, every)), built[0].count_params()
    return [
        Cell(
            *(model, correlation, seed, learning_rate, parameters, steps),
            *(tuple(of_test[:, number].tolist()), float(of_validation[number])),
        )
        for number, seed in enumerate(data)
    ]


def run_experiment(
    folder: Path, correlations: Sequence[float], num_seeds: int, config: ExperimentConfig, progress: bool = True
) -> list[Cell]:
    """Trains every model at every correlation and learning rate with every seed; none that `folder` has already.

    Writes one file per training under `folder/cells`.

    Args:
        folder: Where results are kept.
        correlations: Cosines of the two tasks' weights.
        num_seeds: Seeds 0, 1, ... of the data and the weights.
        config: Budget of each training.
        progress: Whether to show a bar.

    Returns:
        All trainings; `searched` chooses among them.

    Raises:
        RunError: If a file there is damaged or of other settings.
        ConfigError: If there are fewer than two seeds, or no correlation.
    """
    if num_seeds < 2 or not correlations:
        raise ConfigError(
            f"Confidence intervals need two seeds or more, at one correlation or more. "
            f"Received: {num_seeds} seeds, correlations {tuple(correlations)}"
        )
    cells: list[Cell] = []
    correlations, groups = sorted(set(correlations)), _groups(num_seeds)
    total = len(correlations) * len(MODELS) * len(config.learning_rates) * num_seeds
    with tqdm(total=total, unit="training", disable=not progress) as bar:
        for seeds, correlation in itertools.product(groups, correlations):
            data: dict[int, TwoTaskRegression] = {}
            for model, rate in itertools.product(MODELS, config.learning_rates):
                bar.set_postfix_str(f"{model}, correlation {correlation:g}, rate {rate:g}, seeds from {seeds[0]}")
                paths = {seed: folder / "cells" / f"{model}_{correlation:g}_{rate:g}_{seed}.json" for seed in seeds}
                cells += [_read_cell(path, config) for path in paths.values() if path.is_file()]
                missing = [seed for seed, path in paths.items() if not path.is_file()]
                for seed in set(missing) - set(data):
                    rows = config.steps * config.batch_size + 2 * config.test_rows
                    data[seed] = two_task_regression(rows, correlation, config.num_features, seed=seed)
                if missing:
                    trained = train_cells(model, correlation, {seed: data[seed] for seed in missing}, rate, config)
                    for cell in trained:
                        write_json(paths[cell.seed], {"settings": _settings(config), **dataclasses.asdict(cell)})
                    cells += trained
                bar.update(len(seeds))
    return cells


def _groups(num_seeds: int) -> list[range]:
    """The seeds that are trained at once."""
    return [range(first, min(first + SEEDS_AT_ONCE, num_seeds)) for first in range(0, num_seeds, SEEDS_AT_ONCE)]


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """What a training depends on: all but the other learning rates."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "learning_rates"}


def searched(cells: Sequence[Cell]) -> list[Cell]:
    """The trainings at the learning rate of the lowest mean validation loss, of each model and correlation."""
    of_rate: dict[tuple[str, float], dict[float, list[Cell]]] = {}
    for cell in cells:
        rates = of_rate.setdefault((cell.model, cell.correlation), {})
        rates.setdefault(cell.learning_rate, []).append(cell)
    best = (min(rates.values(), key=lambda some: np.mean([c.validation for c in some])) for rates in of_rate.values())
    return [cell for some in best for cell in some]


def _read_cell(path: Path, config: ExperimentConfig) -> Cell:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        settings = values.pop("settings")
        cell = Cell(**values | {"steps": tuple(values["steps"]), "losses": tuple(values["losses"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged; delete it and run again. Received: {error!r}") from error
    if settings != _settings(config):
        raise RunError(
            f"{path} was made with other settings; choose another folder. "
            f"Expected: {_settings(config)}. Received: {settings}"
        )
    return cell


def final_losses(cells: Sequence[Cell], model: str, correlation: float) -> np.ndarray:
    """Test losses after the last step, in the order of the seeds."""
    chosen = [cell for cell in cells if cell.model == model and cell.correlation == correlation]
    return np.array([cell.losses[-1] for cell in sorted(chosen, key=lambda cell: cell.seed)])


def gain(cells: Sequence[Cell], better: str, worse: str, correlation: float) -> np.ndarray:
    """By how much the final loss of the one model is below that of the other, seed by seed."""
    return final_losses(cells, worse, correlation) - final_losses(cells, better, correlation)


def _correlations(cells: Sequence[Cell]) -> list[float]:
    return sorted({cell.correlation for cell in cells})


def results_table(cells: Sequence[Cell]) -> str:
    """Markdown: per model its parameters and, per correlation, the mean final test loss with its 95 % interval.

    With the learning rate behind it.
    """
    correlations = _correlations(cells)
    rows = [["model", "parameters", *(f"correlation {correlation:g}" for correlation in correlations)]]
    for model, words in MODELS.items():
        parameters = next(cell.parameters for cell in cells if cell.model == model)
        row = [words, f"{parameters:,}"]
        for correlation in correlations:
            mean, half = mean_interval(final_losses(cells, model, correlation))
            rate = next(c.learning_rate for c in cells if (c.model, c.correlation) == (model, correlation))
            row.append(f"{mean:.4f} ± {half:.4f} ({rate:g})")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def verdict(cells: Sequence[Cell]) -> str:
    """Whether the paper's ordering appears, in words, decided by the numbers.

    Rule: one model is better than another where the 95 % interval of the difference of their final test losses, seed
    by seed, lies above zero. The ordering appears where MMoE is better than the one-gate MoE and that one better than
    the shared bottom. The gap grows as the correlation falls where the difference of MMoE to each of the others is
    larger at the lowest correlation than at the highest, in the same sense.
    """
    lines = []
    for correlation in _correlations(cells):
        steps = []
        for better, worse in (("mmoe", "omoe"), ("omoe", "shared_bottom"), ("mmoe", "shared_bottom")):
            mean, half = mean_interval(gain(cells, better, worse, correlation))
            word = "better than" if mean > half else "worse than" if mean < -half else "not told apart from"
            steps.append((f"{MODELS[better]} {word} {MODELS[worse]} ({mean:+.4f} ± {half:.4f})", mean > half))
        appears = "appears" if steps[0][1] and steps[1][1] else "does not appear"
        lines.append(f"Correlation {correlation:g}: the paper's ordering {appears}: {'; '.join(s for s, _ in steps)}.")
    lowest, *_, highest = (*_correlations(cells), _correlations(cells)[-1])
    if lowest < highest:
        for other in ("omoe", "shared_bottom"):
            growth = gain(cells, "mmoe", other, lowest) - gain(cells, "mmoe", other, highest)
            mean, half = mean_interval(growth)
            word = "grows" if mean > half else "shrinks" if mean < -half else "does not measurably change"
            lines.append(
                f"From correlation {highest:g} down to {lowest:g} the gap between MMoE and {MODELS[other]} {word} "
                f"({mean:+.4f} ± {half:.4f})."
            )
    return "\n".join(lines)


def figure(cells: Sequence[Cell]) -> Figure:
    """Test loss against steps, one panel per correlation: mean over the seeds and its 95 % interval."""
    correlations = _correlations(cells)
    drawn = Figure(figsize=(3.6 * len(correlations) + 0.4, 3.6), layout="constrained")
    panels = drawn.subplots(1, len(correlations), sharey=True, squeeze=False)[0]
    lowest = np.inf
    for panel, correlation in zip(panels, correlations, strict=True):
        for number, ((model, words), style) in enumerate(zip(MODELS.items(), line_styles(), strict=False)):
            chosen = [cell for cell in cells if (cell.model, cell.correlation) == (model, correlation)]
            curves = np.array([cell.losses for cell in chosen])
            mean, half = np.transpose([mean_interval(column) for column in curves.T])
            # Markers of the curves alternate, so that none hides another.
            marks = {"markevery": (number, len(MODELS)), "markersize": 5}
            panel.plot(chosen[0].steps, mean, label=words, **style | marks)
            # On a logarithmic axis an interval that reaches zero goes to the lower edge.
            floor = np.maximum(mean - half, 1e-9)
            panel.fill_between(chosen[0].steps, floor, mean + half, color=style["color"], alpha=0.15, linewidth=0)
            lowest = min(lowest, mean.min())
        panel.set_title(f"correlation {correlation:g}", fontsize=11)
        panel.set_xlabel("training steps")
        panel.grid(color="0.9", which="both")
        panel.set_axisbelow(True)
    panels[0].set_yscale("log")
    panels[0].set_ylim(bottom=lowest / 2)
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("test loss (mean squared error)")
    panels[-1].legend(loc="upper right", frameon=False)
    seeds = len({cell.seed for cell in cells})
    drawn.suptitle(f"Two synthetic regression tasks; mean and 95 % interval of {seeds} seeds", fontsize=11)
    return drawn


def write_results(cells: Sequence[Cell], folder: Path) -> tuple[Path, Path]:
    """Writes `results.csv`, one line per training and point, and `figure.png`; returns their paths."""
    table, picture = folder / "results.csv", folder / "figure.png"
    with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "correlation", "seed", "learning_rate", "parameters", "step", "test_loss"])
        for cell in cells:
            for step, loss in zip(cell.steps, cell.losses, strict=True):
                where = (cell.model, cell.correlation, cell.seed, cell.learning_rate, cell.parameters)
                writer.writerow([*where, step, loss])
    save_figure(figure(searched(cells)), picture)
    return table, picture
