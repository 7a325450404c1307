import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mvke_tf import baselines
from mvke_tf.baselines import check_baseline, run_baseline, tabular_features
from mvke_tf.config import DataConfig
from mvke_tf.data.movielens import GENRES
from mvke_tf.data.prepared import prepare
from mvke_tf.schema import WEIGHTS_SUFFIX
from tests.conftest import random_movielens

TASKS, PARTS = ("ctr", "cvr"), ("validation", "test")


@pytest.fixture(scope="module")
def prepared():
    return prepare(random_movielens(), DataConfig(history_length=5))


def test_popularity_counts_the_events_of_the_training_part(prepared):
    fitted = run_baseline("popularity", prepared, TASKS, PARTS)
    assert fitted.parameters == 2 * 30 and fitted.rounds == 0
    assert {"test", "test_warm_users", "test_cold_users"} < set(fitted.report)
    parts = [prepared.pairs.iloc[prepared.part_rows(part)] for part in ("train", *PARTS)]
    for task in TASKS:
        count = parts[0][parts[0][task] == 1].groupby("item_row").size()
        train, validation, test = (np.log1p(part["item_row"].map(count).fillna(0).to_numpy()) for part in parts)
        slope = LogisticRegression(C=1e6).fit(validation[:, None], parts[1][task]).coef_[0, 0]
        metrics = fitted.report["test"][task]
        assert metrics["auc"] == pytest.approx(roc_auc_score(parts[2][task], np.sign(slope) * test))
        assert (metrics["rows"], metrics["positives"]) == (len(test), parts[2][task].sum())
        assert len(train) > len(test)
    clicked = (parts[2]["ctr"] == 1).to_numpy()
    expected = roc_auc_score(parts[2]["cvr"][clicked], np.sign(slope) * test[clicked])
    assert fitted.report["test"]["cvr"]["auc_clicked"] == pytest.approx(expected)


def test_features_are_those_of_the_towers_in_tabular_form(prepared):
    names, features, categorical = tabular_features(prepared)
    assert categorical == ["user_id", "gender", "occupation", "item_id"]
    table = pd.DataFrame(features(np.arange(len(prepared.pairs))), columns=names)
    user, item = (prepared.pairs[name].to_numpy() for name in ("user_row", "item_row"))
    raw, encoded = prepared.raw, prepared.encoded
    np.testing.assert_array_equal(table["age"], raw["user"]["age"][user])
    np.testing.assert_array_equal(table["mean_rating"], raw["user"]["mean_rating"][user])
    np.testing.assert_array_equal(table["popularity"], raw["item"]["popularity"][item])
    np.testing.assert_array_equal(table["user_id"], encoded["user"]["user_id"][user])
    # Shares of genres sum to 1 where there is one, and follow the encoding of the genre.
    index = dict(zip(prepared.encoder.state["genres"], range(1, 99), strict=False))
    genre = next(genre for genre in GENRES if genre in index)
    flags = raw["item"]["genres" + WEIGHTS_SUFFIX][item]
    np.testing.assert_allclose(table[f"genres_{index[genre]}"], flags[:, GENRES.index(genre)] / flags.sum(axis=1))
    # The mean release year of the last rated films, weighted by rating, by hand for one state with a history.
    row = int(np.flatnonzero((raw["user"]["recent_items" + WEIGHTS_SUFFIX][user] > 0).sum(axis=1) >= 2)[0])
    films, ratings = (raw["user"][name][user[row]] for name in ("recent_items", "recent_items" + WEIGHTS_SUFFIX))
    years = [1960 + film for film, rating in zip(films, ratings, strict=True) if rating]
    assert table["recent_items_release_year"][row] == pytest.approx(np.average(years, weights=ratings[ratings > 0]))
    assert table["recent_items_length"][row] == len(years)
    assert table["recent_items_mean_weight"][row] == pytest.approx(ratings[ratings > 0].mean())
    assert table.loc[table["recent_items_length"] == 0, "recent_items_release_year"].isna().all()


def test_training_rows_become_unknown_as_for_the_networks(prepared):
    names, features, categorical = tabular_features(prepared)
    table = features(np.tile(prepared.part_rows("train"), 20))
    before = table.copy()
    baselines._make_unknown(prepared, names, table, categorical, np.random.default_rng(0))
    changed = pd.DataFrame(~np.isclose(before, table, equal_nan=True), columns=names)
    assert (table[:, names.index("user_id")] == 0).mean() == pytest.approx(0.9, abs=0.02)
    assert changed["age"].mean() == pytest.approx(0.05, abs=0.02)
    # An item becomes new as a whole.
    assert (changed["item_id"] >= changed["popularity"]).all() and changed["popularity"].any()
    assert not changed[[name for name in names if "genres" in name or "items" in name]].any(axis=None)


def test_lightgbm_learns_and_repeats_itself(prepared, monkeypatch):
    # Leaves of 20 rows leave little to learn in a part of 336.
    monkeypatch.setitem(baselines.LIGHTGBM, "min_data_in_leaf", 5)
    monkeypatch.setattr(baselines, "ROUNDS", 30)
    first, again, other = (run_baseline("lightgbm", prepared, TASKS, ("train", "test"), seed) for seed in (0, 0, 1))
    assert first == again
    assert first.report != other.report
    assert first.report["train"]["ctr"]["auc"] > 0.7
    assert set(first.report["test"]["cvr"]) == {*first.report["test"]["ctr"], "auc_clicked"}
    assert 2 <= first.rounds <= 60 and first.parameters > first.rounds


def test_what_cannot_be_fitted_is_explained(prepared, monkeypatch):
    with pytest.raises(ValueError, match=r"binary tasks; leave it or the task out. Received: 'rating'"):
        check_baseline("popularity", prepared, ("ctr", "rating"))
    with pytest.raises(ValueError, match=r"Expected one of \['lightgbm', 'popularity'\]. Received: 'mvke'"):
        check_baseline("mvke", prepared, TASKS)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[compare\]'"):
        check_baseline("lightgbm", prepared, TASKS)
