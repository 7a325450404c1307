# SPDX-License-Identifier: Apache-2.0
import logging

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mvke_tf import datasets
from mvke_tf.data.preparation import prepare
from mvke_tf.datasets.movielens import obtain, tables
from mvke_tf.datasets.movielens.tables import make_tables
from mvke_tf.errors import DataError
from tests.datasets.layouts import larger_movielens, small_movielens, write_larger, write_original, write_recbole


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def fail(directory):
        raise DataError("no network")

    for name, archive in obtain._ARCHIVES.items():
        monkeypatch.setitem(
            obtain._ARCHIVES, name, obtain._Archive(archive.name, archive.folder, archive.members, fail)
        )


def test_tables_are_the_frames(tmp_path, original_folder):
    made, size = make_tables(tmp_path / "data", original_folder, expected_counts=None)
    assert size == "100k"
    assert made.parent == tmp_path / "data" / "tables" / "movielens"
    assert sorted(path.name for path in made.iterdir()) == ["items.parquet", "log.parquet", "users.parquet"]
    expected = small_movielens()
    assert_frame_equal(pl.read_parquet(made / "log.parquet"), expected.ratings)
    assert_frame_equal(pl.read_parquet(made / "items.parquet"), expected.items)
    assert_frame_equal(pl.read_parquet(made / "users.parquet"), expected.users.drop("zip_code"))


def test_tables_are_made_once_for_the_same_files(tmp_path, original_folder, monkeypatch):
    first = make_tables(tmp_path, original_folder, expected_counts=None)
    monkeypatch.setattr(tables, "obtain_movielens", None)
    assert make_tables(tmp_path, original_folder, expected_counts=None) == first


def test_other_files_are_other_tables(tmp_path, original_folder):
    first, _ = make_tables(tmp_path, original_folder, expected_counts=None)
    log = original_folder / "u.data"
    log.write_text(log.read_text("latin-1").replace("\t5\t", "\t4\t"), "latin-1")
    second, _ = make_tables(tmp_path, original_folder, expected_counts=None)
    assert second != first
    assert pl.read_parquet(first / "log.parquet")["rating"].to_list() == [5, 1, 3, 4, 2]
    assert pl.read_parquet(second / "log.parquet")["rating"].to_list() == [4, 1, 3, 4, 2]


def test_a_lost_table_is_made_again(tmp_path, original_folder):
    made, _ = make_tables(tmp_path, original_folder, expected_counts=None)
    for name in ("log.parquet", "users.parquet"):
        (made / name).unlink()
        make_tables(tmp_path, original_folder, expected_counts=None)
        assert (made / name).is_file()


def test_copies_in_the_data_folder_come_in_their_order(tmp_path):
    write_recbole(tmp_path / "ml-100k-recbole", small_movielens())
    of_recbole, _ = make_tables(tmp_path, expected_counts=None)
    write_original(tmp_path / "ml-100k", small_movielens())
    of_original, _ = make_tables(tmp_path, expected_counts=None)
    assert of_recbole != of_original
    assert make_tables(tmp_path, source="recbole", expected_counts=None)[0] == of_recbole


def test_damaged_files_leave_no_tables(tmp_path, original_folder):
    (original_folder / "u.data").write_text("3\t1\t9\t8\n")
    with pytest.raises(DataError, match=r"u\.data, line 1: received rating '9'"):
        make_tables(tmp_path / "data", original_folder, expected_counts=None)
    assert not (tmp_path / "data").exists()


def test_incomplete_copy_in_the_data_folder(tmp_path):
    (write_original(tmp_path / "ml-100k", small_movielens()) / "u.user").unlink()
    with pytest.raises(DataError, match=r"ml-100k is not a usable copy of ML-100K: .* a folder without u\.user"):
        make_tables(tmp_path, expected_counts=None)
    assert not (tmp_path / "tables").exists()


def test_nothing_to_be_had(tmp_path):
    with pytest.raises(DataError, match=r"every source failed: .*archive of GroupLens: failed, no network"):
        make_tables(tmp_path)
    assert not (tmp_path / "tables").exists()


def test_interruption_leaves_no_tables(tmp_path, original_folder, monkeypatch):
    def interrupt(movielens, folder):
        folder.mkdir(parents=True)
        (folder / "log.parquet").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "write_tables", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_tables(tmp_path / "data", original_folder, expected_counts=None)
    assert list((tmp_path / "data" / "tables" / "movielens").iterdir()) == []


