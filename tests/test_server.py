"""The local server: TensorFlow Serving's REST protocol, and everything that a client can do wrong."""

import base64
import contextlib
import functools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest
import tensorflow as tf
from anyio.from_thread import start_blocking_portal

from mvke_tf.cli import require_extra
from mvke_tf.server.app import Limits, create_app
from mvke_tf.server.model import DESCRIPTIONS_FILE, ServedModel
from mvke_tf.server.process import bind, curl, newest_version, url
from mvke_tf.serving import SIGNATURES_FILE, export_saved_model
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "serve.py"
PREDICT = "/v1/models/mvke:predict"
LIMITS = Limits(request_bytes=200_000, rows=50, values=1000)


def vector(dtype, name, *shape):
    return tf.TensorSpec([None, *shape], dtype, name)


class Toy(tf.Module):
    """Signatures of known answers, of every kind of input."""

    @tf.function(
        input_signature=[
            vector(tf.int64, "user"),
            vector(tf.float32, "age"),
            vector(tf.string, "gender"),
            vector(tf.int64, "items", None),
            vector(tf.float32, "items_weights", None),
        ]
    )
    def score(self, user, age, gender, items, items_weights):
        rows = tf.debugging.assert_equal(tf.shape(items), tf.shape(items_weights), message="items and items_weights")
        with tf.control_dependencies([rows]):
            bag = tf.reduce_sum(tf.cast(items, tf.float32) * items_weights, axis=1)
        return {
            "ctr": tf.cast(user, tf.float32) + age / 3 + tf.cast(tf.strings.length(gender), tf.float32),
            "cvr": bag,
        }

    @tf.function(input_signature=[vector(tf.float32, "x")])
    def half_plus_two(self, x):
        return {"y": x / 2 + 2}

    @tf.function(input_signature=[vector(tf.int64, "user"), tf.TensorSpec([], tf.int32, "k")])
    def top(self, user, k):
        return {"items": user[:, None] * 10 + tf.range(tf.cast(k, tf.int64)), "title": tf.strings.as_string(user)}

    @tf.function(
        input_signature=[
            vector(tf.bool, "flag"),
            vector(tf.uint8, "small"),
            vector(tf.float64, "exact"),
            vector(tf.float32, "pair", 2),
            vector(tf.string, "raw"),
        ]
    )
    def echo(self, flag, small, exact, pair, raw):
        return {"flag": flag, "small": small, "exact": exact, "pair": pair, "raw_bytes": raw, "raw": raw}

    @tf.function(input_signature=[vector(tf.float32, "x"), vector(tf.complex64, "z")])
    def strange(self, x, z):
        return {"y": x + tf.math.real(z)}

    @tf.function(input_signature=[vector(tf.float32, "x")])
    def total(self, x):
        return {"sum": tf.reduce_sum(x), "inverse": 1 / x}


@pytest.fixture(scope="module")
def export_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    toy = Toy()
    signatures = {name: getattr(toy, name) for name in ("half_plus_two", "top", "echo", "strange", "total")}
    signatures["serving_default"] = toy.score
    tf.saved_model.save(toy, str(folder / "7"), signatures=signatures)
    inputs = {name: {"description": f"the {name}"} for name in ("user", "items", "items_weights")}
    described = {"serving_default": {"description": "scores", "inputs": inputs}, "top": "odd"}
    (folder / "7" / DESCRIPTIONS_FILE).write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def model(export_path) -> ServedModel:
    return ServedModel(newest_version(export_path))


class Client:
    """Calls an application in this process, without sockets."""

    def __init__(self, app) -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def __enter__(self):
        self._exit = contextlib.ExitStack()
        self._portal = self._exit.enter_context(start_blocking_portal())
        return self

    def __exit__(self, *error):
        self._portal.call(self._client.aclose)
        self._exit.close()

    def request(self, method: str, path: str, **options) -> httpx.Response:
        return self._portal.call(functools.partial(self._client.request, method, path, **options))

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, **options) -> httpx.Response:
        return self.request("POST", path, **options)


async def chunks(*parts: bytes):
    """A body without a length."""
    for part in parts:
        yield part


