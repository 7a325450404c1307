import dataclasses

import numpy as np
import pytest

from mvke_tf.config import DataConfig
from mvke_tf.data.entities import item_genres, known_ratings, latest_users
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
