import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from mvke_tf.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.dataset import Batches
from mvke_tf.data.prepared import Prepared, prepared_path
from mvke_tf.evaluation import evaluate_run, predict
from mvke_tf.models import MODELS
from mvke_tf.run import Run, RunError
from mvke_tf.training import (
    EpochWatch,
    TrainingError,
    best_epoch,
    build_training_model,
    is_finished,
    train,
    train_run,
    training_notes,
    validation_score,
)
from tests.conftest import REPOSITORY

DATA = DataConfig(history_length=5)
MODEL = ModelConfig(embedding_dim=8, hidden_dims=(8,), dropout_rate=0.3)
TRAINING = TrainingConfig(epochs=3, batch_size=32, patience=0, seed=5)


@pytest.fixture
def new_run(tiny_run_template, tmp_path):
    """Makes runs on the small data set, by name and training settings."""

    def make(name, model=MODEL, **settings):
        config = RunConfig(DATA, model, dataclasses.replace(TRAINING, **settings))
        return Run.create(tmp_path / "runs" / name, config, tiny_run_template / "prepared.npz")

    return make


def state(run):
    with np.load(run.state_file) as file:
        return {name: file[name] for name in file.files if name != "history"}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def quiet(line):
    """Reports nothing."""


def test_train_learns_and_keeps_the_best_checkpoint(new_run):
    result = train_run(new_run("a", epochs=8, batch_size=8, learning_rate=0.01), report=quiet)
    losses = [epoch["loss"] for epoch in result.history]
    assert losses[-1] < losses[0] - 0.01
    assert [epoch["epoch"] for epoch in result.history] == list(range(1, 9))
    aucs = [epoch["val_score"] for epoch in result.history]
    assert result.best_epoch == int(np.argmax(aucs)) + 1
    assert result.rows_per_second > 0
    assert result.peak_memory > 50 * 2**20

    run = Run.open(result.run.checkpoint)
    validation = run.prepared.part("validation")
    best = run.load_model()
    _, fresh = build_training_model(run.config, run.prepared.schema_for(run.config.model), steps_per_epoch=1)
    fresh.set_weights(best.get_weights())
    logs = fresh.evaluate(Batches(validation, 4096).in_order(), return_dict=True, verbose=0)
    assert np.mean([logs["ctr_auc"], logs["cvr_auc"]]) == pytest.approx(max(aucs), abs=1e-6)


