# SPDX-License-Identifier: Apache-2.0
"""Raw features in, probabilities out, from a process that has TensorFlow but nothing of ours."""

import numpy as np
import pytest
import tensorflow as tf

from tests.serving.helpers import assert_close, pair_rows, predicted

pytestmark = pytest.mark.slow

UNKNOWN = {
    "user": -5,
    "age": np.nan,
    "country": "X",
    "clicks": np.inf,
    "mean_stars": np.nan,
    "item": "i99",
    "price": -np.inf,
    "year": np.nan,
    "popularity": np.nan,
    "item_stars": np.nan,
}


def test_raw_rows_give_the_probabilities_of_the_keras_model(run, model, raw, serve):
    wanted = predicted(model, pair_rows(run.prepared, "test", kind="encoded"))
    assert len(wanted["click"]) > 30
    assert all(np.ptp(probabilities) > 0.01 for probabilities in wanted.values())
    assert_close(serve(raw), wanted)


def test_batch_of_one(raw, serve):
    many = serve(raw)
    for row in (0, 7):
        one = serve({name: column[row : row + 1] for name, column in raw.items()})
        assert_close(one, {task: probabilities[row : row + 1] for task, probabilities in many.items()})


def test_unknown_values_are_index_0(run, model, raw, serve):
    rows, unknown = len(raw["user"]), dict(raw)
    for name, value in UNKNOWN.items():
        unknown[name] = np.full(rows, value, raw[name].dtype if raw[name].dtype.kind != "O" else object)
    for name, value in {"recent_items": "nothing", "liked_tags": "noise", "tags": ""}.items():
        unknown[name] = np.full((rows, 2), value, object)
        unknown[name + "_weights"] = np.array([[2, 0]] * rows, np.float32)
    encoder = run.prepared.encoder
    # A list of unknown values has its weight, which the mean of embeddings does not see, but its summary does.
    one = encoder.encode_numpy(unknown, "user")
    seen = {"liked_tags_summary": one["liked_tags_summary"]}
    nothing = encoder.unknown("user", rows)
    assert (nothing["liked_tags_summary"][:, 0] == 1).all() and (one["liked_tags_summary"][:, 0] == 0).all()
    wanted = predicted(model, nothing | seen | encoder.unknown("item", rows))
    assert_close(serve(unknown), wanted)


def lists(raw: dict, values: list[str], weights: list[float]) -> dict:
    """`raw` with one list of recent items for all rows."""
    rows = len(raw["user"])
    return {
        **raw,
        "recent_items": np.array([values] * rows, object).reshape(rows, -1),
        "recent_items_weights": np.array([weights] * rows, np.float32).reshape(rows, -1),
    }


def test_a_short_list_equals_the_same_list_filled_up(raw, serve):
    short = serve(lists(raw, ["i03", "i05"], [4, 2]))
    assert_close(serve(lists(raw, ["i03", "i05", "i09", "i09"], [4, 2, 0, 0])), short)
    assert np.abs(serve(lists(raw, ["i03", "i05"], [4, 1]))["click"] - short["click"]).max() > 1e-5


def test_a_long_list_is_cut(raw, serve):
    cut = serve(lists(raw, ["i01", "i02", "i03", "i04", "i05"], [5, 4, 3, 2, 1]))
    longer = [f"i0{number}" for number in range(1, 9)]
    assert_close(serve(lists(raw, longer, [5, 4, 3, 2, 1, 5, 5, 5])), cut)
    assert np.abs(serve(lists(raw, longer[1:6], [4, 3, 2, 1, 5]))["click"] - cut["click"]).max() > 1e-5


def test_an_empty_list_equals_empty_slots(raw, serve):
    rows = len(raw["user"])
    empty = {**raw, "recent_items": np.zeros((rows, 0), "U1"), "recent_items_weights": np.zeros((rows, 0), np.float32)}
    assert_close(serve(empty), serve(lists(raw, ["i01", "i02", "i03", "i04"], [0, 0, 0, 0])))


@pytest.mark.parametrize("name", ["user", "tags_weights"])
def test_a_missing_feature_is_named(raw, serve, name):
    raw.pop(name)
    assert f"missing a required argument: '{name}'" in serve(raw)


def test_a_misnamed_feature_is_named(raw, serve):
    assert "unexpected keyword argument 'users'" in serve({**raw, "users": raw["user"]})
    raw["users"] = raw.pop("user")
    assert "missing a required argument: 'user'" in serve(raw)


@pytest.mark.parametrize(("name", "other"), [("country", "user"), ("age", "country"), ("recent_items", "tags_weights")])
def test_a_wrong_dtype_is_refused(raw, serve, name, other):
    assert "Binding inputs to tf.function failed" in serve({**raw, name: raw[other]})


def test_a_flat_list_is_named(raw, serve, signatures):
    raw["recent_items"] = raw["item"]
    message = f"Can not cast TensorSpec(shape=({len(raw['item'])},), dtype=tf.string, name='recent_items')"
    assert message in serve(raw)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Shape of tensor recent_items"):
        signatures["serving_default"](**{name: tf.constant(column) for name, column in raw.items()})


@pytest.mark.parametrize("name", ["item", "tags"])
def test_another_number_of_rows_is_named(raw, serve, name):
    message = serve({**raw, name: raw[name][:1]})
    assert "must have as many rows as the others" in message
    assert f"[{name}] [Expected:] [{len(raw[name])}] [Received:] [1]" in " ".join(message.split())


def test_another_number_of_weights_is_named(raw, serve):
    message = serve({**raw, "tags_weights": raw["tags_weights"][:, :1]})
    assert "must have as many slots as its list" in message
    expected = raw["tags"].shape[1]
    assert f"[tags_weights] [Expected:] [{expected}] [Received:] [1]" in " ".join(message.split())


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(raw, serve, weight):
    message = serve({**raw, "liked_tags_weights": np.full_like(raw["liked_tags_weights"], weight)})
    assert "Weights must be finite. Received NaN or infinite ones in:] [liked_tags_weights]" in message