@pytest.fixture(scope="module")
def client(model):
    with Client(create_app(model, limits=LIMITS)) as client:
        yield client


ROW = {"user": 3, "age": 0.5, "gender": "F", "items": [2, 5], "items_weights": [1.0, 0.5]}
GOOD = {"instances": [ROW, {"user": -1, "age": 1e-3, "gender": "né", "items": [7, 7], "items_weights": [0, 2]}]}
ANSWER = {"predictions": [{"ctr": 4.166667, "cvr": 4.5}, {"ctr": 2.0003333, "cvr": 14.0}]}


def predict(client, request, path: str = PREDICT) -> httpx.Response:
    return client.post(path, content=request if isinstance(request, bytes | str) else json.dumps(request))


def answer(client, request) -> dict:
    response = predict(client, request)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def test_rows(client):
    assert answer(client, GOOD) == ANSWER
    assert answer(client, {"signature_name": "serving_default", **GOOD}) == ANSWER
    assert answer(client, {"signature_name": "", **GOOD}) == ANSWER


def test_columns(client):
    columns = {name: [row[name] for row in GOOD["instances"]] for name in ROW}
    assert answer(client, {"inputs": columns}) == {
        "outputs": {name: [row[name] for row in ANSWER["predictions"]] for name in ("ctr", "cvr")}
    }


def test_a_single_input_and_output_need_no_name(client):
    """The example of TensorFlow Serving's documentation."""
    half = {"signature_name": "half_plus_two"}
    assert answer(client, {**half, "instances": [1.0, 2.0, 5.0]}) == {"predictions": [2.5, 3.0, 4.5]}
    assert answer(client, {**half, "instances": [{"x": 1.0}, {"x": 2}]}) == {"predictions": [2.5, 3.0]}
    assert answer(client, {**half, "inputs": [1.0, 2.0, 5.0]}) == {"outputs": [2.5, 3.0, 4.5]}
    assert answer(client, {**half, "inputs": {"x": [5.0]}}) == {"outputs": [4.5]}


def test_an_input_without_rows_comes_in_columns(client):
    request = {"signature_name": "top", "inputs": {"user": [4, 5], "k": 2}}
    assert answer(client, request) == {"outputs": {"items": [[40, 41], [50, 51]], "title": ["4", "5"]}}
    refused = predict(client, {"signature_name": "top", "instances": [{"user": 4, "k": 2}]})
    assert refused.status_code == 400
    assert refused.json() == {"error": "['k'] take one value, not one per row: send 'inputs'. Received: 'instances'"}


def test_every_dtype_and_base64(client):
    raw = bytes(range(250, 256))
    row = {
        "flag": True,
        "small": 255,
        "exact": 0.1,
        "pair": [1, 0.1],
        "raw": {"b64": base64.b64encode(raw).decode()},
    }
    request = {"signature_name": "echo", "instances": [row, {**row, "raw": "text", "flag": False, "small": 0}]}
    encoded = {"b64": "+vv8/f7/"}
    first = {"flag": True, "small": 255, "exact": 0.1, "pair": [1.0, 0.1], "raw": encoded, "raw_bytes": encoded}
    second = {**first, "flag": False, "small": 0, "raw": "text", "raw_bytes": {"b64": "dGV4dA=="}}
    assert answer(client, request) == {"predictions": [first, second]}


def test_nan_and_infinity_come_in_and_go_out_as_null(client):
    text = predict(
        client, '{"signature_name": "half_plus_two", "instances": [NaN, Infinity, -Infinity, 1e-45, 3.4e38]}'
    )
    assert text.text == '{"predictions": [null, null, null, 2.0, 1.7e+38]}'
    assert answer(client, {"signature_name": "total", "inputs": [2, 0.0]}) == {
        "outputs": {"sum": 2.0, "inverse": [0.5, None]}
    }


def test_outputs_that_are_not_rows_need_columns(client):
    refused = predict(client, {"signature_name": "total", "instances": [2.0, 4.0]})
    assert refused.status_code == 400
    assert refused.json()["error"].startswith("The signature does not put out one value per row; send 'inputs'")


