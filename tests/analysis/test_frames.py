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
    analyze_expert_weights,
    expert_similarity,
    field_attention,
    gate_entropy,
    gate_weights,
    item_map,
    kernel_similarity,
    movielens_groups,
    utilisation,
)
from mvke_tf.data.movielens import GENRES
from mvke_tf.gate_statistics import entropy_bits
from mvke_tf.models.mvke import field_attention_model
from tests.analysis.conftest import set_gate
from tests.models.problems import PAIRS


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
    for side in ("item", "user"):
        with pytest.raises(ValueError, match=r"must have a row for each .* Received: 2"):
            gate_weights(study, [Grouping.of_labels("x", side, ["a", "b"])])
    with pytest.raises(ValueError, match=r"`side` must be one of .* Received: 'films'"):
        Grouping.of_labels("x", "films", ["a"])
    with pytest.raises(ValueError, match=r"must be \(rows, 2\)"):
        Grouping("x", "item", ("a", "b"), np.ones((3, 1), bool))


def test_entropy_in_bits():
    assert entropy_bits([0.5, 0.25, 0.25]) == pytest.approx(1.5)
    assert entropy_bits([[1.0, 0.0], [0.5, 0.5]]).tolist() == [0.0, 1.0]


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
    assert utilisation(study, dead_weight=0.6)["dead"].tolist() == [False, False, True, True, *[False] * 4]


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
    attention = field_attention_model(model)
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
    frame = item_map(run_study, titles=[f"Film {row}" for row in range(30)])
    for task, kernels in (("ctr", [0, 1, 2]), ("cvr", [1, 2, 3, 4])):
        rows = frame[frame["task"] == task]
        items, placed = rows[rows["kind"] == "item"], rows[rows["kind"] == "kernel"]
        assert placed["row"].tolist() == kernels and placed["label"].tolist() == [f"kernel {k}" for k in kernels]
        assert items["label"].tolist()[:2] == ["Film 0", "Film 1"]
        assert items["impressions"].sum() == len(run_study)
        tags = run_study.tags[task].astype(float)
        centred = tags - tags.mean(axis=0)
        distance = np.linalg.norm(centred @ np.linalg.svd(centred)[2][:2].T, axis=1)
        np.testing.assert_allclose(np.hypot(items["x"], items["y"]), distance, rtol=1e-3, atol=1e-5)
        plane = PCA(2, svd_solver="full").fit(tags)
        table = np.asarray(run_study.model.get_layer("virtual_kernels").kernels)[kernels]
        np.testing.assert_allclose(placed[["x", "y"]], plane.transform(table), rtol=1e-3, atol=1e-4)
        assert rows["share_x"].iloc[0] == pytest.approx(plane.explained_variance_ratio_[0], rel=1e-4)


def test_other_maps(run_study, monkeypatch):
    first, second = (item_map(run_study, "tsne", seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert np.isfinite(first[["x", "y"]]).all().all() and first["share_x"].isna().all() and first["x"].std() > 0

    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[umap\]'"):
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
    np.testing.assert_allclose(frame["x"][:30], 2 * run_study.tags["ctr"][:, 0])
    with pytest.raises(ValueError, match=r"one of .*'pca'.* Received: 'lda'"):
        item_map(run_study, "lda")


def test_a_model_without_gates_has_a_map_of_its_items(make_model, pairs):
    frame = item_map(Study(make_model("hard_sharing"), pairs))
    assert frame["kind"].tolist() == ["item"] * 6 and frame["label"].tolist() == ["0", "1", "2"] * 2


def test_analyze_expert_weights_is_use_and_entropy(make_model, pairs):
    model = make_model("mvke")
    study = Study(model, pairs)
    frame = analyze_expert_weights(model, pairs)
    pd.testing.assert_series_equal(frame["mean_weight"], utilisation(study)["mean_weight"])
    entropy = gate_entropy(study).set_index("task")["impression_entropy_bits"]
    assert frame["impression_entropy_bits"].tolist() == [entropy[task] for task in frame["task"]]
    with pytest.raises(ValueError, match="model with gates"):
        analyze_expert_weights(make_model("shared_bottom"), pairs)


def test_movielens_groups(small_run, run_study):
    prepared = small_run.prepared
    groups = {group.variable: group for group in movielens_groups(prepared)}
    assert list(groups) == ["genre", "popularity", "decade", "age", "gender", "occupation", "history"]
    genre = groups["genre"]
    assert genre.groups == GENRES and genre.members.sum(axis=1).tolist() == [2] * 30
    # Item 1 is GENRES[2] and GENRES[8].
    assert np.flatnonzero(genre.members[0]).tolist() == [2, 8]
    counts = prepared.raw["item"]["popularity"]
    sizes = groups["popularity"].members.sum(axis=0)
    assert groups["popularity"].groups[0] == "0" and sizes[0] == np.isnan(counts).sum() and sizes.sum() == 30
    for index, name in enumerate(groups["popularity"].groups[1:], 1):
        low, high = map(int, name.split(" to "))
        assert groups["popularity"].members[:, index].tolist() == ((counts >= low) & (counts <= high)).tolist()
    # Films of 1961 to 1990.
    assert groups["decade"].groups == ("1960s", "1970s", "1980s", "1990s")
    assert groups["decade"].members.sum(axis=0).tolist() == [9, 10, 10, 1]
    ages = prepared.raw["user"]["age"]
    assert groups["age"].members[:, 1].tolist() == ((ages >= 18) & (ages <= 24)).tolist()
    assert groups["gender"].groups == ("F", "M")
    history = prepared.raw["user"]["rating_count"]
    assert groups["history"].groups[:3] == ("0", "1 to 9", "10 to 49")
    assert groups["history"].members[:, 0].tolist() == (history == 0).tolist()
    for group in groups.values():
        if group.variable != "genre":
            assert (group.members.sum(axis=1) == 1).all(), group.variable
    frame = gate_weights(run_study, groups.values())
    assert frame[frame["variable"] == "gender"].drop_duplicates("group")["impressions"].sum() == len(run_study)
    assert weight_of(frame, "ctr").keys() == {0, 1, 2}
