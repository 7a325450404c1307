# SPDX-License-Identifier: Apache-2.0
"""Processes that work on independent pieces: those of this machine, or of a Ray cluster. Imports nothing heavy."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, Protocol, TypeVar

from mvke_tf import __version__
from mvke_tf.errors import ConfigError, MvkeError, require_extra

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")
# How often an item is begun again after its process has been killed.
RETRIES = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


class EngineError(MvkeError):
    """Worker processes that do not stay alive."""


class Engine:
    """Does independent pieces of work, several at a time; closes its processes at the end of a `with` block.

    Args:
        kind: `"local"`, processes of this machine, which is this process itself with one worker; or `"ray"`, tasks of
            the Ray cluster that this process is connected to, that `RAY_ADDRESS` names or that runs here, and else of
            one that is started here and lasts as long as the engine. All machines must see the same files.
        workers: How many pieces are worked on at a time.
        gpus_per_worker: GPUs of each task of a Ray cluster that has some; other workers have none. This process has
            what it has.

    Raises:
        ConfigError: If there is no such engine, or no worker.
        MissingExtraError: If Ray is not installed.
    """

    def __init__(self, kind: str = "local", workers: int = 1, gpus_per_worker: int = 0) -> None:
        if kind not in ENGINES:
            raise ConfigError(f"The engine must be one of {ENGINES}. Received: {kind!r}")
        if workers < 1:
            raise ConfigError(f"Expected at least one worker. Received: {workers}")
        if kind == "ray":
            require_extra("ray", "ray")
        self.kind, self.workers, self.gpus_per_worker = kind, workers, gpus_per_worker
        self._pool: _Pool | None = None

    @property
    def is_alone(self) -> bool:
        """Whether this process does all the work."""
        return self.kind == "local" and self.workers == 1

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; the next call starts others."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results of the items in their order, while later ones are worked on.

        An item whose process is killed is begun again. What is unfinished when a result is an error, or nobody asks
        for the next one, ends at once.

        Args:
            function: Pickled once; a process has one copy for all of its items, which may keep what it has opened.
            items: What it is called with.

        Raises:
            EngineError: If processes are killed again and again.
            Exception: What the function raises for the first item for which it does.
        """
        if self.is_alone:
            yield from map(function, items)
            return
        if self._pool is None:
            self._pool = _RayTasks(self.gpus_per_worker) if self.kind == "ray" else _Processes()
        pool, left, order = self._pool, iter(items), collections.deque[Any]()
        # Read in this order: a backend is chosen when it is first imported.
        pool.begin(pickle.dumps((__version__, _environment(pool.gpus), pickle.dumps(function))))
        running: set[Any] = set()
        done = False
        try:
            while True:
                # Of results that wait for an earlier one there are never more than workers.
                while not done and len(running) < self.workers and len(order) < 2 * self.workers:
                    for item in left:
                        order.append(pool.start(pickle.dumps(item)))
                        running.add(order[-1])
                        break
                    else:
                        done = True
                if not order:
                    break
                if order[0] in running:
                    running -= pool.wait(running)
                else:
                    done_well, result = order.popleft().answer
                    if not done_well:
                        raise result
                    yield result
        except BaseException:
            self.close()
            raise


class _Pool(Protocol):
    """Where work is done: `start` returns the job of an item of the function that `begin` has been given.

    The `answer` of a finished job says whether it was done, and has its result or error.
    """

    # Of each worker.
    gpus: int

    def begin(self, function: bytes) -> None: ...

    def start(self, item: bytes) -> Any: ...

    def wait(self, running: Collection[Any]) -> set[Any]:
        """Those of the jobs, at least one, that are finished."""

    def close(self) -> None: ...


