"""What the experts of a model learned: frames, pictures, verdict, and the page on a finished run."""

from mvke_tf.analysis.contributions import explain_user, gate_effect
from mvke_tf.analysis.evaluate import evaluate_multitask_model
from mvke_tf.analysis.frames import (
    analyze_expert_weights,
    expert_similarity,
    field_attention,
    gate_entropy,
    gate_weights,
    item_map,
    kernel_similarity,
    utilisation,
)
from mvke_tf.analysis.runs import Analysis, analyze_run, user_state
from mvke_tf.analysis.study import Study
from mvke_tf.analysis.verdict import Thresholds, Verdict, judge, verdicts
from mvke_tf.data.groups import Grouping, movielens_groups

__all__ = [
    "Analysis",
    "Grouping",
    "Study",
    "Thresholds",
    "Verdict",
    "analyze_expert_weights",
    "analyze_run",
    "evaluate_multitask_model",
    "expert_similarity",
    "explain_user",
    "field_attention",
    "gate_effect",
    "gate_entropy",
    "gate_weights",
    "item_map",
    "judge",
    "kernel_similarity",
    "movielens_groups",
    "user_state",
    "utilisation",
    "verdicts",
]
