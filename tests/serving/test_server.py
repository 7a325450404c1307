# SPDX-License-Identifier: Apache-2.0
"""The process of the server: connections, versions, signals."""

import asyncio
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import pytest
import tensorflow as tf
import uvicorn

from mvke_tf.data.encoder import RAW_UNKNOWN
from mvke_tf.errors import ConfigError, DataError
from mvke_tf.schema import TOWERS
from mvke_tf.serving import export_saved_model
from mvke_tf.serving.export import SIGNATURES_FILE
from mvke_tf.serving.rest.app import Application, Limits
from mvke_tf.serving.rest.connections import guarded
from mvke_tf.serving.rest.model import DESCRIPTIONS_FILE, ServedModel
from mvke_tf.serving.rest.server import (
    Watch,
    _allowed,
    _load_newest,
    _Server,
    bind,
    load,
    newest_version,
    serve,
    settle,
    url,
    versions_of,
)
from tests.serving.helpers import pair_rows
from tests.serving.rest_helpers import ANSWER, GOOD, Client, Stub, answer

pytestmark = pytest.mark.slow

HEAD = b"POST /v1/models/mvke:predict HTTP/1.1\r\nHost: localhost\r\n"


def body_of(request: dict, last: bool = True) -> bytes:
    text, close = json.dumps(request).encode(), b"Connection: close\r\n" if last else b""
    return HEAD + close + b"Content-Length: %d\r\n\r\n" % len(text) + text


@contextlib.contextmanager
def running(application: Application):
    """The address of a server in a thread of this process."""
    bound = bind("127.0.0.1", 0)
    bound.listen(64)
    config = uvicorn.Config(
        application, http=guarded(application.limits), loop="asyncio", ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    address = bound.getsockname()[:2]
    thread.start()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()


def exchange(address: tuple[str, int], sent: bytes) -> bytes:
    """Everything that the server sends back on one connection until it closes it."""
    received = b""
    with socket.create_connection(address, timeout=60) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        while part := connection.recv(65536):
            received += part
    return received


def next_answer(connection: socket.socket) -> bytes:
    """One whole answer on a connection that stays open: its parts arrive when they like."""
    received = b""
    while (head := received.find(b"\r\n\r\n")) < 0:
        received += connection.recv(65536)
    length = int(re.search(rb"content-length: (\d+)", received, re.IGNORECASE)[1])
    while len(received) < head + 4 + length:
        received += connection.recv(65536)
    return received


def status_of(received: bytes) -> int:
    return int(received.split(b" ", 2)[1])


def test_a_head_that_does_not_arrive_is_given_up():
    """300 half-sent heads once held 300 connections for ever."""
    with running(Application(Stub(lambda: None), limits=Limits(head_seconds=0.3))) as address:
        for sent in (b"", b"G", HEAD):
            received = exchange(address, sent)
            assert received.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert received.endswith(b'{"error": "The head must arrive within 0.3 s."}')
        # One byte after the other makes it no longer.
        with socket.create_connection(address, timeout=60) as connection:
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - started < 30:
                    connection.sendall(b"X")
                    time.sleep(0.02)
            assert time.monotonic() - started < 10
        # Nor does a request before, on the same connection.
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(body_of({"inputs": {}}, last=False))
            assert status_of(next_answer(connection)) == 200
            connection.sendall(HEAD)
            assert status_of(next_answer(connection)) == 408
            assert connection.recv(65536) == b""
        assert status_of(exchange(address, body_of({"inputs": {}}))) == 200


def test_slow_bodies_turn_no_good_request_away():
    """259 slow bodies once made every other request a 503 for half a minute."""
    limits = Limits(threads=1, waiting=2, body_seconds=1.0)
    with running(Application(Stub(lambda: None), limits=limits)) as address, contextlib.ExitStack() as held:
        slow = [held.enter_context(socket.create_connection(address, timeout=60)) for _ in range(40)]
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        for _ in range(5):
            assert status_of(exchange(address, body_of({"inputs": {}}))) == 200
        for connection in slow:
            received = b""
            # A body that is not sent after that either holds no connection.
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    received += part
            assert status_of(received) == 408


def test_more_connections_than_the_limit_are_sent_away():
    with running(Application(Stub(lambda: None), limits=Limits(connections=3))) as address:
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(socket.create_connection(address))
            received = exchange(address, body_of({"inputs": {}}))
            assert received.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"Retry-After: 1" in received
        deadline = time.monotonic() + 30
        while status_of(exchange(address, body_of({"inputs": {}}))) != 200:
            assert time.monotonic() < deadline


def large(rows: int = 100_000):
    model = Stub(lambda: None)
    model.predict = lambda *_: {"y": tf.zeros([rows], tf.int64).numpy() + 10**15}
    return model


def test_an_answer_that_is_not_read_is_given_up():
    application = Application(large(2_000_000), limits=Limits(answer_seconds=2))
    with running(application) as address, socket.create_connection(address, timeout=60) as connection:
        connection.sendall(body_of({"inputs": {}}))
        assert connection.recv(1)
        time.sleep(4)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += len(part)
        assert received < 30_000_000
    # One that is read arrives whole; a busy machine takes longer than 2 s for it.
    with running(Application(large(2_000_000), limits=Limits(answer_seconds=60))) as address:
        whole = exchange(address, body_of({"inputs": {}}))
        assert status_of(whole) == 200 and len(whole) > 30_000_000


def test_answers_that_wait_to_be_read_are_bounded_together():
    limits = Limits(buffered_bytes=50_000_000, threads=1)
    with running(Application(large(2_000_000), limits=limits)) as address, contextlib.ExitStack() as held:
        slow = []
        for _ in range(4):
            connection = held.enter_context(socket.create_connection(address, timeout=60))
            connection.sendall(body_of({"inputs": {}}))
            assert connection.recv(100)
            slow.append(connection)
        whole = []
        for connection in slow:
            received = 100
            with contextlib.suppress(ConnectionError):
                while received < 30_000_000 and (part := connection.recv(65536)):
                    received += len(part)
            whole.append(received >= 30_000_000)
        # The longest unread go first.
        assert whole[-1] and not whole[0] and not all(whole)


def test_pipelined_requests_are_answered_in_order():
    with running(Application(Stub(lambda: None))) as address:
        received = exchange(address, body_of({"inputs": {}}, last=False) * 3 + body_of({}))
        assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"200", b"200", b"400"]


