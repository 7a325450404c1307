import copy
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest

from mvke_tf.config import DataConfig
from mvke_tf.data.features import Encoder, RawFeature, item_table, movielens_features, user_states
from mvke_tf.data.movielens import GENRES, MovieLens, read_movielens
from mvke_tf.data.prepared import Prepared, prepare
from mvke_tf.data.protocols import labelled_pairs
from tests.data_tests.layouts import small_movielens
from tests.data_tests.test_protocols import random_movielens

LENGTH = 4
CONFIG = DataConfig(history_length=LENGTH)


@pytest.fixture(scope="module")
def frames() -> MovieLens:
    return random_movielens()


@pytest.fixture(scope="module")
def prepared(frames) -> Prepared:
    return prepare(frames, CONFIG)


@pytest.fixture(scope="module")
def real(movielens_folder) -> MovieLens:
    return read_movielens(movielens_folder)


def filled(values: list, length: int) -> list:
    return values[:length] + [0] * (length - len(values))


def naive_state(frames: MovieLens, user_id: int, time: int, length: int) -> dict:
    """The raw features of one state by plain loops."""
    own = frames.ratings[(frames.ratings["user_id"] == user_id) & (frames.ratings["timestamp"] < time)]
    history = sorted(own[["timestamp", "item_id", "rating"]].itertuples(index=False, name=None), reverse=True)
    liked = [event for event in history if event[2] >= 4]
    genres = frames.items.set_index("item_id")["genres"]
    profile = frames.users.set_index("user_id").loc[user_id]
    return {
        "user_id": user_id,
        "age": profile["age"],
        "gender": profile["gender"],
        "occupation": profile["occupation"],
        "rating_count": len(history),
        "mean_rating": sum(event[2] for event in history) / len(history) if history else math.nan,
        "recent_items": filled([event[1] for event in history], length),
        "recent_items_weights": filled([event[2] for event in history], length),
        "liked_items": filled([event[1] for event in liked], length),
        "liked_items_weights": filled([event[2] for event in liked], length),
        "liked_genres": list(GENRES),
        "liked_genres_weights": [sum(genre in genres[event[1]] for event in liked) for genre in GENRES],
    }


def assert_state(table: dict, row: int, expected: dict) -> None:
    assert set(table) == set(expected)
    for name, value in expected.items():
        received = table[name][row].tolist() if isinstance(value, list) else table[name][row]
        if name == "mean_rating":
            assert received == pytest.approx(value, rel=1e-6, nan_ok=True)
        else:
            assert received == value, name


def assert_tables_equal(first: dict, second: dict, rows=slice(None), other_rows=slice(None)) -> None:
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name][rows], second[name][other_rows], err_msg=name)


@pytest.mark.parametrize("length", [1, LENGTH, 60])
def test_every_user_state(frames, length):
    table, keys = user_states(frames, length)
    moments = frames.ratings[["user_id", "timestamp"]].drop_duplicates()
    assert len(moments) < len(frames.ratings)
    assert keys.values.tolist() == sorted(moments.values.tolist())
    assert keys.index.tolist() == list(range(len(keys)))
    for row, (user_id, time) in enumerate(keys.values.tolist()):
        assert_state(table, row, naive_state(frames, user_id, time, length))


def test_user_states_do_not_depend_on_the_order_of_the_log(frames):
    shuffled = dataclasses.replace(frames, ratings=frames.ratings.sample(frac=1, random_state=1))
    first, keys = user_states(frames, LENGTH)
    second, other_keys = user_states(shuffled, LENGTH)
    pd.testing.assert_frame_equal(keys, other_keys)
    assert_tables_equal(first, second)


def test_user_states_where_nothing_was_liked(frames):
    disliked = dataclasses.replace(frames, ratings=frames.ratings.assign(rating=3))
    table, _ = user_states(disliked, LENGTH)
    assert not table["liked_items"].any()
    assert not table["liked_items_weights"].any()
    assert not table["liked_genres_weights"].any()
    assert table["recent_items_weights"].max() == 3