def test_logs(new_run):
    run = train_run(new_run("a"), report=quiet).run
    lines = run.log_file.read_text().splitlines()
    assert len(lines) == 4
    assert {"epoch", "loss", "ctr_auc", "cvr_auc", "val_score", "val_loss"} <= set(lines[0].split(","))
    assert list(run.logs.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("distinct", [False, True])
def test_resumed_run_is_bit_identical(new_run, monkeypatch, distinct):
    unbroken = train_run(new_run("unbroken", distinct=distinct), report=quiet)
    broken = new_run("broken", distinct=distinct)
    real = EpochWatch.on_train_batch_end

    def interrupt(self, batch, logs=None):
        if self._epoch == 1 and batch == 2:
            raise KeyboardInterrupt
        real(self, batch, logs)

    monkeypatch.setattr(EpochWatch, "on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(broken, report=quiet)
    monkeypatch.setattr(EpochWatch, "on_train_batch_end", real)
    resumed = train_run(broken, report=quiet)
    assert_same_state(state(unbroken.run), state(resumed.run))
    assert resumed.best_epoch == unbroken.best_epoch
    for ours, theirs in zip(resumed.history, unbroken.history, strict=True):
        assert {k: v for k, v in ours.items() if k != "rows_per_second"} == {
            k: v for k, v in theirs.items() if k != "rows_per_second"
        }


def test_same_seed_same_weights_other_seed_other_weights(new_run):
    first, second, other = (
        train_run(new_run(name, seed=seed, epochs=1), report=quiet).run for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_same_state(state(first), state(second))
    assert any(not np.array_equal(value, state(other)[name]) for name, value in state(first).items())


def test_resumed_after_kill_9_is_bit_identical(new_run):
    settings = {"epochs": 6, "batch_size": 1}
    unbroken = train_run(new_run("unbroken", **settings), report=quiet)
    killed = new_run("killed", **settings)
    command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "--resume", str(killed.folder)]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not killed.state_file.is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert "Continuing" in resumed.stdout
    assert_same_state(state(unbroken.run), state(killed))


def test_a_finished_run_is_not_trained_again(new_run):
    run = train_run(new_run("a"), report=quiet).run
    before = state(run)
    lines = []
    result = train_run(run, report=lines.append)
    assert "finished already" in lines[-1]
    assert result.rows_per_second is None
    assert_same_state(before, state(run))


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(new_run):
    run = train_run(new_run("a", epochs=1), report=quiet).run
    checkpoint = run.checkpoint.read_bytes()
    with np.load(run.state_file) as file:
        arrays = dict(file)
    weight = next(name for name, array in arrays.items() if array.ndim == 2 and array.dtype == np.float32)
    arrays[weight] = np.full_like(arrays[weight], np.nan)
    np.savez(run.state_file, **arrays)
    settings = run.config.to_dict()
    settings["training"]["epochs"] = 2
    (run.folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(TrainingError, match=r"epoch 2, step 1\. The best checkpoint so far, .*best\.keras, is kept"):
        train_run(Run.open(run.folder), report=quiet)
    assert run.checkpoint.read_bytes() == checkpoint


def test_divergence_in_the_first_epoch_says_that_there_is_no_checkpoint(new_run):
    run = new_run("a", learning_rate=1e30, batch_size=8)
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+\. No epoch had finished.*lower --learning_rate"):
        train_run(run, report=quiet)
    assert not run.checkpoint.exists()


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mvke"}))
def test_every_model_trains_and_loads(new_run, name):
    tasks = ("cvr",) if name == "single_task" else ("ctr", "cvr")
    model = dataclasses.replace(MODEL, name=name, tasks=tasks, num_experts=3, hidden_dims=(8, 4), embedding_stddev=1.0)
    result = train_run(new_run(name, model, epochs=1), report=quiet)
    run = result.run
    loaded = run.load_model()
    assert list(loaded.output) == list(tasks)
    assert loaded.name == name
    data = run.prepared.part("validation", tasks)
    aucs = []
    for task, scores in predict(loaded, data).items():
        metric = keras.metrics.AUC()
        metric.update_state(data.labels[task], scores)
        aucs.append(float(metric.result()))
    assert np.mean(aucs) == pytest.approx(result.history[0]["val_score"], abs=1e-3)


def test_divergence_in_the_last_step_of_an_epoch_is_seen(new_run):
    run = new_run("a", learning_rate=1e30, batch_size=100_000)
    with pytest.raises(TrainingError, match=r"The validation loss became .* in epoch 1, after the last step"):
        train_run(run, report=quiet)
    assert not run.checkpoint.exists()
    assert not run.state_file.exists()


def test_early_stopping():
    history = [{"val_score": auc} for auc in (0.6, 0.8, 0.8, 0.7)]
    assert best_epoch(history) == 1
    assert is_finished(history, TrainingConfig(epochs=10, patience=2))
    assert not is_finished(history, TrainingConfig(epochs=10, patience=3))
    assert not is_finished(history, TrainingConfig(epochs=10, patience=0))
    assert is_finished(history, TrainingConfig(epochs=4, patience=0))
    assert not is_finished([], TrainingConfig(patience=1))


def test_validation_score_is_the_mean_auc_or_minus_the_mean_rmse():
    logs = {"ctr_auc": 0.1, "val_ctr_auc": 0.7, "val_cvr_auc": 0.9, "val_loss": 3.0, "rating_rmse": 9.0}
    assert validation_score(logs) == pytest.approx(0.8)
    assert validation_score({**logs, "val_rating_rmse": 1.5}) == pytest.approx(0.8)
    assert validation_score({"val_rating_rmse": 1.5, "val_stars_rmse": 0.5, "val_loss": 3.0}) == pytest.approx(-1.0)


def test_state_of_another_model_is_refused(new_run):
    run = train_run(new_run("a", epochs=1), report=quiet).run
    settings = run.config.to_dict()
    settings["model"]["hidden_dims"] = [8, 8]
    settings["training"]["epochs"] = 2
    (run.folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RunError, match="variables"):
        train_run(Run.open(run.folder), report=quiet)


def test_train_script_end_to_end(tiny_run_template, tmp_path):
    path = prepared_path(tmp_path / "data", DATA)
    path.parent.mkdir(parents=True)
    os.link(tiny_run_template / "prepared.npz", path)
    command = [
        *(
            sys.executable,
            str(REPOSITORY / "scripts" / "train.py"),
            "--model",
            "mvke",
            "--epochs",
            "1",
            "--batch_size",
            "64",
        ),
        *("--embedding_dim", "8", "--hidden_dims", "8", "4", "--num_virtual_kernels", "3", "--dropout_rate", "0.1"),
        *("--learning_rate", "0.01", "--seed", "3", "--run_name", "first", "--history_length", "5"),
        *("--data_dir", str(tmp_path / "data"), "--runs_dir", str(tmp_path / "runs")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "runs" / "first")
    assert run.config.training == TrainingConfig(epochs=1, batch_size=64, learning_rate=0.01, seed=3)
    assert run.config.model == ModelConfig(embedding_dim=8, hidden_dims=(8, 4), num_virtual_kernels=3, dropout_rate=0.1)
    assert run.load_model().get_layer("virtual_kernels").num_kernels == 3
    assert "rows per second" in done.stdout
    assert "Peak memory" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_settings_that_cannot_be_built_leave_no_run_behind(tiny_run_template, tmp_path):
    path = prepared_path(tmp_path / "data", DATA)
    path.parent.mkdir(parents=True)
    os.link(tiny_run_template / "prepared.npz", path)
    config = RunConfig(DATA, dataclasses.replace(MODEL, name="mmoe", gate_top_k=11), TRAINING)
    with pytest.raises(ValueError, match=r"gate_ctr: .* at most the number of experts that this gate weighs, 10"):
        train(config, "bad", tmp_path / "data", tmp_path / "runs", quiet)
    assert not (tmp_path / "runs").exists()


def test_settings_without_effect_are_named():
    def notes(training=TRAINING, **settings):
        return list(training_notes(RunConfig(DATA, dataclasses.replace(MODEL, **settings), training)))

    assert notes() == notes(gate_top_k=2) == []
    assert notes(name="shared_bottom", gate_top_k=1) == [
        "shared_bottom does not read gate_top_k; this has no influence."
    ]
    (only,) = notes(gate_top_k=1)
    assert "only balance_coefficient trains the gates" in only
    (decay,) = notes(dataclasses.replace(TRAINING, weight_decay=0.05))
    assert decay == "adam does not read weight_decay; adamw does."
    assert notes(dataclasses.replace(TRAINING, weight_decay=0.05, optimizer="adamw")) == []


def test_more_accumulation_than_batches_is_said(new_run):
    lines = []
    train_run(new_run("few", epochs=1, batch_size=10_000, accumulation_steps=2), report=lines.append)
    assert any("accumulation_steps 2 is more than the 1 batches of an epoch" in line for line in lines)


def test_labels_outside_their_domain_are_refused(new_run, monkeypatch):
    run = new_run("labels")
    whole = Prepared.part

    def wrong(self, part, *arguments, **settings):
        data = whole(self, part, *arguments, **settings)
        data.labels["cvr"][0] = 7
        return data

    monkeypatch.setattr(Prepared, "part", wrong)
    with pytest.raises(ValueError, match=r"binary task 'cvr' must be 0 or 1\. Received: 1 others, such as 7"):
        train_run(run, report=quiet)


def test_train_script_with_the_tasks_of_the_second_guide(tiny_run_template, tmp_path, monkeypatch, capsys):
    path = prepared_path(tmp_path / "data", DATA)
    path.parent.mkdir(parents=True)
    os.link(tiny_run_template / "prepared.npz", path)
    script = str(REPOSITORY / "scripts" / "train.py")
    shape = ["--model=mmoe", "--embedding_dim=8", "--hidden_dims", "8", "--num_experts=3", "--history_length=5"]
    where = [f"--data_dir={tmp_path / 'data'}", f"--runs_dir={tmp_path / 'runs'}", "--run_name=stars", "--epochs=1"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [script, "--tasks", "ctr", "rating", *shape, *where])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr()
    report = evaluate_run(Run.open(tmp_path / "runs" / "stars"), "test", report=quiet)["test"]
    assert {"auc", "accuracy"} < set(report["ctr"]) and {"mse", "rmse", "mae"} < set(report["rating"])
    assert report["rating"]["rmse"] ** 2 == pytest.approx(report["rating"]["mse"]) and 0.5 < report["rating"]["mae"] < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "TrainingConfig.batch_size must be at least 1"),
        (["--epochs", "many"], "invalid int value"),
        (["--model", "mvk"], "invalid choice: 'mvk'"),
        (["--model", "single_task"], "one task at a time, for example --tasks ctr"),
        (["--resume", "nowhere"], "There is no run at nowhere"),
        (["--resume", "nowhere", "--epochs", "50"], "leave the other settings out"),
        (["--config", "nowhere.json"], "--config needs a JSON file"),
        (["--dropout_rate", "1"], "in [0, 1)"),
        (["--model", "mmoe", "--task_experts", "0:5", "2:9"], "written as 0-5 or 0,2,4-6. Received: '0:5'"),
    ],
)
def test_train_script_refuses_bad_arguments(tmp_path, options, message):
    command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_learning_rate_falls_after_every_epoch(tiny_run):
    settings = dataclasses.replace(TRAINING, learning_rate=0.5, learning_rate_decay=0.1)
    config = dataclasses.replace(tiny_run.config, training=settings)
    _, model = build_training_model(config, tiny_run.prepared.schema_for(config.model), steps_per_epoch=3)
    rates = []
    for step in (0, 2, 3, 5, 6):
        model.optimizer.iterations.assign(step)
        rates.append(float(model.optimizer.learning_rate))
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])
