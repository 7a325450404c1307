# SPDX-License-Identifier: Apache-2.0
"""Data in buckets: trained shard by shard, evaluated and profiled as data in memory are."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest

from mvke_tf.config import RunConfig
from mvke_tf.data.batches import Shards, taken
from mvke_tf.data.buckets import prepare_in_buckets
from mvke_tf.data.store import PreparedDataset
from mvke_tf.evaluation import evaluate_run
from mvke_tf.run import Run
from mvke_tf.training import train_run
from mvke_tf.training.callbacks import EpochWatch
from tests.small import small_dataset, small_toml
from tests.training.helpers import MODEL, TRAINING, assert_same_history, assert_same_state, state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> PreparedDataset:
    """The small dataset in buckets; in windows of one."""
    folder = tmp_path_factory.mktemp("buckets") / "prepared" / "small"
    prepare_in_buckets(small_dataset(), folder, "contents", 4)
    return PreparedDataset.load(folder)


@pytest.fixture
def new_run(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("mvke_tf.data.store.WINDOW_BYTES", 1)

    def make(name, data=prepared, **settings):
        config = RunConfig(MODEL, dataclasses.replace(TRAINING, **settings))
        return Run.create(tmp_path / "runs" / name, config, data)

    return make


def assert_equal_reports(left, right) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            assert_equal_reports(value, right[name])
        else:
            assert value is right[name] is None or math.isclose(value, right[name], rel_tol=1e-6), name


def test_shards_are_the_part(prepared):
    whole, shards = prepared.part("train"), prepared.shards("train")
    assert isinstance(shards, Shards) and len(shards.sizes) > 1
    assert len(shards) == len(whole)
    start = 0
    for size, piece in zip(shards.sizes, shards.pieces(), strict=True):
        rows = slice(start, start + size)
        assert len(piece) == size
        np.testing.assert_array_equal(piece.item_rows, whole.item_rows[rows])
        for name, column in piece.users.items():
            np.testing.assert_array_equal(taken(column, piece.user_rows), whole.users[name][whole.user_rows[rows]])
            assert len(column) == len(np.unique(whole.user_rows[rows]))
        for task, label in piece.labels.items():
            np.testing.assert_array_equal(label, whole.labels[task][rows])
        start += size


@pytest.mark.parametrize("settings", [{}, {"deduplicate": False, "in_batch_weight": 0.1}])
def test_a_resumed_training_is_bit_identical(new_run, monkeypatch, settings):
    unbroken = train_run(new_run("unbroken", **settings))
    broken = new_run("broken", checkpoint_steps=2, **settings)
    real = EpochWatch.on_train_batch_end

    def interrupt(self, batch, logs=None):
        if self._epoch == 1 and batch == 3:
            raise KeyboardInterrupt
        real(self, batch, logs)

    monkeypatch.setattr(EpochWatch, "on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(broken)
    assert broken.progress().step == 2
    monkeypatch.setattr(EpochWatch, "on_train_batch_end", real)
    resumed = train_run(Run.open(broken.folder))
    assert_same_state(state(unbroken.run), state(resumed.run))
    assert_same_history(resumed.history, unbroken.history)


def test_measured_as_in_memory(new_run, tiny_prepared):
    """One model, of data in buckets and of the same in memory."""
    run, other = new_run("buckets", epochs=1), new_run("memory", tiny_prepared, epochs=1)
    history = train_run(run).history
    train_run(other)
    report = evaluate_run(run, "validation")
    for task in run.prepared.task_names():
        auc = report["validation"][task].get("auc")
        assert auc is None or auc == pytest.approx(history[0][f"val_{task}_auc"], rel=1e-6)
    other.checkpoint.write_bytes(run.checkpoint.read_bytes())
    for part in ("validation", "test"):
        assert_equal_reports(evaluate_run(run, part), evaluate_run(other, part))
        assert (run.figures / f"{part}_groups_country.png").is_file()


def test_every_command_takes_data_in_buckets(tmp_path, mvke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mvke_tf.data.buckets.number_of_buckets", lambda dataset, memory_mb: 4 if memory_mb else 1)
    declaration = small_toml(tmp_path)
    settings = ("--epochs", 1, "--batch_size", 64, "--embedding_dim", 8, "--hidden_dims", 8)
    commands = [
        ("prepare", "--data", declaration, "--memory_mb", 100),
        ("train", "--data", declaration, "--run_name", "one", *settings),
        ("evaluate", "runs/one"),
        ("calibrate", "runs/one", "--method", "temperature"),
        ("analyze", "runs/one"),
        ("analyze", "runs/one", "--user", 11),
        ("profile", "runs/one", "--tasks", "click", "--exclude_seen", "--format", "parquet"),
        ("export", "runs/one"),
        ("show", "runs/one"),
    ]
    for command in commands:
        status, out, err = mvke(*command)
        assert status == 0, (command, out, err)
    run = Run.open(tmp_path / "runs" / "one")
    assert run.prepared.is_in_buckets
    profiles = pl.read_parquet(tmp_path / "runs" / "one" / "profiles" / "click_item.parquet")
    users = profiles[profiles.columns[0]].unique(maintain_order=True).to_list()
    assert users == sorted(users) == list(range(1, 13))
