# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the gates of a model in training, and heat maps of how they choose."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mvke_tf.data.groups import Grouping
from mvke_tf.inference.gates import DEAD_STRONGEST, GateUse, Thresholds

# Most entities of a side on which a gate is looked at, spread evenly over those of the data. A user state costs more:
# it has lists.
MOST_ENTITIES = {"item": 4096, "user": 1024}
# Rows of a heat map that can be read.
MOST_GROUPS = 40
ADVICE = "Try a larger --load_balancing_weight (0.01 to 1), a lower learning rate, or fewer experts."


def gate_events(uses: Mapping[str, GateUse], thresholds: Thresholds | None = None) -> dict[tuple[str, int | None], str]:
    """What is wrong with gates: `{(task, dead expert, or None for a collapsed gate): what to say}`.

    Args:
        uses: The gates by task.
        thresholds: Where a gate has collapsed (its experts are then not said to be dead) and an expert is dead.
    """
    thresholds = thresholds or Thresholds()
    events: dict[tuple[str, int | None], str] = {}
    for task, use in uses.items():
        mean, equal = use.mean_weight, 1 / len(use.experts)
        if use.state(thresholds) == "collapsed":
            events[task, None] = (
                f"the gate of {task} has collapsed: expert {use.experts[int(mean.argmax())]} has {mean.max():.1%} of "
                f"the weight on average (warned from {thresholds.collapsed_weight:.0%} on). {ADVICE}"
            )
            continue
        for expert in use.dead(thresholds):
            index = use.experts.index(expert)
            events[task, expert] = (
                f"expert {expert} of {task} is dead: mean weight {mean[index]:.4f} (warned below "
                f"{thresholds.dead_weight * equal:.4f}, {thresholds.dead_weight:g} of an equal share), strongest in "
                f"{use.strongest[index]:.2%} of the impressions (warned below {DEAD_STRONGEST:.1%}). {ADVICE}"
            )
    return events


def heat_map(use: GateUse, group: Grouping, weights: np.ndarray, impressions: np.ndarray, epoch: int) -> bytes:
    """The mean weights of each group as a PNG, the largest groups first; all epochs have the same colours.

    Args:
        use: The gate of a task.
        group: The groups.
        weights: `(G, len(use.experts))`, as `GateView.by_group` gives them.
        impressions: `(G,)`.
        epoch: From 0.
    """
    from mvke_tf.figures import heat_map_png

    order = [row for row in np.argsort(-impressions, kind="stable") if impressions[row]][:MOST_GROUPS]
    top = min(1.0, 2 / len(use.experts))
    return heat_map_png(
        weights[order],
        [f"{group.groups[row]} ({impressions[row]:,.0f})" for row in order],
        [str(expert) for expert in use.experts],
        f"{use.task}: mean gate weight of each expert after epoch {epoch + 1}\n"
        f"by {group.description} (impressions); colours from 0 to {top:.2f}",
        top,
    )
