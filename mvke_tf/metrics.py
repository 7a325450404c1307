# SPDX-License-Identifier: Apache-2.0
"""Offline metrics of predictions of every kind of task, on plain arrays.

A metric that is not defined for its input (an AUC where all labels are equal, anything of no rows) is NaN.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive row scores above a negative one, ties counting half.

    Args:
        labels: `(n,)`, 0 or 1.
        scores: `(n,)`; only their order matters.

    Returns:
        A value in [0, 1]; NaN unless both labels occur.
    """
    scores, is_positive = np.asarray(scores), np.asarray(labels) == 1
    positives, negatives = np.sort(scores[is_positive]), np.sort(scores[~is_positive])
    if not len(positives) or not len(negatives):
        return math.nan
    twice_below = sum(int(np.searchsorted(negatives, positives, side).sum()) for side in ("left", "right"))
    return twice_below / (2 * len(positives) * len(negatives))


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the ROC curve, without points on the straight line between their neighbours.

    Args:
        labels: `(n,)`, 0 and 1, both.
        scores: `(n,)`.

    Returns:
        False and true positive rates, each `(c,)`, from (0, 0) to (1, 1).
    """
    _, level = np.unique(-np.asarray(scores), return_inverse=True)
    positive = np.bincount(level, weights=labels).cumsum()
    negative = np.bincount(level).cumsum() - positive
    x, y = (np.concatenate([[0], counts / counts[-1]]) for counts in (negative, positive))
    turns = np.diff(x[:-1]) * np.diff(y)[1:] != np.diff(x)[1:] * np.diff(y[:-1])
    kept = np.concatenate([[True], turns, [True]])
    return x[kept], y[kept]


def gauc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """AUC within each group, averaged with the groups' numbers of rows as weights.

    Groups with one label only have no AUC and do not count.

    Args:
        labels: `(n,)`, 0 or 1.
        scores: `(n,)`; only their order within a group matters.
        groups: `(n,)`, for example the user of each row.

    Returns:
        A value in [0, 1]; NaN if no group has both labels.
    """
    rows = pl.DataFrame(
        {"group": np.unique(groups, return_inverse=True)[1], "label": np.asarray(labels, np.float64), "score": scores}
    )
    # The rank-sum form of the AUC; tied scores share their mean rank.
    sums = (
        rows.with_columns(rank=pl.col("score").rank("average").over("group"))
        .group_by("group", maintain_order=True)
        .agg(rows=pl.len(), positives=pl.col("label").sum(), ranks=(pl.col("rank") * pl.col("label")).sum())
        .filter((pl.col("positives") > 0) & (pl.col("positives") < pl.col("rows")))
    )
    if sums.is_empty():
        return math.nan
    size, positives, ranks = (sums[name].to_numpy() for name in ("rows", "positives", "ranks"))
    group_auc = (ranks - positives * (positives + 1) / 2) / (positives * (size - positives))
    return float(np.average(group_auc, weights=size))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log likelihood per row, in nats.

    Probabilities are kept the float epsilon away from 0 and 1, so that the result is finite.

    Args:
        labels: `(n,)`, 0 or 1.
        probabilities: `(n,)`, of label 1.
    """
    if not len(labels):
        return math.nan
    epsilon = np.finfo(np.float64).eps
    clipped = np.clip(np.asarray(probabilities, np.float64), epsilon, 1 - epsilon)
    return float(-np.mean(np.log(np.where(np.asarray(labels) == 1, clipped, 1 - clipped))))


