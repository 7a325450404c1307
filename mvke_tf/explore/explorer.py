# SPDX-License-Identifier: Apache-2.0
"""What a model says of one user or one item, and what changes if the user were another; the page shows it.

It asks the checkpoint of the run, whose parts (experts, tags, gates) an exported SavedModel does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from keras import ops

from mvke_tf.analysis import run_cards
from mvke_tf.analysis.page import Section
from mvke_tf.config import nearest
from mvke_tf.data.encoder import EncodedFeature
from mvke_tf.errors import DataError
from mvke_tf.explore.fields import from_text, inputs_of, is_unknown, to_text
from mvke_tf.inference.gates import gate_weights
from mvke_tf.inference.vectors import Vectors, run_model, vectors_of
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import Run

# Users among whom those are sought who would want an item; of more, so many are taken, evenly spread.
MOST_USERS = 20_000
# Rows of the small batch of a user and the edited one.
_PAIR = 2
_KINDS = {"binary": "probability", "multiclass": "probability", "count": "rate", "regression": "value"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number that is predicted for every pair: that of a task, or the probability of one class of it.

    Args:
        task: Name of the task.
        label: The class of a multi-class task; None of every other.
        unit: `"probability"`, `"rate"` (of a count) or `"value"` (of a regression, in the unit of its label).
    """

    task: str
    label: str | None
    unit: str

    @property
    def name(self) -> str:
        """What to call it."""
        return self.task if self.label is None else f"{self.task}: {self.label}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One item, or one user, of a ranking.

    Args:
        position: Position of it in the explorer's items or users.
        rank: From 1.
        value: What is predicted now.
        rank_before, value_before: The same of the unedited user.
        contributions: What each expert adds to the logit, in the order of `Ranking.experts`; they sum to it. (With an
            event before the task, that is the logit given the event; of a regression or count, the output less a
            constant.)
    """

    position: int
    rank: int
    value: float
    rank_before: int
    value_before: float
    contributions: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best entries by one target.

    Args:
        target: The target.
        best: Best first.
        left: Those that are among the best of the unedited user only, best of those first.
        experts: Names of the experts that contribute; none where a task has no gate.
    """

    target: Target
    best: tuple[Entry, ...]
    left: tuple[Entry, ...] = ()
    experts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Gate:
    """The gate of one task.

    Args:
        task: Name of the task.
        experts: Names of the experts.
        weights: `(E,)`, which sum to 1.
        other: What to compare with: the weights of the unedited user, or the mean of all items; `(E,)`.
    """

    task: str
    experts: tuple[str, ...]
    weights: np.ndarray
    other: np.ndarray


@dataclasses.dataclass(frozen=True)
class UserView:
    """What a model says of one user.

    Args:
        position: Position of the user.
        changed: Names of the features that were edited.
        unknown: Those of them with a value that training did not know.
        rankings: The best items by each target.
        gates: Gates that read the user.
    """

    position: int
    changed: tuple[str, ...]
    unknown: tuple[str, ...]
    rankings: tuple[Ranking, ...]
    gates: tuple[Gate, ...]


@dataclasses.dataclass(frozen=True)
class ItemView:
    """What a model says of one item.

    Args:
        position: Position of the item.
        gates: Gates that read the item, beside their mean over all items.
        neighbours: The nearest other items by task: cosines of item vectors.
        users: Who would want it, by each target.
    """

    position: int
    gates: tuple[Gate, ...]
    neighbours: Mapping[str, tuple[Entry, ...]]
    users: tuple[Ranking, ...]


