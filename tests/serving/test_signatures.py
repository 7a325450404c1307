# SPDX-License-Identifier: Apache-2.0
"""Scores by id, recommendations, vectors and gate weights, from a process that has TensorFlow but nothing of ours."""

import numpy as np
import pytest

from mvke_tf.inference.vectors import run_model
from tests.serving.helpers import ITEMS, TWINS, assert_close, predicted, predicted_pairs, rows_of

pytestmark = pytest.mark.slow

USERS = [0, 7, 20]  # rows of the fixture `user`
CHOSEN = np.array([[2, 14, 31, 7], [1, 1, 8, 30], [0, 4, 6, 10]])  # rows of the catalogue


def ids(rows) -> np.ndarray:
    return np.vectorize(lambda row: f"i{row + 1:02d}", otypes=[object])(rows)


def one(user: dict) -> dict:
    return {name: column[:1] for name, column in user.items()}


@pytest.fixture(scope="module")
def pairs(run, model) -> dict[str, np.ndarray]:
    """What the Keras model predicts of the three users with the whole catalogue, `{task: (3, 32)}`."""
    prepared = run.prepared
    items = rows_of(prepared.items.encoded, prepared.catalogue)
    probabilities = predicted_pairs(model, rows_of(prepared.users.encoded, USERS), items)
    assert min(np.ptp(values) for values in probabilities.values()) > 0.05
    return probabilities


def test_score_ids(user, pairs, serve):
    wanted = {task: np.take_along_axis(values, CHOSEN, axis=1) for task, values in pairs.items()}
    assert_close(serve({**user, "item_ids": ids(CHOSEN)}, "score_ids"), wanted)


def test_score_ids_of_one_user_with_many_items(user, pairs, serve):
    answer = serve({**one(user), "item_ids": ids(np.arange(ITEMS))[None]}, "score_ids")
    assert_close(answer, {task: values[:1] for task, values in pairs.items()})


@pytest.mark.parametrize("shape", [(3, 0), (0, 4)])
def test_score_ids_of_nothing(user, serve, shape):
    features = {name: column[: shape[0]] for name, column in user.items()}
    answer = serve({**features, "item_ids": np.zeros(shape, "U1")}, "score_ids")
    assert {task: values.shape for task, values in answer.items()} == {"click": shape, "buy": shape}


def test_an_id_outside_the_catalogue_is_an_unknown_item(run, model, user, serve):
    unknown = run.prepared.encoder.unknown("item", 3)
    encoded = rows_of(run.prepared.users.encoded, USERS) | unknown
    wanted = {task: np.stack([values] * 3, axis=1) for task, values in predicted(model, encoded).items()}
    assert_close(serve({**user, "item_ids": np.array([["", "i99", "x" * 1000]] * 3)}, "score_ids"), wanted)


def test_score_ids_checks_its_rows(user, serve):
    message = " ".join(serve({**user, "item_ids": ids(CHOSEN[:1])}, "score_ids").split())
    assert "as many rows as the others:] [item_ids] [Expected:] [3] [Received:] [1]" in message


def recommend(user, k, task="click", exclude=None) -> dict:
    rows = len(next(iter(user.values())))
    exclude = np.zeros((rows, 0), "U1") if exclude is None else np.asarray(exclude)
    return {**user, "k": k, "task": task, "exclude": exclude}


def best(values: np.ndarray, left_out=()) -> np.ndarray:
    """Rows of the catalogue, best first, equal ones in its order."""
    # Equal items differ in the last bit where the Keras model computes them one by one.
    values = values.copy()
    values[list(TWINS)] = values[min(TWINS)]
    return np.array([row for row in np.argsort(-values, kind="stable") if row not in left_out])


@pytest.mark.parametrize("task", ["click", "buy"])
@pytest.mark.parametrize("k", [1, 6, ITEMS])
def test_recommend_is_the_exact_top_k(user, pairs, serve, k, task):
    answer = serve(recommend(user, k, task), "recommend")
    for user_row, values in enumerate(pairs[task]):
        rows = best(values)[:k]
        assert answer["item_ids"][user_row].tolist() == [name.encode() for name in ids(rows)]
        assert answer["item_names"][user_row].tolist() == [b"Item %d" % (row + 1) for row in rows]
        np.testing.assert_allclose(answer["predictions"][user_row], values[rows], rtol=0, atol=1e-6)


