"""Pictures that several verbs draw: styles that differ without colour too, ROC and calibration curves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from mvke_tf.files import written_whole
from mvke_tf.metrics import auc, calibration_bins, calibration_error, cell, defined, value_bins

Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def line_styles() -> Iterator[dict[str, object]]:
    """Endless line styles that differ without colour too; the colours are those of Okabe and Ito."""
    colours = itertools.cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"))
    lines = itertools.cycle(("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1))))
    for colour, line, marker in zip(colours, lines, itertools.cycle("os^Dv"), strict=False):
        yield {"color": colour, "linestyle": line, "marker": marker, "markersize": 6, "linewidth": 1.8}


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with written_whole(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, dpi=150)


def roc_figure(curves: Curves, part: str) -> Figure:
    """ROC curves.

    Args:
        curves: Labels, 0 or 1, and scores, by the name of the curve.
        part: Name of the part, for the title.
    """
    areas = {name: auc(*curve) for name, curve in curves.items()}
    title = ", ".join(f"{name} {cell(defined(area))}" for name, area in areas.items())
    figure, axes = _square_axes(f"ROC, {part} part, {_rows(curves)} rows\nAUC: {title}")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="chance, AUC 0.5000")
    for (name, curve), style in zip(curves.items(), line_styles(), strict=False):
        label = f"{name}, AUC {cell(defined(areas[name]))}, {len(curve[0]):,} rows"
        x, y = roc_curve(*curve)[:2] if np.isfinite(areas[name]) else ([], [])
        axes.plot(x, y, label=label, markevery=0.1, **style)
    axes.set_xlabel("False positive rate")
    axes.set_ylabel("True positive rate")
    axes.legend(loc="lower right")
    return figure


def calibration_figure(curves: Curves, part: str) -> Figure:
    """Observed share of positives against the predicted probability, in ten bins of equally many rows per curve.

    Args:
        curves: Labels, 0 or 1, and probabilities, by the name of the curve.
        part: Name of the part, for the title.
    """
    areas = ", ".join(f"{name} {cell(defined(auc(*curve)))}" for name, curve in curves.items())
    figure, axes = _square_axes(f"Calibration, {part} part, {_rows(curves)} rows\nAUC: {areas}")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="perfectly calibrated")
    for (name, curve), style in zip(curves.items(), line_styles(), strict=False):
        predicted, observed, _ = calibration_bins(*curve)
        axes.plot(predicted, observed, label=f"{name}, calibration error {calibration_error(*curve):.4f}", **style)
    axes.set_xlabel("Mean predicted probability of a bin")
    axes.set_ylabel("Observed share of positives in the bin")
    axes.legend(loc="upper left")
    return figure


def regression_figure(curves: Curves, part: str) -> Figure:
    """Mean label against the mean prediction, in ten bins of equally many rows per curve.

    Args:
        curves: Labels and predicted values, by the name of the curve.
        part: Name of the part, for the title.
    """
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        raise ValueError("A picture of a regression needs at least one row with a label. Received: no row")
    errors = ", ".join(f"{name} {np.sqrt(np.mean(np.square(y - p))):.4f}" for name, (y, p) in curves.items())
    figure, axes = _square_axes(f"Regression, {part} part, {_rows(curves)} rows\nRMSE: {errors}")
    bins = {name: value_bins(*curve) for name, curve in curves.items()}
    ends = [
        bound(np.concatenate([values for predicted, observed, _ in bins.values() for values in (predicted, observed)]))
        for bound in (np.min, np.max)
    ]
    axes.plot(ends, ends, color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="prediction equals label")
    for (name, (predicted, observed, _)), style in zip(bins.items(), line_styles(), strict=False):
        axes.plot(predicted, observed, label=name, **style)
    axes.set_xlabel("Mean prediction of a bin")
    axes.set_ylabel("Mean label in the bin")
    axes.legend(loc="upper left")
    return figure


def _rows(curves: Curves) -> str:
    return f"{max(len(labels) for labels, _ in curves.values()):,}"


def _square_axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_box_aspect(1)
    axes.set_title(title, fontsize=11)
    axes.grid(color="0.9")
    return figure, axes
