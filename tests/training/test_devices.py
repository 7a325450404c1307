# SPDX-License-Identifier: Apache-2.0
"""Training on several devices equals training on one; that of several processes goes on after one is killed."""

import dataclasses
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.buckets import prepare_in_buckets
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError, RunError, TrainingError
from mvke_tf.evaluation import evaluate_run
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from mvke_tf.training import launch, train
from tests.chaos.stages import differences, outcome
from tests.small import SMALL, small_dataset, small_prepared, small_toml
from tests.training.helpers import assert_same_history, assert_same_state, state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Nothing is drawn at random in a step: what is drawn depends on the shapes of the slices.
MODEL = ModelConfig(
    embedding_dim=4,
    hidden_dims=(6,),
    num_virtual_kernels=3,
    virtual_kernel_stddev=0.5,
    embedding_stddev=0.5,
    dropout_rate=0.0,
    embedding_dropout_rate=0.0,
)
# The last batch of an epoch has an odd number of pairs.
TRAINING = TrainingConfig(epochs=3, batch_size=45, learning_rate=0.03, patience=0, monitor_images_epochs=0)
SETTINGS = {
    "default": {"checkpoint_steps": 2},
    "sparse": {"deduplicate": False, "embedding_optimizer": "lazy_adam", "batch_size": 48, "checkpoint_steps": 2},
    "pcgrad": {"loss_weighting": "pcgrad"},
}


