"""Numbers on gate weights: entropy, use of experts, and where a gate counts as collapsed or an expert as dead."""

from __future__ import annotations

from typing import Any

import numpy as np

# Collapsed: one expert has at least this mean weight.
COLLAPSED_WEIGHT = 0.9
# Dead: a mean weight below this share of an equal share, and strongest in a smaller share of the rows than this.
DEAD_WEIGHT = 0.1
DEAD_STRONGEST = 1e-3


def entropy_bits(weights: np.ndarray) -> np.ndarray:
    """Shannon entropy over the last axis, in bits; 0 log 0 counts as 0."""
    weights = np.asarray(weights, np.float64)
    logarithms = np.log2(weights, out=np.zeros_like(weights), where=weights > 0)
    return -np.sum(weights * logarithms, axis=-1)


def strongest(weights: np.ndarray) -> np.ndarray:
    """1 for the expert with the largest weight of each row of `(N, E)`, 0 for the others; ties count in parts."""
    largest = weights == weights.max(axis=1, keepdims=True)
    return largest / largest.sum(axis=1, keepdims=True)


def entropies(weights: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """How evenly a gate spreads its weight.

    Args:
        weights: `(N, E)`, E at least 2; each row sums to 1.
        counts: `(N,)`, how often each row counts.

    Returns:
        `impression_entropy_bits` (of the weights of one row, averaged), `mean_weight_entropy_bits` (of the mean
        weights) and their difference `information_bits` (how much the row says about the expert); then the same as
        shares of the maximum, log2 of E: `impression_entropy_share`, `mean_weight_entropy_share`, `information_share`.
    """
    impression = float(np.average(entropy_bits(weights), weights=counts))
    overall = float(entropy_bits(np.average(weights, axis=0, weights=counts)))
    bits = {"impression_entropy": impression, "mean_weight_entropy": overall, "information": overall - impression}
    maximum = np.log2(weights.shape[1])
    return {f"{name}_bits": value for name, value in bits.items()} | {
        f"{name}_share": value / maximum for name, value in bits.items()
    }


def dead(mean_weight: Any, strongest_share: Any, equal_share: Any, dead_weight: float = DEAD_WEIGHT) -> Any:
    """Whether experts are dead for a task, elementwise.

    Args:
        mean_weight: Their mean weights.
        strongest_share: Shares of the rows in which they are the strongest.
        equal_share: One over the number of experts.
        dead_weight: Share of an equal share below which the mean weight of a dead expert lies.
    """
    return (mean_weight < dead_weight * equal_share) & (strongest_share < DEAD_STRONGEST)
