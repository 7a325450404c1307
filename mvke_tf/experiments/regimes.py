# SPDX-License-Identifier: Apache-2.0
"""When does MVKE help? Models on generated ad logs, by the interests of a user and by the agreement of two tasks.

The logs are those of `mvke_tf.datasets.ads`: an ad meets the interest of the user that suits it best, so that ads of
different categories need different views of one user. The true probabilities are known, and every row of the test part
counts as a positive and as a negative in that proportion: an AUC then has no noise of drawn labels, and is stated as
the share of what the true probabilities themselves attain, 0 for chance and 1 for the truth.

Every model has the same budget and settings; nothing is searched. A world is one seed of the log and of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
from matplotlib.figure import Figure

from mvke_tf import datasets
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.preparation import prepared_dataset
from mvke_tf.data.store import PreparedDataset
from mvke_tf.datasets.ads.generator import read_truth
from mvke_tf.errors import ConfigError, RunError
from mvke_tf.experiments.runs import Progress, configs_of_runs, finished_run
from mvke_tf.experiments.significance import holm, mean_interval, paired_p_value
from mvke_tf.figures import line_styles, save_figure
from mvke_tf.inference.predictions import predict
from mvke_tf.io import atomic_write, write_json

TASKS = ("click", "install")
# The first is held against every other.
MODELS = ("mvke", "mmoe", "ple", "shared_bottom", "hard_sharing", "single_task")
# With kernels that start far enough apart to choose.
_MODEL = ModelConfig(embedding_dim=16, hidden_dims=(64, 32), tasks=TASKS, virtual_kernel_stddev=1.0)
_TRAINING = TrainingConfig(
    batch_size=1024, epochs=15, patience=2, learning_rate=2e-3, learning_rate_decay=0.85, monitor_images_epochs=0
)
SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Regime:
    """What a log is like.

    Args:
        interests: Interests of each user.
        agreement: Correlation of what makes users click with what makes them install.
    """

    interests: int
    agreement: float


@dataclasses.dataclass(frozen=True)
class RegimesConfig:
    """What is compared.

    Args:
        interests: Numbers of interests, at the agreement `agreement`.
        agreements: Agreements of the tasks, with `interests_apart` interests.
        agreement: See `interests`.
        interests_apart: See `agreements`.
        worlds: Seeds of log and weights, 0 to `worlds - 1`.
        rows: Impressions of a log.
        users: Users of a log.
        ads: Ads of a log.
        model: Settings that all models share.
        training: Settings of every training; the seed has no influence.
    """

    interests: tuple[int, ...] = (1, 2, 4, 8)
    agreements: tuple[float, ...] = (-0.5, 0.0, 0.5, 1.0)
    agreement: float = 0.5
    interests_apart: int = 4
    worlds: int = 5
    rows: int = 100_000
    users: int = 2_500
    ads: int = 200
    model: ModelConfig = _MODEL
    training: TrainingConfig = _TRAINING

    def __post_init__(self) -> None:
        if self.worlds < 2 or not self.interests or not self.agreements:
            raise ConfigError(
                "Intervals need two worlds or more, curves a point or more. "
                f"Received: {self.worlds} worlds, interests {self.interests}, agreements {self.agreements}"
            )

    @property
    def regimes(self) -> list[Regime]:
        """All points of both curves, each once."""
        by_interests = [Regime(number, self.agreement) for number in self.interests]
        by_agreement = [Regime(self.interests_apart, agreement) for agreement in self.agreements]
        return list(dict.fromkeys([*by_interests, *by_agreement]))


def expected_auc(probabilities: np.ndarray, scores: np.ndarray) -> float:
    """The AUC where every row is positive with its probability, and negative with the rest of it.

    Args:
        probabilities: `(n,)`, the true ones.
        scores: `(n,)`; only their order matters, ties count half.
    """
    level = np.unique(scores, return_inverse=True)[1]
    positive, negative = (np.bincount(level, weights) for weights in (probabilities, 1.0 - probabilities))
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))


def true_probabilities(prepared: PreparedDataset, part: str = "test") -> dict[str, np.ndarray]:
    """The true probabilities of a click, and of a click with an install, of the rows of one part of an ad log.

    Raises:
        RunError: If a row of the log has none.
    """
    rows = prepared.part_rows(part)
    truth = read_truth(Path(prepared.dataset.folder)).select(
        pl.col("ts").cast(pl.Int64) * 1000, pl.col("user_id").cast(pl.Int64), "ad_id", "p_click", "p_install"
    )
    asked = pl.DataFrame(
        {
            "ts": np.asarray(prepared.time)[rows],
            "user_id": prepared.users.key[prepared.user_row[rows]],
            "ad_id": prepared.items.key[prepared.item_row[rows]],
        }
    )
    keys = ["ts", "user_id", "ad_id"]
    found = asked.join(truth.unique(keys), on=keys, how="left", maintain_order="left")
    if found["p_click"].null_count():
        raise RunError(f"{prepared.dataset.folder} has no truth of some rows of its log; delete it and run again.")
    click = found["p_click"].to_numpy().astype(np.float64)
    return {"click": click, "install": click * found["p_install"].to_numpy()}


def run_experiment(folder: Path, data_dir: Path, config: RegimesConfig) -> pd.DataFrame:
    """Trains every model in every regime and world; none that `folder` has already.

    Interrupted, it goes on at the next call with the epoch that was interrupted.

    Args:
        folder: Where runs and results are kept.
        data_dir: Where logs and prepared datasets are kept.
        config: What is compared.

    Returns:
        One row per model, regime and world: `model`, `interests`, `agreement`, `world`, and of each task its expected
        AUC on the test part, `<task>`, and that of the truth, `<task>_truth`.

    Raises:
        RunError: If `folder` holds something else.
    """
    trainings = {model: configs_of_runs(_run_config(config, model, 0), TASKS) for model in MODELS}
    progress = Progress(len(config.regimes) * config.worlds * sum(map(len, trainings.values())))
    results, number = [], 0
    with contextlib.closing(progress):
        for world in range(config.worlds):
            for regime in config.regimes:
                name = f"interests{regime.interests}-agreement{regime.agreement:g}-world{world}"
                cells = {model: folder / "cells" / f"{name}-{model}.json" for model in MODELS}
                data = _Data(data_dir, config, regime, world)
                for model, path in cells.items():
                    settings = _settings(config, model, regime, world)
                    runs = configs_of_runs(_run_config(config, model, world), TASKS)
                    number += len(runs)
                    if not path.is_file():
                        scores: dict[str, np.ndarray] = {}
                        for suffix, run_config in runs.items():
                            run_name = path.stem + suffix
                            progress.start(number, run_name)
                            run = finished_run(
                                run_config, folder / "runs" / run_name, data.prepared, folder / "training.log", progress
                            )
                            trained = run.load_model()
                            scores |= predict(trained, data.prepared.part("test", trained.task_names)).values
                            run.state_file.unlink(missing_ok=True)
                        cell = {task: expected_auc(data.truth[task], scores[task]) for task in TASKS}
                        cell |= {f"{task}_truth": expected_auc(data.truth[task], data.truth[task]) for task in TASKS}
                        write_json(path, {"settings": settings, **cell})
                    results.append(_read_cell(path, settings))
    return pd.DataFrame(results)


@dataclasses.dataclass(frozen=True)
class _Data:
    """The log of one regime and world, made when it is first asked for."""

    data_dir: Path
    config: RegimesConfig
    regime: Regime
    world: int

    @functools.cached_property
    def prepared(self) -> PreparedDataset:
        config = self.config
        options = {"rows": config.rows, "users": config.users, "ads": config.ads, "drift": 0.0, "cold": 0.0}
        dataset = datasets.load(
            "ads", self.data_dir, **options, **dataclasses.asdict(self.regime), data_seed=self.world
        )
        return prepared_dataset(dataset, self.data_dir)

    @functools.cached_property
    def truth(self) -> dict[str, np.ndarray]:
        return true_probabilities(self.prepared)


def _run_config(config: RegimesConfig, model: str, world: int) -> RunConfig:
    return RunConfig(dataclasses.replace(config.model, name=model), dataclasses.replace(config.training, seed=world))


def _settings(config: RegimesConfig, model: str, regime: Regime, world: int) -> dict[str, Any]:
    """What a cell depends on."""
    sizes = {name: getattr(config, name) for name in ("rows", "users", "ads")}
    run = _run_config(config, model, world).to_dict()
    return json.loads(json.dumps({"model": model, **dataclasses.asdict(regime), "world": world, **sizes, "run": run}))


def _read_cell(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    names = {f"{task}{end}" for task in TASKS for end in ("", "_truth")}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = {name: float(values[name]) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged; delete it and run again. Received: {error!r}") from error
    if values["settings"] != settings:
        raise RunError(
            f"{path} was made with other settings; choose another folder. "
            f"Expected: {settings}. Received: {values['settings']}"
        )
    return {name: settings[name] for name in ("model", "interests", "agreement", "world")} | found


def attained(results: pd.DataFrame, task: str) -> pd.Series:
    """The share of what the true probabilities attain above chance, of each row of `run_experiment`."""
    return (results[task] - 0.5) / (results[f"{task}_truth"] - 0.5)


def _curve(results: pd.DataFrame, model: str, regime: Regime, task: str) -> np.ndarray:
    """The shares of one model in one regime, in the order of the worlds."""
    chosen = results[
        (results["model"] == model)
        & (results["interests"] == regime.interests)
        & (results["agreement"] == regime.agreement)
    ]
    return attained(chosen.sort_values("world"), task).to_numpy()


def results_table(results: pd.DataFrame, config: RegimesConfig) -> str:
    """Markdown: the share of the attainable that each model reaches, mean ± 95 % interval over the worlds."""
    heads = ["interests", "agreement", "task", *MODELS]
    rows = []
    for regime in config.regimes:
        for task in TASKS:
            cells = []
            for model in MODELS:
                mean, half = mean_interval(_curve(results, model, regime, task))
                cells.append(f"{mean:.3f} ± {half:.3f}")
            rows.append([str(regime.interests), f"{regime.agreement:g}", task, *cells])
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(results: pd.DataFrame, config: RegimesConfig) -> str:
    """Where MVKE is ahead of, or behind, each other model, in words, decided by the numbers.

    Rule: ahead or behind where the paired t-test over the worlds says so at 5 %, after Holm's correction over all
    models, regimes and tasks.
    """
    first, *others = MODELS
    tests = []
    for regime in config.regimes:
        for task in TASKS:
            own = _curve(results, first, regime, task)
            for model in others:
                other = _curve(results, model, regime, task)
                tests.append((regime, task, model, float(np.mean(own - other)), paired_p_value(own, other)))
    corrected = holm([p_value for *_, p_value in tests])
    lines = []
    for model in others:
        ahead: list[str] = []
        behind: list[str] = []
        for (regime, task, name, difference, _), p_value in zip(tests, corrected, strict=True):
            if name == model and p_value < SIGNIFICANT:
                where = f"{task} with {regime.interests} interests at {regime.agreement:g} ({difference:+.3f})"
                (ahead if difference > 0 else behind).append(where)
        words = [f"{word} in {'; '.join(some)}" for word, some in (("ahead", ahead), ("behind", behind)) if some]
        lines.append(f"{first} against {model}: {', '.join(words) or 'not told apart in any regime'}.")
    return "\n".join(lines)


def figure(results: pd.DataFrame, config: RegimesConfig) -> Figure:
    """How far each other model is ahead of MVKE in the same world, by interests and by agreement, a row per task.

    Worlds differ far more than models do: the difference in each of them is what has an interval.
    """
    first, *others = MODELS
    drawn = Figure(figsize=(9.5, 6.4), layout="constrained")
    panels = drawn.subplots(len(TASKS), 2, sharey="row", squeeze=False)
    axes = (
        ("interests of a user", config.interests, [Regime(x, config.agreement) for x in config.interests]),
        ("agreement of the tasks", config.agreements, [Regime(config.interests_apart, x) for x in config.agreements]),
    )
    for line, task in zip(panels, TASKS, strict=True):
        for panel, (title, values, regimes) in zip(line, axes, strict=True):
            own = [_curve(results, first, regime, task) for regime in regimes]
            panel.axhline(0, color="0.2", linewidth=1)
            for number, (model, style) in enumerate(zip(others, line_styles(), strict=False)):
                ahead = [_curve(results, model, regime, task) - mvke for regime, mvke in zip(regimes, own, strict=True)]
                means, halves = np.transpose([mean_interval(differences) for differences in ahead])
                # Side by side, so that no interval hides another.
                shift = (number - (len(others) - 1) / 2) * 0.1
                panel.errorbar(np.arange(len(values)) + shift, means, halves, label=model, capsize=2, **style)
            panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            panel.set_xlabel(title)
            panel.set_title(task, fontsize=11)
            panel.grid(color="0.9")
            panel.set_axisbelow(True)
        line[0].set_ylabel(f"share of the attainable AUC\nless that of {first}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    drawn.suptitle(
        f"Generated ad logs: AUC above chance as a share of the true probabilities' own, less that of {first}; "
        f"{config.worlds} worlds, 95 % intervals",
        fontsize=11,
    )
    return drawn


def write_results(results: pd.DataFrame, config: RegimesConfig, folder: Path) -> tuple[Path, Path]:
    """Writes `results.csv`, one line per model, regime and world, and `figure.png`; returns their paths."""
    table, picture = folder / "results.csv", folder / "figure.png"
    with atomic_write(table) as temporary:
        results.to_csv(temporary, index=False)
    save_figure(figure(results, config), picture)
    return table, picture