def test_many_users_are_scored_in_blocks_that_change_nothing(run, pairs, exported, elsewhere, monkeypatch):
    """The scores of all users and items never stand side by side."""
    from mvke_tf.serving import Catalogue, export_saved_model, saved_model

    monkeypatch.setattr(saved_model, "_PAIRS", 2 * ITEMS)
    prepared = run.prepared
    path = export_saved_model(
        run.load_model(), prepared.encoder, run.folder / "blocks", Catalogue.from_prepared(prepared)
    )
    for rows in ([], [3], [0, 7, 20, 1, 2], np.arange(100) % 50):
        rows = np.asarray(rows, int)
        users = rows_of(prepared.users.raw, rows)
        exclude = ids(rows % ITEMS)[:, None] if len(rows) else np.zeros((0, 1), "U1")
        request = recommend(users, 4, "buy", exclude)
        blocks, whole = (elsewhere.ask(where, "recommend", request) for where in (path, exported))
        assert blocks["item_ids"].tolist() == whole["item_ids"].tolist()
        assert blocks["predictions"].shape == (len(rows), 4)
        np.testing.assert_allclose(blocks["predictions"], whole["predictions"], rtol=0, atol=1e-6)


def test_equal_items_are_in_the_order_of_the_catalogue(user, serve):
    answer = serve(recommend(user, ITEMS), "recommend")
    for found, predictions in zip(answer["item_ids"].tolist(), answer["predictions"], strict=True):
        first, second = (found.index(b"i%d" % (row + 1)) for row in TWINS)
        assert second == first + 1
        assert predictions[first] == predictions[second]


def test_recommend_leaves_items_out(user, serve, pairs):
    # An id that is not in the catalogue, and one that is repeated, change nothing.
    exclude = [["i01", "i02", "i03", "i03"], ["", "", "", ""], ["i15", "i99", "i04", "0"]]
    left_out = [{0, 1, 2}, set(), {14, 3}]
    answer = serve(recommend(user, 9, "buy", exclude), "recommend")
    for row, names in enumerate(exclude):
        assert not set(answer["item_ids"][row]) & {name.encode() for name in names}
        expected = ids(best(pairs["buy"][row], left_out[row])[:9])
        assert answer["item_ids"][row].tolist() == [name.encode() for name in expected]


def test_places_stay_empty_where_too_few_items_remain(user, serve):
    exclude = [ids(np.arange(2, ITEMS)), ids(np.arange(ITEMS - 2)), ids(np.arange(ITEMS - 2))]
    answer = serve(recommend(user, 4, "click", exclude), "recommend")
    assert [sorted(row) for row in answer["item_ids"].tolist()] == [
        [b"", b"", b"i01", b"i02"],
        *[[b"", b"", b"i31", b"i32"]] * 2,
    ]
    assert (answer["item_ids"][:, 2:] == b"").all()
    assert (answer["item_names"][:, 2:] == b"").all() and (answer["item_names"][:, :2] != b"").all()
    assert (answer["predictions"][:, 2:] == 0).all() and (answer["predictions"][:, :2] > 0).all()


def test_recommend_gives_at_most_the_catalogue(user, serve):
    answer = serve(recommend(user, 10**9), "recommend")
    assert {name: values.shape for name, values in answer.items()} == {
        name: (3, ITEMS) for name in ("item_ids", "item_names", "predictions")
    }
    assert sorted(answer["item_ids"][0]) == [name.encode() for name in ids(np.arange(ITEMS))]


@pytest.mark.parametrize("k", [0, -3])
def test_recommend_refuses_k(user, serve, k):
    assert f"k must be at least 1. Received:] [{k}]" in serve(recommend(user, k), "recommend")


def test_recommend_refuses_an_unknown_task(user, serve):
    message = serve(recommend(user, 3, "cick"), "recommend")
    assert "task must be one of: click, buy. Received:] [cick]" in message
    # Bytes that are no text are told as such, and nothing fails while the message is made.
    assert "Received:] [\ufffd\ufffd]" in serve(recommend(user, 3, np.array(b"\xff\xff", object)), "recommend")


def test_recommend_checks_its_rows(user, serve):
    message = " ".join(serve(recommend(user, 3, exclude=[["i01"]]), "recommend").split())
    assert "as many rows as the others:] [exclude] [Expected:] [3] [Received:] [1]" in message


