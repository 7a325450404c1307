import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.analysis import Study, evaluate_multitask_model, explain_user, gate_effect
from mvke_tf.data.dataset import Batches
from mvke_tf.metrics import auc, binary_metrics
from mvke_tf.models.dense_mmoe import build_mmoe
from mvke_tf.models.two_tower import conditional_model
from mvke_tf.schema import Task
from tests.analysis.conftest import set_gate
from tests.models.problems import ITEMS, PAIRS, SCHEMA, USERS

SEVERAL = SCHEMA.with_tasks((Task("ctr"), Task("cvr", given="ctr"), Task("rating", "regression", offset=3.5)))


def of_user(user):
    """Features of one user with every item."""
    return {name: np.repeat(column[[user]], 3, axis=0) for name, column in USERS.items()} | ITEMS


@pytest.mark.parametrize("name", ["mvke", "mmoe", "cgc", "ple"])
def test_contributions_add_up_to_the_logit_of_every_user(make_model, pairs, name):
    model = make_model(name)
    study = Study(model, pairs)
    for user in range(4):
        logits = model(of_user(user))
        frame = explain_user(study, user, top=3)
        np.testing.assert_array_equal(frame["contribution"], frame["weight"] * frame["score"])
        for task in ("ctr", "cvr"):
            rows = frame[frame["task"] == task]
            total = rows.groupby("item_row")["contribution"].sum()
            expected = np.asarray(logits[task])[:, 0]
            np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
            best = rows.drop_duplicates("rank")
            assert best["item_row"].tolist() == np.argsort(-expected).tolist()
            np.testing.assert_allclose(best["prediction"], 1 / (1 + np.exp(-expected[best["item_row"]])), rtol=1e-5)
            assert rows.groupby("rank")["weight"].sum().tolist() == pytest.approx([1.0] * 3)


def test_all_kinds_of_tasks_are_explained(make_model, pairs):
    model = make_model("mvke", SEVERAL)
    outputs, given = model(of_user(2)), conditional_model(model)(of_user(2))["cvr"]
    frame = explain_user(Study(model, pairs), 2, top=3)
    expected = {
        "ctr": (outputs["ctr"], 1 / (1 + np.exp(-np.asarray(outputs["ctr"])))),
        "cvr": (given, 1 / (1 + np.exp(-np.asarray(outputs["cvr"])))),
        "rating": (np.asarray(outputs["rating"]) - 3.5, outputs["rating"]),
    }
    for task, (logit, prediction) in expected.items():
        rows = frame[frame["task"] == task].drop_duplicates("rank")
        np.testing.assert_allclose(rows["logit"], np.asarray(logit)[rows["item_row"], 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rows["prediction"], np.asarray(prediction)[rows["item_row"], 0], rtol=1e-5)
        assert rows["prediction"].is_monotonic_decreasing


def test_what_is_shown_of_a_user(make_model, pairs):
    study = Study(make_model("mvke"), pairs)
    frame = explain_user(study, 1, titles=["A", "B", "C"], top=1, exclude=[2])
    assert frame.groupby("task", sort=False).size().to_dict() == {
        task: len(gate.experts) for task, gate in study.gates.items()
    }
    everything = explain_user(study, 1, titles=["A", "B", "C"])
    kept = everything[everything["title"] != "C"]
    assert (
        frame["title"].tolist() == kept[kept["rank"] == kept.groupby("task")["rank"].transform("min")]["title"].tolist()
    )
    with pytest.raises(ValueError, match=r"occurs in the pairs, 0 to 3. Received: 9"):
        explain_user(study, 9)
    with pytest.raises(ValueError, match=r"an item to rank. Received: top=10, 0 items"):
        explain_user(study, 1, exclude=[0, 1, 2])
    with pytest.raises(ValueError, match="model with gates"):
        explain_user(Study(make_model("hard_sharing"), pairs), 0)


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
        scores = study.scores(task, study.user_rows, study.item_rows)
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

    measured = evaluate_multitask_model(model, data)
    assert measured["rating"]["rmse"] == pytest.approx(rmse, rel=1e-5) and measured["rating"]["rows"] == 5
    assert measured["rating"]["mse"] == pytest.approx(rmse**2, rel=1e-5)
    assert measured["cvr"]["auc"] == pytest.approx(expected)


def test_evaluate_multitask_model_equals_the_metrics(make_model, pairs):
    model = make_model("mvke")
    measured = evaluate_multitask_model(model, Batches(pairs, 3).in_order(), batch_size=2)
    for task, logits in model(PAIRS).items():
        probability = 1 / (1 + np.exp(-np.asarray(logits, np.float64)[:, 0]))
        expected = binary_metrics(pairs.labels[task], probability, PAIRS["user_id"])
        assert measured[task].keys() == expected.keys()
        for name, value in expected.items():
            # GAUC is None where no user has both labels.
            assert measured[task][name] == (value if value is None else pytest.approx(value, rel=1e-5)), name
    with pytest.raises(ValueError, match=r"lacks the labels of \['cvr'\]"):
        evaluate_multitask_model(model, dataclasses.replace(pairs, labels={"ctr": pairs.labels["ctr"]}))


def test_evaluate_multitask_model_of_the_plain_mmoe():
    """With the kinds of its tasks; the gate weights among its outputs are no task."""
    model = build_mmoe(input_dim=3, return_expert_weights=True)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    labels = {"task_0": (x[:, :1] > 0).astype("float32"), "task_1": x[:, 1:2]}
    dataset = tf.data.Dataset.from_tensor_slices((x, labels)).batch(3)
    measured = evaluate_multitask_model(model, dataset, kinds={"task_0": "binary", "task_1": "regression"})
    outputs = {task: np.asarray(output, np.float64) for task, output in model(x).items()}
    assert set(measured) == {"task_0", "task_1"}
    assert measured["task_0"]["auc"] == pytest.approx(auc(labels["task_0"][:, 0], outputs["task_0"][:, 0]))
    assert measured["task_1"]["mse"] == pytest.approx(np.mean((outputs["task_1"] - x[:, 1:2]) ** 2), rel=1e-5)
    with pytest.raises(ValueError, match=r"lacks the labels of \['task_2'\]"):
        evaluate_multitask_model(model, dataset, kinds={"task_2": "binary"})
