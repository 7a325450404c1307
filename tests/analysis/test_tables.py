# SPDX-License-Identifier: Apache-2.0
import dataclasses
import sys
import types

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from mvke_tf.analysis import (
    Grouping,
    Study,
    Thresholds,
    analyze_expert_weights,
    contribution_shares,
    expert_similarity,
    field_attention,
    gate_effect,
    gate_entropy,
    gate_weights,
    item_map,
    kernel_cards,
    kernel_similarity,
    utilisation,
)
from mvke_tf.analysis.tables import MOST_POINTS
from mvke_tf.data.batches import Interactions
from mvke_tf.data.groups import groups
from mvke_tf.errors import ConfigError, MissingExtraError
from mvke_tf.inference.gates import entropy_bits
from mvke_tf.metrics import auc
from mvke_tf.schema import Task
from tests.analysis.conftest import set_gate
from tests.models.problems import ITEMS, PAIRS, SCHEMA, USERS

TABLES_OF_CARDS = (gate_weights, contribution_shares)
SEVERAL = SCHEMA.with_tasks((Task("ctr"), Task("cvr", given="ctr"), Task("rating", "regression", offset=3.5)))


def weight_of(frame, task, group="all"):
    rows = frame[(frame["task"] == task) & (frame["group"] == group)]
    return rows.set_index("expert")["mean_weight"].to_dict()


@pytest.mark.parametrize("name", ["mvke", "mmoe"])
def test_weights_of_groups_are_means_over_their_impressions(make_model, pairs, name):
    study = Study(make_model(name), pairs)
    side = {"mvke": "item", "mmoe": "user"}[name]
    genres = Grouping("genre", "item", ("a", "b"), np.array([[1, 0], [1, 1], [0, 0]], bool))
    ages = Grouping.of_labels("age", "user", ["old", "young", "old", "none"], ["young", "old"])
    frame = gate_weights(study, [genres, ages])
    for task, gate in study.gates.items():
        weights = gate.weights[study.rows(side)]
        chosen = {
            "all": np.ones(7, bool),
            "a": np.isin(pairs.item_rows, [0, 1]),
            "b": pairs.item_rows == 1,
            "young": pairs.user_rows == 1,
            "old": np.isin(pairs.user_rows, [0, 2]),
        }
        for group, inside in chosen.items():
            rows = frame[(frame["task"] == task) & (frame["group"] == group)]
            assert rows["expert"].tolist() == list(gate.experts)
            np.testing.assert_allclose(rows["mean_weight"], weights[inside].mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(
                rows["strongest"], (weights == weights.max(axis=1, keepdims=True))[inside].mean(axis=0)
            )
            assert set(rows["impressions"]) == {inside.sum()}
    sums = frame.groupby(["task", "variable", "group"])["mean_weight"].sum()
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)


def test_a_group_without_impressions_has_no_row(make_model, pairs):
    nobody = Grouping.of_labels("age", "user", ["old"] * 4, ["young", "old"])
    assert set(gate_weights(Study(make_model("mvke"), pairs), [nobody])["group"]) == {"all", "old"}


def test_a_grouping_of_other_rows_is_an_error(make_model, pairs):
    study = Study(make_model("mvke"), pairs)
    for side, rows in (("item", 3), ("user", 4)):
        with pytest.raises(ValueError, match=rf"a row for each {side} of the data, {rows}. Received: 2"):
            gate_weights(study, [Grouping.of_labels("x", side, ["a", "b"])])


def test_entropy_and_use_of_a_known_gate(make_model, pairs):
    model = make_model("mmoe")
    set_gate(model, "ctr", np.log([0.5, 0.25, 0.125, 0.125]))
    set_gate(model, "cvr", np.zeros(4))
    study = Study(model, pairs)
    entropy = gate_entropy(study).set_index("task")
    assert entropy.loc["ctr", "impression_entropy_bits"] == pytest.approx(1.75, abs=1e-6)
    assert entropy.loc["ctr", "mean_weight_entropy_share"] == pytest.approx(0.875, abs=1e-6)
    assert entropy.loc["ctr", "information_bits"] == pytest.approx(0.0, abs=1e-6)
    assert entropy.loc["cvr", "impression_entropy_share"] == pytest.approx(1.0)
    assert entropy.loc["ctr", ["experts", "impressions"]].tolist() == [4, 7]
    used = utilisation(study)
    assert used["mean_weight"].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125, *[0.25] * 4], abs=1e-6)
    # Ties count in parts.
    assert used["strongest"].tolist() == [1, 0, 0, 0, *[0.25] * 4]
    assert used["equal_share"].unique().tolist() == [0.25] and not used["dead"].any()
    assert utilisation(study, Thresholds(dead_weight=0.6))["dead"].tolist() == [False, False, True, True, *[False] * 4]


