# SPDX-License-Identifier: Apache-2.0
"""Gates of a model on data: weights per entity, how experts are used, and what is wrong with that.

A gate depends on one side only, so it runs once per distinct user state or item, and the impressions of each weigh the
results. All of it holds for two-tower models and for the plain MMoE, whose rows count as users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mvke_tf.data.batches import Interactions
from mvke_tf.data.groups import Grouping, group_counts
from mvke_tf.errors import ConfigError
from mvke_tf.inference.vectors import run_model
from mvke_tf.models import MultiTaskModel

STATES = ("collapsed", "uniform", "specialised", "skewed", "balanced")

# === Weights ===


def gate_weights(
    model: MultiTaskModel, table: Mapping[str, Any], rows: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Gate weights on rows of the encoded table of the side that the gates read, `model.gate_side`.

    Args:
        model: A model with gates.
        table: `{feature: (N, ...)}`.
        rows: Which rows, `(n,)`; all by default.

    Returns:
        `{task: (n, E_task)}` float64; each row sums to 1. A task with a single expert has no gate.

    Raises:
        ConfigError: If the model has no gates.
        DataError: If a feature is missing.
        MvkeError: If a weight is NaN.
    """
    if getattr(model, "gates", None) is None:
        raise _without_gates(model)
    return {task: weights.astype(np.float64) for task, weights in run_model(model.gates, table, rows).items()}


def _without_gates(model: MultiTaskModel) -> ConfigError:
    return ConfigError(
        "Expected a model with gates: mvke, mmoe, cgc, ple with several experts per task, or a plain MMoE. "
        f"Received: {model.name!r}, which has none"
    )


@dataclasses.dataclass(frozen=True)
class GateUse:
    """The gate of one task on entities of the side that it reads.

    Args:
        task: Name of the task.
        side: `"user"` or `"item"`.
        experts: Indices of the experts (virtual kernels) that the task sees.
        weights: `(N, len(experts))` float64, per user state or item; each row sums to 1.
        counts: `(N,)`, impressions of each.
    """

    task: str
    side: str
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

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of the weight of each expert over the impressions."""
        return np.sqrt(np.average(np.square(self.weights - self.mean_weight), axis=0, weights=self.counts))

    def entropies(self) -> dict[str, float]:
        """As the function `entropies`."""
        return entropies(self.weights, self.counts)

    def state(self, thresholds: Thresholds | None = None) -> str:
        """One of `STATES`."""
        numbers = self.entropies()
        return gate_state(
            float(self.mean_weight.max()),
            numbers["impression_entropy_share"],
            numbers["information_share"],
            numbers["mean_weight_entropy_share"],
            thresholds,
        )

    def dead(self, thresholds: Thresholds | None = None) -> tuple[int, ...]:
        """Indices of the dead experts."""
        equal_share, dead_weight = 1 / len(self.experts), (thresholds or Thresholds()).dead_weight
        found = dead(self.mean_weight, self.strongest, equal_share, dead_weight)
        return tuple(expert for expert, is_dead in zip(self.experts, found, strict=True) if is_dead)

    def scalars(self) -> dict[str, float]:
        """All numbers by name."""
        named = {
            f"{name}/expert_{expert}": float(value)
            for name, values in (("mean_weight", self.mean_weight), ("strongest", self.strongest))
            for expert, value in zip(self.experts, values, strict=True)
        }
        return named | self.entropies()

    def reweighted(self, counts: np.ndarray) -> GateUse:
        """The same gate with other impressions of each entity, `(N,)`, for example those of a group."""
        return dataclasses.replace(self, counts=counts)


class GateView:
    """The gates of a model on the entities of some pairs, weighted by impressions.

    Args:
        model: A model with gates; its weights are those of the moment in which `look` is called.
        interactions: The pairs.
        groups: Groups over which `by_group` averages.
        most_entities: Most entities on which the gates are computed, spread evenly over those of the pairs; all by
            default.

    Raises:
        ConfigError: If the model has no gates.
        ValueError: If there is no pair.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        interactions: Interactions,
        groups: Sequence[Grouping] = (),
        most_entities: int | None = None,
    ) -> None:
        if not len(interactions):
            raise ValueError("Expected at least one pair to look at gates. Received: no pair")
        if model.gate_side is None:
            raise _without_gates(model)
        self._model, self.groups = model, tuple(groups)
        self.side = model.gate_side
        table = interactions.items if self.side == "item" else interactions.users
        pairs = {"item": np.asarray(interactions.item_rows), "user": np.asarray(interactions.user_rows)}
        rows = pairs[self.side]
        chosen = np.unique(rows)
        if most_entities and len(chosen) > most_entities:
            chosen = chosen[np.linspace(0, len(chosen) - 1, most_entities).astype(int)]
            inside = np.isin(rows, chosen)
            pairs, rows = {side: own[inside] for side, own in pairs.items()}, rows[inside]
        rows = np.searchsorted(chosen, rows)
        self._table = {name: np.asarray(column)[chosen] for name, column in table.items()}
        self._counts = np.bincount(rows, minlength=len(chosen))
        self._group_counts = {
            group.variable: group_counts(group.members[pairs[group.side]], rows, len(chosen)) for group in self.groups
        }

    def look(self) -> dict[str, GateUse]:
        """The use that each task makes of its experts now."""
        return {
            task: GateUse(task, self.side, self._model.experts_of(task), weights, self._counts)
            for task, weights in gate_weights(self._model, self._table).items()
        }

    def by_group(self, use: GateUse, variable: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean weights of each group, `(G, E)`, NaN for a group without impressions, and its impressions `(G,)`."""
        counts = self._group_counts[variable]
        total = counts.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return counts @ use.weights / total[:, None], total


def gate_uses(model: MultiTaskModel, interactions: Interactions) -> dict[str, GateUse]:
    """The use that each task makes of its experts, on all entities of some pairs; arguments as in `GateView`."""
    return GateView(model, interactions).look()


# === Statistics ===


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


# === Judgement ===


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Where one word ends and the next begins. Entropies and information are shares of their maximum.

    Args:
        collapsed_weight: Collapsed: one expert has at least this mean weight.
        uniform_entropy: Uniform, where it is not known what the choice is worth: the weights of single impressions
            have at least this entropy.
        worthless_choice: Uniform, where that is known: with the mean weights for every impression the AUC falls (an
            RMSE rises, as a share of itself) by less than this, ...
        worthless_entropy: ... and the weights of single impressions have at least this entropy.
        specialised_information: Specialised: the impression says at least this much about the expert.
        balanced_entropy: Balanced: the mean weights have at least this entropy; below it, skewed.
        dead_weight: Dead: (almost) never strongest, and a mean weight below this share of an equal share.
        identical_similarity: Identical: two experts with at least this centred kernel alignment and correlation.
        flat_attention: Flat field attention: the attention of single impressions has at least this entropy.

    Raises:
        ConfigError: If a threshold lies outside [0, 1].
    """

    collapsed_weight: float = 0.9
    uniform_entropy: float = 0.98
    worthless_choice: float = 0.0005
    worthless_entropy: float = 0.95
    specialised_information: float = 0.05
    balanced_entropy: float = 0.8
    dead_weight: float = 0.1
    identical_similarity: float = 0.99
    flat_attention: float = 0.999

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"Thresholds.{field.name} must lie in [0, 1]. Received: {value!r}")


