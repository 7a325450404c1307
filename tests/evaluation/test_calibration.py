# SPDX-License-Identifier: Apache-2.0
"""Calibration by hand, and from the validation part to evaluation, SavedModel and ONNX."""

import dataclasses
import json

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

from mvke_tf.errors import ConfigError, DataError, RunError
from mvke_tf.evaluation.calibration import calibrate_run, calibration_table, fit_calibration
from mvke_tf.evaluation.report import evaluate_run
from mvke_tf.inference.predictions import predict
from mvke_tf.layers import CalibratedLogit, LogitMap
from mvke_tf.models import build_model
from mvke_tf.schema import Feature, Schema, Task
from mvke_tf.serving.onnx import export_onnx
from mvke_tf.serving.saved_model import ServingModule
from tests.layer_checks import check_layer
from tests.serving.helpers import pair_rows

pytestmark = pytest.mark.slow


def rows(*groups):
    """Logits and labels of `(logit, rows, positives)`."""
    logits = np.concatenate([np.full(count, logit) for logit, count, _ in groups])
    labels = np.concatenate([np.arange(count) < positives for _, count, positives in groups]).astype(float)
    return labels, logits


def test_temperature_by_hand():
    """Of rows at 2 and -2, of which 3/4 and 1/4 are positive, the logit is 2 / T = ln 3."""
    fitted = fit_calibration("temperature", *rows((2.0, 8, 6), (-2.0, 8, 2)))
    assert fitted.slope == pytest.approx(np.log(3) / 2, rel=1e-4) and fitted.intercept == 0


def test_platt_by_hand():
    """The line through both observed logits: a + b = ln 3, -a + b = ln(1/9)."""
    fitted = fit_calibration("platt", *rows((1.0, 8, 6), (-1.0, 20, 2)))
    assert fitted.slope == pytest.approx((np.log(3) + np.log(9)) / 2, rel=1e-3)
    assert fitted.intercept == pytest.approx((np.log(3) - np.log(9)) / 2, rel=1e-3)


def test_isotonic_by_hand():
    """Of four logits the middle two are out of order and become one block at their mean."""
    fitted = fit_calibration("isotonic", *rows((-3.0, 10, 1), (-1.0, 10, 6), (1.0, 10, 4), (4.0, 10, 9)))
    assert fitted.knots == pytest.approx((-3.0, 0.0, 4.0))
    assert fitted.values == pytest.approx([np.log((p + 0.5) / (n - p + 0.5)) for p, n in ((1, 10), (10, 20), (9, 10))])
    # Straight between the knots, slope 1 beyond them: every order is kept.
    low, middle, high = fitted.values
    mapped = fitted(np.array([-5.0, -1.5, 0.0, 1.0, 6.0]), np)
    assert mapped == pytest.approx([low - 2, (low + middle) / 2, middle, middle + (high - middle) / 4, high + 2])


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("beta", ConfigError, "one of .'temperature', 'platt', 'isotonic'.. Received: 'beta'"),
        ("platt", DataError, "a fitted slope of -"),
    ],
)
def test_what_cannot_be_calibrated(method, error, message):
    with pytest.raises(error, match=message):
        fit_calibration(method, *rows((2.0, 8, 2), (-2.0, 8, 6)))


def test_one_label_cannot_be_calibrated():
    with pytest.raises(DataError, match="rows of both labels"):
        fit_calibration("platt", *rows((2.0, 8, 8)))
    with pytest.raises(ValueError, match="must rise"):
        LogitMap(slope=-1.0)


@pytest.mark.parametrize("settings", [{"slope": 2.0, "intercept": 1.0}, {"knots": (0.0, 1.0), "values": (0.0, 3.0)}])
def test_calibrated_logit_layer(settings, tmp_path):
    inputs = np.linspace(-2, 2, 6, dtype="float32")[:, None] + 0.05
    check_layer(CalibratedLogit(settings), [inputs], {}, tmp_path)
    np.testing.assert_allclose(CalibratedLogit(settings)(inputs), LogitMap(**settings)(inputs, np), rtol=1e-6)


def test_a_run_is_calibrated_and_its_predictions_are(tiny_run):
    report = calibrate_run(tiny_run, "isotonic")
    after, before = (report[when]["validation"]["click"] for when in ("after", "before"))
    assert after["calibration_error"] < before["calibration_error"] and after["log_loss"] < before["log_loss"]
    assert len(calibration_table(report).splitlines()) == 5
    plain, calibrated = tiny_run.load_model(), tiny_run.load_model(calibrated=True)
    assert set(calibrated.calibration) == {"click", "buy"} and not plain.calibration
    evaluated = evaluate_run(tiny_run, "validation", calibrated=True)["validation"]["click"]
    assert evaluated["calibration_error"] == pytest.approx(after["calibration_error"])

    # The SavedModel's functions predict what the evaluation does.
    prepared = tiny_run.prepared
    values = predict(calibrated, prepared.part("test", calibrated.task_names)).values
    serving = ServingModule(calibrated, prepared.encoder)
    raw = {name: tf.convert_to_tensor(column) for name, column in pair_rows(prepared, "test", kind="raw").items()}
    for task, predicted in serving.probabilities(**raw).items():
        np.testing.assert_allclose(predicted, values[task], atol=1e-5)
    assert serving.describe_tasks()["click"]["calibration"]["knots"] == calibrated.calibration["click"].knots

    # A calibration belongs to one checkpoint.
    keras.utils.set_random_seed(5)
    tiny_run.save_checkpoint(build_model("mvke", prepared.schema(), tiny_run.config.model))
    with pytest.raises(RunError, match=r"is that of an earlier checkpoint. Fit it again: mvke calibrate"):
        tiny_run.load_model(calibrated=True)
    tiny_run.calibration_file.write_text(json.dumps({"checkpoint": "", "tasks": {"click": {"slop": 1}}}))
    with pytest.raises(RunError, match="is damaged"):
        tiny_run.load_model(calibrated=True)
    tiny_run.calibration_file.unlink()
    with pytest.raises(RunError, match="is not calibrated yet: mvke calibrate"):
        evaluate_run(tiny_run, calibrated=True)


def test_onnx_is_calibrated(tmp_path):
    # A logit near 0 has a large relative error.
    keras.utils.set_random_seed(0)
    features = (Feature("u", "user", 5), Feature("i", "item", 5))
    model = build_model("hard_sharing", Schema(features, (Task("click"), Task("stars", "regression"))))
    given = {"u": np.array([0, 1, 4], "int32"), "i": np.array([3, 2, 0], "int32")}
    plain = {task: np.asarray(output) for task, output in model(given).items()}
    model.calibration = {"click": LogitMap(knots=(-0.01, 0.0, 0.01), values=(-2.0, 0.0, 1.0))}
    path = export_onnx(model, tmp_path / "model.onnx", given)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    click, stars = session.run(["click", "stars"], given)
    np.testing.assert_allclose(click, model.calibration["click"](plain["click"], np), rtol=1e-4)
    np.testing.assert_allclose(stars, plain["stars"], rtol=1e-5)
    assert json.loads(path.with_suffix(".json").read_text())["outputs"]["click"]["description"].startswith("calibrated")
    assert dataclasses.asdict(model.for_tasks(["click"]).calibration["click"])["knots"] == (-0.01, 0.0, 0.01)