# --- versions


def test_the_newest_version_is_found(toy_export, tmp_path):
    assert newest_version(toy_export) == newest_version(toy_export / "7") == toy_export / "7"
    for name in ("2", "10", "notes", "11"):
        (tmp_path / "export" / name).mkdir(parents=True)
    for name in ("2", "10", "notes"):
        (tmp_path / "export" / name / "saved_model.pb").touch()
    assert newest_version(tmp_path / "export") == newest_version(tmp_path) == tmp_path / "export" / "10"
    with pytest.raises(DataError, match=r"`mvke export` makes .* Received: .*notes/nowhere"):
        newest_version(tmp_path / "notes" / "nowhere")


def test_a_run_without_an_export_says_how_to_make_one(tiny_run):
    for path in (tiny_run.folder, tiny_run.folder / "export"):
        with pytest.raises(DataError, match=f"has not been exported yet: mvke export {tiny_run.folder}$"):
            newest_version(path)


def test_a_damaged_export_is_refused(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"\x00damaged")
    with pytest.raises(DataError, match="no SavedModel that can be loaded at"):
        ServedModel(tmp_path)
    tf.saved_model.save(tf.Module(), str(tmp_path / "2"))
    with pytest.raises(DataError, match="Expected a SavedModel with signatures"):
        ServedModel(tmp_path / "2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model": "mvke", "signatures": {"top": {"description": "best"}}}', "best"),
        ('{"top": {"description": "best"}}', "best"),
        ('["top"]', ""),
    ],
)
def test_descriptions_are_taken_where_there_are_any(toy_export, tmp_path, text, expected):
    folder = Path(shutil.copytree(toy_export / "7", tmp_path / "7"))
    (folder / DESCRIPTIONS_FILE).write_text(text)
    assert ServedModel(folder).descriptions == dict.fromkeys(("echo", "half_plus_two", "serving_default"), "") | {
        **{"strange": "", "top": expected, "total": ""}
    }
    (folder / DESCRIPTIONS_FILE).write_text("{")
    with pytest.raises(DataError, match=r"signatures\.json is no valid JSON"):
        ServedModel(folder)