def test_numbers_are_the_shortest_that_read_back_equal(client):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    response = predict(client, {"signature_name": "half_plus_two", "instances": values.tolist()})
    texts = re.findall(r"[-\d.e]+", response.text.split("[")[1])
    expected = values / np.float32(2) + np.float32(2)
    np.testing.assert_array_equal(np.array(texts, np.float32), expected)
    assert texts == [str(value) for value in expected]


def test_status_and_metadata(client, model):
    state = {"version": "7", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("/v1/models/mvke", "/v1/models/mvke/versions/7", "/v1/models/mvke/versions/007"):
        assert client.get(path).json() == {"model_version_status": [state]}
    metadata = client.get("/v1/models/mvke/metadata").json()
    assert metadata == client.get("/v1/models/mvke/versions/7/metadata").json()
    assert metadata["model_spec"] == {"name": "mvke", "signature_name": "", "version": "7"}
    signatures = metadata["metadata"]["signature_def"]["signature_def"]
    assert set(signatures) - {"__saved_model_init_op"} == set(model.descriptions)
    score = signatures["serving_default"]
    assert score["method_name"] == "tensorflow/serving/predict"
    assert sorted(score["inputs"]) == sorted(ROW) and sorted(score["outputs"]) == ["ctr", "cvr"]
    assert score["inputs"]["items"] == {
        "dtype": "DT_INT64",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "-1", "name": ""}], "unknown_rank": False},
        "name": "serving_default_items:0",
    }
    assert answer(client, GOOD) == predict(client, GOOD, "/v1/models/mvke/versions/7:predict").json()


def changed(**features) -> dict:
    return {"instances": [{**ROW, **features}]}


