"""Exact scoring of all pairs of users and items: products of vectors, tile by tile, and the best of each user.

Nothing here ever holds users x items. A tile is at most `TILE_USERS` users by `TILE_ITEMS` items, and its shape is the
same for every tile of one catalogue (the last ones are filled up), so that no result depends on how many users are
scored at a time: a product of another shape may differ in the last bit, and with it the order of near ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from mvke_tf.models.two_tower import conditional_tasks, cut, outputs_of_products, task_names

Vectors = dict[str, np.ndarray]

TILE_USERS = 256
TILE_ITEMS = 4096
# Tiles of small catalogues are a multiple of this, so that products have no ragged edge.
_STEP = 64


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `range(count)`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def filled(array: np.ndarray, rows: int) -> np.ndarray:
    """The array with its first axis filled up to `rows` by zeros."""
    if len(array) == rows:
        return array
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def model_of_tasks(model: keras.Model, tasks: Sequence[str]) -> keras.Model:
    """The part of a two-tower model that some tasks need, tasks of earlier events included.

    Raises:
        ValueError: If the model has no such task, or none is named.
    """
    known = task_names(model)
    unknown = [task for task in tasks if task not in known]
    if unknown or not tasks:
        raise ValueError(f"Expected tasks of the model {model.name!r}, which are {known}. Received: {list(tasks)}")
    given = conditional_tasks(model)
    needed = set(tasks)
    for task in reversed(known):
        if task in needed and task in given:
            needed.add(given[task])
    return cut(model, {task: model.output[task] for task in known if task in needed}, name=model.name)


def vectors_of(tower: keras.Model, table: Mapping[str, Any]) -> Vectors:
    """The vectors of all rows of an encoded table, `{task: (n, W_task)}` float32, in steps of `TILE_USERS` rows.

    Raises:
        ValueError: If a column is missing, or a vector is NaN or infinite.
    """
    missing = sorted(set(tower.input) - set(table))
    if missing:
        raise ValueError(
            f"The {tower.name} reads {sorted(tower.input)}. Expected these columns, encoded. Missing: {missing}. "
            f"Received: {sorted(table)}"
        )
    columns = {name: np.asarray(table[name]) for name in tower.input}
    count = len(next(iter(columns.values())))
    vectors = {task: np.empty((count, symbol.shape[-1]), np.float32) for task, symbol in tower.output.items()}
    for rows in slices(count, TILE_USERS):
        batch = {name: filled(column[rows], TILE_USERS) for name, column in columns.items()}
        for task, values in tower.predict_on_batch(batch).items():
            vectors[task][rows] = values[: rows.stop - rows.start]
    for task, values in vectors.items():
        # A sum is NaN or infinite as soon as one term is, and needs no table of flags.
        if not np.isfinite(values.sum(dtype=np.float64)):
            raise ValueError(
                f"Expected finite vectors of task {task!r} from the {tower.name}. Received: NaN or infinite ones; the "
                "weights are damaged, train anew with a lower learning rate."
            )
    return vectors


class ItemTiles:
    """The item vectors of some tasks, to be multiplied by users tile by tile; holds no copy of them.

    Args:
        vectors: `{task: (M, W_task)}`.

    Raises:
        ValueError: If there is no item.
    """

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.count = len(next(iter(vectors.values())))
        if not self.count:
            raise ValueError("Expected at least one item to choose from. Received: no item")
        self.width = min(TILE_ITEMS, -(-self.count // _STEP) * _STEP)

    def products(self, users: Vectors) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Inner products with at most `TILE_USERS` users.

        Yields:
            The rows of the catalogue that a tile covers, and its products `{task: (TILE_USERS, self.width)}`; users and
            items that fill a tile up have product 0.
        """
        filled_users = {task: ops.convert_to_tensor(filled(values, TILE_USERS)) for task, values in users.items()}
        for rows in slices(self.count, self.width):
            yield (
                rows,
                {
                    task: ops.einsum("uw,iw->ui", vectors, filled(self.vectors[task][rows], self.width))
                    for task, vectors in filled_users.items()
                },
            )

    def outputs(self, model: keras.Model, users: Vectors) -> Iterator[tuple[slice, dict[str, Any]]]:
        """The same as `products`, with the outputs of a model instead of the inner products."""
        for rows, products in self.products(users):
            yield rows, outputs_of_products(model, products)


class Best:
    """The k best columns of each row of a wide matrix that comes tile by tile, from left to right.

    Of equal values the one further left is better. Minus infinity stands for "no candidate".

    Args:
        k: How many to keep.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._values: Any = None
        self._columns: Any = None

    def add(self, values: Any, columns: np.ndarray) -> None:
        """Takes one tile.

        Args:
            values: `(n, m)`.
            columns: int32 `(m,)`, which column each is; ascending, and further right than those of earlier tiles.
        """
        # Both TensorFlow and JAX put the lower position first where values are equal.
        values, position = ops.top_k(values, min(self.k, values.shape[1]))
        found = ops.take(ops.convert_to_tensor(columns, "int32"), position)
        if self._values is not None:
            values = ops.concatenate([self._values, values], axis=1)
            found = ops.concatenate([self._columns, found], axis=1)
            values, position = ops.top_k(values, min(self.k, values.shape[1]))
            found = ops.take_along_axis(found, position, axis=1)
        self._values, self._columns = values, found

    def result(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and columns of the first `rows` rows, `(rows, at most k)`, best first."""
        values, columns = self._values, self._columns
        return ops.convert_to_numpy(values)[:rows], ops.convert_to_numpy(columns)[:rows]


def best_products(users: np.ndarray, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items of each user whose vectors have the largest inner product with his, exactly.

    Args:
        users: `(N, W)`.
        items: `(M, W)`.
        k: How many.

    Returns:
        Products and rows of `items`, both `(N, min(k, M))`, best first; of equal products, the earlier item.
    """
    tiles = ItemTiles({"": items})
    results = []
    for rows in slices(len(users), TILE_USERS):
        best = Best(k)
        for columns, products in tiles.products({"": users[rows]}):
            covered = columns.stop - columns.start
            best.add(products[""][:, :covered], np.arange(columns.start, columns.stop))
        results.append(best.result(rows.stop - rows.start))
    return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))
