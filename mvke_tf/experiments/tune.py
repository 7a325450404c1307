# SPDX-License-Identifier: Apache-2.0
"""Search for good settings of a model with KerasTuner.

<out>/
    tuning.json       what is searched
    oracle/           KerasTuner's own state
    runs/trial-NNN/   one run directory per trial; of single_task one per trial and task, trial-NNN_<task>
    training.log      what training printed; of several workers logs/<run>.log
    trials.csv        one row per trial, the best first
    best_config.json  settings of the best trial, for `mvke train --config` and `mvke compare --configs`;
                      of single_task also one file per task, best_config_<task>.json, for `mvke train`
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mvke_tf.config import RunConfig
from mvke_tf.data.preparation import stored
from mvke_tf.data.store import PreparedDataset
from mvke_tf.engine import Engine
from mvke_tf.errors import ConfigError, DataError, MissingExtraError, MvkeError, RunError, TrainingError
from mvke_tf.experiments.runs import Progress, configs_of_runs, finished_run, log_of, spread
from mvke_tf.io import atomic_write, write_json
from mvke_tf.models import check_model
from mvke_tf.run import Run

OBJECTIVE = "val_score"
# What is tried of each setting. A width w gives hidden layers of w and w / 2.
SPACE = {
    "learning_rate": (1e-3, 1e-4),
    "embedding_dim": (32, 64, 128),
    "num_virtual_kernels": (3, 5, 8),
    "hidden_width": (128, 256),
    "dropout_rate": (0.1, 0.3, 0.5),
}
SEED_OF_ZERO = 1_000_000
TUNERS = {"random": "RandomSearchOracle", "bayesian": "BayesianOptimizationOracle"}


def search_space(model: str, fixed: Collection[str] = ()) -> dict[str, tuple[float, ...]]:
    """The settings that are searched for a model, `{name: values}`: `SPACE`, virtual kernels only where it has them.

    The kernels of each task follow from their number by `mvke_tf.models.mvke.default_kernels`.

    Args:
        model: Name of the model.
        fixed: Names of `SPACE` that are left out.

    Raises:
        ConfigError: If there is no such model, no such name in `SPACE`, or nothing left to search.
    """
    check_model(model)
    if unknown := set(fixed) - set(SPACE):
        raise ConfigError(f"Only searched settings can be fixed: {sorted(SPACE)}. Received: {sorted(unknown)}")
    left = {name: values for name, values in SPACE.items() if name not in fixed}
    if model != "mvke":
        left.pop("num_virtual_kernels", None)
    if not left:
        raise ConfigError(f"All settings are given, nothing is left to search. Received: fixed={sorted(fixed)}")
    return left


def trial_config(base: RunConfig, values: dict[str, float]) -> RunConfig:
    """The settings of one trial: `base`, with one value of each dimension of `search_space`."""
    chosen: dict[str, Any] = dict(values)
    training = base.training
    if "learning_rate" in chosen:
        training = dataclasses.replace(training, learning_rate=chosen.pop("learning_rate"))
    if "hidden_width" in chosen:
        width = chosen.pop("hidden_width")
        chosen["hidden_dims"] = (width, width // 2)
    model = dataclasses.replace(base.model, **chosen)
    return dataclasses.replace(base, model=model, training=training)


def tune(
    prepared: PreparedDataset,
    base: RunConfig,
    folder: Path,
    trials: int,
    tuner: str = "random",
    fixed: Collection[str] = (),
    engine: Engine | None = None,
) -> pd.DataFrame:
    """Searches the settings with the best validation score (of the best epoch of a run) and keeps every run.

    The score is that of early stopping: the mean AUC of the classification tasks. A trial of single_task is one run per
    task, and its score is their mean.

    Called again on the same folder, it goes on: an interrupted trial with the epoch that was interrupted, then up to
    `trials` in all. A random search then proposes what an unbroken one would have proposed; a Bayesian one draws new
    starting points. A trial whose loss became NaN or infinite is left out.

    A random search tries the same with any number of workers, and finds the same where all compute on CPUs of one kind.
    A Bayesian one asks for as many trials at a time as there are workers, from the scores of those before.

    Args:
        prepared: The data.
        base: All other settings; the model's name says what is searched, the seed serves search and training.
        folder: Where everything is kept.
        trials: Number of trials in all; a random search ends earlier when nothing is left to try.
        tuner: `"random"` or `"bayesian"`.
        fixed: Names of `SPACE` that are not searched and stay as they are in `base`.
        engine: Who trains, one trial at a time in each process; by default this process. For others, data in memory
            are saved below `data/prepared`, as `train` does.

    Returns:
        One row per finished trial, the best first: `trial`, the searched settings, `val_score`, and `best_epoch` and
        `epochs`, which are sums over the runs of the trial.

    Raises:
        RunError: If the folder holds another search.
        TrainingError: If no trial could be trained.
        MissingExtraError: If KerasTuner is not installed.
        ConfigError: If the tuner or the model is unknown, or nothing is left to search.
        EngineError: If workers are killed again and again.
    """
    check_model(base.model.name)
    engine = engine or Engine()
    library = _keras_tuner()
    space = search_space(base.model.name, fixed)
    if tuner not in TUNERS:
        raise ConfigError(f"Unknown tuner. Expected one of {sorted(TUNERS)}. Received: {tuner!r}")
    # Processes of other machines may start in another folder.
    folder = Path(folder) if engine.is_alone else Path(folder).resolve()
    tasks = prepared.task_names(base.model.tasks)
    _claim_folder(folder / "tuning.json", base, space, tuner, prepared.digest)
    hyperparameters = library.HyperParameters()
    for name, values in space.items():
        hyperparameters.Choice(name, list(values))
    oracle = getattr(library.oracles, TUNERS[tuner])(
        objective=library.Objective(OBJECTIVE, "max"),
        max_trials=trials,
        # For 0, the default, it would draw one.
        seed=base.training.seed or SEED_OF_ZERO,
        hyperparameters=hyperparameters,
        max_consecutive_failed_trials=sys.maxsize,
    )
    oracle.verbose = 0
    # KerasTuner prints that it reloads.
    with contextlib.redirect_stdout(io.StringIO()):
        keeper = library.engine.base_tuner.BaseTuner(oracle, directory=str(folder), project_name="oracle")
    if not engine.is_alone:
        prepared = stored(prepared)
    runs = trials * len(configs_of_runs(base, tasks)) if engine.is_alone else trials
    with contextlib.closing(Progress(runs, engine.workers)) as progress:
        proposed, begun = _proposed(oracle), collections.deque[Any]()

        def begin(trial: Any) -> tuple[int, dict[str, float]]:
            begun.append(trial)
            number, values = int(trial.trial_id), trial.hyperparameters.values
            if not engine.is_alone:
                progress.start(number + 1, _described(_name(number), values))
            return number, values

        # What a Bayesian search proposes depends on the scores so far: those of whole batches, not of who was faster.
        batches = (
            [proposed] if tuner == "random" else iter(lambda: list(itertools.islice(proposed, engine.workers)), [])
        )
        outcome = functools.partial(_outcome, base, folder)
        for batch in batches:
            for score in spread(engine, outcome, map(begin, batch), prepared, progress):
                trial = begun.popleft()
                trial.status = "COMPLETED"
                if isinstance(score, str):
                    trial.status, trial.message = "FAILED", score
                    progress.say(f"{_name(int(trial.trial_id))} failed: {score}")
                else:
                    oracle.update_trial(trial.trial_id, {OBJECTIVE: score})
                oracle.end_trial(trial)
                keeper.save()
    done = oracle.get_best_trials(trials)
    done = [trial for trial in done if trial.status == "COMPLETED"]
    # KerasTuner reads those of an interrupted search in any order.
    done.sort(key=lambda trial: (-trial.score, int(trial.trial_id)))
    if not done:
        log = folder / ("training.log" if engine.is_alone else "logs")
        raise TrainingError(f"No trial could be trained, see {log}. Received: {trials} trials")
    best = trial_config(base, done[0].hyperparameters.values)
    for suffix, config in {**configs_of_runs(best, tasks), "": best}.items():
        write_json(folder / f"best_config{suffix}.json", config.to_dict())
    table = pd.DataFrame(_row(base, tasks, trial, folder) for trial in done)
    with atomic_write(folder / "trials.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def _proposed(oracle: Any) -> Iterator[Any]:
    """KerasTuner's trials that have no score, interrupted ones first, as long as there is something to try."""
    for number in itertools.count():
        # It has one trial on for each name of a process.
        trial = oracle.create_trial(f"tuner{number}")
        if trial.status == "STOPPED":
            return
        if trial.score is None:
            yield trial
        else:
            # It repeats the trial that it ended last.
            trial.status = "COMPLETED"
            oracle.end_trial(trial)


