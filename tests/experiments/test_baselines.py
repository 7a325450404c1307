# SPDX-License-Identifier: Apache-2.0
import itertools
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError, MissingExtraError
from mvke_tf.experiments import baselines
from mvke_tf.experiments.baselines import check_baseline, run_baseline, tabular_features
from mvke_tf.schema import WEIGHTS_SUFFIX
from tests.small import SMALL, small_prepared

pytestmark = pytest.mark.slow

TASKS, PARTS = ("click", "buy"), ("validation", "test")


@pytest.fixture(scope="module")
def prepared():
    weighted = {"features.recent_items.history": {"last": "item", "weights": "stars"}}
    return small_prepared(**weighted)


def test_popularity_counts_the_events_of_the_training_part(prepared):
    fitted = run_baseline("popularity", prepared, TASKS, PARTS)
    assert fitted.parameters == 2 * 30 and fitted.rounds == 0
    assert {"test", "test_warm_users", "test_cold_users"} < set(fitted.report)
    items = {part: prepared.item_row[prepared.part_rows(part)] for part in ("train", *PARTS)}
    labels = {task: {part: prepared.label(task)[prepared.part_rows(part)] for part in items} for task in TASKS}
    for task in TASKS:
        count = np.array([labels[task]["train"][items["train"] == item].sum() for item in range(30)])
        score = {part: np.log1p(count[items[part]]) for part in PARTS}
        validation = LogisticRegression(C=1e6).fit(score["validation"][:, None], labels[task]["validation"])
        slope = np.sign(validation.coef_[0, 0])
        metrics = fitted.report["test"][task]
        assert metrics["auc"] == pytest.approx(roc_auc_score(labels[task]["test"], slope * score["test"]))
        assert (metrics["rows"], metrics["positives"]) == (len(items["test"]), labels[task]["test"].sum())
    clicked = labels["click"]["test"] == 1
    expected = roc_auc_score(labels["buy"]["test"][clicked], slope * score["test"][clicked])
    assert fitted.report["test"]["buy"]["auc_given"] == pytest.approx(expected)


def test_features_are_those_of_the_towers_in_tabular_form(prepared):
    names, features, categorical = tabular_features(prepared)
    assert categorical == ["user", "country", "item"]
    table = pd.DataFrame(features(np.arange(len(prepared))), columns=names)
    users, items, user, item = prepared.users, prepared.items, prepared.user_row, prepared.item_row
    np.testing.assert_array_equal(table["age"], users.raw["age"][user])
    np.testing.assert_array_equal(table["mean_stars"], users.raw["mean_stars"][user])
    np.testing.assert_array_equal(table["popularity"], items.raw["popularity"][item])
    np.testing.assert_array_equal(table["user"], users.encoded["user"][user])
    # Shares of tags sum to 1 where there is one, and follow the encoding of the tag.
    index = 1 + prepared.encoder.state["tags"].index("news")
    flags = (items.raw["tags"] == "news") & (items.raw["tags" + WEIGHTS_SUFFIX] > 0)
    tags = (items.raw["tags" + WEIGHTS_SUFFIX] > 0).sum(axis=1)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(table[f"tags_{index}"], (flags.sum(axis=1) / tags)[item], rtol=1e-6)
    # The mean year of the recent items, weighted by stars, by hand for one state with a history.
    filled = users.raw["recent_items" + WEIGHTS_SUFFIX] > 0
    row = int(np.flatnonzero(filled[user].sum(axis=1) >= 2)[0])
    chosen = filled[user[row]]
    ids = users.raw["recent_items"][user[row]][chosen]
    stars = users.raw["recent_items" + WEIGHTS_SUFFIX][user[row]][chosen]
    years = np.array([np.nan if name == "i06" else 1990 + int(name[1:]) for name in ids])
    known = np.isfinite(years)
    assert table["recent_items_year"][row] == pytest.approx(np.average(years[known], weights=stars[known]))
    assert table["recent_items_length"][row] == len(years)
    assert table["recent_items_mean_weight"][row] == pytest.approx(stars.mean())
    assert table.loc[table["recent_items_length"] == 0, "recent_items_year"].isna().all()


def test_training_rows_become_unknown_as_for_the_networks(prepared):
    names, features, categorical = tabular_features(prepared)
    table = features(np.tile(prepared.part_rows("train"), 20))
    before = table.copy()
    baselines._make_unknown(prepared, names, table, categorical, np.random.default_rng(0))
    changed = pd.DataFrame(~np.isclose(before, table, equal_nan=True), columns=names)
    known = before[:, names.index("user")] > 0
    assert (table[known, names.index("user")] == 0).mean() == pytest.approx(0.5, abs=0.03)
    assert changed["age"].mean() == pytest.approx(0.05, abs=0.02)
    # An item becomes new as a whole.
    assert (changed["item"] >= changed["popularity"]).all() and changed["popularity"].any()
    assert not changed[[name for name in names if "tags" in name or "items" in name]].any(axis=None)


