"""What the numbers mean, in words: balanced, specialised, collapsed, uniform; dead and identical experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pandas as pd

from mvke_tf.analysis.contributions import AS_TRAINED, gate_effect
from mvke_tf.analysis.frames import ALL, expert_similarity, gate_entropy, gate_weights, utilisation
from mvke_tf.analysis.study import Study, has_kernels, is_two_tower
from mvke_tf.data.groups import Grouping
from mvke_tf.gate_statistics import COLLAPSED_WEIGHT, DEAD_WEIGHT

STATES = ("collapsed", "uniform", "specialised", "skewed", "balanced")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Where one word ends and the next begins. Entropies and information are shares of their maximum.

    Args:
        collapsed_weight: Collapsed: one expert has at least this mean weight.
        uniform_entropy: Uniform: the weights of single impressions have at least this entropy.
        specialised_information: Specialised: the impression says at least this much about the expert.
        balanced_entropy: Balanced: the mean weights have at least this entropy; below it, skewed.
        dead_weight: Dead: never strongest, and a mean weight below this share of an equal share.
        identical_similarity: Identical: two experts with at least this centred kernel alignment and correlation.
        flat_attention: Flat field attention: the attention of single impressions has at least this entropy.

    Raises:
        ValueError: If a threshold lies outside [0, 1].
    """

    collapsed_weight: float = COLLAPSED_WEIGHT
    uniform_entropy: float = 0.98
    specialised_information: float = 0.05
    balanced_entropy: float = 0.8
    dead_weight: float = DEAD_WEIGHT
    identical_similarity: float = 0.99
    flat_attention: float = 0.999

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Thresholds.{field.name} must lie in [0, 1]. Received: {value!r}")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about a task.

    Args:
        name: One of `STATES`, or `"dead experts"`, `"identical experts"`.
        text: What was found, with its numbers.
        advice: What to try; empty where nothing is wrong.
    """

    name: str
    text: str
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What there is to know about the gate of one task.

    Args:
        task: Name of the task.
        findings: Its state first, then dead and identical experts.
        evidence: Further sentences with numbers.
    """

    task: str
    findings: tuple[Finding, ...]
    evidence: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return self.findings[0].name

    @property
    def headline(self) -> str:
        """Task and names of all findings."""
        return f"{self.task}: {', '.join(finding.name for finding in self.findings)}"

    def __str__(self) -> str:
        lines = [self.headline, *(finding.text for finding in self.findings), *self.evidence]
        advice = [finding.advice for finding in self.findings if finding.advice]
        return "\n".join([lines[0], *(f"  {line}" for line in [*lines[1:], *(f"Try: {text}" for text in advice)])])


def verdicts(
    study: Study, groupings: Iterable[Grouping] = (), thresholds: Thresholds | None = None
) -> tuple[Verdict, ...]:
    """The verdict on each task that has a gate.

    Args:
        study: Model and data.
        groupings: Groups over which the evidence says how far the weights differ.
        thresholds: Where one word ends and the next begins.

    Raises:
        ValueError: If the model has no gates.
    """
    thresholds = thresholds or Thresholds()
    try:
        similarity = expert_similarity(study)
    except ValueError:
        # A nested model hides its experts: its gates can be judged all the same.
        similarity = None
    return judge(
        gate_entropy(study),
        utilisation(study, thresholds.dead_weight),
        similarity,
        gate_weights(study, groupings),
        gate_effect(study) if is_two_tower(study.model) else None,
        thresholds,
        has_kernels(study.model),
    )


def judge(
    entropy: pd.DataFrame,
    used: pd.DataFrame,
    similarity: pd.DataFrame | None = None,
    weights: pd.DataFrame | None = None,
    effect: pd.DataFrame | None = None,
    thresholds: Thresholds | None = None,
    kernels: bool = False,
) -> tuple[Verdict, ...]:
    """The verdict on each task of frames that exist already.

    Args:
        entropy: As `gate_entropy` makes it.
        used: As `utilisation` makes it.
        similarity: As `expert_similarity` makes it.
        weights: As `gate_weights` makes it, for evidence.
        effect: As `gate_effect` makes it, for evidence.
        thresholds: Where one word ends and the next begins.
        kernels: Whether the experts have virtual kernels, for the advice.
    """
    thresholds = thresholds or Thresholds()
    found = []
    for row in entropy.itertuples():
        task = used[used["task"] == row.task]
        findings = [_state(row, task, thresholds, kernels)]
        dead = task.loc[task["dead"], "expert"].tolist()
        if dead:
            findings.append(
                Finding(
                    "dead experts",
                    f"Dead: {_experts(dead)}, never the strongest, with a mean weight of at most "
                    f"{task.loc[task['dead'], 'mean_weight'].max():.4f} (an equal share is {1 / row.experts:.3f}).",
                    f"fewer experts ({row.experts - len(dead)} do the work), or a balance loss "
                    "(--balance_coefficient 0.01).",
                )
            )
        if similarity is not None:
            findings += _identical(similarity, task["expert"].tolist(), thresholds)
        evidence = [] if weights is None else _by_group(weights[weights["task"] == row.task])
        if effect is not None and len(effect):
            evidence += _worth(effect[effect["task"] == row.task])
        found.append(Verdict(row.task, tuple(findings), tuple(evidence)))
    return tuple(found)