def test_a_gate_that_always_chooses_another_expert_carries_all_information(make_model, pairs):
    study = Study(make_model("mvke"), pairs)
    gate = study.gates["ctr"] = dataclasses.replace(study.gates["ctr"], experts=(0, 1), weights=np.eye(2)[[0, 1, 1]])
    row = gate_entropy(study).set_index("task").loc["ctr"]
    share = study.impressions("item")[0] / 7
    expected = entropy_bits([share, 1 - share])
    assert gate.side == "item" and row["impression_entropy_bits"] == 0.0
    assert row["information_bits"] == pytest.approx(expected) == row["mean_weight_entropy_bits"]


def test_field_attention_is_the_mean_over_impressions(make_model, pairs):
    model = make_model("mvke")
    attention = model.field_attention
    scores = np.asarray(attention({name: PAIRS[name] for name in attention.input}), np.float64)
    frame = field_attention(Study(model, pairs))
    assert frame["field"].tolist() == ["user_id", "age", "history"] * 3
    np.testing.assert_allclose(frame["mean_attention"], scores.mean(axis=0).T.ravel(), atol=1e-6)
    np.testing.assert_allclose(frame["deviation"], scores.std(axis=0).T.ravel(), atol=1e-6)
    entropy = entropy_bits(scores.transpose(0, 2, 1)).mean(axis=0) / np.log2(3)
    np.testing.assert_allclose(frame["entropy_share"], np.repeat(entropy, 3), atol=1e-6)
    assert frame.groupby("kernel")["mean_attention"].sum().tolist() == pytest.approx([1.0] * 3)


def test_similarity_of_experts(make_model, pairs):
    study = Study(make_model("mmoe"), pairs)
    random = np.random.default_rng(0)
    first = random.normal(size=(4, 8))
    rotation = np.linalg.qr(random.normal(size=(8, 8)))[0]
    # A copy; a scaled, shifted copy; a rotation; one that never changes.
    study.expert_outputs = np.stack([first, 3.0 * first + 1.0, first @ rotation, np.ones((4, 8))], axis=1)
    frame = expert_similarity(study)
    cka = frame.pivot(index="expert_a", columns="expert_b", values="cka").to_numpy()
    correlation = frame.pivot(index="expert_a", columns="expert_b", values="correlation").to_numpy()
    np.testing.assert_allclose(cka[:3, :3], 1.0)
    assert correlation[0, 1] == pytest.approx(1.0) and abs(correlation[0, 2]) < 0.6
    assert np.isnan(cka[3]).all() and np.isnan(correlation[:, 3]).all()
    # By hand, with a row per impression.
    rows = first[pairs.user_rows] - first[pairs.user_rows].mean(axis=0)
    turned = rows @ rotation
    expected = np.sum(rows * turned) / np.sqrt(np.sum(rows**2) * np.sum(turned**2))
    assert correlation[0, 2] == pytest.approx(expected)


def test_cka_of_independent_outputs_by_hand(make_model, pairs):
    study = Study(make_model("mmoe"), pairs)
    outputs = np.random.default_rng(1).normal(size=(4, 2, 3))
    study.expert_outputs = outputs
    a, b = (outputs[pairs.user_rows, expert] - outputs[pairs.user_rows, expert].mean(axis=0) for expert in (0, 1))
    norm = np.linalg.norm
    expected = norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b))
    assert expert_similarity(study)["cka"][1] == pytest.approx(expected)


