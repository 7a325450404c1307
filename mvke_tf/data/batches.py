"""Batches of interactions as `tf.data`: three encoded tables, gathered by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mvke_tf.schema import ITEM_ROWS, USER_ROWS, Task

Table = Mapping[str, np.ndarray]
PARALLEL_CALLS = 2


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Encoded entities, and the interactions of one part of the log: pairs of a user state and an item.

    Args:
        users: One row per user state, `{input: (N, ...)}`; indices int32, weights and dense features float32.
        items: One row per item, `{input: (M, ...)}`, likewise.
        user_rows: int32 `(n,)`, row of the user state of each pair.
        item_rows: int32 `(n,)`, row of the item of each pair.
        labels: `{task: (n,)}`, transformed as the task says.
        weights: `{task: (n,)}`, the weight of each pair in the loss and the metrics of a task; 0 where it does not
            count, as where it has no label. Tasks that are absent weigh every pair 1.
    """

    users: Table
    items: Table
    user_rows: np.ndarray
    item_rows: np.ndarray
    labels: Table
    weights: Table = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user_rows)

    def take(self, rows: np.ndarray) -> Interactions:
        """The chosen pairs, on the same entities."""
        return dataclasses.replace(
            self,
            user_rows=self.user_rows[rows],
            item_rows=self.item_rows[rows],
            labels={task: label[rows] for task, label in self.labels.items()},
            weights={task: weight[rows] for task, weight in self.weights.items()},
        )

    def check_labels(self, tasks: Iterable[Task]) -> None:
        """Does nothing if every pair of a weight above 0 has a label that its task allows.

        Raises:
            ValueError: If a task has no labels, or a label is not what its kind allows: 0 or 1, a finite number of the
                domain of a regression, a whole number from 0 of a count, the index of a class.
        """
        for task in tasks:
            if task.name not in self.labels:
                raise ValueError(f"Task {task.name!r} has no labels. Received labels of: {sorted(self.labels)}")
            labels = np.asarray(self.labels[task.name])
            if task.name in self.weights:
                labels = labels[self.weights[task.name] > 0]
            if task.kind == "binary":
                legal, expected = np.isin(labels, (0, 1)), "0 or 1"
            elif task.kind == "count":
                legal = np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))
                expected = "whole numbers of at least 0"
            elif task.kind == "multiclass":
                legal, expected = (
                    np.isin(labels, range(len(task.classes))),
                    f"indices of the {len(task.classes)} classes",
                )
            else:
                low, high = task.domain or (-np.inf, np.inf)
                expected = f"in [{low}, {high}]"
                if task.transform == "log1p" and task.domain is not None:
                    expected = f"log(1 + y) of y {expected}"
                    # A label at the end of its domain may be rounded to just outside.
                    slack = 1e-6 * (1 + np.log1p(max(abs(low), abs(high))))
                    low, high = np.log1p(low) - slack, np.log1p(high) + slack
                legal = np.isfinite(labels) & (low <= labels) & (labels <= high)
            if not legal.all():
                raise ValueError(
                    f"Labels of the {task.kind} task {task.name!r} must be {expected}. "
                    f"Received: {np.sum(~legal)} others, such as {labels[~legal][0]}"
                )

    def steps(self, batch_size: int) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-len(self) // batch_size)


def without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same pipeline, which ends when its data do.

    The autotuner sleeps between two looks at a pipeline, twice as long each time, up to 41 s. Whoever drops an
    iterator, as `fit` does after every epoch, waits until it wakes up.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


