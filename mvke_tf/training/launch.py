# SPDX-License-Identifier: Apache-2.0
"""A training in processes of a Ray cluster, one per machine with GPUs."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvke_tf.errors import ConfigError, MvkeError, TrainingError, require_extra
from mvke_tf.run import Run
from mvke_tf.training.loop import Result, follow, result_of, train_run

# How often all processes are begun again, from the last state on disk, after one of them has been lost.
RETRIES = 3


def train_on_ray(run: Run, workers: int, log: Sequence[str] = ()) -> Result:
    """Trains a run, new or interrupted, in processes of a Ray cluster under JAX; all must see its folder and its data.

    The cluster is the one that this process is connected to, that the environment variable `RAY_ADDRESS` names or that
    runs on this machine; else one is started here for the training. Where it has GPUs, each process has all those of a
    machine. A lost process begins all again from the last state that was kept, and the end is the same to the last bit.

    Args:
        run: The run.
        workers: Number of processes.
        log: As in `mvke_tf.training.train`.

    Returns:
        What was made, but for the memory that was used.

    Raises:
        MissingExtraError: If Ray or JAX is not installed.
        ConfigError: If the cluster has no room for so many processes.
        TrainingError: If the training fails, or processes are lost again and again.
    """
    for module in ("ray", "jax"):
        require_extra(module, "ray")
    import ray
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer
    from ray.train.v2.jax.config import JaxConfig

    folder = run.folder.resolve()
    storage = folder / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    started = not ray.is_initialized()
    if started:
        hook = {"worker_process_setup_hook": "mvke_tf.engine.quieten_ray"}
        ray.init(include_dashboard=False, logging_level=logging.WARNING, runtime_env=hook)
    try:
        resources = _resources(ray.nodes(), workers)
        platform = "cuda" if "GPU" in resources else "cpu"
        environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": platform, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        trainer = JaxTrainer(
            _train,
            train_loop_config={"folder": str(folder), "workers": workers, "log": list(log)},
            # Else every process trains a model of its own, on a CPU.
            jax_config=JaxConfig(use_gpu=True),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name="training",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=RETRIES),
                worker_runtime_env={"env_vars": {**environment, "TF_CPP_MIN_LOG_LEVEL": "2"}},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingError(
                f"Processes of the training were lost {RETRIES + 1} times: {error} What was kept is in {folder}."
            ) from error
        failure = _failure(folder)
        if failure.is_file():
            raise TrainingError(failure.read_text(encoding="utf-8"))
    finally:
        if started:
            ray.shutdown()
        shutil.rmtree(storage, ignore_errors=True)
    return result_of(run, run.history())


def _failure(folder: Path) -> Path:
    """Where the first process says what went wrong, which beginning again would not mend."""
    return folder / "ray" / "failure.txt"


def _resources(nodes: Sequence[Mapping[str, Any]], workers: int) -> dict[str, float]:
    """What each process has: all GPUs of a machine, as those of two processes on one would be the same; else a CPU.

    Raises:
        ConfigError: If there is no room for so many processes.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [node["GPU"] for node in alive if node.get("GPU")]
    room, what = len(gpus), "machines with GPUs"
    if not gpus:
        room, what = int(sum(node.get("CPU", 0) for node in alive)), "CPUs"
    if workers > room:
        raise ConfigError(f"The Ray cluster has {room} {what}, one for each worker. Received: {workers} workers")
    return {"GPU": min(gpus)} if gpus else {"CPU": 1}


def _train(settings: Mapping[str, Any]) -> None:
    """What each process does."""
    import jax

    folder = Path(settings["folder"])
    if jax.process_count() != settings["workers"]:
        raise RuntimeError(f"Expected {settings['workers']} processes that know each other, not {jax.process_count()}")
    if _failure(folder).is_file():
        return
    run = Run.open(folder)
    if jax.process_index():
        follow(run)
        return
    # Ray shows it where the training was started.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("mvke_tf").setLevel(logging.INFO)
    try:
        train_run(run, log=settings["log"], devices="all")
    except MvkeError as error:
        _failure(folder).write_text(str(error), encoding="utf-8")
        raise
