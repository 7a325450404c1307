# SPDX-License-Identifier: Apache-2.0
"""Tables and the picture of a comparison of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mvke_tf.config import WITHOUT_NETWORK, RunConfig
from mvke_tf.experiments.significance import holm, mean_interval, paired_p_value
from mvke_tf.models import READERS

REFERENCE = "single_task"
SIGNIFICANT = 0.05
# Of each metric its name in tables, and whether more is better.
METRICS = {
    "auc": ("AUC", True),
    "auc_given": ("AUC given the event before", True),
    "rmse": ("RMSE", False),
    "macro_auc": ("macro AUC", True),
    "poisson_deviance": ("Poisson deviance", False),
    "gauc": ("GAUC", True),
    "accuracy": ("accuracy", True),
    "mae": ("MAE", False),
    "mse": ("MSE", False),
    "log_loss": ("log loss", False),
    "calibration_error": ("calibration error", False),
}
# Metrics that say how well a task is learned, for the first table, the picture and the verdict.
HEADLINE = ("auc", "auc_given", "rmse", "macro_auc", "poisson_deviance")
MEAN_AUC = "mean_auc"


def measures(results: pd.DataFrame, tasks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What results.csv has measured on the test part, `{"<task>_<metric>": (task, metric)}`, the most telling first.

    The mean AUC stands for the task `"mean"`.
    """
    found = {f"{task}_{metric}": (task, metric) for metric in METRICS for task in tasks}
    found = {name: pair for name, pair in found.items() if f"test_{name}" in results}
    if sum(metric == "auc" for _, metric in found.values()) > 1:
        found[MEAN_AUC] = ("mean", "auc")
    headline = {name: pair for name, pair in found.items() if pair[1] in HEADLINE}
    return {**headline, **found}