def test_states_of_real_movielens(real):
    table, keys = user_states(real, 50)
    assert len(keys) == len(real.ratings[["user_id", "timestamp"]].drop_duplicates()) == 49_439
    for row in np.random.default_rng(0).choice(len(keys), 40, replace=False):
        assert_state(table, row, naive_state(real, *keys.loc[row].tolist(), 50))


@pytest.mark.parametrize("make", [random_movielens, small_movielens])
def test_item_table(make):
    frames = make()
    pairs = labelled_pairs(frames.ratings, frames.items, CONFIG)
    training = pairs[(pairs["part"] == 0) & (pairs["rating"] > 0)]
    table = item_table(frames, training)
    assert set(table) == {
        *("item_id", "genres", "genres_weights", "release_year", "popularity", "item_mean_rating"),
    }
    for row, item in enumerate(frames.items.itertuples()):
        ratings = [rating for i, rating in training[["item_id", "rating"]].values.tolist() if i == item.item_id]
        year = math.nan if item.release_year is pd.NA else item.release_year
        mean = sum(ratings) / len(ratings) if ratings else math.nan
        assert table["item_id"][row] == item.item_id
        assert tuple(table["genres"][row][table["genres_weights"][row] == 1]) == item.genres
        assert table["genres_weights"][row].sum() == len(item.genres)
        assert table["release_year"][row] == pytest.approx(year, nan_ok=True)
        assert table["popularity"][row] == pytest.approx(len(ratings) or math.nan, nan_ok=True)
        assert table["item_mean_rating"][row] == pytest.approx(mean, rel=1e-6, nan_ok=True)


def with_another_future(frames: MovieLens, time: int, seed: int, drop: bool) -> MovieLens:
    """The same log before `time`; from then on other items and ratings, and after it also other users and times.

    With `drop`, a part of the rows after `time` is missing.
    """
    random = np.random.default_rng(seed)
    past = frames.ratings[frames.ratings["timestamp"] < time]
    rows = past.values.tolist()
    rated = {(user, item) for user, item, *_ in rows}
    user_ids, item_ids = frames.users["user_id"].tolist(), frames.items["item_id"].tolist()
    for user, _, rating, moment in frames.ratings.drop(past.index).values.tolist():
        # The states at `time` itself stay, so that their features can be compared.
        if moment > time:
            if drop and random.random() < 0.3:
                continue
            user, moment = user_ids[random.integers(len(user_ids))], moment + random.integers(9)
        item = item_ids[random.integers(len(item_ids))]
        while (user, item) in rated:
            item = item_ids[random.integers(len(item_ids))]
        rated.add((user, item))
        rows.append([user, item, 1 + (rating + random.integers(4)) % 5, moment])
    return dataclasses.replace(frames, ratings=pd.DataFrame(rows, columns=frames.ratings.columns))


@pytest.mark.parametrize("quantile", [0.05, 0.3, 0.6, 0.9])
def test_the_future_changes_no_user_state(frames, quantile):
    time = int(frames.ratings["timestamp"].quantile(quantile))
    before, keys = user_states(frames, LENGTH)
    after, other_keys = user_states(with_another_future(frames, time, seed=1, drop=True), LENGTH)
    common = keys.reset_index().merge(other_keys.reset_index(), on=["user_id", "timestamp"])
    common = common[common["timestamp"] <= time]
    assert common["index_x"].tolist() == keys.index[keys["timestamp"] <= time].tolist()
    assert_tables_equal(before, after, common["index_x"].to_numpy(), common["index_y"].to_numpy())


