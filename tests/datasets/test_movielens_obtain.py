# SPDX-License-Identifier: Apache-2.0
import hashlib
import io
import logging
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mvke_tf.datasets import download
from mvke_tf.datasets.movielens import obtain
from mvke_tf.datasets.movielens.obtain import LICENCE, obtain_movielens
from mvke_tf.datasets.movielens.read import read_movielens
from mvke_tf.errors import DataError
from tests.datasets.layouts import small_movielens, write_original, write_recbole


def zipped(folder: Path, prefix: str) -> bytes:
    """A zip of the folder, beside a member that must not be extracted."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../escaped", "x")
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{prefix}/{path.name}")
    return buffer.getvalue()


class Server:
    """Serves one answer on 127.0.0.1 and counts the requests.

    `declared` is the length that the header promises; with `silence` there is no answer until it is set.
    """

    def __init__(self):
        self.status, self.body, self.requests = 200, b"", 0
        self.declared: int | None = None
        self.silence: threading.Event | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests += 1
                if outer.silence is not None:
                    outer.silence.wait(5)
                    return
                self.send_response(outer.status)
                self.send_header("Content-Length", str(outer.declared or len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/ml-100k.zip"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class World:
    """A data folder, a GroupLens and a pip that all work until a test breaks them."""

    def __init__(self, data_dir: Path, server: Server, wheel: bytes):
        self.data_dir, self.server, self.wheel = data_dir, server, wheel
        self.lines: list[str] = []
        self.pip_calls = 0

    def run_pip(self, requirement: str, directory: Path) -> None:
        self.pip_calls += 1
        (directory / "recbole-1.2.1-py3-none-any.whl").write_bytes(self.wheel)

    def obtain(self, **arguments) -> Path:
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())
        logger = logging.getLogger("mvke_tf.datasets.movielens.obtain")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            folder, movielens = obtain_movielens(self.data_dir, expected_counts=None, **arguments)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        assert len(movielens.ratings) == 5
        return folder

    def left_behind(self) -> list[str]:
        return sorted(path.name for path in self.data_dir.rglob("*")) if self.data_dir.exists() else []


@pytest.fixture
def world(tmp_path, original_folder, recbole_folder, monkeypatch):
    # A proxy of the machine must not stand between the test and 127.0.0.1.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    wheel = zipped(recbole_folder, "recbole/dataset_example/ml-100k")
    with Server() as server:
        server.body = zipped(original_folder, "ml-100k")
        world = World(tmp_path / "data", server, wheel)
        monkeypatch.setattr(obtain, "GROUPLENS_URL", server.url)
        monkeypatch.setattr(obtain, "GROUPLENS_MD5", hashlib.md5(server.body).hexdigest())
        monkeypatch.setattr(obtain, "RECBOLE_SHA256", hashlib.sha256(wheel).hexdigest())
        monkeypatch.setattr(download, "run_pip", world.run_pip)
        yield world


def break_grouplens(world: World, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = world.server
    if how == "dead port":
        with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
            monkeypatch.setattr(obtain, "GROUPLENS_URL", f"http://127.0.0.1:{closed.server_port}/ml-100k.zip")
    elif how == "404":
        server.status, server.body = 404, b"gone"
    elif how == "html":
        server.body = b"<html>Please log in</html>"
    elif how == "cut":
        server.body = server.body[:-100]
    elif how == "broken connection":
        server.declared = len(server.body) + 100
    elif how == "other zip":
        server.body = zipped(world.data_dir.parent / "recbole", "ml-100k")
    else:
        # The expected checksum, yet not what was expected: the published archive itself would have to be wrong.
        server.body = b"not a zip" if how == "sound checksum, no zip" else world.wheel
        monkeypatch.setattr(obtain, "GROUPLENS_MD5", hashlib.md5(server.body).hexdigest())


BROKEN = {
    "dead port": "no connection, or a broken one (ConnectionError)",
    "404": "the server answered 404 Not Found",
    "html": "received 26 bytes, not a complete zip archive, md5 ",
    "cut": "not a complete zip archive, md5 ",
    "broken connection": "no connection, or a broken one (ChunkedEncodingError)",
    "other zip": "a zip archive, md5 ",
    "sound checksum, no zip": "File is not a zip file",
    "sound checksum, other members": "the archive lacks ml-100k/u.data, ml-100k/u.item, ml-100k/u.user",
}


def test_grouplens(world):
    folder = world.obtain()
    assert folder == world.data_dir / "ml-100k"
    assert len(read_movielens(folder, None).ratings) == 5
    assert world.left_behind() == ["ml-100k", "u.data", "u.item", "u.user"]
    assert world.lines == [
        LICENCE,
        f"{folder}: not there",
        f"{world.data_dir / 'ml-100k-recbole'}: not there",
        f"archive of GroupLens: read 5 ratings, 3 users, 8 items, now in {folder}",
    ]
    assert world.pip_calls == 0
    assert not (world.data_dir.parent / "escaped").exists()


def test_what_was_obtained_is_used_again(world):
    first = world.obtain()
    world.lines.clear()
    assert world.obtain() == first
    assert world.lines == [LICENCE, f"{first}: read 5 ratings, 3 users, 8 items"]
    assert (world.server.requests, world.pip_calls) == (1, 0)


@pytest.mark.parametrize("how", BROKEN)
def test_falls_through_to_recbole(world, how, monkeypatch):
    break_grouplens(world, how, monkeypatch)
    folder = world.obtain()
    assert folder == world.data_dir / "ml-100k-recbole"
    assert len(read_movielens(folder, None).ratings) == 5
    assert world.left_behind() == ["ml-100k-recbole", "ml-100k.inter", "ml-100k.item", "ml-100k.user"]
    assert len(world.lines) == 5
    assert world.lines[3].startswith("archive of GroupLens: failed, ")
    assert BROKEN[how] in world.lines[3]
    assert world.lines[4] == f"RecBole wheel through pip: read 5 ratings, 3 users, 8 items, now in {folder}"
    assert not any("\n" in line for line in world.lines)


@pytest.mark.parametrize("how", BROKEN)
def test_every_source_fails(world, how, monkeypatch):
    break_grouplens(world, how, monkeypatch)
    world.wheel = world.wheel[:50]
    with pytest.raises(DataError) as raised:
        world.obtain()
    message = str(raised.value)
    assert f"(1) {world.data_dir / 'ml-100k'}: not there." in message
    assert f"(2) {world.data_dir / 'ml-100k-recbole'}: not there." in message
    assert "(3) archive of GroupLens: failed, " in message
    assert BROKEN[how] in message
    assert "(4) RecBole wheel through pip: failed, received 50 bytes, not a complete zip archive, sha256 " in message
    assert "Place u.data, u.user, u.item from https://grouplens.org/datasets/movielens/100k/ by hand" in message
    assert len(world.lines) == 5
    assert world.left_behind() == []


def test_no_answer(world, monkeypatch):
    monkeypatch.setattr(download, "READ_TIMEOUT", 0.05)
    world.server.silence = threading.Event()
    world.obtain()
    world.server.silence.set()
    assert world.lines[3] == "archive of GroupLens: failed, no answer within 10 s to connect, 0.05 s to send"


def test_interruption_leaves_nothing(world, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(obtain, "read_movielens", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.obtain()
    assert world.left_behind() == []


def test_named_folder(world, recbole_folder):
    assert world.obtain(folder=recbole_folder) == recbole_folder
    assert world.obtain(folder=recbole_folder, source="folder") == recbole_folder
    assert world.lines == [LICENCE, f"{recbole_folder}: read 5 ratings, 3 users, 8 items"] * 2
    assert (world.server.requests, world.pip_calls, world.left_behind()) == (0, 0, [])


def test_named_folder_with_an_error_is_an_error(world, recbole_folder):
    (recbole_folder / "ml-100k.user").unlink()
    with pytest.raises(DataError, match=r"without ml-100k\.user"):
        world.obtain(folder=recbole_folder)
    assert (world.server.requests, world.pip_calls, world.left_behind()) == (0, 0, [])


@pytest.mark.parametrize(("source", "name"), [("grouplens", "ml-100k"), ("recbole", "ml-100k-recbole")])
def test_one_source(world, source, name):
    assert world.obtain(source=source) == world.data_dir / name
    assert world.obtain(source=source) == world.data_dir / name
    assert world.server.requests + world.pip_calls == 1


def test_copy_placed_by_hand(world):
    write_original(world.data_dir / "ml-100k", small_movielens())
    assert world.obtain() == world.data_dir / "ml-100k"
    write_recbole(world.data_dir / "ml-100k-recbole", small_movielens())
    assert world.obtain(source="recbole") == world.data_dir / "ml-100k-recbole"
    assert (world.server.requests, world.pip_calls) == (0, 0)


@pytest.mark.parametrize("name", ["ml-100k", "ml-100k-recbole"])
def test_corrupt_copy_is_not_overwritten(world, name):
    folder = write_original(world.data_dir / name, small_movielens())
    (folder / "u.data").write_text("3\t1\t9\t8\n")
    before = world.left_behind()
    with pytest.raises(DataError) as raised:
        world.obtain()
    assert f"{folder} is not a usable copy of ML-100K: {folder / 'u.data'}, line 1: " in str(raised.value)
    assert f"Fix it, or delete {folder}" in str(raised.value)
    assert world.lines[-1] == f"{folder}: there, but not usable"
    assert (folder / "u.data").read_text() == "3\t1\t9\t8\n"
    assert (world.server.requests, world.pip_calls) == (0, 0)
    assert world.left_behind() == before


def test_unknown_source_lists_the_valid_ones(world):
    with pytest.raises(DataError, match="source='kaggle'; expected one of auto, folder, grouplens, recbole"):
        world.obtain(source="kaggle")


@pytest.mark.parametrize(("source", "folder"), [("folder", None), ("grouplens", Path("x")), ("recbole", Path("x"))])
def test_source_and_folder_that_contradict(world, source, folder):
    with pytest.raises(DataError, match=f"Received source='{source}' with folder={folder}.*Name a folder, or"):
        world.obtain(source=source, folder=folder)


def test_pip_is_asked_for_the_wheel_and_its_error_reported(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution\nhint\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match="pip download ended with status 1: ERROR: No matching distribution"):
        download.run_pip("recbole==1.2.1", tmp_path)
    assert commands[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert commands[0][-1] == "recbole==1.2.1"


def test_pip_that_takes_too_long(world, monkeypatch):
    def too_long(requirement, directory):
        raise subprocess.TimeoutExpired("pip", 300)

    monkeypatch.setattr(download, "run_pip", too_long)
    with pytest.raises(DataError, match=r"RecBole wheel through pip: failed, pip took more than 300 s\."):
        world.obtain(source="recbole")
    assert world.left_behind() == []


def test_licence_names_the_terms_and_the_paper():
    for part in ("research", "acknowledge", "redistribute", "commercial", "https://doi.org/10.1145/2827872"):
        assert part in LICENCE
