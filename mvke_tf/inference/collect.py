# SPDX-License-Identifier: Apache-2.0
"""Interactions from whatever a model can be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from mvke_tf.data.batches import Batches, Interactions, Table
from mvke_tf.models import MultiTaskModel, TwoTowerModel
from mvke_tf.schema import ITEM_ROWS, USER_ROWS

# What the cardinality of an endless `tf.data.Dataset` is.
_ENDLESS = -1


def as_interactions(model: MultiTaskModel, data: Any) -> Interactions:
    """Interactions of distinct entities.

    Args:
        model: The model that is to read them. All features of a model without two towers count as the user's.
        data: `Interactions`, their `Batches`, or a finite `tf.data.Dataset` of (features, labels) or (features,
            labels, weights). Labels that are not one number per row are left out.

    Raises:
        ValueError: If the data are something else, have no end or no batch, or lack a feature that the model reads.
    """
    if isinstance(data, Interactions):
        return data
    if isinstance(data, Batches) and isinstance(data.data, Interactions):
        return data.data
    sides = _inputs_by_side(model)
    features, labels = collect(data, model.task_names, lambda batch: _one_row_per_pair(batch, sides))
    if missing := sorted({*sides["user"], *sides["item"]} - set(features)):
        raise ValueError(
            f"The dataset lacks features that {model.name!r} reads: {missing}. Received: {sorted(features)}"
        )
    number = len(next(iter(features.values())))
    tables, rows = [], []
    for names in sides.values():
        table = {name: features[name] for name in names}
        first, inverse = _distinct(table) if table else (np.zeros(1, int), np.zeros(number, int))
        tables.append({name: column[first] for name, column in table.items()})
        rows.append(inverse.astype(np.int32))
    return Interactions(tables[0], tables[1], rows[0], rows[1], labels)


def known_labels(interactions: Interactions) -> dict[str, np.ndarray]:
    """The labels of all pairs, `{task: (n,)}` float64; NaN where a pair has no label or weight 0."""
    labels = {task: np.asarray(label, np.float64) for task, label in interactions.labels.items()}
    return {
        task: np.where(interactions.weights[task] == 0, np.nan, label) if task in interactions.weights else label
        for task, label in labels.items()
    }


def collect(
    dataset: Any, tasks: Sequence[str], features_of: Callable[[Any], Any] = lambda features: features
) -> tuple[Any, dict[str, np.ndarray]]:
    """All batches of a `tf.data.Dataset`, in one pass.

    Args:
        dataset: Finite, of (features, labels) or (features, labels, weights).
        tasks: Names of the tasks. Labels or weights that are no dictionary are those of the first task.
        features_of: What to keep of the features of a batch.

    Returns:
        The features, in their structure, and the labels, `{task: (n,)}` float64, NaN where the weight is 0. Labels that
        are not one number per row are left out.

    Raises:
        ValueError: If the dataset is something else, or has no end or no batch.
    """
    batches = [(features_of(features), labels) for features, labels in _batches(dataset, tasks)]
    if not batches:
        raise ValueError("Expected at least one batch. Received: an empty dataset")
    features, labels = (
        keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts) for parts in zip(*batches, strict=True)
    )
    return features, labels


def _batches(dataset: Any, tasks: Sequence[str]) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    if not hasattr(dataset, "as_numpy_iterator"):
        raise ValueError(
            "Expected Interactions, Batches or a tf.data.Dataset of (features, labels). "
            f"Received: {type(dataset).__module__}.{type(dataset).__name__}"
        )
    if int(dataset.cardinality()) == _ENDLESS:
        raise ValueError("Expected a dataset that ends; `.take(steps)` makes one. Received: an endless dataset")
    for element in dataset.as_numpy_iterator():
        if not isinstance(element, tuple) or len(element) not in (2, 3):
            raise ValueError(f"Expected a dataset of (features, labels). Received: elements {dataset.element_spec}")
        features, *others = element
        labels, *weights = (other if isinstance(other, dict) else {tasks[0]: other} for other in others)
        columns = {task: np.asarray(label, np.float64) for task, label in labels.items()}
        columns = {task: label.reshape(-1) for task, label in columns.items() if label.size == len(label)}
        for task, weight in weights[0].items() if weights else ():
            if task in columns:
                columns[task] = np.where(np.reshape(weight, -1) == 0, np.nan, columns[task])
        yield features, columns


def _inputs_by_side(model: MultiTaskModel) -> dict[str, list[str]]:
    """Names of the features that a model reads, by side."""
    if isinstance(model, TwoTowerModel):
        return {"user": list(model.user_tower.input), "item": list(model.item_tower.input)}
    return {"user": list(model.input) if isinstance(model.input, Mapping) else [model.input.name], "item": []}


def _one_row_per_pair(features: Any, sides: Mapping[str, Sequence[str]]) -> Table:
    """The features of a batch by name, those of distinct entities repeated for each pair."""
    features = dict(features) if isinstance(features, dict) else {sides["user"][0]: features}
    for side, name in (("user", USER_ROWS), ("item", ITEM_ROWS)):
        rows = features.pop(name, None)
        if rows is not None:
            features |= {name: column[rows] for name, column in features.items() if name in sides[side]}
    return features


def _distinct(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the distinct rows of a table, and the distinct row of each row."""
    columns = [np.ascontiguousarray(column.reshape(len(column), -1)).view(np.uint8) for column in table.values()]
    joined = np.ascontiguousarray(np.concatenate(columns, axis=1))
    keys = joined.view(np.dtype((np.void, joined.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)
