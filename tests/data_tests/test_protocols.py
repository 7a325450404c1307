import numpy as np
import pandas as pd
import pytest

from mvke_tf.config import DataConfig
from mvke_tf.data.movielens import GENRES, MovieLens, read_movielens
from mvke_tf.data.protocols import describe, labelled_pairs, sample_unrated, split_parts

SPLITS = ("temporal", "random", "per_user")


def random_movielens(seed: int = 0, users: int = 12, items: int = 30, ratings: int = 200) -> MovieLens:
    """A random log in random order, with many equal timestamps, also within a user."""
    random = np.random.default_rng(seed)
    user_ids, item_ids = 10 * np.arange(users) + 3, 7 * np.arange(items) + 1
    # The last items are never rated.
    user, item = np.divmod(random.choice(users * (items - 3), ratings, replace=False), items - 3)
    genre_counts = random.integers(1, 4, items)
    genres = [tuple(GENRES[i] for i in sorted(random.choice(19, count, replace=False))) for count in genre_counts]
    years = pd.Series(random.integers(1930, 1999, items), dtype="Int64")
    years[0] = pd.NA
    return MovieLens(
        ratings=pd.DataFrame(
            {
                "user_id": user_ids[user],
                "item_id": item_ids[item],
                "rating": random.integers(1, 6, ratings),
                "timestamp": 900 + random.integers(0, ratings // 4, ratings),
            }
        ),
        users=pd.DataFrame(
            {
                "user_id": user_ids,
                "age": random.integers(7, 74, users),
                "gender": random.choice(["M", "F"], users),
                "occupation": random.choice(["artist", "doctor", "none"], users),
                "zip_code": "00000",
            }
        ),
        items=pd.DataFrame({"item_id": item_ids, "title": "A film", "release_year": years, "genres": genres}).sample(
            frac=1, random_state=0, ignore_index=True
        ),
    )


@pytest.fixture(scope="module")
def frames() -> MovieLens:
    return random_movielens()


@pytest.fixture(scope="module")
def real(movielens_folder) -> MovieLens:
    return read_movielens(movielens_folder)


def rows(frame: pd.DataFrame, *columns: str) -> list[tuple]:
    return list(frame[list(columns)].itertuples(index=False, name=None))


def test_labels_of_impressions(frames):
    pairs = labelled_pairs(frames.ratings, frames.items, DataConfig(neg_ratio=2))
    expected = [
        (time, user, item, rating, 1, int(rating >= 4))
        for time, user, item, rating in sorted(rows(frames.ratings, "timestamp", "user_id", "item_id", "rating"))
    ]
    columns = ("timestamp", "user_id", "item_id", "rating", "ctr", "cvr")
    assert rows(pairs[pairs["rating"] > 0], *columns) == expected
    assert pairs["timestamp"].is_monotonic_increasing


def test_labels_of_ratings(frames):
    pairs = labelled_pairs(frames.ratings, frames.items, DataConfig(protocol="ratings"))
    expected = [
        (time, user, item, rating, int(rating >= 4), int(rating == 5))
        for time, user, item, rating in sorted(rows(frames.ratings, "timestamp", "user_id", "item_id", "rating"))
    ]
    assert rows(pairs, "timestamp", "user_id", "item_id", "rating", "ctr", "cvr") == expected


@pytest.mark.parametrize("neg_ratio", [0, 1, 3])
def test_each_impression_is_followed_by_its_negatives(frames, neg_ratio):
    pairs = labelled_pairs(frames.ratings, frames.items, DataConfig(neg_ratio=neg_ratio))
    rated, catalogue = set(rows(frames.ratings, "user_id", "item_id")), set(frames.items["item_id"])
    assert len(pairs) == len(frames.ratings) * (1 + neg_ratio)
    values = rows(pairs, "user_id", "timestamp", "part", "item_id", "rating", "ctr", "cvr")
    for position, (*moment, item, rating, ctr, cvr) in enumerate(values):
        if position % (1 + neg_ratio) == 0:
            impression = moment
            assert (moment[0], item) in rated
            assert rating > 0
        else:
            assert moment == impression
            assert (moment[0], item) not in rated
            assert item in catalogue
            assert (rating, ctr, cvr) == (0, 0, 0)
    assert list(pairs.index) == list(range(len(pairs)))
    assert [pairs[name].dtype.name for name in ("user_id", "item_id", "timestamp", "rating")] == ["int64"] * 4
    assert [pairs[name].dtype.name for name in ("ctr", "cvr", "part")] == ["int8"] * 3


def test_negatives_are_uniform_over_the_unrated_items():
    ratings = pd.DataFrame({"user_id": [5, 5, 5, 8, 8], "item_id": [2, 9, 4, 1, 2]})
    catalogue = np.array([9, 1, 2, 3, 4, 7, 11, 12])
    users = np.repeat([8, 5], [5000, 6000])
    drawn = sample_unrated(users, ratings, catalogue, np.random.default_rng(0))
    for user, choices in {5: [1, 3, 7, 11, 12], 8: [3, 4, 7, 9, 11, 12]}.items():
        items, counts = np.unique(drawn[users == user], return_counts=True)
        assert items.tolist() == choices
        expected = counts.sum() / len(choices)
        # The chi-square statistic of 4 and 5 degrees of freedom passes 20 once in 800 samples.
        assert np.sum((counts - expected) ** 2 / expected) < 20


def test_seeds(frames):
    first, again, other = (
        labelled_pairs(frames.ratings, frames.items, DataConfig(split="random", seed=seed)) for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(first, again)
    negative = first["rating"] == 0
    assert (first["item_id"] != other["item_id"])[negative].mean() > 0.5
    assert (first["part"] != other["part"]).mean() > 0.2


def test_order_of_the_log_does_not_matter(frames):
    shuffled = frames.ratings.sample(frac=1, random_state=1)
    for split in SPLITS:
        config = DataConfig(split=split)
        pd.testing.assert_frame_equal(
            labelled_pairs(shuffled, frames.items, config), labelled_pairs(frames.ratings, frames.items, config)
        )


def test_user_who_rated_everything():
    items = pd.DataFrame({"item_id": [1, 2]})
    ratings = pd.DataFrame({"user_id": [7, 7, 4], "item_id": [1, 2, 1], "rating": 5, "timestamp": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"user 7 has rated all 2 items\. Use the protocol 'ratings', or neg_ratio=0"):
        labelled_pairs(ratings, items, DataConfig())
    assert len(labelled_pairs(ratings, items, DataConfig(neg_ratio=0))) == 3
    assert len(labelled_pairs(ratings, items, DataConfig(protocol="ratings"))) == 3
    assert sample_unrated(np.array([4]), ratings, np.array([1, 2]), np.random.default_rng(0)).tolist() == [2]


def expected_parts(times: list[int]) -> list[int]:
    """By the share of pairs that are not later."""
    shares = [sum(other <= time for other in times) / len(times) for time in times]
    return [0 if share <= 0.7 else 1 if share <= 0.8 else 2 for share in shares]


def test_temporal_split(frames):
    pairs = labelled_pairs(frames.ratings, frames.items, DataConfig(neg_ratio=0))
    assert pairs["part"].tolist() == expected_parts(pairs["timestamp"].tolist())
    assert pairs.groupby("timestamp")["part"].nunique().eq(1).all()
    assert pairs["part"].is_monotonic_increasing
    assert pairs["timestamp"].duplicated().any()
    assert np.bincount(pairs["part"]) / len(pairs) == pytest.approx([0.7, 0.1, 0.2], abs=0.04)


def test_per_user_split(frames):
    pairs = labelled_pairs(frames.ratings, frames.items, DataConfig(split="per_user", neg_ratio=0))
    for _, own in pairs.groupby("user_id"):
        assert own["part"].tolist() == expected_parts(own["timestamp"].tolist())
        assert own.groupby("timestamp")["part"].nunique().eq(1).all()
        assert own["part"].is_monotonic_increasing
        assert own["part"].iloc[-1] == 2
    assert pairs.duplicated(["user_id", "timestamp"]).any()


def test_random_split(frames):
    pairs = labelled_pairs(frames.ratings, frames.items, DataConfig(split="random", neg_ratio=0))
    assert np.bincount(pairs["part"]).tolist() == [140, 20, 40]
    assert pairs.groupby("part")["timestamp"].mean().to_numpy() == pytest.approx(pairs["timestamp"].mean(), abs=8)
    assert pairs.groupby("timestamp")["part"].nunique().gt(1).any()


@pytest.mark.parametrize("split", SPLITS)
def test_split_does_not_depend_on_the_negatives(frames, split):
    parts = [
        labelled_pairs(frames.ratings, frames.items, DataConfig(split=split, neg_ratio=neg_ratio))
        .query("rating > 0")["part"]
        .tolist()
        for neg_ratio in (0, 1, 3)
    ]
    assert parts[0] == parts[1] == parts[2]


def test_split_of_a_single_pair():
    pair = pd.DataFrame({"user_id": [1], "timestamp": [5]})
    assert [split_parts(pair, split, np.random.default_rng(0)).tolist() for split in SPLITS] == [[2]] * 3


def test_describe():
    columns = ["user_id", "item_id", "rating", "ctr", "cvr", "part"]
    pairs = [
        (1, 10, 5, 1, 1, 0),
        (1, 11, 2, 1, 0, 0),
        (1, 12, 0, 0, 0, 0),  # a negative makes no item known
        (2, 10, 4, 1, 1, 1),
        (1, 11, 3, 1, 0, 2),
        (1, 12, 5, 1, 1, 2),
        (2, 13, 0, 0, 0, 2),
        (2, 10, 0, 0, 0, 2),
    ]
    table = describe(pd.DataFrame(pairs, columns=columns))
    assert table.index.tolist() == ["train", "validation", "test"]
    assert table.columns.tolist() == ["rows", "positives_ctr", "positives_cvr", "new_users", "new_items"]
    assert table.loc["train"].tolist() == [3, 2, 1, 0, pytest.approx(1 / 3)]
    assert table.loc["validation"].tolist() == [1, 1, 1, 1, 0]
    assert table.loc["test"].tolist() == [4, 2, 1, 0.5, 0.5]


def test_real_movielens(real):
    pairs = labelled_pairs(real.ratings, real.items, DataConfig())
    table = describe(pairs)
    assert table["rows"].tolist() == [139_994, 20_004, 40_002]
    assert table["positives_ctr"].tolist() == [69_997, 10_002, 20_001]
    assert table["positives_cvr"].sum() == 55_375
    assert table.loc["train", "new_users"] == 0
    assert table.loc["test", "new_users"] == pytest.approx(0.8797, abs=5e-5)
    ends = pairs.groupby("part")["timestamp"].agg(["min", "max"])
    assert ends.loc[0, "max"] < ends.loc[1, "min"]
    assert ends.loc[1, "max"] < ends.loc[2, "min"]
    negatives = pairs[pairs["rating"] == 0]
    assert negatives.merge(real.ratings, on=["user_id", "item_id"]).empty


@pytest.mark.parametrize(("split", "tolerance"), [("random", 0), ("per_user", 0.02)])
def test_other_splits_of_real_movielens(real, split, tolerance):
    pairs = labelled_pairs(real.ratings, real.items, DataConfig(split=split))
    table = describe(pairs)
    assert (table["rows"] / len(pairs)).tolist() == pytest.approx([0.7, 0.1, 0.2], abs=tolerance)
    assert table.loc["test", "new_users"] == 0
