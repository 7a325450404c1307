# SPDX-License-Identifier: Apache-2.0
"""What a model does on a set of interactions, once per distinct user and item: gates, experts, tags, field attention.

Everything here is the output of a part of the model; nothing is computed a second way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np

from mvke_tf.data.batches import Table
from mvke_tf.inference.collect import as_interactions, known_labels
from mvke_tf.inference.gates import GateUse, gate_weights
from mvke_tf.inference.vectors import run_model, vectors_of
from mvke_tf.models import MultiTaskModel, TwoTowerModel


class Study:
    """A model on a set of interactions.

    A gate depends on one side only, so it runs once per distinct user state or item; impressions weigh the results.
    What is expensive is computed when it is first asked for, and kept.

    Args:
        model: A two-tower model, or a plain MMoE, whose rows count as users and whose item side is empty.
        data: `Interactions`, their `Batches`, or a finite `tf.data.Dataset` of (features, labels).
        catalogue: Rows of the table of items that are ranked and mapped, of an item in several states the latest; all
            by default.

    Attributes:
        interactions: The data.
        user_rows, item_rows: Position of the user state and of the item of each interaction, `(n,)`, among those below.
        source_users: Rows of the user states that occur, in the table of users of `interactions`, `(U,)`.
        source_items: Rows of the items that occur or are in the catalogue, in the table of items, `(I,)`.
        catalogue: Positions of the catalogue in `source_items`.
        labels: `{task: (n,)}` float64 in the unit of the label; NaN where a label has weight 0.

    Raises:
        ValueError: If there is no interaction, or the data lack a feature that the model reads.
    """

    def __init__(self, model: MultiTaskModel, data: Any, catalogue: np.ndarray | None = None) -> None:
        self.model = model
        self.interactions = pairs = as_interactions(model, data)
        if not len(pairs):
            raise ValueError("Expected at least one interaction to analyse. Received: none")
        read = set(model.input) if isinstance(model.input, dict) else {model.input.name}
        if missing := sorted(read - set(pairs.users) - set(pairs.items)):
            raise ValueError(
                f"The data lack features that {model.name!r} reads: {missing}. "
                f"Received: {sorted({*pairs.users, *pairs.items})}"
            )
        self.source_users, self.user_rows = np.unique(pairs.user_rows, return_inverse=True)
        catalogue = np.arange(self.table_rows("item")) if catalogue is None else np.unique(catalogue)
        self.source_items = np.union1d(catalogue, pairs.item_rows)
        self.item_rows = np.searchsorted(self.source_items, pairs.item_rows)
        self.catalogue = np.searchsorted(self.source_items, catalogue)
        self.labels = known_labels(pairs)
        if isinstance(model, TwoTowerModel):
            for task in [task for task, transform in model.transforms.items() if transform and task in self.labels]:
                self.labels[task] = np.expm1(self.labels[task])

    def __len__(self) -> int:
        return len(self.user_rows)

    def table(self, side: str) -> Table:
        """The encoded table of one side."""
        return self.interactions.users if side == "user" else self.interactions.items

    def table_rows(self, side: str) -> int:
        """Number of rows of that table; 1 of a side without features."""
        table = self.table(side)
        return len(next(iter(table.values()))) if table else 1

    def source(self, side: str) -> np.ndarray:
        """Rows of the entities of one side in their table, `(N,)`."""
        return self.source_users if side == "user" else self.source_items

    def rows(self, side: str) -> np.ndarray:
        """The entity of one side of each interaction, `(n,)`, as its position in `source(side)`."""
        return self.user_rows if side == "user" else self.item_rows

    def impressions(self, side: str) -> np.ndarray:
        """Number of interactions of each entity of one side, `(N,)`."""
        return np.bincount(self.rows(side), minlength=len(self.source(side)))

    def evaluate(self, part: keras.Model, side: str) -> Any:
        """The outputs of a part of the model on all entities of one side, as NumPy arrays `(N, ...)`."""
        return run_model(part, self.table(side), self.source(side))

    @cached_property
    def gates(self) -> dict[str, GateUse]:
        """The gate of each task that has one, on all entities of the side that it reads.

        Raises:
            ConfigError: If the model has no gate.
        """
        side = self.model.gate_side or "user"
        weights = gate_weights(self.model, self.table(side), self.source(side))
        counts = self.impressions(side)
        return {
            task: GateUse(task, side, self.model.experts_of(task), values, counts) for task, values in weights.items()
        }

    @cached_property
    def expert_outputs(self) -> np.ndarray:
        """Outputs of all experts on the user states, `(U, E, D)`.

        Raises:
            ValueError: If the model has no experts.
        """
        return self.evaluate(expert_part(self.model), "user")

    @cached_property
    def tags(self) -> dict[str, np.ndarray]:
        """Tag vectors of the items, `{task: (I, D)}`: what each expert output is multiplied with.

        In MVKE these are the vectors that the gate compares with the virtual kernels, otherwise the item vectors.
        """
        return self.evaluate(self.model.tags, "item")

    @cached_property
    def attention(self) -> np.ndarray:
        """Field attention of MVKE on the user states, `(U, F, K)`, summing to 1 over the fields.

        Raises:
            ValueError: If the model has no virtual kernels.
        """
        part = self.model.field_attention if isinstance(self.model, TwoTowerModel) else None
        if part is None:
            raise ValueError(f"Only MVKE has field attention. Received: the model {self.model.name!r}")
        return self.evaluate(part, "user")

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Inner products of expert outputs and tag, `⟨expert_e(user), tag(item)⟩`, of all interactions.

        Returns:
            `{task: (n, E_task)}` float64, in the order of the experts of the gate; no multi-class tasks.
        """
        found = {}
        for task, gate in self.gates.items():
            if task in self.model.ranked_tasks:
                tags = self.tags[task][self.item_rows]
                outputs = (self.expert_outputs[self.user_rows, expert] for expert in gate.experts)
                products = [np.einsum("nd,nd->n", output, tags, dtype=np.float64) for output in outputs]
                found[task] = np.stack(products, axis=1)
        return found

    @cached_property
    def contribution_shares(self) -> dict[str, np.ndarray]:
        """How much of the output of a task each expert makes: the size of `g_e ⟨expert_e, tag⟩` over that of all.

        Returns:
            `{task: (n, E_task)}` float64; each row sums to 1. Equal where nothing contributes. No multi-class tasks.
        """
        found = {}
        for task, scores in self.scores.items():
            gate = self.gates[task]
            sizes = np.abs(scores * gate.weights[self.rows(gate.side)])
            total = sizes.sum(axis=1, keepdims=True)
            found[task] = np.divide(sizes, total, out=np.full_like(sizes, 1.0 / sizes.shape[1]), where=total > 0)
        return found

    def products(self, tasks: Sequence[str]) -> dict[str, np.ndarray]:
        """Inner products of user and item vectors of all interactions, `{task: (n,)}` float64; no multi-class tasks."""
        if not tasks:
            return {}
        users = vectors_of(self.model.user_tower, self.table("user"), self.source_users)
        items = vectors_of(self.model.item_tower, self.table("item"), self.source_items)
        return {
            task: np.einsum("nd,nd->n", users[task][self.user_rows], items[task][self.item_rows], dtype=np.float64)
            for task in tasks
        }


def has_kernels(model: MultiTaskModel) -> bool:
    """Whether a model has virtual kernels."""
    return isinstance(model, TwoTowerModel) and model.virtual_kernels is not None


def expert_part(model: MultiTaskModel) -> keras.Model:
    """The part of a model that puts out its experts.

    Raises:
        ValueError: If it has none.
    """
    if model.expert_outputs is None:
        raise ValueError(f"Expected a model with experts. Received: {model.name!r}, which has none")
    return model.expert_outputs