def test_similarity_of_kernels(make_model):
    model = make_model("mvke")
    model.get_layer("virtual_kernels").kernels.assign(np.eye(3, 8) + np.eye(3, 8)[[0, 0, 2]])
    frame = kernel_similarity(model)
    np.testing.assert_allclose(frame["cosine"].to_numpy().reshape(3, 3)[0], [1, 2**-0.5, 0], atol=1e-6)
    np.testing.assert_allclose(frame["norm_a"].to_numpy()[::3], [2, 2**0.5, 2], atol=1e-6)
    with pytest.raises(ValueError, match="Only MVKE has virtual kernels"):
        kernel_similarity(make_model("mmoe"))


def test_the_map_is_the_pca_of_the_tags_with_the_kernels_in_it(run_study):
    frame = item_map(run_study, names=[f"Item {row}" for row in range(30)])
    for task, kernels in (("click", [0, 1, 2]), ("buy", [1, 2, 3, 4])):
        rows = frame[frame["task"] == task]
        items, placed = rows[rows["kind"] == "item"], rows[rows["kind"] == "kernel"]
        assert placed["row"].tolist() == kernels and placed["label"].tolist() == [f"kernel {k}" for k in kernels]
        assert items["row"].tolist() == list(range(30)) and items["label"].tolist()[:2] == ["Item 0", "Item 1"]
        assert items["impressions"].sum() == len(run_study)
        tags = run_study.tags[task].astype(float)
        centred = tags - tags.mean(axis=0)
        distance = np.linalg.norm(centred @ np.linalg.svd(centred)[2][:2].T, axis=1)
        np.testing.assert_allclose(np.hypot(items["x"], items["y"]), distance, rtol=1e-3, atol=1e-5)
        plane = PCA(2, svd_solver="full").fit(tags)
        table = run_study.model.virtual_kernels[kernels]
        np.testing.assert_allclose(placed[["x", "y"]], plane.transform(table), rtol=1e-3, atol=1e-4)
        assert rows["share_x"].iloc[0] == pytest.approx(plane.explained_variance_ratio_[0], rel=1e-4)


def test_the_map_shows_the_catalogue(make_model, pairs):
    frame = item_map(Study(make_model("hard_sharing"), pairs, catalogue=np.array([0, 2])), names=["a", "b", "c"])
    assert frame["kind"].tolist() == ["item"] * 4
    assert frame["row"].tolist() == [0, 2] * 2 and frame["label"].tolist() == ["a", "c"] * 2
    counts = np.bincount(pairs.item_rows)
    assert frame["impressions"].tolist() == [counts[0], counts[2]] * 2
    with pytest.raises(ValueError, match=r"at least two items to map. Received: 1"):
        item_map(Study(make_model("hard_sharing"), pairs, catalogue=np.array([1])))


def test_a_map_of_equal_or_narrow_tags(make_model, pairs):
    study = Study(make_model("hard_sharing"), pairs)
    study.tags = {"ctr": np.ones((3, 4), "float32"), "cvr": np.array([[1.0], [2.0], [4.0]], "float32")}
    frame = item_map(study).set_index("task")
    assert (frame.loc["ctr", ["x", "y"]] == 0).all(axis=None) and frame.loc["ctr", "share_x"].isna().all()
    assert frame.loc["cvr", "x"].diff().abs().tolist()[1:] == pytest.approx([1, 2])
    assert frame.loc["cvr", "share_x"].tolist() == pytest.approx([1.0] * 3)


def test_a_large_catalogue_shows_the_items_with_the_most_impressions(make_model, pairs, monkeypatch):
    assert MOST_POINTS >= 10_000
    monkeypatch.setattr("mvke_tf.analysis.tables.MOST_POINTS", 2)
    counts = np.bincount(pairs.item_rows)
    frame = item_map(Study(make_model("hard_sharing"), pairs))
    assert frame["row"].tolist() == sorted(np.argsort(-counts, kind="stable")[:2].tolist()) * 2


