# SPDX-License-Identifier: Apache-2.0
"""What the numbers mean, in words: balanced, specialised, collapsed, uniform; dead and identical experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mvke_tf.analysis.study import Study, has_kernels
from mvke_tf.analysis.tables import (
    ALL,
    AS_TRAINED,
    MEAN_WEIGHTS,
    expert_similarity,
    gate_effect,
    gate_entropy,
    gate_weights,
    utilisation,
)
from mvke_tf.data.groups import Grouping, is_small
from mvke_tf.inference.gates import Thresholds, gate_state
from mvke_tf.models import TwoTowerModel

# What is not seen in four decimals is no loss.
NO_LOSS = 5e-5


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about a task.

    Args:
        name: One of `mvke_tf.inference.gates.STATES`, or `"dead experts"`, `"identical experts"`.
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
        """One of `mvke_tf.inference.gates.STATES`."""
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
        ConfigError: If the model has no gates.
    """
    thresholds = thresholds or Thresholds()
    return judge(
        gate_entropy(study),
        utilisation(study, thresholds),
        expert_similarity(study),
        gate_weights(study, groupings),
        gate_effect(study) if isinstance(study.model, TwoTowerModel) else None,
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
    """The verdict on each task of tables that exist already.

    Args:
        entropy: As `gate_entropy` makes it.
        used: As `utilisation` makes it.
        similarity: As `expert_similarity` makes it.
        weights: As `gate_weights` makes it, for evidence.
        effect: As `gate_effect` makes it, for evidence, and to tell a gate that hardly chooses (uniform).
        thresholds: Where one word ends and the next begins.
        kernels: Whether the experts have virtual kernels, for the advice.
    """
    thresholds = thresholds or Thresholds()
    found = []
    for row in entropy.itertuples():
        task = used[used["task"] == row.task]
        worth = None if effect is None else _Worth.of(effect[effect["task"] == row.task])
        findings = [_state(row, task, worth, thresholds, kernels)]
        dead = task.loc[task["dead"], "expert"].tolist()
        if dead:
            findings.append(
                Finding(
                    "dead experts",
                    f"Dead: {_experts(dead)}, (almost) never the strongest, with a mean weight of at most "
                    f"{task.loc[task['dead'], 'mean_weight'].max():.4f} (an equal share is {1 / row.experts:.3f}).",
                    f"fewer experts ({row.experts - len(dead)} do the work), or a balance loss "
                    "(--load_balancing_weight 0.01).",
                )
            )
        if similarity is not None:
            findings += _identical(similarity, task["expert"].tolist(), thresholds)
        evidence = [] if weights is None else _by_group(weights[weights["task"] == row.task])
        if worth is not None:
            evidence.append(worth.sentence)
        found.append(Verdict(row.task, tuple(findings), tuple(evidence)))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Worth:
    """What the choice of a gate is worth: what is lost with its mean weights, an RMSE as a share; and in words."""

    lost: float
    sentence: str

    @classmethod
    def of(cls, effect: pd.DataFrame) -> _Worth | None:
        """Of the rows of one task; None where its metric is not defined."""
        if effect.empty or effect["value"].isna().any():
            return None
        by_change = effect.set_index("change")
        trained, mean = by_change.loc[AS_TRAINED], by_change.loc[MEAN_WEIGHTS]
        metric = trained["metric"]
        removed = effect[effect["expert"] >= 0]
        worst = removed.loc[((1 if metric == "auc" else -1) * removed["difference"]).idxmin()]
        sentence = (
            f"{metric.upper()} {trained['value']:.4f}; with the mean weights for every impression {mean['value']:.4f} "
            f"({mean['difference']:+z.4f}). "
        )
        loss = (-1 if metric == "auc" else 1) * worst["difference"]
        sentence += (
            f"The most valuable expert is {worst['expert']}: without it {worst['value']:.4f} "
            f"({worst['difference']:+z.4f})."
            if loss > NO_LOSS
            else "Without any one of the experts it is no worse."
        )
        if metric == "auc":
            return cls(-mean["difference"], sentence)
        return cls(mean["difference"] / trained["value"] if trained["value"] else math.inf, sentence)


def _state(row: Any, task: pd.DataFrame, worth: _Worth | None, thresholds: Thresholds, kernels: bool) -> Finding:
    """The state of one gate in words, from its row of `gate_entropy` and its rows of `utilisation`."""
    mean = ", ".join(f"{weight:.2f}" for weight in task["mean_weight"])
    shares = (
        f"Over {row.impressions:,} impressions the mean weights of {_experts(task['expert'].tolist())} are {mean}. "
        f"The weights of one impression have {row.impression_entropy_bits:.2f} bits of entropy on average, "
        f"{row.impression_entropy_share:.1%} of the maximum; the mean weights have {row.mean_weight_entropy_bits:.2f}, "
        f"{row.mean_weight_entropy_share:.1%}."
    )
    state = gate_state(
        row.largest_mean_weight,
        row.impression_entropy_share,
        row.information_share,
        row.mean_weight_entropy_share,
        thresholds,
        None if worth is None else worth.lost,
    )
    if state == "collapsed":
        strongest = task.loc[task["mean_weight"].idxmax()]
        return Finding(
            state,
            f"{shares} Expert {strongest['expert']} has nearly all the weight: the mixture is one network.",
            "a balance loss (--load_balancing_weight 0.01), a lower learning rate, or fewer experts.",
        )
    if state == "uniform":
        return Finding(
            state,
            f"{shares} The gate hardly chooses: every impression listens to all experts nearly alike (a "
            f"weight deviates by {row.weight_deviation:.3f} between impressions, and "
            f"an equal share is {1 / row.experts:.3f})"
            f"{'.' if worth is None else ', and the same weights for every impression would do.'}",
            (
                "initial kernels of --virtual_kernel_stddev 1.0 at least, narrower vectors (--embedding_dim 8), a "
                "higher learning rate, or more rows."
                if kernels
                else "a higher learning rate, fewer experts, or no balance loss (--load_balancing_weight 0)."
            ),
        )
    if state == "specialised":
        text = (
            f"{shares} Different impressions listen to different experts: the impression says "
            f"{row.information_bits:.2f} bits about the expert, {row.information_share:.1%} of the maximum."
        )
        return Finding(state, text + _but_worthless(worth, thresholds))
    if state == "skewed":
        return Finding(
            state,
            f"{shares} Some experts do most of the work, and for all impressions alike.",
            "a balance loss (--load_balancing_weight 0.01), or fewer experts.",
        )
    text = f"{shares} All experts are used, in a moderately different mix per impression."
    return Finding(state, text + _but_worthless(worth, thresholds))


def _but_worthless(worth: _Worth | None, thresholds: Thresholds) -> str:
    if worth is None or worth.lost >= thresholds.worthless_choice:
        return ""
    return " The predictions gain nothing from that choice, though."


def _identical(similarity: pd.DataFrame, experts: Sequence[int], thresholds: Thresholds) -> list[Finding]:
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
    """The variables whose groups, small ones left out, differ most in the weight of an expert."""
    found = []
    total = weights.loc[weights["variable"] == ALL, "impressions"].max()
    for variable, rows in weights[weights["variable"] != ALL].groupby("variable", sort=False):
        rows = rows[~is_small(rows["impressions"], total)]
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
            "--virtual_kernel_stddev 1.0) let them listen."
        )
    top = attention.sort_values("mean_attention", ascending=False, kind="stable").groupby("kernel").first()
    listens = ", ".join(
        f"kernel {kernel} to {row['field']} ({row['mean_attention']:.2f})" for kernel, row in top.iterrows()
    )
    return f"Listens most to: {listens}; an equal share is {1 / fields:.3f}."


def _experts(experts: Sequence[int]) -> str:
    return f"{'expert' if len(experts) == 1 else 'experts'} {', '.join(map(str, experts))}"
