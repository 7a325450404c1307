# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import runpy
import shutil
import sys

import keras
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mvke_tf.experiments import regimes
from mvke_tf.experiments.regimes import (
    MODELS,
    TASKS,
    Regime,
    RegimesConfig,
    expected_auc,
    figure,
    results_table,
    run_experiment,
    true_probabilities,
    verdict,
)
from mvke_tf.metrics import auc
from mvke_tf.models import build_model
from mvke_tf.run import Run
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "scripts" / "regimes_experiment.py"
SMALL = RegimesConfig((4,), (0.5,), worlds=2, rows=3_000, users=60, ads=50)
SMALL = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(SMALL.model, embedding_dim=2, hidden_dims=(2,)),
    training=dataclasses.replace(SMALL.training, epochs=1, batch_size=512),
)


def results_with(shares):
    """Results whose shares of the attainable are `{model: {interests: [share of each world]}}`, in both tasks."""
    rows = [
        {"model": model, "interests": interests, "agreement": 0.5, "world": world}
        | {task: 0.5 + 0.4 * share for task in TASKS}
        | {f"{task}_truth": 0.9 for task in TASKS}
        for model, by_interests in shares.items()
        for interests, of_worlds in by_interests.items()
        for world, share in enumerate(of_worlds)
    ]
    # The order of the rows does not matter.
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


# With one interest models are alike, with four MVKE is ahead of MMoE and behind PLE; worlds differ more than models do.
ALIKE = np.array([0.3, 0.5, 0.7, 0.9, 0.4])
NOISE = np.array([1e-3, -1e-3, 5e-4, -5e-4, 0.0])
RESULTS = results_with(
    {model: {1: ALIKE, 4: ALIKE} for model in MODELS}
    | {"mmoe": {1: ALIKE + NOISE, 4: ALIKE - 0.02 + NOISE}, "ple": {1: ALIKE, 4: ALIKE + 0.01 - NOISE}}
)
CONFIG = RegimesConfig((1, 4), (0.5,))