def test_other_maps(run_study, monkeypatch):
    first, second = (item_map(run_study, "tsne", seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert np.isfinite(first[["x", "y"]]).all().all() and first["share_x"].isna().all() and first["x"].std() > 0

    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mvke_tf\[umap\]'"):
        item_map(run_study, "umap")
    calls = []

    class UMAP:
        def __init__(self, **settings):
            calls.append(settings)

        def fit_transform(self, points):
            return points[:, :2] * 2

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    frame = item_map(run_study, "umap", seed=7)
    assert [call["random_state"] for call in calls] == [7, 7]
    np.testing.assert_allclose(frame["x"][:30], 2 * run_study.tags["click"][:, 0])
    with pytest.raises(ConfigError, match=r"one of pca, tsne, umap. Received: 'lda'"):
        item_map(run_study, "lda")


@pytest.mark.parametrize("name", ["mvke", "mmoe"])
def test_effect_of_the_gate_and_of_each_expert(make_model, pairs, name):
    model = make_model(name)
    study = Study(model, pairs)
    frame = gate_effect(study)
    for task, gate in study.gates.items():
        rows = frame[frame["task"] == task].set_index("change")
        logits = np.asarray(model(PAIRS)[task])[:, 0]
        assert rows.loc["as trained", "value"] == pytest.approx(auc(pairs.labels[task], logits))
        weights = gate.weights[study.rows(gate.side)]
        scores = study.scores[task]
        mean = (scores * weights.mean(axis=0)).sum(axis=1)
        assert rows.loc["mean weights", "value"] == pytest.approx(auc(pairs.labels[task], mean))
        rest = np.delete(weights, 1, axis=1)
        without = (np.delete(scores, 1, axis=1) * rest).sum(axis=1) / rest.sum(axis=1)
        removed = rows.loc[f"without expert {gate.experts[1]}"]
        assert removed["value"] == pytest.approx(auc(pairs.labels[task], without))
        assert removed["difference"] == pytest.approx(removed["value"] - rows.loc["as trained", "value"])
        assert len(rows) == 2 + len(gate.experts)


def test_a_gate_that_does_not_choose_loses_nothing_by_its_mean(make_model, pairs):
    model = make_model("mmoe")
    for task in ("ctr", "cvr"):
        set_gate(model, task, [30.0, 0.0, 0.0, 0.0])
    frame = gate_effect(Study(model, pairs)).set_index(["task", "change"])
    assert frame.loc[("ctr", "mean weights"), "difference"] == 0.0
    # The others take over in equal parts where the removed expert had everything.
    assert np.isfinite(frame.loc[("ctr", "without expert 0"), "value"])


def test_effect_on_regression_and_on_what_comes_after(make_model, pairs):
    model = make_model("mvke", SEVERAL)
    ratings = np.array([1, 5, np.nan, 3, 2, 4, np.nan])
    data = dataclasses.replace(pairs, labels={**pairs.labels, "rating": ratings})
    frame = gate_effect(Study(model, data)).set_index(["task", "change"])
    outputs = model(PAIRS)
    known = np.isfinite(ratings)
    rmse = np.sqrt(np.mean((np.asarray(outputs["rating"])[known, 0] - ratings[known]) ** 2))
    assert frame.loc[("rating", "as trained"), ["metric", "impressions"]].tolist() == ["rmse", 5]
    assert frame.loc[("rating", "as trained"), "value"] == pytest.approx(rmse, rel=1e-5)
    expected = auc(pairs.labels["cvr"], np.asarray(outputs["cvr"])[:, 0])
    assert frame.loc[("cvr", "as trained"), "value"] == pytest.approx(expected)


@pytest.mark.slow
def test_effect_on_a_transformed_regression_is_in_the_unit_of_the_label(make_model, pairs):
    schema = SCHEMA.with_tasks((Task("ctr"), Task("spent", "regression", offset=0.7, transform="log1p")))
    model, spent = make_model("mvke", schema), np.array([0.0, 1.0, 2.0, 3.0, 0.0, 9.0, 1.0])
    data = dataclasses.replace(pairs, labels={"ctr": pairs.labels["ctr"], "spent": np.log1p(spent)})
    frame = gate_effect(Study(model, data)).set_index(["task", "change"])
    predicted = np.expm1(np.asarray(model(PAIRS)["spent"], float)[:, 0])
    expected = np.sqrt(np.mean((predicted - spent) ** 2))
    assert frame.loc[("spent", "as trained"), "value"] == pytest.approx(expected, rel=1e-4)


def test_tasks_without_labels_have_no_effect(make_model, pairs):
    unlabelled = dataclasses.replace(pairs, labels={})
    frame = gate_effect(Study(make_model("mvke"), unlabelled))
    assert frame.empty and "difference" in frame


def known_study(make_model, many, catalogue):
    """Items 0, 1, 2 have 300, 200, 200 impressions; the gate of ctr and the scores of its two experts are known."""
    study = Study(make_model("mvke"), many, catalogue=np.array(catalogue))
    gate = study.gates["ctr"]
    assert gate.counts.tolist() == [300, 200, 200]
    study.gates = {"ctr": dataclasses.replace(gate, experts=(0, 2), weights=np.array([[0.2, 0.8], [0.9, 0.1], [1, 0]]))}
    # The first expert has the opposite sign for user 1, and three times the size.
    study.scores = {"ctr": np.where((study.user_rows == 1)[:, None], [-3.0, 1.0], [1.0, 1.0])}
    return study


def test_shares_of_groups_are_means_over_their_impressions(make_model, many):
    study = known_study(make_model, many, [0, 1, 2])
    kinds = Grouping("kind", "item", ("a", "b", "none"), np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]], bool))
    frame = contribution_shares(study, [kinds, Grouping.of_labels("user", "user", ["u0", "u1", "u2", "u3"])])
    by_pair = []
    for user, item in zip(many.user_rows.tolist(), many.item_rows.tolist(), strict=True):
        weights, scores = {0: (0.2, 0.8), 1: (0.9, 0.1), 2: (1.0, 0.0)}[item], (3, 1) if user == 1 else (1, 1)
        sizes = [weight * score for weight, score in zip(weights, scores, strict=True)]
        by_pair.append((user, item, sizes[0] / sum(sizes)))
    inside = {
        ("all", "all", "all"): lambda user, item: True,
        ("item", "kind", "a"): lambda user, item: item == 0,
        ("item", "kind", "b"): lambda user, item: item > 0,
        **{("user", "user", f"u{number}"): lambda user, item, number=number: user == number for number in range(4)},
    }
    for key, chosen in inside.items():
        values = [share for user, item, share in by_pair if chosen(user, item)]
        rows = frame[(frame["side"] == key[0]) & (frame["variable"] == key[1]) & (frame["group"] == key[2])]
        assert rows["expert"].tolist() == [0, 2] and set(rows["impressions"]) == {len(values)}
        expected = sum(values) / len(values)
        assert rows["mean_share"].tolist() == pytest.approx([expected, 1 - expected])
    # A group without impressions has no row.
    assert len(frame) == 2 * len(inside)
    with pytest.raises(ValueError, match=r"a row for each item of the data, 3. Received: 2"):
        contribution_shares(study, [Grouping.of_labels("x", "item", ["a", "b"])])