def test_every_file_of_an_export_is_checked(exported, tmp_path):
    """A bit of the graph or of a description may be as valid as the one before."""
    for name in json.loads((exported / DESCRIPTIONS_FILE).read_text())["files"]:
        folder = Path(shutil.copytree(exported, tmp_path / name.replace("/", "_")))
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{re.escape(str(folder / name))} is damaged: .*mvke export"):
            ServedModel(folder)


def test_an_export_of_a_newer_version_is_refused(toy_export, tmp_path):
    folder = Path(shutil.copytree(toy_export / "7", tmp_path / "7"))
    (folder / DESCRIPTIONS_FILE).write_text('{"format": 9, "signatures": {}}')
    with pytest.raises(DataError, match=r"newer version of mvke_tf. Update mvke_tf.* Received: 9"):
        ServedModel(folder)


def test_a_newer_version_takes_over_and_a_corrupt_one_does_not(toy_export, tmp_path, caplog):
    caplog.set_level("INFO", logger="mvke_tf.serving.rest.server")
    shutil.copytree(toy_export / "7", tmp_path / "7")
    app = Application(ServedModel(tmp_path / "7"))
    watch = Watch(tmp_path, tmp_path / "7", app, 10)
    watch.look()
    assert app.model.version == 7 and not caplog.messages

    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "saved_model.pb").write_bytes(b"\x00")
    (tmp_path / "9" / DESCRIPTIONS_FILE).write_text("{}")
    for _ in range(3):
        watch.look()
    assert app.model.version == 7
    assert len(caplog.messages) == 2 and caplog.messages[1].startswith("Version 7 goes on: There is no SavedModel")

    # Once its files are whole, it is tried again.
    shutil.rmtree(tmp_path / "9")
    shutil.copytree(toy_export / "7", tmp_path / ".writing-9")
    (tmp_path / ".writing-9").rename(tmp_path / "9")
    watch.look()
    with Client(app) as client:
        assert answer(client, GOOD) == ANSWER
        assert client.get("/v1/models/mvke").json()["model_version_status"][0]["version"] == "9"
        assert client.get("/v1/models/mvke/versions/7").status_code == 404
        metrics = client.get("/metrics").text
    assert 'mvke_model_loads_total{result="loaded"} 1\n' in metrics
    assert 'mvke_model_loads_total{result="refused"} 1\n' in metrics

    shutil.rmtree(tmp_path / "9")
    watch.look()
    assert app.model.version == 7
    shutil.rmtree(tmp_path / "7")
    watch.look()
    assert app.model.version == 7 and "Expected a folder of versions" in caplog.messages[-1]


def test_a_version_that_is_still_being_copied_is_taken_when_it_is_whole(exported, tmp_path, caplog):
    """Without its descriptions it would be served without bounds, and never looked at again."""
    caplog.set_level("INFO", logger="mvke_tf.serving.rest.server")
    shutil.copytree(exported, tmp_path / "1")
    app = Application(ServedModel(tmp_path / "1"))
    watch = Watch(tmp_path, tmp_path / "1", app, 10)
    shutil.copytree(exported, tmp_path / "2", ignore=shutil.ignore_patterns(DESCRIPTIONS_FILE))
    for _ in range(3):
        watch.look()
    assert app.model.version == 1
    assert [text for text in caplog.messages if "goes on" in text] == [
        f"Version 1 goes on: {tmp_path / '2'} has no signatures.json yet, which the served version has. It is taken "
        "when that is there"
    ]
    shutil.copy(exported / DESCRIPTIONS_FILE, tmp_path / "2")
    watch.look()
    assert app.model.version == 2 and app.model.cost("recommend").per_row > 0


