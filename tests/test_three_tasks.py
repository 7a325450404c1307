"""Clicks, conversions and ratings in one model, from training over the evaluation to the SavedModel."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.evaluation import evaluate_run, predict
from mvke_tf.losses import uncertainty_layer
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from mvke_tf.training import train_run
from tests.serving.helpers import assert_close, rows_of
from tests.test_evaluation import METRICS, TEST_SPLITS
from tests.test_training import DATA, MODEL, TRAINING, quiet

TASKS = ("ctr", "cvr", "rating")


@pytest.fixture(scope="module")
def run(tiny_run_template, tmp_path_factory) -> Run:
    """A trained run of the three tasks, whose predictions spread."""
    model = dataclasses.replace(
        MODEL, name="mmoe", tasks=TASKS, conversion="esmm", num_experts=3, embedding_dim=4, embedding_stddev=1.0
    )
    training = dataclasses.replace(
        TRAINING, epochs=2, batch_size=64, learning_rate=0.02, loss_weighting="uncertainty", monitor_images_epochs=0
    )
    folder = tmp_path_factory.mktemp("three_tasks") / "run"
    config = dataclasses.replace(Run(tiny_run_template).config, data=DATA, model=model, training=training)
    return train_run(Run.create(folder, config, tiny_run_template / "prepared.npz"), report=quiet).run


@pytest.fixture(scope="module")
def predicted(run) -> dict[str, np.ndarray]:
    """What the evaluation predicts of the test part."""
    return predict(run.load_model(), run.prepared.part("test", TASKS))


def test_each_task_learns_its_own_log_variance(run):
    log_variances = uncertainty_layer(run.load_model()).by_task()
    assert tuple(log_variances) == TASKS
    assert len({round(float(value), 4) for value in (*log_variances.values(), 0.0)}) == 4


def test_every_metric_of_every_task_is_finite(run, predicted):
    report = evaluate_run(run, report=quiet)
    expected = {"ctr": METRICS, "cvr": {*METRICS, "auc_clicked"}, "rating": {"mse", "rmse", "mae", "rows"}}
    assert set(report) == TEST_SPLITS
    for tasks in report.values():
        assert {task: set(metrics) for task, metrics in tasks.items()} == expected
        assert all(np.isfinite(value) for metrics in tasks.values() for value in metrics.values())
    data = run.prepared.part("test", TASKS)
    rated = data.weights["rating"] > 0
    error = predicted["rating"][rated] - data.labels["rating"][rated]
    assert report["test"]["rating"]["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)


def test_the_saved_model_predicts_what_the_keras_model_predicts(run, predicted):
    exported = export_run(run, report=quiet)
    prepared = run.prepared
    pairs = prepared.pairs.iloc[prepared.part_rows("test")]
    raw = {
        name: tf.convert_to_tensor(column)
        for side in ("user", "item")
        for name, column in rows_of(prepared.raw[side], pairs[f"{side}_row"]).items()
    }
    served = tf.saved_model.load(exported)
    answer = served.signatures["serving_default"](**raw)
    assert_close({task: values.numpy() for task, values in answer.items()}, predicted)
    assert all(np.ptp(values) > 0.05 for values in predicted.values())
    # A conversion needs a click, and ratings are in stars: the model adds their mean to what it has learned.
    assert (predicted["cvr"] < predicted["ctr"]).all()
    assert 2.5 < predicted["rating"].mean() < 3.5
    described = json.loads((exported / "signatures.json").read_text(encoding="utf-8"))["tasks"]
    assert described["cvr"]["given"] == "ctr"
    assert described["rating"]["prediction"] == "value of rating, in the unit of its label"
