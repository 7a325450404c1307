# SPDX-License-Identifier: Apache-2.0
"""A training in processes of a Ray cluster, one per machine with GPUs."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvke_tf.engine import start_ray
from mvke_tf.errors import ConfigError, MvkeError, TrainingError, require_extra
from mvke_tf.io import one_line
from mvke_tf.run import Run
from mvke_tf.run_folder import is_finished, resume_command
from mvke_tf.training.loop import Result, check_log, follow, result_of, train_run

# How often all processes are begun again, from the last state on disk, after one of them has been lost.
RETRIES = 3


@contextlib.contextmanager
def ray_cluster(workers: int, log: Sequence[str] = ()) -> Iterator[dict[str, int]]:
    """A Ray cluster with room for so many processes of a training: see `train_on_ray`.

    Yields:
        The resources of each process.

    Raises:
        MissingExtraError: If Ray, JAX, or what logs is not installed.
        ConfigError: If there is no cluster where `RAY_ADDRESS` says, or no room in it, or nothing logs there.
    """
    require_extra("ray", "ray", "jax")
    check_log(log)
    import ray

    started = not ray.is_initialized()
    if started:
        hook = {"worker_process_setup_hook": "mvke_tf.engine.quieten_ray"}
        start_ray(logging_level=logging.WARNING, runtime_env=hook)
    try:
        yield _resources(ray.nodes(), workers)
    finally:
        if started:
            ray.shutdown()


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
        RunError: If another process trains the run.
        TrainingError: If the training fails, or processes are lost again and again.
        KeyboardInterrupt: After Ctrl-C, with the command that continues.
    """
    folder = run.folder.resolve()
    storage = folder / "ray"
    before = len(run.history())
    try:
        # The process that trains takes a lock of its own, perhaps on another machine.
        with ray_cluster(workers, log) as resources, run.lock(".ray.lock"):
            shutil.rmtree(storage, ignore_errors=True)
            try:
                _fit(folder, workers, log, resources)
                if failure := _failure(folder):
                    raise TrainingError(failure)
            finally:
                shutil.rmtree(storage, ignore_errors=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Continue with: {resume_command(run)} --engine ray --workers {workers}") from None
    history = run.history()
    if not is_finished(history, run.config.training):
        raise TrainingError(
            f"The training on Ray ended after {len(history)} epochs, and nothing said why. Continue with: "
            f"{resume_command(run)} --engine ray --workers {workers}"
        )
    return result_of(run, history, before)


def _fit(folder: Path, workers: int, log: Sequence[str], resources: dict[str, int]) -> None:
    """Has the processes train, again where some are lost.

    Raises:
        TrainingError: If they are lost too often.
        KeyboardInterrupt: After Ctrl-C.
    """
    import ray
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer
    from ray.train.v2.jax.config import JaxConfig

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
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=RETRIES),
            worker_runtime_env={"env_vars": {**environment, "TF_CPP_MIN_LOG_LEVEL": "2"}},
        ),
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        # What Ray's own handler of Ctrl-C ends with.
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {}).values()
        raise TrainingError(
            _failure(folder)
            or f"Processes of the training were lost {RETRIES + 1} times: {one_line(next(iter(causes), error))}. What "
            f"was kept is in {folder}."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _failure_file(folder: Path, rank: int) -> Path:
    """Where a process says what went wrong that beginning again would not mend."""
    return folder / "ray" / f"failure-{rank:06d}.txt"


def _failure(folder: Path) -> str:
    """What the first of the processes that failed says; empty if none did."""
    for path in sorted((folder / "ray").glob("failure-*.txt")):
        return path.read_text(encoding="utf-8")
    return ""


def _resources(nodes: Sequence[Mapping[str, Any]], workers: int) -> dict[str, int]:
    """What each process has: all GPUs of a machine, as those of two processes on one would be the same; else a CPU.

    Raises:
        ConfigError: If there is no room for so many processes.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [int(node["GPU"]) for node in alive if node.get("GPU", 0) >= 1]
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
    if _failure(folder):
        # Begun again only because others were lost.
        return
    try:
        if jax.process_count() != settings["workers"]:
            raise TrainingError(
                f"Expected {settings['workers']} processes that know each other, not {jax.process_count()}"
            )
        run = Run.open(folder)
        if jax.process_index():
            follow(run)
            return
        # Ray shows it where the training was started.
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
        logging.getLogger("mvke_tf").setLevel(logging.INFO)
        train_run(run, log=settings["log"], devices="all", take_over=True)
    except ConnectionError:
        # Of one that was lost.
        raise
    except (MvkeError, OSError) as error:
        path = _failure_file(folder, jax.process_index())
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(error), encoding="utf-8")
        raise
