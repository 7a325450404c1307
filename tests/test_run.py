# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mvke_tf import datasets
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepared_dataset
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import RunError
from mvke_tf.io import write_json
from mvke_tf.run import Run
from mvke_tf.run_folder import resume_command
from mvke_tf.training.loop import build_training_model
from tests.conftest import REPOSITORY
from tests.small import SMALL, small_log, small_toml

HISTORY = [{"epoch": 1, "val_score": 0.5, "examples_per_second": 10.0, "val_click_auc": float("nan")}]


@pytest.fixture
def model(tiny_run):
    return build_training_model(tiny_run.config, tiny_run.prepared.schema(), steps_per_epoch=1)[1]


def test_create_keeps_settings_declaration_and_encoder(tiny_prepared, tmp_path):
    config = RunConfig(model=ModelConfig(hidden_dims=(7,)), training=TrainingConfig(seed=9))
    folder = Run.create(tmp_path / "runs" / "new", config, tiny_prepared).folder
    run = Run.open(folder)
    assert run.config == config
    assert json.loads(run.config_file.read_text())["format"] == 2
    assert run.dataset == tiny_prepared.dataset
    assert run.encoder.to_dict() == tiny_prepared.encoder.to_dict()
    assert run.prepared.digest == run.data["digest"] == tiny_prepared.digest
    assert run.data["fingerprint"] == tiny_prepared.fingerprint
    assert not run.data["folder"].startswith("/")
    np.testing.assert_array_equal(run.prepared.user_row, tiny_prepared.user_row)


def test_create_never_overwrites(tiny_run):
    with pytest.raises(RunError, match="exists already, and a run is never overwritten"):
        Run.create(tiny_run.folder, tiny_run.config, tiny_run.prepared)


def test_of_two_that_make_a_run_one_is_refused(tiny_run, monkeypatch):
    """The other has made it since the first one looked."""
    before = {path.name: path.stat().st_mtime_ns for path in tiny_run.folder.iterdir()}
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(RunError, match="exists already, and a run is never overwritten"):
        Run.create(tiny_run.folder, tiny_run.config, tiny_run.prepared)
    assert {path.name: path.stat().st_mtime_ns for path in tiny_run.folder.iterdir()} == before


def test_a_run_and_its_data_move_together(tiny_run, tiny_prepared, tmp_path):
    moved = shutil.move(tmp_path / "tiny", tmp_path / "moved")
    run = Run.open(moved / "runs" / "tiny")
    assert run.prepared.digest == tiny_prepared.digest
    assert run.dataset == tiny_prepared.dataset


def test_data_that_are_lost_or_others_say_how_to_make_them_again(tiny_run):
    folder = tiny_run.prepared_folder
    write_json(tiny_run.folder / "data.json", {**tiny_run.data, "digest": "0" * 64})
    with pytest.raises(RunError, match=r"are not those .*0{64}.* again in Python, from the same tables"):
        Run.open(tiny_run.folder).prepared  # noqa: B018
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=rf"are not at {folder}. Make them again in Python"):
        Run.open(tiny_run.folder).prepared  # noqa: B018


