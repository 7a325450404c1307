# SPDX-License-Identifier: Apache-2.0
"""Profiles of users: the items, or the groups of items, that a task rates highest for each.

Scoring is exact, of every pair of a user and an item, by products of the vectors of the two towers
(`mvke_tf.inference.topk`), unless a vector index is to find the items. The vectors of the items are computed once;
users pass in blocks whose size follows from a bound of memory, and no result depends on that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from keras import ops

from mvke_tf.data.groups import Grouping
from mvke_tf.errors import ConfigError
from mvke_tf.inference.index import VectorIndex
from mvke_tf.inference.topk import TILE_USERS, Best, ItemTiles
from mvke_tf.inference.vectors import Vectors, slices, vectors_of
from mvke_tf.models import TwoTowerModel
from mvke_tf.serving.profiles.entities import BY_ITEM, Candidates, Users

Frames = dict[str, pd.DataFrame]
Indexes = Mapping[str, VectorIndex]
# The best columns of each user, best first: outputs of the task, minus infinity where there is none, and columns.
Found = tuple[np.ndarray, np.ndarray]

TOP = 20
MEMORY_MB = 512
# The score of a group is the mean over this many items.
GROUP_ITEMS = 10
EFFORT = 64
GROUP_SEPARATOR = "|"
_MB = 2**20
# Working memory of a step, measured with benchmarks/profile_users.py and rounded up: what the towers need for a batch,
# tables of a tile beside one per task, and what a row of a result takes as a frame and while it is written to a file.
_TOWERS_MB = 48
_TILE_TABLES = 12
_ROW_BYTES = 400
# More users at a time are not faster; they would only be longer without a sign of progress.
_MOST_STEPS = 16
# Most that the item vectors of a step's best items may take while the kernel of each is looked for.
_GATHERED_BYTES = 8 * _MB


class Profiler:
    """Makes profiles with one model and one set of items.

    Args:
        model: A built or loaded two-tower model.
        candidates: The items.
        tasks: Names of the tasks; all of the model that rank items by default.

    Raises:
        ConfigError: If the model has no such task, or it is a multi-class task.
        DataError: If the items lack a feature that it reads.
    """

    def __init__(self, model: TwoTowerModel, candidates: Candidates, tasks: Sequence[str] | None = None) -> None:
        self.tasks = tuple(model.ranked_tasks if tasks is None else tasks)
        model.check_ranked(self.tasks)
        # Only what these tasks need is computed.
        self.model = model.for_tasks(self.tasks)
        self.candidates = candidates
        self._kernels = {task: self.model.kernels_of(task) for task in self.tasks}
        self.refresh()
        self._names = None if candidates.names is None else pd.factorize(np.asarray(candidates.names, object))
        self._shown = {name: pd.factorize(_labels(candidates.grouping(name))) for name in candidates.shown}

    def refresh(self) -> None:
        """Computes the vectors of the items anew, as after a change of the model's weights."""
        self._items = ItemTiles(vectors_of(self.model.item_tower, self.candidates.table))

    @property
    def item_vectors(self) -> Vectors:
        """The vectors of the items, `{task: (M, W_task)}`."""
        return self._items.vectors

    def user_vectors(self, table: Mapping[str, np.ndarray], rows: slice | np.ndarray = slice(None)) -> Vectors:
        """The vectors of rows of an encoded table of users, `{task: (n, W_task)}`."""
        table = {name: table[name][rows] for name in self.model.user_tower.input}
        return vectors_of(self.model.user_tower, table, batch=TILE_USERS)

    def profiles(self, users: Users, **options: Any) -> Frames:
        """The profiles of all users at once, `{task: frame}`; arguments as of `blocks`."""
        blocks = list(self.blocks(users, **options))
        return {task: pd.concat([block[task] for block in blocks], ignore_index=True) for task in self.tasks}

    def blocks(
        self,
        users: Users,
        top: int = TOP,
        by: str = BY_ITEM,
        memory_mb: int = MEMORY_MB,
        group_items: int = GROUP_ITEMS,
        indexes: Indexes | None = None,
        effort: int = EFFORT,
    ) -> Iterator[Frames]:
        """Profiles of consecutive users, as many at a time as the memory allows.

        Items are ranked by the model's output; of equal ones, the first comes first. The score of a group is the mean
        prediction over the user's `group_items` best candidates in it (over all, where it has fewer): what to expect of
        a user who is shown the best that the group has for them.

        Args:
            users: The users, at least one.
            top: Ranks per user; one with fewer candidates gets fewer.
            by: `"item"`, or the name of a grouping of the candidates.
            memory_mb: Bound of the working memory in MiB: what is held at a time beside the model, the vectors of the
                items and the tables of the users, the yielded frames and their writing to a file included (not
                what a caller keeps of them, as `profiles` does).
            group_items: How many items the score of a group is the mean of.
            indexes: A vector index of every task, to find items instead of exact scoring.
            effort: See `mvke_tf.inference.index.VectorIndex.search`.

        Yields:
            Per task a frame with `user` (id) and `rank` (from 1); then `item` (id), `item_name` if there are names, and
            the groups of the item in each grouping that is shown (joined by `"|"`), or the group and `items` (how many
            its score is the mean of); then `probability`, or `value` of a regression task. By item, `kernel` is the
            virtual kernel whose part of the logit is the largest (the logit is a sum over kernels of gate weight times
            inner product of expert output and tag; of a task that comes after another event it is the logit given
            that event); it is null in models without virtual kernels. Of data without items there is one row per user,
            and no column of the item.

        Raises:
            ConfigError: If an argument is out of range, or the memory is too little for one step.
            ValueError: If `seen` names rows of no item.
        """
        grouping = None if by == BY_ITEM else self.candidates.grouping(by)
        for name, value in (("top", top), ("group_items", group_items), ("effort", effort)):
            if value < 1:
                raise ConfigError(f"`{name}` must be at least 1. Received: {value}")
        if len(users.seen) and not 0 <= users.seen[:, 1].min() <= users.seen[:, 1].max() < self._items.count:
            raise ValueError(
                f"`seen` must name rows of the candidates, which are {self._items.count} items. "
                f"Received: rows {users.seen[:, 1].min()} to {users.seen[:, 1].max()}"
            )
        if indexes:
            self._check_indexes(indexes, by)
        size = self.users_per_block(top, by, memory_mb, group_items)
        return self._blocks(users, size, top, grouping, group_items, indexes, effort)

    def _blocks(
        self,
        users: Users,
        size: int,
        top: int,
        grouping: Grouping | None,
        group_items: int,
        indexes: Indexes | None,
        effort: int,
    ) -> Iterator[Frames]:
        for block in slices(len(users), size):
            steps = []
            for rows in slices(block.stop - block.start, TILE_USERS):
                step = users.part(slice(block.start + rows.start, block.start + rows.stop))
                vectors, seen = self.user_vectors(step.table), step.seen
                if grouping is not None:
                    steps.append(self._best_groups(vectors, seen, top, grouping, group_items))
                    continue
                found = self._search(vectors, seen, top, indexes, effort) if indexes else self._best(vectors, seen, top)
                steps.append({task: (*found[task], self._kernel(task, vectors, found[task])) for task in self.tasks})
            results = {
                task: [np.concatenate(parts) for parts in zip(*(step[task] for step in steps), strict=True)]
                for task in self.tasks
            }
            users.give_back()
            ids = users.ids[block]
            if grouping is None:
                yield {task: self._item_frame(task, ids, *results[task]) for task in self.tasks}
            else:
                yield {task: self._group_frame(task, grouping, ids, *results[task]) for task in self.tasks}

    def users_per_block(self, top: int, by: str, memory_mb: int, group_items: int = GROUP_ITEMS) -> int:
        """How many users at a time `blocks` takes under a bound of memory, a multiple of `TILE_USERS`.

        Raises:
            ConfigError: If not even one step fits.
        """
        tables = len(self.model.task_names) + _TILE_TABLES
        fixed = _TOWERS_MB * _MB + TILE_USERS * self._items.width * 4 * tables + 3 * _GATHERED_BYTES
        if by == BY_ITEM:
            rows = min(top, self._items.count)
        else:
            groups = len(self.candidates.grouping(by).groups)
            rows = min(top, groups)
            fixed += TILE_USERS * groups * group_items * 16 * len(self.tasks)
        step = TILE_USERS * max(rows, 1) * len(self.tasks) * _ROW_BYTES
        steps = (memory_mb * _MB - fixed) // step
        if steps < 1:
            raise ConfigError(
                f"{-(-(fixed + step) // _MB)} MiB of memory are needed for the top {top} of {self._items.count} items "
                f"for tasks {self.tasks}; give as much, or ask for fewer ranks or tasks. Received: {memory_mb}"
            )
        return min(steps, _MOST_STEPS) * TILE_USERS

    def _scored(self, vectors: Vectors, seen: np.ndarray) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Outputs of all candidates, tile by tile; minus infinity where a user has seen the item."""
        for rows, outputs in self._items.outputs(self.model, vectors):
            width = rows.stop - rows.start
            outputs = {task: outputs[task][:, :width] for task in self.tasks}
            here = seen[(seen[:, 1] >= rows.start) & (seen[:, 1] < rows.stop)]
            if len(here):
                blocked = np.zeros((TILE_USERS, width), bool)
                blocked[here[:, 0], here[:, 1] - rows.start] = True
                outputs = {task: ops.where(blocked, -np.inf, output) for task, output in outputs.items()}
            yield rows, outputs

    def _best(self, vectors: Vectors, seen: np.ndarray, top: int) -> dict[str, Found]:
        best = {task: Best(top) for task in self.tasks}
        for rows, outputs in self._scored(vectors, seen):
            for task, output in outputs.items():
                best[task].add(output, np.arange(rows.start, rows.stop))
        return {task: best[task].result(len(vectors[task])) for task in self.tasks}

    def _search(self, vectors: Vectors, seen: np.ndarray, top: int, indexes: Indexes, effort: int) -> dict[str, Found]:
        # Whoever has seen n items finds `top` others among the first n + top.
        most_seen = int(np.bincount(seen[:, 0]).max()) if len(seen) else 0
        products, columns = {}, {}
        for task in self.tasks:
            count = min(top + most_seen, self._items.count)
            values, found = indexes[task].search(vectors[task], count, effort)
            pairs = found + self._items.count * np.arange(len(found))[:, None]
            missing = (found < 0) | np.isin(pairs, seen[:, 1] + self._items.count * seen[:, 0])
            kept = np.argsort(missing, axis=1, kind="stable")[:, :top]
            missing, found = (np.take_along_axis(each, kept, axis=1) for each in (missing, found))
            # An index tells products less exactly than the items.
            values = np.where(missing, -np.inf, self._parts(task, vectors[task], found, 1)[..., 0])
            order = np.lexsort((found, -values), axis=1)
            products[task] = np.take_along_axis(values, order, axis=1)
            columns[task] = np.take_along_axis(found, order, axis=1)
        outputs = self.model.outputs_of_products(products)
        return {task: (ops.convert_to_numpy(outputs[task]), columns[task]) for task in self.tasks}

    def _parts(self, task: str, users: np.ndarray, columns: np.ndarray, count: int) -> np.ndarray:
        """Inner products of users `(n, W)` with their own items `(n, k)`, in `count` equal parts: `(n, k, count)`."""
        items = self.item_vectors[task]
        width = items.shape[1]
        parts = np.empty((*columns.shape, count), np.float32)
        for some in slices(len(users), max(1, _GATHERED_BYTES // (4 * width * columns.shape[1]))):
            products = items[columns[some]] * users[some][:, None, :]
            parts[some] = products.reshape(*products.shape[:2], count, width // count).sum(axis=-1)
        return parts

    def _check_indexes(self, indexes: Indexes, by: str) -> None:
        if set(indexes) != set(self.tasks):
            raise ValueError(f"Expected an index of each of the tasks {self.tasks}. Received: {sorted(indexes)}")
        check_indexable(self.model, self.candidates, self.tasks, by)
        for task, index in indexes.items():
            if len(index) != self._items.count:
                raise ValueError(
                    f"The index of {task!r} must hold the {self._items.count} items. Received: {len(index)}"
                )

    def _best_groups(
        self, vectors: Vectors, seen: np.ndarray, top: int, grouping: Grouping, most: int
    ) -> dict[str, tuple]:
        """Per task, of the best groups of each user: scores (NaN where no item is left), groups, numbers of items."""
        members = [np.flatnonzero(inside).astype(np.int32) for inside in grouping.members.T]
        filled = [group for group, inside in enumerate(members) if len(inside)]
        best = {(task, group): Best(most) for task in self.tasks for group in filled}
        for rows, outputs in self._scored(vectors, seen):
            for group, inside in enumerate(members):
                here = inside[slice(*np.searchsorted(inside, [rows.start, rows.stop]))]
                if len(here):
                    for task, output in outputs.items():
                        best[task, group].add(ops.take(output, here - rows.start, axis=1), here)
        found = {}
        for task in self.tasks:
            count = np.zeros((len(vectors[task]), len(members)), np.int32)
            score = np.full(count.shape, np.nan)
            for group in filled:
                values, _ = best[task, group].result(len(score))
                left = np.isfinite(values)
                count[:, group] = left.sum(axis=1)
                sums = np.where(left, self._predicted(task, values), 0).sum(axis=1, dtype=np.float64)
                np.divide(sums, count[:, group], out=score[:, group], where=count[:, group] > 0)
            # Sorted as float32, in which they are put out: rounding must not hide a tie, nor make one.
            score = score.astype(np.float32)
            order = np.argsort(-score, axis=1, kind="stable")[:, :top]
            found[task] = (np.take_along_axis(score, order, axis=1), order, np.take_along_axis(count, order, axis=1))
        return found

    def _predicted(self, task: str, outputs: np.ndarray) -> np.ndarray:
        return ops.convert_to_numpy(self.model.predictions({task: ops.convert_to_tensor(outputs)})[task])

    def _kernel(self, task: str, vectors: Vectors, found: Found) -> np.ndarray:
        """The virtual kernel with the largest part in each inner product, -1 in models without."""
        columns, kernels = found[1], self._kernels[task]
        if not kernels:
            return np.full(columns.shape, -1, np.int16)
        parts = self._parts(task, vectors[task], columns, len(kernels))
        # A gate may leave kernels out altogether: they have no part, not one of 0.
        of_kernels = self.item_vectors[task].reshape(self._items.count, len(kernels), -1)
        parts[(of_kernels == 0).all(axis=-1)[columns]] = -np.inf
        return np.asarray(kernels, np.int16)[parts.argmax(axis=-1)]

    def _score_name(self, task: str) -> str:
        return "probability" if self.model.kinds[task] == "binary" else "value"

    def _item_frame(
        self, task: str, ids: np.ndarray, outputs: np.ndarray, columns: np.ndarray, kernels: np.ndarray
    ) -> pd.DataFrame:
        user, rank = np.nonzero(np.isfinite(outputs))
        column, kernel = columns[user, rank], kernels[user, rank]
        score = {
            self._score_name(task): self._predicted(task, outputs[user, rank]),
            "kernel": pd.arrays.IntegerArray(kernel, kernel < 0),
        }
        frame: dict[str, Any] = {"user": ids[user], "rank": (rank + 1).astype(np.int32)}
        if self.candidates.ids is not None:
            frame["item"] = self.candidates.ids[column]
        if self._names is not None:
            frame["item_name"] = pd.Categorical.from_codes(self._names[0][column], self._names[1])
        for name, (codes, groups) in self._shown.items():
            frame[_free(name, {*frame, *score})] = pd.Categorical.from_codes(codes[column], groups)
        return pd.DataFrame(frame | score)

    def _group_frame(
        self, task: str, grouping: Grouping, ids: np.ndarray, score: np.ndarray, groups: np.ndarray, counts: np.ndarray
    ) -> pd.DataFrame:
        user, rank = np.nonzero(np.isfinite(score))
        name = self._score_name(task)
        return pd.DataFrame(
            {
                "user": ids[user],
                "rank": (rank + 1).astype(np.int32),
                _free(grouping.variable, {"user", "rank", "items", name}): pd.Categorical.from_codes(
                    groups[user, rank], list(grouping.groups)
                ),
                "items": counts[user, rank],
                name: score[user, rank],
            }
        )


def check_indexable(model: TwoTowerModel, candidates: Candidates, tasks: Sequence[str], by: str) -> None:
    """Does nothing if an index, which looks for the largest inner products, can answer what is asked.

    Raises:
        ConfigError: If it cannot.
    """
    if by != BY_ITEM:
        raise ConfigError(f"A vector index finds items; groups are scored exactly, without one. Received: by={by!r}")
    if candidates.ids is None:
        raise ConfigError("A vector index finds items. Received: data without features of items")
    joint = {task: model.given[task] for task in tasks if task in model.given}
    if joint:
        raise ConfigError(
            "A vector index finds the largest inner products, but these tasks multiply two probabilities, their own "
            f"and that of the event before: score them exactly, without an index. Received: {joint}"
        )


def _labels(grouping: Grouping) -> np.ndarray:
    """The groups of each item in one text, `(M,)`."""
    names = np.asarray(grouping.groups, object)
    labels = np.empty(len(grouping.members), object)
    labels[:] = [GROUP_SEPARATOR.join(names[inside]) for inside in grouping.members]
    return labels


def _free(name: str, taken: set[str]) -> str:
    """A name for a column that no other has."""
    while name in taken:
        name += "_group"
    return name
