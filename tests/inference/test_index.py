# SPDX-License-Identifier: Apache-2.0
import builtins

import numpy as np
import pytest

from mvke_tf.errors import ConfigError, DataError, MissingExtraError
from mvke_tf.inference.index import INDEX_KINDS, IndexConfig, VectorIndex, recall
from mvke_tf.inference.topk import best_products

RANDOM = np.random.default_rng(0)
# Vectors in clusters and of very different lengths, as those of items are.
ITEMS = (RANDOM.normal(size=(20, 8))[RANDOM.integers(0, 20, 500)] + 0.2 * RANDOM.normal(size=(500, 8))).astype(
    "float32"
)
USERS = RANDOM.normal(size=(30, 8)).astype("float32")


def test_a_flat_index_is_exact():
    products, rows = VectorIndex.build(ITEMS, IndexConfig("flat")).search(USERS, 10)
    exact, expected = best_products(USERS, ITEMS, 10)
    assert rows.tolist() == expected.tolist()
    np.testing.assert_allclose(products, exact, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [(IndexConfig("hnsw", links=8), 1, 200), (IndexConfig("ivf", cells=25), 1, 25)],
    ids=["hnsw", "ivf"],
)
def test_more_effort_finds_more(config, low, high):
    index = VectorIndex.build(ITEMS, config)
    expected = best_products(USERS, ITEMS, 10)[1]
    little, much = (recall(index.search(USERS, 10, effort)[1], expected) for effort in (low, high))
    assert little < much
    assert much > 0.99
    products, rows = index.search(USERS, 10, high)
    np.testing.assert_allclose(products, np.einsum("ud,ukd->uk", USERS, ITEMS[rows]), atol=1e-5)
    assert (np.diff(products, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_the_same_vectors_give_the_same_index(kind):
    first, second = (VectorIndex.build(ITEMS, IndexConfig(kind, cells=25)).search(USERS, 10, 4) for _ in range(2))
    assert first[1].tolist() == second[1].tolist() and first[0].tolist() == second[0].tolist()


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_round_trip(kind, tmp_path):
    config = IndexConfig(kind, links=8, cells=10)
    index = VectorIndex.build(ITEMS, config)
    index.save(tmp_path / "index.npz")
    loaded = VectorIndex.load(tmp_path / "index.npz")
    assert (len(loaded), loaded.config) == (500, config)
    assert loaded.fits(ITEMS)
    assert not loaded.fits(ITEMS[::-1]) and not loaded.fits(ITEMS[:-1])
    for before, after in zip(index.search(USERS, 5, 3), loaded.search(USERS, 5, 3), strict=True):
        assert before.tolist() == after.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]


def test_fewer_vectors_than_asked_for():
    products, rows = VectorIndex.build(ITEMS[:3], IndexConfig("ivf", cells=2)).search(USERS[:1], 5, 2)
    assert sorted(rows[0, :3]) == [0, 1, 2] and rows[0, 3:].tolist() == [-1, -1]
    assert products[0, 3:].tolist() == [-np.inf, -np.inf]


def test_ties_come_in_the_order_of_the_rows():
    index = VectorIndex.build(np.ones((9, 2), "float32"), IndexConfig("flat"))
    assert index.search(np.ones((1, 2), "float32"), 9)[1].tolist() == [list(range(9))]


def test_recall():
    assert recall(np.array([[1, 2, -1], [4, 5, 6]]), np.array([[2, 3], [6, 4]])) == 0.75


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tree"}, "`kind` of an index must be one of .* Received: 'tree'"),
        ({"links": 1}, "`links` of an index must be at least 2. Received: 1"),
        ({"construction_effort": 0}, "`construction_effort`"),
        ({"cells": -1}, "`cells`"),
        ({"threads": -1}, "`threads`"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        IndexConfig(**settings)


def test_bad_arguments():
    index = VectorIndex.build(ITEMS, IndexConfig("flat"))
    with pytest.raises(ValueError, match=r"width 8. Received: queries \(2, 5\)"):
        index.search(np.zeros((2, 5)), 3)
    with pytest.raises(ValueError, match="Received: k=0, effort=64"):
        index.search(USERS, 0)
    with pytest.raises(ValueError, match=r"Received: shape \(8,\)"):
        index.search(USERS[0], 1)
    with pytest.raises(ValueError, match="Received: none"):
        VectorIndex.build(ITEMS[:0])


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"index"])
def test_a_damaged_file_says_what_to_do(tmp_path, damage):
    path = tmp_path / "index.npz"
    with pytest.raises(DataError, match=r"There is no index at .*index.npz"):
        VectorIndex.load(path)
    VectorIndex.build(ITEMS, IndexConfig("flat")).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="Delete it and build it again"):
        VectorIndex.load(path)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[faiss\]'"):
        VectorIndex.build(ITEMS)