def test_a_version_whose_functions_fail_is_refused(toy_export, tmp_path, caplog):
    """Whatever they raise: a thread that died of it would take no later version."""

    class Broken(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def answer(self, x):
            return {"y": x + tf.cast(tf.strings.length(tf.io.read_file("/nowhere/at/all")), tf.float32)}

    broken = Broken()
    tf.saved_model.save(broken, str(tmp_path / "8"), signatures={"serving_default": broken.answer})
    with pytest.raises(DataError, match=r"8: expected a model that answers a request.*serving_default': NotFoundError"):
        load(tmp_path / "8", Limits())
    shutil.copytree(toy_export / "7", tmp_path / "7")
    app = Application(ServedModel(tmp_path / "7"))
    watch = Watch(tmp_path, tmp_path / "7", app, 10)
    watch.look()
    assert app.model.version == 7 and "\n" not in caplog.messages[-1]
    shutil.copytree(toy_export / "7", tmp_path / "9")
    watch.look()
    assert app.model.version == 9


def test_an_older_version_is_served_where_the_newest_cannot_be_loaded(toy_export, tmp_path, caplog):
    for version in ("7", "8"):
        shutil.copytree(toy_export / "7", tmp_path / version)
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "saved_model.pb").write_bytes(b"\x00")
    assert _load_newest(versions_of(tmp_path), Limits()).folder == tmp_path / "8"
    (text,) = [message for message in caplog.messages if not message.startswith("Loading")]
    assert text.startswith(f"An older version is served: There is no SavedModel that can be loaded at {tmp_path / '9'}")
    with pytest.raises(DataError, match="no SavedModel"):
        _load_newest([tmp_path / "9"], Limits())


def test_what_is_loaded_is_left_out_of_collections_of_garbage(toy_export, tmp_path):
    """And what goes with an older version is not kept."""

    class Cycle:
        def __init__(self):
            self.itself = self

    shutil.copytree(toy_export / "7", tmp_path / "7")
    app = Application(ServedModel(tmp_path / "7"))
    watch = Watch(tmp_path, tmp_path / "7", app, 10)
    try:
        held = Cycle()
        settle()
        assert gc.get_freeze_count() > 100_000
        gone = weakref.ref(held)
        del held
        gc.collect()
        assert gone() is not None
        shutil.copytree(toy_export / "7", tmp_path / "8")
        watch.look()
        assert app.model.version == 8 and gone() is None and gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()


def test_a_pipe_is_no_version(toy_export, tmp_path):
    shutil.copytree(toy_export / "7", tmp_path / "7")
    (tmp_path / "99").mkdir()
    os.mkfifo(tmp_path / "99" / "saved_model.pb")
    assert newest_version(tmp_path) == tmp_path / "7"


def test_version_0_has_an_address(toy_export, tmp_path):
    shutil.copytree(toy_export / "7", tmp_path / "0")
    with Client(Application(ServedModel(tmp_path / "0"))) as client:
        for path, status in (("0", 200), ("00", 200), ("1", 404)):
            assert client.get(f"/v1/models/mvke/versions/{path}").status_code == status


# --- who may ask


def test_the_port_of_an_allowed_host_does_not_count():
    with bind("127.0.0.1", 0) as bound:
        names = ["models.example.com:8501", "[::1]:80", "b.example.com"]
        assert _allowed(bound, "127.0.0.1", None, names) == ["models.example.com", "[::1]", "b.example.com"]


def test_a_host_that_is_not_known_is_named():
    with pytest.raises(OSError, match=r"choose another --host: 'nowhere\.invalid'"):
        bind("nowhere.invalid", 0)


def test_a_taken_port_says_what_to_do():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(OSError, match=f"choose another --port: '127.0.0.1:{port}'"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"--token_file FILE --allowed_hosts NAME .* Received: no token"),
        ({"token": "a"}, "Received: no names"),
        ({"allowed_hosts": ["*"]}, "Received: no token"),
        ({"token": "a b", "allowed_hosts": ["*"]}, "ASCII text without spaces"),
        ({"token": "", "allowed_hosts": ["*"]}, "ASCII text without spaces"),
        ({"token": "a", "allowed_hosts": [""]}, r"such as models.example.com.*\[''\]"),
        ({"token": "a", "allowed_hosts": ["http://a.example"]}, r"such as models.example.com.*http"),
    ],
)
def test_a_server_that_others_can_reach_needs_a_token_and_names(toy_export, options, message):
    with pytest.raises(ConfigError, match=message):
        serve(toy_export, host="0.0.0.0", port=0, **options)


def test_there_must_be_a_model(tmp_path):
    with pytest.raises(DataError, match="Expected a folder of versions"):
        serve(tmp_path)


