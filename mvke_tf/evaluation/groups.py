# SPDX-License-Identifier: Apache-2.0
"""Metrics by group of users or items, as a table and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mvke_tf.data.groups import FEW_ROWS, SMALL_SHARE, Grouping, is_small
from mvke_tf.data.store import PreparedDataset
from mvke_tf.evaluation.outcomes import Outcome
from mvke_tf.metrics import auc, poisson_deviance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ALL = "all"
# Groups that a picture can show.
MOST_GROUPS = 40
_METRICS = {
    "binary": ("auc", "AUC"),
    "regression": ("rmse", "RMSE (unit of the label)"),
    "count": ("poisson_deviance", "mean Poisson deviance"),
    "multiclass": ("accuracy", "accuracy"),
}


def group_metrics(
    outcomes: Sequence[Outcome], groupings: Sequence[Grouping], prepared: PreparedDataset, part: str
) -> pd.DataFrame:
    """What the predictions are worth in each group of rows.

    Args:
        outcomes: The tasks, on the rows of the part.
        groupings: Groups of the rows of `prepared.users` or `prepared.items`.
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.

    Returns:
        One row per task and group with rows: `task`, `variable`, `group`, `rows` (those that count for the task),
        `positives` and `auc` of a binary task, `rmse` of a regression, `poisson_deviance` of a count, `accuracy` of a
        multi-class task, `mean_prediction` and `mean_label` (of all but the last). All rows are the group `"all"` of
        the variable `"all"`. What is not defined, as an AUC of one class, is NaN.
    """
    import pandas as pd

    rows = prepared.part_rows(part)
    entities = {"user": prepared.user_row[rows], "item": prepared.item_row[rows]}
    measured = []
    for outcome in outcomes:
        groups = [(ALL, ALL, np.ones(len(rows), bool))]
        for grouping in groupings:
            inside = grouping.members[entities[grouping.side]]
            groups += [(grouping.variable, name, inside[:, index]) for index, name in enumerate(grouping.groups)]
        for variable, name, inside in groups:
            chosen = inside & outcome.counts
            if chosen.any():
                group = {"task": outcome.task, "variable": variable, "group": name}
                measured.append(group | _metrics(outcome.kind, outcome.labels[chosen], outcome.values[chosen]))
    columns = [
        *("task", "variable", "group", "rows", "positives", "auc", "rmse", "poisson_deviance", "accuracy"),
        *("mean_prediction", "mean_label"),
    ]
    return pd.DataFrame(measured, columns=columns).astype({"positives": "Int64"})


def _metrics(kind: str, labels: np.ndarray, values: np.ndarray) -> dict[str, float]:
    if kind == "multiclass":
        return {"rows": len(labels), "accuracy": float(np.mean(values.argmax(axis=1) == labels))}
    means = {"rows": len(labels), "mean_prediction": float(values.mean()), "mean_label": float(labels.mean())}
    if kind == "count":
        return means | {"poisson_deviance": poisson_deviance(labels, values)}
    if kind == "binary":
        return means | {"positives": int(labels.sum()), "auc": auc(labels, values)}
    return means | {"rmse": float(np.sqrt(np.mean(np.square(values - labels))))}


def groups_figure(frame: pd.DataFrame, grouping: Grouping, kinds: dict[str, str], part: str) -> Figure:
    """The metric of each group, one panel per task, beside that of all rows; groups of few rows are pale and hollow.

    Args:
        frame: As `group_metrics` makes it.
        grouping: Its groups to show; of more than `MOST_GROUPS` those with the most rows.
        kinds: `{task: kind}`.
        part: Name of the part, for the title.
    """
    from matplotlib.figure import Figure

    from mvke_tf.figures import BLUE, plain_text

    shown = frame[frame["variable"] == grouping.variable]
    total = frame[frame["variable"] == ALL].set_index("task")
    sizes = shown.groupby("group")["rows"].max()
    largest = set(sizes.sort_values(ascending=False, kind="stable").index[:MOST_GROUPS])
    groups = [group for group in grouping.groups if group in largest]
    tasks = list(shown["task"].unique())
    figure = Figure(figsize=(3.4 * len(tasks) + 1.6, 1.9 + 0.3 * len(groups)), layout="constrained")
    place = {group: index for index, group in enumerate(groups)}
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        column, label = _METRICS[kinds[task]]
        rows = shown[(shown["task"] == task) & shown["group"].isin(largest)]
        small = is_small(rows["rows"].to_numpy(), total.loc[task, "rows"])
        for chosen, style in ((~small, {"color": BLUE}), (small, {"color": "0.6", "markerfacecolor": "white"})):
            where = [place[group] for group in rows["group"][chosen]]
            axes.plot(rows[column][chosen], where, linestyle="none", marker="o", markersize=7, **style)
        overall = total.loc[task, column]
        if np.isfinite(overall):
            axes.axvline(overall, color="0.4", linewidth=1, linestyle="--")
        axes.set_title(f"{task}, all rows {overall:.4f}" if np.isfinite(overall) else task, fontsize=11)
        axes.set_xlabel(label)
        axes.grid(color="0.9")
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=5)
    first = figure.axes[0]
    first.set_yticks(range(len(groups)), [f"{plain_text(group)} ({sizes[group]:,})" for group in groups])
    first.set_ylim(len(groups) - 0.5, -0.5)
    first.set_ylabel("group (rows)")
    note = f"{part} part; dashed: all rows; hollow: fewer than {FEW_ROWS} rows or {SMALL_SHARE:.0%} of them"
    if len(groups) < len(sizes):
        note += f"; the {len(groups)} largest of {len(sizes)} groups"
    figure.suptitle(f"By {plain_text(grouping.description)}\n{note}", fontsize=11)
    return figure