def _state(row, task: pd.DataFrame, thresholds: Thresholds, kernels: bool) -> Finding:
    mean = ", ".join(f"{weight:.2f}" for weight in task["mean_weight"])
    shares = (
        f"Over {row.impressions:,} impressions the mean weights of {_experts(task['expert'].tolist())} are {mean}. "
        f"The weights of one impression have {row.impression_entropy_bits:.2f} bits of entropy on average, "
        f"{row.impression_entropy_share:.1%} of the maximum; the mean weights have {row.mean_weight_entropy_bits:.2f}, "
        f"{row.mean_weight_entropy_share:.1%}."
    )
    if row.largest_mean_weight >= thresholds.collapsed_weight:
        strongest = task.loc[task["mean_weight"].idxmax()]
        return Finding(
            "collapsed",
            f"{shares} Expert {strongest['expert']} has nearly all the weight: the mixture is one network.",
            "a balance loss (--balance_coefficient 0.01), a lower learning rate, or fewer experts.",
        )
    if row.impression_entropy_share >= thresholds.uniform_entropy:
        return Finding(
            "uniform",
            f"{shares} The gate hardly chooses: every impression listens to all experts nearly alike (a "
            f"weight deviates by {row.weight_deviation:.3f} between impressions, and "
            f"an equal share is {1 / row.experts:.3f}).",
            (
                "larger initial kernels (--kernel_stddev 1.0), or a higher learning rate."
                if kernels
                else "a higher learning rate, fewer experts, or no balance loss (--balance_coefficient 0)."
            ),
        )
    if row.information_share >= thresholds.specialised_information:
        return Finding(
            "specialised",
            f"{shares} Different impressions listen to different experts: the impression says "
            f"{row.information_bits:.2f} bits about the expert, {row.information_share:.1%} of the maximum.",
        )
    if row.mean_weight_entropy_share < thresholds.balanced_entropy:
        return Finding(
            "skewed",
            f"{shares} Some experts do most of the work, and for all impressions alike.",
            "a balance loss (--balance_coefficient 0.01), or fewer experts.",
        )
    return Finding("balanced", f"{shares} All experts are used, in a moderately different mix per impression.")


def _identical(similarity: pd.DataFrame, experts: list[int], thresholds: Thresholds) -> list[Finding]:
    rows = similarity[
        similarity["expert_a"].isin(experts)
        & similarity["expert_b"].isin(experts)
        & (similarity["expert_a"] < similarity["expert_b"])
        & (similarity["cka"] >= thresholds.identical_similarity)
        & (similarity["correlation"] >= thresholds.identical_similarity)
    ]
    if rows.empty:
        return []
    pairs = ", ".join(f"{row.expert_a} and {row.expert_b} (CKA {row.cka:.3f})" for row in rows.itertuples())
    return [
        Finding(
            "identical experts",
            f"These experts put out the same: {pairs}.",
            "fewer experts, another seed, or more dropout, so that they start and stay apart.",
        )
    ]


def _by_group(weights: pd.DataFrame, most: int = 3) -> list[str]:
    """The variables whose groups of at least 1 % of the impressions differ most in the weight of an expert."""
    found = []
    total = weights.loc[weights["variable"] == ALL, "impressions"].max()
    for variable, rows in weights[weights["variable"] != ALL].groupby("variable", sort=False):
        rows = rows[rows["impressions"] >= 0.01 * total]
        if rows["group"].nunique() < 2:
            continue
        spread = rows.groupby("expert")["mean_weight"].agg(lambda values: np.ptp(values.to_numpy()))
        one = rows[rows["expert"] == spread.idxmax()]
        low, high = one.loc[one["mean_weight"].idxmin()], one.loc[one["mean_weight"].idxmax()]
        sentence = (
            f"By {variable}, the weight of expert {spread.idxmax()} runs from {low['mean_weight']:.3f} "
            f"({low['group']}) to {high['mean_weight']:.3f} ({high['group']})."
        )
        found.append((spread.max(), sentence))
    return [sentence for _, sentence in sorted(found, key=lambda entry: -entry[0])[:most]]


def _worth(effect: pd.DataFrame) -> list[str]:
    if effect.empty or effect["value"].isna().all():
        return []
    by_change = effect.set_index("change")
    trained, mean = by_change.loc[AS_TRAINED], by_change.loc["mean weights"]
    name = trained["metric"].upper()
    removed = effect[effect["expert"] >= 0]
    sign = 1 if trained["metric"] == "auc" else -1
    worst = removed.loc[(sign * removed["difference"]).idxmin()]
    return [
        f"{name} {trained['value']:.4f}; with the mean weights for every impression {mean['value']:.4f} "
        f"({mean['difference']:+.4f}). The most valuable expert is {worst['expert']}: without it "
        f"{worst['value']:.4f} ({worst['difference']:+.4f})."
    ]


def attention_note(attention: pd.DataFrame, thresholds: Thresholds | None = None) -> str:
    """What the field attention of a model shows, in one or two sentences.

    Args:
        attention: As `field_attention` makes it.
        thresholds: Where flat begins.
    """
    thresholds = thresholds or Thresholds()
    share, fields = attention["entropy_share"].min(), attention["field"].nunique()
    if share >= thresholds.flat_attention:
        largest = (attention["mean_attention"] - 1 / fields).abs().max()
        return (
            f"The field attention is flat: no kernel prefers a field. The attention of one impression has "
            f"{share:.2%} of the maximal entropy, and no mean attention is further than {largest:.5f} from 1/{fields}. "
            "The kernels differ by their experts alone. Larger first projections (--attention_stddev 0.5, with "
            "--kernel_stddev 1.0) let them listen."
        )
    top = attention.sort_values("mean_attention", ascending=False, kind="stable").groupby("kernel").first()
    listens = ", ".join(
        f"kernel {kernel} to {row['field']} ({row['mean_attention']:.2f})" for kernel, row in top.iterrows()
    )
    return f"Listens most to: {listens}; an equal share is {1 / fields:.3f}."


def _experts(experts: list[int]) -> str:
    return f"{'expert' if len(experts) == 1 else 'experts'} {', '.join(map(str, experts))}"
