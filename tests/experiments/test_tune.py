# SPDX-License-Identifier: Apache-2.0
import argparse
import dataclasses
import json
import sys

import pandas as pd
import pytest
import tensorflow as tf

import mvke_tf.experiments.tune
from mvke_tf import cli
from mvke_tf.cli import add_settings, read_settings
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError, MissingExtraError, RunError, TrainingError
from mvke_tf.experiments.tune import search_space, trial_config, tune
from mvke_tf.run import Run
from tests.small import small_prepared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`"),
]
BASE = RunConfig(
    model=ModelConfig(name="shared_bottom", embedding_stddev=1.0),
    training=TrainingConfig(epochs=1, batch_size=128, seed=3),
)


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Building graphs is most of the time that such small runs take."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, data):
    """A search of two trials, killed in the second and then finished: folder, table, trained configs of each call."""
    folder = tmp_path_factory.mktemp("tuning")
    _, prepared = data
    whole = mvke_tf.experiments.tune.finished_run
    calls = []

    def recorded(config, *rest):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(config, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvke_tf.experiments.tune, "finished_run", recorded)
        with pytest.raises(KeyboardInterrupt):
            tune(prepared, BASE, folder / "out", 2)
        table = tune(prepared, BASE, folder / "out", 2)
        # Nothing is left to do.
        assert tune(prepared, BASE, folder / "out", 2).equals(table)
    return folder, table, calls


def test_a_killed_trial_is_repeated_and_a_finished_one_is_not(searched):
    _, table, calls = searched
    assert len(calls) == 3
    assert calls[1] == calls[2] != calls[0]
    assert sorted(table["trial"]) == ["trial-000", "trial-001"]


def test_trials_are_the_runs(searched):
    folder, table, calls = searched
    assert table["val_score"].is_monotonic_decreasing
    for _, row in table.iterrows():
        run = Run(folder / "out" / "runs" / row["trial"])
        assert run.checkpoint.is_file() and run.config in calls
        assert row["val_score"] == pd.read_csv(run.log_file)["val_score"].max()
        assert (row["epochs"], row["best_epoch"]) == (1, 1)
        assert run.config == trial_config(BASE, {name: row[name] for name in search_space("shared_bottom")})
    pd.testing.assert_frame_equal(pd.read_csv(folder / "out" / "trials.csv"), table)


def test_the_best_configuration_is_a_file_for_train(searched):
    folder, table, _ = searched
    parser = argparse.ArgumentParser()
    add_settings(parser, "model", "training")
    config = read_settings(parser.parse_args([]), folder / "out" / "best_config.json")
    assert config == Run(folder / "out" / "runs" / table["trial"][0]).config
    assert config.training.seed == 3 and config.model.name == "shared_bottom"


def test_another_search_in_the_folder_is_refused(searched):
    folder, *_ = searched
    with pytest.raises(RunError, match="holds another search"):
        tune(small_prepared(), BASE, folder / "out", 2, tuner="bayesian")
    assert json.loads((folder / "out" / "tuning.json").read_text())["tuner"] == "random"


def test_the_space_is_the_guides():
    assert search_space("mvke") == {
        "learning_rate": (1e-3, 1e-4),
        "embedding_dim": (32, 64, 128),
        "num_virtual_kernels": (3, 5, 8),
        "hidden_width": (128, 256),
        "dropout_rate": (0.1, 0.3, 0.5),
    }
    assert set(search_space("mvke")) - set(search_space("mmoe")) == {"num_virtual_kernels"}
    with pytest.raises(ConfigError, match="Unknown model"):
        search_space("mvk")
    with pytest.raises(ConfigError, match=r"Only searched settings can be fixed: .*Received: \['epochs'\]"):
        search_space("mvke", ["epochs"])
    everything = ["learning_rate", "embedding_dim", "hidden_width", "dropout_rate"]
    with pytest.raises(ConfigError, match="nothing is left to search"):
        search_space("mmoe", everything)
    assert search_space("mvke", everything) == {"num_virtual_kernels": (3, 5, 8)}
    values = {"learning_rate": 1e-4, "embedding_dim": 32, "num_virtual_kernels": 8, "hidden_width": 128}
    config = trial_config(BASE, {**values, "dropout_rate": 0.5})
    assert config.training == TrainingConfig(epochs=1, batch_size=128, seed=3, learning_rate=1e-4)
    assert config.model == dataclasses.replace(
        BASE.model, embedding_dim=32, num_virtual_kernels=8, hidden_dims=(128, 64), dropout_rate=0.5
    )


@pytest.mark.parametrize("tuner", ["random", "bayesian"])
def test_the_best_of_many_is_found_and_diverged_ones_are_left_out(tuner, tmp_path, monkeypatch):
    """Without training: the score of a trial is a function of its settings."""
    seen = []

    def score(config, *rest):
        if config.model.dropout_rate == 0.5:
            raise TrainingError("The loss became nan.")
        seen.append(config)
        return config.model.embedding_dim / 1000 + config.training.learning_rate

    monkeypatch.setattr(mvke_tf.experiments.tune, "_run_trial", score)
    monkeypatch.setattr(
        mvke_tf.experiments.tune,
        "_row",
        lambda base, tasks, trial, folder: {"trial": trial.trial_id, "val_score": trial.score},
    )
    table = tune(small_prepared(), BASE, tmp_path, 12, tuner)
    assert len(table) == len(seen) < 12
    assert table["val_score"].tolist() == sorted((score(config) for config in list(seen)), reverse=True)
    best = json.loads((tmp_path / "best_config.json").read_text())
    assert best["model"]["embedding_dim"] / 1000 + best["training"]["learning_rate"] == table["val_score"][0]


def test_what_cannot_be_searched_is_explained(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"Expected one of \['bayesian', 'random'\]. Received: 'grid'"):
        tune(small_prepared(), BASE, tmp_path, 2, "grid")
    with pytest.raises(ConfigError, match="Unknown model"):
        tune(small_prepared(), RunConfig(model=ModelConfig(name="tower")), tmp_path, 2)
    assert not any(tmp_path.iterdir())

    def diverges(*arguments):
        raise TrainingError("The loss became nan.")

    monkeypatch.setattr(mvke_tf.experiments.tune, "_run_trial", diverges)
    with pytest.raises(TrainingError, match="No trial could be trained"):
        tune(small_prepared(), BASE, tmp_path, 5)
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mvke_tf\[tune\]'"):
        tune(small_prepared(), BASE, tmp_path, 2)


def test_a_trial_of_single_task_is_a_run_per_task(data, tmp_path):
    base = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, name="single_task"))
    table = tune(data[1], base, tmp_path, 1)
    runs = {task: Run(tmp_path / "runs" / f"trial-000_{task}") for task in ("click", "buy")}
    assert {task: run.config.model.tasks for task, run in runs.items()} == {"click": ("click",), "buy": ("buy",)}
    scores = [pd.read_csv(run.log_file)["val_score"].max() for run in runs.values()]
    assert table["val_score"].tolist() == [pytest.approx(sum(scores) / 2, rel=1e-12)]
    assert (table["epochs"][0], table["best_epoch"][0]) == (2, 2)
    best = RunConfig.from_dict(json.loads((tmp_path / "best_config.json").read_text()))
    assert best.model.tasks == ()  # as a comparison takes it
    for task, run in runs.items():
        assert RunConfig.from_dict(json.loads((tmp_path / f"best_config_{task}.json").read_text())) == run.config


def test_what_is_given_is_not_searched(data, tmp_path, monkeypatch, capsys):
    path, _ = data
    seen = []
    monkeypatch.setattr(mvke_tf.experiments.tune, "_run_trial", lambda config, *rest: seen.append(config) or 0.5)
    monkeypatch.setattr(
        mvke_tf.experiments.tune, "_row", lambda base, tasks, trial, folder: trial.hyperparameters.values
    )
    given = ["--learning_rate=2e-3", "--hidden_dims", "48", "24", "--embedding_dim=16", "--model=mvke"]
    where = ["--data", str(path), "--data_dir", str(path.parent / "data"), f"--out={tmp_path}", "--trials=4"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", *given, *where])
    assert ended.value.code == 0, capsys.readouterr()
    assert {(run.training.learning_rate, run.model.hidden_dims, run.model.embedding_dim) for run in seen} == {
        (2e-3, (48, 24), 16)
    }
    assert len({(run.model.num_virtual_kernels, run.model.dropout_rate) for run in seen}) == 4


def test_the_command_prints_the_table(searched, data, capsys):
    folder, table, _ = searched
    path, _ = data
    settings = ["--model=shared_bottom", "--embedding_stddev=1", "--epochs=1", "--batch_size=128", "--seed=3"]
    where = ["--data", str(path), "--data_dir", str(path.parent / "data"), f"--out={folder / 'out'}", "--trials=2"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", *settings, *where])
    output = capsys.readouterr().out
    assert ended.value.code == 0
    assert table.to_string(index=False) in output
    best = folder / "out" / "best_config.json"
    where = f"--data {path} --data_dir {path.parent / 'data'}"
    assert output.endswith(f"Next:  mvke train {where} --config {best}\n")