@pytest.mark.slow
def test_the_command_that_makes_lost_data_again_does(tmp_path, monkeypatch):
    """Of a run with its own data folder and an overridden declaration, which is in no TOML file."""
    (tmp_path / "shop").mkdir()
    log, items = small_log()
    log.write_parquet(tmp_path / "shop" / "log.parquet")
    items.write_parquet(tmp_path / "shop" / "items.parquet")
    values = {**SMALL, "source": {**SMALL["source"], "path": "log.parquet"}}
    values["tables"] = {"items": {"path": "items.parquet", "on": "item"}}
    dataset = Dataset.from_dict(values, tmp_path / "shop").replace({"features.age.bins": 3})
    prepared = prepared_dataset(dataset, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    run = Run.create(Path("runs") / "new", RunConfig(), prepared)
    shutil.rmtree("data")
    with pytest.raises(RunError) as error:
        Run.open(run.folder).prepared  # noqa: B018
    command = str(error.value).partition("Make them again: ")[2]
    assert command == "mvke prepare --data runs/new --data_dir data"
    _, _, _, data, _, data_dir = command.split()
    prepared_dataset(datasets.load(data, data_dir), Path(data_dir))
    assert Run.open(run.folder).prepared.digest == prepared.digest


def test_tables_that_have_changed_are_noticed(tmp_path, monkeypatch, caplog, mvke):
    """With its data a run goes on with them, and says so; without, nothing sends the user in a circle."""
    small_toml(tmp_path / "shop")
    monkeypatch.chdir(tmp_path)
    prepared = prepared_dataset(Dataset.from_toml("shop/small.toml"), Path("data"))
    run = Run.create(Path("runs") / "new", RunConfig(), prepared)
    caplog.clear()
    assert Run.open(run.folder).prepared.digest == prepared.digest and not caplog.messages
    log, _ = small_log()
    log.head(200).write_parquet("shop/log.parquet")
    again = "mvke train --data runs/new --data_dir data --config runs/new/config.json"
    with caplog.at_level("WARNING"):
        assert Run.open(run.folder).prepared.digest == prepared.digest
    assert (
        "The tables of runs/new have changed since it was made: it goes on with the data prepared then." in caplog.text
    )
    assert again in caplog.text
    shutil.rmtree(run.prepared_folder)
    with pytest.raises(RunError, match="cannot be made again, because the tables have changed since") as error:
        Run.open(run.folder).prepared  # noqa: B018
    assert str(error.value).endswith(again) and "mvke prepare" not in str(error.value)
    code, _, said = mvke("prepare", "--data", "runs/new")
    # Whether what was logged before is there, too, depends on the tests before.
    warning = "Warning: The tables of runs/new have changed since it was made. These are the data of now"
    assert code == 0 and said.splitlines()[-1].startswith(warning)
    # Where the tables are gone, the command is that of tables put back.
    (tmp_path / "shop" / "log.parquet").unlink()
    with pytest.raises(RunError, match="Make them again: mvke prepare --data runs/new --data_dir data"):
        Run.open(run.folder).prepared  # noqa: B018


def test_data_in_memory_only_are_refused(tiny_run, tmp_path, monkeypatch):
    prepared = PreparedDataset.load(tiny_run.prepared_folder)
    monkeypatch.setattr(prepared, "folder", None)
    with pytest.raises(ValueError, match=r"save them before. Received: data in memory"):
        Run.create(tmp_path / "new", tiny_run.config, prepared)
    assert not (tmp_path / "new").exists()


def test_open_takes_the_folder_or_the_checkpoint(tiny_run):
    assert Run.open(tiny_run.folder).folder == Run.open(tiny_run.checkpoint).folder == tiny_run.folder


def test_open_says_what_it_expected(tiny_run, tmp_path):
    with pytest.raises(RunError, match=r"There is no run at .*config\.json"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match=r"--model does not fit the run .* Expected: mvke. Received: ple"):
        Run.open(tiny_run.folder, "ple")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"data": {"split": "temporal"}, "model": {}}', "was made by mvke_tf 0.1. Train again with this version"),
        ('{"format": 3, "model": {}}', "has another format .* Expected: 2. Received: 3"),
        ('{"format": 2, "model": {"embedding_dim": 0}}', "config.json cannot be used: ModelConfig.embedding_dim must"),
        ('{"format": 2, "modle": {}}', "config.json cannot be used: .*Did you mean 'model'"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "config.json is no valid JSON"),
    ],
)
def test_settings_that_cannot_be_used(tiny_run, contents, message):
    tiny_run.config_file.write_text(contents)
    with pytest.raises(RunError, match=message):
        Run.open(tiny_run.folder, "mvke")


def test_a_run_of_the_older_version_with_defaults_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prepared.npz").write_bytes(b"")
    with pytest.raises(RunError, match=r"was made by mvke_tf 0\.1"):
        Run.open(tmp_path, "mvke")


@pytest.mark.parametrize("name", ["dataset.json", "encoder.json", "data.json"])
@pytest.mark.parametrize("contents", ["{}", "[]", "3", '{"x": 1}'])
def test_damaged_descriptions_name_the_file(tiny_run, name, contents):
    (tiny_run.folder / name).write_text(contents)
    run = Run.open(tiny_run.folder)
    with pytest.raises(RunError, match=rf"{name} is damaged.*mvke train --data DATA --config .*config\.json"):
        getattr(run, name.removesuffix(".json"))


def test_load_model_before_the_first_epoch(tiny_run):
    tiny_run.checkpoint.unlink()
    with pytest.raises(
        RunError,
        match=rf"has no checkpoint yet: .* Train it: mvke train --resume {tiny_run.folder}; if its loss became",
    ):
        tiny_run.load_model()


def test_a_lost_checkpoint_of_finished_epochs_must_be_trained_anew(tiny_run, model):
    tiny_run.save_state(model, HISTORY)
    tiny_run.checkpoint.unlink()
    with pytest.raises(RunError, match=r"best\.keras is lost.*Train a new run of its settings: mvke train --data"):
        tiny_run.load_model()


def test_load_model_says_that_a_checkpoint_is_damaged(tiny_run):
    tiny_run.checkpoint.write_bytes(tiny_run.checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"best\.keras cannot be used.*mvke train --data .*tiny --config"):
        tiny_run.load_model()