def test_cards_of_a_known_gate(make_model, many):
    study = known_study(make_model, many, [0, 1])
    mean = (0.2 * 300 + 0.9 * 200 + 200) / 700
    groupings = [
        Grouping("kind", "item", ("a", "b", "c"), np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1]], bool)),
        Grouping.of_labels("user", "user", ["u0", "u1", "u2", "u3"]),
    ]
    weights, shares = gate_weights(study, groupings), contribution_shares(study, groupings)
    similarity = pd.DataFrame({"expert_a": [0, 0, 2, 2], "expert_b": [0, 2, 0, 2], "cka": [1, 0.5, 0.5, 1]})
    effect = pd.DataFrame({"task": "ctr", "expert": [-1, 0, 2], "metric": "auc", "difference": [0.0, -0.02, 0.01]})
    cards = kernel_cards(study, weights, shares, ["i0", "i1", "i2"], similarity, effect)
    first, second = cards.to_dict("records")
    assert (first["task"], first["expert"], first["strongest"]) == ("ctr", 0, pytest.approx(4 / 7))
    assert first["mean_weight"] == pytest.approx(mean) and (first["metric"], first["difference"]) == ("auc", -0.02)
    assert (first["most_similar"], first["cka"]) == (2, 0.5) and second["most_similar"] == 0
    # Item 2 is not in the catalogue; the groups b (0.95) and c (1.00) are above the mean of 0.63, and a is below.
    assert first["items"] == (f"i1 (0.90, {0.9 / mean:.1f}x)",)
    assert second["items"] == (f"i0 (0.80, {0.8 / (1 - mean):.1f}x)",)
    assert first["item_groups"] == (f"kind c (1.00, {1 / mean:.1f}x)", f"kind b (0.95, {0.95 / mean:.1f}x)")
    assert second["item_groups"] == (f"kind a (0.80, {0.8 / (1 - mean):.1f}x)",)
    # Of users the share of the output counts: their weights come from the mix of items alone.
    users = shares[(shares["variable"] == "user") & (shares["expert"] == 0)].set_index("group")["mean_share"]
    share = shares.loc[(shares["variable"] == "all") & (shares["expert"] == 0), "mean_share"].item()
    assert first["mean_share"] == pytest.approx(share) and second["mean_share"] == pytest.approx(1 - share)
    above = users[users >= share + 0.05].sort_values(ascending=False)
    assert first["user_groups"] == tuple(
        f"user {user} ({value:.2f}, {value / share:.1f}x)" for user, value in above.items()
    )
    assert 0 < len(above) < 4
    assert (kernel_cards(study, weights)[["items", "user_groups"]].map(len) == 0).all(axis=None)