class Batches:
    """Makes the `tf.data` pipelines of one `Interactions`.

    A batch is `({feature: tensor}, {task: (B, 1) float32})`, made by gathering whole rows; no step runs Python. Where
    the data have weights, a third part holds those of all tasks, `{task: (B, 1) float32}`.

    Args:
        data: Entities and pairs.
        batch_size: Pairs per batch; the last batch of an epoch may be smaller.
        deduplicate: Whether a batch holds each of its user states and items once, with the inputs `user_rows` and
            `item_rows` `(B,)` that lead from pairs to entities (see `TwoTowerModel.training_model`).
        pad: With `deduplicate`, the multiple to which the number of user states and of items is filled up by rows that
            no pair refers to; 0 fills nothing. JAX and XLA compile anew for every shape, and TensorFlow on CPU
            builds a oneDNN primitive for every new one (at batch 4096, `pad=64` was measured 8 % faster).
    """

    def __init__(self, data: Interactions, batch_size: int, deduplicate: bool = False, pad: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: {batch_size}")
        if pad < 0:
            raise ValueError(f"`pad` must be 0 (no padding) or a multiple to fill up to. Received: {pad}")
        if not len(data):
            raise ValueError("Expected at least one pair to make batches of. Received: no pair")
        self.data, self.batch_size, self.deduplicate, self.pad = data, batch_size, deduplicate, pad
        self.steps = data.steps(batch_size)
        # The pipeline runs on the CPU, whatever device computes the model.
        with tf.device("CPU"):
            self._users = {name: tf.constant(column) for name, column in data.users.items()}
            self._items = {name: tf.constant(column) for name, column in data.items.items()}
            self._user_rows = tf.constant(data.user_rows, tf.int32)
            self._item_rows = tf.constant(data.item_rows, tf.int32)
            self._labels = {task: tf.constant(label[:, None], tf.float32) for task, label in data.labels.items()}
            everywhere = np.ones(len(data), np.float32)
            self._weights = {
                task: tf.constant(data.weights.get(task, everywhere)[:, None], tf.float32)
                for task in (data.labels if data.weights else ())
            }
            if deduplicate:
                # Pairs of one user state, as (first position, count) in the order of user rows.
                self._by_user = tf.constant(np.argsort(data.user_rows, kind="stable"), tf.int32)
                _, start, count = np.unique(np.sort(data.user_rows), return_index=True, return_counts=True)
                self._start, self._count = tf.constant(start, tf.int32), tf.constant(count, tf.int32)

    def in_order(self) -> tf.data.Dataset:
        """One epoch in the order of the pairs, of known cardinality."""
        return self._epoch(tf.range(len(self.data), dtype=tf.int32))

    def shuffled(self, seed: int) -> tf.data.Dataset:
        """One epoch in a new seeded order each time it is iterated, of known cardinality: for `model.fit` by hand."""
        seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(1)
        epoch = seeds.flat_map(lambda value: self._epoch(self._order(tf.stack([tf.cast(seed, tf.int64), value]))))
        return without_autotuning(epoch.apply(tf.data.experimental.assert_cardinality(self.steps)))

    def epoch(self, seed: int, number: int) -> tf.data.Dataset:
        """One epoch whose order depends on the seed and its number alone: what resuming needs."""
        return self._epoch(self._order(tf.constant([seed, number], tf.int64)))

    def _order(self, seed: tf.Tensor) -> tf.Tensor:
        """A permutation of the pairs; with `deduplicate`, of the user states, whose pairs stay together."""
        shuffle = tf.random.experimental.stateless_shuffle
        if not self.deduplicate:
            return shuffle(tf.range(len(self.data), dtype=tf.int32), seed=seed)
        states = shuffle(tf.range(len(self._start), dtype=tf.int32), seed=seed)
        start, count = tf.gather(self._start, states), tf.gather(self._count, states)
        offset = tf.range(len(self.data), dtype=tf.int32) - tf.repeat(tf.cumsum(count, exclusive=True), count)
        return tf.gather(self._by_user, tf.repeat(start, count) + offset)

    def _epoch(self, order: tf.Tensor) -> tf.data.Dataset:
        def batch(step: tf.Tensor) -> tuple[dict[str, Any], ...]:
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            user_rows, item_rows = tf.gather(self._user_rows, rows), tf.gather(self._item_rows, rows)
            inputs = {}
            if self.deduplicate:
                user_rows, inputs[USER_ROWS] = tf.unique(user_rows)
                item_rows, inputs[ITEM_ROWS] = tf.unique(item_rows)
                if self.pad:
                    user_rows, item_rows = _pad_rows(user_rows, self.pad), _pad_rows(item_rows, self.pad)
            inputs |= {name: tf.gather(column, user_rows) for name, column in self._users.items()}
            inputs |= {name: tf.gather(column, item_rows) for name, column in self._items.items()}
            by_task = (self._labels, self._weights) if self._weights else (self._labels,)
            return inputs, *({task: tf.gather(column, rows) for task, column in columns.items()} for columns in by_task)

        batches = tf.data.Dataset.range(self.steps, output_type=tf.int32).map(
            batch, num_parallel_calls=PARALLEL_CALLS, deterministic=True
        )
        return without_autotuning(batches.prefetch(PARALLEL_CALLS))


def _pad_rows(rows: tf.Tensor, multiple: int) -> tf.Tensor:
    """Fills a list of rows up to the next multiple with row 0."""
    return tf.pad(rows, [[0, -tf.shape(rows)[0] % multiple]])
