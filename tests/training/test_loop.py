# SPDX-License-Identifier: Apache-2.0
import dataclasses
import logging
import shutil
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from mvke_tf.config import RunConfig, TrainingConfig
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError, DataError, RunError, TrainingError
from mvke_tf.inference.predictions import predict
from mvke_tf.metrics import auc
from mvke_tf.models import MODELS
from mvke_tf.run import Run
from mvke_tf.run_folder import best_epoch, is_finished
from mvke_tf.training import loop, train, train_run
from mvke_tf.training.callbacks import EpochWatch, epoch_line
from mvke_tf.training.loop import build_training_model, training_notes
from tests.conftest import REPOSITORY
from tests.training.helpers import MODEL, TRAINING, assert_same_history, assert_same_state, eagerly, state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny_prepared, tmp_path_factory):
    """What a training of the settings of `new_run` made; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train_run(Run.create(folder, RunConfig(MODEL, TRAINING), tiny_prepared))


def after_training(run, trained):
    """The new run, as if it had been trained as `trained` was."""
    for name in ("best.keras", "state.npz"):
        shutil.copyfile(trained.run.folder / name, run.folder / name)
    return run


def test_train_learns_and_keeps_the_best_checkpoint(new_run):
    result = train_run(new_run("a", epochs=8, batch_size=8, learning_rate=0.01))
    losses = [epoch["loss"] for epoch in result.history]
    assert losses[-1] < losses[0] - 0.01
    assert [epoch["epoch"] for epoch in result.history] == list(range(1, 9))
    scores = [epoch["val_score"] for epoch in result.history]
    assert result.best_epoch == int(np.argmax(scores)) + 1
    assert result.examples_per_second > 0
    assert result.peak_memory > 50 * 2**20

    run = Run.open(result.run.checkpoint)
    validation = run.prepared.part("validation")
    predicted = predict(run.load_model(), validation).values
    areas = []
    for task in run.prepared.schema().tasks:
        if task.kind == "binary":
            rows = validation.weights[task.name] > 0 if task.name in validation.weights else slice(None)
            areas.append(auc(validation.labels[task.name][rows], predicted[task.name][rows]))
            assert areas[-1] == result.history[result.best_epoch - 1][f"val_{task.name}_auc"]
    assert np.mean(areas) == max(scores)


def test_the_validation_loss_is_that_of_the_training(trained):
    """Keras says the same, batch by batch, of the last epoch's weights."""
    run = trained.run
    schema = run.prepared.schema()
    _, model = build_training_model(run.config, schema, steps_per_epoch=1)
    run.restore_state(model)
    batches = loop.Batches(run.prepared.part("validation"), 4096, deduplicate=True)
    logs = model.evaluate(batches.in_order(), return_dict=True, verbose=0)
    for name in ("loss", *(f"{task}_loss" for task in schema.task_names)):
        assert trained.history[-1][f"val_{name}"] == pytest.approx(logs[name], rel=1e-5), name


