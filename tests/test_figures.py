# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from mvke_tf.figures import calibration_figure, plain_text, regression_figure, roc_figure


@pytest.mark.parametrize("figure_of", [roc_figure, calibration_figure])
def test_curves_differ_without_colour_and_axes_are_labelled(figure_of):
    curves = {
        "click": (np.array([0, 1, 1, 0]), np.array([0.1, 0.9, 0.4, 0.6])),
        "buy": (np.array([0, 1, 0, 0]), np.array([0.2, 0.7, 0.6, 0.1])),
    }
    (axes,) = figure_of(curves, "test").axes
    styles = [(line.get_linestyle(), line.get_marker()) for line in axes.lines]
    assert len(styles) >= 3 and len(set(styles)) == len(styles)
    assert axes.get_xlabel() and axes.get_ylabel()
    assert "test part, 4 rows" in axes.get_title()
    assert "click 0.7500" in axes.get_title() and "buy 1.0000" in axes.get_title()


def test_roc_figure_draws_no_curve_of_one_class():
    scores = np.array([0.2, 0.8, 0.4])
    (axes,) = roc_figure({"click": (np.ones(3), scores), "buy": (np.array([0, 1, 0]), scores)}, "test").axes
    by_label = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert len(by_label["click, AUC -, 3 rows"]) == 0
    assert len(by_label["buy, AUC 1.0000, 3 rows"]) > 0


def test_regression_figure_shows_the_bins_of_values():
    labels, values = np.array([1.0, 3.0, 5.0]), np.array([2.0, 3.0, 4.0])
    (axes,) = regression_figure({"stars": (labels, values)}, "test").axes
    diagonal, line = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [1.0, 5.0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2.0, 3.0, 4.0], [1.0, 3.0, 5.0])
    assert "test part, 3 rows" in axes.get_title() and f"stars {np.sqrt(2 / 3):.4f}" in axes.get_title()
    assert axes.get_xlabel() and axes.get_ylabel()


def test_texts_of_the_data_are_no_formulas():
    assert plain_text("5 $ or 6 $") == r"5 \$ or 6 \$"