@pytest.mark.parametrize("name", ["movielens", "movielens/ratings"])
@pytest.mark.parametrize("size", ["1m", "10m", "20m-25m"])
def test_larger_sizes_are_prepared(tmp_path, caplog, name, size):
    folder = write_larger(tmp_path / "raw", larger_movielens(size))
    with caplog.at_level(logging.INFO):
        dataset = datasets.load(name, tmp_path, folder=folder)
    has_users = size == "1m"
    names = [feature.name for feature in dataset.features]
    assert (names[:4] == ["user_id", "age", "gender", "occupation"]) == has_users
    assert names[-5:] == ["item_id", "genres", "release_year", "popularity", "item_mean_rating"]
    assert (dataset.users is not None) == has_users
    assert dataset.task("rating").domain == ((1, 5) if has_users else (0.5, 5))
    assert [group.name for group in dataset.groups] == [
        *("genre", "popularity", "decade"),
        *(("age", "gender", "occupation") if has_users else ()),
        "history",
    ]
    left_out = "does not say who its users are: the features age, gender, occupation are left out"
    assert (left_out in caplog.text) != has_users
    assert dataset.folder.name.startswith(f"ml-{size}-")

    prepared = prepare(dataset.replace({"split.train": 0.4, "split.validation": 0.3, "split.test": 0.3}))
    ratings = larger_movielens(size).ratings.sort("timestamp", "user_id", "item_id")
    shown = ~prepared.sampled
    assert prepared.label("rating")[shown].tolist() == ratings["rating"].to_list()
    assert prepared.label("ctr")[shown].tolist() == [
        float(stars > 0 if name == "movielens" else stars >= 4) for stars in ratings["rating"]
    ]
    assert prepared.label("cvr")[shown].tolist() == [
        float(stars >= (4 if name == "movielens" else 5)) for stars in ratings["rating"]
    ]
    assert shown.sum() == len(ratings)
    assert (len(prepared) > len(ratings)) == (name == "movielens")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"split.by": "share_of_time", "negatives.per_positive": 1, "negatives.kind": "uniform"}),
        ({"split": "random", "data_seed": 3}, {"split.by": "random", "split.seed": 3, "negatives.seed": 3}),
        ({"split": "per_user", "data_seed": 3}, {"split.by": "per_user", "split.seed": 0, "negatives.seed": 3}),
        ({"neg_ratio": 4}, {"negatives.per_positive": 4, "negatives.kind": "uniform", "negatives.future": True}),
        ({"neg_ratio": 0}, {"negatives.kind": "none"}),
        ({"protocol": "ratings"}, {"name": "movielens-ratings", "negatives.kind": "none"}),
        ({"protocol": "ratings", "data_seed": 2, "split": "random"}, {"split.seed": 2, "negatives.kind": "none"}),
    ],
)
def test_options_become_the_declaration(tmp_path, movielens_folder, given, expected):
    dataset = datasets.load("movielens", tmp_path, folder=movielens_folder, **given)
    for key, value in expected.items():
        owner = dataset
        for name in key.split("."):
            owner = getattr(owner, name)
        assert owner == value
    assert (dataset.split.train, dataset.split.validation, dataset.split.test) == (0.7, 0.1, 0.2)


def test_options_become_features(tmp_path, movielens_folder):
    dataset = datasets.load(
        "movielens", tmp_path, folder=movielens_folder, unknown_rate=0.2, unknown_user_rate=0.5, history_length=7
    )
    rates = {feature.name: feature.unknown_rate for feature in dataset.features}
    lists = ("recent_items", "liked_items", "liked_genres", "genres")
    assert rates == {name: 0.0 if name in lists else 0.5 if name == "user_id" else 0.2 for name in rates}
    assert {name: dataset.feature(name).length for name in lists} == dict(zip(lists, (7, 7, 19, 19), strict=True))
    dataset = datasets.load("movielens", tmp_path, folder=movielens_folder, unknown_rate=0.0)
    assert {feature.unknown_group for feature in dataset.features} == {None}


def test_both_protocols_have_the_same_features_and_groups():
    impressions, ratings = datasets.find("movielens"), datasets.find("movielens/ratings")
    assert impressions.features == ratings.features
    assert impressions.groups == ratings.groups
    assert impressions.split == ratings.split
