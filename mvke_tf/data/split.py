# SPDX-License-Identifier: Apache-2.0
"""Which part of the log each row belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from mvke_tf.data.declaration import PARTS, Split
from mvke_tf.errors import DataError

# Rows whose part is found at a time, of a log whose rows are many.
_BLOCK = 1 << 20


class NoTrainingRowError(DataError):
    """Nothing to learn from: all rows are in other parts."""


def share_ends(split: Split) -> list[float]:
    """The shares that end the training and the validation part."""
    return [split.train, round(split.train + split.validation, 12)]


def by_share_of_time(time: np.ndarray, ends: list[float]) -> np.ndarray:
    """By time: the share of rows that are not later, equal for all rows of one moment.

    Args:
        time: Moment of each row, `(n,)`.
        ends: Shares that end the training and the validation part.

    Returns:
        int8 `(n,)`: 0 training, 1 validation, 2 test, as all functions here.
    """
    blocks = range(0, len(time), _BLOCK)
    is_sorted = all((np.diff(time[start : start + _BLOCK + 1]) >= 0).all() for start in blocks)
    moments, parts = time if is_sorted else np.sort(time), np.empty(len(time), np.int8)
    for start in blocks:
        some = slice(start, start + _BLOCK)
        parts[some] = _of_shares(np.searchsorted(moments, time[some], side="right") / len(time), ends)
    return parts


def per_user(user: np.ndarray, time: np.ndarray, ends: list[float]) -> np.ndarray:
    """As `by_share_of_time`, within each user.

    Args:
        user: Number of the user of each row, `(n,)`.
        time: Moment of each row, `(n,)`.
        ends: Shares that end the training and the validation part.
    """
    ranks = pl.DataFrame({"user": user, "time": time}).select(
        pl.col("time").rank("max").over("user") / pl.len().over("user")
    )
    return _of_shares(ranks.to_series().to_numpy(), ends)


def by_time(time: np.ndarray, validation: int, test: int) -> np.ndarray:
    """From the moments (milliseconds) on at which the validation and the test part start."""
    return np.searchsorted([validation, test], time, side="right").astype(np.int8)


def by_chance(rows: int, ends: list[float], seed: int) -> np.ndarray:
    """Row by row."""
    return _of_shares((1 + np.random.default_rng([seed, 0]).permutation(rows)) / rows, ends)


def by_hash(values: pl.Series, ends: list[float], seed: int) -> np.ndarray:
    """By a hash of a value, the same in every process and every version: all rows of one value are in one part."""
    distinct = values.unique(maintain_order=True)
    shares = [_share_of(f"{seed} {'' if value is None else value}") for value in distinct.to_list()]
    parts = pl.Series(np.minimum(np.searchsorted(ends, shares, side="right"), 2), dtype=pl.Int8)
    return values.replace_strict(distinct, parts, return_dtype=pl.Int8).to_numpy()


def _share_of(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def by_column(values: pl.Series, split: Split) -> np.ndarray:
    """By the values that each part names; -1 where none does.

    Raises:
        DataError: If two parts name one value, or values are lists or the like.
    """
    if values.dtype.is_nested():
        raise DataError(
            f"[split] column: expected a column of single values, which the parts name. Received a column of type "
            f"{values.dtype}."
        )
    parts: dict[str, int] = {}
    for number, part in enumerate(PARTS):
        named = getattr(split, part)
        for value in () if named is None else named if isinstance(named, (list, tuple)) else (named,):
            if parts.setdefault(_as_text(value), number) != number:
                raise DataError(f"[split] {part}: the value {value!r} is in {PARTS[parts[_as_text(value)]]} too.")
    distinct = values.unique(maintain_order=True)
    found = pl.Series([parts.get(_as_text(value), -1) for value in distinct.to_list()], dtype=pl.Int8)
    return values.replace_strict(distinct, found, return_dtype=pl.Int8).to_numpy()


def _as_text(value: Any) -> str:
    """A value as the declaration and the table both write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def check_parts(rows: Sequence[int]) -> None:
    """Raises where the training part has none of the rows, whose numbers by part are given.

    Raises:
        NoTrainingRowError: If so; with the rows of each part.
    """
    if not rows[0]:
        named = ", ".join(f"{part} {number:,}" for part, number in zip(PARTS, rows, strict=True))
        raise NoTrainingRowError(
            f"[split] gives the training part no row. Expected at least one. Received: {named} rows."
        )


def _of_shares(share: np.ndarray, ends: list[float]) -> np.ndarray:
    return np.searchsorted(ends, share, side="left").astype(np.int8)
