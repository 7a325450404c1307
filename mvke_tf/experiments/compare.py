# SPDX-License-Identifier: Apache-2.0
"""Comparison of models: the same data and budget for all, several seeds, one run directory per model and seed.

<out>/
    comparison.json  settings of every model
    runs/            one run directory per model and seed; single_task has one per task
    training.log     what training printed; of several workers logs/<run>.log
    results.csv      one row per model and seed
    table.csv        one row per model: means, intervals, tests
    table.md         the same, to read
    comparison.png   the same, to look at
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mvke_tf.config import BASELINE_NAMES, RunConfig, TrainingConfig
from mvke_tf.data.preparation import stored
from mvke_tf.data.store import PreparedDataset
from mvke_tf.engine import Engine
from mvke_tf.errors import ConfigError, RunError
from mvke_tf.evaluation import evaluate_model
from mvke_tf.experiments.baselines import check_baseline, run_baseline
from mvke_tf.experiments.compare_tables import comparison_figure, markdown, own_settings, summary
from mvke_tf.experiments.runs import Progress, configs_of_runs, finished_run, log_of, spread
from mvke_tf.figures import save_figure
from mvke_tf.io import atomic_write, write_json
from mvke_tf.models import check_model
from mvke_tf.run import Run

PARTS = ("validation", "test")
# What one model of the comparison need not share with every other, beside the shape of the model.
OWN = ("learning_rate", "learning_rate_decay", "learning_rate_decay_epochs", "seed")
# Who sees the same pairs as often, and learns from them in the same way, had the same chance.
BUDGET = tuple(field.name for field in dataclasses.fields(TrainingConfig) if field.name not in OWN)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A folder of runs, and the settings that they are made with.

    Args:
        folder: Where everything is kept.
        configs: `{model: settings}`, in the order of the table, for networks and baselines alike; names and seeds in
            them have no influence. They may differ in the shape of the model, the learning rate and its decay, not in
            the tasks and the budget (`BUDGET`).
        seeds: Seeds per model, 0 to `seeds - 1`.
        prepared: The data.
    """

    folder: Path
    configs: Mapping[str, RunConfig]
    seeds: int
    prepared: PreparedDataset

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        configs = {model: _of_model(model, config, 0) for model, config in self.configs.items()}
        object.__setattr__(self, "configs", configs)
        if not configs or self.seeds < 1:
            raise ConfigError(
                "A comparison needs at least one model and one seed. "
                f"Received: models={list(configs)}, seeds={self.seeds}"
            )
        for model in configs:
            if model not in BASELINE_NAMES:
                check_model(model)
        _check_same_budget(configs)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, which are those of every model."""
        return self.prepared.task_names(next(iter(self.configs.values())).model.tasks)

    def run(self, engine: Engine | None = None) -> pd.DataFrame:
        """Does what is missing: trains, evaluates, and writes tables and picture after every seed.

        Interrupted, it goes on at the next call with the epoch that was interrupted. The training state of a finished
        run, the largest of its files, is deleted; its checkpoint, log, settings and report stay.

        Args:
            engine: Who makes the runs, one at a time in each process; by default this process. For others, data in
                memory are saved below `data/prepared`, as `train` does. Measures are those of one process where all
                compute on CPUs of one kind; rows per second are those of runs that share a machine.

        Returns:
            The table of `summary`.

        Raises:
            RunError: If the folder holds a comparison with other settings.
            ValueError: If a baseline cannot be fitted (`check_baseline`), or training fails (`TrainingError`).
            EngineError: If workers are killed again and again.
        """
        engine = engine or Engine()
        for model, config in self.configs.items():
            if model in BASELINE_NAMES:
                check_baseline(model, self.prepared, self.tasks, config)
        self._claim_folder()
        steps = [(model, seed) for seed in range(self.seeds) for model in self.configs if _has_seed(model, seed)]
        runs = {name: config for step in steps for name, config in self.run_configs(*step).items()}
        # Processes of other machines may start in another folder.
        folder = self.folder if engine.is_alone else self.folder.resolve()
        prepared = self.prepared if engine.is_alone else stored(self.prepared)
        rows = []
        with contextlib.closing(Progress(len(runs), engine.workers)) as progress:

            def begin(number: int, name: str) -> tuple[str, RunConfig]:
                if not _cost_file(folder, name).is_file():
                    progress.start(number, name)
                return name, runs[name]

            finish = functools.partial(_finished, folder, self.tasks)
            finished = spread(engine, finish, itertools.starmap(begin, enumerate(runs, start=1)), prepared, progress)
            for index, (model, seed) in enumerate(steps):
                done = itertools.islice(finished, len(self.run_configs(model, seed)))
                reports, costs = zip(*done, strict=True)
                rows.append(result_row(model, seed, reports, costs))
                if index + 1 == len(steps) or steps[index + 1][1] != seed:
                    table = self._write(pd.DataFrame(rows))
        return table

    def run_configs(self, model: str, seed: int) -> dict[str, RunConfig]:
        """The runs of one model and seed, `{name of the folder: settings}`; see `configs_of_runs`."""
        config = _of_model(model, self.configs[model], seed)
        return {f"{model}{suffix}-seed{seed}": run for suffix, run in configs_of_runs(config, self.tasks).items()}

    def _claim_folder(self) -> None:
        """Makes the folder that of this comparison; models and seeds may be added later, nothing else may change."""
        path = self.folder / "comparison.json"
        before = {}
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                before = {model: RunConfig.from_dict(config) for model, config in values["models"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{path} is damaged ({error}). Choose another --output_dir or delete the folder."
                ) from error
        for model, config in before.items():
            changed = _differences(config, self.configs.get(model, config))
            if values.get("data") != self.prepared.digest:
                changed = f"data were {values.get('data')}, received {self.prepared.digest}; {changed}"
            if changed:
                raise RunError(
                    f"{self.folder} holds a comparison with other settings. Choose another --output_dir, delete the "
                    f"folder, or repeat its settings (comparison.json). {model}: {changed}"
                )
        _check_same_budget({**before, **self.configs})
        models = {model: config.to_dict() for model, config in {**before, **self.configs}.items()}
        write_json(path, {"data": self.prepared.digest, "models": models})

    def _write(self, results: pd.DataFrame) -> pd.DataFrame:
        """Writes the tables and the picture of the results so far."""
        table = summary(results, list(self.configs), self.tasks)
        for name, frame in (("results.csv", results), ("table.csv", table)):
            with atomic_write(self.folder / name) as temporary:
                frame.to_csv(temporary, index=False)
        title = self.prepared.dataset.name
        with atomic_write(self.folder / "table.md") as temporary:
            temporary.write_text(markdown(table, title, own_settings(self.configs)), encoding="utf-8")
        save_figure(comparison_figure(table, title), self.folder / "comparison.png")
        return table


def _finished(
    folder: Path,
    tasks: Sequence[str],
    named: tuple[str, RunConfig],
    prepared: PreparedDataset,
    progress: Progress | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report and cost of one run, which is made if need be; `cost.json` comes last and marks it as finished."""
    name, config = named
    run, cost_file = Run(folder / "runs" / name), _cost_file(folder, name)
    if not cost_file.is_file():
        if config.model.name in BASELINE_NAMES:
            _fit_baseline(run, config, prepared, tasks)
        else:
            run = finished_run(config, run.folder, prepared, log_of(folder, name, progress), progress)
            model = run.load_model()
            report: dict[str, Any] = {}
            for part in PARTS:
                report |= evaluate_model(model, prepared, part)
            write_json(run.report_file, report)
            log = pd.read_csv(run.log_file)
            cost = {
                "parameters": model.count_params(),
                "examples_per_second": float(log["examples_per_second"].median()),
                "epochs": len(log),
            }
            write_json(cost_file, cost)
    run.state_file.unlink(missing_ok=True)
    try:
        return json.loads(run.report_file.read_text(encoding="utf-8")), json.loads(cost_file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{run.folder} is damaged ({error}). Delete it and call again.") from error


def _cost_file(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "cost.json"


def result_row(model: str, seed: int, reports: Sequence[dict], costs: Sequence[dict]) -> dict[str, Any]:
    """One row of results.csv.

    Args:
        model: Name of the model.
        seed: Its seed.
        reports: Reports of its runs; several where each task has a run of its own.
        costs: `parameters`, `examples_per_second` and `epochs` of these runs.

    Returns:
        `model`, `seed`, `<part>_<task>_<metric>` of every metric over all users, `<part>_mean_auc`, the mean AUC of the
        tasks; `parameters` and `epochs`, sums over the runs; `examples_per_second`, the rows that all runs together
        learn per second, None where no network was trained.
    """
    row: dict[str, Any] = {"model": model, "seed": seed}
    for part in PARTS:
        tasks = {task: metrics for report in reports for task, metrics in report[part].items()}
        row |= {f"{part}_{task}_{name}": value for task, metrics in tasks.items() for name, value in metrics.items()}
        areas = [metrics["auc"] for metrics in tasks.values() if metrics.get("auc") is not None]
        row[f"{part}_mean_auc"] = float(np.mean(areas)) if areas else None
    speeds = [cost["examples_per_second"] for cost in costs]
    return row | {
        "parameters": sum(cost["parameters"] for cost in costs),
        # A pair has to pass through every run.
        "examples_per_second": None if None in speeds else 1 / sum(1 / speed for speed in speeds),
        "epochs": sum(cost["epochs"] for cost in costs),
    }


def _fit_baseline(run: Run, config: RunConfig, prepared: PreparedDataset, tasks: Sequence[str]) -> None:
    fitted = run_baseline(config.model.name, prepared, tasks, PARTS, config)
    with atomic_write(run.folder) as folder:
        folder.mkdir()
        write_json(folder / "config.json", config.to_dict())
        write_json(folder / "report.json", fitted.report)
        cost: dict[str, Any] = {"parameters": fitted.parameters, "examples_per_second": None, "epochs": fitted.rounds}
        if fitted.settings:
            cost["settings"] = fitted.settings
        write_json(folder / "cost.json", cost)


def _has_seed(model: str, seed: int) -> bool:
    """Popularity knows no chance: its one row stands for all seeds."""
    return seed == 0 or model != "popularity"


def _of_model(model: str, config: RunConfig, seed: int) -> RunConfig:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=model),
        training=dataclasses.replace(config.training, seed=seed),
    )


def _check_same_budget(configs: Mapping[str, RunConfig]) -> None:
    """Raises a ConfigError unless all models learn the same tasks for as long."""
    (first, expected), *others = configs.items()
    for model, config in others:
        for name in ("model.tasks", "model.objective", *(f"training.{name}" for name in BUDGET)):
            if _setting(config, name) != _setting(expected, name):
                raise ConfigError(
                    f"All models of a comparison need one `{name}`. Received: {_setting(expected, name)} of {first} "
                    f"and {_setting(config, name)} of {model}"
                )


def _setting(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _differences(before: RunConfig, now: RunConfig) -> str:
    """The settings that have changed, in words; empty if none has."""
    changed = [
        f"{section}.{name} was {value}, received {now.to_dict()[section][name]}"
        for section, settings in before.to_dict().items()
        if isinstance(settings, dict)
        for name, value in settings.items()
        if value != now.to_dict()[section][name]
    ]
    return "; ".join(changed)
