# SPDX-License-Identifier: Apache-2.0
"""Searches and comparisons whose runs are trained by several processes: the same as by one."""

import dataclasses
import json
import signal
import subprocess
import sys

import pandas as pd
import pytest

import mvke_tf.experiments.tune
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.engine import Engine
from mvke_tf.errors import RunError, TrainingError
from mvke_tf.experiments.compare import Comparison
from mvke_tf.experiments.tune import tune
from mvke_tf.run import Run
from tests.processes import end_command
from tests.small import small_prepared

BASE = RunConfig(
    model=ModelConfig(name="shared_bottom", embedding_stddev=1.0),
    training=TrainingConfig(epochs=2, batch_size=128, seed=3),
)
SETTINGS = ["--model=shared_bottom", "--embedding_stddev=1", "--epochs=2", "--batch_size=128", "--seed=3"]


class Ahead(Engine):
    """Two workers that ask for everything they are given before they do anything, in this process."""

    def __init__(self):
        super().__init__("local", 2)
        self.asked = []

    def map(self, function, items):
        items = list(items)
        self.asked.append(len(items))
        return map(function, items)


@pytest.fixture(scope="module")
def searched(data, tmp_path_factory):
    """A search by one process: its folder."""
    folder = tmp_path_factory.mktemp("alone")
    tune(data[1], BASE, folder, 3)
    return folder


@pytest.mark.parametrize(
    ("tuner", "asked"), [("random", [16]), pytest.param("bayesian", [2] * 8, marks=pytest.mark.slow)]
)
def test_what_is_asked_for_at_a_time(data, tmp_path, monkeypatch, tuner, asked):
    """Without training: the score of a trial is a function of its settings."""

    def score(config, *rest):
        if config.model.dropout_rate == 0.5:
            raise TrainingError("The loss became nan.")
        return config.model.embedding_dim / 1000 + config.model.num_virtual_kernels

    monkeypatch.setattr(mvke_tf.experiments.tune, "_run_trial", score)
    monkeypatch.setattr(
        mvke_tf.experiments.tune,
        "_row",
        lambda base, tasks, trial, folder: {"trial": trial.trial_id, **trial.hyperparameters.values},
    )
    # With the default seed, too.
    ahead, base = Ahead(), RunConfig(model=ModelConfig(name="mvke"))
    fixed = ["learning_rate", "hidden_width"]
    together = tune(data[1], base, tmp_path / "together", 16, tuner, fixed, ahead)
    assert ahead.asked == asked
    # After the 9 points with which a Bayesian search starts its proposals depend on what it knows.
    alone = tune(data[1], base, tmp_path / "alone", 16, tuner, fixed)
    assert together.equals(alone) == (tuner == "random")
    assert (together["dropout_rate"] < 0.5).all()
    failed = [json.loads(path.read_text())["status"] for path in tmp_path.glob("together/oracle/trial_*/trial.json")]
    assert failed.count("FAILED") == 16 - len(together) > 0


@pytest.mark.slow
def test_an_interrupted_bayesian_search_repeats_all_trials_that_were_on(data, tmp_path, monkeypatch):
    """Without training, and beyond the random trials that it starts with."""
    seen = []

    def score(config, folder, number, *rest):
        seen.append((number, config))
        if len(seen) == 8:
            raise KeyboardInterrupt
        return config.model.embedding_dim / 1000 + config.model.num_virtual_kernels

    monkeypatch.setattr(mvke_tf.experiments.tune, "_run_trial", score)
    monkeypatch.setattr(mvke_tf.experiments.tune, "_row", lambda base, tasks, trial, folder: {"trial": trial.trial_id})
    base, fixed = RunConfig(model=ModelConfig(name="mvke")), ["learning_rate", "hidden_width", "dropout_rate"]
    with pytest.raises(KeyboardInterrupt):
        tune(data[1], base, tmp_path, 10, "bayesian", fixed, Ahead())
    before = seen.copy()
    table = tune(data[1], base, tmp_path, 10, "bayesian", fixed, Ahead())
    assert sorted(table["trial"].astype(int)) == list(range(10))
    # The eighth had been asked for with the seventh, whose score was kept.
    assert [number for number, _ in seen[len(before) :]] == [7, 8, 9] and seen[len(before)] == before[-1]


