"""Scores by id, recommendations, vectors and gate weights, from a process that has TensorFlow but nothing of ours."""

import numpy as np
import pytest

from mvke_tf.models.two_tower import gate_model, tower
from mvke_tf.serving.catalogue import unknown_item
from tests.serving.helpers import TWINS, assert_close, predicted, predicted_pairs, rows_of

USERS = [0, 7, 20]  # rows of the fixture `user`
ITEMS = np.array([[3, 15, 1, 8], [2, 2, 9, 4], [1, 5, 7, 11]])


def one(user: dict) -> dict:
    return {name: column[:1] for name, column in user.items()}


@pytest.fixture(scope="module")
def pairs(run, model) -> dict[str, np.ndarray]:
    """What the Keras model predicts of the three users with the whole catalogue, `{task: (3, 15)}`."""
    probabilities = predicted_pairs(model, run.prepared, USERS, np.arange(15))
    assert min(np.ptp(values) for values in probabilities.values()) > 0.05
    return probabilities


def test_score_ids(user, pairs, serve):
    wanted = {task: np.take_along_axis(values, ITEMS - 1, axis=1) for task, values in pairs.items()}
    assert_close(serve({**user, "item_ids": ITEMS}, "score_ids"), wanted)


def test_score_ids_of_one_user_with_many_items(user, pairs, serve):
    answer = serve({**one(user), "item_ids": np.arange(1, 16)[None]}, "score_ids")
    assert_close(answer, {task: values[:1] for task, values in pairs.items()})


@pytest.mark.parametrize("shape", [(3, 0), (0, 4)])
def test_score_ids_of_nothing(user, serve, shape):
    features = {name: column[: shape[0]] for name, column in user.items()}
    answer = serve({**features, "item_ids": np.zeros(shape, np.int64)}, "score_ids")
    assert {task: values.shape for task, values in answer.items()} == {"ctr": shape, "cvr": shape}


def test_an_id_outside_the_catalogue_is_an_unknown_item(run, model, user, serve):
    unknown = unknown_item(run.prepared.encoder)
    assert all(column[0].max() == 0 for name, column in unknown.items() if not name.endswith("_weights"))
    encoded = rows_of(run.prepared.encoded["user"], USERS) | rows_of(unknown, [0, 0, 0])
    wanted = {task: np.stack([values] * 3, axis=1) for task, values in predicted(model, encoded).items()}
    assert_close(serve({**user, "item_ids": np.array([[-1, 0, 10**12]] * 3)}, "score_ids"), wanted)


def test_score_ids_checks_its_rows(user, serve):
    message = " ".join(serve({**user, "item_ids": ITEMS[:1]}, "score_ids").split())
    assert "as many rows as the others:] [item_ids] [Expected:] [3] [Received:] [1]" in message


def recommend(user, k, task="ctr", exclude=None) -> dict:
    exclude = np.zeros((len(user["user_id"]), 0), np.int64) if exclude is None else np.asarray(exclude)
    return {**user, "k": k, "task": task, "exclude": exclude}


def best(values: np.ndarray, left_out=()) -> np.ndarray:
    """Rows of the catalogue, best first, equal ones in its order."""
    kept = [row for row in np.argsort(-values, kind="stable") if row + 1 not in left_out]
    return np.array(kept)


@pytest.mark.parametrize("task", ["ctr", "cvr"])
@pytest.mark.parametrize("k", [1, 6, 15])
def test_recommend_is_the_exact_top_k(user, pairs, serve, k, task):
    answer = serve(recommend(user, k, task), "recommend")
    rows = answer["item_ids"] - 1
    for user_row, values in enumerate(pairs[task]):
        # Equal items differ in the last bit where the Keras model computes them one by one.
        values = values.copy()
        values[list(TWINS)] = values[min(TWINS)]
        np.testing.assert_array_equal(rows[user_row], best(values)[:k])
        np.testing.assert_allclose(answer["predictions"][user_row], values[rows[user_row]], rtol=0, atol=1e-6)
    assert answer["titles"].tolist() == [[b"Film %d" % row for row in per_user] for per_user in rows]


def test_equal_items_are_in_the_order_of_the_catalogue(user, serve):
    answer = serve(recommend(user, 15), "recommend")
    for ids, predictions in zip(answer["item_ids"].tolist(), answer["predictions"], strict=True):
        first, second = ids.index(min(TWINS) + 1), ids.index(max(TWINS) + 1)
        assert second == first + 1
        assert predictions[first] == predictions[second]


def test_recommend_leaves_items_out(user, serve, pairs):
    # An id that is not in the catalogue, and one that is repeated, change nothing.
    exclude = [[1, 2, 3, 3], [-1, -1, -1, -1], [15, 99, 4, 0]]
    answer = serve(recommend(user, 9, "cvr", exclude), "recommend")
    for row, left_out in enumerate(exclude):
        assert not set(answer["item_ids"][row]) & set(left_out)
        values = pairs["cvr"][row].copy()
        values[list(TWINS)] = values[min(TWINS)]
        np.testing.assert_array_equal(answer["item_ids"][row] - 1, best(values, left_out)[:9])


def test_places_stay_empty_where_too_few_items_remain(user, serve):
    exclude = [list(range(3, 16)), list(range(1, 14)), list(range(1, 14))]
    answer = serve(recommend(user, 4, "ctr", exclude), "recommend")
    assert [sorted(row) for row in answer["item_ids"].tolist()] == [[-1, -1, 1, 2], [-1, -1, 14, 15], [-1, -1, 14, 15]]
    assert (answer["item_ids"][:, 2:] == -1).all()
    assert (answer["titles"][:, 2:] == b"").all() and (answer["titles"][:, :2] != b"").all()
    assert (answer["predictions"][:, 2:] == 0).all() and (answer["predictions"][:, :2] > 0).all()


