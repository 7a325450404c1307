import dataclasses

import numpy as np
import pytest

from mvke_tf.config import DataConfig
from mvke_tf.data.entities import Catalogue, Users, item_genres, known_ratings, latest_users
from mvke_tf.data.features import latest_states, user_states
from mvke_tf.data.movielens import MovieLens
from mvke_tf.data.prepared import prepare
from tests.data_tests.test_features import naive_state
from tests.data_tests.test_protocols import random_movielens

LENGTH = 4
FOREVER = 10**9


@pytest.fixture(scope="module")
def frames() -> MovieLens:
    return random_movielens()


def assert_row(table, row, expected):
    assert set(table) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(table[name][row], np.asarray(value, table[name].dtype), name)


def test_latest_states_know_every_rating(frames):
    table = latest_states(frames, LENGTH)
    assert len(table["user_id"]) == len(frames.users)
    for row, user in enumerate(frames.users["user_id"]):
        assert_row(table, row, naive_state(frames, user, FOREVER, LENGTH))
    assert table["rating_count"].sum() == len(frames.ratings)


def test_a_user_without_ratings_has_a_state(frames):
    user = int(frames.users["user_id"][5])
    fewer = dataclasses.replace(frames, ratings=frames.ratings[frames.ratings["user_id"] != user])
    table = latest_states(fewer, LENGTH)
    assert_row(table, 5, naive_state(fewer, user, FOREVER, LENGTH))
    assert table["rating_count"][5] == 0 and np.isnan(table["mean_rating"][5])


def test_a_state_before_a_moment_is_the_latest_of_the_log_until_then(frames):
    states, keys = user_states(frames, LENGTH)
    row = len(keys) // 2
    user, time = keys.loc[row, ["user_id", "timestamp"]]
    past = dataclasses.replace(frames, ratings=frames.ratings[frames.ratings["timestamp"] < time])
    latest = latest_states(past, LENGTH)
    assert_row(
        latest, list(frames.users["user_id"]).index(user), {name: column[row] for name, column in states.items()}
    )


@pytest.mark.parametrize("protocol", ["impressions", "ratings"])
def test_prepared_data_holds_all_that_latest_states_need(frames, protocol, tmp_path):
    prepared = prepare(frames, DataConfig(protocol=protocol, history_length=LENGTH))
    prepared.save(tmp_path / "prepared.npz")
    prepared = type(prepared).load(tmp_path / "prepared.npz")
    assert item_genres(prepared) == frames.items["genres"].tolist()
    columns = ["user_id", "item_id"]
    ratings = known_ratings(prepared).sort_values(columns, ignore_index=True)
    assert ratings.to_dict("list") == (
        frames.ratings[ratings.columns].sort_values(columns, ignore_index=True).to_dict("list")
    )
    table = latest_users(prepared)
    assert table["user_id"].tolist() == sorted(frames.ratings["user_id"].unique())
    for row, user in enumerate(table["user_id"]):
        assert_row(table, row, naive_state(frames, user, FOREVER, LENGTH))


@pytest.fixture(scope="module")
def prepared(frames):
    return prepare(frames, DataConfig(history_length=LENGTH))


def test_the_catalogue_has_all_items_in_order(frames, prepared):
    catalogue = Catalogue.of(prepared)
    assert catalogue.ids.tolist() == frames.items["item_id"].tolist()
    assert catalogue.titles.tolist() == frames.items["title"].tolist()
    assert catalogue.genres == frames.items["genres"].tolist()
    assert catalogue.table is prepared.encoded["item"]


def test_chosen_users_come_encoded_and_in_the_order_asked_for(prepared):
    everyone = Users.of(prepared)
    raw = latest_users(prepared)
    assert everyone.ids.tolist() == raw["user_id"].tolist() and len(everyone.seen) == 0
    for name, column in prepared.encoder.encode(raw, "user").items():
        np.testing.assert_array_equal(everyone.table[name], column.numpy())
    some = Users.of(prepared, [63, 3])
    assert some.ids.tolist() == [63, 3]
    for name, column in everyone.table.items():
        np.testing.assert_array_equal(some.table[name], column[[list(everyone.ids).index(user) for user in (63, 3)]])


def test_seen_is_what_the_user_has_rated_in_any_part(frames, prepared):
    users = Users.of(prepared, [113, 23], exclude_seen=True)
    items = frames.items["item_id"].tolist()
    rated = {
        (row, items.index(item))
        for row, user in enumerate([113, 23])
        for item in frames.ratings["item_id"][frames.ratings["user_id"] == user]
    }
    assert {tuple(pair) for pair in users.seen.tolist()} == rated and len(users.seen) == len(rated) > 10
    assert (np.diff(users.seen[:, 0]) >= 0).all()


@pytest.mark.parametrize(("ids", "wrong"), [([3, 4], "4"), ([3, 3], "3"), ([*range(100, 120)], "100, .* and 8 more")])
def test_unknown_and_repeated_users_are_an_error(prepared, ids, wrong):
    with pytest.raises(ValueError, match=rf"it has 12, from 3 to 113\. Received, unknown or twice: {wrong}$"):
        Users.of(prepared, ids)
