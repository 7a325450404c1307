# SPDX-License-Identifier: Apache-2.0
"""What the experts of a model learned: tables, pictures, verdict, and the page on a finished run."""

from mvke_tf.errors import require_extra

require_extra("analysis", "matplotlib", "pandas")

# ruff: noqa: E402
from mvke_tf.analysis.explanation import UserState, explain_user, user_state
from mvke_tf.analysis.report import Analysis, analyze_run, run_cards
from mvke_tf.analysis.study import Study
from mvke_tf.analysis.tables import (
    analyze_expert_weights,
    contribution_shares,
    expert_similarity,
    field_attention,
    gate_effect,
    gate_entropy,
    gate_weights,
    item_map,
    kernel_cards,
    kernel_similarity,
    utilisation,
)
from mvke_tf.analysis.verdict import Finding, Verdict, judge, verdicts
from mvke_tf.data.groups import Grouping
from mvke_tf.inference.gates import Thresholds

__all__ = [
    "Analysis",
    "Finding",
    "Grouping",
    "Study",
    "Thresholds",
    "UserState",
    "Verdict",
    "analyze_expert_weights",
    "analyze_run",
    "contribution_shares",
    "expert_similarity",
    "explain_user",
    "field_attention",
    "gate_effect",
    "gate_entropy",
    "gate_weights",
    "item_map",
    "judge",
    "kernel_cards",
    "kernel_similarity",
    "run_cards",
    "user_state",
    "utilisation",
    "verdicts",
]