def test_an_exported_model_answers_as_its_saved_model(tiny_run, tmp_path):
    folder = export_saved_model(tiny_run.load_model(), tiny_run.encoder, tmp_path / "export")
    assert DESCRIPTIONS_FILE == SIGNATURES_FILE
    raw = {name: column.tolist() for name, column in pair_rows(tiny_run.prepared, "test", 40).items()}
    signature = tf.saved_model.load(folder).signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    expected = signature(**{name: tf.constant(raw[name], specs[name].dtype) for name in specs})
    rows = len(next(iter(raw.values())))
    # NaN is allowed in requests.
    with Client(Application(ServedModel(folder))) as client:
        outputs = answer(client, {"inputs": raw})["outputs"]
        by_row = answer(client, {"instances": [{name: raw[name][i] for name in raw} for i in range(rows)]})
    for task, values in expected.items():
        assert float(tf.reduce_max(values) - tf.reduce_min(values)) > 0.01
        assert tf.reduce_all(tf.constant(outputs[task], tf.float32) == values)
        assert [row[task] for row in by_row["predictions"]] == outputs[task]


def test_null_is_unknown_and_the_example_has_values_that_training_knows(tiny_run, tmp_path):
    encoder = tiny_run.encoder
    model = ServedModel(export_saved_model(tiny_run.load_model(), encoder, tmp_path / "export"))
    row = model.example("serving_default")["instances"][0]
    inputs = {name: feature for side in TOWERS for name, (_, _, feature) in encoder.raw_inputs(side).items()}
    # Weights of unweighted lists may be left out, and are.
    left_out = {name for name, feature in inputs.items() if name != feature.name and not feature.weighted}
    assert row.keys() == inputs.keys() - left_out and len(left_out) == 2
    kinds = set()
    for name in row:
        feature = inputs[name]
        value = row[name][0] if feature.is_list else row[name]
        if name != feature.name:
            assert value == 1
        elif feature.encode == "vocabulary":
            assert value == encoder.state[feature.table][0]
        elif feature.encode in ("buckets", "number"):
            bounds = encoder.state[feature.name]
            if feature.encode == "number" and feature.scaling == "standard":
                assert value == pytest.approx(bounds[0], rel=1e-5)
            else:
                assert bounds[0] <= value <= bounds[-1]
        kinds.add(feature.raw)
    assert {"string", "integer", "number"} <= kinds

    scalars = [name for name, feature in inputs.items() if not feature.is_list and feature.raw != "vector"]
    with Client(Application(model)) as client:
        known = answer(client, {"instances": [row]})["predictions"][0]
        for name in scalars:
            null, nan = ({"instances": [row | {name: value}]} for value in (None, RAW_UNKNOWN[inputs[name].raw]))
            assert answer(client, null) == answer(client, nan)
        nothing = answer(client, {"instances": [row | dict.fromkeys(scalars)]})["predictions"][0]
        assert any(abs(known[task] - nothing[task]) > 1e-4 for task in known)
        listed = next(name for name, feature in inputs.items() if name != feature.name)
        refused = client.post("/v1/models/mvke:predict", json={"instances": [row | {listed: [None]}]})
        assert refused.status_code == 400 and listed in refused.json()["error"]


# --- the process

# The command, where nothing of the stack but TensorFlow and the extra `serve` can be imported.
PROCESS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("keras_rs", "pandas", "polars", "sklearn", "matplotlib"):
            raise ImportError(f"{name} is not for this process")

sys.meta_path.insert(0, Blocked())
from pathlib import Path
import logging

logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
from mvke_tf.serving.rest import Limits, serve

serve(Path(sys.argv[1]), port=0, limits=Limits(request_bytes=2**20), reload_seconds=0.2)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, export_path: Path, program: str = PROCESS) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, export_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        self.lines: list[str] = []
        while not self.lines or not self.lines[-1].startswith("Ctrl-C"):
            self.lines.append(self.process.stdout.readline())
            assert self.lines[-1], self.process.communicate()[1]
        found = re.search(r"Serving version \d+ at (http://127\.0\.0\.1:\d+/v1/models/mvke)\s", "".join(self.lines))
        self.base = found[1]
        self.address = ("127.0.0.1", httpx.URL(self.base).port)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def assert_alive(self) -> None:
        assert httpx.post(f"{self.base}:predict", json=GOOD, timeout=60).json() == ANSWER


