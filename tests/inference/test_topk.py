# SPDX-License-Identifier: Apache-2.0
import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.inference import topk
from mvke_tf.inference.topk import Best, ItemTiles, best_products
from mvke_tf.inference.vectors import vectors_of
from mvke_tf.models import build_model
from mvke_tf.schema import Task
from tests.layer_checks import assert_close
from tests.models.problems import CONFIG, SCHEMA, entities, numpy_outputs, randomize

TASKS = (Task("ctr"), Task("cvr", given="ctr"), Task("rating", kind="regression", offset=3.5))


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return randomize(build_model("mvke", SCHEMA.with_tasks(TASKS), CONFIG))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(topk, "TILE_USERS", 4)
    monkeypatch.setattr(topk, "TILE_ITEMS", 8)
    monkeypatch.setattr(topk, "_STEP", 8)


def integers(count: int, seed: int) -> np.ndarray:
    """Vectors whose products are exact, with many ties."""
    return np.random.default_rng(seed).integers(-2, 3, (count, 3)).astype("float32")


@pytest.mark.parametrize("k", [1, 5, 9, 29, 40])
def test_the_best_products_of_many_tiles_with_ties_in_catalogue_order(small_tiles, k):
    users, items = integers(10, 0), integers(29, 1)
    values, rows = best_products(users, items, k)
    products = users @ items.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    assert len(np.unique(products)) < 20
    assert rows.tolist() == expected.tolist()
    assert values.tolist() == np.take_along_axis(products, expected, axis=1).tolist()


def test_negative_products_beat_the_rows_that_fill_a_tile_up(small_tiles):
    items = -np.arange(10, 1, -1, "float32")[:, None] * np.ones(2, "float32")
    values, rows = best_products(np.ones((1, 2), "float32"), items, 3)
    assert rows.tolist() == [[8, 7, 6]] and values.tolist() == [[-4, -6, -8]]


def test_best_keeps_no_candidate_last():
    best = Best(3)
    best.add(np.array([[-np.inf, 1.0], [-np.inf, -np.inf]], "float32"), np.array([0, 1]))
    best.add(np.array([[1.0, 7.0], [-np.inf, 2.0]], "float32"), np.array([5, 6]))
    values, columns = best.result(2)
    assert values.tolist() == [[7, 1, 1], [2, -np.inf, -np.inf]]
    assert columns[0].tolist() == [6, 1, 5] and columns[1, 0] == 6
    assert best.result(1)[0].tolist() == [[7, 1, 1]]


def test_no_item_is_an_error():
    with pytest.raises(ValueError, match="at least one item"):
        ItemTiles({"ctr": np.zeros((0, 3), "float32")})


def test_outputs_of_all_tiles_are_those_of_the_model(small_tiles, model):
    users, items = entities("user", 3), entities("item", 19, seed=5)
    vectors = vectors_of(model.user_tower, users)
    tiles = ItemTiles(vectors_of(model.item_tower, items))
    whole = {task: np.zeros((3, 19), "float32") for task in model.task_names}
    covered = []
    for rows, outputs in tiles.outputs(model, vectors):
        covered += range(rows.start, rows.stop)
        for task, output in outputs.items():
            assert tuple(output.shape) == (4, 8)
            whole[task][:, rows] = ops.convert_to_numpy(output)[:3, : rows.stop - rows.start]
    assert covered == list(range(19))
    user, item = np.repeat(np.arange(3), 19), np.tile(np.arange(19), 3)
    pairs = {name: column[user] for name, column in users.items()}
    pairs |= {name: column[item] for name, column in items.items()}
    for task, output in numpy_outputs(model, pairs).items():
        assert_close(whole[task].reshape(-1), output[:, 0])
