# SPDX-License-Identifier: Apache-2.0
"""The one batch loop outside training: a model, or a part of it, on all rows of an encoded table."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from mvke_tf.errors import DataError, MvkeError

Vectors = dict[str, np.ndarray]

# Rows per step. The last step is filled up: a product of another shape may differ in the last bit, and no result
# depends on how many rows are computed at a time.
TILE_ROWS = 1024


def run_model(
    model: keras.Model, table: Mapping[str, Any], rows: np.ndarray | None = None, batch: int = TILE_ROWS
) -> Any:
    """The outputs of a model, or of any part of one, on rows of an encoded table, as in inference.

    Args:
        model: A model that takes a dictionary, such as `model.item_tower`, `model.gates` or `model.field_attention`.
        table: `{feature: (N, ...)}`; columns that the model does not read are left alone.
        rows: Which rows, `(n,)`; all by default.
        batch: Rows per step.

    Returns:
        NumPy arrays `(n, ...)` of the dtypes of the model, in the structure of its outputs.

    Raises:
        DataError: If a column is missing.
        MvkeError: If an output is NaN or infinite.
    """
    missing = sorted(set(model.input) - set(table))
    if missing:
        raise DataError(
            f"The {model.name} reads {sorted(model.input)}. Expected these columns, encoded. Missing: {missing}. "
            f"Received: {sorted(table)}"
        )
    columns = {name: np.asarray(table[name]) for name in model.input}
    count = len(next(iter(columns.values()))) if rows is None else len(rows)
    outputs = keras.tree.map_structure(
        lambda symbol: np.empty((count, *symbol.shape[1:]), np.dtype(_numpy_dtype(symbol))), model.output
    )
    with _without_tracing_warnings():
        for step in slices(count, batch):
            chosen = step if rows is None else rows[step]
            computed = model.predict_on_batch({name: filled(column[chosen], batch) for name, column in columns.items()})
            keras.tree.map_structure(lambda whole, part, at=step: _put(whole, part, at), outputs, computed)
    for path, values in keras.tree.flatten_with_path(outputs):
        # A sum is NaN or infinite as soon as one term is, and needs no table of flags.
        if not np.isfinite(values.sum(dtype=np.float64)):
            what = f" of task {path[0]!r}" if path else ""
            raise MvkeError(
                f"Expected finite outputs{what} from the {model.name}. Received: NaN or infinite ones; the weights are "
                "damaged, train anew with a lower learning rate."
            )
    return outputs


def vectors_of(
    tower: keras.Model, table: Mapping[str, Any], rows: np.ndarray | None = None, batch: int = TILE_ROWS
) -> Vectors:
    """The vectors of rows of an encoded table, `{task: (n, W_task)}` float32; the rest is as in `run_model`."""
    outputs = run_model(tower, table, rows, batch)
    return {task: values.astype(np.float32, copy=False) for task, values in outputs.items()}


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `range(count)`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def filled(array: np.ndarray, rows: int) -> np.ndarray:
    """The array with its first axis filled up to `rows` by zeros."""
    if len(array) == rows:
        return array
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def _numpy_dtype(symbol: Any) -> str:
    # NumPy knows no bfloat16.
    return "float32" if symbol.dtype in ("bfloat16", "float16") else symbol.dtype


def _put(whole: np.ndarray, part: Any, at: slice) -> None:
    whole[at] = np.asarray(part[: at.stop - at.start], whole.dtype)


@contextlib.contextmanager
def _without_tracing_warnings() -> Iterator[None]:
    """Without TensorFlow's advice on retracing: it takes several parts of a model for one that is traced over again."""
    logger = logging.getLogger("tensorflow")

    def keep(record: logging.LogRecord) -> bool:
        return "tf.function retracing" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
