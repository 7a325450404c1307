# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.analysis import Study, analyze_expert_weights
from mvke_tf.analysis.study import has_kernels
from mvke_tf.config import ModelConfig
from mvke_tf.data.batches import Batches, Interactions
from mvke_tf.models import TwoTowerModel
from mvke_tf.models.dense_mmoe import build_mmoe, build_mmoe_recommender
from mvke_tf.models.mvke import mvke_towers
from mvke_tf.models.two_tower import score
from mvke_tf.schema import Task
from tests.golden import DEFAULT_FOLDER, OUTPUT_TOLERANCE, Golden, slots
from tests.layer_checks import assert_close
from tests.models.problems import PAIRS, SCHEMA
from tests.test_golden import mvke_graph, symbolic_inputs


@pytest.mark.parametrize(("name", "side"), [("mvke", "item"), ("mmoe", "user"), ("cgc", "user"), ("ple", "user")])
def test_gates_per_entity_are_those_of_the_pairs(make_model, pairs, name, side):
    model = make_model(name)
    study = Study(model, pairs)
    expected = model.gates({key: PAIRS[key] for key in model.gates.input})
    assert list(study.gates) == ["ctr", "cvr"]
    for task, gate in study.gates.items():
        assert gate.side == side and len(gate.weights) == {"user": 4, "item": 3}[side]
        np.testing.assert_allclose(gate.weights[study.rows(side)], expected[task], atol=1e-6)
        np.testing.assert_allclose(gate.weights.sum(axis=1), 1.0, atol=1e-6)
        np.testing.assert_allclose(gate.mean_weight, np.asarray(expected[task]).mean(axis=0), atol=1e-6)
        assert gate.experts == model.experts_of(task)


def test_gate_weights_equal_the_recorded_ones():
    golden = Golden(DEFAULT_FOLDER / "graph_mvke.npz")
    names = golden.names("output/score/")
    towers, tasks, settings = mvke_graph(golden, names)
    inputs = {name: symbolic_inputs(golden)[name] for name in ("u", "t")}
    dim = golden["input/u"].shape[-1]
    config = ModelConfig(embedding_dim=dim, hidden_dims=golden.meta["hidden"], dropout_rate=0.0, **settings)
    assert towers is mvke_towers
    model = TwoTowerModel(inputs, score(*towers(inputs["u"], inputs["t"], tasks, config), tasks))
    values = [np.zeros(variable.shape, "float32") for variable in model.trainable_variables]
    for name, (position, index) in slots(golden, model.trainable_variables).items():
        values[position][index] = golden["var/" + name].reshape(values[position][index].shape)
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value)

    rows = np.arange(len(golden["input/u"]))
    study = Study(model, Interactions({"u": golden["input/u"]}, {"t": golden["input/t"]}, rows, rows, {}))
    for task in names:
        recorded = golden["output/tag/" + task]
        assert_close(study.tags[task], recorded[:, :dim], OUTPUT_TOLERANCE, name=task)
        assert_close(study.gates[task].weights.astype("float32"), recorded[:, dim:], OUTPUT_TOLERANCE, name=task)


def test_a_study_keeps_the_entities_that_occur_and_the_catalogue(make_model, pairs):
    some = pairs.take(np.array([0, 2, 6]))
    study = Study(make_model("mvke"), some, catalogue=np.array([2]))
    assert study.source_users.tolist() == [0, 1, 3] and study.user_rows.tolist() == [0, 1, 2]
    # Items 1 and 2 occur, and only 2 is in the catalogue.
    assert study.source_items.tolist() == [1, 2] and study.item_rows.tolist() == [1, 0, 1]
    assert study.catalogue.tolist() == [1]
    assert study.impressions("user").tolist() == [1, 1, 1] and study.impressions("item").tolist() == [1, 2]
    everything = Study(make_model("mvke"), some)
    assert everything.source_items.tolist() == [0, 1, 2] == everything.catalogue.tolist()
    assert everything.impressions("item").tolist() == [0, 1, 2] and len(everything) == 3


def test_a_study_of_a_run(small_run, run_study):
    data = small_run.prepared.part("test")
    assert run_study.source_users.tolist() == sorted(set(data.user_rows.tolist()))
    assert run_study.source_items.tolist() == list(range(30))
    np.testing.assert_array_equal(run_study.source_users[run_study.user_rows], data.user_rows)
    assert run_study.impressions("item").sum() == run_study.impressions("user").sum() == len(data) == len(run_study)


