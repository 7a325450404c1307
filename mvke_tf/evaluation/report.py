# SPDX-License-Identifier: Apache-2.0
"""The report of a run: metrics per task and kind of user, by group, and pictures.

A report is `{split: {task: {metric: value}}}`. The split of a part is its name (`"test"`). Where users have ids, the
rows of users that training knows and of users it has never seen stand apart as `"test_warm_users"` and
`"test_cold_users"`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mvke_tf.data.groups import groups
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import RunError, missing_modules
from mvke_tf.evaluation.groups import group_metrics, groups_figure
from mvke_tf.evaluation.outcomes import Outcome, outcomes, part_rows
from mvke_tf.inference.predictions import predict
from mvke_tf.inference.vectors import TILE_ROWS
from mvke_tf.io import atomic_write, csv_safe, write_json
from mvke_tf.metrics import auc, defined, task_metrics
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import Run
from mvke_tf.run_folder import USERS, Metrics, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


def evaluate_model(model: TwoTowerModel, prepared: PreparedDataset, part: str, batch_size: int = TILE_ROWS) -> Report:
    """Metrics of a model on one part of the data.

    Args:
        model: A two-tower model of tasks of `prepared`.
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.
        batch_size: Rows per step; without influence on the result, but for its last digits.

    Returns:
        The split `part`, and where users have ids `part_warm_users` and `part_cold_users`, each with the metrics of
        `mvke_tf.metrics.task_metrics` per task, in the unit of the label, over the rows that
        count for it. `gauc` is among them where users have ids. Tasks that are declared with `given` also have
        `auc_given`, the AUC over the rows with that event: of the probability given the event, where the model has one.

    Raises:
        ConfigError: If there is no such part, or a task of the model is not declared.
        DataError: If the part has no rows.
    """
    return _report(outcomes_of(model, prepared, part, batch_size), prepared, part)


def evaluate_run(
    run: Run,
    part: str = "test",
    batch_size: int = TILE_ROWS,
    calibrated: bool = False,
    show: Callable[[Report], object] | None = None,
) -> Report:
    """Evaluates the best checkpoint of a run, and writes its report, metrics by group, and pictures.

    Splits of other parts that are in the report already stay. The pictures are `<part>_roc.png` and
    `<part>_calibration.png` of the binary tasks, `<part>_regression.png` of the others, and for each variable by which
    the declaration groups users or items `<part>_groups_<variable>.png`; `<part>_groups.csv` has the numbers. Both are
    left out, with a note, where the extra `analysis` is not installed.

    Args:
        run: The run.
        part: `"train"`, `"validation"` or `"test"`.
        batch_size: Rows per step; without influence on the result, but for its last digits.
        calibrated: Whether binary predictions are those that an export gives after `calibrate_run`.
        show: Called with the report before the pictures are drawn, which takes longer.

    Returns:
        The whole report, as in `run.report_file`.

    Raises:
        ConfigError: If there is no such part.
        DataError: If the data are damaged, or the part has no rows.
        RunError: If the run has no checkpoint, no data, or not the calibration that is asked for, or its present report
            is damaged.
    """
    merged = run.report()
    prepared = run.prepared
    rows = len(part_rows(prepared, part))
    model = run.load_model(calibrated)
    if calibrated and not model.calibration:
        raise RunError(f"{run.folder} is not calibrated yet: mvke calibrate {run.folder} --method platt")
    logger.info("Evaluating %s on %s rows of the %s part ...", run.checkpoint, f"{rows:,}", part)
    found = outcomes_of(model, prepared, part, batch_size)
    merged |= _report(found, prepared, part)
    if show is not None:
        show(merged)
    if missing := missing_modules("matplotlib", "pandas"):
        needed = f"{', '.join(missing)}: pip install 'mvke_tf[analysis]'"
        logger.info("Note: pictures and metrics by group are left out; they need %s", needed)
    else:
        _write_pictures(run, found, model.kinds, part)
    write_json(run.report_file, merged)
    return merged


def _write_pictures(run: Run, found: Sequence[Outcome], kinds: dict[str, str], part: str) -> None:
    from mvke_tf.figures import save_figure

    # Of data in buckets, groups are those of the users of the part.
    prepared = run.prepared.alone(part)
    groupings = groups(prepared)
    by_group = group_metrics(found, groupings, prepared, part)
    figures = _figures(found, part)
    for grouping in groupings:
        if grouping.variable in set(by_group["variable"]):
            figures[f"groups_{grouping.variable}"] = groups_figure(by_group, grouping, kinds, part)
    for name, figure in figures.items():
        save_figure(figure, run.figures / f"{part}_{name}.png")
    with atomic_write(run.groups_file(part)) as temporary:
        by_group.map(csv_safe).to_csv(temporary, index=False, float_format="%.8g")


def measure(
    predicted: Mapping[str, np.ndarray],
    conditional: Mapping[str, np.ndarray],
    kinds: Mapping[str, str],
    prepared: PreparedDataset,
    part: str,
) -> Report:
    """The report on one part from what was predicted for its rows, whoever predicted it; arguments as in `outcomes`.

    Returns:
        As `evaluate_model`.
    """
    return _report(outcomes(predicted, conditional, kinds, prepared, part), prepared, part)


def outcomes_of(model: TwoTowerModel, prepared: PreparedDataset, part: str, batch_size: int) -> tuple[Outcome, ...]:
    """What a model predicts of one part, beside what came of it; arguments as of `evaluate_model`."""
    part_rows(prepared, part)
    predictions = predict(model, prepared.shards(part, model.task_names), batch_size)
    return outcomes(predictions.values, predictions.conditional, model.kinds, prepared, part)


def _report(found: Sequence[Outcome], prepared: PreparedDataset, part: str) -> Report:
    kinds_of_users = {"all": np.ones(len(prepared.part_rows(part)), bool)}
    ids = None
    if prepared.has_users:
        ids = prepared.of_part(part, lambda bucket: bucket.users.key[bucket.user_row])
        warm = prepared.of_part(part, lambda bucket: bucket.known("user")[bucket.user_row])
        kinds_of_users |= {"warm": warm, "cold": ~warm}
    return {
        USERS[kind].format(part=part): {outcome.task: _metrics(outcome, chosen, ids) for outcome in found}
        for kind, chosen in kinds_of_users.items()
    }


def _metrics(outcome: Outcome, chosen: np.ndarray, users: np.ndarray | None) -> Metrics:
    rows = chosen & outcome.counts
    chosen_users = None if users is None else users[rows]
    metrics = task_metrics(outcome.kind, outcome.labels[rows], outcome.values[rows], chosen_users)
    if outcome.given is not None:
        rows = chosen & outcome.given.rows
        metrics["auc_given"] = defined(auc(outcome.labels[rows], outcome.given.values[rows]))
    return metrics


def _figures(found: Sequence[Outcome], part: str) -> dict[str, Figure]:
    """Pictures of one part by name: ROC and calibration of binary tasks; mean labels of regressions and counts."""
    from mvke_tf.figures import calibration_figure, regression_figure, roc_figure

    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {"binary": {}, "given": {}, "regression": {}}
    for outcome in found:
        rows = outcome.counts
        if rows.any() and outcome.kind != "multiclass":
            kind = "binary" if outcome.kind == "binary" else "regression"
            curves[kind][outcome.task] = outcome.labels[rows], outcome.values[rows]
        if outcome.given is not None and outcome.given.rows.any():
            rows = outcome.given.rows
            curves["given"][f"{outcome.task} given {outcome.given.task}"] = (
                outcome.labels[rows],
                outcome.given.values[rows],
            )
    pictures = {}
    if curves["binary"]:
        pictures["roc"] = roc_figure(curves["binary"] | curves["given"], part)
        pictures["calibration"] = calibration_figure(curves["binary"], part)
    if curves["regression"]:
        pictures["regression"] = regression_figure(curves["regression"], part)
    return pictures
