"""Evaluation: predictions of a model, metrics per task and kind of user, the report of a run and its pictures.

A report is `{split: {task: {metric: value}}}`. The split of a part is its name (`"test"`); its rows of users that
training knows and of users it has never seen stand apart as `"test_warm_users"` and `"test_cold_users"`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure

from mvke_tf.data.dataset import Batches, PairData
from mvke_tf.data.movielens import DataError
from mvke_tf.data.prepared import Prepared
from mvke_tf.figures import calibration_figure, regression_figure, roc_figure, save_figure
from mvke_tf.files import write_json
from mvke_tf.metrics import auc, binary_metrics, cell, defined, regression_metrics
from mvke_tf.models.two_tower import conditional_model, conditional_tasks, task_kinds, task_names
from mvke_tf.run import Run, RunError

Values = dict[str, np.ndarray]
Report = dict[str, dict[str, dict[str, float | int | None]]]

BATCH_SIZE = 4096
_USERS = {"all": "{part}", "warm": "{part}_warm_users", "cold": "{part}_cold_users"}
_COLUMNS = (
    *("rows", "positives", "auc", "auc_clicked", "gauc", "accuracy", "log_loss", "calibration_error"),
    *("mse", "rmse", "mae"),
)


def predict(model: keras.Model, data: PairData, batch_size: int = BATCH_SIZE) -> Values:
    """Predictions for all pairs, in their order.

    Args:
        model: A two-tower model.
        data: The pairs.
        batch_size: Pairs per step; has no influence on the result.

    Returns:
        `{task: (n,)}`, float64: probabilities of binary tasks, values of regression tasks.

    Raises:
        ValueError: If there are no pairs, or an output is NaN or infinite.
    """
    kinds = task_kinds(model)
    outputs = _outputs(model, data, batch_size)
    return {task: _sigmoid(output) if kinds[task] == "binary" else output for task, output in outputs.items()}


def predict_conditional(model: keras.Model, data: PairData, batch_size: int = BATCH_SIZE) -> Values:
    """Probabilities given the event before, of the tasks built with `Task(given=...)`; as `predict`."""
    if not conditional_tasks(model):
        return {}
    conditional = conditional_model(model)
    return {task: _sigmoid(output) for task, output in _outputs(conditional, data, batch_size).items()}


def _outputs(model: keras.Model, data: PairData, batch_size: int) -> Values:
    # Labels and weights are not read: a model of one task predicts on data that has others.
    inputs = dataclasses.replace(data, labels={}, weights={})
    features = Batches(inputs, batch_size).in_order().map(lambda x, _: {name: x[name] for name in model.input})
    finite = {}
    for task, output in model.predict(features, verbose=0).items():
        finite[task] = np.asarray(output, np.float64).reshape(-1)
        wrong = ~np.isfinite(finite[task])
        if wrong.any():
            raise ValueError(
                f"Expected finite outputs of task {task!r}. Received: {wrong.sum()} of {len(wrong)} NaN or infinite; "
                "the weights are damaged, train anew with a lower learning rate."
            )
    return finite


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logit))


def evaluate_model(model: keras.Model, prepared: Prepared, part: str, batch_size: int = BATCH_SIZE) -> Report:
    """Metrics of a model on one part of the data.

    Args:
        model: A two-tower model for the schema of `prepared`.
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.
        batch_size: Pairs per step.

    Returns:
        The splits `part`, `part_warm_users` and `part_cold_users`, each with the metrics of
        `mvke_tf.metrics.binary_metrics` or `regression_metrics` per task, and for the task `"cvr"` also `auc_clicked`,
        the AUC over the rows with `ctr = 1`: of the probability given a click, where the model has one.

    Raises:
        DataError: If the part has no rows.
        ValueError: If there is no such part.
    """
    return measure(*_predict_part(model, prepared, part, batch_size), task_kinds(model), prepared, part)


def evaluate_run(
    run: Run, part: str = "test", batch_size: int = BATCH_SIZE, report: Callable[[str], object] = print
) -> Report:
    """Evaluates the best checkpoint of a run, and writes its report and pictures.

    Splits of other parts that are in the report already stay. The pictures are `<part>_roc.png` and
    `<part>_calibration.png` of the classification tasks, `<part>_regression.png` of the others.

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
    predicted, conditional = _predict_part(model, prepared, part, batch_size)
    kinds = task_kinds(model)
    merged |= measure(predicted, conditional, kinds, prepared, part)
    for name, figure in _figures(predicted, conditional, kinds, prepared, part).items():
        save_figure(figure, run.figures / f"{part}_{name}.png")
    write_json(run.report_file, merged)
    return merged


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
                cells.append([task, users, *(cell(tasks[task].get(name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zipped))
        for zipped in (zip(row, widths, strict=True) for row in cells)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _predict_part(model: keras.Model, prepared: Prepared, part: str, batch_size: int) -> tuple[Values, Values]:
    data = prepared.part(part, task_names(model))
    if not len(data):
        raise DataError(f"The {part} part of the prepared data has no rows. Choose another part or another split.")
    return predict(model, data, batch_size), predict_conditional(model, data, batch_size)


def measure(predicted: Values, conditional: Values, kinds: Mapping[str, str], prepared: Prepared, part: str) -> Report:
    """The report on one part from what was predicted for its rows, whoever predicted it.

    Args:
        predicted: `{task: (n,)}`, in the order of `prepared.part_rows(part)`: probabilities, or values of a regression.
        conditional: `{task: (n,)}`, p(conversion given click) where that is not what `predicted` has.
        kinds: `{task: "binary" | "regression"}`.
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.

    Returns:
        As `evaluate_model`.
    """
    pairs = prepared.pairs.iloc[prepared.part_rows(part)]
    data = prepared.part(part, tuple(predicted))
    users, warm = prepared.raw["user"]["user_id"][data.user_rows], prepared.known("user")[data.user_rows]
    clicked = pairs["ctr"].to_numpy() == 1
    splits: Report = {}
    for users_kind, chosen in (("all", np.ones_like(warm)), ("warm", warm), ("cold", ~warm)):
        tasks = splits[_USERS[users_kind].format(part=part)] = {}
        for task, values in predicted.items():
            labels = data.labels[task]
            if kinds[task] == "regression":
                rows = chosen & _labelled(data, task)
                tasks[task] = regression_metrics(labels[rows], values[rows])
                continue
            tasks[task] = binary_metrics(labels[chosen], values[chosen], users[chosen])
            if task == "cvr":
                rows = chosen & clicked
                tasks[task]["auc_clicked"] = defined(auc(labels[rows], conditional.get(task, values)[rows]))
    return splits


def _labelled(data: PairData, task: str) -> np.ndarray:
    """Which rows have a label in a task: `(n,)` bool."""
    return data.weights[task] > 0 if task in data.weights else np.ones(len(data), bool)


def _figures(
    predicted: Values, conditional: Values, kinds: dict[str, str], prepared: Prepared, part: str
) -> dict[str, Figure]:
    """Pictures of one part by name: ROC and calibration of binary tasks, CVR also of the clicked rows; regression."""
    data = prepared.part(part, tuple(predicted))
    binary = {task.upper(): (data.labels[task], predicted[task]) for task in predicted if kinds[task] == "binary"}
    values = {
        task: (data.labels[task][_labelled(data, task)], predicted[task][_labelled(data, task)])
        for task in predicted
        if kinds[task] == "regression" and _labelled(data, task).any()
    }
    pictures = {}
    if binary:
        clicked = prepared.pairs["ctr"].to_numpy()[prepared.part_rows(part)] == 1
        given = {}
        if "cvr" in predicted:
            scores = conditional.get("cvr", predicted["cvr"])
            given["CVR of clicked"] = (data.labels["cvr"][clicked], scores[clicked])
        pictures |= {"roc": roc_figure(binary | given, part), "calibration": calibration_figure(binary, part)}
    if values:
        pictures["regression"] = regression_figure(values, part)
    return pictures


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
