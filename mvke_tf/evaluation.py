"""Evaluation: probabilities of a model, metrics per task and kind of user, the report of a run and its pictures.

A report is `{split: {task: {metric: value}}}`. The split of a part is its name (`"test"`); its rows of users that
training knows and of users it has never seen stand apart as `"test_warm_users"` and `"test_cold_users"`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from mvke_tf.data.dataset import Batches, PairData
from mvke_tf.data.movielens import DataError
from mvke_tf.data.prepared import Prepared
from mvke_tf.files import write_json, written_whole
from mvke_tf.metrics import auc, binary_metrics, calibration_bins, calibration_error, defined
from mvke_tf.models.two_tower import task_names
from mvke_tf.run import Run, RunError

Probabilities = dict[str, np.ndarray]
Report = dict[str, dict[str, dict[str, float | int | None]]]

BATCH_SIZE = 4096
_USERS = {"all": "{part}", "warm": "{part}_warm_users", "cold": "{part}_cold_users"}
_COLUMNS = ("rows", "positives", "auc", "auc_clicked", "gauc", "log_loss", "calibration_error")


def predict(model: keras.Model, data: PairData, batch_size: int = BATCH_SIZE) -> Probabilities:
    """Probabilities of all pairs, in their order.

    Args:
        model: A two-tower model, whose outputs are logits of binary tasks.
        data: The pairs.
        batch_size: Pairs per step; has no influence on the result.

    Returns:
        `{task: (n,)}`, float64.

    Raises:
        ValueError: If there are no pairs, or a logit is NaN or infinite.
    """
    logits = model.predict(Batches(data, batch_size).in_order(), verbose=0)
    probabilities = {}
    for task in task_names(model):
        logit = np.asarray(logits[task], np.float64).reshape(-1)
        if not np.isfinite(logit).all():
            raise ValueError(
                f"Expected finite logits of task {task!r}. Received: {np.sum(~np.isfinite(logit))} of {len(logit)} "
                "NaN or infinite; the weights are damaged, train anew with a lower learning rate."
            )
        probabilities[task] = np.exp(-np.logaddexp(0.0, -logit))
    return probabilities


def evaluate_model(model: keras.Model, prepared: Prepared, part: str, batch_size: int = BATCH_SIZE) -> Report:
    """Metrics of a model on one part of the data.

    Args:
        model: A two-tower model for the schema of `prepared`.
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.
        batch_size: Pairs per step.

    Returns:
        The splits `part`, `part_warm_users` and `part_cold_users`, each with the metrics of
        `mvke_tf.metrics.binary_metrics` per task, and for the task `"cvr"` also `auc_clicked`, the AUC over the rows
        with `ctr = 1`.

    Raises:
        DataError: If the part has no rows.
        ValueError: If there is no such part.
    """
    return _measure(_predict_part(model, prepared, part, batch_size), prepared, part)


def evaluate_run(
    run: Run, part: str = "test", batch_size: int = BATCH_SIZE, report: Callable[[str], object] = print
) -> Report:
    """Evaluates the best checkpoint of a run, and writes its report and pictures.

    Splits of other parts that are in the report already stay. The pictures are those of `picture_files`.

    Args:
        run: The run.
        part: `"train"`, `"validation"` or `"test"`.
        batch_size: Pairs per step.
        report: Receives a line of progress.

    Returns:
        The whole report, as in `run.report_file`.

    Raises:
        RunError: If the run has no checkpoint, or its present report is damaged.
        DataError: If its data are damaged or the part has no rows.
        ValueError: If there is no such part.
    """
    merged = _read_report(run.report_file)
    prepared = run.prepared
    rows = len(prepared.part_rows(part))
    model = run.load_model()
    report(f"Evaluating {run.checkpoint} on {rows:,} rows of the {part} part ...")
    probabilities = _predict_part(model, prepared, part, batch_size)
    merged |= _measure(probabilities, prepared, part)
    roc_file, calibration_file = picture_files(run, part)
    labels = {task: prepared.pairs[task].to_numpy()[prepared.part_rows(part)] for task in probabilities}
    _save(roc_figure(labels, probabilities, part), roc_file)
    _save(calibration_figure(labels, probabilities, part), calibration_file)
    write_json(run.report_file, merged)
    return merged


def picture_files(run: Run, part: str) -> tuple[Path, Path]:
    """Where `evaluate_run` writes the ROC and the calibration picture of one part."""
    return run.figures / f"{part}_roc.png", run.figures / f"{part}_calibration.png"


def results_table(report: Report, part: str) -> str:
    """The results on one part as a plain-text table: per task, for all, for known and for new users.

    Args:
        report: As `evaluate_run` returns it.
        part: Its part.

    Raises:
        ValueError: If the report does not have the part.
    """
    if part not in report:
        raise ValueError(f"The report has no split {part!r}. It has: {sorted(report)}")
    splits = {users: report.get(pattern.format(part=part), {}) for users, pattern in _USERS.items()}
    columns = [name for name in _COLUMNS if any(name in metrics for metrics in report[part].values())]
    cells = [["task", "users", *(name.replace("_", " ") for name in columns)]]
    for task in report[part]:
        for users, tasks in splits.items():
            if task in tasks:
                cells.append([task, users, *(_cell(tasks[task].get(name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zipped))
        for zipped in (zip(row, widths, strict=True) for row in cells)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def roc_figure(labels: Probabilities, probabilities: Probabilities, part: str) -> Figure:
    """ROC curves of all tasks; CVR also over the clicked rows alone.

    Args:
        labels: `{task: (n,)}`, 0 or 1.
        probabilities: `{task: (n,)}`.
        part: Name of the part, for the title.
    """
    curves = {task.upper(): (labels[task], probabilities[task]) for task in labels}
    if {"ctr", "cvr"} <= set(labels):
        clicked = labels["ctr"] == 1
        curves["CVR of clicked"] = (labels["cvr"][clicked], probabilities["cvr"][clicked])
    areas = {name: auc(*curve) for name, curve in curves.items()}
    title = ", ".join(f"{name} {_cell(defined(area))}" for name, area in areas.items())
    figure, axes = _square_axes(f"ROC, {part} part, {_rows(labels)} rows\nAUC: {title}")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="chance, AUC 0.5000")
    for (name, curve), style in zip(curves.items(), _styles(), strict=False):
        label = f"{name}, AUC {_cell(defined(areas[name]))}, {len(curve[0]):,} rows"
        x, y = roc_curve(*curve)[:2] if np.isfinite(areas[name]) else ([], [])
        axes.plot(x, y, label=label, markevery=0.1, **style)
    axes.set_xlabel("False positive rate")
    axes.set_ylabel("True positive rate")
    axes.legend(loc="lower right")
    return figure


def calibration_figure(labels: Probabilities, probabilities: Probabilities, part: str) -> Figure:
    """Observed share of positives against the predicted probability, in ten bins of equally many rows per task.

    Args:
        labels: `{task: (n,)}`, 0 or 1.
        probabilities: `{task: (n,)}`.
        part: Name of the part, for the title.
    """
    areas = ", ".join(f"{task.upper()} {_cell(defined(auc(labels[task], probabilities[task])))}" for task in labels)
    figure, axes = _square_axes(f"Calibration, {part} part, {_rows(labels)} rows\nAUC: {areas}")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="perfectly calibrated")
    for task, style in zip(labels, _styles(), strict=False):
        predicted, observed, _ = calibration_bins(labels[task], probabilities[task])
        error = calibration_error(labels[task], probabilities[task])
        axes.plot(predicted, observed, label=f"{task.upper()}, calibration error {error:.4f}", **style)
    axes.set_xlabel("Mean predicted probability of a bin")
    axes.set_ylabel("Observed share of positives in the bin")
    axes.legend(loc="upper left")
    return figure


def _predict_part(model: keras.Model, prepared: Prepared, part: str, batch_size: int) -> Probabilities:
    data = prepared.part(part, task_names(model))
    if not len(data):
        raise DataError(f"The {part} part of the prepared data has no rows. Choose another part or another split.")
    return predict(model, data, batch_size)


def _measure(probabilities: Probabilities, prepared: Prepared, part: str) -> Report:
    pairs = prepared.pairs.iloc[prepared.part_rows(part)]
    user_rows = pairs["user_row"].to_numpy()
    users, warm = prepared.raw["user"]["user_id"][user_rows], prepared.known("user")[user_rows]
    splits: Report = {}
    for kind, chosen in (("all", np.ones_like(warm)), ("warm", warm), ("cold", ~warm)):
        tasks = splits[_USERS[kind].format(part=part)] = {}
        for task, probability in probabilities.items():
            labels = pairs[task].to_numpy()
            tasks[task] = binary_metrics(labels[chosen], probability[chosen], users[chosen])
            if task == "cvr":
                clicked = chosen & (pairs["ctr"].to_numpy() == 1)
                tasks[task]["auc_clicked"] = defined(auc(labels[clicked], probability[clicked]))
    return splits


def _read_report(path: Path) -> Report:
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}). Delete it and evaluate again.") from error
    if not isinstance(report, dict):
        raise RunError(f"{path} is no report {{split: {{task: {{metric: value}}}}}}. Delete it and evaluate again.")
    return report


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _rows(labels: Probabilities) -> str:
    return f"{max(map(len, labels.values())):,}"


def _styles() -> Iterator[dict[str, object]]:
    """Endless line styles that differ without colour too; the colours are those of Okabe and Ito."""
    colours = itertools.cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"))
    lines = itertools.cycle(("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1))))
    for colour, line, marker in zip(colours, lines, itertools.cycle("os^Dv"), strict=False):
        yield {"color": colour, "linestyle": line, "marker": marker, "markersize": 6, "linewidth": 1.8}


def _square_axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(title, fontsize=11)
    axes.grid(color="0.9")
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, dpi=150)