def assert_same_search(folder, alone):
    for name in ("trials.csv", "best_config.json"):
        assert (folder / name).read_text() == (alone / name).read_text()
    assert len(pd.read_csv(folder / "trials.csv")) == 3


@pytest.mark.slow
def test_a_search_on_ray_of_data_in_memory(searched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Engine("ray", 2, gpus_per_worker=1) as engine:
        # The tables are files in the one and frames in the other case, and the values are the same.
        tune(small_prepared(), BASE, "out", 3, engine=engine)
    assert_same_search(tmp_path / "out", searched)
    assert Run(tmp_path / "out" / "runs" / "trial-000").prepared_folder.parent == tmp_path / "data" / "prepared"


@pytest.mark.slow
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_search_that_is_ended_leaves_no_worker_and_goes_on(searched, data, tmp_path, sent, code):
    path, prepared = data
    command = [sys.executable, "-m", "mvke_tf", "tune", "--data", path, "--data_dir", prepared.folder.parents[1]]
    command += [*SETTINGS, "--out", tmp_path / "out", "--trials=3", "--workers=2"]
    end_command(command, lambda: list(tmp_path.glob("out/runs/trial-*/state.npz")), sent, code)
    assert not (tmp_path / "out" / "trials.csv").exists()
    if sent == signal.SIGKILL:
        # It may be another number, too.
        command.remove("--workers=2")
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert_same_search(tmp_path / "out", searched)
    assert "Run 3 of 3: trial-002 (learning_rate 0.001, embedding_dim" in output


@pytest.mark.slow
def test_trials_that_cannot_be_trained_and_folders_of_others(data, tmp_path):
    with Engine("local", 2) as engine:
        # The first task sees two of three kernels.
        config = ModelConfig(name="mvke", num_virtual_kernels=3, gate_top_k=3)
        base = dataclasses.replace(BASE, model=config)
        with pytest.raises(TrainingError, match="No trial could be trained"):
            tune(data[1], base, tmp_path / "none", 3, fixed=["num_virtual_kernels"], engine=engine)
        trials = [json.loads(path.read_text()) for path in tmp_path.glob("none/oracle/trial_*/trial.json")]
        assert [trial["status"] for trial in trials] == ["FAILED"] * 3
        assert all("gate_top_k" in trial["message"] for trial in trials)
        (tmp_path / "others" / "runs" / "trial-000").mkdir(parents=True)
        with pytest.raises(RunError, match="trial-000"):
            tune(data[1], BASE, tmp_path / "others", 3, engine=engine)


@pytest.mark.slow
def test_a_comparison(data, tmp_path):
    config = RunConfig(
        model=ModelConfig(embedding_dim=4, hidden_dims=(4,), embedding_stddev=1.0),
        training=TrainingConfig(epochs=1, batch_size=128),
    )
    results = {}
    for workers in (1, 2):
        with Engine("local", workers) as engine:
            models = dict.fromkeys(("shared_bottom", "popularity"), config)
            Comparison(tmp_path / str(workers), models, 2, data[1]).run(engine)
        table = pd.read_csv(tmp_path / str(workers) / "results.csv")
        assert table["examples_per_second"].notna().tolist() == [True, False, True]
        results[workers] = table.drop(columns="examples_per_second")
    pd.testing.assert_frame_equal(results[1], results[2], check_exact=True)
    logs = [path.name for path in (tmp_path / "2" / "logs").iterdir()]
    assert sorted(logs) == ["shared_bottom-seed0.log", "shared_bottom-seed1.log"]
    assert "Epoch" in (tmp_path / "2" / "logs" / logs[0]).read_text()
