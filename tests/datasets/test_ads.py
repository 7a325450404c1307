# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from sklearn.metrics import roc_auc_score

from mvke_tf import datasets
from mvke_tf.data.preparation import prepare
from mvke_tf.datasets.ads import generator
from mvke_tf.datasets.ads.generator import FIRST_DAY, TOPICS, AdLog, World, read_truth, small_csv, write_tables
from mvke_tf.errors import DeclarationError

SETTINGS = AdLog(rows=40_000, users=1_000, ads=60, days=7)


def generated(settings: AdLog) -> tuple[World, pl.DataFrame, pl.DataFrame]:
    world = World(settings)
    blocks = list(world.rows())
    return world, pl.concat([block.log for block in blocks]), pl.concat([block.truth for block in blocks])


@pytest.fixture(scope="module")
def made():
    return generated(SETTINGS)


@pytest.fixture(scope="module")
def users(made):
    return pl.concat(list(made[0].users()))


def test_shape_of_the_log(made, users):
    world, log, truth = made
    assert log.height == truth.height == 40_000
    assert log.columns == ["ts", "user_id", "ad_id", "hour", "slot", "click", "install", "revenue"]
    assert log["ts"].is_sorted()
    days = pl.from_epoch(log["ts"], "s").dt
    assert (days.date().min(), days.date().n_unique()) == (FIRST_DAY, 7)
    assert (days.hour() == log["hour"]).all()
    assert set(log["user_id"]) <= set(users["user_id"]) and users["user_id"].n_unique() == len(users) == 1_000
    assert set(log["ad_id"]) <= set(world.ads["ad_id"]) and world.ads["ad_id"].n_unique() == len(world.ads) == 60
    # The busiest hour has more than ten times the rows of the quietest.
    by_hour = log["hour"].value_counts().sort("hour")["count"]
    assert by_hour[20] > 8 * by_hour[8]


def test_no_event_without_the_one_before(made):
    _, log, _ = made
    assert not log.filter((pl.col("install") == 1) & (pl.col("click") == 0)).height
    assert (log.filter(pl.col("install") == 0)["revenue"] == 0).all()
    assert (log.filter(pl.col("install") == 1)["revenue"] > 0).all()


def test_rates_are_those_of_the_settings(made):
    _, log, truth = made
    assert truth["click"].mean() == pytest.approx(SETTINGS.click_rate, abs=0.005)
    clicked = log["click"] == 1
    assert truth.filter(clicked)["install"].mean() == pytest.approx(SETTINGS.install_rate, abs=0.02)


def test_labels_are_draws_of_the_truth(made):
    """In each of ten bins of the true probability, positives differ from their expectation by chance only."""
    _, log, truth = made
    clicked = (log["click"] == 1).to_numpy()
    for task, rows in (("click", np.ones(len(log), bool)), ("install", clicked)):
        label, probability = log[task].to_numpy()[rows], truth[task].to_numpy()[rows].astype(float)
        for part in np.array_split(np.argsort(probability), 10):
            expected, deviation = probability[part].sum(), np.sqrt((probability * (1 - probability))[part].sum())
            assert abs(label[part].sum() - expected) < 4 * deviation
        assert 0.68 < roc_auc_score(label, probability) < 0.85
    installed = (log["install"] == 1).to_numpy()
    ratio = log["revenue"].to_numpy()[installed] / truth["revenue"].to_numpy()[installed]
    # Log-normal of variance 0.25: the ratio has mean 1 and standard deviation sqrt(exp(0.25) - 1).
    assert ratio.mean() == pytest.approx(1, abs=4 * np.sqrt((np.exp(0.25) - 1) / installed.sum()))
    assert ratio.std() == pytest.approx(np.sqrt(np.exp(0.25) - 1), abs=0.1)
    assert np.log(ratio).std() == pytest.approx(0.5, abs=0.05)