def malformed() -> dict[str, list[tuple[object, int]]]:
    """Bodies of requests by what is wrong with them, each with the status that it must get."""
    body = json.dumps(GOOD)
    columns = {name: [value] for name, value in ROW.items()}
    half = {"signature_name": "half_plus_two"}
    wrong = {
        "user": ["3", 3.0, 0.5, True, None, [3], {"id": 3}, {"b64": "Mw=="}, 2**63, -(2**63) - 1],
        "age": ["0.5", False, None, [0.5], {}, 2**24, 1e39, -1e300],
        "gender": [1, 0.5, True, None, ["F"], {"text": "F"}, {"b64": "*"}, {"b64": "YQ"}, {"b64": 1}, "\ud800"],
        "items": [2, "2", None, {}, [2, 5.5], [2, "5"], [2, None], [[2, 5]], [[2], [5]], [2, [5]]],
        "items_weights": [1.0, "1", [1.0, "x"], [1.0, None], [[1.0, 0.5]], [1.0, {}], [1.0, 2**60]],
    }
    return {
        "cut off": [(body[:length], 400) for length in range(0, len(body), 8)],
        "not JSON": [(text, 400) for text in ("user=3&age=1", "<a/>", "{'instances': []}", body + "}", "{,}", "nan")],
        "not UTF-8": [(body.encode().replace(b"F", byte), 400) for byte in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80")]
        + [(body.encode(encoding), 400) for encoding in ("utf-16", "utf-32")],
        "not an object": [(text, 400) for text in ("[]", "1", '"x"', "null", "true", "NaN", f"[{body}]")],
        "nested deep": [(opening * 10_000, 400) for opening in ("[", '{"a":', '{"instances": [')]
        + [('{"instances": ' + "[" * 50_000 + "]" * 50_000 + "}", 400)],
        "wrong keys": [
            ({}, 400),
            ({"signature_name": "serving_default"}, 400),
            ({**GOOD, "inputs": columns}, 400),
            ({**GOOD, "signature": "top"}, 400),
            ({**GOOD, "": 1}, 400),
            (body[:-1] + ', "instances": []}', 400),
        ],
        "wrong signature": [
            ({**GOOD, "signature_name": name}, 400) for name in ("nowhere", "x" * 9999, 1, None, ["top"], {}, True)
        ],
        "wrong instances": [
            ({"instances": value}, 400)
            for value in (None, 3, "x", {}, ROW, [], [[]], [None], [3], [ROW, None], [ROW, 3], [ROW, [ROW]])
        ],
        "wrong inputs": [({"inputs": value}, 400) for value in (None, 3, "x", [], [columns], {"b64": "YQ=="})],
        "missing": [
            *(({"instances": [{key: ROW[key] for key in ROW if key != name}]}, 400) for name in ROW),
            *(({"instances": [ROW, {key: ROW[key] for key in ROW if key != name}]}, 400) for name in ROW),
            *(({"inputs": {key: columns[key] for key in ROW if key != name}}, 400) for name in ROW),
        ],
        "misnamed or too much": [
            *((json.loads(body.replace(f'"{name}"', f'"{name}_"')), 400) for name in ROW),
            *(({"inputs": {**columns, extra: [1]}}, 400) for extra in ("a", "", "User")),
            (changed(extra=1), 400),
            (body.replace('"user": 3', '"user": 3, "user": 4'), 400),
        ],
        "wrong type": [(changed(**{name: value}), 400) for name, values in wrong.items() for value in values]
        + [({"inputs": {**columns, name: [value]}}, 400) for name, values in wrong.items() for value in values],
        "wrong shape": [
            ({"inputs": {**columns, "user": 3}}, 400),
            ({"inputs": {**columns, "items": [2, 5]}}, 400),
            ({"inputs": {**columns, "items": []}}, 400),
            ({"inputs": {**columns, "user": [3, 4], "age": [1.0, 2.0, 3.0]}}, 400),
            (changed(items=[2], items_weights=[1.0, 2.0]), 400),
            ({"instances": [ROW, {**ROW, "items": [2], "items_weights": [1.0]}]}, 400),
            ({"signature_name": "top", "inputs": {"user": [4], "k": [2]}}, 400),
            ({"signature_name": "echo", "inputs": {"flag": [True], "small": [1], "exact": [1], "pair": [[1]]}}, 400),
            ({**half, "inputs": 1.0}, 400),
            ({**half, "inputs": [[1.0]]}, 400),
            ({**half, "instances": [1.0, [2.0]]}, 400),
            ({**half, "instances": [{"x": 1.0}, 2.0]}, 400),
        ],
        "wrong number": [
            (body.replace('"user": 3', f'"user": {text}'), 400)
            for text in ("NaN", "Infinity", "1e3", "1.0", "1" * 5000, "-" + "9" * 30, "0x10", "03", "+3")
        ]
        + [(body.replace("0.001", text), 400) for text in ("1e999", "1" * 400, ".5", "1.", "Inf", "-")],
        "not expressible": [({"signature_name": "strange", "inputs": {"x": [1.0], "z": [1.0]}}, 501)],
        "too many rows": [
            ({"instances": [ROW] * 51}, 413),
            ({"instances": [ROW] * 500}, 413),
            ({**half, "inputs": [1.0] * 51}, 413),
            ({**half, "instances": [1.0] * 20_000}, 413),
        ],
        "too many values": [
            (changed(items=[1] * 1001, items_weights=[1] * 1001), 413),
            ({"inputs": {**{name: value * 50 for name, value in columns.items()}, "items": [[1] * 21] * 50}}, 413),
        ],
        "too long": [
            (" " * 200_001, 413),
            (body + " " * 200_000, 413),
            (changed(gender="F" * 300_000), 413),
            (changed(items=[1] * 100_000, items_weights=[1] * 100_000), 413),
        ],
    }


def test_malformed_requests_get_a_message_and_the_next_good_one_an_answer(client):
    requests = malformed()
    assert len(requests) >= 10 and sum(map(len, requests.values())) >= 200
    failed = []
    for kind, bodies in requests.items():
        for body, status in bodies:
            response = predict(client, body)
            message = response.json().get("error", "") if response.status_code >= 400 else ""
            if response.status_code != status or not 20 < len(message) < 2000 or list(response.json()) != ["error"]:
                failed.append((kind, str(body)[:200], response.status_code, response.text[:200]))
            if answer(client, GOOD) != ANSWER:
                failed.append((kind, str(body)[:200], "the next good one"))
    assert failed == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (changed(items=[2, "x"]), "instances[0].items[1] must be a whole number from -9223372036854775808"),
        (changed(items=[2, "x"]), "the input is 'items' (int64 [any, any]; the items). Received: \"x\""),
        (
            {"inputs": {**{name: [value] for name, value in ROW.items()}, "age": ["x"]}},
            "inputs.age[0] must be a number",
        ),
        ({"instances": [{}]}, "lacks 'user', 'items', 'items_weights', 'age', 'gender'. Received: an empty object"),
        (
            {"instances": [ROW, {**ROW, "items": [2]}]},
            "instances[1].items must have 2 values: all lists of one axis need the same length",
        ),
        (
            changed(items_weights=[1.0]),
            "The model refuses the inputs: assertion failed: [items and items_weights] [Condition x == y",
        ),
        ({**GOOD, "signature_name": "nowhere"}, "'serving_default', 'strange', 'top', 'total']. Received: \"nowhere\""),
    ],
)
def test_messages_say_where_and_what(client, request_, message):
    assert message in predict(client, request_).json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/models/other:predict", 404),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/models/mvke/versions/6:predict", 404),
        ("GET", "/v1/models/mvke/versions/8", 404),
        ("GET", "/v1/models/mvke/versions/" + "7" * 6000, 404),
        ("GET", "/v1/models/mvke/versions/-7", 404),
        ("GET", "/v1/models/mvke/versions/latest/metadata", 404),
        ("GET", "/v1/models/mvke/labels/stable", 404),
        ("GET", "/v1/models/mvke/", 404),
        ("POST", "/v1/models/mvke:classify", 404),
        ("GET", "/", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", PREDICT, 405),
        ("PUT", PREDICT, 405),
        ("GET", "/v1/models/mvke/versions/7:predict", 405),
        ("POST", "/v1/models/mvke", 405),
        ("DELETE", "/v1/models/mvke/metadata", 405),
    ],
)
def test_wrong_paths_and_methods(client, method, path, status):
    response = client.request(method, path, content=json.dumps(GOOD))
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert "Received: " in response.json()["error"]
    assert answer(client, GOOD) == ANSWER


