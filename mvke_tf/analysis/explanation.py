# SPDX-License-Identifier: Apache-2.0
"""One user explained: the items that a model puts highest, and what each expert contributes to that.

Every output is made of `logit = Σ_e g_e ⟨expert_e(user), tag(item)⟩`. (With `Task(given=...)` that is the logit given
the event before; with a regression or count task, the output less a constant.) A multi-class task has no such sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from keras import ops

from mvke_tf.analysis.study import Study, expert_part
from mvke_tf.analysis.tables import Names
from mvke_tf.config import nearest
from mvke_tf.data.declaration import PARTS
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import DataError
from mvke_tf.inference.gates import gate_weights
from mvke_tf.inference.vectors import run_model, vectors_of


def explain_user(
    study: Study,
    user_row: int,
    names: Names | None = None,
    top: int = 10,
    exclude: Sequence[int] = (),
) -> pd.DataFrame:
    """The items of the catalogue that a model puts highest for one user, and what each expert contributes.

    Args:
        study: A two-tower model with gates, and data.
        user_row: Row of the user state in the table of users that the study was given.
        names: Name of each row of the table of items; `item <row>` by default.
        top: Items per task.
        exclude: Rows of items to leave out, for example those that the user knows.

    Returns:
        One row per task, item and expert, best item first: `task`, `rank` (from 1), `item_row`, `item` (its name),
        `expert`; `weight` g_e, `score` ⟨expert_e, tag⟩, `contribution` g_e ⟨expert_e, tag⟩; `logit`, the sum of the
        contributions of the item (of a task that another event comes before, the logit given that event; of a
        regression task, the value less its constant); `prediction`, a probability, or a value in the unit of the
        label. Tasks without a gate, and multi-class tasks, have no rows.

    Raises:
        ConfigError: If the model has no gates.
        ValueError: If there is no such user state, or no item is left.
    """
    model, users = study.model, study.table("user")
    if not 0 <= user_row < study.table_rows("user"):
        raise ValueError(
            f"Expected a row of the table of users, 0 to {study.table_rows('user') - 1}. Received: {user_row}"
        )
    items = study.catalogue[~np.isin(study.source_items[study.catalogue], np.asarray(exclude, int))]
    if top < 1 or not len(items):
        raise ValueError(f"Expected `top` of at least 1 and an item to rank. Received: top={top}, {len(items)} items")
    row = np.array([user_row])
    gates = {task: gate for task, gate in study.gates.items() if task in model.ranked_tasks}
    if model.gate_side == "user":
        weights = {
            task: np.repeat(own, len(items), axis=0)
            for task, own in gate_weights(model, users, row).items()
            if task in gates
        }
    else:
        weights = {task: gate.weights[items] for task, gate in gates.items()}
    outputs = run_model(expert_part(model), users, row)[0].astype(np.float64)
    scores = {task: study.tags[task][items] @ outputs[list(gate.experts)].T for task, gate in gates.items()}
    parts = {task: weights[task] * scores[task] for task in gates}
    logits = {task: part.sum(axis=1) for task, part in parts.items()}
    predicted = _predictions(study, row, items, logits)
    rows = study.source_items[items]
    tables = []
    for task, gate in gates.items():
        best = np.argsort(-predicted[task], kind="stable")[:top]
        shown = np.repeat(best, len(gate.experts))
        tables.append(
            pd.DataFrame(
                {
                    "task": task,
                    "rank": np.repeat(1 + np.arange(len(best)), len(gate.experts)),
                    "item_row": rows[shown],
                    "item": [f"item {row}" if names is None else str(names[row]) for row in rows[shown]],
                    "expert": np.tile(gate.experts, len(best)),
                    "weight": weights[task][best].ravel(),
                    "score": scores[task][best].ravel(),
                    "contribution": parts[task][best].ravel(),
                    "logit": logits[task][shown],
                    "prediction": predicted[task][shown],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _predictions(study: Study, user: np.ndarray, items: np.ndarray, logits: dict[str, np.ndarray]) -> dict:
    """Predictions of all tasks for one user and some items, from the logits of the tasks with a gate."""
    model, products = study.model, dict(logits)
    others = [task for task in model.ranked_tasks if task not in logits]
    if others:
        users = vectors_of(model.user_tower, study.table("user"), user)
        vectors = vectors_of(model.item_tower, study.table("item"), study.source_items[items])
        products |= {task: vectors[task].astype(np.float64) @ users[task][0] for task in others}
    predicted = model.predictions(model.outputs_of_products(products))
    return {task: ops.convert_to_numpy(values).astype(np.float64) for task, values in predicted.items()}


@dataclasses.dataclass(frozen=True)
class UserState:
    """A user at the last moment in one part of the data.

    Args:
        key: Id of the user, or the number of the row of the log where users have no ids.
        row: Row of the state in the table of users.
        known: Rows of the items of the user's earlier rows, those of the catalogue.
        has_id: Whether users have ids.
    """

    key: int | str
    row: int
    known: tuple[int, ...]
    has_id: bool = True

    @property
    def name(self) -> str:
        """What to call the user: `"user <id>"`, or `"row <number>"`."""
        return f"{'user' if self.has_id else 'row'} {self.key}"


def user_state(prepared: PreparedDataset, part: str, user: str | int | None = None) -> UserState:
    """The last state of a user in one part of the data, and the items of the user's earlier rows.

    Args:
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.
        user: Id of the user, as a number or a text; by default the one with the most rows in the part, of several the
            first. Where users have no ids, the number of a user state.

    Returns:
        The state. Earlier are rows of earlier moments, or, without moments, of earlier parts; sampled negatives are
        none of them. Without item ids no item is known.

    Raises:
        ConfigError: If there is no such part.
        DataError: If the part has no rows, or none of that user.
    """
    keys, number = np.unique(prepared.users.key, return_inverse=True)
    of_row = number[prepared.user_row]
    inside = prepared.part_rows(part)
    if not len(inside):
        raise DataError(f"The {part} part of {prepared.dataset.name} has no rows.")
    rows_of = np.bincount(of_row[inside], minlength=len(keys))
    if user is None:
        chosen = int(rows_of.argmax())
    else:
        found = np.flatnonzero(keys.astype(str) == str(user))
        chosen = int(found[0]) if len(found) else -1
    if chosen < 0 or not rows_of[chosen]:
        present = [str(key) for key in keys[rows_of > 0]]
        raise DataError(
            f"Expected a user with a row in the {part} part, such as {', '.join(present[:5])}.{nearest(user, present)} "
            f"Received: {user!r}"
        )
    own = inside[of_row[inside] == chosen]
    time = prepared.time
    last = own[-1] if time is None else own[np.flatnonzero(time[own] == time[own].max())[-1]]
    known: tuple[int, ...] = ()
    if prepared.has_items:
        before = prepared.split < PARTS.index(part) if time is None else time < time[last]
        rows = prepared.item_row[(of_row == chosen) & before & ~prepared.sampled]
        ids = np.unique(prepared.items.key[rows])
        known = tuple(prepared.catalogue[np.isin(prepared.items.key[prepared.catalogue], ids)].tolist())
    return UserState(keys[chosen], int(prepared.user_row[last]), known, prepared.has_users)