def _environment(gpus: int) -> dict[str, str]:
    """What workers have in theirs: how this process computes, and no GPU but their own: each takes all its memory."""
    names = ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
    shared = {name: os.environ[name] for name in names if name in os.environ}
    if keras := sys.modules.get("keras"):
        shared["KERAS_BACKEND"] = keras.config.backend()
    # Ray shows a task its own.
    return shared if gpus else shared | {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def lean(backend: str | None) -> Iterator[None]:
    """Meanwhile Keras and TensorFlow cannot import what they only offer something for, and take half the time.

    No command uses TensorFlow's converter of JAX functions, or what Keras offers for the others.
    """
    offered = ("matplotlib", "pandas", "sklearn", *(("jax",) if backend == "tensorflow" else ()))
    names = [name for name in offered if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class _LeanKeras:
    """Imports Keras and TensorFlow in that way, whatever imports them first."""

    def __init__(self) -> None:
        self.left = {"keras", "tensorflow"}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.left:
            return None
        self.left.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_lean(module: ModuleType) -> None:
                with lean(os.environ.get("KERAS_BACKEND")):
                    run(module)

            spec.loader.exec_module = run_lean  # type: ignore[method-assign]
        return spec


@functools.lru_cache(maxsize=1)
def _unpickled(function: bytes) -> Callable[[Any], Any]:
    version, environment, pickled = pickle.loads(function)
    if version != __version__:
        raise EngineError(
            f"A worker on {socket.gethostname()} has mvke_tf {__version__}. Expected {version}, as here: install the "
            "same version on all machines."
        )
    os.environ.update(environment)
    if not any(isinstance(finder, _LeanKeras) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LeanKeras())
    # What there is to say of all items, the process that asks for them says.
    logging.getLogger(__package__).setLevel(logging.ERROR)
    return pickle.loads(pickled)


def _work(function: bytes, item: bytes) -> Any:
    """The result for a pickled item, which is read after the function: what it imports may choose a backend."""
    return _unpickled(function)(pickle.loads(item))


def _killed(how: str) -> EngineError:
    return EngineError(
        f"A worker process has been killed {RETRIES + 1} times at the same work ({how}), perhaps for lack of memory. "
        "Give fewer workers, or a smaller `memory_mb`. (A script of your own needs its calls below "
        '`if __name__ == "__main__":`, because workers import it.)'
    )


# Processes of this machine


def _serve(connection: Connection) -> None:
    """Answers items until the process that sends them ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise ValueError("Expected a process that another one has started")
    ended = parent.sentinel
    threading.Thread(target=lambda: wait([ended]) and os._exit(1), daemon=True).start()
    # Libraries write there as they start; what fails is sent.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    function = b""
    while True:
        sent, item = connection.recv()
        function = sent or function
        try:
            answer = pickle.dumps((True, _work(function, item)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = pickle.dumps((False, _that_can_be_sent(error)))
        connection.send_bytes(answer)


def quieten_ray() -> None:
    """What every process of Ray does first: no warning, several times a second, that there is no dashboard."""
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def _that_can_be_sent(error: Exception) -> Exception:
    text = "".join(traceback.format_exception(error))
    error.add_note(f"In a worker process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        # Those of other libraries may be made of other things than they hold.
        return RuntimeError(text)
    return error


class _Worker:
    """A process and the connection to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._function = b""
        # Ctrl-C goes to all processes of a terminal; this one ends the others.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, function: bytes, item: bytes) -> None:
        # A process that is no more shows when it is asked for the answer.
        with contextlib.suppress(OSError):
            self.connection.send((None if function is self._function else function, item))
        self._function = function

    def kill(self) -> int | None:
        """Ends the process; returns how it ended."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


class _Job:
    """An item, who does it, and at last whether it was done, and its result or error."""

    def __init__(self, item: bytes, worker: _Worker) -> None:
        self.item, self.worker, self.retries = item, worker, 0
        self.answer: tuple[bool, Any] = (False, None)


class _Processes:
    """Processes of this machine, which are started when they are needed."""

    gpus = 0

    def __init__(self) -> None:
        self._function = b""
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []

    def begin(self, function: bytes) -> None:
        self._function = function

    def start(self, item: bytes) -> _Job:
        job = _Job(item, self._idle.pop() if self._idle else self._new())
        job.worker.send(self._function, item)
        return job

    def _new(self) -> _Worker:
        self._workers.append(_Worker())
        return self._workers[-1]

    def wait(self, running: Collection[_Job]) -> set[_Job]:
        while True:
            ready = wait([job.worker.connection for job in running])
            done = {job for job in running if job.worker.connection in ready and self._is_done(job)}
            if done:
                return done

    def _is_done(self, job: _Job) -> bool:
        try:
            answer = job.worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._workers.remove(job.worker)
            code = job.worker.kill()
            job.retries += 1
            if job.retries > RETRIES:
                job.answer = (False, _killed(f"exit code {code}"))
                return True
            logger.warning("A worker process has been killed (exit code %s); another one does its work.", code)
            job.worker = self._new()
            job.worker.send(self._function, job.item)
            return False
        job.answer = pickle.loads(answer)
        self._idle.append(job.worker)
        return True

    def close(self) -> None:
        while self._workers:
            self._workers.pop().kill()
        self._idle.clear()


# Ray


def start_ray(**options: Any) -> None:
    """Connects to the Ray cluster that is there, else starts one on this machine.

    Raises:
        ConfigError: If nothing answers where `RAY_ADDRESS` says, for which Ray itself would wait for minutes.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(
                f"No Ray cluster answers at {address}, which the environment variable RAY_ADDRESS names ({error}). "
                "Start one there, or unset it to start one on this machine."
            ) from error
    ray.init(include_dashboard=False, **options)


class _RayJob:
    """An item, the task that does it, and at last whether it was done, and its result or error."""

    def __init__(self, item: bytes, task: Any) -> None:
        self.item, self.task, self.retries = item, task, 0
        self.answer: tuple[bool, Any] = (False, None)


class _RayTasks:
    """Tasks of a Ray cluster."""

    def __init__(self, gpus: int) -> None:
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            start_ray(logging_level=logging.ERROR, log_to_driver=False)
        resources = ray.cluster_resources()
        if not resources.get("CPU"):
            logger.warning("The Ray cluster has no CPU yet; tasks wait until it has one.")
        self.gpus = gpus if resources.get("GPU") else 0
        # Those that Ray itself begins again after a lack of memory have no end.
        self._task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0)(_work)
        exceptions = ray.exceptions
        self._lost = (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError)
        self._function: Any = None
        self._running: set[_RayJob] = set()

    def begin(self, function: bytes) -> None:
        self._function = self._ray.put(function)

    def start(self, item: bytes) -> _RayJob:
        job = _RayJob(item, self._task.remote(self._function, item))
        self._running.add(job)
        return job

    def wait(self, running: Collection[_RayJob]) -> set[_RayJob]:
        while True:
            ready = set(self._ray.wait([job.task for job in running])[0])
            done = {job for job in running if job.task in ready and self._is_done(job)}
            if done:
                self._running -= done
                return done

    def _is_done(self, job: _RayJob) -> bool:
        try:
            job.answer = (True, self._ray.get(job.task))
        except self._lost as error:
            job.retries += 1
            if job.retries > RETRIES:
                job.answer = (False, _killed(type(error).__name__))
                return True
            logger.warning("A worker process has been lost (%s); another one does its work.", type(error).__name__)
            job.task = self._task.remote(self._function, job.item)
            return False
        except self._ray.exceptions.RayTaskError as error:
            error.cause.__cause__ = error
            job.answer = (False, error.cause)
        return True

    def close(self) -> None:
        running = [job.task for job in self._running]
        self._running.clear()
        for task in running:
            self._ray.cancel(task, force=True)
        # What is left behind must no longer write.
        if running:
            self._ray.wait(running, num_returns=len(running), timeout=60)
        if self._started:
            self._ray.shutdown()