def test_content_types_do_not_matter_and_encodings_do(client):
    body = json.dumps(GOOD)
    for content_type in ("application/json", "application/x-www-form-urlencoded", "text/plain; charset=latin-1"):
        response = client.post(PREDICT, content=body, headers={"Content-Type": content_type})
        assert response.json() == ANSWER
    for encoding in ("gzip", "br", "gzip, identity", "nonsense"):
        response = client.post(PREDICT, content=body, headers={"Content-Encoding": encoding})
        assert response.status_code == 415
        assert response.json()["error"].endswith(f"Received: Content-Encoding {encoding}")
    assert client.post(PREDICT, content=body, headers={"Content-Encoding": "identity"}).json() == ANSWER
    assert client.post(PREDICT, content="\ufeff" + body).json() == ANSWER
    assert client.post(PREDICT, files={"file": body}).status_code == 400


def test_a_body_without_a_length_is_counted(client):
    assert client.post(PREDICT, content=chunks(json.dumps(GOOD).encode())).json() == ANSWER
    response = client.post(PREDICT, content=chunks(*[b" " * 1000] * 201))
    assert (response.status_code, response.json()["error"][:34]) == (413, "At most 200000 bytes in a request;")


class Stub:
    """A model that does what a test tells it."""

    version = 1

    def __init__(self, behave) -> None:
        self.behave = behave

    def inputs(self, signature):
        return {}

    def predict(self, signature, arrays):
        self.behave()
        return {"y": np.arange(2)}


