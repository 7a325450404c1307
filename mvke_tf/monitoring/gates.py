"""The gates of a model in training: how each task uses its experts, and what is wrong with that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from mvke_tf.data.dataset import PairData
from mvke_tf.data.groups import Grouping, group_counts
from mvke_tf.figures import heat_map_png
from mvke_tf.gate_statistics import COLLAPSED_WEIGHT, DEAD_STRONGEST, DEAD_WEIGHT, dead, entropies, strongest
from mvke_tf.models.two_tower import USER_VECTOR, gate_model, mixed_experts

# Most entities of a side on which a gate is looked at, spread evenly over those of the data. A user state costs more:
# it has lists.
MOST_ENTITIES = {"item": 4096, "user": 1024}
ADVICE = "Try a larger --balance_coefficient (0.01 to 1), a lower learning rate, or fewer experts."


@dataclasses.dataclass(frozen=True)
class GateUse:
    """How a gate uses its experts.

    Args:
        experts: Indices of the experts (virtual kernels) that the task sees.
        weights: `(N, len(experts))` float64, per item or user state; each row sums to 1.
        counts: `(N,)`, impressions of each.
    """

    experts: tuple[int, ...]
    weights: np.ndarray
    counts: np.ndarray

    @property
    def mean_weight(self) -> np.ndarray:
        """Mean weight of each expert over the impressions; they sum to 1."""
        return np.average(self.weights, axis=0, weights=self.counts)

    @property
    def strongest(self) -> np.ndarray:
        """Share of the impressions in which each expert has the largest weight."""
        return np.average(strongest(self.weights), axis=0, weights=self.counts)

    def scalars(self) -> dict[str, float]:
        """All numbers by name."""
        named = {
            f"{name}/expert_{expert}": float(value)
            for name, values in (("mean_weight", self.mean_weight), ("strongest", self.strongest))
            for expert, value in zip(self.experts, values, strict=True)
        }
        return named | entropies(self.weights, self.counts)


class GateView:
    """The gates of a two-tower model on the pairs of a data set, weighted by impressions.

    A gate reads one side only and runs once per item, or once per user state, of at most `MOST_ENTITIES`.

    Args:
        model: A two-tower model with gates; its weights are those of the moment in which `look` is called.
        data: The pairs.
        groups: Groups over which `by_group` averages.

    Raises:
        ValueError: If the model has no gates, or a gate reads both sides.
    """

    def __init__(self, model: keras.Model, data: PairData, groups: Sequence[Grouping] = ()) -> None:
        self._gates = gate_model(model)
        self._layers = {layer.name: layer for layer in model.layers}
        read = set(self._gates.input)
        if not any(read <= set(table) for table in (data.users, data.items)):
            raise ValueError(f"Gates must read one side only to be looked at. Received: gates that read {sorted(read)}")
        side = "item" if read <= set(data.items) else "user"
        table, rows = (data.items, data.item_rows) if side == "item" else (data.users, data.user_rows)
        chosen = np.unique(rows)
        if len(chosen) > MOST_ENTITIES[side]:
            chosen = chosen[np.linspace(0, len(chosen) - 1, MOST_ENTITIES[side]).astype(int)]
        inside = np.isin(rows, chosen)
        rows = np.searchsorted(chosen, rows[inside])
        self._inputs = {name: np.asarray(table[name])[chosen] for name in self._gates.input}
        self._counts = np.bincount(rows, minlength=len(chosen))
        self.groups = tuple(groups)
        pairs = {"item": data.item_rows[inside], "user": data.user_rows[inside]}
        self._group_counts = {
            group.variable: group_counts(group.members[pairs[group.side]], rows, len(chosen)) for group in self.groups
        }

    def look(self) -> dict[str, GateUse]:
        """The use that each task makes of its experts now."""
        # Called and not `predict`ed, which would trace a function and touch the state of the model.
        outputs = self._gates(self._inputs, training=False)
        uses = {}
        for task, output in outputs.items():
            weights = keras.ops.convert_to_numpy(output).astype(np.float64)
            mixture = self._layers.get(USER_VECTOR.format(task=task))
            uses[task] = GateUse(mixed_experts(mixture, weights.shape[1]), weights, self._counts)
        return uses

    def by_group(self, use: GateUse, variable: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean weights of each group, `(G, E)`, NaN for a group without impressions, and its impressions `(G,)`."""
        counts = self._group_counts[variable]
        total = counts.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return counts @ use.weights / total[:, None], total


def gate_events(
    uses: Mapping[str, GateUse], collapsed_weight: float = COLLAPSED_WEIGHT, dead_weight: float = DEAD_WEIGHT
) -> dict[tuple[str, int | None], str]:
    """What is wrong with gates: `{(task, dead expert, or None for a collapsed gate): what to say}`.

    Args:
        uses: The gates by task.
        collapsed_weight: Collapsed is a gate in which an expert has at least this mean weight.
        dead_weight: Dead is an expert of a gate that has not collapsed if it is (almost) never the strongest and its
            mean weight is below this share of an equal share.
    """
    events: dict[tuple[str, int | None], str] = {}
    for task, use in uses.items():
        mean, equal = use.mean_weight, 1 / len(use.experts)
        if mean.max() >= collapsed_weight:
            events[task, None] = (
                f"the gate of {task} has collapsed: expert {use.experts[int(mean.argmax())]} has {mean.max():.1%} of "
                f"the weight on average (warned from {collapsed_weight:.0%} on). {ADVICE}"
            )
            continue
        for index in np.flatnonzero(dead(mean, use.strongest, equal, dead_weight)):
            events[task, use.experts[index]] = (
                f"expert {use.experts[index]} of {task} is dead: mean weight {mean[index]:.4f} (warned below "
                f"{dead_weight * equal:.4f}, {dead_weight:g} of an equal share), strongest in "
                f"{use.strongest[index]:.2%} of the impressions (warned below {DEAD_STRONGEST:.1%}). {ADVICE}"
            )
    return events


def heat_map(
    task: str, use: GateUse, group: Grouping, weights: np.ndarray, impressions: np.ndarray, epoch: int
) -> bytes:
    """The mean weights of each group as a PNG, the largest groups first; all epochs have the same colours.

    Args:
        task: Name of the task.
        use: Its gate.
        group: The groups.
        weights: `(G, len(use.experts))`, as `GateView.by_group` gives them.
        impressions: `(G,)`.
        epoch: From 0.
    """
    order = [row for row in np.argsort(-impressions, kind="stable") if impressions[row]]
    top = min(1.0, 2 / len(use.experts))
    return heat_map_png(
        weights[order],
        [f"{group.groups[row]} ({impressions[row]:,.0f})" for row in order],
        [str(expert) for expert in use.experts],
        f"{task}: mean gate weight of each expert after epoch {epoch + 1}\n"
        f"by {group.description} (impressions); colours from 0 to {top:.2f}",
        top,
    )
