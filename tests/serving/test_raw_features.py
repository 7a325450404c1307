"""Raw features in, probabilities out, from a process that has TensorFlow but nothing of ours."""

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.data.movielens import GENRES
from mvke_tf.schema import WEIGHTS_SUFFIX
from tests.serving.helpers import assert_close, predicted

UNKNOWN = {
    "user_id": -5,
    "age": np.nan,
    "gender": "X",
    "occupation": "",
    "rating_count": np.inf,
    "mean_rating": np.nan,
    "item_id": 10**12,
    "release_year": np.nan,
    "popularity": np.nan,
    "item_mean_rating": -np.inf,
}


def test_raw_rows_give_the_probabilities_of_the_keras_model(run, model, raw, serve):
    part = run.prepared.part("test")
    encoded = {name: column[part.user_rows] for name, column in part.users.items()}
    encoded |= {name: column[part.item_rows] for name, column in part.items.items()}
    wanted = predicted(model, encoded)
    assert len(wanted["ctr"]) > 30
    assert all(np.ptp(probabilities) > 0.01 for probabilities in wanted.values())
    assert_close(serve(raw), wanted)


def test_batch_of_one(raw, serve):
    many = serve(raw)
    for row in (0, 7):
        one = serve({name: column[row : row + 1] for name, column in raw.items()})
        assert_close(one, {task: probabilities[row : row + 1] for task, probabilities in many.items()})


def test_unknown_values_are_index_0(run, model, raw, serve):
    unknown = dict(raw)
    for name, value in UNKNOWN.items():
        unknown[name] = np.full_like(raw[name], value, dtype=raw[name].dtype if raw[name].dtype.kind != "U" else "U9")
    for name, value in {"recent_items": -1, "liked_items": 10**12, "liked_genres": "Noise", "genres": ""}.items():
        unknown[name] = np.full((len(raw[name]), 2), value)
        unknown[name + WEIGHTS_SUFFIX] = np.array([[2, 0]] * len(raw[name]), np.float32)
    rows = len(raw["user_id"])
    encoded = {}
    for feature in run.prepared.schema.features:
        shape = (rows,) if feature.length == 1 else (rows, feature.length)
        encoded[feature.name] = np.zeros(shape, np.int32)
        if feature.length > 1:
            encoded[feature.name + WEIGHTS_SUFFIX] = np.eye(1, feature.length, dtype=np.float32).repeat(rows, 0)
    assert_close(serve(unknown), predicted(model, encoded))


def lists(raw: dict, values: list[int], weights: list[float]) -> dict:
    """`raw` with one list of recent items for all rows."""
    rows = len(raw["user_id"])
    return {
        **raw,
        "recent_items": np.array([values] * rows, np.int64).reshape(rows, -1),
        "recent_items_weights": np.array([weights] * rows, np.float32).reshape(rows, -1),
    }


def test_a_short_list_equals_the_same_list_filled_up(raw, serve):
    short = serve(lists(raw, [3, 5], [4, 2]))
    assert_close(serve(lists(raw, [3, 5, 9, 9], [4, 2, 0, 0])), short)
    assert np.abs(serve(lists(raw, [3, 5], [4, 1]))["ctr"] - short["ctr"]).max() > 1e-5


def test_a_long_list_is_cut_to_the_most_recent(raw, serve):
    cut = serve(lists(raw, [1, 2, 3, 4], [5, 4, 3, 2]))
    assert_close(serve(lists(raw, [1, 2, 3, 4, 5, 6, 7], [5, 4, 3, 2, 5, 5, 5])), cut)
    assert np.abs(serve(lists(raw, [2, 3, 4, 5], [4, 3, 2, 5]))["ctr"] - cut["ctr"]).max() > 1e-5


def test_an_empty_list_equals_empty_slots(raw, serve):
    assert_close(serve(lists(raw, [], [])), serve(lists(raw, [1, 2, 3, 4], [0, 0, 0, 0])))


@pytest.mark.parametrize("name", ["user_id", "genres_weights"])
def test_a_missing_feature_is_named(raw, serve, name):
    raw.pop(name)
    assert f"missing a required argument: '{name}'" in serve(raw)


def test_a_misnamed_feature_is_named(raw, serve):
    assert "unexpected keyword argument 'user'" in serve({**raw, "user": raw["user_id"]})
    raw["user"] = raw.pop("user_id")
    assert "missing a required argument: 'user_id'" in serve(raw)


@pytest.mark.parametrize(("name", "other"), [("gender", "user_id"), ("age", "gender"), ("recent_items", "genres")])
def test_a_wrong_dtype_is_refused(raw, serve, name, other):
    assert "Binding inputs to tf.function failed" in serve({**raw, name: raw[other]})


def test_a_flat_list_is_named(raw, serve, signatures):
    raw["recent_items"] = raw["item_id"]
    assert f"Can not cast TensorSpec(shape=({len(raw['item_id'])},), dtype=tf.int64, name='recent_items')" in serve(raw)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Shape of tensor recent_items"):
        signatures["serving_default"](**{name: tf.constant(column) for name, column in raw.items()})


@pytest.mark.parametrize("name", ["item_id", "genres"])
def test_another_number_of_rows_is_named(raw, serve, name):
    message = serve({**raw, name: raw[name][:1]})
    assert "must have as many rows as the others" in message
    assert f"[{name}] [Expected:] [{len(raw[name])}] [Received:] [1]" in " ".join(message.split())


def test_another_number_of_weights_is_named(raw, serve):
    message = serve({**raw, "genres_weights": raw["genres_weights"][:, :3]})
    assert "must have as many slots as its list" in message
    assert f"[genres_weights] [Expected:] [{len(GENRES)}] [Received:] [3]" in " ".join(message.split())


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(raw, serve, weight):
    message = serve({**raw, "liked_items_weights": np.full_like(raw["liked_items_weights"], weight)})
    assert "Weights must be finite. Received NaN or infinite ones in:] [liked_items_weights]" in message
