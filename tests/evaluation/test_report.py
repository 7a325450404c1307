# SPDX-License-Identifier: Apache-2.0
import json
import logging

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from sklearn.metrics import log_loss, roc_auc_score

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.batches import Batches
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError, DataError, RunError
from mvke_tf.evaluation import evaluate_model, evaluate_run, measure, results_table
from mvke_tf.models import build_model
from mvke_tf.run import Run
from mvke_tf.run_folder import cell
from tests.small import small_prepared

pytestmark = pytest.mark.slow

METRICS = {"auc", "gauc", "accuracy", "log_loss", "calibration_error", "rows", "positives"}
TEST_SPLITS = {"test", "test_warm_users", "test_cold_users"}


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64).reshape(-1)))


def test_report_equals_scikit_learn_on_the_model_predictions(tiny_run, caplog):
    with caplog.at_level(logging.INFO):
        report = evaluate_run(tiny_run)
    assert caplog.messages == [f"Evaluating {tiny_run.checkpoint} on 96 rows of the test part ..."]
    assert json.loads(tiny_run.report_file.read_text()) == report
    assert set(report) == TEST_SPLITS
    for tasks in report.values():
        assert set(tasks["click"]) == METRICS and set(tasks["buy"]) == {*METRICS, "auc_given"}

    model, prepared = tiny_run.load_model(), tiny_run.prepared
    logits = model.predict(Batches(prepared.part("test"), 64).in_order(), verbose=0)
    rows = np.flatnonzero(prepared.split == 2)
    users = prepared.users.key[prepared.user_row]
    trained = set(users[(prepared.split == 0) & ~prepared.sampled].tolist())
    warm = np.array([user in trained for user in users[rows].tolist()])
    assert 0 < warm.sum() < len(warm)
    for split, chosen in (("test", warm | ~warm), ("test_warm_users", warm), ("test_cold_users", ~warm)):
        for task in ("click", "buy"):
            label, probability = prepared.label(task)[rows][chosen], sigmoid(logits[task])[chosen]
            metrics = report[split][task]
            assert (metrics["rows"], metrics["positives"]) == (chosen.sum(), label.sum())
            assert metrics["log_loss"] == pytest.approx(log_loss(label, probability, labels=[0, 1]), abs=1e-6)
            if len(set(label.tolist())) == 2:
                assert metrics["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-6)
        clicked = chosen & (prepared.label("click")[rows] == 1)
        expected = None
        if len(set(prepared.label("buy")[rows][clicked].tolist())) == 2:
            expected = roc_auc_score(prepared.label("buy")[rows][clicked], logits["buy"][clicked, 0])
        assert report[split]["buy"]["auc_given"] == pytest.approx(expected, abs=1e-6)
    assert report["test"]["buy"]["auc_given"] is not None


def test_gauc_groups_by_user_and_not_by_user_state(tiny_run):
    prepared, model = tiny_run.prepared, tiny_run.load_model()
    rows = prepared.part_rows("train")
    probability = sigmoid(model.predict(Batches(prepared.part("train"), 64).in_order(), verbose=0)["buy"])
    users, labels = prepared.users.key[prepared.user_row[rows]], prepared.label("buy")[rows]
    total = weight = 0
    for user in np.unique(users):
        label = labels[users == user]
        if 0 < label.sum() < len(label):
            total += len(label) * roc_auc_score(label, probability[users == user])
            weight += len(label)
    measured = evaluate_model(model, prepared, "train")["train"]["buy"]["gauc"]
    assert measured == pytest.approx(total / weight, abs=1e-6)


@pytest.mark.parametrize("batch_size", [7, 4096])
def test_the_batch_size_has_no_influence(tiny_run, batch_size):
    model, prepared = tiny_run.load_model(), tiny_run.prepared
    expected = evaluate_model(model, prepared, "test")["test"]["buy"]
    assert evaluate_model(model, prepared, "test", batch_size)["test"]["buy"] == pytest.approx(expected, abs=1e-6)


def test_another_part_keeps_the_first(tiny_run):
    first = evaluate_run(tiny_run, "test")
    both = evaluate_run(tiny_run, "train")
    assert set(both) == TEST_SPLITS | {"train", "train_warm_users", "train_cold_users"}
    assert {split: both[split] for split in TEST_SPLITS} == first
    # Every user of the training part is known, so nothing can be said of new ones.
    assert both["train_cold_users"]["click"] == {**dict.fromkeys(METRICS), "rows": 0, "positives": 0}
    assert json.loads(tiny_run.report_file.read_text()) == both


def test_what_is_written(tiny_run):
    evaluate_run(tiny_run, "validation")
    names = ("roc", "calibration", "groups_tags", "groups_age", "groups_country")
    files = [tiny_run.figures / f"validation_{name}.png" for name in names]
    assert sorted(tiny_run.figures.iterdir()) == sorted(files)
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
        pixels = imread(file)
        assert min(pixels.shape[:2]) > 300
        # Something is drawn, and nothing is cut off at the edge.
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert pixels[..., :3].min() < 0.5 and edge.min() > 0.99, file.name
    table = pd.read_csv(tiny_run.folder / "validation_groups.csv")
    assert set(table["variable"]) == {"all", "tags", "age", "country"}
    assert table.set_index(["task", "variable"]).loc[("click", "all"), "rows"] == 48


# === Predictions by hand ===


def by_hand(**columns):
    """Ten rows of two users and of no item, of which the last five are the test part."""
    log = {"user": [1, 1, 1, 2, 2, 1, 1, 1, 3, 3], "age": range(20, 30), "part": [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]}
    log |= {
        "click": [0, 1, 0, 1, 0, 1, 0, 1, 1, 0],
        "buy": [0, 1, 0, 0, 0, 1, 0, 0, 1, 0],
        "spent": [None, 2.0, None, 0.0, None, 3.0, None, 0.0, 7.0, None],
    }
    declaration = {
        "format": 1,
        "source": {},
        "keys": {"user": "user"},
        "split": {"by": "column", "column": "part", "train": 0, "validation": 1, "test": 2},
        "features": {"age": {"tower": "user", "encode": "buckets", "bins": 2}},
        "tasks": {
            "click": {"label": "click"},
            "buy": {"label": "buy", "given": "click"},
            "spent": {"label": "spent", "kind": "regression", "transform": "log1p"},
        },
        **columns,
    }
    return prepare(Dataset.from_frame(log, declaration))


KINDS = {"click": "binary", "buy": "binary", "spent": "regression"}
PREDICTED = {
    "click": np.array([0.9, 0.8, 0.7, 0.6, 0.1]),
    "buy": np.array([0.2, 0.5, 0.1, 0.3, 0.4]),
    "spent": np.array([2.0, 50.0, 1.0, 3.0, 50.0]),
}


def test_metrics_by_hand():
    report = measure(PREDICTED, {}, KINDS, by_hand(), "test")
    # Of the six pairs of a click and none, (0.7, 0.8) and (0.6, 0.8) are in the wrong order.
    assert report["test"]["click"]["auc"] == pytest.approx(4 / 6)
    # Warm: user 1, with clicks at 0.9 and 0.7 and none at 0.8; cold: user 3.
    assert report["test_warm_users"]["click"]["auc"] == 0.5 and report["test_warm_users"]["click"]["rows"] == 3
    assert report["test_cold_users"]["click"] == {
        **{"auc": 1.0, "gauc": 1.0, "accuracy": 1.0, "rows": 2, "positives": 1},
        "log_loss": pytest.approx(-(np.log(0.6) + np.log(0.9)) / 2),
        "calibration_error": pytest.approx((0.4 + 0.1) / 2),
    }
    assert report["test"]["click"]["gauc"] == pytest.approx((3 * 0.5 + 2 * 1.0) / 5)
    # Purchases at 0.2 and 0.3, none at 0.5, 0.1 and 0.4: 2 of 6; of the clicked rows, none at 0.1 alone.
    assert report["test"]["buy"]["auc"] == pytest.approx(2 / 6) and report["test"]["buy"]["auc_given"] == 1.0
    # In the unit of the label, over the three rows that have one: 3 - 2, 0 - 1 and 7 - 3.
    assert report["test"]["spent"] == {
        **{"rows": 3, "mse": pytest.approx(6.0), "rmse": pytest.approx(6**0.5), "mae": pytest.approx(2.0)},
    }
    assert report["test_cold_users"]["spent"]["mae"] == pytest.approx(4.0)


def test_the_conditional_probability_is_measured_given_the_event():
    conditional = {"buy": np.array([0.1, 0.9, 0.8, 0.2, 0.9])}
    report = measure(PREDICTED, conditional, KINDS, by_hand(), "test")["test"]["buy"]
    assert (report["auc"], report["auc_given"]) == (pytest.approx(2 / 6), 0.0)


def test_rows_that_do_not_count_are_left_out():
    prepared = by_hand(
        tasks={"click": {"label": "click", "where": "age < 28"}, "buy": {"label": "buy", "where": "age < 27"}}
    )
    predicted = {task: PREDICTED[task] for task in ("click", "buy")}
    report = measure(predicted, {}, KINDS, prepared, "test")
    assert [report["test"][task]["rows"] for task in ("click", "buy")] == [3, 2]
    assert report["test"]["click"]["auc"] == 0.5
    # A task without `given` has no AUC given an event; without a row nothing is defined.
    assert "auc_given" not in report["test"]["buy"]
    assert report["test_cold_users"]["click"] == {**dict.fromkeys(METRICS), "rows": 0, "positives": 0}


def test_without_user_ids_there_are_no_kinds_of_users():
    report = measure(PREDICTED, {}, KINDS, by_hand(keys={}), "test")
    assert set(report) == {"test"} and "gauc" not in report["test"]["click"]
    assert report["test"]["click"]["auc"] == pytest.approx(4 / 6)
    lines = results_table(report, "test").splitlines()
    names = "task rows positives auc auc_given accuracy log_loss calibration_error mse rmse mae"
    assert lines[0].split() == names.replace("_", " ").split()
    assert [line.split()[:2] for line in lines[2:]] == [["click", "5"], ["buy", "5"], ["spent", "3"]]


@pytest.mark.parametrize(
    ("predicted", "part", "error", "message"),
    [
        ({"click": np.zeros(4)}, "test", ValueError, r"each of the 5 rows of the test part. Received: shape \(4,\)"),
        ({"click": np.zeros(5)}, "tset", ConfigError, "parts of the data are train, validation, test. Received"),
        ({"klick": np.zeros(5)}, "test", ConfigError, r"no task 'klick'. Did you mean 'click'\?"),
    ],
)
def test_predictions_that_do_not_fit_are_an_error(predicted, part, error, message):
    with pytest.raises(error, match=message):
        measure(predicted, {}, {"click": "binary", "klick": "binary"}, by_hand(), part)


# === Several kinds of tasks ===


def test_all_kinds_of_tasks_of_a_run_are_reported(tmp_path):
    """A joint and a conditional probability, and a regression, whose labels some rows lack."""
    tasks = ("click", "buy", "stars")
    prepared = small_prepared()
    prepared.save(tmp_path / "prepared")
    prepared = PreparedDataset.load(tmp_path / "prepared")
    config = ModelConfig("mvke", tasks, embedding_dim=8, hidden_dims=(8,), objective="joint", embedding_stddev=1.0)
    run = Run.create(tmp_path / "runs" / "joint", RunConfig(config, TrainingConfig()), prepared)
    model = build_model("mvke", prepared.schema(tasks, "joint"), config)
    run.save_checkpoint(model)

    data, vectors = prepared.part("test", tasks), {}
    for side, part, rows in (
        ("user", model.user_tower, data.user_rows),
        ("item", model.item_tower, data.item_rows),
    ):
        table = {name: getattr(prepared, f"{side}s").encoded[name][rows] for name in part.input}
        vectors[side] = {task: np.asarray(vector, np.float64) for task, vector in part(table).items()}
    dots = {task: np.sum(vectors["user"][task] * vectors["item"][task], axis=1) for task in tasks}
    click, given = sigmoid(dots["click"]), sigmoid(dots["buy"])

    report = evaluate_run(run)["test"]
    labels, clicked = data.labels["buy"], data.labels["click"] == 1
    assert report["buy"]["auc"] == pytest.approx(roc_auc_score(labels, click * given), abs=1e-6)
    assert report["buy"]["log_loss"] == pytest.approx(log_loss(labels, click * given), abs=1e-5)
    assert report["buy"]["auc_given"] == pytest.approx(roc_auc_score(labels[clicked], given[clicked]), abs=1e-6)
    known = data.weights["stars"] > 0
    errors = data.labels["stars"][known] - (prepared.offsets["stars"] + dots["stars"][known])
    assert report["stars"]["rows"] == known.sum() < len(known)
    assert report["stars"]["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), abs=1e-5)
    assert report["stars"]["mae"] == pytest.approx(np.mean(np.abs(errors)), abs=1e-5)
    assert {path.name for path in run.figures.iterdir()} >= {"test_roc.png", "test_regression.png"}


# === The table ===


def test_results_table_is_aligned():
    metrics = {"auc": 0.5, "gauc": None, "log_loss": 0.6931, "calibration_error": 0.01, "rows": 12345, "positives": 9}
    tasks = {"click": metrics, "buy": {**metrics, "auc_given": 0.25}}
    nobody = {task: dict.fromkeys(metrics) | {"rows": 0, "positives": 0} for task, metrics in tasks.items()}
    report = {"test": tasks, "test_warm_users": tasks, "test_cold_users": nobody, "validation": tasks}
    lines = results_table(report, "test").splitlines()
    assert lines[0].split("  ")[0] == "task"
    # Without new users, known ones are all.
    assert [line.split()[:2] for line in lines[2:]] == [["click", "all"], ["buy", "all"]]
    few = {**metrics, "rows": 45}
    report |= {
        "test_warm_users": {"click": {**metrics, "rows": 12300}, "buy": tasks["buy"]},
        "test_cold_users": {"click": few},
    }
    with_new = results_table(report, "test").splitlines()
    assert [line.split()[:2] for line in with_new[2:]] == [
        *(["click", "all"], ["click", "warm"], ["click", "cold"], ["buy", "all"]),
    ]
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["buy", "all", "12,345", "9", "0.5000", "0.2500", "-", "0.6931", "0.0100"]
    assert lines[2].split() == ["click", "all", "12,345", "9", "0.5000", "-", "-", "0.6931", "0.0100"]
    assert [cell(value) for value in (0.5, 12345, None)] == ["0.5000", "12,345", "-"]


def test_results_table_of_a_part_that_was_not_evaluated():
    with pytest.raises(ConfigError, match=r"no split 'test'. It has: \['train'\]"):
        results_table({"train": {}}, "test")


# === Errors ===


def test_an_unknown_part_is_an_error(tiny_run):
    with pytest.raises(ConfigError, match=r"parts of the data are train, validation, test. Received: 'tset'"):
        evaluate_run(tiny_run, "tset")


def test_an_empty_part_is_an_error(tiny_run):
    prepared = tiny_run.prepared
    _ = prepared.split
    prepared._columns = {**{name: prepared._columns[name] for name in prepared._columns}, "split": np.zeros(480, int)}
    with pytest.raises(DataError, match="The test part of small has no rows"):
        evaluate_model(tiny_run.load_model(), prepared, "test")


def test_a_run_without_checkpoint_is_an_error(tiny_run):
    tiny_run.checkpoint.unlink()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        evaluate_run(tiny_run)


@pytest.mark.parametrize("content", ["{", "[]", '{"test": 1}'])
def test_a_damaged_report_is_an_error_and_stays(tiny_run, content):
    tiny_run.report_file.write_text(content)
    with pytest.raises(RunError, match="Delete it and evaluate again"):
        evaluate_run(tiny_run)
    assert tiny_run.report_file.read_text() == content and not tiny_run.figures.exists()
    assert not (tiny_run.folder / "test_groups.csv").exists()