def test_vectors_are_those_of_the_towers(run, model, serve):
    prepared = run.prepared
    for side, table, part in (
        ("user", prepared.users, model.user_tower),
        ("item", prepared.items, model.item_tower),
    ):
        rows = np.array([0, 3, 14])
        wanted = {f"{side}_vector_{task}": vector for task, vector in run_model(part, table.encoded, rows).items()}
        assert {name: vector.shape for name, vector in wanted.items()} == {
            f"{side}_vector_click": (3, 24),
            f"{side}_vector_buy": (3, 32),
        }
        assert_close(serve(rows_of(table.raw, rows), f"{side}_vectors"), wanted)


def test_the_product_of_the_vectors_is_the_logit(run, user, pairs, serve):
    prepared = run.prepared
    users = serve(user, "user_vectors")
    items = serve(rows_of(prepared.items.raw, prepared.catalogue), "item_vectors")
    for task, wanted in pairs.items():
        logits = users[f"user_vector_{task}"] @ items[f"item_vector_{task}"].T
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), wanted, rtol=0, atol=1e-6)


def test_gate_weights(run, model, serve):
    items = run.prepared.items
    answer = serve(rows_of(items.raw, slice(None)), "gate_weights")
    weights = run_model(model.gates, items.encoded)
    assert_close(answer, {f"gate_{task}": values for task, values in weights.items()})
    assert answer["gate_buy"].shape == (ITEMS, 4)
    np.testing.assert_allclose(answer["gate_buy"].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("signature", "change", "message"),
    [
        ("score_ids", {"item_id": [["i03"]]}, "'item_id' is no input of it; did you mean 'item_ids'?"),
        ("score_ids", {"item_ids": None}, "'item_ids' is missing"),
        ("score_ids", {"item_ids": [[1.5]]}, "for example ''). Received: float64, for example 1.5"),
        ("score_ids", {"item_ids": ["i03"]}, "for example ''). Received: 1 axes, shape (1,)"),
        ("score_ids", {"item_ids": [[3]]}, "for example ''). Received: int64, for example 3"),
        ("user_vectors", {"country": [1]}, "must be string with 1 axes (user feature, string; an unseen"),
        ("user_vectors", {"age": ["33"]}, "must be float32 with 1 axes (user feature, number; NaN means unknown)"),
        ("user_vectors", {"age": [None]}, "Received: object, for example None"),
        ("user_vectors", {"user": [2**63]}, "Received: numbers beyond its range, up to 9223372036854775808"),
        ("user_vectors", {"recent_items": [["a", "b"], ["c"]]}, "Received: lists of different lengths"),
        ("scores", {}, "Expected one of ['gate_weights', "),
    ],
)
def test_the_client_names_what_is_wrong(user, serve, signature, change, message):
    inputs = {**one(user), **({"item_ids": [["i01"]]} if signature == "score_ids" else {}), **change}
    answer = serve({name: values for name, values in inputs.items() if values is not None}, signature, "client")
    assert isinstance(answer, str) and message in answer
    assert all(name in answer for name in change)


def test_the_client_weighs_unweighted_lists(user, serve):
    row = {**one(user), "recent_items": [["i01", "i02"]], "recent_items_weights": [[1.0, 1.0]]}
    without = {name: values for name, values in row.items() if name != "recent_items_weights"}
    assert_close(serve(without, "user_vectors", "client"), serve(row, "user_vectors", "client"))
    ragged = serve({**without, "recent_items": [["a", "b"], ["c"]]}, "user_vectors", "client")
    assert "'recent_items' must be string" in ragged and "lists of different lengths" in ragged


def test_the_client_takes_lists_and_tables(user, pairs, serve):
    lists = {name: column[:1].tolist() for name, column in user.items()}
    lists |= {"recent_items": [[]], "recent_items_weights": [[]], "liked_tags": [[]], "liked_tags_weights": [[]]}
    lists |= {"country": np.array([b"fr"], object), "item_ids": [["i05", "i03"]]}
    arrays = {name: np.asarray(values) for name, values in lists.items()} | {"country": np.array(["fr"])}
    arrays |= {name: np.zeros((1, 0), "U1") for name in ("recent_items", "liked_tags")}
    arrays |= {
        name: array.astype(np.float32)
        for name, array in arrays.items()
        if array.dtype.kind == "f" or not array.size
        if name not in ("recent_items", "liked_tags")
    }
    answer = serve(lists, "score_ids", "client")
    assert_close(answer, serve(arrays, "score_ids"))
    everything = ids(np.arange(ITEMS))[None].repeat(3, 0)
    assert_close(serve({**user, "item_ids": everything}, "score_ids", "client"), pairs)
