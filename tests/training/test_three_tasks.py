# SPDX-License-Identifier: Apache-2.0
"""A click, what comes after it and a regression in one model, from training over the evaluation to the SavedModel."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.config import RunConfig
from mvke_tf.evaluation import evaluate_run
from mvke_tf.inference.predictions import predict
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from mvke_tf.training import train_run
from tests.training.helpers import MODEL, TRAINING

pytestmark = pytest.mark.slow

TASKS = ("click", "buy", "stars")


@pytest.fixture(scope="module")
def run(tiny_prepared, tmp_path_factory) -> Run:
    """A trained run of the three tasks, whose predictions spread."""
    model = dataclasses.replace(
        MODEL, name="mmoe", tasks=TASKS, objective="joint", num_experts=3, embedding_dim=4, embedding_stddev=1.0
    )
    training = dataclasses.replace(
        TRAINING, epochs=2, batch_size=64, learning_rate=0.02, loss_weighting="uncertainty", monitor_images_epochs=0
    )
    folder = tmp_path_factory.mktemp("three_tasks") / "run"
    return train_run(Run.create(folder, RunConfig(model, training), tiny_prepared)).run


@pytest.fixture(scope="module")
def predicted(run) -> dict[str, np.ndarray]:
    """What the evaluation predicts of the test part."""
    return predict(run.load_model(), run.prepared.part("test", TASKS)).values


def test_each_task_learns_its_own_log_variance(run):
    log_variances = run.load_model().log_variances.by_task()
    assert tuple(log_variances) == TASKS
    assert len({round(float(value), 4) for value in (*log_variances.values(), 0.0)}) == 4


def test_every_metric_of_every_task_is_finite(run, predicted):
    report = evaluate_run(run)["test"]
    assert tuple(report) == TASKS
    assert {"auc", "log_loss"} < set(report["click"]) and "auc_given" not in report["click"]
    assert "auc_given" in report["buy"] and {"mse", "rmse", "mae", "rows"} == set(report["stars"])
    assert all(np.isfinite(value) for metrics in report.values() for value in metrics.values())
    data = run.prepared.part("test", TASKS)
    counts = data.weights["stars"] > 0
    error = predicted["stars"][counts] - data.labels["stars"][counts]
    assert report["stars"]["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)


def test_the_saved_model_predicts_what_the_keras_model_predicts(run, predicted):
    exported = export_run(run)
    prepared = run.prepared
    test = prepared.part_rows("test")
    raw = {
        name: tf.convert_to_tensor(table.raw[name][rows[test]])
        for table, rows in ((prepared.users, prepared.user_row), (prepared.items, prepared.item_row))
        for name in prepared.encoder.raw_inputs(table.side)
    }
    answer = tf.saved_model.load(exported).signatures["serving_default"](**raw)
    assert set(answer) == set(predicted)
    for task, values in predicted.items():
        np.testing.assert_allclose(np.ravel(answer[task]), values, atol=1e-5)
        assert np.ptp(values) > 0.05
    # Buying needs a click, and stars are in their unit: the model adds their mean to what it has learned.
    assert (predicted["buy"] < predicted["click"]).all()
    assert 2.5 < predicted["stars"].mean() < 3.5
    described = json.loads((exported / "signatures.json").read_text(encoding="utf-8"))["tasks"]
    assert described["buy"]["given"] == "click"
    assert described["stars"]["prediction"] == "value of stars, in the unit of its label"