def _outcome(
    base: RunConfig,
    folder: Path,
    trial: tuple[int, dict[str, float]],
    prepared: PreparedDataset,
    progress: Progress | None,
) -> float | str:
    """The score of a trial, given its number and values, or why it has none."""
    number, values = trial
    try:
        return _run_trial(trial_config(base, values), folder, number, values, prepared, progress)
    except (DataError, RunError):
        raise
    except MvkeError as error:
        # Diverged, or a shape that cannot be built, as more kept kernels than a task sees.
        return str(error)


def _run_trial(
    config: RunConfig,
    folder: Path,
    number: int,
    values: dict[str, float],
    prepared: PreparedDataset,
    progress: Progress | None,
) -> float:
    """Trains, or finishes, the runs of a trial; returns the mean of their best validation scores."""
    scores = []
    configs = configs_of_runs(config, prepared.task_names(config.model.tasks))
    for index, (suffix, run_config) in enumerate(configs.items(), start=1):
        name = f"{_name(number)}{suffix}"
        if progress is not None:
            progress.start(number * len(configs) + index, _described(name, values))
        run = finished_run(run_config, folder / "runs" / name, prepared, log_of(folder, name, progress), progress)
        scores.append(pd.read_csv(run.log_file)[OBJECTIVE].max())
    return float(np.mean(scores))


