import numpy as np
import pandas as pd
import pytest

from mvke_tf.config import DataConfig, ModelConfig
from mvke_tf.data.movielens import DataError, read_movielens
from mvke_tf.data.prepared import Prepared, prepare, prepare_movielens, prepared_path
from mvke_tf.schema import CTR_CVR, Task
from tests.conftest import random_movielens

CONFIG = DataConfig(history_length=4, neg_ratio=2)


@pytest.fixture(scope="module")
def prepared():
    return prepare(random_movielens(), CONFIG)


def test_pairs_lead_to_their_entities(prepared):
    frames = random_movielens()
    positives = prepared.pairs[prepared.pairs["rating"] > 0]
    users, items = prepared.raw["user"]["user_id"], prepared.raw["item"]["item_id"]
    found = set(
        zip(
            users[positives["user_row"]],
            items[positives["item_row"]],
            positives["rating"],
            positives["timestamp"],
            strict=True,
        )
    )
    assert found == set(frames.ratings.itertuples(index=False, name=None))
    assert len(prepared.pairs) == 3 * len(positives)


def test_parts_are_disjoint_and_complete(prepared):
    rows = np.concatenate([prepared.part_rows(part) for part in ("train", "validation", "test")])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(prepared.pairs)))
    part = prepared.part("validation", tasks=("cvr",))
    pairs = prepared.pairs.iloc[prepared.part_rows("validation")]
    np.testing.assert_array_equal(part.user_rows, pairs["user_row"])
    np.testing.assert_array_equal(part.labels["cvr"], pairs["cvr"])
    assert list(part.labels) == ["cvr"]
    with pytest.raises(ValueError, match="Unknown part of the data"):
        prepared.part("training")


def test_known_is_by_training_impressions(prepared):
    training = prepared.pairs[(prepared.pairs["part"] == 0) & (prepared.pairs["rating"] > 0)]
    users = set(prepared.raw["user"]["user_id"][training["user_row"]])
    np.testing.assert_array_equal(prepared.known("user"), [user in users for user in prepared.raw["user"]["user_id"]])
    assert 0 < prepared.known("user").mean() < 1


def test_file_round_trip(prepared, tmp_path):
    prepared.save(tmp_path / "a.npz")
    loaded = Prepared.load(tmp_path / "a.npz")
    assert loaded.config == prepared.config
    assert loaded.schema == prepared.schema
    pd.testing.assert_frame_equal(loaded.pairs, prepared.pairs)
    np.testing.assert_array_equal(loaded.titles, prepared.titles)
    for kind in ("raw", "encoded"):
        for tower, table in getattr(prepared, kind).items():
            assert list(getattr(loaded, kind)[tower]) == list(table)
            for name, column in table.items():
                np.testing.assert_array_equal(getattr(loaded, kind)[tower][name], column)
    again = loaded.encoder.encode(loaded.raw["user"], "user")
    for name, column in prepared.encoded["user"].items():
        np.testing.assert_array_equal(again[name], column)


def test_load_says_what_is_wrong(prepared, tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="no prepared data"):
        Prepared.load(path)
    prepared.save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged.*Delete it"):
            Prepared.load(path)
    np.savez(path, meta='{"format": 0}')
    with pytest.raises(DataError, match="format 0, expected"):
        Prepared.load(path)


def test_prepare_movielens_repeats_nothing(movielens_folder, tmp_path):
    """Preparation of the real 100,000 ratings, as `make data` calls it."""
    config = DataConfig()
    lines = []
    path = prepare_movielens(tmp_path, config, folder=movielens_folder, report=lines.append)
    assert path == prepared_path(tmp_path, config)
    assert any("139,994" in line and "88.0%" in line for line in lines)
    written = path.stat().st_mtime_ns
    lines.clear()
    assert prepare_movielens(tmp_path, config, report=lines.append) == path
    assert lines == [f"{path} is prepared already."]
    assert path.stat().st_mtime_ns == written


def test_real_titles_go_with_their_items(movielens_folder):
    frames = read_movielens(movielens_folder)
    prepared = prepare(frames, DataConfig(protocol="ratings", split="per_user", history_length=2))
    row = list(prepared.raw["item"]["item_id"]).index(50)
    assert prepared.titles[row] == "Star Wars"
    assert len(prepared.pairs) == 100_000
    assert prepared.pairs["ctr"].sum() == (frames.ratings["rating"] >= 4).sum()


def test_tasks_of_a_model(prepared):
    tasks = prepared.schema_for(ModelConfig(tasks=("ctr", "cvr", "rating"), conversion="esmm")).tasks
    known = prepared.pairs[(prepared.pairs["part"] == 0) & (prepared.pairs["rating"] > 0)]
    mean = round(known["rating"].mean(), 4)
    assert tasks == (Task("ctr"), Task("cvr", given="ctr"), Task("rating", "regression", offset=mean, domain=(1, 5)))
    assert prepared.schema_for(ModelConfig()).tasks == CTR_CVR
    assert prepared.schema_for(ModelConfig(tasks=("cvr",), conversion="clicked")).tasks == (Task("cvr"),)


def test_pairs_without_a_label_have_no_weight(prepared):
    part = prepared.part("train", ("ctr", "cvr", "rating"), clicked=True)
    part.check_labels(prepared.schema_for(ModelConfig(tasks=("ctr", "cvr", "rating"))).tasks)
    assert set(part.weights) == {"cvr", "rating"}
    np.testing.assert_array_equal(part.weights["cvr"], part.labels["ctr"])
    np.testing.assert_array_equal(part.weights["rating"] == 1, part.labels["rating"] > 0)
    assert 0 < part.weights["rating"].sum() < len(part)
    assert prepared.part("train").weights == {}


def test_an_unknown_task(prepared):
    with pytest.raises(ValueError, match=r"Expected some of ctr, cvr, rating. Received: \['like'\]"):
        prepared.part("train", ("ctr", "like"))
