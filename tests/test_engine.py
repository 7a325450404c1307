# SPDX-License-Identifier: Apache-2.0
"""Work that is spread over processes, of this machine and of Ray: its order, its errors and what a killed one costs."""

import os
import subprocess
import sys
import time

import pytest

from mvke_tf.engine import RETRIES, Engine, EngineError, start_ray
from mvke_tf.errors import ConfigError, DataError, MvkeError
from tests.conftest import REPOSITORY
from tests.work import Backend, Counted, DieOnce, die, differ, imported, refuse, same


def test_a_cluster_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"No Ray cluster answers at 127\.0\.0\.1:1, which .*RAY_ADDRESS"):
        start_ray()


@pytest.fixture(scope="module", params=["local", "ray"])
def engine(request):
    with Engine(request.param, 2) as engine:
        yield engine


def test_one_worker_is_this_process():
    with Engine() as engine:
        assert engine.is_alone
        assert list(engine.map(Counted(), range(3))) == [(os.getpid(), 1, 0), (os.getpid(), 2, 1), (os.getpid(), 3, 4)]


@pytest.mark.parametrize("arguments", [("spark",), ("local", 0)])
def test_engines_that_are_none(arguments):
    with pytest.raises(ConfigError, match="Received: "):
        Engine(*arguments)


def test_without_ray(monkeypatch):
    monkeypatch.setattr("mvke_tf.errors.find_spec", lambda name: None)
    with pytest.raises(MvkeError, match=r"mvke_tf\[ray\]"):
        Engine("ray", 2)


@pytest.mark.slow
def test_results_come_in_the_order_of_the_items(engine):
    processes, calls, squares = zip(*engine.map(Counted(slow=1), range(20)), strict=True)
    assert list(squares) == [item**2 for item in range(20)]
    assert os.getpid() not in processes and 1 <= len(set(processes)) <= 2
    # A process has one copy of the function for all of its items.
    for process in set(processes):
        of_process = [call for which, call in zip(processes, calls, strict=True) if which == process]
        assert sorted(of_process) == list(range(1, len(of_process) + 1))
    assert list(engine.map(Counted(), [])) == []


@pytest.mark.slow
def test_items_are_read_where_the_backend_is_that_of_this_process(engine, monkeypatch):
    monkeypatch.setattr("keras.config.backend", lambda: "jax")
    assert list(engine.map(same, [Backend()])) == ["jax"]


@pytest.mark.slow
def test_workers_import_keras_without_what_it_offers_for_others():
    with Engine("local", 2) as engine:
        assert list(engine.map(imported, [""])) == [["tensorflow", "pandas"]]


@pytest.mark.slow
def test_errors_are_those_of_the_first_item(engine):
    found = []
    with pytest.raises(DataError, match=r"^item 2: expected at most 1\b"):
        found.extend(engine.map(refuse, range(9)))
    assert len(found) <= 2
    with pytest.raises(Exception, match="1 is not 2"):
        list(engine.map(differ, [1]))
    # It goes on working.
    assert list(engine.map(refuse, [1])) == [1]


@pytest.mark.slow
def test_the_item_of_a_killed_process_is_begun_again(engine, tmp_path):
    assert list(engine.map(DieOnce(tmp_path), range(5))) == [0, 1, -2, 3, 4]


@pytest.mark.slow
def test_a_process_that_is_killed_always(engine):
    with pytest.raises(EngineError, match=f"killed {RETRIES + 1} times.*Give fewer workers"):
        list(engine.map(die, [0]))


@pytest.mark.slow
def test_workers_of_another_version(monkeypatch):
    monkeypatch.setattr("mvke_tf.engine.__version__", "0.0.1")
    with Engine("local", 2) as engine, pytest.raises(EngineError, match=r"Expected 0\.0\.1, as here"):
        list(engine.map(refuse, [0]))


ON_GPUS = """
import ray, sys
from mvke_tf.engine import Engine
from tests.work import devices

ray.init(num_cpus=2, num_gpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)
for gpus in (0, 1):
    print(*sorted(set(Engine("ray", 2, gpus).map(devices, range(6)))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("gpus, expected", [(0, ["-1:cpu", "-1:cpu"]), (2, ["-1:cpu", "0:None 1:None"])])
def test_a_task_of_a_cluster_with_gpus_has_its_own(gpus, expected):
    """Ray takes our word for the GPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", ON_GPUS, str(gpus)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.slow
def test_nobody_asks_for_more(engine):
    results = engine.map(Counted(), range(100))
    first = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.kill(first[0], 0)
            time.sleep(0.1)
