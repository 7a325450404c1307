import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.analysis import Study, analyze_expert_weights
from mvke_tf.analysis.study import as_pairs, has_gates, user_fields
from mvke_tf.config import ModelConfig
from mvke_tf.data.dataset import Batches, PairData
from mvke_tf.models.dense_mmoe import build_mmoe, build_mmoe_recommender
from mvke_tf.models.mvke import mvke_towers
from mvke_tf.models.two_tower import gate_model, score
from mvke_tf.schema import Task
from tests.golden import DEFAULT_FOLDER, OUTPUT_TOLERANCE, Golden, slots
from tests.layer_checks import assert_close
from tests.models.problems import PAIRS, SCHEMA
from tests.test_golden import mvke_graph, symbolic_inputs


@pytest.mark.parametrize(("name", "side"), [("mvke", "item"), ("mmoe", "user"), ("cgc", "user"), ("ple", "user")])
def test_gates_per_entity_are_those_of_the_pairs(make_model, pairs, name, side):
    model = make_model(name)
    study = Study(model, pairs, batch_size=2)
    expected = gate_model(model)({key: PAIRS[key] for key in gate_model(model).input})
    assert list(study.gates) == ["ctr", "cvr"]
    for task, gate in study.gates.items():
        assert gate.side == side and len(gate.weights) == {"user": 4, "item": 3}[side]
        np.testing.assert_allclose(gate.weights[study.rows(side)], expected[task], atol=1e-6)
        np.testing.assert_allclose(gate.weights.sum(axis=1), 1.0, atol=1e-6)
    mixture = model.get_layer("user_vector_cvr")
    assert study.gates["cvr"].experts == (mixture.indices if name == "mvke" else mixture.experts)


def test_gate_weights_equal_the_recorded_ones():
    golden = Golden(DEFAULT_FOLDER / "graph_mvke.npz")
    names = golden.names("output/score/")
    towers, tasks, settings = mvke_graph(golden, names)
    inputs = {name: symbolic_inputs(golden)[name] for name in ("u", "t")}
    dim = inputs["u"].shape[-1]
    config = ModelConfig(embedding_dim=dim, hidden_dims=golden.meta["hidden"], dropout_rate=0.0, **settings)
    assert towers is mvke_towers
    model = keras.Model(inputs, score(*towers(inputs["u"], inputs["t"], tasks, config), tasks))
    values = [np.zeros(variable.shape, "float32") for variable in model.trainable_variables]
    for name, (position, index) in slots(golden, model.trainable_variables).items():
        values[position][index] = golden["var/" + name].reshape(values[position][index].shape)
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value)

    rows = np.arange(len(golden["input/u"]))
    study = Study(model, PairData({"u": golden["input/u"]}, {"t": golden["input/t"]}, rows, rows, {}))
    for task in names:
        recorded = golden["output/tag/" + task]
        assert_close(study.tags[task], recorded[:, :dim], OUTPUT_TOLERANCE, name=task)
        assert_close(study.gates[task].weights.astype("float32"), recorded[:, dim:], OUTPUT_TOLERANCE, name=task)


def test_a_study_keeps_the_user_states_that_occur_and_all_items(small_run, run_study):
    data = small_run.prepared.part("test")
    assert run_study.source_users.tolist() == sorted(set(data.user_rows.tolist()))
    assert run_study.size("item") == 30 == len(run_study.items["item_id"])
    np.testing.assert_array_equal(run_study.source_users[run_study.user_rows], data.user_rows)
    assert run_study.impressions("item").sum() == run_study.impressions("user").sum() == len(data) == len(run_study)


@pytest.mark.parametrize("distinct", [False, True])
def test_a_dataset_gives_the_same_as_its_pairs(make_model, pairs, distinct):
    model = make_model("mvke")
    dataset = Batches(pairs, 3, distinct=distinct).in_order()
    collected = as_pairs(model, dataset)
    assert len(collected.users["user_id"]) == 4 and len(collected.items["item_id"]) == 3
    for name, column in PAIRS.items():
        table, rows = (
            (collected.users, collected.user_rows)
            if name in collected.users
            else (
                collected.items,
                collected.item_rows,
            )
        )
        np.testing.assert_array_equal(table[name][rows], column)
    np.testing.assert_array_equal(collected.labels["cvr"], pairs.labels["cvr"])
    assert as_pairs(model, Batches(pairs, 3)) is pairs is as_pairs(model, pairs)