# Runs command lines on a cluster with room for two processes.
ON_RAY = """
import shlex, sys
import ray
from mvke_tf.cli import main

ray.init(num_cpus=2, include_dashboard=False, runtime_env={"worker_process_setup_hook": "mvke_tf.engine.quieten_ray"})
for line in sys.argv[1:]:
    try:
        main(shlex.split(line))
    except SystemExit as ended:
        print("status", ended.code, flush=True)
"""
# Where they are trained on two devices of one process, too.
OF_DEVICES = ("sparse",)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(compiled):
    """Processes of this module do not compile what another one has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def start(runs: list[Path], processes: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ,
        **{"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        **{"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)},
    }
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/training/several_devices.py"]
            + [str(number) for number in (rank, processes, port)]
            + [str(run) for run in runs],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def finished(started: list[subprocess.Popen]) -> list[str]:
    said = [process.communicate(timeout=500)[0] for process in started]
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict[str, Run]]:
    """Runs of all settings, on data in buckets: of one device, two devices of one process, and two processes."""
    folder = tmp_path_factory.mktemp("devices")
    features = {
        name: {key: value for key, value in feature.items() if not key.startswith("unknown_")}
        for name, feature in SMALL["features"].items()
    }
    dataset = small_dataset(features=features)
    prepare_in_buckets(dataset, folder / "prepared" / "small", "contents", 4)
    prepared = PreparedDataset.load(folder / "prepared" / "small")
    runs: dict[str, dict[str, Run]] = {}
    for name, arguments in {"one": {}, "devices": {"devices": 2}, "processes": {"processes": 2}}.items():
        runs[name] = {
            settings: Run.create(
                folder / name / settings, RunConfig(MODEL, dataclasses.replace(TRAINING, **values)), prepared
            )
            for settings, values in SETTINGS.items()
            if name != "devices" or settings in OF_DEVICES
        }
        said = finished(start([run.folder for run in runs[name].values()], **arguments))
        assert ("2 devices (cpu)" in said[0]) == (name != "one")
        if name != "one":
            assert "They share the rows of the tables of" in said[0]
            assert "They share the columns of the tables of" in said[0]
            # Tables and two moments of each, in each of three epochs; in the default settings all are small.
            assert said[0].count(f"shared variables: {3 * 8}\n") == 3 * (len(runs[name]) - ("default" in runs[name]))
    return runs


@pytest.mark.parametrize(
    ("several", "settings"), [("devices", name) for name in OF_DEVICES] + [("processes", name) for name in SETTINGS]
)
def test_losses_and_weights_of_one_device(trained, several, settings):
    one, other = trained["one"][settings], trained[several][settings]
    losses, others = (json.loads((run.folder / "losses.json").read_text()) for run in (one, other))
    assert len(losses) == 3 * math.ceil(7 * 48 / one.config.training.batch_size)
    assert losses[-1] < losses[0] - 0.01
    np.testing.assert_allclose(others, losses, atol=1e-4)
    assert_nearly_the_same(one, other)


def assert_nearly_the_same(one: Run, other: Run) -> None:
    for ours, theirs in zip(one.history(), other.history(), strict=True):
        for name, value in theirs.items():
            # Keras weighs the last batch by its rows, those that fill it up included.
            tolerance = 1e-3 if name.endswith("_loss") and not name.startswith("val_") else 1e-4
            if name != "examples_per_second":
                assert value == pytest.approx(ours[name], abs=tolerance), name
    kept, others = state(one), state(other)
    assert kept.keys() == others.keys()
    for name, array in kept.items():
        np.testing.assert_allclose(others[name], array, atol=2e-3, err_msg=name)


def test_a_training_goes_on_with_another_number_of_devices(trained, tmp_path):
    """Tables that two devices shared are whole again on one."""
    unbroken = trained["one"]["sparse"]
    run = Run.create(tmp_path / "sparse", unbroken.config, unbroken.prepared)
    with start([run.folder], devices=2)[0] as process:
        until_kept(run, process, 1)
        process.kill()
    assert len(run.history()) < 3
    said = finished(start([run.folder]))[0]
    assert f"Continuing {run.folder}" in said and "devices (cpu)" not in said
    assert_nearly_the_same(unbroken, run)


def test_what_processes_have_trained_is_the_same_under_tensorflow(trained):
    """The checkpoint, evaluated, and the export: what it answers for raw values is what JAX computes."""
    run = trained["processes"]["default"]
    best = max(run.history(), key=lambda epoch: epoch["val_score"])
    report = evaluate_run(run, "validation")["validation"]
    for task in run.prepared.task_names():
        assert report[task]["auc"] == pytest.approx(best[f"val_{task}_auc"], abs=1e-6)
    predicted = json.loads((run.folder / "predicted.json").read_text())
    prepared = run.prepared.bucket_with("train")
    rows = prepared.part_rows("train")
    raw = {
        name: tf.convert_to_tensor(table.raw[name][of_table[rows]])
        for table, of_table in ((prepared.users, prepared.user_row), (prepared.items, prepared.item_row))
        for name in prepared.encoder.raw_inputs(table.side)
    }
    answer = tf.saved_model.load(export_run(run)).signatures["serving_default"](**raw)
    assert set(answer) == set(predicted) == set(run.prepared.task_names())
    for task, values in predicted.items():
        np.testing.assert_allclose(np.ravel(answer[task]), values, atol=1e-6)
        assert np.ptp(values) > 0.01


def on_ray(*lines: str) -> subprocess.Popen:
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", ON_RAY, *lines],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until_kept(run: Run, process: subprocess.Popen, epochs: int) -> None:
    """Waits until a training has kept a state after so many epochs."""
    deadline = time.monotonic() + 400
    while not run.state_file.is_file() or len(run.history()) < epochs:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_on_ray_what_is_interrupted_or_killed_goes_on_and_the_end_has_the_same_bits(trained, tmp_path):
    unbroken = trained["processes"]["default"]
    broken = Run.create(tmp_path / "broken", unbroken.config, unbroken.prepared)
    # As if it had been killed before, on a machine that is not there any more.
    (broken.folder / ".lock").write_text("process 1 on elsewhere")
    diverging = dataclasses.replace(unbroken.config, training=dataclasses.replace(TRAINING, learning_rate=1e30))
    wrong = Run.create(tmp_path / "wrong", diverging, unbroken.prepared)
    again, no_end = (f"train --resume {run.folder} --engine ray --workers 2" for run in (broken, wrong))
    no_room = f"train --data {small_toml(tmp_path)} --runs_dir {tmp_path / 'runs'} --engine ray --workers 9"

    with on_ray(again) as process:
        until_kept(broken, process, 0)
        with pytest.raises(RunError, match="is being trained by another process"), broken.lock(".ray.lock"):
            pass
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=500)[0]
    assert "status 130\n" in said and f"Continue with: mvke {again}" in said, said

    with on_ray(again, no_end, no_room) as process:
        until_kept(broken, process, 1)
        workers = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if path.read_bytes().startswith(b"ray::RayTrainWorker")
        ]
        assert workers
        os.kill(max(workers), signal.SIGKILL)
        said = process.communicate(timeout=500)[0]
    assert said.count(f"Continuing {broken.folder}") == 2, said
    assert_same_state(state(broken), state(unbroken))
    assert_same_history(broken.history(), unbroken.history())
    assert not differences(outcome(broken.logs), outcome(unbroken.logs))
    # What beginning again would not mend ends a training at once, in one line.
    assert re.findall("^status (.*)", said, re.M) == ["0", "2", "2"], said
    errors = re.findall("^error: (.*)", said, re.M)
    assert len(errors) == 2 and "The loss became " in errors[0] and "has 2 CPUs" in errors[1], said
    assert not (broken.folder / "ray").exists() and not (wrong.folder / "ray").exists()
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_ends_all_processes(trained, tmp_path):
    good = trained["processes"]["sparse"]
    training = dataclasses.replace(good.config.training, learning_rate=1e30, checkpoint_steps=1)
    run = Run.create(tmp_path / "wrong", dataclasses.replace(good.config, training=training), good.prepared)
    started = start([run.folder], processes=2)
    for process in started:
        said = process.communicate(timeout=500)[0]
        assert process.returncode == 1 and re.search("The loss became (nan|inf|NaN)", said), said


def test_a_process_that_does_not_know_the_others_is_an_error(tmp_path):
    """As Ray's default makes them on a CPU, where each would train a model of its own."""
    with pytest.raises(TrainingError, match="Expected 2 processes that know each other, not 1"):
        launch._train({"folder": str(tmp_path), "workers": 2, "log": []})
    (tmp_path / "ray" / "failure-000003.txt").write_text("of a later process")
    assert launch._failure(tmp_path) == "Expected 2 processes that know each other, not 1"


