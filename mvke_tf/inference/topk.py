# SPDX-License-Identifier: Apache-2.0
"""Exact scoring of all pairs of users and items: products of vectors, tile by tile, and the best of each user.

Nothing here ever holds users x items. A tile is at most `TILE_USERS` users by `TILE_ITEMS` items, and its shape is the
same for every tile of one catalogue (the last ones are filled up), so that no result depends on how many users are
scored at a time: a product of another shape may differ in the last bit, and with it the order of near ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops

from mvke_tf.inference.vectors import Vectors, filled, slices
from mvke_tf.models import TwoTowerModel

TILE_USERS = 256
TILE_ITEMS = 4096
# Tiles of small catalogues are a multiple of this, so that products have no ragged edge.
_STEP = 64


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

    def outputs(self, model: TwoTowerModel, users: Vectors) -> Iterator[tuple[slice, dict[str, Any]]]:
        """The same as `products`, with the outputs of a model instead of the inner products."""
        for rows, products in self.products(users):
            yield rows, model.outputs_of_products(products)


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
    """The k items of each user whose vectors have the largest inner product with theirs, exactly.

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
    best_values, best_rows = zip(*results, strict=True)
    return np.concatenate(best_values), np.concatenate(best_rows)
