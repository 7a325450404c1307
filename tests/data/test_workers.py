# SPDX-License-Identifier: Apache-2.0
"""Buckets that several processes prepare, of this machine or of Ray: the same bytes as by one, whatever is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from mvke_tf.data import buckets
from mvke_tf.data.buckets import prepare_in_buckets
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepared_dataset
from mvke_tf.engine import Engine, EngineError
from mvke_tf.errors import DataError
from mvke_tf.io import checksums
from tests.conftest import REPOSITORY
from tests.data import test_buckets
from tests.processes import end_command
from tests.small import small_dataset, small_log, small_toml

pytestmark = pytest.mark.slow

BUCKETS = 7
DATASETS = {
    "frames": lambda folder: small_dataset(
        **{"features.age": {"tower": "user", "encode": "number", "scaling": "standard"}, "groups": None}
    ),
    "item columns of the log": lambda folder: test_buckets.DATASETS["item columns of the log"](),
    "no users": lambda folder: test_buckets.DATASETS["no users"](),
    # Paths are relative to the folder that the test is in.
    "files": lambda folder: Dataset.from_toml(os.path.relpath(small_toml(folder))),
}


@pytest.fixture(scope="module", params=["local", "ray"])
def engine(request):
    with pytest.MonkeyPatch.context() as patch, Engine(request.param, 2) as engine:
        # Processes of Ray import the class below.
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        yield engine


def prepared(dataset: Dataset, folder: Path, engine: Engine | None = None) -> dict[str, str]:
    prepare_in_buckets(dataset, folder / "prepared", "contents", BUCKETS, engine)
    assert not list(folder.glob("*.unfinished"))
    return checksums(folder / "prepared")


@pytest.mark.parametrize("name", DATASETS)
def test_the_bytes_are_those_of_one_process(tmp_path, monkeypatch, engine, name):
    monkeypatch.chdir(tmp_path)
    dataset = DATASETS[name](tmp_path)
    alone = prepared(dataset, tmp_path / "alone")
    assert len(alone) > 4 * BUCKETS
    assert prepared(dataset, tmp_path / "together", engine) == alone


class Killed(buckets._Preparation):
    """Each of its steps is killed once, when it has nearly done a bucket."""

    def _once(self, step: str) -> None:
        try:
            (self.work.parent / f"killed {step}").mkdir()
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def _write_piece(self, *arguments):
        super()._write_piece(*arguments)
        self._once("preparing")

    def _learn_bucket(self, *arguments):
        learned = super()._learn_bucket(*arguments)
        self._once("learning")
        return learned

    def _write_bucket(self, *arguments):
        super()._write_bucket(*arguments)
        self._once("encoding")


def test_workers_may_be_killed(tmp_path, monkeypatch, engine):
    alone = prepared(small_dataset(), tmp_path / "alone")
    monkeypatch.setattr("mvke_tf.data.buckets._Preparation", Killed)
    assert prepared(small_dataset(), tmp_path / "together", engine) == alone
    left = sorted(path.name for path in (tmp_path / "together").iterdir())
    assert left == ["killed encoding", "killed learning", "killed preparing", "prepared"]


class KilledAlways(buckets._Preparation):
    """Its workers do not survive the encoding."""

    def _write_bucket(self, *arguments):
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_are_always_killed_lose_nothing_that_was_finished(tmp_path, monkeypatch, engine):
    alone = prepared(small_dataset(), tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr("mvke_tf.data.buckets._Preparation", KilledAlways)
        # How often it is tried again is tested elsewhere.
        patch.setattr("mvke_tf.engine.RETRIES", 0)
        with pytest.raises(EngineError, match="Give fewer workers"):
            prepared(small_dataset(), tmp_path / "together", engine)
    (work,) = (tmp_path / "together").glob("*.unfinished")
    assert list((work / "pieces").iterdir())
    monkeypatch.setattr("mvke_tf.data.buckets._Preparation._write_piece", None)
    assert prepared(small_dataset(), tmp_path / "together") == alone


def test_errors_are_those_of_one_process(tmp_path, engine):
    log, items = small_log()
    # Of users of different buckets: the first bucket counts.
    wrong = pl.col("user").is_in([2, 7, 11])
    log = log.with_columns(bought=pl.when(wrong).then(2).otherwise(pl.col("bought")))
    dataset = Dataset.from_frame(log, small_dataset().to_dict(), items=items)
    messages = []
    for number, of in enumerate((None, engine)):
        with pytest.raises(DataError, match="label = 'bought': expected 0 or 1") as error:
            prepared(dataset, tmp_path / str(number), of)
        messages.append(str(error.value))
        assert not list((tmp_path / str(number)).iterdir())
    assert messages[0] == messages[1]


def test_what_fits_into_memory_one_process_prepares(tmp_path, caplog):
    dataset = Dataset.from_toml(small_toml(tmp_path))
    with caplog.at_level("INFO", "mvke_tf"), Engine("local", 2) as engine:
        assert not prepared_dataset(dataset, tmp_path, engine=engine).is_in_buckets
    assert "The log of small fits into memory: one process prepares it." in caplog.text


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_command_that_is_ended_leaves_no_worker_and_goes_on(tmp_path, sent, code):
    path = small_toml(tmp_path)
    pl.concat([small_log()[0]] * 50).write_parquet(tmp_path / "log.parquet")
    command = [sys.executable, "-m", "mvke_tf", "prepare", "--data", path, "--memory_mb", "16", "--data_dir"]
    together = [*command, tmp_path / "together", "--workers", "2"]
    end_command(together, lambda: list(tmp_path.glob("together/prepared/*.unfinished/pieces/bucket*")), sent, code)
    assert list(tmp_path.glob("together/prepared/*.unfinished"))
    prepared = {}
    for name, arguments in {"together": together, "alone": [*command, tmp_path / "alone"]}.items():
        subprocess.run(arguments, check=True, capture_output=True)
        (prepared[name],) = (tmp_path / name / "prepared").glob("small-*")
    assert checksums(prepared["together"]) == checksums(prepared["alone"])
