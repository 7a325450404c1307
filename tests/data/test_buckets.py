# SPDX-License-Identifier: Apache-2.0
"""A log that is prepared in buckets of its users: the same rows, values and encoder as in memory."""

from pathlib import Path

import numpy as np
import pytest

from mvke_tf.data.buckets import prepare_in_buckets
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import EntityTable, PreparedDataset
from tests.data.test_preparation import shop
from tests.small import small_dataset

BUCKETS = 7


def in_buckets(dataset: Dataset, folder: Path, buckets: int = BUCKETS) -> PreparedDataset:
    prepare_in_buckets(dataset, folder / "prepared", "contents", buckets)
    assert [path.name for path in folder.iterdir()] == ["prepared"]
    return PreparedDataset.load(folder / "prepared")


def columns_of(table: EntityTable, rows: np.ndarray) -> dict[str, np.ndarray]:
    columns = {"key": table.key, "name": table.name, "time": table.time}
    columns |= {f"raw {name}": column for name, column in table.raw.items()}
    columns |= {f"encoded {name}": column for name, column in table.encoded.items()}
    return {name: np.asarray(column)[rows] for name, column in columns.items() if column is not None}


def assert_equal_columns(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert set(left) == set(right)
    for name, column in left.items():
        np.testing.assert_array_equal(column, right[name], err_msg=name)
        assert column.dtype == right[name].dtype, name


def assert_same(whole: PreparedDataset, other: PreparedDataset) -> None:
    """Raises unless both have the same rows, up to their order, in which those of a user stay."""
    assert other.is_in_buckets and not whole.is_in_buckets
    assert len(list(other.buckets())) > 1
    assert whole.encoder.to_dict() == other.encoder.to_dict()
    assert whole.offsets == other.offsets
    items = np.arange(len(whole.items))
    assert_equal_columns(columns_of(whole.items, items), columns_of(other.items, items))
    np.testing.assert_array_equal(whole.catalogue, other.catalogue)
    left, right = (np.argsort(np.asarray(one.users.key)[one.user_row], kind="stable") for one in (whole, other))
    for name, column in whole._columns.items():
        if name != "user_row":
            np.testing.assert_array_equal(column[left], other._columns[name][right], err_msg=name)
    assert len(whole.users) == len(other.users)
    assert_equal_columns(columns_of(whole.users, whole.user_row[left]), columns_of(other.users, other.user_row[right]))
    orders = [np.argsort(np.asarray(one.latest_users.key), kind="stable") for one in (whole, other)]
    assert_equal_columns(columns_of(whole.latest_users, orders[0]), columns_of(other.latest_users, orders[1]))
    for side in ("user", "item"):
        rows = {"user": (whole.user_row[left], other.user_row[right]), "item": (items, items)}[side]
        np.testing.assert_array_equal(whole.known(side)[rows[0]], other.known(side)[rows[1]])


def small(**changes) -> Dataset:
    return small_dataset(**changes)


DATASETS = {
    "uniform negatives of all items": lambda: small(),
    "uniform negatives": lambda: small(negatives={"kind": "uniform", "per_positive": 3}),
    "popular negatives": lambda: small(negatives={"kind": "popularity", "per_positive": 2}),
    "popular negatives of all items": lambda: small(
        negatives={"kind": "popularity", "per_positive": 2, "future": True}
    ),
    "split per user": lambda: small(**{"split.by": "per_user", "negatives": None}),
    "split at random": lambda: small(**{"split.by": "random"}),
    "split by hash": lambda: small(**{"split.by": "hash"}),
    "shop": lambda: shop(),
}


@pytest.mark.parametrize("name", DATASETS)
def test_buckets_hold_what_memory_does(tmp_path, name):
    dataset = DATASETS[name]()
    assert_same(prepare(dataset), in_buckets(dataset, tmp_path))