@pytest.mark.parametrize("name", ["mvke", "mmoe"])
def test_scores_and_products_are_the_logits(make_model, pairs, name):
    model = make_model(name)
    study = Study(model, pairs)
    products = study.products(["ctr", "cvr"])
    for task, gate in study.gates.items():
        logits = np.asarray(model(PAIRS)[task])[:, 0]
        np.testing.assert_allclose(products[task], logits, rtol=1e-5, atol=1e-5)
        parts = study.scores[task] * gate.weights[study.rows(gate.side)]
        np.testing.assert_allclose(parts.sum(axis=1), logits, rtol=1e-5, atol=1e-5)
        expected = [[abs(part) / sum(map(abs, row)) for part in row] for row in parts.tolist()]
        np.testing.assert_allclose(study.contribution_shares[task], expected, rtol=1e-12)
    assert study.products([]) == {}


def test_shares_of_nothing_are_equal(make_model, pairs):
    study = Study(make_model("mvke"), pairs)
    study.tags = {task: np.zeros_like(tags) for task, tags in study.tags.items()}
    assert (study.contribution_shares["ctr"] == 1 / len(study.gates["ctr"].experts)).all()


def test_labels_of_no_weight_are_undefined(make_model, pairs):
    weighted = dataclasses.replace(pairs, weights={"cvr": np.array([1, 0, 1, 1, 0, 1, 1], "float32")})
    for source in (weighted, Batches(weighted, 3), Batches(weighted, 3).in_order()):
        known = Study(make_model("mvke"), source).labels
        assert np.flatnonzero(np.isnan(known["cvr"])).tolist() == [1, 4]
        np.testing.assert_array_equal(known["ctr"], pairs.labels["ctr"])


def test_labels_are_in_their_unit(make_model, pairs):
    schema = SCHEMA.with_tasks((Task("ctr"), Task("spent", "regression", transform="log1p")))
    data = dataclasses.replace(pairs, labels={"ctr": pairs.labels["ctr"], "spent": np.log1p(np.arange(7.0))})
    np.testing.assert_allclose(Study(make_model("mvke", schema), data).labels["spent"], np.arange(7), rtol=1e-12)


def test_data_that_do_not_fit_are_an_error(make_model, pairs):
    without = dataclasses.replace(pairs, items={"item_id": pairs.items["item_id"]})
    with pytest.raises(ValueError, match=r"lack features .*'genres', 'genres_weights'"):
        Study(make_model("mvke"), without)
    with pytest.raises(ValueError, match=r"at least one interaction to analyse. Received: none"):
        Study(make_model("mvke"), pairs.take(np.array([], int)))


def test_a_model_without_gates_says_so_and_still_has_tags(make_model, pairs):
    study = Study(make_model("hard_sharing"), pairs)
    assert not has_kernels(study.model)
    with pytest.raises(ValueError, match=r"model with gates: mvke.*'hard_sharing'"):
        _ = study.gates
    with pytest.raises(ValueError, match="Only MVKE has field attention"):
        _ = study.attention
    with pytest.raises(ValueError, match=r"a model with experts. Received: 'hard_sharing'"):
        _ = study.expert_outputs
    assert study.tags["ctr"].shape == (3, 8)


def test_a_task_with_one_expert_has_no_gate(make_model, pairs):
    model = make_model("mmoe", SCHEMA.with_tasks((Task("ctr", experts=(0,)), Task("cvr", experts=(1, 3)))))
    assert {task: gate.experts for task, gate in Study(model, pairs).gates.items()} == {"cvr": (1, 3)}


def test_the_plain_mmoe_and_its_recommender_can_be_analysed():
    features = np.random.default_rng(0).normal(size=(20, 6)).astype("float32")
    model = build_mmoe(input_dim=6, return_expert_weights=True)
    labels = {task: np.zeros((20, 1), "float32") for task in ("task_0", "task_1")}
    frame = analyze_expert_weights(model, tf.data.Dataset.from_tensor_slices((features, labels)).batch(7))
    expected = np.asarray(model(features)["task_1_expert_weights"]).mean(axis=0)
    np.testing.assert_allclose(frame.loc[frame["task"] == "task_1", "mean_weight"], expected, atol=1e-6)
    assert frame["impressions"].tolist() == [20] * 6
    study = Study(build_mmoe(input_dim=6), tf.data.Dataset.from_tensors((features, labels)))
    assert study.expert_outputs.shape == (20, 3, 32)

    recommender = build_mmoe_recommender(9, 5, 4, num_dense_features=2, return_expert_weights=True)
    inputs = {"user_id": np.arange(8), "item_id": np.arange(8) % 5, "dense_features": features[:8, :2]}
    rows = tf.data.Dataset.from_tensors((inputs, {"task_0": np.zeros((8, 1))}))
    expected = np.asarray(recommender(inputs)["task_0_expert_weights"])
    np.testing.assert_allclose(
        analyze_expert_weights(recommender, rows)["mean_weight"][:4], expected.mean(axis=0), atol=1e-6
    )
    assert Study(recommender, rows).expert_outputs.shape == (8, 4, 32)
