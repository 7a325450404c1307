"""Statistics of repeated runs: intervals, paired tests, and the correction for many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean and the half width of its confidence interval by Student's t distribution.

    Args:
        values: `(n,)`, independent repetitions.
        confidence: Share of such intervals that hold the true mean.

    Returns:
        Mean and half width; the half width of a single value is NaN, and of no value both are.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values)))


def paired_p_value(values: Sequence[float], reference: Sequence[float]) -> float:
    """The two-sided p-value of the paired t-test that both have one mean.

    Args:
        values: `(n,)`.
        reference: `(n,)`, the partner of each value.

    Returns:
        A value in [0, 1]; NaN for fewer than two pairs, 1 where all pairs are equal.

    Raises:
        ValueError: If they are not of one length.
    """
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if values.shape != reference.shape:
        raise ValueError(
            f"A paired test needs two samples of one length. Received: {len(values)} and {len(reference)} values"
        )
    if len(values) < 2:
        return math.nan
    if np.array_equal(values, reference):
        return 1.0
    return float(stats.ttest_rel(values, reference).pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values corrected for the number of tests, after Holm (1979): the chance of one false alarm among all.

    The i-th smallest of m is multiplied by `m - i + 1`; none becomes smaller than the one before it, or larger than 1.

    Args:
        p_values: `(m,)`; a NaN is no test, it stays and does not count.

    Returns:
        `(m,)`, in the same order.
    """
    p_values = np.asarray(p_values, np.float64)
    corrected = np.full_like(p_values, math.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected
