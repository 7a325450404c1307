import numpy as np
import pytest

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.run import Run, RunError
from mvke_tf.training import build_training_model


def test_create_keeps_settings_and_data(tiny_run, tmp_path):
    config = RunConfig(model=ModelConfig(hidden_dims=(7,)), training=TrainingConfig(seed=9))
    run = Run.create(tmp_path / "runs" / "new", config, tiny_run.folder / "prepared.npz")
    pairs = tiny_run.prepared.pairs
    (tiny_run.folder / "prepared.npz").unlink()
    assert Run.open(run.folder).config == config
    assert run.prepared.pairs.equals(pairs)


def test_create_never_overwrites(tiny_run):
    with pytest.raises(RunError, match="exists already, and a run is never overwritten"):
        Run.create(tiny_run.folder, tiny_run.config, tiny_run.folder / "prepared.npz")


def test_create_without_data_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Run.create(tmp_path / "new", RunConfig(), tmp_path / "absent.npz")
    assert not list(tmp_path.iterdir())


def test_open_takes_the_folder_or_the_checkpoint(tiny_run):
    assert Run.open(tiny_run.folder).folder == Run.open(tiny_run.checkpoint).folder == tiny_run.folder


def test_open_says_what_it_expected(tmp_path):
    with pytest.raises(RunError, match=r"There is no run at .*config\.json"):
        Run.open(tmp_path)


def test_load_model_before_the_first_epoch(tiny_run):
    tiny_run.checkpoint.unlink()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        tiny_run.load_model()


def test_load_model_says_that_a_checkpoint_is_damaged(tiny_run):
    tiny_run.checkpoint.write_bytes(tiny_run.checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"best\.keras is damaged"):
        tiny_run.load_model()


def test_state_round_trip(tiny_run):
    _, model = build_training_model(tiny_run.config, tiny_run.prepared.schema, steps_per_epoch=1)
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    assert tiny_run.restore_state(model) == []
    expected = [variable.numpy() for variable in variables]
    history = [{"epoch": 1, "val_auc": 0.5}]
    tiny_run.save_state(model, history)
    for variable in variables:
        variable.assign(np.zeros_like(variable))
    assert tiny_run.restore_state(model) == history
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(variable, value)
    # The seeds of dropout and of "unknown" are part of the state.
    assert sum("seed_generator_state" in variable.path for variable in variables) >= 3


def test_a_damaged_state_is_an_error(tiny_run):
    _, model = build_training_model(tiny_run.config, tiny_run.prepared.schema, steps_per_epoch=1)
    tiny_run.state_file.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(RunError, match=r"state\.npz is damaged"):
        tiny_run.restore_state(model)