def test_lightgbm_learns_and_repeats_itself(prepared, monkeypatch):
    # Leaves of 20 rows leave little to learn in a part of 336.
    monkeypatch.setitem(baselines.LIGHTGBM, "min_data_in_leaf", 5)
    monkeypatch.setattr(baselines, "ROUNDS", 30)
    first, again, other = (fitted("lightgbm", prepared, ("train", "test"), seed) for seed in (0, 0, 1))
    assert first == again
    assert first.report != other.report
    assert first.report["train"]["click"]["auc"] > 0.65
    assert set(first.report["test"]["buy"]) == {*first.report["test"]["click"], "auc_given"}
    assert 2 <= first.rounds <= 60 and first.parameters > first.rounds
    assert set(first.settings) == set(TASKS)
    assert all(set(settings) == {"learning_rate", "num_leaves", "ids"} for settings in first.settings.values())


def test_lightgbm_takes_the_settings_that_are_best_by_validation(prepared, monkeypatch):
    monkeypatch.setitem(baselines.LIGHTGBM, "min_data_in_leaf", 5)
    monkeypatch.setattr(baselines, "ROUNDS", 30)
    parts = ("validation", "test")
    chosen = run_baseline("lightgbm", prepared, TASKS, parts)
    monkeypatch.setattr(baselines, "LIGHTGBM_TRIALS", 1)
    alone = []
    for values in itertools.product(*baselines.LIGHTGBM_SPACE.values()):
        space = {name: (value,) for name, value in zip(baselines.LIGHTGBM_SPACE, values, strict=True)}
        monkeypatch.setattr(baselines, "LIGHTGBM_SPACE", space)
        alone.append(run_baseline("lightgbm", prepared, TASKS, parts))
    for task in TASKS:
        same = [one for one in alone if one.settings[task] == chosen.settings[task]]
        assert len(same) == 1
        assert all(same[0].report[part][task] == chosen.report[part][task] for part in parts)
        scores = sorted((one.report["validation"][task]["auc"] for one in alone), reverse=True)
        # Six of twelve were tried: the best of them is among the best seven of all.
        assert chosen.report["validation"][task]["auc"] >= scores[6]
    assert all(
        one.settings["click"]["ids"] != two.settings["click"]["ids"]
        for one, two in zip(alone[::2], alone[1::2], strict=True)
    )
    assert all(one.report != two.report for one, two in zip(alone[::2], alone[1::2], strict=True))


def test_target_attention_keeps_its_best_epoch_and_repeats_itself(prepared):
    parts = ("train", "validation", "test")
    stopped = fitted("target_attention", prepared, parts, epochs=20, patience=2)
    assert 3 <= stopped.rounds < 20
    best = fitted("target_attention", prepared, parts, epochs=stopped.rounds - 2)
    assert stopped.report == best.report
    assert stopped.report["train"]["click"]["auc"] > 0.55
    assert stopped.report != fitted("target_attention", prepared, parts, seed=1, epochs=best.rounds).report
    assert stopped.parameters == best.parameters > 1000


def fitted(name, prepared, parts, seed=0, **training):
    config = RunConfig(
        ModelConfig(embedding_dim=4, hidden_dims=(8,), objective=training.pop("objective", "")),
        TrainingConfig(**{"batch_size": 16, "learning_rate": 0.003, "patience": 0, "seed": seed, **training}),
    )
    return run_baseline(name, prepared, TASKS, parts, config)


def test_target_attention_learns_purchases_given_clicks(prepared):
    joint = fitted("target_attention", prepared, ("test",), epochs=2, objective="joint")
    marginal = fitted("target_attention", prepared, ("test",), epochs=2)
    assert joint.report["test"]["click"]["auc"] != marginal.report["test"]["click"]["auc"]
    with pytest.raises(ConfigError, match=r"Received: \{'loss_weighting': 'famo', 'objective': 'conditional'\}"):
        fitted("target_attention", prepared, ("test",), objective="conditional", loss_weighting="famo")


@pytest.mark.parametrize("which", ["none", "all"])
def test_ids_are_tried_only_where_there_is_a_choice(prepared, monkeypatch, which):
    monkeypatch.setattr(baselines, "ROUNDS", 5)
    names, *_ = tabular_features(prepared)
    monkeypatch.setattr(baselines, "_ids", lambda _: set() if which == "none" else set(names))
    chosen = run_baseline("lightgbm", prepared, TASKS, ("test",))
    assert all(settings["ids"] is True for settings in chosen.settings.values())


def test_ids_are_the_keys_of_the_declaration(prepared):
    assert baselines._ids(prepared) == {"user", "item"}
    # Without items the field of their side is made up, and no feature is an id.
    alone = {"keys": {}, "negatives": {}, "groups": {}, "tables": {}, "features": {"age": SMALL["features"]["age"]}}
    assert baselines._ids(small_prepared(**alone, tasks={"click": {"label": "clicked"}})) == set()


def test_what_cannot_be_fitted_is_explained(prepared, monkeypatch):
    with pytest.raises(ConfigError, match=r"binary tasks; leave it or the task out. Received: 'stars'"):
        check_baseline("popularity", prepared, ("click", "stars"))
    with pytest.raises(
        ConfigError, match=r"Expected one of \['lightgbm', 'popularity', 'target_attention'\]. Received: 'mvke'"
    ):
        check_baseline("mvke", prepared, TASKS)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mvke_tf\[compare\]'"):
        check_baseline("lightgbm", prepared, TASKS)