def assert_no_leak(frames: MovieLens, before: Prepared, time: int) -> None:
    """No feature of a pair before `time` depends on the log from then on, where training ends before `time`."""
    changed = with_another_future(frames, time, seed=2, drop=False)
    assert len(changed.ratings) == len(frames.ratings)
    after = prepare(changed, before.config)
    assert before.encoder.to_dict() == after.encoder.to_dict()
    assert_tables_equal(before.raw["item"], after.raw["item"])
    assert_tables_equal(before.encoded["item"], after.encoded["item"])
    keys, other_keys = (user_states(log, 1)[1] for log in (frames, changed))
    past, other_past = (np.flatnonzero(frame["timestamp"] < time) for frame in (keys, other_keys))
    assert len(past) > 0
    assert keys.loc[past].values.tolist() == other_keys.loc[other_past].values.tolist()
    assert_tables_equal(before.raw["user"], after.raw["user"], past, other_past)
    assert_tables_equal(before.encoded["user"], after.encoded["user"], past, other_past)
    # Row by row too: every impression before `time` leads to the same features.
    for tower in ("user", "item"):
        rows, other_rows = (
            data.pairs.loc[(data.pairs["timestamp"] < time) & (data.pairs["rating"] > 0), f"{tower}_row"].to_numpy()
            for data in (before, after)
        )
        assert_tables_equal(before.encoded[tower], after.encoded[tower], rows, other_rows)


def test_the_future_changes_no_feature(frames, prepared):
    last_of_training = prepared.pairs.loc[prepared.pairs["part"] == 0, "timestamp"].max()
    last = frames.ratings["timestamp"].max()
    for time in (last_of_training + 1, (last_of_training + last) // 2, last):
        assert_no_leak(frames, prepared, time)


def test_the_future_changes_no_feature_of_real_movielens(real):
    before = prepare(real, DataConfig(history_length=10))
    test_part = before.pairs.loc[before.pairs["part"] == 2, "timestamp"]
    assert_no_leak(real, before, test_part.min())


def test_the_test_of_leaks_sees_one(frames, prepared):
    time = prepared.pairs.loc[prepared.pairs["part"] == 0, "timestamp"].max() - 3
    with pytest.raises(AssertionError):
        assert_no_leak(frames, prepared, time)


@pytest.mark.parametrize("split", ["temporal", "random", "per_user"])
def test_negatives_enter_no_feature(frames, split):
    first, second = (
        prepare(frames, DataConfig(split=split, history_length=LENGTH, neg_ratio=neg_ratio)) for neg_ratio in (0, 3)
    )
    assert len(second.pairs) == 4 * len(first.pairs)
    assert first.encoder.to_dict() == second.encoder.to_dict()
    for tower in ("user", "item"):
        assert_tables_equal(first.raw[tower], second.raw[tower])
        assert_tables_equal(first.encoded[tower], second.encoded[tower])


def test_encoder_knows_the_training_rows_only(frames, prepared):
    training = prepared.pairs[(prepared.pairs["part"] == 0) & (prepared.pairs["rating"] > 0)]
    rows = {tower: training[f"{tower}_row"].unique() for tower in ("user", "item")}
    changed = copy.deepcopy({tower: dict(table) for tower, table in prepared.raw.items()})
    for tower, table in changed.items():
        others = np.setdiff1d(np.arange(len(table[f"{tower}_id"])), rows[tower])
        assert len(others) > 0
        for name, column in table.items():
            table[name] = column = column.copy()
            column[others] = "other" if column.dtype == object else 99_999
    fitted = Encoder.fit(movielens_features(CONFIG), changed, rows)
    assert fitted.to_dict() == prepared.encoder.to_dict()
    assert set(fitted.state["user_id"]) == set(prepared.raw["user"]["user_id"][rows["user"]])
    assert set(fitted.state["item_id"]) == set(prepared.raw["item"]["item_id"][rows["item"]])
    assert set(fitted.state["item_id"]) < set(frames.items["item_id"])


FEATURES = (
    RawFeature("user_id", "user", "integer"),
    RawFeature("age", "user", "number", bins=4),
    RawFeature("city", "user", "string", unknown_rate=0.25),
    RawFeature("recent", "user", "integer", length=3, shares="item_id"),
    RawFeature("item_id", "item", "integer"),
    RawFeature("genres", "item", "string", length=2),
)
STATE = {
    "user_id": [7, 5],
    "age": [20.0, 30.0, 50.0],
    "city": ["Rome", "Oslo"],
    "item_id": [40, 10, 30],
    "genres": ["Drama", "War"],
}


def encode_user(**columns) -> dict:
    table = {
        "user_id": np.array([5, 7]),
        "age": np.array([20, 40], np.float32),
        "city": np.array(["Oslo", "Rome"], object),
        "recent": np.array([[40, 10, 30]] * 2),
        "recent_weights": np.array([[3, 1, 2]] * 2, np.float32),
    }
    encoded = Encoder(FEATURES, STATE).encode(table | columns, "user")
    return {name: column.numpy() for name, column in encoded.items()}


def test_encode_by_hand():
    encoded = encode_user()
    assert {name: column.tolist() for name, column in encoded.items()} == {
        "user_id": [2, 1],
        "age": [2, 3],
        "city": [2, 1],
        "recent": [[1, 2, 3]] * 2,
        "recent_weights": [[3, 1, 2]] * 2,
    }
    assert {column.dtype.name for column in encoded.values()} == {"int32", "float32"}
    assert encoded["recent_weights"].dtype == np.float32


def test_buckets():
    ages = [-1e9, 19.9, 20, 29.9, 30, 49.9, 50, 1e9, math.nan, math.inf, -math.inf]
    encoded = Encoder(FEATURES[1:2], STATE).encode({"age": np.array(ages, np.float32)}, "user")
    assert encoded["age"].numpy().tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 0]