def test_labels_of_no_weight_are_undefined(make_model, pairs):
    weights = {"cvr": np.array([1, 0, 1, 1, 0, 1, 1], "float32")}
    labels = {task: label[:, None] for task, label in pairs.labels.items()}
    collected = as_pairs(make_model("mvke"), tf.data.Dataset.from_tensors((PAIRS, labels, weights)))
    assert np.flatnonzero(np.isnan(collected.labels["cvr"])).tolist() == [1, 4]
    assert not np.isnan(collected.labels["ctr"]).any()
    weighted = dataclasses.replace(pairs, weights=weights)
    for source in (weighted, Batches(weighted, 3), Batches(weighted, 3).in_order()):
        known = Study(make_model("mvke"), source).labels
        np.testing.assert_array_equal(known["cvr"], collected.labels["cvr"])
        np.testing.assert_array_equal(known["ctr"], pairs.labels["ctr"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: data.repeat(), "Expected a dataset that ends"),
        (lambda data: data.take(0), "an empty dataset"),
        (lambda data: data.map(lambda x, y: x), "dataset of (features, labels)"),
        (lambda data: data.map(lambda x, y: ({"age": x["age"]}, y)), "lacks features"),
        (lambda data: [1], "Received: builtins.list"),
    ],
)
def test_data_that_do_not_fit_are_an_error(make_model, pairs, make, message):
    with pytest.raises(ValueError) as raised:
        Study(make_model("mvke"), make(Batches(pairs, 3).in_order()))
    assert message in str(raised.value) and "Received: " in str(raised.value)


def test_pairs_that_lack_a_feature_are_an_error(make_model, pairs):
    without = dataclasses.replace(pairs, items={"item_id": pairs.items["item_id"]})
    with pytest.raises(ValueError, match=r"lack features .*'genres', 'genres_weights'"):
        Study(make_model("mvke"), without)
    with pytest.raises(ValueError, match="at least one pair"):
        Study(make_model("mvke"), pairs.take(np.array([], int)))


def test_a_model_without_gates_says_so_and_still_has_tags(make_model, pairs):
    study = Study(make_model("hard_sharing"), pairs)
    assert not has_gates(study.model)
    with pytest.raises(ValueError, match=r"model with gates: mvke.*'hard_sharing'"):
        _ = study.gates
    with pytest.raises(ValueError, match="Only MVKE has field attention"):
        _ = study.attention
    assert study.tags["ctr"].shape == (3, 8)


def test_a_task_with_one_expert_has_no_gate(make_model, pairs):
    model = make_model("mmoe", SCHEMA.with_tasks((Task("ctr", experts=(0,)), Task("cvr", experts=(1, 3)))))
    assert {task: gate.experts for task, gate in Study(model, pairs).gates.items()} == {"cvr": (1, 3)}


def test_user_fields_are_named_in_order(make_model):
    assert user_fields(make_model("mvke")) == ["user_id", "age", "history"]


def test_the_dense_mmoe_and_its_recommender_can_be_analysed():
    features = np.random.default_rng(0).normal(size=(20, 6)).astype("float32")
    model = build_mmoe(input_dim=6, return_expert_weights=True)
    labels = {task: np.zeros((20, 1), "float32") for task in ("task_0", "task_1")}
    frame = analyze_expert_weights(model, tf.data.Dataset.from_tensor_slices((features, labels)).batch(7))
    expected = np.asarray(model(features)["task_1_expert_weights"]).mean(axis=0)
    np.testing.assert_allclose(frame.loc[frame["task"] == "task_1", "mean_weight"], expected, atol=1e-6)
    assert frame["impressions"].tolist() == [20] * 6

    inner = build_mmoe(input_dim=6)
    study = Study(inner, tf.data.Dataset.from_tensors((features, labels)))
    assert study.expert_outputs.shape == (20, 3, 32)

    recommender = build_mmoe_recommender(9, 5, 4, num_dense_features=2, return_expert_weights=True)
    inputs = {"user_id": np.arange(8), "item_id": np.arange(8) % 5, "dense_features": features[:8, :2]}
    rows = tf.data.Dataset.from_tensors((inputs, {"task_0": np.zeros((8, 1))}))
    expected = np.asarray(recommender(inputs)["task_0_expert_weights"])
    np.testing.assert_allclose(
        analyze_expert_weights(recommender, rows)["mean_weight"][:4], expected.mean(axis=0), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"within reach. Received: 0"):
        _ = Study(recommender, rows).expert_outputs
    with pytest.raises(ValueError, match="return_expert_weights=True"):
        analyze_expert_weights(build_mmoe_recommender(9, 5, 4, num_dense_features=2), rows)
