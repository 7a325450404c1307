# SPDX-License-Identifier: Apache-2.0
"""Batches of interactions: encoded tables, gathered by row in a seeded order, shard by shard where there are several.

Orders, and the batches of shards, are made with NumPy alone. Where all data are in memory, and under TensorFlow,
`tf.data` gathers the rows: no step runs Python then.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from mvke_tf.data.shared import SharedColumn, joined
from mvke_tf.schema import ITEM_ROWS, USER_ROWS, Task

Table = Mapping[str, np.ndarray]
# Of user states, whose columns may be `SharedColumn`s.
States = Mapping[str, Any]
PREFETCHED = 2


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Encoded entities, and the interactions of one part of the log: pairs of a user state and an item.

    Args:
        users: One row per user state, `{input: (N, ...)}`; indices int32, weights and dense features float32. Of large
            data, wide columns are `mvke_tf.data.shared.SharedColumn`s.
        items: One row per item, `{input: (M, ...)}`, likewise.
        user_rows: int32 `(n,)`, row of the user state of each pair.
        item_rows: int32 `(n,)`, row of the item of each pair.
        labels: `{task: (n,)}`, transformed as the task says.
        weights: `{task: (n,)}`, the weight of each pair in the loss and the metrics of a task; 0 where it does not
            count, as where it has no label. Tasks that are absent weigh every pair 1.
    """

    users: States
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

    def pieces(self) -> Iterator[Interactions]:
        """The pairs in pieces of which each fits into memory: one, as they are in memory."""
        return iter([self])


@dataclasses.dataclass(frozen=True)
class Shards:
    """Interactions that are read piece by piece: each shard has pairs and users of its own.

    Args:
        sizes: Number of pairs of each shard.
        read: Reads a shard by its number.
        per_window: Shards that are in memory, and shuffled, together.
    """

    sizes: Sequence[int]
    read: Callable[[int], Interactions]
    per_window: int

    def __len__(self) -> int:
        return int(sum(self.sizes))

    def pieces(self) -> Iterator[Interactions]:
        """The shards one after another, each read anew."""
        return (self.read(number) for number in range(len(self.sizes)))

    def map(self, change: Callable[[Interactions], Interactions]) -> Shards:
        """Shards that are changed when they are read; their numbers of pairs stay."""
        return dataclasses.replace(self, read=lambda number: change(self.read(number)))


# Pairs of a batch: those with these numbers.
_Part = tuple[Interactions, np.ndarray]
# Of an order; None is that of the pairs.
_Seed = tuple[int, int] | None


