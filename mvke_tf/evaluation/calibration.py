# SPDX-License-Identifier: Apache-2.0
"""Calibration of binary tasks: fitted on the validation part, kept with the run, applied by export and evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np

from mvke_tf.errors import ConfigError, DataError
from mvke_tf.evaluation.outcomes import Outcome
from mvke_tf.evaluation.report import outcomes_of
from mvke_tf.inference.vectors import TILE_ROWS
from mvke_tf.layers import LogitMap
from mvke_tf.metrics import binary_metrics, value_bins
from mvke_tf.run import Run
from mvke_tf.run_folder import Report, cell

METHODS = ("temperature", "platt", "isotonic")
# Bins of equally many rows whose mean logits and shares of positives isotonic regression starts from.
_BINS = 50
_MEASURES = ("calibration_error", "log_loss", "auc")


def fit_calibration(method: str, labels: np.ndarray, logits: np.ndarray) -> LogitMap:
    """The calibration of one task of the highest likelihood.

    `"temperature"` is `z / T` (Guo et al., ICML 2017), `"platt"` `a z + b` (Platt, 1999), and `"isotonic"` any rising
    function (Zadrozny and Elkan, KDD 2002): the share of positives, `(positives + 1/2) / (rows + 1)`, of blocks of
    bins, with straight lines between the mean logits of the blocks, so that no order of rows is lost.

    Args:
        method: One of `METHODS`.
        labels: `(n,)`, 0 or 1, both.
        logits: `(n,)`.

    Raises:
        ConfigError: If there is no such method.
        DataError: If all labels are equal, or higher logits do not mean more positives.
    """
    if method not in METHODS:
        raise ConfigError(f"The method of calibration must be one of {METHODS}. Received: {method!r}")
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    if len(np.unique(labels)) < 2:
        raise DataError("Calibration needs rows of both labels. Received: rows of one label or none")
    if method == "isotonic":
        return _isotonic(labels, logits)
    if method == "platt":
        from sklearn.linear_model import LogisticRegression

        fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits[:, None], labels)
        slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    else:
        from scipy import optimize

        def loss(log_slope: float) -> float:
            scaled = np.exp(log_slope) * logits
            return float(np.mean(np.logaddexp(0.0, scaled) - labels * scaled))

        slope = float(
            np.exp(optimize.minimize_scalar(loss, bounds=(-7, 7), method="bounded", options={"xatol": 1e-9}).x)
        )
        intercept = 0.0
    if slope <= 1e-3:
        raise DataError(
            f"Higher logits must mean more positives. Received: a fitted slope of {slope:.3g}; the model "
            "has not learned the task."
        )
    return LogitMap(slope, intercept)


def _isotonic(labels: np.ndarray, logits: np.ndarray) -> LogitMap:
    from sklearn.isotonic import IsotonicRegression

    means, shares, rows = value_bins(labels, logits, _BINS)
    fitted = IsotonicRegression().fit_transform(means, shares, sample_weight=rows)
    knots, values = [], []
    for level in np.unique(fitted):
        block = fitted == level
        count = rows[block].sum()
        knots.append(float(np.average(means[block], weights=rows[block])))
        share = (level * count + 0.5) / (count + 1)
        values.append(float(np.log(share) - np.log1p(-share)))
    return LogitMap(knots=tuple(knots), values=tuple(np.maximum.accumulate(values)))


def calibrate_run(run: Run, method: str, batch_size: int = TILE_ROWS) -> dict[str, Report]:
    """Fits a calibration of every binary task on the validation part and keeps it with the run.

    Each row that counts for a task counts once. A task that comes after another event is calibrated as it is put out:
    the probability of both. What was kept before is replaced.

    Args:
        run: The run.
        method: One of `METHODS`.
        batch_size: Rows per step.

    Returns:
        `{part: {task: {metric: value}}}` of the parts `"validation"` and `"test"` as `"before"` and as `"after"`.

    Raises:
        ConfigError: If there is no such method, or the model has no binary task.
        DataError: If a task cannot be calibrated; nothing is kept then.
        RunError: If the run has no checkpoint or no data.
    """
    if method not in METHODS:
        raise ConfigError(f"The method of calibration must be one of {METHODS}. Received: {method!r}")
    model = run.load_model()
    binary = [task for task, kind in model.kinds.items() if kind == "binary"]
    if not binary:
        raise ConfigError(f"Calibration is for binary tasks. Received: a model of the tasks {list(model.task_names)}")
    found = {
        part: {outcome.task: outcome for outcome in outcomes_of(model, run.prepared, part, batch_size)}
        for part in ("validation", "test")
    }
    maps: dict[str, LogitMap] = {}
    for task in binary:
        try:
            maps[task] = fit_calibration(method, *_labels_and_logits(found["validation"][task]))
        except DataError as error:
            raise DataError(f"Task {task!r} on the validation part: {error}") from error
    run.save_calibration(method, {task: dataclasses.asdict(each) for task, each in maps.items()})
    report: dict[str, Report] = {"before": {}, "after": {}}
    for part, outcomes in found.items():
        for when in report:
            report[when][part] = {
                task: _measured(outcomes[task], maps[task] if when == "after" else None) for task in binary
            }
    return report


def _labels_and_logits(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    values = outcome.values[outcome.counts]
    positive, negative = np.maximum(values, np.finfo(np.float64).tiny), np.minimum(values, 1 - 2**-53)
    return outcome.labels[outcome.counts], np.log(positive) - np.log1p(-negative)


def _measured(outcome: Outcome, calibration: LogitMap | None) -> dict[str, float | int | None]:
    labels, logits = _labels_and_logits(outcome)
    logits = logits if calibration is None else calibration(logits, np)
    measured = binary_metrics(labels, np.exp(-np.logaddexp(0.0, -logits)))
    return {name: measured[name] for name in _MEASURES}


def calibration_table(report: dict[str, Report]) -> str:
    """What `calibrate_run` returns, as a plain-text table."""
    lines = [["part", "task", *(f"{name.replace('_', ' ')} {when}" for name in _MEASURES for when in report)]]
    for part, tasks in report["before"].items():
        lines += [
            [part, task, *(cell(report[when][part][task][name]) for name in _MEASURES for when in report)]
            for task in tasks
        ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