def summary(results: pd.DataFrame, models: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """One row per model: what it reaches on the test part, and whether that differs from single-task learning.

    Args:
        results: Rows of `mvke_tf.experiments.compare.result_row`.
        models: Names of the models, in the order of the table.
        tasks: Names of the tasks.

    Returns:
        `model`; `seeds`; `parameters` and `examples_per_second`, medians over the seeds; `epochs`, their mean; and for
        every measure `<task>_<metric>` its mean over the seeds, and `<task>_<metric>_ci95`, `_difference` and `_p`: the
        half width of the 95 % confidence interval (Student's t), the mean difference to single_task of the same seeds,
        and the p-value of the two-sided paired t-test of this difference, after Holm's correction over all models of
        the table. A row without chance (popularity) stands for every seed. What cannot be said is NaN.
    """
    by_model = {model: results[results["model"] == model].set_index("seed") for model in models}
    table = pd.DataFrame(
        {
            "model": model,
            "seeds": len(rows),
            "parameters": rows["parameters"].median(),
            "examples_per_second": rows["examples_per_second"].astype(float).median(),
            "epochs": rows["epochs"].mean(),
        }
        for model, rows in by_model.items()
    )
    for name in measures(results, tasks):
        values = {model: rows[f"test_{name}"].astype(float) for model, rows in by_model.items()}
        table[[name, f"{name}_ci95"]] = [mean_interval(values[model]) for model in models]
        tests = [_against_reference(values, model) for model in models]
        table[f"{name}_difference"] = [difference for difference, _ in tests]
        table[f"{name}_p"] = holm([p_value for _, p_value in tests])
    return table


def _against_reference(values: dict[str, pd.Series], model: str) -> tuple[float, float]:
    """Mean difference and p-value of the paired test of one model against the reference."""
    if REFERENCE not in values or model == REFERENCE:
        return math.nan, math.nan
    reference, own = values[REFERENCE], values[model]
    if model == "popularity":
        own = pd.Series(own.iloc[0], index=reference.index)
    own, reference = own.align(reference, join="inner")
    return float((own - reference).mean()), paired_p_value(own, reference)


def verdict(row: Any, name: str, metric: str) -> int:
    """1 where a row of `summary` is significantly better than single_task in one measure, -1 worse, else 0."""
    if not row[f"{name}_p"] < SIGNIFICANT:
        return 0
    return int(np.sign(row[f"{name}_difference"])) * (1 if METRICS[metric][1] else -1)


def own_settings(configs: Mapping[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """The settings in which the networks of a comparison differ, `{setting: {model: value}}`, of those who read it."""
    found: dict[str, dict[str, Any]] = {}
    for model, config in configs.items():
        if model not in WITHOUT_NETWORK:
            values = config.to_dict()
            for name, value in {**values["model"], **values["training"]}.items():
                if name != "name" and model in READERS.get(name, (model,)):
                    found.setdefault(name, {})[model] = value
    return {
        name: values
        for name, values in found.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def markdown(table: pd.DataFrame, title: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """The table of `summary` as Markdown: results, differences to single_task, further metrics, how to read them.

    Args:
        table: As `summary` returns it.
        title: Name of the data.
        settings: As `own_settings` returns them.
    """
    found = _measures_of(table)
    headline = {name: pair for name, pair in found.items() if pair[1] in HEADLINE}
    others = {name: pair for name, pair in found.items() if name not in headline}
    seeds = int(table["seeds"].max())
    tested = int(table["model"].ne(REFERENCE).sum())
    rows = [
        [
            row["model"],
            *(_interval(row, name) for name in headline),
            f"{row['parameters']:,.0f}",
            "-" if math.isnan(row["examples_per_second"]) else f"{row['examples_per_second']:,.0f}",
            f"{row['epochs']:.1f}",
        ]
        for _, row in table.iterrows()
    ]
    parts = [
        f"Test part of {title}: mean and half width of the 95 % confidence interval (Student's t) over the seeds "
        f"({seeds}). Parameters, rows per second (median) and epochs of single_task are those of all its runs, one per "
        "task, together; of lightgbm parameters are leaves and epochs boosting rounds.",
        _grid(["model", *map(_label, headline.values()), "parameters", "examples/s", "epochs"], rows),
    ]
    if table[[f"{name}_p" for name in headline]].notna().any(axis=None):
        rows = [
            [row["model"], *(_difference(row, name) for name in headline), _transfer(row, headline)]
            for _, row in table[table["model"] != REFERENCE].iterrows()
        ]
        parts += [
            f"Difference to {REFERENCE} of the same seeds, with the p-value of the two-sided paired t-test over the "
            f"seeds, Holm-corrected over the {tested} models. Transfer is negative (positive) where a task is learned "
            f"significantly worse (better) than alone, p < {SIGNIFICANT}.",
            _grid(["model", *map(_label, headline.values()), f"against {REFERENCE}"], rows),
        ]
    else:
        parts.append(f"Without {REFERENCE} and at least two seeds there is no test of transfer.")
    if others:
        rows = [[row["model"], *(_interval(row, name) for name in others)] for _, row in table.iterrows()]
        parts.append(_grid(["model", *map(_label, others.values())], rows))
    if settings:
        rows = [
            [model, *(_value(values.get(model)) for values in settings.values())]
            for model in table["model"]
            if model not in WITHOUT_NETWORK
        ]
        parts += ["Settings in which the models differ; all others are the same.", _grid(["model", *settings], rows)]
    return "\n\n".join(parts) + "\n"


def _measures_of(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """The measures of a table of `summary`, as `measures` gives them."""
    names = [column.removesuffix("_ci95") for column in table if column.endswith("_ci95")]
    longest_first = sorted(METRICS, key=len, reverse=True)
    found = {name: next(metric for metric in longest_first if name.endswith(f"_{metric}")) for name in names}
    return {name: (name.removesuffix(f"_{metric}"), metric) for name, metric in found.items()}


def _label(measure: tuple[str, str]) -> str:
    task, metric = measure
    return f"{task if task == 'mean' else task.upper()} {METRICS[metric][0]}"


def _interval(row: Any, name: str) -> str:
    if math.isnan(row[name]):
        return "-"
    half = row[f"{name}_ci95"]
    return f"{row[name]:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def _difference(row: Any, name: str) -> str:
    p_value = row[f"{name}_p"]
    if math.isnan(p_value):
        return "-"
    return f"{row[f'{name}_difference']:+.4f} (p {'< 0.001' if p_value < 0.001 else f'{p_value:.3f}'})"


def _transfer(row: Any, headline: dict[str, tuple[str, str]]) -> str:
    network = row["model"] not in WITHOUT_NETWORK
    words = {1: "positive transfer" if network else "better", -1: "negative transfer" if network else "worse"}
    said = []
    for sign, word in words.items():
        labels = [
            _label(pair) for name, pair in headline.items() if name != MEAN_AUC and verdict(row, name, pair[1]) == sign
        ]
        if labels:
            said.append(f"{word}: {', '.join(labels)}")
    return "; ".join(said) or "no significant difference"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _grid(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def comparison_figure(table: pd.DataFrame, title: str) -> Figure:
    """Mean and 95 % confidence interval of every model, one panel per headline measure.

    The axis spans the neural networks; a baseline far beyond is an arrow at the edge with its value.

    Args:
        table: As `summary` returns it.
        title: Name of the data.
    """
    panels = {name: pair for name, pair in _measures_of(table).items() if pair[1] in HEADLINE}
    figure = Figure(figsize=(1.6 + 2.9 * len(panels), 1.9 + 0.34 * len(table)), layout="constrained")
    every_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, (task, metric)) in zip(every_axes, panels.items(), strict=True):
        low, high = _span(table, name)
        axes.set_xlim(low, high)
        reference = table.loc[table["model"] == REFERENCE, name]
        if len(reference):
            axes.axvline(reference.iloc[0], color="0.5", linewidth=1, linestyle="--", zorder=0)
        for place, (_, row) in enumerate(table.iterrows()):
            if math.isnan(row[name]):
                continue
            if not low <= row[name] <= high:
                left = row[name] < low
                arrow = {"arrowprops": {"arrowstyle": "->"}, "va": "center", "ha": "left" if left else "right"}
                edge, text = (low, low + 0.12 * (high - low)) if left else (high, high - 0.12 * (high - low))
                axes.annotate(f"{row[name]:.4f}", (edge, place), (text, place), fontsize=8, **arrow)
                continue
            half = 0.0 if math.isnan(row[f"{name}_ci95"]) else row[f"{name}_ci95"]
            style = _STYLES[_kind(row, name, metric)]
            axes.errorbar(row[name], place, xerr=half or None, capsize=3, linewidth=1.5, **style)
        axes.set_xlabel(_label((task, metric)))
        axes.grid(axis="x", color="0.9")
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
    every_axes[0].set_yticks(range(len(table)), table["model"])
    every_axes[0].set_ylim(len(table) - 0.5, -0.5)
    figure.suptitle(
        f"{title}, test part: mean and 95 % confidence interval over seeds ({int(table['seeds'].max())})", fontsize=11
    )
    used = {_kind(row, name, metric) for name, (_, metric) in panels.items() for _, row in table.iterrows()}
    handles = [
        Line2D([], [], linestyle="", label=kind, **{key: value for key, value in style.items() if key != "fmt"})
        for kind, style in _STYLES.items()
        if kind in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


# They differ without colour too; the colours are those of Okabe and Ito.
_STYLES: dict[str, dict[str, Any]] = {
    "better than single_task (p < 0.05)": {"fmt": "", "marker": "^", "color": "#009E73", "markersize": 7},
    "no significant difference": {"fmt": "", "marker": "o", "color": "#0072B2", "markersize": 6},
    "worse than single_task (p < 0.05)": {"fmt": "", "marker": "v", "color": "#D55E00", "markersize": 7},
    "not tested": {"fmt": "", "marker": "D", "color": "#000000", "markersize": 5, "markerfacecolor": "white"},
}


def _kind(row: Any, name: str, metric: str) -> str:
    better, same, worse, untested = _STYLES
    if math.isnan(row[f"{name}_p"]):
        return untested
    return {1: better, 0: same, -1: worse}[verdict(row, name, metric)]


def _span(table: pd.DataFrame, name: str) -> tuple[float, float]:
    """The range of a panel: intervals of the networks (of all rows, if there is none), baselines nearby, some air."""
    half = table[f"{name}_ci95"].fillna(0)
    low, high = table[name] - half, table[name] + half
    networks = ~table["model"].isin(WITHOUT_NETWORK) & table[name].notna()
    chosen = networks if networks.any() else table[name].notna()
    span = low[chosen].min(), high[chosen].max()
    for place in table.index[~chosen & table[name].notna()]:
        wider = min(span[0], low[place]), max(span[1], high[place])
        # Not at the cost of the networks: their intervals keep half of the width.
        if wider[1] - wider[0] <= 2 * (high[chosen].max() - low[chosen].min()):
            span = wider
    air = 0.15 * (span[1] - span[0]) or 0.01
    return span[0] - air, span[1] + air