def test_a_defect_is_a_500_that_keeps_its_secret_and_the_server_alive():
    behaviours = iter([lambda: 1 // 0, lambda: None])
    with Client(create_app(Stub(lambda: next(behaviours)()))) as client:
        response = predict(client, {"inputs": {}})
        assert (response.status_code, list(response.json())) == (500, ["error"])
        assert "division" not in response.text
        assert answer(client, {"inputs": {}}) == {"outputs": [0, 1]}


def test_more_requests_than_may_wait_are_sent_away():
    release = threading.Event()
    app = create_app(Stub(release.wait), limits=Limits(threads=1, waiting=1))
    responses = []

    async def send(client):
        responses.append(await client.post(PREDICT, content=b'{"inputs": {}}'))
        if [response.status_code for response in responses] == [503, 503]:
            release.set()

    async def main():
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
            anyio.create_task_group() as group,
        ):
            for _ in range(4):
                group.start_soon(send, client)

    anyio.run(main)
    assert [response.status_code for response in responses] == [503, 503, 200, 200]
    assert responses[0].headers["retry-after"] == "1"
    assert responses[0].json() == {"error": "The server is busy; try again. Received: one request after 2"}


async def call(app, receive) -> list[dict]:
    """What an application sends for a request whose body `receive` gives."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PREDICT, "query_string": b"", "headers": []}
    await app(scope, receive, send)
    return sent


def test_a_body_that_does_not_arrive_is_given_up(model):
    app = create_app(model, limits=Limits(body_seconds=0.01))
    sent = anyio.run(call, app, anyio.sleep_forever)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"].endswith("Received: 0 bytes")


def test_a_client_that_vanishes_is_no_error(model):
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    assert anyio.run(call, create_app(model), receive)[0]["status"] == 499


def test_the_newest_version_is_found(export_path, tmp_path):
    assert newest_version(export_path) == newest_version(export_path / "7") == export_path / "7"
    for name in ("2", "10", "notes", "11"):
        (tmp_path / "export" / name).mkdir(parents=True)
    for name in ("2", "10", "notes"):
        (tmp_path / "export" / name / "saved_model.pb").touch()
    assert newest_version(tmp_path / "export") == newest_version(tmp_path) == tmp_path / "export" / "10"
    with pytest.raises(ValueError, match=r"scripts/export\.py makes .* Received: .*notes/nowhere"):
        newest_version(tmp_path / "notes" / "nowhere")


def test_a_damaged_export_is_refused(export_path, tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"\x00damaged")
    with pytest.raises(ValueError, match="no SavedModel that can be loaded at"):
        ServedModel(tmp_path)
    tf.saved_model.save(tf.Module(), str(tmp_path / "2"))
    with pytest.raises(ValueError, match="Expected a SavedModel with signatures"):
        ServedModel(tmp_path / "2")


def test_a_taken_port_says_what_to_do():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(OSError, match=f"choose another --port: '127.0.0.1:{port}'"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model": "mvke", "signatures": {"top": {"description": "best"}}}', "best"),
        ('{"top": {"description": "best"}}', "best"),
        ('["top"]', ""),
    ],
)
def test_descriptions_are_taken_where_there_are_any(export_path, tmp_path, text, expected):
    folder = Path(shutil.copytree(export_path / "7", tmp_path / "7"))
    (folder / DESCRIPTIONS_FILE).write_text(text)
    assert ServedModel(folder).descriptions == dict.fromkeys(("echo", "half_plus_two", "serving_default"), "") | {
        **{"strange": "", "top": expected, "total": ""}
    }
    (folder / DESCRIPTIONS_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"signatures\.json cannot be read"):
        ServedModel(folder)


def test_the_example_is_a_command_that_works(client, model):
    command = curl("http://here/v1/models/mvke:predict", model.example("serving_default"))
    assert command.startswith('curl -d \'{"instances": [{"user": 1,')
    assert len(answer(client, re.search("'(.*)'", command)[1])["predictions"]) == 1
    assert answer(client, model.example("top")) == {"outputs": {"items": [[10]], "title": ["1"]}}
    assert answer(client, model.example("echo"))["predictions"][0]["pair"] == [1.0, 1.0]


def test_an_exported_model_answers_as_its_saved_model(tiny_run, tmp_path):
    folder = export_saved_model(tiny_run.load_model(), tiny_run.prepared.encoder, tmp_path / "export")
    assert DESCRIPTIONS_FILE == SIGNATURES_FILE
    prepared = tiny_run.prepared
    pairs = prepared.pairs.iloc[prepared.part_rows("test")][:40]
    raw = {
        name: np.asarray(column)[pairs[f"{tower}_row"]].tolist()
        for tower in ("user", "item")
        for name, column in prepared.raw[tower].items()
    }
    signature = tf.saved_model.load(folder).signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    expected = signature(**{name: tf.constant(raw[name], specs[name].dtype) for name in specs})
    with Client(create_app(ServedModel(folder))) as client:
        outputs = answer(client, {"inputs": raw})["outputs"]
        rows = answer(client, {"instances": [{name: raw[name][i] for name in raw} for i in range(40)]})["predictions"]
    for task in ("ctr", "cvr"):
        assert np.ptp(expected[task]) > 0.01
        np.testing.assert_array_equal(np.float32(outputs[task]), expected[task].numpy())
        assert [row[task] for row in rows] == outputs[task]


# The script, where nothing of the stack but TensorFlow and the extra `serve` can be imported.
PROCESS = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("keras_rs", "pandas", "sklearn", "matplotlib"):
            raise ImportError(f"{name} is not for this process")

sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def process(export_path):
    arguments = ["--export_path", export_path, "--port", "0", "--max_request_mb", "1"]
    started = subprocess.Popen(
        [sys.executable, "-c", PROCESS, SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    yield started
    started.kill()
    started.communicate()


def exchange(address: tuple[str, int], sent: bytes) -> bytes:
    """Everything that the server sends back on one connection until one of them closes it."""
    received = b""
    with socket.create_connection(address, timeout=60) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            received += part
    return received


def test_the_process_survives_bad_clients_and_stops_on_sigterm(process):
    lines = []
    while not lines or not lines[-1].startswith("Ctrl-C"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()[1]
    base = re.search(r"Serving version 7 at (http://127\.0\.0\.1:\d+/v1/models/mvke) ", "".join(lines))[1]
    assert "  serving_default: scores\n" in lines
    assert any(line.startswith("Try it: curl -d ") and line.endswith(f"{base}:predict\n") for line in lines)
    body = json.dumps(GOOD).encode()

    def assert_alive():
        assert httpx.post(f"{base}:predict", content=body).json() == ANSWER

    assert_alive()
    address = ("127.0.0.1", httpx.URL(base).port)
    head = b"POST /v1/models/mvke:predict HTTP/1.1\r\nHost: here\r\n"
    for length in (b"-1", b"many", b"1" * 5000, b"10, 20", b"0x10"):
        received = exchange(address, head + b"Content-Length: " + length + b"\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 4"), (length, received)
        assert_alive()
    received = exchange(address, head + b"Content-Length: 99999999999\r\n\r\n" + body)
    assert received.startswith(b"HTTP/1.1 413") and b'{"error": "At most 1048576 bytes' in received
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100_000):
        exchange(address, garbage)
        assert_alive()
    for half in (head, head + b"Content-Length: 1000\r\n\r\n", head + b"Content-Length: 1000\r\n\r\n" + body[:30]):
        with socket.create_connection(address) as vanishing:
            vanishing.sendall(half)
        assert_alive()
    unfinished = socket.create_connection(address)
    unfinished.sendall(head + b"Content-Length: 1000\r\n\r\n{")
    unfinished.close()
    assert_alive()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "Stopped.\n")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "--max_request_mb"),
        ([], 2, "--export_path"),
        (["--export_path", "nowhere"], 2, "error: Expected a folder of versions of a SavedModel"),
        (["--export_path", ".", "--port", "70000"], 2, "expected a number from 0 to 65535"),
        (["--export_path", ".", "--name", "a/b"], 2, "expected letters, digits"),
        (["--export_path", ".", "--max_rows", "0"], 2, "at least 1"),
    ],
)
def test_script_answers_without_tensorflow(arguments, status, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("mvke_tf.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == status
    assert message in "".join(capsys.readouterr())


def test_a_missing_extra_says_how_to_install_it():
    require_extra("serve", "json")
    with pytest.raises(ValueError, match=r"needs no_such_module\. Install the extra: pip install '\.\[serve\]'"):
        require_extra("serve", "json", "no_such_module")