def test_the_expected_auc_is_that_of_many_drawn_labels():
    random = np.random.default_rng(0)
    p, scores = random.random(40), random.integers(0, 8, 40).astype(float)
    drawn = random.random((20_000, 40)) < p
    copies = np.repeat(scores[None], len(drawn), axis=0)
    assert expected_auc(p, scores) == pytest.approx(auc(drawn.ravel().astype(int), copies.ravel()), abs=2e-3)
    # By hand: the positives weigh 1 and 0.5, the negatives 0.5 and 1; of the pairs 1 * 1 and 0.5 * 0.5 within a row are
    # ties, 1 * 0.5 is in order.
    assert expected_auc(np.array([1.0, 0.5, 0.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(
        (1 * 0.5 + 1 * 1 + 0.5 * 0.5 / 2 + 0.5 * 1) / (1.5 * 1.5)
    )
    assert expected_auc(p, np.zeros(40)) == 0.5


def test_a_regime_of_both_curves_is_trained_once():
    assert CONFIG.regimes == [Regime(1, 0.5), Regime(4, 0.5)]
    assert len(RegimesConfig().regimes) == 7
    with pytest.raises(ValueError, match="Intervals need two worlds or more"):
        RegimesConfig(worlds=1)


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by the first weights of a model; the names of the runs."""
    names = []

    def finished_run(config, folder, prepared, log, progress):
        names.append(folder.name)
        keras.utils.set_random_seed(config.training.seed)
        run = Run.create(folder, config, prepared)
        schema = prepared.schema(config.model.tasks, config.model.objective)
        run.save_checkpoint(build_model(config.model.name, schema, config.model))
        run.state_file.write_bytes(b"large")
        return run

    monkeypatch.setattr(regimes, "finished_run", finished_run)
    monkeypatch.setattr(regimes, "MODELS", ("mvke", "single_task"))
    return names


def test_it_trains_every_model_once_and_goes_on(tmp_path, trained):
    results = run_experiment(tmp_path / "out", tmp_path / "data", SMALL)
    assert results[["model", "interests", "agreement", "world"]].to_numpy().tolist() == [
        [model, 4, 0.5, world] for world in (0, 1) for model in ("mvke", "single_task")
    ]
    name = "interests4-agreement0.5-world0"
    assert trained[:3] == [f"{name}-mvke", f"{name}-single_task_click", f"{name}-single_task_install"]
    assert len(trained) == 2 * 3 and not list(tmp_path.glob("out/runs/*/state*"))
    # The truth is a property of the log, the same for all models.
    assert results.groupby(["interests", "world"])[["click_truth", "install_truth"]].nunique().to_numpy().max() == 1
    assert (results[["click_truth", "install_truth"]].to_numpy() > 0.7).all()
    assert ((results["click"] < results["click_truth"]) & (results["click"] > 0.3)).all()

    data = regimes._Data(tmp_path / "data", SMALL, Regime(4, 0.5), 1)
    clicks = data.prepared.label("click")[data.prepared.part_rows("test")]
    assert data.truth["click"].shape == clicks.shape and (data.truth["install"] < data.truth["click"]).all()
    assert data.truth["click"].mean() == pytest.approx(clicks.mean(), abs=0.03)
    assert auc(clicks.astype(int), data.truth["click"]) == pytest.approx(results["click_truth"].iloc[-1], abs=0.1)
    assert true_probabilities(data.prepared, "train")["click"].shape == data.prepared.part_rows("train").shape

    # What is there is only read.
    cell = tmp_path / "out" / "cells" / "interests4-agreement0.5-world1-mvke.json"
    before = json.loads(cell.read_text())
    cell.unlink()
    shutil.rmtree(tmp_path / "out" / "runs" / cell.stem)
    trained.clear()
    pd.testing.assert_frame_equal(run_experiment(tmp_path / "out", tmp_path / "data", SMALL), results)
    assert trained == [cell.stem] and json.loads(cell.read_text()) == before
    with pytest.raises(ValueError, match="made with other settings; choose another folder"):
        run_experiment(tmp_path / "out", tmp_path / "data", dataclasses.replace(SMALL, rows=4_000))
    cell.write_text("{}")
    with pytest.raises(ValueError, match=f"{cell.name} is damaged; delete it"):
        run_experiment(tmp_path / "out", tmp_path / "data", SMALL)


def test_the_verdict_follows_the_numbers():
    lines = dict(line.split(": ", 1) for line in verdict(RESULTS, CONFIG).splitlines())
    assert lines["mvke against mmoe"] == (
        "ahead in click with 4 interests at 0.5 (+0.020); install with 4 interests at 0.5 (+0.020)."
    )
    assert lines["mvke against ple"].startswith("behind in click with 4 interests at 0.5 (-0.010); install with")
    assert lines["mvke against shared_bottom"] == "not told apart in any regime."


def test_table_and_figure():
    lines = results_table(RESULTS, CONFIG).splitlines()
    assert lines[0] == "| interests | agreement | task | " + " | ".join(MODELS) + " |"
    assert lines[2].startswith("| 1 | 0.5 | click | 0.560 ± 0.299 | 0.560 ± 0.299 | 0.560")
    assert lines[4].startswith("| 4 | 0.5 | click | 0.560 ± 0.299 | 0.540 ± 0.29")
    panels = figure(RESULTS, CONFIG).axes
    assert [panel.get_title() for panel in panels] == ["click", "click", "install", "install"]
    assert [panel.get_xlabel() for panel in panels[:2]] == ["interests of a user", "agreement of the tasks"]
    assert [container.get_label() for container in panels[0].containers] == list(MODELS[1:])
    # mmoe is as good as mvke with one interest, and behind it with four, in each world by nearly as much.
    mean, caps, _ = panels[0].containers[0].lines
    half = stats.t.ppf(0.975, 4) * NOISE.std(ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(mean.get_ydata(), [0, -0.02], atol=1e-9)
    np.testing.assert_allclose(
        [cap.get_ydata() for cap in caps], [[-half, -0.02 - half], [half, -0.02 + half]], rtol=1e-6
    )


def test_script(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = []
    monkeypatch.setattr(regimes, "run_experiment", lambda *args: asked.append(args) or RESULTS)
    options = ["--output_dir", str(tmp_path), "--interests", "1", "4", "--agreements", "0.5", "--epochs", "3"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    output = capsys.readouterr().out
    assert ended.value.code == 0 and verdict(RESULTS, CONFIG) in output and results_table(RESULTS, CONFIG) in output
    ((folder, _, config),) = asked
    assert folder == tmp_path and config.training.epochs == 3 and config.regimes == CONFIG.regimes
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(tmp_path / "results.csv")) == len(RESULTS)
