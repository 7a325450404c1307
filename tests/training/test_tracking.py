# SPDX-License-Identifier: Apache-2.0
"""MLflow, with a store in a folder."""

import json

import keras
import pytest
from mlflow.tracking import MlflowClient

from mvke_tf.errors import ConfigError, MissingExtraError, TrainingError
from mvke_tf.training import train, train_run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return MlflowClient((tmp_path / "mlruns").as_uri())


def interrupt(epoch, logs):
    if epoch == 1:
        raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_in_the_same_mlflow_run(new_run, client):
    run = new_run("a", epochs=3)
    # Before MLflow hears of the second epoch.
    with pytest.raises(KeyboardInterrupt):
        train_run(run, [keras.callbacks.LambdaCallback(on_epoch_end=interrupt)], log=["mlflow"])
    number = json.loads(run.mlflow_file.read_text())["run_id"]
    logged = client.get_run(number)
    assert logged.info.status == "KILLED" and logged.info.run_name == "a"
    assert logged.data.params["training.epochs"] == "3" and logged.data.params["model.hidden_dims"] == "(8,)"
    assert client.get_experiment(logged.info.experiment_id).name == "small"
    history = train_run(run).history
    (again,) = client.search_runs([logged.info.experiment_id])
    assert (again.info.run_id, again.info.status) == (number, "FINISHED")
    for name in ("loss", "val_score", "val_click_auc"):
        points = sorted((point.step, point.value) for point in client.get_metric_history(number, name))
        assert points == [(epoch["epoch"], epoch[name]) for epoch in history]


def test_a_store_that_cannot_be_reached_loses_nothing(new_run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "file" / "mlruns").as_uri())
    run = new_run("b", epochs=1)
    with pytest.raises(TrainingError, match=r"MLflow cannot log .*continue: mvke train --resume .*/b"):
        train_run(run, log=["mlflow"])
    assert not run.mlflow_file.exists()
    assert len(train_run(run).history) == 1


def test_what_is_missing_is_said_before_a_run_is_made(tiny_prepared, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="Received: \\['wandb'\\]"):
        train(tiny_prepared, runs_dir=tmp_path / "runs", log=["wandb"])
    monkeypatch.setattr("mvke_tf.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mvke_tf\[mlflow\]'"):
        train(tiny_prepared, runs_dir=tmp_path / "runs", log=["mlflow"])
    assert not (tmp_path / "runs").exists()
