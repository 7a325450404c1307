"""What each expert contributes to a logit: one user explained, and what the gate and each expert are worth.

Every output is made of `logit = Σ_e g_e ⟨expert_e(user), tag(item)⟩`. (With `Task(given=...)` that is the logit given
the event before; with a regression task, the value less a constant.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from keras import ops

from mvke_tf.analysis.study import Study
from mvke_tf.metrics import auc
from mvke_tf.models.two_tower import outputs_of_products, predictions, task_kinds, task_names

AS_TRAINED = "as trained"


def explain_user(
    study: Study,
    user_row: int,
    titles: Sequence[str] | None = None,
    top: int = 10,
    exclude: Sequence[int] = (),
) -> pd.DataFrame:
    """The items that a model puts highest for one user, and what each expert contributes.

    Args:
        study: Model and data.
        user_row: Row of the user state in the table of users that the study was given.
        titles: Name of each item; its row by default.
        top: Items per task.
        exclude: Rows of items to leave out, for example those that the user knows.

    Returns:
        One row per task, item and expert, best item first: `task`, `rank` (from 1), `item_row`, `title`, `expert`;
        `weight` g_e, `score` ⟨expert_e, tag⟩, `contribution` g_e ⟨expert_e, tag⟩; `logit`, the sum of the contributions
        of the item (of a task that another event comes before, the logit given that event; of a regression task, the
        value less its constant); `prediction`, a probability or a value. Tasks without a gate have no rows.

    Raises:
        ValueError: If the user state occurs in no pair, or no item is left, or the model has no gates.
    """
    position = np.flatnonzero(study.source_users == user_row)
    if not len(position):
        raise ValueError(
            "Expected the row of a user state that occurs in the pairs, "
            f"{study.source_users.min()} to {study.source_users.max()}. Received: {user_row}"
        )
    items = np.setdiff1d(np.arange(study.size("item")), exclude)
    if top < 1 or not len(items):
        raise ValueError(f"Expected `top` of at least 1 and an item to rank. Received: top={top}, {len(items)} items")
    users = np.full(len(items), position[0])
    contributions = {task: _contributions(study, task, users, items) for task in study.gates}
    logits = {task: parts[2].sum(axis=1) for task, parts in contributions.items()}
    predicted = _predictions(study, {**_ungated(study, users, items), **logits})
    names = np.arange(study.size("item")).astype(str) if titles is None else np.asarray(titles, str)
    frames = []
    for task, (weights, scores, parts) in contributions.items():
        best = np.argsort(-predicted[task], kind="stable")[:top]
        experts = study.gates[task].experts
        shown = np.repeat(best, len(experts))
        frames.append(
            pd.DataFrame(
                {
                    "task": task,
                    "rank": np.repeat(1 + np.arange(len(best)), len(experts)),
                    "item_row": items[shown],
                    "title": names[items[shown]],
                    "expert": np.tile(experts, len(best)),
                    "weight": weights[best].ravel(),
                    "score": scores[best].ravel(),
                    "contribution": parts[best].ravel(),
                    "logit": logits[task][shown],
                    "prediction": predicted[task][shown],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def gate_effect(study: Study) -> pd.DataFrame:
    """What the choice of the gate, and each expert, is worth: the metric of a task after a change, nothing retrained.

    Changes: `"mean weights"`, every impression gets the gate's mean weights (what is lost is the worth of choosing);
    `"without expert e"`, its weight goes to the others in proportion (to all alike where it had everything).

    Returns:
        One row per task and change, `"as trained"` first: `task`, `change`, `expert` (-1 where none is removed),
        `metric` (`"auc"`, or `"rmse"` of a regression task), `value`, `difference` to the model as trained, and
        `impressions`, those with a label. NaN where the metric is not defined, as an AUC of one class.

    Raises:
        ValueError: If the model has no gates.
    """
    products, parts = {}, {}
    for task, gate in study.gates.items():
        scores = study.scores(task, study.user_rows, study.item_rows)
        parts[task] = scores, gate.weights[study.rows(gate.side)]
        products[task] = np.sum(scores * parts[task][1], axis=1)
    products |= _ungated(study, study.user_rows, study.item_rows)
    rows = []
    for task, gate in study.gates.items():
        if task not in study.labels:
            continue
        scores, weights = parts[task]
        changes = {
            (AS_TRAINED, -1): weights,
            ("mean weights", -1): np.broadcast_to(weights.mean(axis=0), weights.shape),
        }
        changes |= {(f"without expert {e}", e): _without(weights, k) for k, e in enumerate(gate.experts)}
        values = {
            change: _metric(study, task, products | {task: np.sum(scores * changed, axis=1)})
            for change, changed in changes.items()
        }
        trained = values[AS_TRAINED, -1]
        for (change, expert), value in values.items():
            rows.append(
                {
                    "task": task,
                    "change": change,
                    "expert": expert,
                    "metric": "rmse" if task_kinds(study.model)[task] == "regression" else "auc",
                    "value": value,
                    "difference": value - trained,
                    "impressions": int(np.isfinite(study.labels[task]).sum()),
                }
            )
    return pd.DataFrame(rows)


def _contributions(
    study: Study, task: str, user_rows: np.ndarray, item_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gate weights, scores and their products, each `(n, E_task)`."""
    gate = study.gates[task]
    scores = study.scores(task, user_rows, item_rows)
    weights = gate.weights[user_rows if gate.side == "user" else item_rows]
    return weights, scores, weights * scores


def _ungated(study: Study, user_rows: np.ndarray, item_rows: np.ndarray) -> dict[str, np.ndarray]:
    return study.products([task for task in task_names(study.model) if task not in study.gates], user_rows, item_rows)


def _without(weights: np.ndarray, expert: int) -> np.ndarray:
    rest = np.delete(weights, expert, axis=1)
    total = rest.sum(axis=1, keepdims=True)
    if not rest.shape[1]:
        return np.zeros_like(weights)
    rest = np.divide(rest, total, out=np.full_like(rest, 1.0 / rest.shape[1]), where=total > 0)
    return np.insert(rest, expert, 0.0, axis=1)


def _predictions(study: Study, products: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = outputs_of_products(study.model, products)
    return {
        task: ops.convert_to_numpy(values).astype(np.float64)
        for task, values in predictions(study.model, outputs).items()
    }


def _metric(study: Study, task: str, products: dict[str, np.ndarray]) -> float:
    # Logits order rows like probabilities, without rounding many of them to 1.
    outputs = {name: ops.convert_to_numpy(value) for name, value in outputs_of_products(study.model, products).items()}
    labels = np.asarray(study.labels[task], np.float64)
    known = np.isfinite(labels)
    labels, values = labels[known], outputs[task][known].astype(np.float64)
    if task_kinds(study.model)[task] == "regression":
        return math.sqrt(np.mean(np.square(values - labels))) if len(labels) else math.nan
    return auc(labels, values)
