# SPDX-License-Identifier: Apache-2.0
"""Statistics of repeated runs: intervals, paired tests, and the correction for many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Numbers = Sequence[float] | np.ndarray


def mean_interval(values: Numbers, confidence: float = 0.95) -> tuple[float, float]:
    """The mean and the half width of its confidence interval by Student's t distribution.

    Args:
        values: `(n,)`, independent repetitions.
        confidence: Share of such intervals that hold the true mean.

    Returns:
        Mean and half width; the half width of a single value is NaN, and of no value both are.
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return (float(sample[0]) if len(sample) else math.nan), math.nan
    quantile = stats.t.ppf((1 + confidence) / 2, len(sample) - 1)
    return float(sample.mean()), float(quantile * sample.std(ddof=1) / math.sqrt(len(sample)))


def paired_p_value(values: Numbers, reference: Numbers) -> float:
    """The two-sided p-value of the paired t-test that both have one mean.

    Args:
        values: `(n,)`.
        reference: `(n,)`, the partner of each value.

    Returns:
        A value in [0, 1]; NaN for fewer than two pairs, 1 where all pairs are equal.

    Raises:
        ValueError: If they are not of one length.
    """
    sample, partners = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if sample.shape != partners.shape:
        raise ValueError(
            f"A paired test needs two samples of one length. Received: {len(sample)} and {len(partners)} values"
        )
    if len(sample) < 2:
        return math.nan
    if np.array_equal(sample, partners):
        return 1.0
    return float(stats.ttest_rel(sample, partners).pvalue)


def holm(p_values: Numbers) -> np.ndarray:
    """P-values corrected for the number of tests, after Holm (1979): the chance of one false alarm among all.

    The i-th smallest of m is multiplied by `m - i + 1`; none becomes smaller than the one before it, or larger than 1.

    Args:
        p_values: `(m,)`; a NaN is no test, it stays and does not count.

    Returns:
        `(m,)`, in the same order.
    """
    tests = np.asarray(p_values, np.float64)
    corrected = np.full_like(tests, math.nan)
    tested = np.flatnonzero(~np.isnan(tests))
    order = tested[np.argsort(tests[tested], kind="stable")]
    scaled = tests[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected
