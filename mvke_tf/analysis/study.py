"""What a model does on a set of pairs, once per distinct user and item: gates, experts, tags and field attention.

Everything here is the output of a named layer, cut from the graph of the model; nothing is computed a second way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np

from mvke_tf.data.dataset import Batches, PairData, Table
from mvke_tf.models.mvke import field_attention_model
from mvke_tf.models.two_tower import (
    ITEM_VECTOR,
    USER_VECTOR,
    cut,
    gate_model,
    gated_tasks,
    mixed_experts,
    task_names,
    tower,
)
from mvke_tf.schema import ITEM_ROWS, USER_ROWS, WEIGHTS_SUFFIX

BATCH_SIZE = 4096
# What the cardinality of an endless `tf.data.Dataset` is.
_ENDLESS = -1
# How a dense MMoE calls the gate weights that it puts out, and the layer that mixes its experts.
_WEIGHTS_OUTPUT, _DENSE_MIXTURE = "_expert_weights", "mixture_{task}"


@dataclasses.dataclass(frozen=True)
class Gate:
    """The gate of one task on all entities of the side that it reads.

    Args:
        task: Name of the task.
        side: `"user"` or `"item"`.
        experts: Indices of the experts (virtual kernels) that the task sees.
        weights: `(N, len(experts))` float64, per entity of that side; each row sums to 1.
    """

    task: str
    side: str
    experts: tuple[int, ...]
    weights: np.ndarray


class Study:
    """A model on a set of pairs.

    A gate depends on one side only, so it runs once per distinct user state or item; impressions weigh the results.
    What is expensive is computed when it is first asked for, and kept.

    Args:
        model: A two-tower model of this package, or a dense MMoE (`mvke_tf.models.dense_mmoe`), whose rows count as
            users and whose item side is empty.
        data: A `PairData`, its `Batches`, or a `tf.data.Dataset` of (features, labels), finite.
        batch_size: Entities per step; has no influence on the results.

    Attributes:
        user_rows, item_rows: Rows of the pairs in the tables below, `(n,)`.
        users: Features of the user states that occur in the pairs.
        items: Features of all items.
        labels: `{task: (n,)}`; NaN where a label has sample weight 0.
        source_users: Row in the table of users of `data` of each row of `users`.

    Raises:
        ValueError: If the data are no pairs, or lack a feature that the model reads.
    """

    def __init__(self, model: keras.Model, data: Any, batch_size: int = BATCH_SIZE) -> None:
        self.model, self.batch_size = model, batch_size
        pairs = as_pairs(model, data)
        if not len(pairs):
            raise ValueError("Expected at least one pair to analyse. Received: no pair")
        self.source_users, self.user_rows = np.unique(pairs.user_rows, return_inverse=True)
        self.users: Table = {name: np.asarray(column)[self.source_users] for name, column in pairs.users.items()}
        self.items, self.item_rows = pairs.items, np.asarray(pairs.item_rows)
        self.labels = known_labels(pairs)
        missing = sorted(set(_inputs(model)) - set(self.users) - set(self.items))
        if missing:
            raise ValueError(
                f"The data lack features that {model.name!r} reads: {missing}. "
                f"Received: {sorted({*self.users, *self.items})}"
            )

    def __len__(self) -> int:
        return len(self.user_rows)

    def rows(self, side: str) -> np.ndarray:
        """The row of each pair in the table of one side, `(n,)`."""
        return self.user_rows if side == "user" else self.item_rows

    def size(self, side: str) -> int:
        """Number of entities of one side."""
        table = self.users if side == "user" else self.items
        return len(next(iter(table.values()))) if table else 1

    def impressions(self, side: str) -> np.ndarray:
        """Number of pairs of each entity of one side, `(N,)`."""
        return np.bincount(self.rows(side), minlength=self.size(side))

    def evaluate(self, outputs: Any, side: str) -> Any:
        """Values of symbolic tensors of the model on all entities of one side, as NumPy arrays."""
        part = _part(self.model, outputs)
        table = self.users if side == "user" else self.items
        inputs = {name: table[name] for name in part.input}
        batches = []
        # Called and not `predict`ed: a part runs over few batches, and tracing it would take longer than that.
        for start in range(0, self.size(side), self.batch_size):
            batch = {name: column[start : start + self.batch_size] for name, column in inputs.items()}
            batches.append(keras.tree.map_structure(keras.ops.convert_to_numpy, part(batch, training=False)))
        return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *batches)

    @cached_property
    def gates(self) -> dict[str, Gate]:
        """The gate of each task that has one.

        Raises:
            ValueError: If the model has no gate, or a gate reads both sides.
        """
        tensors = gate_tensors(self.model)
        sides = {task: self._side(task, tensor) for task, tensor in tensors.items()}
        gates = {}
        for side in sorted(set(sides.values())):
            weights = self.evaluate({task: tensors[task] for task in tensors if sides[task] == side}, side)
            for task, values in weights.items():
                gates[task] = Gate(task, side, self._seen(task, values.shape[1]), np.asarray(values, np.float64))
        return {task: gates[task] for task in tensors}

    def _side(self, task: str, tensor: Any) -> str:
        read = set(_part(self.model, tensor).input)
        for side, table in (("user", self.users), ("item", self.items)):
            if read <= set(table):
                return side
        raise ValueError(
            f"The gate of task {task!r} must read one side only. Received: a gate that reads {sorted(read)}"
        )

    def _seen(self, task: str, number: int) -> tuple[int, ...]:
        return mixed_experts(_mixture(self.model, task), number)

    @cached_property
    def expert_outputs(self) -> np.ndarray:
        """Outputs of all experts on the user states, `(U, E, D)`.

        Raises:
            ValueError: If the model has no gates, or its experts cannot be reached.
        """
        sources = {}
        for task in gate_tensors(self.model):
            mixture = _mixture(self.model, task)
            if mixture is not None:
                source = mixture.input[0] if isinstance(mixture.input, (list, tuple)) else mixture.input
                sources[id(source)] = source
        if len(sources) != 1:
            raise ValueError(
                f"Expected one layer of experts that all gates of {self.model.name!r} mix, within reach. "
                f"Received: {len(sources)} such layers"
            )
        return self.evaluate(next(iter(sources.values())), "user")

    @cached_property
    def tags(self) -> dict[str, np.ndarray]:
        """Tag vectors of all items, `{task: (I, D)}`: what each expert output is multiplied with.

        In MVKE these are the vectors that the gate compares with the virtual kernels, otherwise the item vectors.
        """
        layers = {layer.name for layer in self.model.layers}
        names = {task: f"tag_{task}" for task in task_names(self.model)}
        outputs = {
            task: self.model.get_layer(name if name in layers else ITEM_VECTOR.format(task=task)).output
            for task, name in names.items()
        }
        return self.evaluate(outputs, "item")

    @cached_property
    def attention(self) -> np.ndarray:
        """Field attention of MVKE on the user states, `(U, F, K)`, summing to 1 over the fields.

        Raises:
            ValueError: If the model has no virtual kernels.
        """
        if not has_kernels(self.model):
            raise ValueError(f"Only MVKE has field attention. Received: the model {self.model.name!r}")
        return self.evaluate(field_attention_model(self.model).output, "user")

    def scores(self, task: str, user_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
        """Inner products of expert outputs and tag, `⟨expert_e(user), tag(item)⟩`, of given pairs.

        Returns:
            `(n, E_task)` float64, in the order of the experts of the gate.
        """
        experts, tags = self.expert_outputs, self.tags[task]
        chosen = list(self.gates[task].experts)
        scores = np.empty((len(user_rows), len(chosen)))
        for start in range(0, len(user_rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            outputs = experts[user_rows[part]][:, chosen].astype(np.float64)
            scores[part] = np.einsum("bed,bd->be", outputs, tags[item_rows[part]].astype(np.float64))
        return scores

    def products(self, tasks: Sequence[str], user_rows: np.ndarray, item_rows: np.ndarray) -> dict[str, np.ndarray]:
        """Inner products of user and item vectors of given pairs, `{task: (n,)}` float64."""
        if not tasks:
            return {}
        vectors = {}
        for side in ("user", "item"):
            outputs = tower(self.model, side).output
            vectors[side] = self.evaluate({task: outputs[task] for task in tasks}, side)
        return {
            task: np.sum(vectors["user"][task][user_rows].astype(np.float64) * vectors["item"][task][item_rows], axis=1)
            for task in tasks
        }


def has_gates(model: keras.Model) -> bool:
    """Whether a model has gates to look at."""
    return bool(_find_gates(model))


def has_kernels(model: keras.Model) -> bool:
    """Whether a model has virtual kernels."""
    return any(layer.name == "virtual_kernels" for layer in model.layers)


def is_two_tower(model: keras.Model) -> bool:
    """Whether a model has user and item vectors."""
    names = list(model.output) if isinstance(model.output, dict) else []
    layers = {layer.name for layer in model.layers}
    return bool(names) and all(USER_VECTOR.format(task=name) in layers for name in names)


def gate_tensors(model: keras.Model) -> dict[str, Any]:
    """The symbolic gate weights of each task that has a gate, `{task: (B, E_task)}`.

    Raises:
        ValueError: If there is none.
    """
    found = _find_gates(model)
    if not found:
        raise ValueError(
            "Expected a model with gates: mvke, mmoe, cgc, ple, or a dense MMoE with `return_expert_weights=True`. "
            f"Received: {model.name!r}, which has none"
        )
    return found


def _find_gates(model: keras.Model) -> dict[str, Any]:
    layers = {layer.name for layer in model.layers}
    if is_two_tower(model):
        return gate_model(model).output if gated_tasks(model) else {}
    outputs = model.output if isinstance(model.output, dict) else {}
    tasks = [name for name in outputs if not name.endswith(_WEIGHTS_OUTPUT)]
    found = {task: outputs[task + _WEIGHTS_OUTPUT] for task in tasks if task + _WEIGHTS_OUTPUT in outputs}
    return found or {task: model.get_layer(f"gate_{task}").output for task in tasks if f"gate_{task}" in layers}


def _mixture(model: keras.Model, task: str) -> Any:
    """The layer that chooses or mixes the experts of a task; None where a nested model hides it."""
    name = (USER_VECTOR if is_two_tower(model) else _DENSE_MIXTURE).format(task=task)
    return next((layer for layer in model.layers if layer.name == name), None)


def _inputs(model: keras.Model) -> Mapping[str, Any]:
    """The inputs of a model by name; a model with a single, nameless input is read by the name of its input layer."""
    return model.input if isinstance(model.input, dict) else {model.input.name: model.input}


def _part(model: keras.Model, outputs: Any) -> keras.Model:
    if isinstance(model.input, dict):
        return cut(model, outputs, name="part")
    return keras.Model(_inputs(model), outputs, name="part")


def as_pairs(model: keras.Model, data: Any) -> PairData:
    """Pairs of distinct entities from whatever a model can be trained on; arguments and errors as in `Study`."""
    if isinstance(data, PairData):
        return data
    if isinstance(data, Batches):
        return data.data
    if not hasattr(data, "as_numpy_iterator"):
        raise ValueError(
            "Expected a PairData, Batches or a tf.data.Dataset of (features, labels). "
            f"Received: {type(data).__module__}.{type(data).__name__}"
        )
    if int(data.cardinality()) == _ENDLESS:
        raise ValueError("Expected a dataset that ends; `.take(steps)` makes one. Received: an endless dataset")
    features, labels = _collect(model, data)
    if is_two_tower(model):
        sides = [set(tower(model, side).input) for side in ("user", "item")]
    else:
        sides = [set(_inputs(model)), set()]
    missing = sorted(set.union(*sides) - set(features))
    if missing:
        raise ValueError(
            f"The dataset lacks features that {model.name!r} reads: {missing}. Received: {sorted(features)}"
        )
    tables, rows = [], []
    for names in sides:
        table = {name: column for name, column in features.items() if name in names}
        first, inverse = _distinct(table) if table else (None, np.zeros(len(next(iter(features.values()))), np.int32))
        tables.append({name: column[first] for name, column in table.items()})
        rows.append(inverse.astype(np.int32))
    return PairData(*tables, *rows, labels)


def known_labels(pairs: PairData) -> Table:
    """The labels of all pairs, `{task: (n,)}` float64; NaN where a pair has no label or weight 0."""
    labels = {task: np.asarray(label, np.float64) for task, label in pairs.labels.items()}
    return {
        task: np.where(pairs.weights[task] == 0, np.nan, label) if task in pairs.weights else label
        for task, label in labels.items()
    }


def _collect(model: keras.Model, data: Any) -> tuple[Table, Table]:
    """All features and labels of a dataset, one row per pair."""
    batches = []
    for element in data.as_numpy_iterator():
        if not isinstance(element, tuple) or len(element) not in (2, 3):
            raise ValueError(f"Expected a dataset of (features, labels). Received: elements {data.element_spec}")
        features, labels, *weights = element
        features = dict(features) if isinstance(features, dict) else {next(iter(_inputs(model))): features}
        rows = {side: features.pop(name, None) for side, name in (("user", USER_ROWS), ("item", ITEM_ROWS))}
        for side, chosen in rows.items():
            if chosen is not None:
                names = set(tower(model, side).input)
                features |= {name: column[chosen] for name, column in features.items() if name in names}
        labels = labels if isinstance(labels, dict) else {_tasks(model)[0]: labels}
        labels = {task: np.asarray(label, np.float64).reshape(len(label), -1)[:, 0] for task, label in labels.items()}
        if weights and isinstance(weights[0], dict):
            for task, weight in weights[0].items():
                labels[task] = np.where(weight.reshape(-1) == 0, np.nan, labels[task])
        batches.append((features, labels))
    if not batches:
        raise ValueError("Expected at least one batch. Received: an empty dataset")
    return tuple(_concatenated([batch[index] for batch in batches]) for index in range(2))


def _tasks(model: keras.Model) -> list[str]:
    outputs = list(model.output) if isinstance(model.output, dict) else ["output"]
    return [name for name in outputs if not name.endswith(_WEIGHTS_OUTPUT)]


def _concatenated(tables: Sequence[Table]) -> Table:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _distinct(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the distinct rows of a table, and the distinct row of each row."""
    columns = [np.ascontiguousarray(column.reshape(len(column), -1)).view(np.uint8) for column in table.values()]
    joined = np.ascontiguousarray(np.concatenate(columns, axis=1))
    keys = joined.view(np.dtype((np.void, joined.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def user_fields(model: keras.Model) -> list[str]:
    """Names of the user fields in the order of the field axis of the attention."""
    merged = model.get_layer("user_fields").input
    layers = {layer.name for layer in model.layers}
    embedded = model.get_layer("user_concat").input if "user_concat" in layers else [merged]
    return [
        next(name for name in cut(model, tensor, name="field").input if not name.endswith(WEIGHTS_SUFFIX))
        for tensor in embedded
    ]