def test_each_process_has_all_gpus_of_a_machine():
    cpus = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 4.0, "GPU": 8.0}}]
    gpus = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": number}} for number in (8.0, 4.0)]
    assert launch._resources(cpus, 4) == {"CPU": 1}
    found = launch._resources([*cpus, *gpus], 2)
    # Ray counts with it.
    assert found == {"GPU": 4} and isinstance(found["GPU"], int)
    with pytest.raises(ConfigError, match=r"has 4 CPUs, one for each worker. Received: 5 workers"):
        launch._resources(cpus, 5)
    with pytest.raises(ConfigError, match=r"has 2 machines with GPUs, one for each worker. Received: 3 workers"):
        launch._resources([*cpus, *gpus], 3)


def test_devices_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected one device or more, or 'all'. Received: 0"):
        train(small_prepared(), None, "one", tmp_path / "runs", tmp_path / "data", devices=0)
    with pytest.raises(ConfigError, match=r"under JAX only. Received: devices 3, of 1,"):
        train(small_prepared(), None, "one", tmp_path / "runs", tmp_path / "data", devices=3)
    assert not (tmp_path / "runs").exists()
    said = subprocess.run(
        [sys.executable, "-m", "mvke_tf", "train", "--data", str(small_toml(tmp_path)), "--devices", "3"],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 2
    assert "error: There are 1 devices (cpu). Received: 3." in said.stderr
    assert not (tmp_path / "runs").exists()