# Dead experts are the strongest in a smaller share of the impressions than this.
DEAD_STRONGEST = 1e-3


def dead(mean_weight: Any, strongest_share: Any, equal_share: Any, dead_weight: float = Thresholds.dead_weight) -> Any:
    """Whether experts are dead for a task, elementwise.

    Args:
        mean_weight: Their mean weights.
        strongest_share: Shares of the impressions in which they are the strongest.
        equal_share: One over the number of experts.
        dead_weight: Share of an equal share below which the mean weight of a dead expert lies.
    """
    return (mean_weight < dead_weight * equal_share) & (strongest_share < DEAD_STRONGEST)


def gate_state(
    largest_mean_weight: float,
    impression_entropy_share: float,
    information_share: float,
    mean_weight_entropy_share: float,
    thresholds: Thresholds | None = None,
    worth: float | None = None,
) -> str:
    """What a gate does, one of `STATES`, from its largest mean weight and the numbers of `entropies`.

    `worth` is what is lost without its choice: how far the AUC falls, or the RMSE rises as a share of itself, with the
    mean weights for every impression; None if it is not known.

    Collapsed: one expert has nearly all the weight. Uniform: it hardly chooses. Specialised: different impressions
    listen to different experts. Skewed: some experts do most of the work, for all impressions alike. Balanced: all are
    used, in a moderately different mix per impression.
    """
    thresholds = thresholds or Thresholds()
    if largest_mean_weight >= thresholds.collapsed_weight:
        return "collapsed"
    if worth is None:
        uniform = impression_entropy_share >= thresholds.uniform_entropy
    else:
        uniform = worth < thresholds.worthless_choice and impression_entropy_share >= thresholds.worthless_entropy
    if uniform:
        return "uniform"
    if information_share >= thresholds.specialised_information:
        return "specialised"
    return "skewed" if mean_weight_entropy_share < thresholds.balanced_entropy else "balanced"