def _name(number: int) -> str:
    return f"trial-{number:03d}"


def _described(name: str, values: dict[str, float]) -> str:
    return f"{name} ({', '.join(f'{key} {value}' for key, value in values.items())})"


def _row(base: RunConfig, tasks: Sequence[str], trial: Any, folder: Path) -> dict[str, Any]:
    name = _name(int(trial.trial_id))
    logs = [
        pd.read_csv(Run(folder / "runs" / f"{name}{suffix}").log_file)[OBJECTIVE]
        for suffix in configs_of_runs(base, tasks)
    ]
    return {
        "trial": name,
        **trial.hyperparameters.values,
        OBJECTIVE: float(np.mean([scores.max() for scores in logs])),
        "best_epoch": sum(int(scores.argmax()) + 1 for scores in logs),
        "epochs": sum(len(scores) for scores in logs),
    }


def _claim_folder(path: Path, base: RunConfig, space: dict[str, Any], tuner: str, data: str) -> None:
    """Makes the folder that of this search; only the number of trials may change later."""
    # Through JSON, which knows no tuples.
    wanted = json.loads(json.dumps({"tuner": tuner, "space": space, "data": data, "base": base.to_dict()}))
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}). Choose another --output_dir or delete the folder.") from error
        if found != wanted:
            raise RunError(
                f"{path.parent} holds another search. Choose another --output_dir, or delete the folder. "
                f"Expected: {found}. Received: {wanted}"
            )
    write_json(path, wanted)


def _keras_tuner() -> Any:
    try:
        import keras_tuner
        import keras_tuner.engine.base_tuner
    except ImportError as error:
        raise MissingExtraError(
            f"The search needs the package KerasTuner: pip install 'mvke_tf[tune]'. Received: {error}"
        ) from error
    return keras_tuner