def test_logs(trained):
    run = trained.run
    lines = run.log_file.read_text().splitlines()
    assert len(lines) == 4
    columns = {"epoch", "loss", "val_loss", "val_score", "examples_per_second"}
    for task in run.prepared.schema().tasks:
        metrics = ("auc",) if task.kind == "binary" else ("rmse", "mae")
        columns |= {f"{task.name}_loss", f"val_{task.name}_loss", *(f"val_{task.name}_{name}" for name in metrics)}
    assert set(lines[0].split(",")) == columns
    assert list(run.logs.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(("deduplicate", "checkpoint_steps"), [(False, 1), (True, 0)])
def test_resumed_run_is_bit_identical(new_run, trained, monkeypatch, deduplicate, checkpoint_steps):
    unbroken = trained if deduplicate else train_run(new_run("unbroken", deduplicate=False))
    broken = new_run("broken", deduplicate=deduplicate, checkpoint_steps=checkpoint_steps)
    real = EpochWatch.on_train_batch_end

    def interrupt(self, batch, logs=None):
        if self._epoch == 1 and batch == 2:
            raise KeyboardInterrupt
        real(self, batch, logs)

    monkeypatch.setattr(EpochWatch, "on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"Continue with: mvke train --resume {broken.folder}"):
        train_run(broken)
    monkeypatch.setattr(EpochWatch, "on_train_batch_end", real)
    resumed = train_run(broken)
    assert_same_state(state(unbroken.run), state(resumed.run))
    assert resumed.best_epoch == unbroken.best_epoch
    assert_same_history(resumed.history, unbroken.history)


@eagerly
def test_another_seed_gives_other_weights(new_run, trained):
    other = train_run(new_run("other", seed=6, epochs=1))
    assert abs(other.history[0]["loss"] - trained.history[0]["loss"]) > 1e-4


# Stops for good at a moment of its training, and says so by a file.
STOPPED = """
import pathlib, sys, time
import numpy as np
from mvke_tf.run import Run
from mvke_tf.training import train_run
from mvke_tf.training.callbacks import EpochWatch, epoch_line

where, folder, reached = sys.argv[1:]

def stop(*arguments, **settings):
    pathlib.Path(reached).touch()
    time.sleep(600)

watch, write_array = EpochWatch.on_train_batch_end, np.lib.format.write_array

def in_a_batch(self, batch, logs=None):
    watch(self, batch, logs)
    if self._epoch == 1 and batch == 2:
        stop()

def in_the_state_file(file, array, **settings):
    write_array(file, array, **settings)
    if '"epoch": 2' in str(array):
        stop()

if where == "batch":
    EpochWatch.on_train_batch_end = in_a_batch
else:
    np.lib.format.write_array = in_the_state_file
train_run(Run.open(folder))
"""


@pytest.mark.parametrize("where", ["batch", "state file"])
def test_resumed_after_kill_9_is_bit_identical(new_run, trained, tmp_path, where):
    # One is killed after a state within the epoch.
    killed, reached = new_run("killed", checkpoint_steps=2 * (where == "batch")), tmp_path / "reached"
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, where, killed.folder, reached],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not reached.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert len(Run.open(killed.folder).history()) == 1
    progress = Run.open(killed.folder).progress()
    assert (progress.step if progress else 0) == (2 if where == "batch" else 0)
    assert bool(list(killed.folder.glob(".writing-*"))) == (where == "state file")
    resumed = train_run(Run.open(killed.folder))
    assert not list(killed.folder.rglob(".writing-*"))
    assert_same_state(state(trained.run), state(killed))
    assert_same_history(resumed.history, trained.history)


def test_a_finished_run_is_not_trained_again(trained, monkeypatch, caplog):
    run = trained.run
    before = state(run)
    monkeypatch.setattr(PreparedDataset, "load", None)
    with caplog.at_level(logging.INFO, "mvke_tf"):
        result = train_run(Run.open(run.folder))
    assert "All 3 epochs of" in caplog.text and "have finished already" in caplog.text
    assert result.examples_per_second is None and result.best_epoch == best_epoch(run.history()) + 1
    assert_same_state(before, state(run))


def test_a_lost_checkpoint_is_said(new_run, trained):
    run = after_training(new_run("a", epochs=4), trained)
    run.checkpoint.unlink()
    with pytest.raises(RunError, match=r"best\.keras is lost, although epochs of the run have finished"):
        train_run(Run.open(run.folder))


def test_a_run_that_another_process_trains_is_left_alone(new_run):
    run = new_run("a")
    with run.lock(), pytest.raises(RunError, match="is being trained by another process"):
        train_run(Run.open(run.folder))
    assert not run.state_file.exists()


@eagerly
def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(new_run, trained):
    run = after_training(new_run("a", epochs=4, learning_rate=1e30), trained)
    with pytest.raises(TrainingError, match=r"epoch 4, step \d\. The best checkpoint so far, .*best\.keras, is kept"):
        train_run(run)
    assert run.checkpoint.read_bytes() == trained.run.checkpoint.read_bytes()
    np.testing.assert_equal(run.history(), trained.history)


@eagerly
def test_divergence_in_the_first_epoch_says_that_there_is_no_checkpoint(new_run):
    run = new_run("a", learning_rate=1e30, batch_size=8)
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+\. No epoch had finished.*lower --learning_rate"):
        train_run(run)
    assert not run.checkpoint.exists()


@eagerly
def test_divergence_in_the_last_step_of_an_epoch_is_seen(new_run):
    run = new_run("a", learning_rate=1e30, batch_size=100_000)
    with pytest.raises(TrainingError, match=r"The validation loss became .* in epoch 1, after the last step"):
        train_run(run)
    assert not run.checkpoint.exists()
    assert not run.state_file.exists()


@eagerly
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mvke"}))
def test_every_model_trains_and_loads(new_run, tiny_prepared, name):
    tasks = tiny_prepared.task_names()[: 1 if name == "single_task" else None]
    model = dataclasses.replace(MODEL, name=name, tasks=tasks, num_experts=3, hidden_dims=(8, 4), embedding_stddev=1.0)
    result = train_run(new_run(name, model, epochs=1, batch_size=128))
    loaded = result.run.load_model()
    assert loaded.task_names == tasks
    assert loaded.name == name
    (epoch,) = result.history
    assert epoch["val_score"] == np.mean([value for name, value in epoch.items() if name.endswith("_auc")])


def test_early_stopping():
    history = [{"val_score": score} for score in (0.6, 0.8, 0.8, 0.7)]
    assert best_epoch(history) == 1
    assert is_finished(history, TrainingConfig(epochs=10, patience=2))
    assert not is_finished(history, TrainingConfig(epochs=10, patience=3))
    assert not is_finished(history, TrainingConfig(epochs=10, patience=0))
    assert is_finished(history, TrainingConfig(epochs=4, patience=0))
    assert not is_finished([], TrainingConfig(patience=1))


def test_state_of_another_model_is_refused(new_run, trained):
    run = after_training(new_run("a", dataclasses.replace(MODEL, hidden_dims=(8, 8)), epochs=4), trained)
    with pytest.raises(RunError, match="does not fit the model"):
        train_run(run)


def test_train_makes_a_run_and_builds_its_model_once(tiny_prepared, trained, tmp_path, monkeypatch, caplog):
    built = []
    build = loop.build_model

    def count(*arguments):
        built.append(arguments[0])
        return build(*arguments)

    monkeypatch.setattr(loop, "build_model", count)
    monkeypatch.setattr(PreparedDataset, "load", None)
    config = RunConfig(MODEL, TRAINING)
    keras.utils.set_random_seed(77)
    with caplog.at_level(logging.INFO, "mvke_tf"):
        result = train(tiny_prepared, config, "first", tmp_path / "runs")
    assert_same_state(state(result.run), state(trained.run))
    assert built == ["mvke"]
    assert result.run.folder == tmp_path / "runs" / "first"
    assert f"Run: {result.run.folder}   (follow it: tensorboard --logdir {tmp_path / 'runs'})" in caplog.text
    assert "parameters" in caplog.text
    monkeypatch.undo()
    assert Run.open(result.run.folder).prepared.digest == tiny_prepared.digest
    with pytest.raises(RunError, match="first exists already, and a run is never overwritten"):
        train(tiny_prepared, config, "first", tmp_path / "runs")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\nb", ".hidden", "é" * 101, " a", "a "])
def test_the_name_of_a_run_is_that_of_a_folder(tiny_prepared, tmp_path, name):
    with pytest.raises(ConfigError, match="that of one folder"):
        train(tiny_prepared, RunConfig(), name, tmp_path / "runs")
    assert not list(tmp_path.rglob("*x"))


def test_runs_are_not_kept_in_a_file(tiny_prepared, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(RunError, match="Runs are kept in a folder"):
        train(tiny_prepared, RunConfig(), "a", tmp_path / "runs")


@pytest.mark.parametrize(
    ("model", "training", "error", "message"),
    [
        ({"name": "mmoe", "gate_top_k": 11}, {}, ValueError, "at most the number of experts"),
        ({"name": "mvk"}, {}, ConfigError, "Unknown model"),
        ({"name": "single_task"}, {}, ConfigError, "one task at a time"),
        (
            {"task_kernels": ("0",)},
            {},
            ConfigError,
            "task_kernels must be left out, or one range for each",
        ),
        ({}, {"task_weights": (1.0,)}, ConfigError, "task_weights must be left out, or a weight for each"),
        ({"tasks": ("nothing",)}, {}, ValueError, "nothing"),
    ],
)
def test_settings_that_cannot_be_built_leave_no_run_behind(tiny_prepared, tmp_path, model, training, error, message):
    config = RunConfig(dataclasses.replace(MODEL, **model), dataclasses.replace(TRAINING, **training))
    with pytest.raises(error, match=message):
        train(tiny_prepared, config, "bad", tmp_path / "runs", tmp_path / "data")
    assert not list(tmp_path.iterdir())


def altered(monkeypatch, part, change):
    """Every `part` of prepared data comes changed."""
    whole = PreparedDataset.part

    def changed(self, name, *arguments, **settings):
        data = whole(self, name, *arguments, **settings)
        return change(data) if name == part else data

    monkeypatch.setattr(PreparedDataset, "part", changed)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_empty_part_leaves_no_run_behind(tiny_prepared, tmp_path, monkeypatch, part):
    altered(monkeypatch, part, lambda data: data.take(np.arange(0)))
    with pytest.raises(DataError, match=rf"The {part} part of .* has no row. Change \[split\]"):
        train(tiny_prepared, RunConfig(MODEL, TRAINING), "bad", tmp_path / "runs", tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_task_without_rows_leaves_no_run_behind(tiny_prepared, tmp_path, monkeypatch):
    task = tiny_prepared.task_names()[0]

    def without(data):
        return dataclasses.replace(data, weights={**data.weights, task: np.zeros(len(data), np.float32)})

    altered(monkeypatch, "train", without)
    with pytest.raises(DataError, match=rf"No row of the train part of .* counts for the tasks \['{task}'\]"):
        train(tiny_prepared, RunConfig(MODEL, TRAINING), "bad", tmp_path / "runs", tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_labels_outside_their_domain_are_refused(new_run, tiny_prepared, monkeypatch):
    task = tiny_prepared.task_names()[0]

    def wrong(data):
        labels = {name: np.array(label) for name, label in data.labels.items()}
        labels[task][:] = 7
        return dataclasses.replace(data, labels=labels)

    altered(monkeypatch, "train", wrong)
    with pytest.raises(ValueError, match=rf"binary task '{task}' must be 0 or 1\. Received: \d+ others, such as 7"):
        train_run(new_run("labels"))


@eagerly
def test_a_task_of_one_class_in_validation_does_not_choose_the_best_epoch(new_run, tiny_prepared, monkeypatch, caplog):
    first, second, *_ = tiny_prepared.task_names()

    def one_class(data):
        labels = {name: np.array(label) for name, label in data.labels.items()}
        labels[second][:] = 0
        return dataclasses.replace(data, labels=labels)

    altered(monkeypatch, "validation", one_class)
    with caplog.at_level(logging.WARNING, "mvke_tf"):
        result = train_run(new_run("a", epochs=2))
    assert [record.message for record in caplog.records if "has only the label 0" in record.message] == [
        caplog.records[0].message
    ]
    for epoch in result.history:
        assert np.isnan(epoch[f"val_{second}_auc"])
        assert epoch["val_score"] == epoch[f"val_{first}_auc"]
    np.testing.assert_equal(Run.open(result.run.folder).history(), result.history)


def test_settings_without_effect_are_named():
    def notes(training=TRAINING, **settings):
        return list(training_notes(RunConfig(dataclasses.replace(MODEL, **settings), training)))

    assert notes() == notes(gate_top_k=2) == []
    assert notes(name="shared_bottom", gate_top_k=1) == [
        "shared_bottom does not read gate_top_k; this has no influence."
    ]
    (only,) = notes(gate_top_k=1)
    assert "only load_balancing_weight trains the gates" in only
    (decay,) = notes(dataclasses.replace(TRAINING, weight_decay=0.05))
    assert decay == "adam does not read weight_decay; adamw does."
    assert notes(dataclasses.replace(TRAINING, weight_decay=0.05, optimizer="adamw")) == []


@eagerly
def test_more_accumulation_than_batches_is_said(new_run, caplog):
    with caplog.at_level(logging.INFO, "mvke_tf"):
        train_run(new_run("few", epochs=1, batch_size=10_000, gradient_accumulation_steps=2))
    assert "gradient_accumulation_steps 2 is more than the 1 batches of an epoch" in caplog.text


def test_the_learning_rate_falls_after_every_epoch(tiny_prepared):
    settings = dataclasses.replace(TRAINING, learning_rate=0.5, learning_rate_decay=0.1)
    _, model = build_training_model(RunConfig(MODEL, settings), tiny_prepared.schema(), steps_per_epoch=3)
    rates = []
    for step in (0, 2, 3, 5, 6):
        model.optimizer.iterations.assign(step)
        rates.append(float(model.optimizer.learning_rate))
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])


def test_the_line_of_an_epoch_fits_whatever_the_tasks_are():
    logs = {"epoch": 12, "loss": 1.23456, "val_loss": 123456.7, "val_score": -0.5, "examples_per_second": 9.0}
    for number, length in ((1, 5), (3, 5), (3, 80), (40, 12), (2, 200)):
        tasks = {f"val_{'t' * length}{index}_auc": 0.87654 for index in range(number)}
        line = epoch_line({**logs, **tasks}, 1_000_000, 98_765, False)
        assert len(line) <= 100
        shown = line.count("0.8765")
        assert line.endswith(f"  ({number - shown} more)" if shown < number else "0.8765")
    logs |= {"val_click_auc": 0.9, "val_click_loss": 0.3, "val_price_rmse": 2.0}
    begin = "Epoch 12/20  4 s  loss 1.235  val_loss 1.235e+05  score -0.5000"
    assert epoch_line(logs, 20, 4.4, False) == f"{begin}  click_auc 0.9000  price_rmse 2.000"
    assert epoch_line(logs, 20, 4.4, True) == f"{begin} (best)  click_auc 0.9000  (1 more)"
    assert epoch_line(logs | {"val_b_auc": 0.5}, 20, 4.4, False) == f"{begin}  click_auc 0.9000  (2 more)"


def test_training_says_one_line_per_epoch(new_run, capsys):
    seen = []
    history = train_run(
        new_run("lines", epochs=2),
        [keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))],
    ).history
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch ")]
    assert [line.split("  ")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"] and seen == [0, 1]
    assert f"  score {history[0]['val_score']:#.4g} (best)" in lines[0]