def test_unknown_is_zero():
    encoded = encode_user(
        user_id=np.array([6, -1]),
        age=np.array([math.nan, 45], np.float32),
        city=np.array(["", "Paris"], object),
        recent=np.array([[40, 99, 30], [0, 10, -5]]),
    )
    assert encoded["user_id"].tolist() == [0, 0]
    assert encoded["age"].tolist() == [0, 3]
    assert encoded["city"].tolist() == [0, 0]
    assert encoded["recent"].tolist() == [[1, 0, 3], [0, 2, 0]]
    assert encoded["recent_weights"].tolist() == [[3, 1, 2]] * 2


@pytest.mark.parametrize(
    ("items", "weights", "index", "weight"),
    [
        ([40], [5], [1, 0, 0], [5, 0, 0]),
        ([30, 10], [2, 4], [3, 2, 0], [2, 4, 0]),
        ([30, 10, 40, 10, 10], [2, 4, 1, 5, 5], [3, 2, 1], [2, 4, 1]),
        ([30, 10, 40], [0, 4, 0], [0, 2, 0], [0, 4, 0]),
        ([30, 10, 40], [-1, 4, math.nan], [0, 2, 0], [0, 4, 0]),
        # An empty list is one "unknown".
        ([], [], [0, 0, 0], [1, 0, 0]),
        ([30, 10], [0, 0], [0, 0, 0], [1, 0, 0]),
        ([30, 10, 40, 40], [0, 0, 0, 9], [0, 0, 0], [1, 0, 0]),
        ([30, 10], [-1, math.nan], [0, 0, 0], [1, 0, 0]),
    ],
)
def test_lists_of_any_length(items, weights, index, weight):
    encoded = encode_user(recent=np.array([items] * 2, np.int64), recent_weights=np.array([weights] * 2, np.float32))
    assert encoded["recent"].tolist() == [index] * 2
    assert encoded["recent_weights"].tolist() == [weight] * 2


def test_json_round_trip_encodes_identically(prepared):
    text = json.dumps(prepared.encoder.to_dict())
    read = Encoder.from_dict(json.loads(text))
    assert read.features == movielens_features(CONFIG)
    assert read.to_dict() == prepared.encoder.to_dict()
    assert read.schema() == prepared.schema
    for tower, table in prepared.raw.items():
        encoded = {name: column.numpy() for name, column in read.encode(table, tower).items()}
        assert_tables_equal(encoded, prepared.encoded[tower])


