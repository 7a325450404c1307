# SPDX-License-Identifier: Apache-2.0
"""Runs and exports that earlier versions have made are read, go on and are served as before.

`older/*.tar.xz` hold the small dataset of `tests/small.py`, prepared, and a run of two of three epochs with its export
and, in `expected.json`, its report and the history of the run without the interruption:

    0.2.0_mvke      the release: lists without mean weight and length, prepared data of format 1
    0.2.1dev_mmoe   lists with both, prepared data of format 2; log-variances, row-sparse updates
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.evaluation import evaluate_run
from mvke_tf.inference.predictions import predict
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from mvke_tf.serving.rest.model import ServedModel
from mvke_tf.training import train_run
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

ARCHIVES = sorted((REPOSITORY / "tests" / "older").glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def older(request, tmp_path) -> tuple[Run, dict]:
    """A run, and what is known of it."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "runs" / "run"
    return Run.open(folder), json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def close(found, expected, tolerance):
    """Whether two JSON values are equal but for the last digits of their numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)
    return found == expected


def test_there_are_several():
    assert len(ARCHIVES) == 2


def test_it_is_evaluated_and_served_as_before(older):
    run, expected = older
    report = evaluate_run(run, "test")
    # 96 rows: where rounding swaps two of them, an AUC moves by a thousandth.
    assert close({part: report[part] for part in expected["report"]}, expected["report"], 2e-3)
    losses = [
        [values[task]["log_loss"] for task in ("click", "buy")]
        for values in (report["test"], expected["report"]["test"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    test = run.prepared.part("test")
    wanted = predict(run.load_model(), test).values
    users, items = run.prepared.users.raw, run.prepared.items.raw
    raw = {name: column[test.user_rows] for name, column in users.items()}
    raw |= {name: column[test.item_rows] for name, column in items.items()}
    # The export of that time, and one of the same run now.
    for folder in (run.export / "1", export_run(run)):
        signature = tf.saved_model.load(str(folder)).signatures["serving_default"]
        names = signature.structured_input_signature[1]
        answer = signature(**{name: tf.constant(np.asarray(raw[name]).tolist(), names[name].dtype) for name in names})
        for task, values in wanted.items():
            np.testing.assert_allclose(answer[task].numpy().ravel(), values, rtol=0, atol=1e-6)
        assert ServedModel(Path(folder)).version == int(folder.name)


def test_it_goes_on_where_it_was(older):
    run, expected = older
    assert len(run.history()) == 2
    result = train_run(run)
    assert [epoch["epoch"] for epoch in result.history] == [1, 2, 3]
    for found, wanted in zip(result.history, expected["history"], strict=True):
        for name in ("loss", "val_loss"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
