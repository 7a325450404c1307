"""Profiles of users: the items, or the genres, that each is most likely to click, to convert on, to rate high.

Scoring is exact, of every pair of a user and an item, by products of the two towers' vectors (`mvke_tf.exact`), unless
a vector index is to find the items. The catalogue's vectors are computed once; users pass in blocks whose size follows
from a bound of memory, and no result depends on that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import ops

from mvke_tf.data.entities import Catalogue, Users
from mvke_tf.exact import TILE_USERS, Best, ItemTiles, Vectors, model_of_tasks, slices, vectors_of
from mvke_tf.layers import VirtualKernelGate
from mvke_tf.models.two_tower import (
    conditional_tasks,
    outputs_of_products,
    predictions,
    task_kinds,
    task_names,
    tower,
)
from mvke_tf.vector_index import VectorIndex

Frames = dict[str, pd.DataFrame]
Indexes = Mapping[str, VectorIndex]
# The best columns of each user, best first: outputs of the task, minus infinity where there is none, and columns.
Found = tuple[np.ndarray, np.ndarray]

BY = ("item", "genre")
TOP = 20
MEMORY_MB = 512
# The score of a genre is the mean over this many items.
GENRE_ITEMS = 10
EFFORT = 64
GENRE_SEPARATOR = "|"
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
    """Makes profiles with one model and one catalogue.

    Args:
        model: A built or loaded two-tower model.
        catalogue: The items.
        tasks: Names of the tasks; all of the model by default.

    Raises:
        ValueError: If the model has no such task, or the catalogue lacks a feature that it reads.
    """

    def __init__(self, model: keras.Model, catalogue: Catalogue, tasks: Sequence[str] | None = None) -> None:
        self.tasks = tuple(task_names(model) if tasks is None else tasks)
        # Only what these tasks need is computed.
        self.model = model_of_tasks(model, self.tasks)
        self.catalogue = catalogue
        self._kinds = task_kinds(self.model)
        self._kernels = {task: _kernels(self.model, task) for task in self.tasks}
        self._user_tower = tower(self.model, "user")
        self._item_tower = tower(self.model, "item")
        self.refresh()
        genres = pd.Series(list(catalogue.genres), dtype=object)
        self._titles = pd.factorize(np.asarray(catalogue.titles, object))
        self._genres = pd.factorize(genres.map(GENRE_SEPARATOR.join).to_numpy(object))
        members = genres.explode().dropna()
        # In the order in which the catalogue first names them.
        self._members = {name: rows.index.to_numpy(np.int32) for name, rows in members.groupby(members, sort=False)}

    def refresh(self) -> None:
        """Computes the vectors of the catalogue anew, as after a change of the model's weights."""
        self._items = ItemTiles(vectors_of(self._item_tower, self.catalogue.table))

    @property
    def item_vectors(self) -> Vectors:
        """The vectors of the catalogue, `{task: (M, W_task)}`."""
        return self._items.vectors

    def user_vectors(self, table: Mapping[str, np.ndarray]) -> Vectors:
        """The vectors of encoded users, `{task: (n, W_task)}`."""
        return vectors_of(self._user_tower, table)

    def profiles(self, users: Users, **options: Any) -> Frames:
        """The profiles of all users at once, `{task: frame}`; arguments as of `blocks`."""
        blocks = list(self.blocks(users, **options))
        return {task: pd.concat([block[task] for block in blocks], ignore_index=True) for task in self.tasks}

    def blocks(
        self,
        users: Users,
        top: int = TOP,
        by: str = "item",
        memory_mb: int = MEMORY_MB,
        genre_items: int = GENRE_ITEMS,
        indexes: Indexes | None = None,
        effort: int = EFFORT,
    ) -> Iterator[Frames]:
        """Profiles of consecutive users, as many at a time as the memory allows.

        Items are ranked by the model's output; of equal ones, the earlier of the catalogue comes first. The score of a
        genre is the mean prediction over the user's `genre_items` best candidates of that genre (over all, where it
        has fewer): what to expect of him where he is shown the best that the genre has for him.

        Args:
            users: The users, at least one.
            top: Ranks per user; one with fewer candidates gets fewer.
            by: `"item"` or `"genre"`.
            memory_mb: Bound of the working memory in MiB: what is held at a time beside the model, the vectors of the
                catalogue and the tables of the users, the yielded frames and their writing to a file included (not
                what a caller keeps of them, as `profiles` does).
            genre_items: How many items the score of a genre is the mean of.
            indexes: A vector index of every task, to find items instead of exact scoring.
            effort: See `mvke_tf.vector_index.VectorIndex.search`.

        Yields:
            Per task a frame with `user` (id) and `rank` (from 1); then `item` (id), `title` and `genres` (joined by
            `"|"`), or `genre` and `items` (how many its score is the mean of); then `probability`, or `value` of a
            regression task. By item, `kernel` is the virtual kernel whose part of the logit is the largest (the logit
            is a sum over kernels of gate weight times inner product of expert output and tag; of a task that comes
            after another event it is the logit given that event); it is null in models without virtual kernels.

        Raises:
            ValueError: If an argument is out of range, or the memory is too little for one step.
        """
        if by not in BY:
            raise ValueError(f"`by` must be one of {BY}. Received: {by!r}")
        for name, value in (("top", top), ("genre_items", genre_items), ("effort", effort)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {value}")
        if len(users.seen) and not 0 <= users.seen[:, 1].min() <= users.seen[:, 1].max() < self._items.count:
            raise ValueError(
                f"`seen` must name rows of the catalogue, which has {self._items.count} items. "
                f"Received: rows {users.seen[:, 1].min()} to {users.seen[:, 1].max()}"
            )
        if indexes:
            self._check_indexes(indexes, by)
        size = self.users_per_block(top, by, memory_mb, genre_items)
        return self._blocks(users, size, top, by, genre_items, indexes, effort)

    def _blocks(
        self, users: Users, size: int, top: int, by: str, genre_items: int, indexes: Indexes | None, effort: int
    ) -> Iterator[Frames]:
        for block in slices(len(users), size):
            steps = []
            for rows in slices(block.stop - block.start, TILE_USERS):
                rows = slice(block.start + rows.start, block.start + rows.stop)
                vectors = self.user_vectors({name: column[rows] for name, column in users.table.items()})
                seen = _seen_by(users, rows)
                if by == "genre":
                    steps.append(self._best_genres(vectors, seen, top, genre_items))
                    continue
                found = self._search(vectors, seen, top, indexes, effort) if indexes else self._best(vectors, seen, top)
                steps.append({task: (*found[task], self._kernel(task, vectors, found[task])) for task in self.tasks})
            frame = self._genre_frame if by == "genre" else self._item_frame
            yield {
                task: frame(task, users.ids[block], *map(np.concatenate, zip(*(s[task] for s in steps), strict=True)))
                for task in self.tasks
            }

    def users_per_block(self, top: int, by: str, memory_mb: int, genre_items: int = GENRE_ITEMS) -> int:
        """How many users at a time `blocks` takes under a bound of memory, a multiple of `TILE_USERS`.

        Raises:
            ValueError: If not even one step fits.
        """
        tables = len(self._kinds) + _TILE_TABLES
        fixed = _TOWERS_MB * _MB + TILE_USERS * self._items.width * 4 * tables + 3 * _GATHERED_BYTES
        if by == "genre":
            rows = min(top, len(self._members))
            fixed += TILE_USERS * len(self._members) * genre_items * 16 * len(self.tasks)
        else:
            rows = min(top, self._items.count)
        step = TILE_USERS * max(rows, 1) * len(self.tasks) * _ROW_BYTES
        steps = (memory_mb * _MB - fixed) // step
        if steps < 1:
            raise ValueError(
                f"{-(-(fixed + step) // _MB)} MiB of memory are needed for the top {top} in a catalogue of "
                f"{self._items.count} for tasks {self.tasks}; give as much, or ask for fewer ranks or tasks. "
                f"Received: {memory_mb}"
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
        outputs = outputs_of_products(self.model, products)
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
        check_indexable(self.model, self.tasks, by)
        for task, index in indexes.items():
            if len(index) != self._items.count:
                raise ValueError(
                    f"The index of {task!r} must hold the catalogue's {self._items.count} items. Received: {len(index)}"
                )

    def _best_genres(self, vectors: Vectors, seen: np.ndarray, top: int, most: int) -> dict[str, tuple]:
        """Per task, of the best genres of each user: scores (NaN where no item is left), genres, numbers of items."""
        best = {(task, genre): Best(most) for task in self.tasks for genre in self._members}
        for rows, outputs in self._scored(vectors, seen):
            for genre, members in self._members.items():
                here = members[slice(*np.searchsorted(members, [rows.start, rows.stop]))]
                if len(here):
                    for task, output in outputs.items():
                        best[task, genre].add(ops.take(output, here - rows.start, axis=1), here)
        found = {}
        for task in self.tasks:
            count = np.zeros((len(vectors[task]), len(self._members)), np.int32)
            score = np.full(count.shape, np.nan)
            for number, genre in enumerate(self._members):
                outputs, _ = best[task, genre].result(len(score))
                left = np.isfinite(outputs)
                count[:, number] = left.sum(axis=1)
                sums = np.where(left, self._predicted(task, outputs), 0).sum(axis=1, dtype=np.float64)
                np.divide(sums, count[:, number], out=score[:, number], where=count[:, number] > 0)
            # Sorted as float32, in which they are put out: rounding must not hide a tie, nor make one.
            score = score.astype(np.float32)
            order = np.argsort(-score, axis=1, kind="stable")[:, :top]
            found[task] = (np.take_along_axis(score, order, axis=1), order, np.take_along_axis(count, order, axis=1))
        return found

    def _predicted(self, task: str, outputs: np.ndarray) -> np.ndarray:
        return ops.convert_to_numpy(predictions(self.model, {task: ops.convert_to_tensor(outputs)})[task])

    def _kernel(self, task: str, vectors: Vectors, found: Found) -> np.ndarray:
        """The virtual kernel with the largest part in each inner product, -1 in models without."""
        columns, kernels = found[1], self._kernels[task]
        if not kernels:
            return np.full(columns.shape, -1, np.int16)
        parts = self._parts(task, vectors[task], columns, len(kernels))
        # A gate may leave kernels out altogether: they have no part, not one of 0.
        left_out = ~self.item_vectors[task].reshape(self._items.count, len(kernels), -1).any(axis=-1)
        parts[left_out[columns]] = -np.inf
        return np.asarray(kernels, np.int16)[parts.argmax(axis=-1)]

    def _score_name(self, task: str) -> str:
        return "probability" if self._kinds[task] == "binary" else "value"

    def _item_frame(
        self, task: str, ids: np.ndarray, outputs: np.ndarray, columns: np.ndarray, kernels: np.ndarray
    ) -> pd.DataFrame:
        user, rank = np.nonzero(np.isfinite(outputs))
        column, kernel = columns[user, rank], kernels[user, rank]
        return pd.DataFrame(
            {
                "user": ids[user],
                "rank": (rank + 1).astype(np.int32),
                "item": self.catalogue.ids[column],
                "title": pd.Categorical.from_codes(self._titles[0][column], self._titles[1]),
                "genres": pd.Categorical.from_codes(self._genres[0][column], self._genres[1]),
                self._score_name(task): self._predicted(task, outputs[user, rank]),
                "kernel": pd.arrays.IntegerArray(kernel, kernel < 0),
            }
        )

    def _genre_frame(
        self, task: str, ids: np.ndarray, score: np.ndarray, genres: np.ndarray, counts: np.ndarray
    ) -> pd.DataFrame:
        user, rank = np.nonzero(np.isfinite(score))
        return pd.DataFrame(
            {
                "user": ids[user],
                "rank": (rank + 1).astype(np.int32),
                "genre": pd.Categorical.from_codes(genres[user, rank], list(self._members)),
                "items": counts[user, rank],
                self._score_name(task): score[user, rank],
            }
        )


def check_indexable(model: keras.Model, tasks: Sequence[str], by: str) -> None:
    """Raises unless an index, which looks for the largest inner products, can answer what is asked."""
    if by != "item":
        raise ValueError(f"A vector index finds items; genres are scored exactly, without one. Received: by={by!r}")
    given = conditional_tasks(model)
    joint = {task: given[task] for task in tasks if task in given}
    if joint:
        raise ValueError(
            "A vector index finds the largest inner products, but these tasks multiply two probabilities, their own "
            f"and that of the event before: score them exactly, without an index. Received: {joint}"
        )


def _seen_by(users: Users, rows: slice) -> np.ndarray:
    """The pairs of `users.seen` of some rows, counted from the first of them."""
    start, stop = np.searchsorted(users.seen[:, 0], [rows.start, rows.stop])
    return users.seen[start:stop] - [rows.start, 0]


def _kernels(model: keras.Model, task: str) -> tuple[int, ...]:
    """The virtual kernels that a task's vectors are made of, in their order; none in other models."""
    name = f"gate_{task}"
    gate = model.get_layer(name) if name in {layer.name for layer in model.layers} else None
    return gate.kernels if isinstance(gate, VirtualKernelGate) else ()