def test_cards_of_a_gate_that_reads_the_user(make_model, many):
    study = Study(make_model("mmoe"), many)
    set_gate(study.model, "ctr", np.log([0.4, 0.3, 0.2, 0.1]))
    weights, shares = (make(study, [Grouping.of_labels("user", "user", list("abcd"))]) for make in TABLES_OF_CARDS)
    cards = kernel_cards(study, weights, shares, ["i0", "i1", "i2"]).query("task == 'ctr'").set_index("expert")
    # The same weights for every user, so that no user raises one; items do, by their share of the output.
    assert cards["mean_weight"].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-6)
    assert (cards["user_groups"].map(len) == 0).all()
    share = pd.DataFrame(study.contribution_shares["ctr"]).groupby(many.item_rows).mean()
    overall = study.contribution_shares["ctr"].mean(axis=0)
    for expert in range(4):
        above = share[expert][share[expert] >= overall[expert] + 0.1 / 4].sort_values(ascending=False)
        texts = tuple(f"i{item} ({value:.2f}, {value / overall[expert]:.1f}x)" for item, value in above.items())
        assert cards.loc[expert, "items"] == texts
    assert cards["items"].map(len).sum() > 0


def test_cards_leave_out_small_groups_rare_items_and_what_is_unknown(make_model, pairs):
    study = Study(make_model("mmoe"), pairs)
    groupings = [Grouping.of_labels("x", "item", ["a", "b", "c"])]
    cards = kernel_cards(study, gate_weights(study, groupings), contribution_shares(study, groupings))
    assert len(cards) == 8 and (cards[["items", "item_groups", "user_groups"]].map(len) == 0).all(axis=None)
    assert (cards["most_similar"] == -1).all() and cards[["cka", "difference"]].isna().all(axis=None)
    assert (cards["metric"] == "").all()

    study = Study(make_model("mvke"), pairs)
    assert study.impressions("item").tolist() == [3, 2, 2]
    # Items of 3, 2 and 2 impressions are all small; the first two have half of them, and 1 is as frequent as 2.
    study.gates = {"ctr": dataclasses.replace(study.gates["ctr"], experts=(0, 1), weights=np.eye(2)[[0, 1, 1]])}
    assert kernel_cards(study, gate_weights(study), names=list("abc"))["items"].tolist() == [
        ("a (1.00, 2.3x)",),
        ("b (1.00, 1.8x)", "c (1.00, 1.8x)"),
    ]
    more = pairs.take(np.array([0, 0, 0, 0, 1, 2, 3, 4, 5, 6]))
    study = Study(study.model, more)
    counts = study.impressions("item")
    study.gates = {"ctr": dataclasses.replace(study.gates["ctr"], experts=(0, 1), weights=np.eye(2)[[0, 1, 1]])}
    frequent = {"abc"[item] for item in range(3) if counts[item] == counts.max()}
    items = kernel_cards(study, gate_weights(study), names=list("abc"))["items"]
    assert {text[0] for texts in items for text in texts} == frequent and 2 * counts.max() >= len(more)