class Explorer:
    """A run to ask. All vectors of items are computed once, here, and those of users when they are first needed.

    Attributes:
        fields: The features of a user that can be edited, in the order of the model.
        items, users: What to call each item of the catalogue and each user: the latest state of each.
        targets: What is predicted.

    Args:
        run: A run with a checkpoint and its prepared data. Predictions are calibrated if the run is.

    Raises:
        RunError: If the run has no checkpoint or its data are gone, or the checkpoint is damaged.
        DataError: If the data are damaged.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model: TwoTowerModel = run.load_model(calibrated=True)
        self._prepared = prepared = run.prepared
        self._encoder = prepared.encoder
        self._rows = np.asarray(prepared.catalogue)
        self._vectors = vectors_of(self.model.item_tower, prepared.items.encoded, self._rows)
        self.fields: tuple[EncodedFeature, ...] = tuple(
            feature for feature in self._encoder.of_tower("user") if not feature.constant
        )
        self.targets = tuple(
            Target(task, label, _KINDS[kind])
            for task, kind in self.model.kinds.items()
            for label in self.model.classes.get(task, (None,))
        )

    def warm_up(self) -> None:
        """Computes everything once, so that the first answer takes no longer than the others."""
        raw = self._prepared.latest_users.raw
        self._encoder.encode_numpy({name: np.asarray(column)[:1] for name, column in raw.items()}, "user", 1)
        self.find("user", self.users[0])
        self.user(0)
        self.item(0)

    @cached_property
    def cards(self) -> Section | None:
        """What each kernel or expert stands for, on the test part; None of a model without gates.

        Raises:
            DataError: If the test part has no rows.
        """
        return run_cards(self.run, self.model)

    # === Who and what there is ===

    @cached_property
    def users(self) -> list[str]:
        keys = self._prepared.latest_users.key
        return [str(key) if self._prepared.has_users else f"row {key}" for key in keys]

    @cached_property
    def items(self) -> list[str]:
        table, has_ids = self._prepared.items, self._prepared.has_items
        keys = [str(table.key[row]) if has_ids else f"item {row}" for row in self._rows]
        if table.name is None:
            return keys
        names = np.asarray(table.name)[self._rows]
        return [key if name == key else f"{name} ({key})" for name, key in zip(names, keys, strict=True)]

    @cached_property
    def _places(self) -> dict[str, dict[str, int]]:
        """Positions by what people may type: the name that is shown, and the id or the name alone."""
        table, rows = self._prepared.items, self._rows
        items: dict[str, int] = {}
        for column in (table.name, table.key if self._prepared.has_items else None):
            if column is not None:
                items |= {str(value): position for position, value in reversed([*enumerate(column[rows])])}
        keys = self._prepared.latest_users.key
        users = {str(key): position for position, key in enumerate(keys)}
        return {
            "user": users | {name: position for position, name in enumerate(self.users)},
            "item": items | {name: position for position, name in enumerate(self.items)},
        }

    def find(self, side: str, text: str | None) -> int:
        """The position of a user or an item.

        Args:
            side: `"user"` or `"item"`.
            text: The id, the name, or what `users` or `items` calls it.

        Raises:
            DataError: If there is none.
        """
        places, text = self._places[side], text or ""
        text = text if text in places else text.strip()
        if text not in places:
            raise DataError(
                f"Expected the {'name or id of an item' if side == 'item' else 'id of a user'} of the data."
                f"{nearest(text, list(places)[:10_000])} Received: {text[:60]!r}"
            )
        return places[text]

    def texts(self, user: int) -> dict[str, str]:
        """The raw values of a user as text, `{feature: text}`, to edit and give to `user`."""
        raw = self._prepared.latest_users.raw
        return {feature.name: to_text(feature, raw, user) for feature in self.fields}

    def vocabulary(self, feature: EncodedFeature) -> list[str] | None:
        """The values of a single-valued feature that training knows; None if it has no list of them."""
        if feature.is_list or feature.encode != "vocabulary":
            return None
        return [str(value) for value in self._encoder.state[feature.table]]

    # === One user ===

    def user(self, user: int, texts: Mapping[str, str] | None = None, top: int = 10) -> UserView:
        """What the model says of a user, edited or not.

        Args:
            user: Position of the user.
            texts: Values as text, see `texts`; those that are absent, or as they were, stay.
            top: Items per target.

        Raises:
            DataError: If a text is no value of its feature, one line per such feature.
        """
        before = self._encoded_user(user)
        now, changed, unknown = self._edited(user, before, texts or {})
        pair = {name: np.concatenate([before[name], column]) for name, column in now.items()}
        users = vectors_of(self.model.user_tower, pair, batch=_PAIR)
        predicted = self._by_target(self._predictions(users, self._vectors))
        split = self._split(pair)
        rankings = []
        for target in self.targets:
            was, current = predicted[target][0 if changed else 1], predicted[target][1]
            best, best_before = best_of(current, top), best_of(was, top)
            left = best_before[~np.isin(best_before, best)]
            parts = split(target, best) if split is not None else None
            rankings.append(
                Ranking(
                    target,
                    _entries(best, current, was, parts),
                    _entries(left, current, was),
                    () if parts is None else self.experts_of(target.task),
                )
            )
        gates: tuple[Gate, ...] = ()
        if self.model.gate_side == "user":
            weights = _gates_of_pair(self.model, pair)
            gates = tuple(Gate(task, self.experts_of(task), own[1], own[0]) for task, own in weights.items())
        return UserView(user, changed, unknown, tuple(rankings), gates)

    def _encoded_user(self, user: int) -> dict[str, np.ndarray]:
        return {name: column[[user]] for name, column in self._prepared.latest_users.encoded.items()}

    def _edited(
        self, user: int, before: Mapping[str, np.ndarray], texts: Mapping[str, str]
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...], tuple[str, ...]]:
        """The encoded user with other values, the features that they are of, and those with an unknown value."""
        if surplus := sorted(set(texts) - {feature.name for feature in self.fields}):
            raise DataError(f"Expected features of a user. Received: {surplus}")
        raw, own = self._prepared.latest_users.raw, self.texts(user)
        row = {name: np.asarray(raw[name])[[user]] for name in self._encoder.raw_inputs("user")}
        edited, errors = [], []
        for feature in self.fields:
            text = texts.get(feature.name, own[feature.name])
            if text == own[feature.name]:
                continue
            try:
                row |= from_text(feature, text)
            except DataError as error:
                errors.append(str(error))
            edited.append(feature)
        if errors:
            raise DataError("\n".join(errors))
        if not edited:
            return dict(before), (), ()
        encoded = self._encoder.encode_numpy(row, "user", 1)
        now = dict(before)
        # The others stay to the last bit.
        for feature in edited:
            now |= {name: encoded[name] for name in inputs_of(feature)}
        unknown = [f.name for f in edited if texts[f.name].strip() and is_unknown(f, encoded)]
        return now, tuple(feature.name for feature in edited), tuple(unknown)

    def _predictions(self, users: Vectors, items: Vectors) -> dict[str, np.ndarray]:
        """Predictions of all pairs, `{task: (n, m)}` float64; of a multi-class task `(n, m, C)`."""
        classes = self.model.class_weights
        products = {}
        for task, vectors in users.items():
            if task in classes:
                vectors = vectors[:, None] * classes[task][0]
                products[task] = np.moveaxis(vectors @ items[task].T, 1, -1)
            else:
                products[task] = vectors @ items[task].T
        predicted = self.model.predictions(self.model.outputs_of_products(products))
        return {task: ops.convert_to_numpy(values).astype(np.float64) for task, values in predicted.items()}

    def _by_target(self, predicted: Mapping[str, np.ndarray]) -> dict[Target, np.ndarray]:
        classes = self.model.classes
        return {
            target: predicted[target.task]
            if target.label is None
            else predicted[target.task][..., classes[target.task].index(target.label)]
            for target in self.targets
        }

    # === Experts ===

    def experts_of(self, task: str) -> tuple[str, ...]:
        """Names of the experts that a task mixes."""
        what = "kernel" if self.model.kernels_of(task) else "expert"
        return tuple(f"{what} {index}" for index in self.model.experts_of(task))

    @cached_property
    def _tags(self) -> Vectors:
        return run_model(self.model.tags, self._prepared.items.encoded, self._rows)

    @cached_property
    def _item_gates(self) -> dict[str, np.ndarray]:
        """Gates that read the item, `{task: (M, E)}`; none of other models."""
        if self.model.gate_side != "item":
            return {}
        return gate_weights(self.model, self._prepared.items.encoded, self._rows)

    def _split(self, pair: Mapping[str, np.ndarray]) -> Callable[[Target, np.ndarray], np.ndarray | None] | None:
        """How the logits of the second user of a pair split into experts: `(target, items (k,)) -> (k, E)`.

        A task with a single expert has nothing to split, and a multi-class one no such sum.
        """
        model, side = self.model, self.model.gate_side
        if side is None or model.expert_outputs is None:
            return None
        outputs = run_model(model.expert_outputs, pair, batch=_PAIR)[1].astype(np.float64)
        of_user = _gates_of_pair(model, pair) if side == "user" else {}

        def split(target: Target, items: np.ndarray) -> np.ndarray | None:
            task = target.task
            if target.label is not None or task not in (of_user or self._item_gates):
                return None
            scores = self._tags[task][items] @ outputs[list(model.experts_of(task))].T
            return scores * (of_user[task][1] if of_user else self._item_gates[task][items])

        return split

    # === One item ===

    @cached_property
    def _asked(self) -> np.ndarray:
        """Positions of the users among whom those are sought who would want an item."""
        count = len(self._prepared.latest_users)
        return np.unique(np.linspace(0, count - 1, min(count, MOST_USERS)).astype(int))

    @cached_property
    def _user_vectors(self) -> Vectors:
        return vectors_of(self.model.user_tower, self._prepared.latest_users.encoded, self._asked)

    @property
    def asked_users(self) -> int:
        """Number of the users among whom those are sought who would want an item."""
        return len(self._asked)

    def item(self, item: int, top: int = 10) -> ItemView:
        """What the model says of an item.

        Args:
            item: Position of the item.
            top: Neighbours per task, and users per target.
        """
        gates = tuple(
            Gate(task, self.experts_of(task), weights[item], weights.mean(axis=0))
            for task, weights in self._item_gates.items()
        )
        one = {task: vectors[[item]] for task, vectors in self._vectors.items()}
        predicted = self._by_target(self._predictions(self._user_vectors, one))
        users = []
        for target, values in predicted.items():
            entries = _entries(best_of(values[:, 0], top), values[:, 0], values[:, 0])
            moved = [dataclasses.replace(entry, position=int(self._asked[entry.position])) for entry in entries]
            users.append(Ranking(target, tuple(moved)))
        return ItemView(item, gates, self._neighbours(item, top), tuple(users))

    def _neighbours(self, item: int, top: int) -> dict[str, tuple[Entry, ...]]:
        found = {}
        for task, vectors in self._vectors.items():
            length = np.linalg.norm(vectors, axis=1) * np.linalg.norm(vectors[item])
            cosine = (vectors @ vectors[item]).astype(np.float64) / np.maximum(length, np.finfo(np.float32).tiny)
            cosine[item] = -np.inf
            best = best_of(cosine, min(top, len(cosine) - 1))
            found[task] = _entries(best, cosine, cosine)
        return found


def _gates_of_pair(model: TwoTowerModel, pair: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gates that read the user, of the two users of a pair, `{task: (2, E)}`."""
    return run_model(model.gates, pair, batch=_PAIR)


def best_of(values: np.ndarray, top: int) -> np.ndarray:
    """Positions of the largest values, at most `top`, largest first; of equal ones the first."""
    top = min(top, len(values))
    if not top:
        return np.zeros(0, int)
    least = np.partition(values, len(values) - top)[len(values) - top]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:top]


def _rank(values: np.ndarray, position: int) -> int:
    """Rank of a position, from 1, as `best_of` orders."""
    value = values[position]
    return 1 + int((values > value).sum()) + int((values[:position] == value).sum())


def _entries(
    positions: Sequence[int] | np.ndarray, now: np.ndarray, before: np.ndarray, parts: np.ndarray | None = None
) -> tuple[Entry, ...]:
    return tuple(
        Entry(
            int(position),
            _rank(now, position),
            float(now[position]),
            _rank(before, position),
            float(before[position]),
            () if parts is None else tuple(parts[number].tolist()),
        )
        for number, position in enumerate(positions)
    )
