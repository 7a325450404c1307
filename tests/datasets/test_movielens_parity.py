# SPDX-License-Identifier: Apache-2.0
"""The declared MovieLens, array by array, against digests that were recorded before datasets were declared."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mvke_tf import datasets
from mvke_tf.data.preparation import prepare
from tests.datasets.conftest import DATA

pytestmark = pytest.mark.slow

RECORDED = json.loads((Path(__file__).parent / "movielens_before.json").read_text(encoding="utf-8"))
# Lists whose order means nothing: a genre stood in the slot of its number, now in the next free one.
UNORDERED = ("genres", "liked_genres")


def digest(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    return f"{array.dtype.str}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def canonical(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unordered lists with the indices of filled slots ascending, empty slots last."""
    table = {name: np.asarray(column) for name, column in table.items()}
    for name in UNORDERED:
        if name in table:
            index, weight = table[name], table[name + "_weights"]
            key = np.where(weight > 0, index, np.iinfo(np.int32).max)
            order = np.argsort(key, axis=1, kind="stable")
            table[name], table[name + "_weights"] = (np.take_along_axis(x, order, axis=1) for x in (index, weight))
    return table


def digests(prefix: str, table: dict[str, np.ndarray]) -> dict[str, str]:
    return {
        f"{prefix}/{name}": digest(column.astype(np.int32 if column.dtype.kind in "iu" else np.float32))
        for name, column in canonical(table).items()
    }


@pytest.mark.parametrize("case", RECORDED)
def test_arrays_are_those_of_before(case, movielens_folder):
    protocol, split = case.split("-")
    prepared = prepare(datasets.load("movielens", DATA, protocol=protocol, split=split))
    received = {
        **digests("user", dict(prepared.users.encoded)),
        **digests("item", dict(prepared.items.encoded)),
        **digests("latest", dict(prepared.latest_users.encoded)),
        "user_row": digest(np.asarray(prepared.user_row, np.int32)),
        "item_row": digest(np.asarray(prepared.item_row, np.int32)),
        "time": digest(np.asarray(prepared.time) // 1000),
        "split": digest(np.asarray(prepared.split, np.int8)),
        "label/ctr": digest(prepared.label("ctr")),
        "label/cvr": digest(prepared.label("cvr")),
        "label/rating": digest(prepared.label("rating")),
        "weight/rating": digest(prepared.weight("rating")),
        "offset/rating": prepared.offsets["rating"],
    }
    derived = {
        f"{side}/{name}_summary"
        for side in ("user", "latest")
        for name in ("recent_items", "liked_items", "liked_genres")
    }
    assert set(received) == set(RECORDED[case]) | derived
    assert {name: received[name] for name in RECORDED[case]} == RECORDED[case]


def test_mean_weights_are_those_of_the_rated_films(movielens_folder):
    prepared = prepare(datasets.load("movielens", DATA, protocol="ratings"))
    users = prepared.users
    weights = np.asarray(users.raw["recent_items_weights"])
    length = (weights > 0).sum(axis=1)
    encoded = users.encoded["recent_items_summary"]
    bounds = len(prepared.encoder.state["recent_items_mean_weight"])
    assert (encoded[:, 0] == (length == 0)).all()
    # The encoding has the order of the means.
    known = length > 0
    mean = (weights.sum(axis=1) / np.maximum(length, 1))[known]
    order = np.argsort(mean, kind="stable")
    assert (np.diff(encoded[known][:, 1:bounds].sum(axis=1)[order]) > -1e-4).all()


def test_every_row_counts_for_the_other_tasks(movielens_folder):
    prepared = prepare(datasets.load("movielens", DATA))
    assert (prepared.weight("ctr") == 1).all()
    assert (prepared.weight("cvr") == 1).all()
    assert (np.asarray(prepared.sampled) == (prepared.label("ctr") == 0)).all()