def test_recommend_gives_at_most_the_catalogue(user, serve):
    answer = serve(recommend(user, 10**9), "recommend")
    assert {name: values.shape for name, values in answer.items()} == {
        name: (3, 15) for name in ("item_ids", "titles", "predictions")
    }
    assert sorted(answer["item_ids"][0]) == list(range(1, 16))


@pytest.mark.parametrize("k", [0, -3])
def test_recommend_refuses_k(user, serve, k):
    assert f"k must be at least 1. Received:] [{k}]" in serve(recommend(user, k), "recommend")


def test_recommend_refuses_an_unknown_task(user, serve):
    message = serve(recommend(user, 3, "click"), "recommend")
    assert "task must be one of: ctr, cvr. Received:] [click]" in message


def test_recommend_checks_its_rows(user, serve):
    message = " ".join(serve(recommend(user, 3, exclude=[[1]]), "recommend").split())
    assert "as many rows as the others:] [exclude] [Expected:] [3] [Received:] [1]" in message


def test_vectors_are_those_of_the_towers(run, model, serve):
    prepared = run.prepared
    for side, rows in (("user", USERS), ("item", [0, 3, 14])):
        part = tower(model, side)
        vectors = part({name: np.asarray(prepared.encoded[side][name])[rows] for name in part.input}, training=False)
        wanted = {f"{side}_vector_{task}": vector.numpy() for task, vector in vectors.items()}
        assert {name: vector.shape for name, vector in wanted.items()} == {
            f"{side}_vector_ctr": (3, 24),
            f"{side}_vector_cvr": (3, 32),
        }
        assert_close(serve(rows_of(prepared.raw[side], rows), f"{side}_vectors"), wanted)


def test_the_product_of_the_vectors_is_the_logit(run, user, pairs, serve):
    users = serve(user, "user_vectors")
    items = serve(run.prepared.raw["item"], "item_vectors")
    for task, wanted in pairs.items():
        logits = users[f"user_vector_{task}"] @ items[f"item_vector_{task}"].T
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), wanted, rtol=0, atol=1e-6)


def test_gate_weights(run, model, serve):
    prepared, gates = run.prepared, gate_model(model)
    weights = gates({name: prepared.encoded["item"][name] for name in gates.input}, training=False)
    answer = serve(prepared.raw["item"], "gate_weights")
    assert_close(answer, {f"gate_{task}": values.numpy() for task, values in weights.items()})
    assert answer["gate_cvr"].shape == (15, 4)
    np.testing.assert_allclose(answer["gate_cvr"].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("signature", "change", "message"),
    [
        ("score_ids", {"item_id": [[3]]}, "'item_id' is no input of it; did you mean 'item_ids'?"),
        ("score_ids", {"item_ids": None}, "'item_ids' is missing"),
        ("score_ids", {"item_ids": [[1.5]]}, "for example -1). Received: float64, for example 1.5"),
        ("score_ids", {"item_ids": [3]}, "for example -1). Received: 1 axes, shape (1,)"),
        ("score_ids", {"item_ids": [["3"]]}, "for example -1). Received: <U1, for example '3'"),
        (
            "user_vectors",
            {"gender": [1]},
            "must be string with 1 axes (user feature, string; an unseen",
        ),
        ("user_vectors", {"age": ["33"]}, "must be float32 with 1 axes (user feature, number; NaN means unknown)"),
        ("user_vectors", {"age": [None]}, "Received: object, for example None"),
        ("user_vectors", {"user_id": [2**63]}, "Received: numbers beyond its range, up to 9223372036854775808"),
        ("user_vectors", {"recent_items": [[1, 2], [3]]}, "Received: lists of different lengths"),
        ("scores", {}, "Expected one of ['gate_weights', "),
    ],
)
def test_the_client_names_what_is_wrong(user, serve, signature, change, message):
    inputs = {**one(user), **({"item_ids": [[1]]} if signature == "score_ids" else {}), **change}
    answer = serve({name: values for name, values in inputs.items() if values is not None}, signature, "client")
    assert isinstance(answer, str) and message in answer
    assert all(name in answer for name in change)


def test_the_client_takes_lists_and_tables(user, pairs, serve):
    lists = {name: column[:1].tolist() for name, column in user.items()}
    lists |= {"recent_items": [[]], "recent_items_weights": [[]], "liked_genres": [[]], "liked_genres_weights": [[]]}
    lists |= {"gender": np.array([b"F"], object), "item_ids": [[5, 3]]}
    arrays = {name: np.asarray(values) for name, values in lists.items()} | {"gender": np.array(["F"])}
    arrays |= {name: np.zeros((1, 0), np.int64) for name in ("recent_items",)}
    arrays |= {"liked_genres": np.zeros((1, 0), "U1")}
    for values in ("age", "rating_count", "mean_rating"):
        arrays[values] = arrays[values].astype(np.float32)
    for name in ("liked_items_weights", "recent_items_weights", "liked_genres_weights"):
        arrays[name] = arrays[name].astype(np.float32)
    answer = serve(lists, "score_ids", "client")
    assert_close(answer, serve(arrays, "score_ids"))
    assert_close(serve({**user, "item_ids": np.arange(1, 16)[None].repeat(3, 0)}, "score_ids", "client"), pairs)