def value_bins(labels: np.ndarray, values: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean predictions and mean labels in bins of (nearly) equally many rows, by rising prediction.

    Rows of equal prediction share a bin, so the result does not depend on the order of the rows; with many ties the
    bins are of unequal size, and there are fewer than `bins`.

    Args:
        labels: `(n,)`; 0 or 1 of a binary task.
        values: `(n,)`; probabilities of label 1, or predicted values.
        bins: Most bins.

    Returns:
        Per bin that is not empty: mean prediction, mean label (of a binary task the observed share of label 1), number
        of rows; each `(b,)`.

    Raises:
        ValueError: If `bins` is below 1.
    """
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1. Received: {bins}")
    values, labels = np.asarray(values, np.float64), np.asarray(labels, np.float64)
    quantile = (pl.Series(values).rank("average").to_numpy() - 0.5) / max(len(values), 1)
    _, inside, size = np.unique((quantile * bins).astype(int), return_inverse=True, return_counts=True)
    sums = (np.bincount(inside, weights=column, minlength=len(size)) for column in (values, labels))
    predicted, observed = (total / size for total in sums)
    return predicted, observed, size


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: `Σ_b n_b / n · |mean probability_b - share of positives_b|`.

    The bins are those of `value_bins`: of equal mass, not of equal width, because most probabilities of a
    recommender crowd near the base rate.

    Args:
        labels: `(n,)`, 0 or 1.
        probabilities: `(n,)`, of label 1.
        bins: Most bins.

    Returns:
        A value in [0, 1]; 0 is perfectly calibrated.
    """
    if not len(labels):
        return math.nan
    predicted, observed, rows = value_bins(labels, probabilities, bins)
    return float(np.average(np.abs(predicted - observed), weights=rows))


def binary_metrics(
    labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray | None = None
) -> dict[str, float | int | None]:
    """All metrics of one binary task.

    Args:
        labels: `(n,)`, 0 or 1.
        probabilities: `(n,)`, of label 1.
        users: `(n,)`, the user of each row, for `gauc`, which is left out without them.

    Returns:
        `auc`, `gauc`, `accuracy` (share of rows on the right side of probability 0.5), `log_loss` (nats),
        `calibration_error`, `rows`, `positives`, as JSON can hold them: None for a metric that is not defined.

    Raises:
        ValueError: If the arrays are not of one length, or a label is neither 0 nor 1, or a probability lies outside
            [0, 1] or is NaN.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    shapes = [labels.shape, probabilities.shape, *([] if users is None else [np.shape(users)])]
    if set(shapes) != {(len(labels),)}:
        raise ValueError(f"`labels`, `probabilities` and `users` must have one shape (n,). Received: {shapes}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"Labels must be 0 or 1. Received: {np.unique(labels)[:10]}")
    valid = (probabilities >= 0) & (probabilities <= 1)
    if not valid.all():
        raise ValueError(f"Probabilities must lie in [0, 1]. Received: {np.unique(probabilities[~valid])[:10]}")
    measured = {
        "auc": auc(labels, probabilities),
        **({} if users is None else {"gauc": gauc(labels, probabilities, users)}),
        "accuracy": float(np.mean((probabilities > 0.5) == labels)) if len(labels) else math.nan,
        "log_loss": log_loss(labels, probabilities),
        "calibration_error": calibration_error(labels, probabilities),
    }
    return {
        **{name: defined(value) for name, value in measured.items()},
        "rows": len(labels),
        "positives": int(labels.sum()),
    }


def regression_metrics(labels: np.ndarray, values: np.ndarray) -> dict[str, float | int | None]:
    """All metrics of one regression task, in the unit of the label (`mse`: its square).

    Args:
        labels: `(n,)`.
        values: `(n,)`, predicted.

    Returns:
        `mse`, `rmse`, `mae`, `rows`, as JSON can hold them: None for a metric of no rows.

    Raises:
        ValueError: If the arrays are not of one length, or something in them is NaN or infinite.
    """
    labels, values = np.asarray(labels, np.float64), np.asarray(values, np.float64)
    if not labels.shape == values.shape == (len(labels),):
        raise ValueError(f"`labels` and `values` must have one shape (n,). Received: {labels.shape} and {values.shape}")
    if not (np.isfinite(labels).all() and np.isfinite(values).all()):
        raise ValueError("Labels and values must be finite. Received: NaN or infinite ones")
    if not len(labels):
        return {"mse": None, "rmse": None, "mae": None, "rows": 0}
    mse, mae = float(np.mean((labels - values) ** 2)), float(np.mean(np.abs(labels - values)))
    return {"mse": mse, "rmse": math.sqrt(mse), "mae": mae, "rows": len(labels)}


def poisson_deviance(labels: np.ndarray, rates: np.ndarray) -> float:
    """Mean over the rows of `2 (y ln(y / rate) - y + rate)`, of counts y and predicted means; 0 where both agree."""
    if not len(labels):
        return math.nan
    labels, rates = np.asarray(labels, np.float64), np.asarray(rates, np.float64)
    # 0 ln 0 is 0.
    logarithms = np.where(labels > 0, labels * np.log(np.where(labels > 0, labels, 1) / rates), 0)
    return float(2 * np.mean(logarithms - labels + rates))


def count_metrics(labels: np.ndarray, rates: np.ndarray) -> dict[str, float | int | None]:
    """All metrics of one count task.

    Args:
        labels: `(n,)`, whole numbers of at least 0.
        rates: `(n,)`, predicted means, positive.

    Returns:
        `poisson_deviance` and what `regression_metrics` returns; None for a metric of no rows.

    Raises:
        ValueError: If the arrays are not of one length, a label is negative or no whole number, or a rate is not
            positive and finite.
    """
    labels, rates = np.asarray(labels, np.float64), np.asarray(rates, np.float64)
    measured = regression_metrics(labels, rates)
    if (labels < 0).any() or (labels % 1).any() or (rates <= 0).any():
        raise ValueError("Labels must be whole numbers of at least 0, and rates positive. Received: others")
    return {"poisson_deviance": defined(poisson_deviance(labels, rates)), **measured}


def macro_auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over the classes of the AUC of each against all others; classes that no row or every row has do not count.

    Args:
        labels: `(n,)`, indices of classes.
        probabilities: `(n, C)`.

    Returns:
        A value in [0, 1]; NaN if no class counts.
    """
    areas = [auc(labels == index, column) for index, column in enumerate(np.transpose(probabilities))]
    areas = [area for area in areas if not math.isnan(area)]
    return float(np.mean(areas)) if areas else math.nan


def multiclass_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | int | None]:
    """All metrics of one multi-class task.

    Args:
        labels: `(n,)`, indices of classes.
        probabilities: `(n, C)`, which sum to 1 over the classes.

    Returns:
        `macro_auc`, `accuracy` (share of rows whose class is the most probable one), `log_loss` (nats; probabilities
        are kept the float epsilon away from 0), `rows`; None for a metric that is not defined.

    Raises:
        ValueError: If the shapes do not fit, a label is no index of a class, or a row of probabilities is none.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            "`labels` must have the shape (n,) and `probabilities` (n, C). "
            f"Received: {labels.shape} and {probabilities.shape}"
        )
    if not np.isin(labels, np.arange(probabilities.shape[1])).all():
        raise ValueError(f"Labels must be indices below {probabilities.shape[1]}. Received: {np.unique(labels)[:10]}")
    if not ((probabilities >= 0).all() and np.allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)):
        raise ValueError("Probabilities must lie in [0, 1] and sum to 1 over the classes. Received: others")
    if not len(labels):
        return {"macro_auc": None, "accuracy": None, "log_loss": None, "rows": 0}
    of_label = probabilities[np.arange(len(labels)), labels.astype(int)]
    return {
        "macro_auc": defined(macro_auc(labels, probabilities)),
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == labels)),
        "log_loss": float(-np.mean(np.log(np.maximum(of_label, np.finfo(np.float64).eps)))),
        "rows": len(labels),
    }


def task_metrics(
    kind: str, labels: np.ndarray, values: np.ndarray, users: np.ndarray | None = None
) -> dict[str, float | int | None]:
    """The metrics of a task of any kind, by that function of this module which is for it."""
    if kind == "binary":
        return binary_metrics(labels, values, users)
    return {"regression": regression_metrics, "count": count_metrics, "multiclass": multiclass_metrics}[kind](
        labels, values
    )


def defined(value: float) -> float | None:
    """The value, or None for NaN, which JSON does not know."""
    return None if math.isnan(value) else value