def test_fit_orders_vocabularies_by_frequency():
    tables = {
        "user": {
            "user_id": np.array([5, 7, 7, 9]),
            "age": np.array([math.nan, math.nan, math.nan, 30], np.float32),
            "city": np.array(["Rome", "Oslo", "Oslo", "Bern"], object),
        },
        "item": {
            "item_id": np.array([40, 10, 30]),
            "genres": np.array([["War", "Drama"]] * 3, object),
            "genres_weights": np.array([[0, 1], [1, 1], [1, 1]], np.float32),
        },
    }
    rows = {"user": np.array([0, 1, 2]), "item": np.array([0, 1])}
    state = Encoder.fit(FEATURES, tables, rows).state
    assert state == {
        "user_id": [7, 5],
        "age": [],  # nothing is known of it
        "city": ["Oslo", "Rome"],
        "item_id": [10, 40],
        "genres": ["Drama", "War"],
    }


def test_buckets_are_about_equally_full(prepared):
    count = prepared.encoded["user"]["rating_count"]
    share = np.bincount(count, minlength=prepared.encoder.schema().features[4].vocabulary_size) / len(count)
    assert prepared.encoder.features[4].name == "rating_count"
    assert share[0] == 0
    assert share[1:].max() < 0.5
    assert (share[1:] > 0).sum() >= 10


def test_missing_column_is_named():
    with pytest.raises(ValueError, match=r"user features \['recent_weights'\] are missing\. Expected: .*Received: "):
        Encoder(FEATURES, STATE).encode({"user_id": [5], "age": [1.0], "city": [""], "recent": [[40]]}, "user")
    with pytest.raises(ValueError, match=r"item features \['item_id', 'genres', 'genres_weights'\] are missing"):
        Encoder(FEATURES, STATE).encode({}, "item")
    with pytest.raises(ValueError, match=r"no vocabulary or bounds for \['age', 'genres'\]"):
        Encoder(FEATURES, {name: STATE[name] for name in ("user_id", "city", "item_id")})


def test_schema(prepared):
    schema = Encoder(FEATURES, STATE).schema()
    sizes = {feature.name: feature.vocabulary_size for feature in schema.features}
    assert sizes == {"user_id": 3, "age": 5, "city": 3, "recent": 4, "item_id": 4, "genres": 3}
    assert [feature.unknown_rate for feature in schema.features] == [0, 0, 0.25, 0, 0, 0]
    assert schema.inputs("user") == ("user_id", "age", "city", "recent", "recent_weights")
    tables = {feature.name: feature.table for feature in prepared.schema.features}
    assert {name: table for name, table in tables.items() if table != name} == {
        "recent_items": "item_id",
        "liked_items": "item_id",
        "liked_genres": "genres",
    }
    for feature in prepared.schema.features:
        index = prepared.encoded[feature.tower][feature.name]
        assert 0 <= index.min() <= index.max() < feature.vocabulary_size, feature.name
        assert index.shape[1:] == (() if feature.length == 1 else (feature.length,))
    for tower in ("user", "item"):
        assert set(prepared.schema.inputs(tower)) == set(prepared.encoded[tower])


def test_every_encoded_list_has_weight(prepared):
    for name in ("recent_items", "liked_items", "liked_genres"):
        weights = prepared.encoded["user"][name + "_weights"]
        empty = prepared.raw["user"][name + "_weights"].sum(axis=1) == 0
        assert empty.any()
        assert (weights[empty] == np.eye(weights.shape[1])[0]).all()
        assert (prepared.encoded["user"][name][empty] == 0).all()
        np.testing.assert_array_equal(weights[~empty], prepared.raw["user"][name + "_weights"][~empty])