def test_the_process_survives_bad_clients_and_stops_on_sigterm(toy_export, tmp_path):
    shutil.copytree(toy_export / "7", tmp_path / "7")
    with Process(tmp_path) as server:
        signatures = "echo, half_plus_two, serving_default, strange, top, total"
        assert f"Signatures, with what they take at {server.base}/metadata: {signatures}\n" in server.lines
        assert any(
            line.startswith("Try it: curl -d ") and line.endswith(f"{server.base}:predict\n") for line in server.lines
        )
        server.assert_alive()
        for length in (b"-1", b"many", b"1" * 5000, b"10, 20", b"0x10"):
            received = exchange(server.address, HEAD + b"Content-Length: " + length + b"\r\n\r\n")
            assert received.startswith(b"HTTP/1.1 4"), (length, received)
            server.assert_alive()
        received = exchange(server.address, HEAD + b"Content-Length: 99999999999\r\n\r\n" + b"{}")
        assert received.startswith(b"HTTP/1.1 413") and b'{"error": "At most 1048576 bytes' in received
        for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100_000):
            exchange(server.address, garbage)
            server.assert_alive()
        for half in (HEAD, HEAD + b"Content-Length: 1000\r\n\r\n", HEAD + b"Content-Length: 1000\r\n\r\n{"):
            with socket.create_connection(server.address) as vanishing:
                vanishing.sendall(half)
            server.assert_alive()
        evil = httpx.get(server.base, headers={"Host": "evil.example"})
        assert evil.status_code == 400 and "Received: Host" in evil.json()["error"]

        shutil.copytree(toy_export / "7", tmp_path / ".8")
        (tmp_path / ".8").rename(tmp_path / "8")
        assert server.process.stdout.readline() == f"Loading {tmp_path / '8'}\n"
        assert server.process.stdout.readline() == "Serving version 8\n"
        assert httpx.get(server.base).json()["model_version_status"][0]["version"] == "8"
        server.assert_alive()

        with socket.create_connection(server.address) as idle:
            idle.sendall(HEAD)
            server.process.send_signal(signal.SIGTERM)
            output, errors = server.process.communicate(timeout=60)
        assert (server.process.returncode, output) == (0, "Stopped.\n")
        assert "Traceback" not in errors


@pytest.mark.parametrize("turns", range(6))
def test_a_connection_accepted_while_the_server_stops_is_closed(turns):
    """It was not yet among those that are told to end: the server waited for its client until time was up."""

    async def stop_after(turns: int) -> bytes:
        config = uvicorn.Config(
            Application(Stub(lambda: None), limits=Limits(head_seconds=1)),
            http=guarded(Limits(head_seconds=1)),
            ws="none",
            lifespan="off",
            log_config=None,
        )
        config.load()
        server = _Server(config)
        server.lifespan = config.lifespan_class(config)
        bound = bind("127.0.0.1", 0)
        await server.startup([bound])
        with socket.create_connection(bound.getsockname()[:2], timeout=60) as idle:
            idle.sendall(HEAD)
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.shutdown([bound])
            idle.setblocking(False)
            # It is closed, or was never accepted and is reset or closed with the process.
            with contextlib.suppress(ConnectionError, BlockingIOError):
                return idle.recv(1000)
        return b""

    assert asyncio.run(stop_after(turns)) == b""


STUCK = """
import logging, sys, time

logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
import numpy as np
from mvke_tf.serving.rest import Application, server
from tests.serving.rest_helpers import Stub

server.GRACE_SECONDS = 1
stuck = {
    "sleeps": lambda: time.sleep(1000),
    "computes": lambda: [None for _ in iter(int, 1)],
}[sys.argv[1]]
bound = server.bind("127.0.0.1", 0)
bound.listen()
print(f"Serving version 1 at {server.url(bound)}/v1/models/mvke (")
print("Ctrl-C", flush=True)
server.run(Application(Stub(stuck)), bound)
"""


@pytest.mark.parametrize("what", ["sleeps", "computes"])
def test_sigterm_ends_the_process_whatever_its_threads_do(what):
    """Two requests that held a thread once kept SIGTERM from ending the process at all."""
    with Process(what, STUCK) as server, contextlib.ExitStack() as held:
        for _ in range(2):
            connection = held.enter_context(socket.create_connection(server.address, timeout=60))
            connection.sendall(body_of({"inputs": {}}))
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=30)
        assert server.process.returncode == 1