class Batches:
    """Makes the batches of one `Interactions`, or of shards of them.

    A batch is `({feature: array}, {task: (B, 1) float32})`, made by gathering whole rows. Where the data have weights,
    a third part holds those of all tasks, `{task: (B, 1) float32}`.

    The order of an epoch is a function of the seed and its number: shards are permuted and grouped into windows, and
    the pairs of a window are permuted. So any step is found by arithmetic.

    Args:
        data: Entities and pairs.
        batch_size: Pairs per batch; the last batch of an epoch may be smaller.
        deduplicate: Whether a batch holds each of its user states and items once (once per shard, where it spans two
            windows), with the inputs `user_rows` and `item_rows` `(B,)` that lead from pairs to entities (see
            `TwoTowerModel.training_model`).
        pad: With `deduplicate`, the multiple to which the number of user states and of items is filled up by rows that
            no pair refers to; 0 fills nothing. JAX and XLA compile anew for every shape, and TensorFlow on CPU
            builds a oneDNN primitive for every new one (at batch 4096, `pad=64` was measured 8 % faster).
        slices: Devices that compute a batch together. The pairs are cut into so many slices of equal size, filled up by
            pairs of weight 0; with `deduplicate`, each slice has its own user states and items, as many as the others.
        own: Those slices that are gathered here; all by default.
    """

    def __init__(
        self,
        data: Interactions | Shards,
        batch_size: int,
        deduplicate: bool = False,
        pad: int = 0,
        slices: int = 1,
        own: range | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: {batch_size}")
        if pad < 0:
            raise ValueError(f"`pad` must be 0 (no padding) or a multiple to fill up to. Received: {pad}")
        if not len(data):
            raise ValueError("Expected at least one pair to make batches of. Received: no pair")
        self.data, self.batch_size, self.deduplicate, self.pad = data, batch_size, deduplicate, pad
        self.slices, self.own = slices, range(slices) if own is None else own
        self.steps = -(-len(data) // batch_size)
        self._shards = Shards([len(data)], lambda number: data, 1) if isinstance(data, Interactions) else data
        self._whole = _Window.of([data], deduplicate) if isinstance(data, Interactions) else None

    def in_order(self) -> Any:
        """One epoch in the order of the pairs, of known length."""
        return self._dataset(None)

    def shuffled(self, seed: int) -> Any:
        """One epoch in a new seeded order each time it is iterated, of known length: for `model.fit` by hand."""
        number = itertools.count()
        return self._dataset(lambda: (seed, next(number)))

    def epoch(self, seed: int, number: int, start: int = 0) -> Any:
        """One epoch whose order depends on the seed and its number alone, from a step on: what resuming needs.

        Returns:
            A `tf.data.Dataset` under TensorFlow, else a `keras.utils.PyDataset`.
        """
        return self._dataset((seed, number), start)

    def arrays(self, seed: int, number: int, start: int = 0) -> Iterator[tuple[dict[str, Any], ...]]:
        """The same as NumPy arrays."""
        return self._batches((seed, number), start)

    def _dataset(self, seed: _Seed | Callable[[], _Seed], start: int = 0) -> Any:
        """An epoch in the order of a seed, or of that which each iteration asks for."""
        asked = seed if callable(seed) else lambda: seed
        if keras.backend.backend() != "tensorflow":
            return _Epoch(lambda step: self._batches(asked(), start + step), self.steps - start)
        import tensorflow as tf

        with tf.device("CPU"):
            if self._whole:
                dataset = self._gathered(self._whole, seed, start)
            else:
                dataset = _tf_dataset(lambda: self._batches(asked(), start), self._example)
            dataset = dataset.apply(tf.data.experimental.assert_cardinality(self.steps - start))
        return without_autotuning(dataset.prefetch(PREFETCHED))

    def _gathered(self, whole: _Window, seed: _Seed | Callable[[], _Seed], start: int) -> Any:
        """The same batches as `_batches`, gathered by TensorFlow: a third of NumPy's time at batch 256."""
        import tensorflow as tf

        users, items, user_rows, item_rows, *by_task = whole.tensors

        def batch(order: Any, step: Any) -> tuple[dict[str, Any], ...]:
            pairs = order[step * self.batch_size : (step + 1) * self.batch_size]
            inputs: dict[str, Any] = {}
            for table, rows, name in ((users, user_rows, USER_ROWS), (items, item_rows, ITEM_ROWS)):
                found = tf.gather(rows, pairs)
                if self.deduplicate:
                    found, inputs[name] = tf.unique(found)
                    if self.pad:
                        found = tf.pad(found, [[0, -tf.shape(found)[0] % self.pad]])
                inputs |= {column: tf.gather(values, found) for column, values in table.items()}
            return inputs, *({task: tf.gather(column, pairs) for task, column in one.items()} for one in by_task)

        if callable(seed):
            orders = tf.data.Dataset.from_generator(
                lambda: [whole.permuted(seed())], output_signature=tf.TensorSpec((None,), tf.int32)
            )
        else:
            # TensorFlow never lets go of a generator, nor of the data that it knows.
            orders = tf.data.Dataset.from_tensors(tf.constant(whole.permuted(seed), tf.int32))
        return orders.flat_map(
            lambda order: tf.data.Dataset.range(start, self.steps, output_type=tf.int32).map(
                lambda step: batch(order, step), num_parallel_calls=PREFETCHED, deterministic=True
            )
        )

    @functools.cached_property
    def _example(self) -> tuple[dict[str, Any], ...]:
        largest = int(np.argmax(self._shards.sizes))
        return self._batch([(self._shards.read(largest), np.arange(1))])

    def _windows(self, seed: _Seed, skipped: int) -> Iterator[tuple[_Window, np.ndarray]]:
        """Windows of an epoch and the order of their pairs, without the first pairs."""
        sizes, per_window = np.asarray(self._shards.sizes), self._shards.per_window
        order = np.arange(len(sizes))
        if seed is not None and len(sizes) > 1:
            order = np.random.default_rng(seed).permutation(len(sizes))
        for number, begin in enumerate(range(0, len(sizes), per_window)):
            shards = order[begin : begin + per_window]
            pairs = int(sizes[shards].sum())
            if skipped >= pairs:
                skipped -= pairs
                continue
            window = self._whole or _Window.of([self._shards.read(one) for one in shards], self.deduplicate)
            if len(sizes) == 1:
                pair_order = window.permuted(seed)
            elif seed is None:
                pair_order = np.arange(pairs)
            else:
                pair_order = window.order(np.random.default_rng([*seed, number]).permutation)
            yield window, pair_order[skipped:]
            skipped = 0

    def _batches(self, seed: _Seed, start: int) -> Iterator[tuple[dict[str, Any], ...]]:
        parts: list[_Part] = []
        missing = self.batch_size
        for window, order in self._windows(seed, start * self.batch_size):
            while len(order):
                parts.append((window.data, order[:missing]))
                order = order[missing:]
                missing -= len(parts[-1][1])
                if not missing:
                    yield self._batch(parts)
                    parts, missing = [], self.batch_size
        if parts:
            yield self._batch(parts)

    def _batch(self, parts: Sequence[_Part]) -> tuple[dict[str, Any], ...]:
        pairs = sum(len(chosen) for _, chosen in parts)
        every = _cut(parts, self.slices)
        own = [part for number in self.own for part in every[number]]
        inputs: dict[str, np.ndarray] = {}
        for side, name in (("user", USER_ROWS), ("item", ITEM_ROWS)):
            rows = [taken(getattr(data, f"{side}_rows"), chosen) for data, chosen in own]
            if self.deduplicate:
                rows, inputs[name] = self._distinct_rows(every, side)
            # Each column would convert them again.
            rows = [one.astype(np.intp) for one in rows]
            tables = [getattr(data, f"{side}s") for data, _ in own]
            inputs |= {
                column: joined([taken(table[column], one) for table, one in zip(tables, rows, strict=True)])
                for column in tables[0]
            }
        labels = {
            task: _column([taken(data.labels[task], chosen) for data, chosen in own]) for task in own[0][0].labels
        }
        if not own[0][0].weights and self.slices == 1:
            return inputs, labels
        ones = np.ones(self.batch_size, np.float32)
        weights = {
            task: _column(
                [
                    taken(data.weights[task], chosen) if task in data.weights else ones[: len(chosen)]
                    for data, chosen in own
                ]
            )
            for task in labels
        }
        height = -(-pairs // self.slices)
        for column in weights.values():
            column[max(pairs - self.own.start * height, 0) :] = 0
        return inputs, labels, weights

    def _distinct_rows(self, every: Sequence[Sequence[_Part]], side: str) -> tuple[list[np.ndarray], np.ndarray]:
        """Rows of entities of each part of the own slices, and of each pair its place in all slices' rows."""
        found = [[_distinct(getattr(data, f"{side}_rows")[chosen]) for data, chosen in parts] for parts in every]
        height = max(sum(len(rows) for _, rows in parts) for parts in found)
        if self.pad:
            height += -height % self.pad
        rows: list[np.ndarray] = []
        places: list[np.ndarray] = []
        for number in self.own:
            begin = number * height
            for codes, one in found[number]:
                places.append(codes + begin)
                rows.append(one)
                begin += len(one)
            fill = np.zeros((number + 1) * height - begin, rows[-1].dtype)
            rows[-1] = np.concatenate([rows[-1], fill])
        return rows, joined(places).astype(np.int32)


def _cut(parts: Sequence[_Part], slices: int) -> list[list[_Part]]:
    """The pairs of a batch in slices of equal size; the last pair fills up what is missing."""
    if slices == 1:
        return [list(parts)]
    data, chosen = parts[-1]
    missing = -sum(len(some) for _, some in parts) % slices
    rest = [*parts[:-1], (data, np.concatenate([chosen, np.repeat(chosen[-1:], missing)]))]
    size = sum(len(some) for _, some in rest) // slices
    cut: list[list[_Part]] = []
    for _ in range(slices):
        cut.append([])
        missing = size
        while missing:
            data, chosen = rest.pop(0)
            cut[-1].append((data, chosen[:missing]))
            if len(chosen) > missing:
                rest.insert(0, (data, chosen[missing:]))
            missing -= len(cut[-1][-1][1])
    return cut


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the distinct rows each is, and those, in the order of their first appearance."""
    values, first, codes = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[codes], values[order]


def taken(column: np.ndarray | SharedColumn, rows: np.ndarray) -> np.ndarray:
    """`column[rows]`, in a third of the time where a row is a list, or rows are int32."""
    return column.take(rows) if isinstance(column, SharedColumn) else np.asarray(column).take(rows, axis=0)


def _column(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return joined(arrays).astype(np.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class _Window:
    """Pairs that are shuffled together.

    Args:
        data: The pairs.
        by_user: With `deduplicate`, the pairs in the order of user rows.
        start, count: Where the pairs of each user state are in it.
    """

    data: Interactions
    by_user: np.ndarray | None = None
    start: np.ndarray | None = None
    count: np.ndarray | None = None

    @classmethod
    def of(cls, shards: Sequence[Interactions], deduplicate: bool) -> _Window:
        data = _together(shards)
        if not deduplicate:
            return cls(data)
        by_user = np.argsort(data.user_rows, kind="stable")
        _, start, count = np.unique(np.asarray(data.user_rows)[by_user], return_index=True, return_counts=True)
        return cls(data, by_user, start, count)

    def order(self, shuffle: Callable[[int], np.ndarray]) -> np.ndarray:
        """A permutation of the pairs; with `deduplicate`, of the user states, whose pairs stay together."""
        if self.by_user is None or self.start is None or self.count is None:
            return shuffle(len(self.data))
        states = shuffle(len(self.start))
        start, count = self.start[states], self.count[states]
        offset = np.arange(len(self.data)) - np.repeat(np.cumsum(count) - count, count)
        return self.by_user[np.repeat(start, count) + offset]

    def permuted(self, seed: _Seed) -> np.ndarray:
        """The order of the pairs where the window is the whole epoch."""
        return np.arange(len(self.data)) if seed is None else self.order(lambda count: permutation(count, seed))

    @functools.cached_property
    def tensors(self) -> tuple[Any, ...]:
        """Users, items, the rows of each pair in them, labels and, where there are any, weights."""
        import tensorflow as tf

        data, ones = self.data, np.ones(len(self.data), np.float32)
        weights = {task: data.weights.get(task, ones) for task in data.labels} if data.weights else {}
        return (
            *(
                {name: tf.constant(np.asarray(column)) for name, column in table.items()}
                for table in (data.users, data.items)
            ),
            *(tf.constant(rows, tf.int32) for rows in (data.user_rows, data.item_rows)),
            *(
                {task: tf.constant(column[:, None], tf.float32) for task, column in columns.items()}
                for columns in (data.labels, weights)
                if columns
            ),
        )


def _together(shards: Sequence[Interactions]) -> Interactions:
    """One `Interactions` of several, whose items are the same."""
    first = shards[0]
    # Columns in files are read once.
    users = {name: joined([shard.users[name] for shard in shards]) for name in first.users}
    items = {name: np.asarray(column) for name, column in first.items.items()}
    begins = np.concatenate([[0], np.cumsum([_rows(shard.users) for shard in shards])])
    ones = [np.ones(len(shard), np.float32) for shard in shards]
    weighted = {task for shard in shards for task in shard.weights}
    return Interactions(
        users,
        items,
        joined([np.asarray(shard.user_rows) + begin for shard, begin in zip(shards, begins, strict=False)]),
        joined([np.asarray(shard.item_rows) for shard in shards]),
        {task: joined([np.asarray(shard.labels[task]) for shard in shards]) for task in first.labels},
        {
            task: joined([shard.weights.get(task, one) for shard, one in zip(shards, ones, strict=True)])
            for task in first.labels
            if task in weighted
        },
    )


def _rows(table: States) -> int:
    return len(next(iter(table.values()))) if table else 0


class _Epoch(keras.utils.PyDataset):
    """An epoch as backends other than TensorFlow read it."""

    def __init__(self, batches: Callable[[int], Iterator[Any]], steps: int) -> None:
        super().__init__()
        self._make, self._steps = batches, steps
        self._batches: Iterator[Any] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Any:
        if index != self._next:
            self._batches = self._make(index)
        self._next = index + 1
        return next(self._batches)

    def cardinality(self) -> int:
        """As of a `tf.data.Dataset`."""
        return self._steps

    def as_numpy_iterator(self) -> Iterator[Any]:
        """As of a `tf.data.Dataset`."""
        return self._make(0)


def _tf_dataset(batches: Callable[[], Iterator[Any]], example: Any) -> Any:
    """Batches with the structure, types and row shapes of an example, as a `tf.data.Dataset`.

    An array costs as much on its way from Python to TensorFlow as a batch of 256 does in NumPy, so that all arrays of a
    type go as one.
    """
    import tensorflow as tf

    arrays = keras.tree.flatten(example)
    widths = np.array([math.prod(array.shape[1:]) for array in arrays], np.int32)
    places: dict[np.dtype, list[int]] = {}
    for place, array in enumerate(arrays):
        places.setdefault(array.dtype, []).append(place)

    def packed() -> Iterator[Any]:
        for batch in batches():
            parts = keras.tree.flatten(batch)
            flat = (np.concatenate([parts[place].ravel() for place in found]) for found in places.values())
            yield np.array([len(part) for part in parts], np.int32) * widths, *flat

    def unpacked(sizes: Any, *flat: Any) -> Any:
        parts: dict[int, Any] = {}
        for found, one in zip(places.values(), flat, strict=True):
            pieces = tf.split(one, tf.gather(sizes, found), num=len(found))
            parts |= {
                place: tf.reshape(piece, (-1, *arrays[place].shape[1:]))
                for place, piece in zip(found, pieces, strict=True)
            }
        return keras.tree.pack_sequence_as(example, [parts[place] for place in range(len(arrays))])

    signature = tuple(tf.TensorSpec((None,), dtype) for dtype in (np.int32, *places))
    # In the pool of the training step, a batch would wait for the step's operations, and they for Python.
    options = tf.data.Options()
    options.threading.private_threadpool_size = PREFETCHED
    return tf.data.Dataset.from_generator(packed, output_signature=signature).map(unpacked).with_options(options)


def without_autotuning(dataset: Any) -> Any:
    """The same `tf.data` pipeline, which ends when its data do.

    The autotuner sleeps between two looks at a pipeline, twice as long each time, up to 41 s. Whoever drops an
    iterator, as `fit` does after every epoch, waits until it wakes up.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


# The permutation of `tf.random.experimental.stateless_shuffle`, which all versions have used, without TensorFlow:
# Philox-4x32-10 (Salmon et al., SC 2011) keyed by the seed, and the shuffle of Fisher and Yates.
_LOW, _SHIFT = np.uint64(2**32 - 1), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_SCRAMBLE = 0x3EC8F720, 0x02461E29


def permutation(count: int, seed: tuple[int, int]) -> np.ndarray:
    """A permutation of `range(count)`, `(count,)`, a function of two seeds of 64 bits."""
    mixed = _philox([np.array([half], np.uint64) for word in seed for half in (word % 2**32, word >> 32)], _SCRAMBLE)
    first_key, second_key, *high = (int(word[0]) for word in mixed)
    block = np.arange(-(-count // 4), dtype=np.uint64)
    words = _philox(
        [block & _LOW, block >> _SHIFT, *(np.full(len(block), word, np.uint64) for word in high)],
        (first_key, second_key),
    )
    left = np.arange(count, 0, -1, dtype=np.uint64)
    partner = np.arange(count) + (np.stack(words, axis=1).reshape(-1)[:count] % left).astype(np.int64)
    order = list(range(count))
    for place, other in enumerate(partner.tolist()):
        order[place], order[other] = order[other], order[place]
    return np.array(order, np.int64)


def _philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Four words of 32 bits for each counter of four words."""
    words = list(counter)
    for _ in range(10):
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (second >> _SHIFT) ^ words[1] ^ np.uint64(key[0]),
            second & _LOW,
            (first >> _SHIFT) ^ words[3] ^ np.uint64(key[1]),
            first & _LOW,
        ]
        key = (key[0] + _WEYL[0]) % 2**32, (key[1] + _WEYL[1]) % 2**32
    return words