def test_nothing_raises_an_expert_of_a_gate_that_does_not_choose(make_model, many):
    study = known_study(make_model, many, [0, 1, 2])
    gate = study.gates["ctr"]
    # Less than a tenth of an equal share apart.
    study.gates = {"ctr": dataclasses.replace(gate, weights=np.array([[0.48, 0.52], [0.5, 0.5], [0.52, 0.48]]))}
    groupings = [Grouping.of_labels("kind", "item", ["a", "b", "c"])]
    cards = kernel_cards(study, gate_weights(study, groupings), names=list("abc"))
    assert (cards[["items", "item_groups"]].map(len) == 0).all(axis=None)


def test_analyze_expert_weights_is_use_and_entropy(make_model, pairs):
    model = make_model("mvke")
    study = Study(model, pairs)
    frame = analyze_expert_weights(model, pairs)
    pd.testing.assert_series_equal(frame["mean_weight"], utilisation(study)["mean_weight"])
    entropy = gate_entropy(study).set_index("task")["impression_entropy_bits"]
    assert frame["impression_entropy_bits"].tolist() == [entropy[task] for task in frame["task"]]
    with pytest.raises(ValueError, match="model with gates"):
        analyze_expert_weights(make_model("shared_bottom"), pairs)


def test_groups_of_a_declared_dataset(small_run, run_study):
    found = groups(small_run.prepared)
    frame = gate_weights(run_study, found)
    assert list(frame["variable"].unique()) == ["all", *(grouping.variable for grouping in found)]
    ages = frame[(frame["variable"] == "age") & (frame["task"] == "click")].drop_duplicates("group")
    assert ages["impressions"].sum() == len(run_study)
    assert set(weight_of(frame, "click")) == {0, 1, 2}


def test_interactions_of_one_constant_item(make_model):
    """A side of a single entity: the gate cannot choose."""
    items = {name: column[:1] for name, column in ITEMS.items()}
    data = Interactions(USERS, items, np.arange(4), np.zeros(4, int), {"ctr": np.array([0, 1, 0, 1])})
    study = Study(make_model("mvke"), data)
    entropy = gate_entropy(study).set_index("task")
    assert entropy.loc["ctr", "weight_deviation"] == 0.0 and abs(entropy.loc["ctr", "information_bits"]) < 1e-12
    effect = gate_effect(study).set_index(["task", "change"])
    assert effect.loc[("ctr", "mean weights"), "difference"] == 0.0


@pytest.mark.parametrize("name", ["mvke", "mmoe", "cgc", "ple", "stem"])
def test_cards_of_every_model_with_gates(make_model, many, name):
    tasks = (Task("ctr"), Task("cvr", given="ctr"), Task("kind", "multiclass", classes=("a", "b", "c")))
    study = Study(make_model(name, SCHEMA.with_tasks(tasks)), many)
    groupings = [Grouping.of_labels("x", "item", ["a", "b", "c"]), Grouping.of_labels("y", "user", list("abcd"))]
    weights, shares = (make(study, groupings) for make in TABLES_OF_CARDS)
    cards = kernel_cards(study, weights, shares, list("abc"), expert_similarity(study), gate_effect(study))
    seen = [(task, expert) for task, gate in study.gates.items() for expert in gate.experts]
    assert list(zip(cards["task"], cards["expert"], strict=True)) == seen
    # What a multi-class task puts out is no sum of contributions, and the first task of MVKE sees one kernel only.
    summed = {"cvr"} if name == "mvke" else {"ctr", "cvr"}
    assert set(shares["task"]) == summed
    one_number = cards["task"] != "kind"
    assert cards["mean_share"].notna().tolist() == one_number.tolist() == cards["difference"].notna().tolist()
    assert cards[one_number].groupby("task")["mean_share"].sum().tolist() == pytest.approx([1] * len(summed))
    unread = "user_groups" if study.model.gate_side == "item" else "item_groups"
    assert (cards.loc[~one_number, unread].map(len) == 0).all()