@pytest.mark.slow
def test_a_run_with_uncertainty_weights_loads_in_a_new_process(tiny_prepared, tmp_path):
    config = RunConfig(
        ModelConfig(embedding_dim=4, hidden_dims=(4,)), TrainingConfig(loss_weighting="uncertainty", epochs=1)
    )
    run = Run.create(tmp_path / "run", config, tiny_prepared)
    run.save_checkpoint(build_training_model(config, tiny_prepared.schema(), steps_per_epoch=1)[0])
    code = "import sys; from mvke_tf.run import Run; print(Run.open(sys.argv[1]).load_model().log_variances.tasks)"
    done = subprocess.run(
        [sys.executable, "-c", code, run.folder], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(tuple(tiny_prepared.task_names())), done.stderr


@pytest.mark.parametrize("bytes_at_a_time", [2**24, 40])
def test_state_round_trip(tiny_run, model, bytes_at_a_time, monkeypatch):
    monkeypatch.setattr("mvke_tf.run._BYTES_AT_A_TIME", bytes_at_a_time)
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    assert tiny_run.restore_state(model) == tiny_run.history() == []
    expected = [variable.numpy() for variable in variables]
    tiny_run.save_state(model, HISTORY)
    with zipfile.ZipFile(tiny_run.state_file) as file:
        held = [file.read(f"variable_{index:04d}.npy") for index in range(len(variables))]
    for variable, content in zip(expected, held, strict=True):
        saved = io.BytesIO()
        np.save(saved, variable)
        assert content == saved.getvalue()
    for variable in variables:
        variable.assign(np.zeros_like(variable))
    np.testing.assert_equal(tiny_run.restore_state(model), HISTORY)
    np.testing.assert_equal(tiny_run.history(), HISTORY)
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(variable, value)
    # The seeds of dropout and of "unknown" are part of the state.
    assert sum("seed_generator_state" in variable.path for variable in variables) >= 3
    assert tiny_run.log_file.read_text().splitlines() == [
        "epoch,val_score,examples_per_second,val_click_auc",
        "1,0.5,10.0,nan",
    ]


def test_a_damaged_state_is_an_error(tiny_run, model):
    tiny_run.state_file.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(RunError, match=r"state\.npz is damaged .*best\.keras can still be used.*mvke train --data"):
        tiny_run.restore_state(model)


@pytest.mark.parametrize(
    "history", ["{}", "[]", "[3]", '[{"epoch": 2}]', '[{"epoch": 1, "val_score": "a", "examples_per_second": 1}]', "[["]
)
def test_a_history_of_another_structure_is_an_error(tiny_run, model, history):
    tiny_run.save_state(model, HISTORY)
    with np.load(tiny_run.state_file) as file:
        arrays = dict(file)
    np.savez(tiny_run.state_file, **{**arrays, "history": history})
    with pytest.raises(RunError, match=r"state\.npz is damaged"):
        tiny_run.history()


def test_a_state_of_other_variables_is_an_error(tiny_run, model):
    tiny_run.save_state(model, HISTORY)
    with np.load(tiny_run.state_file) as file:
        arrays = dict(file)
    first, second, *_ = [name for name, array in arrays.items() if array.ndim == 2]
    np.savez(tiny_run.state_file, **{**arrays, first: arrays[second], second: arrays[first]})
    with pytest.raises(RunError, match=r"does not fit the model of config\.json.*Expected \d+ variables with"):
        tiny_run.restore_state(model)


@pytest.mark.slow
def test_one_process_trains_a_run(tiny_run):
    code = """
import sys
from mvke_tf.errors import RunError
from mvke_tf.run import Run
try:
    with Run(sys.argv[1]).lock():
        print("locked")
except RunError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, tiny_run.folder]
    with tiny_run.lock():
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert f"{tiny_run.folder} is being trained by another process (process " in done.stdout, done.stderr
    assert f"on {socket.gethostname()}" in done.stdout
    with tiny_run.lock():
        pass


def test_the_lock_of_a_dead_process_counts_for_nothing_and_that_of_another_host_counts(tiny_run):
    lock = tiny_run.folder / ".lock"
    lock.write_text(f"process 999999999 on {socket.gethostname()}")
    with tiny_run.lock():
        assert lock.read_text().startswith("process ") and "999999999" not in lock.read_text()
    lock.write_text("process 12 on elsewhere")
    with (
        pytest.raises(RunError, match=rf"process 12 on elsewhere.*If it no longer exists, delete {lock}"),
        tiny_run.lock(),
    ):
        pass
    # One who knows that it has ended takes over, but never from a process that is there.
    with tiny_run.lock(take_over=True):
        with pytest.raises(RunError, match="is being trained"), tiny_run.lock(take_over=True):
            pass
        assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_half_written_lock_counts_for_nothing(tiny_run):
    """The process that was killed while it wrote is named by half its number, or is on half of this host."""
    lock = tiny_run.folder / ".lock"
    whole = f"process {os.getppid()} on {socket.gethostname()}"
    for length in range(len(whole) + 1):
        lock.write_text(whole[:length])
        assert tiny_run.owner() == ""
        with tiny_run.lock():
            assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_the_lock_clears_away_what_a_dead_process_left(tiny_run):
    for folder in (tiny_run.folder.parent, tiny_run.folder, tiny_run.logs):
        (folder / f".writing-999999999-{socket.gethostname().replace('-', '_')}-abc").mkdir(parents=True)
    with tiny_run.lock():
        assert not list(tiny_run.folder.parent.rglob(".writing-*"))


def test_the_command_that_continues_is_quoted(tmp_path):
    assert resume_command(Run("runs/mine")) == "mvke train --resume runs/mine"
    assert resume_command(Run("runs/my run")) == "mvke train --resume 'runs/my run'"
