# SPDX-License-Identifier: Apache-2.0
"""Pictures that several verbs draw: styles that differ without colour too, ROC and calibration curves, heat maps."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from mvke_tf.io import atomic_write
from mvke_tf.metrics import auc, calibration_error, roc_curve, value_bins

Curves = dict[str, tuple[np.ndarray, np.ndarray]]
# Of the colours of Okabe and Ito, which everybody can tell apart.
BLUE, ORANGE = "#0072B2", "#E69F00"


def line_styles() -> Iterator[dict[str, Any]]:
    """Endless line styles that differ without colour too; the colours are those of Okabe and Ito."""
    colours = itertools.cycle((BLUE, "#D55E00", "#009E73", "#CC79A7", "#000000"))
    lines = itertools.cycle(("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1))))
    for colour, line, marker in zip(colours, lines, itertools.cycle("os^Dv"), strict=False):
        yield {"color": colour, "linestyle": line, "marker": marker, "markersize": 6, "linewidth": 1.8}


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the tables have it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_figure(temporary, dpi=150)


def roc_figure(curves: Curves, part: str) -> Figure:
    """ROC curves.

    Args:
        curves: Labels, 0 or 1, and scores, by the name of the curve.
        part: Name of the part, for the title.
    """
    areas = {name: auc(*curve) for name, curve in curves.items()}
    title = ", ".join(f"{name} {_number(area)}" for name, area in areas.items())
    figure, axes = _square_axes(f"ROC, {part} part, {_rows(curves)} rows\nAUC: {title}")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="chance, AUC 0.5000")
    for (name, curve), style in zip(curves.items(), line_styles(), strict=False):
        label = f"{name}, AUC {_number(areas[name])}, {len(curve[0]):,} rows"
        corners = roc_curve(*curve) if np.isfinite(areas[name]) else (np.empty(0), np.empty(0))
        axes.plot(*corners, label=label, markevery=0.1, **style)
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
    areas = ", ".join(f"{name} {_number(auc(*curve))}" for name, curve in curves.items())
    figure, axes = _square_axes(f"Calibration, {part} part, {_rows(curves)} rows\nAUC: {areas}")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="perfectly calibrated")
    for (name, curve), style in zip(curves.items(), line_styles(), strict=False):
        predicted, observed, _ = value_bins(*curve)
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


def plain_text(text: object) -> str:
    """A text of the data for a picture, in which no `$` begins a formula."""
    return str(text).replace("$", r"\$")


def _number(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "-"


def _rows(curves: Curves) -> str:
    return f"{max(len(labels) for labels, _ in curves.values()):,}"


def _square_axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_box_aspect(1)
    axes.set_title(title, fontsize=11)
    axes.grid(color="0.9")
    return figure, axes


def heat_map_png(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, top: float) -> bytes:
    """A heat map that takes milliseconds to draw, for pictures while training runs.

    Args:
        values: `(R, C)`; cells state them with two decimals, those without a number (NaN) stay grey.
        rows: Names of the rows.
        columns: Names of the columns.
        title: Lines above it.
        top: Value of the lightest colour; 0 has the darkest.

    Returns:
        A PNG file.
    """
    width, height, gap = 56, 22, 6
    left = 2 * gap + max(round(_font().getlength(name)) for name in rows)
    above = height * (2 + title.count("\n")) + gap
    right = max(
        left + width * len(columns), 2 * gap + max(round(_font().getlength(line)) for line in title.split("\n"))
    )
    image = Image.new("RGB", (right + gap, above + height * len(rows) + gap), "white")
    draw = ImageDraw.Draw(image)
    draw.multiline_text((gap, gap), title, "black", _font())
    for column, name in enumerate(columns):
        draw.text((left + width * (column + 0.5), above - height / 2), name, "black", _font(), anchor="mm")
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#e8e8e8")(
        np.ma.masked_invalid(np.clip(np.asarray(values, np.float64) / top, 0, 1)), bytes=True
    )
    for row, name in enumerate(rows):
        y = above + height * row
        draw.text((left - gap, y + height / 2), name, "black", _font(), anchor="rm")
        for column in range(len(columns)):
            x, value = left + width * column, values[row][column]
            colour = tuple(int(part) for part in colours[row, column][:3])
            draw.rectangle((x, y, x + width - 2, y + height - 2), fill=colour)
            if np.isfinite(value):
                text = "white" if np.dot(colour, (0.299, 0.587, 0.114)) < 128 else "black"
                draw.text((x + width / 2, y + height / 2), f"{value:.2f}", text, _font(), anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 13)