def test_users(made, users):
    assert users.schema["interests"] == pl.List(pl.String)
    assert (users["interests"].list.len() == users["interests_weight"].list.len()).all()
    assert users["interests"].list.n_unique().equals(users["interests"].list.len())
    assert set(users["interests"].explode().drop_nulls()) == set(TOPICS)
    assert users["interests"].list.len().max() == SETTINGS.interests + 1
    assert (users["age"] == -1).mean() == pytest.approx(0.1, abs=0.04)
    assert users.filter(pl.col("age") != -1)["age"].min() >= 14
    assert users["gender"].null_count() == pytest.approx(60, abs=35)
    # What is shown of the interests is mostly what they are.
    world, _, _ = made
    truly = [{TOPICS[topic] for topic in row} for row in world._interests]
    right = [len(truly[row] & set(shown)) for row, shown in enumerate(users["interests"])]
    assert np.mean(right) == pytest.approx(0.85 * SETTINGS.interests, abs=0.1)


def test_ads(made):
    ads = made[0].ads
    assert ads.schema["categories"] == pl.List(pl.String)
    assert set(ads["categories"].list.len()) == {1, 2}
    assert ads["categories"].list.n_unique().equals(ads["categories"].list.len())
    assert (ads["bid"] > 0).all()


def test_some_users_and_ads_are_new_in_the_last_days(made):
    _, log, _ = made
    day = (log["ts"] - log["ts"][0]) // 86_400
    for key, most in (("user_id", 0.3), ("ad_id", 0.3)):
        before = set(log.filter(day < 5)[key])
        late = log.filter(day >= 5)[key].unique()
        new = sum(value not in before for value in late) / len(late)
        assert 0.02 < new < most
    _, log, _ = generated(dataclasses.replace(SETTINGS, cold=0.0))
    assert log.filter((log["ts"] - log["ts"][0]) // 86_400 < 5)["ad_id"].n_unique() == log["ad_id"].n_unique()


def correlation_of_tasks(agreement: float) -> float:
    world = World(AdLog(rows=100, users=50, ads=500, agreement=agreement))
    return float(np.corrcoef(world._favours[0].ravel(), world._favours[1].ravel())[0, 1])


@pytest.mark.parametrize("agreement", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_agreement_is_a_correlation(agreement):
    assert correlation_of_tasks(agreement) == pytest.approx(agreement, abs=0.12)


def test_drift_moves_the_truth():
    def spread(drift: float) -> float:
        world, _, _ = generated(AdLog(rows=2_000, users=50, ads=20, days=14, drift=drift, signal=1.0))
        user, ad, zero = np.zeros(14, int), np.zeros(14, int), np.zeros(14, int)
        return float(np.ptp(world._logits(user, ad, np.arange(14.0), zero, zero)[0]))

    assert spread(0.0) == 0
    assert spread(0.5) > 0.4
    assert spread(1.0) == pytest.approx(2 * spread(0.5))


def test_one_interest_is_the_affinity_itself():
    world = World(AdLog(rows=100, users=40, ads=30, interests=1, drift=0.0, cold=0.0))
    user, ad = np.arange(30), np.arange(30)
    click = world._logits(user, ad, np.zeros(30), np.full(30, 14), np.ones(30, int))[0]
    affinity = world._favours[0][ad, world._interests[user, 0]]
    rest = world._quality[0][ad] + world._bias[user] + 0.2 * np.cos(np.pi / 2)
    assert click == pytest.approx(0.8 * affinity + rest, abs=1e-5)


def test_several_interests_are_a_smooth_maximum():
    world = World(AdLog(rows=100, users=40, ads=30, interests=4, drift=0.0, cold=0.0))
    user, ad = np.arange(30), np.arange(30)
    click = world._logits(user, ad, np.zeros(30), np.full(30, 14), np.ones(30, int))[0]
    expected = []
    for u, a in zip(user, ad, strict=True):
        total = sum(
            float(weight) * np.exp(3 * world._favours[0][a, topic])
            for topic, weight in zip(world._interests[u], world._weights[u], strict=True)
        )
        expected.append(0.8 * np.log(total) / 3 + world._quality[0][a] + world._bias[u])
    assert click == pytest.approx(np.array(expected), abs=1e-5)


def test_same_settings_same_log(made):
    assert_frame_equal(generated(SETTINGS)[1], made[1])
    other = generated(dataclasses.replace(SETTINGS, seed=1))[1]
    assert not other["user_id"].equals(made[1]["user_id"])


def test_blocks_of_one_day_follow_each_other(monkeypatch):
    monkeypatch.setattr(generator, "_BLOCK", 1_000)
    _, log, truth = generated(AdLog(rows=5_001, users=3_000, ads=20, days=2))
    assert log.height == truth.height == 5_001
    assert log["ts"].is_sorted()


def test_files(tmp_path):
    folder = write_tables(AdLog(rows=3_000, users=100, ads=20, days=3), tmp_path / "ads")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    days = ["2026-01-05.parquet", "2026-01-06.parquet", "2026-01-07.parquet"]
    assert names == [
        "ads.parquet",
        *(f"log/{day}" for day in days),
        "settings.json",
        *(f"truth/{day}" for day in days),
        "users.parquet",
    ]
    world, log, truth = generated(AdLog(rows=3_000, users=100, ads=20, days=3))
    found = read_truth(folder)
    assert_frame_equal(found.select(log.columns), log)
    assert_frame_equal(
        found.select("p_click", "p_install", "mean_revenue").rename(
            {"p_click": "click", "p_install": "install", "mean_revenue": "revenue"}
        ),
        truth,
    )
    assert_frame_equal(pl.read_parquet(folder / "users.parquet"), pl.concat(list(world.users())))
    assert not {"p_click", "truth"} & set(pl.read_parquet(folder / "log" / days[0]).columns)
    assert json.loads((folder / "settings.json").read_text())["rows"] == 3_000


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(self):
        yield next(iter(rows(self)))
        raise KeyboardInterrupt

    rows = World.rows
    monkeypatch.setattr(World, "rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tables(AdLog(rows=1_000, users=10, ads=10), tmp_path / "ads")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", 0), ("rows", 1.5), ("days", 0), ("interests", 9), ("agreement", -1.5), ("drift", -1), ("cold", 0.95)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(DeclarationError, match=f"Ad log: `{name}` must be from .* Received: {value}"):
        AdLog(**{name: value})


def test_declared_dataset(tmp_path):
    dataset = datasets.load("ads", tmp_path, rows=4_000, users=200, ads=30, days=5, data_seed=2)
    assert dataset.feature("user_id").bins == 1_024
    prepared = prepare(dataset)
    log = read_truth(dataset.folder)
    assert len(prepared) == 4_000
    assert prepared.task_names() == ("click", "install", "revenue")
    assert prepared.label("click").sum() == log["click"].sum()
    assert prepared.weight("revenue").sum() == log["install"].sum()
    installed = prepared.weight("revenue") > 0
    assert prepared.label("revenue")[installed].sum() == pytest.approx(
        np.log1p(log.filter(pl.col("install") == 1)["revenue"].to_numpy().astype(float)).sum(), rel=1e-5
    )
    schema = {feature.name: feature for feature in prepared.schema().features}
    assert (schema["interests"].length, schema["user_id"].vocabulary_size) == (8, 1_025)
    assert schema["bid"].width > 1
    assert datasets.load("ads", tmp_path, rows=4_000, users=200, ads=30, days=5, data_seed=2).folder == dataset.folder
    assert datasets.load("ads", tmp_path, rows=4_000, users=200, ads=30, days=5).folder != dataset.folder
    assert datasets.load("ads", tmp_path, rows=4_000, users=5_000).feature("user_id").bins == 32_768


def test_small_csv(tmp_path):
    path = small_csv(tmp_path / "ads.csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == (
        "time,user_id,age,gender,city,device,interests,hour,slot,ad_id,ad_title,advertiser,categories,bid,"
        "click,install,revenue"
    )
    assert len(lines) == 5_001
    table = pl.read_csv(path)
    assert table["user_id"].n_unique() == pytest.approx(250, abs=25)
    assert table["age"].null_count() > 100 and table["gender"].null_count() > 100
    assert table["click"].mean() == pytest.approx(0.25, abs=0.03)
    assert table["install"].sum() > 300
    assert table["time"].str.to_datetime("%Y-%m-%dT%H:%M:%SZ").is_sorted()
    weighted = table["interests"].drop_nulls()
    assert weighted.str.contains(r"^[a-z]+:\d\.\d\d(\|[a-z]+:\d\.\d\d)*$").all()
    assert table["categories"].str.contains(r"^[a-z]+(\|[a-z]+)?$").all()
    assert small_csv(tmp_path / "again.csv").read_bytes() == path.read_bytes()
    assert small_csv(tmp_path / "other.csv", seed=1).read_bytes() != path.read_bytes()
