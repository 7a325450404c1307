# SPDX-License-Identifier: Apache-2.0
"""The REST protocol of TensorFlow Serving, and everything that a client can do wrong in one request."""

import base64
import json
import re
import threading
import time

import anyio
import httpx
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvke_tf.serving.rest.app import Application, Limits
from mvke_tf.serving.rest.model import Cost, ServedModel
from mvke_tf.serving.rest.protocol import (
    MOST_KEYS,
    MOST_LEVELS,
    InputSpec,
    RequestError,
    parse_request,
    read_arrays,
)
from mvke_tf.serving.rest.server import curl
from tests.serving.rest_helpers import ANSWER, GOOD, PREDICT, ROW, Client, Stub, answer, chunks, predict

LIMITS = Limits(request_bytes=200_000, rows=50, values=1000)


# Any JSON, and more of what a request holds.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "k", "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*ROW, "b64", "inputs", "instances", "x"]) | st.text(max_size=3), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def client(toy_model):
    with Client(Application(toy_model, limits=LIMITS)) as client:
        yield client


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


def test_status_and_metadata(client, toy_model):
    state = {"version": "7", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("/v1/models/mvke", "/v1/models/mvke/versions/7", "/v1/models/mvke/versions/007"):
        assert client.get(path).json() == {"model_version_status": [state]}
    metadata = client.get("/v1/models/mvke/metadata").json()
    assert metadata == client.get("/v1/models/mvke/versions/7/metadata").json()
    assert metadata["model_spec"] == {"name": "mvke", "signature_name": "", "version": "7"}
    signatures = metadata["metadata"]["signature_def"]["signature_def"]
    assert set(signatures) - {"__saved_model_init_op"} == set(toy_model.descriptions)
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


@pytest.mark.slow
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
            "The model refuses the inputs: items and items_weights Condition x == y",
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


def test_a_defect_is_a_500_that_keeps_its_secret_and_the_server_alive():
    behaviours = iter([lambda: 1 // 0, lambda: None])
    with Client(Application(Stub(lambda: next(behaviours)()))) as client:
        response = predict(client, {"inputs": {}})
        assert (response.status_code, list(response.json())) == (500, ["error"])
        assert "division" not in response.text
        assert answer(client, {"inputs": {}}) == {"outputs": [0, 1]}


def test_more_requests_than_may_wait_are_sent_away():
    release = threading.Event()
    app = Application(Stub(release.wait), limits=Limits(threads=1, waiting=1))
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


def test_a_body_that_does_not_arrive_is_given_up(toy_model):
    app = Application(toy_model, limits=Limits(body_seconds=0.01))
    sent = anyio.run(call, app, anyio.sleep_forever)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"].endswith("Received: 0 bytes")


def test_a_client_that_vanishes_is_no_error(toy_model):
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    assert anyio.run(call, Application(toy_model), receive)[0]["status"] == 499


def test_the_example_is_a_command_that_works(client, toy_model):
    command = curl("http://here/v1/models/mvke:predict", toy_model.example("serving_default"))
    assert command.startswith('curl -d \'{"instances": [{"user": 1,')
    assert len(answer(client, re.search("'(.*)'", command)[1])["predictions"]) == 1
    assert answer(client, toy_model.example("top")) == {"outputs": {"items": [[10]], "title": ["1"]}}
    assert answer(client, toy_model.example("echo"))["predictions"][0]["pair"] == [1.0, 1.0]


# Each of these took longer than a minute, or gigabytes, when it was first tried.


def test_duplicate_keys_are_found_in_time_that_grows_with_the_body(client):
    """60,000 keys, each twice, once held a thread for 43 s: every key was counted among all others."""
    body = "{" + ",".join(f'"k{number // 2}":1' for number in range(60_000)) + "}"
    with Client(Application(Stub(lambda: None))) as roomy:
        started = time.monotonic()
        response = predict(roomy, body)
        assert time.monotonic() - started < 5
    assert response.status_code == 400
    assert response.json() == {"error": f"An object must have at most {MOST_KEYS} keys. Received: 60000 keys"}
    few = "{" + ",".join(f'"k{number // 2}":1' for number in range(2 * 12)) + "}"
    twice = predict(client, few).json()["error"]
    assert twice.startswith('An object must name each key once. Received twice: "k0", "k1", "k10", "k11", "k2"')


def test_levels_are_counted_outside_of_strings(client):
    for body, levels in (
        ("[" * 100_000 + "]" * 100_000, 100_000),
        ('{"a":' * 40, 40),
        ('["' + "[" * 1000 + '", "\\"[[", [1]', 2),
        ('"[[[[', 0),
        ('\\"[' * 50, 0),
    ):
        error = predict(client, body).json()["error"]
        expected = f"The body must be JSON of at most {MOST_LEVELS} levels. Received: {levels} levels"
        assert (error == expected) == (levels > MOST_LEVELS), error
    assert answer(client, {"signature_name": "half_plus_two", "inputs": {"x": [1.0]}}) == {"outputs": [2.5]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        '"' + '\\"' * 2_000_000,
        "[" * 4_000_000,
        '{"instances": [' + "1," * 2_000_000 + "1]}",
        '{"inputs": {"x": [' + "0." + "1" * 4_000_000 + "]}}",
        '{"inputs": {"x": ' + "9" * 4_000_000 + "}}",
        '{"instances": ["' + "é" * 2_000_000 + '"]}',
        '{"instances": [' + ",".join(['{"a": 1, "a": 1}'] * 200_000) + "]}",
        '{"instances": [' + ",".join(["{}"] * 1_000_000) + "]}",
    ],
    ids=lambda body: body[:14] + "..." + body[-6:],
)
def test_no_body_takes_long(toy_model, body):
    """Generous: most take a tenth of a second."""
    with Client(Application(toy_model, limits=Limits(request_bytes=2**23))) as client:
        started = time.monotonic()
        response = predict(client, body)
        assert response.status_code in (400, 413)
        assert time.monotonic() - started < 15


def test_bytes_that_are_no_text_are_refused():
    """TensorFlow repeats the inputs in its message, and then cannot decode it."""

    def refuse():
        b"\xff\xff".decode()

    with Client(Application(Stub(refuse))) as client:
        assert predict(client, {"inputs": {}}).status_code == 500

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([], tf.string, "task")])
        def ask(self, task):
            with tf.control_dependencies([tf.debugging.Assert(tf.equal(task, "a"), ["Received:", task])]):
                return {"y": tf.constant([1.0])}

    model = ServedModel.__new__(ServedModel)
    model._functions = {"serving_default": Module().ask.get_concrete_function()}
    model._inputs = {"serving_default": {"task": InputSpec("task", "string", ())}}
    model._costs = {"serving_default": Cost()}
    model.version = 1
    with Client(Application(model)) as client:
        response = predict(client, {"inputs": {"task": {"b64": "//8="}}})
        assert (response.status_code, "not UTF-8" in response.json()["error"]) == (400, True)
        assert answer(client, {"inputs": {"task": "a"}}) == {"outputs": [1.0]}


def test_answers_are_bounded_before_they_are_computed(toy_model):
    """2,000 rows x 1,682 items once made an answer of 130 MB in 2.4 GB of memory."""
    with Client(Application(toy_model, limits=Limits(values=100, numbers=500))) as client:

        def top(rows, k):
            return predict(client, {"signature_name": "top", "inputs": {"user": [1] * rows, "k": k}})

        assert top(10, 10).status_code == 200
        assert top(2, 100).status_code == 413  # More than the description knows: seen when it is computed.
        assert top(10, 11).json()["error"].endswith("Received: 10 rows, k=11, which make 110 values")
        refused = top(11, 1)
        assert refused.status_code == 413
        assert refused.json()["error"].startswith("The signature computes 50 numbers per row, at most 500 in a request")
        many = {**ROW, "items": [1] * 63, "items_weights": [1] * 63}
        error = predict(client, {"instances": [many]}).json()["error"]
        assert "0 numbers per row and 8 per value of 'items' and 0 per value of 'user', at most 500" in error
        assert (
            predict(client, {"instances": [{**many, "items": [1] * 62, "items_weights": [1] * 62}]}).status_code == 200
        )


def test_costs_that_cannot_be_used_are_none():
    assert Cost.from_dict({"per_row": -3, "per_value": [1], "answer_per_row": {"input": 7, "most": True}}) == Cost()


def test_bodies_that_wait_are_bounded_together():
    release = threading.Event()
    app = Application(Stub(release.wait), limits=Limits(threads=1, buffered_bytes=1000))
    statuses = []

    async def send(client, size):
        response = await client.post(PREDICT, content=b'{"inputs": {}}'.ljust(size))
        statuses.append(response.status_code)
        if response.status_code == 503:
            release.set()

    async def main():
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
            anyio.create_task_group() as group,
        ):
            for size in (600, 300, 200):
                group.start_soon(send, client, size)

    anyio.run(main)
    assert sorted(statuses) == [200, 200, 503] and statuses[0] == 503
    assert app.buffered_bytes == 0


def test_long_requests_leave_a_thread_to_short_ones():
    release, computed = threading.Event(), []

    class Model(Stub):
        def cost(self, signature):
            computed.append(signature)
            if signature == "long":
                release.wait()
            return Cost()

    app = Application(Model(lambda: None), limits=Limits(threads=2, waiting=2))
    statuses = []

    async def send(client):
        response = await client.post(PREDICT, content=b'{"signature_name": "long", "inputs": {}}'.ljust(70_000))
        statuses.append(response.status_code)

    async def main():
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
            anyio.create_task_group() as group,
        ):
            for _ in range(3):
                group.start_soon(send, client)
            # One of them is computed, one waits, the third is sent away.
            while not (computed and statuses):
                await anyio.sleep(0.01)
            for _ in range(5):
                assert (await client.post(PREDICT, content=b'{"inputs": {}}')).status_code == 200
            assert (computed.count("long"), statuses) == (1, [503])
            release.set()

    anyio.run(main)
    assert sorted(statuses) == [200, 200, 503]


def test_a_request_that_finds_no_thread_is_sent_away_in_time():
    release = threading.Event()
    app = Application(Stub(release.wait), limits=Limits(threads=1, wait_seconds=0.05))
    responses = []

    async def send(client):
        responses.append(await client.post(PREDICT, content=b'{"inputs": {}}'))
        release.set()

    async def main():
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
            anyio.create_task_group() as group,
        ):
            group.start_soon(send, client)
            group.start_soon(send, client)

    anyio.run(main)
    assert [response.status_code for response in responses] == [503, 200]
    assert "No thread was free within 0.05 s" in responses[0].json()["error"]


def test_a_client_that_hangs_up_while_it_waits_is_not_computed():
    computed = []
    app = Application(Stub(lambda: computed.append(1)))
    messages = iter([{"type": "http.request", "body": b'{"inputs": {}}'}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    assert anyio.run(call, app, receive)[0]["status"] == 499
    assert computed == []


def test_the_token_is_asked_for_everywhere(toy_model):
    with Client(Application(toy_model, token="s3cret")) as client:
        for method, path in (("GET", "/v1/models/mvke"), ("GET", "/metrics"), ("POST", PREDICT), ("GET", "/nowhere")):
            for given in (None, "s3cret", "Bearer", "Bearer s3cret2", "Bearer s3cre", "Basic s3cret", "Bearer \xe9"):
                headers = {} if given is None else {b"Authorization": given.encode("latin-1")}
                response = client.request(method, path, content=json.dumps(GOOD), headers=headers)
                assert response.status_code == 401, given
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"].endswith("Expected: Authorization: Bearer <token>")
        headers = {"Authorization": "bearer s3cret"}
        assert client.post(PREDICT, content=json.dumps(GOOD), headers=headers).json() == ANSWER
        assert client.request("GET", "/nowhere", headers=headers).status_code == 404


def test_only_requests_to_its_names_are_answered(toy_model):
    with Client(Application(toy_model, allowed_hosts={"localhost", "[::1]", "Example.org"})) as client:
        for host, status in {
            "localhost": 200,
            "LOCALHOST:8501": 200,
            "[::1]:8501": 200,
            "[::1]": 200,
            "example.org": 200,
            "evil.example.org": 400,
            "localhost.evil": 400,
            "[::2]": 400,
            "": 400,
        }.items():
            response = client.request("GET", "/v1/models/mvke", headers={"Host": host})
            assert response.status_code == status, host


def test_metrics_count_requests_by_endpoint_and_status(toy_model):
    app = Application(toy_model)
    with Client(app) as client:
        for _ in range(3):
            answer(client, GOOD)
        predict(client, "{")
        client.get("/v1/models/mvke")
        client.get("/elsewhere")
        response = client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = response.text.splitlines()
    for line in (
        'mvke_requests_total{endpoint="predict",status="200"} 3',
        'mvke_requests_total{endpoint="predict",status="400"} 1',
        'mvke_requests_total{endpoint="status",status="200"} 1',
        'mvke_requests_total{endpoint="none",status="404"} 1',
        'mvke_request_seconds_bucket{endpoint="predict",le="+Inf"} 4',
        'mvke_request_seconds_count{endpoint="predict"} 4',
        'mvke_model_loads_total{result="refused"} 0',
        "mvke_model_version 7",
        "mvke_requests_pending 0",
        "# TYPE mvke_request_seconds histogram",
    ):
        assert line in lines
    assert all(re.fullmatch(r"# .+|mvke_[a-z_]+(\{[^}]+\})? [-+\d.e]+", line) for line in lines)


def test_requests_have_ids(toy_model, caplog):
    caplog.set_level("INFO", logger="mvke_tf.serving.rest.app")
    with Client(Application(toy_model, log_requests=True)) as client:
        for given, kept in (("abc-1.2_3", True), ("x" * 65, False), ("a b", False), ("a\tb", False), (None, False)):
            headers = {} if given is None else {"X-Request-Id": given}
            response = client.post(PREDICT, content=json.dumps(GOOD), headers=headers)
            identifier = response.headers["x-request-id"]
            assert (identifier == given) == kept and re.fullmatch(r"[\w.-]{1,64}", identifier)
            assert caplog.messages[-1].startswith(f"{identifier} POST {PREDICT} 200, ")
        client.get('/a"b%0aINFO')
        assert '/a\\"b' in caplog.messages[-1] and "\n" not in caplog.messages[-1]


def test_a_request_ends_with_the_version_that_it_began_with():
    began, release = threading.Event(), threading.Event()

    def wait():
        began.set()
        release.wait()

    app = Application(Stub(wait))
    newer = Stub(lambda: None)
    newer.version, newer.predict = 2, lambda *_: {"y": np.arange(3)}

    async def main():
        answers = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

            async def send():
                answers.append((await client.post(PREDICT, content=b'{"inputs": {}}')).json())

            async with anyio.create_task_group() as group:
                group.start_soon(send)
                await anyio.to_thread.run_sync(began.wait)
                app.model = newer
                await send()
                release.set()
        return answers

    assert anyio.run(main) == [{"outputs": [0, 1, 2]}, {"outputs": [0, 1]}]


LISTS = {
    "tags": InputSpec("tags", "string", (None, None), unknown=""),
    "tags_weights": InputSpec("tags_weights", "float32", (None, None), ones_like="tags"),
    "age": InputSpec("age", "float32", (None,)),
}


def arrays_of(request: dict) -> dict[str, np.ndarray]:
    return read_arrays(parse_request(json.dumps(request).encode()), LISTS, 10, 100)


@pytest.mark.parametrize(
    "request_",
    [
        {"instances": [{"tags": ["a", "b"], "age": 1}, {"tags": ["c", "d"], "age": 2, "tags_weights": [0, 3]}]},
        {"inputs": {"tags": [["a", "b"], ["c", "d"]], "age": [1, 2]}},
    ],
)
def test_weights_of_unweighted_lists_may_be_left_out(request_):
    arrays = arrays_of(request_)
    assert list(arrays) == list(LISTS) and arrays["tags"].tolist() == [[b"a", b"b"], [b"c", b"d"]]
    expected = [[1, 1], [0, 3]] if "instances" in request_ else [[1, 1], [1, 1]]
    assert arrays["tags_weights"].tolist() == expected and arrays["tags_weights"].dtype == np.float32


def test_null_is_an_empty_list():
    for request_ in ({"instances": [{"tags": None, "age": 1}]}, {"inputs": {"tags": [None], "age": [1]}}):
        arrays = arrays_of(request_)
        assert arrays["tags"].shape == arrays["tags_weights"].shape == (1, 0)
    with pytest.raises(RequestError, match=r"inputs\.tags must be a list.*Received: null"):
        arrays_of({"inputs": {"tags": None, "age": [1]}})


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": {"age": [1, 2], "k": 3}},
        {"inputs": {"age": [1, 2], "k": 3, "exclude": [[], []]}},
        {"instances": [{"age": 1}, {"age": 2}]},
    ],
)
def test_what_is_optional_is_an_empty_list_per_row(request_):
    specs = {
        "age": InputSpec("age", "float32", (None,)),
        "exclude": InputSpec("exclude", "int64", (None, None), optional=True),
    }
    if "inputs" in request_:
        specs["k"] = InputSpec("k", "int32", ())
    arrays = read_arrays(parse_request(json.dumps(request_).encode()), specs, 10, 100)
    assert list(arrays) == list(specs) and arrays["exclude"].shape == (2, 0) and arrays["exclude"].dtype == np.int64


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        # Not the weights, which may be left out.
        ({"instances": [{"age": 1}]}, r"instances\[0\] lacks 'tags' \(string \[any, any\]\)\. Received"),
        ({"instances": [{"age": 1, "tags": "a"}]}, r"instances\[0\]\.tags must be a list"),
        ({"inputs": {"age": [1], "tags": "a"}}, r"inputs\.tags must be a list"),
        ({"inputs": {"age": [1], "tags": ["a"]}}, r"inputs\.tags\[0\] must be a list"),
        ({"instances": [{"age": 1, "tags": ["a"], "tag": 1}]}, r"Received also: .*tag"),
    ],
)
def test_lists_without_weights_that_cannot_be_read(request_, message):
    with pytest.raises(RequestError, match=message):
        arrays_of(request_)


def refused_or_answered(client, body) -> None:
    """An answer is JSON: predictions, or one line that says what was wrong with the request."""
    response = predict(client, body)
    assert response.status_code in (200, 400, 413), (response.status_code, response.text)
    values = response.json()
    if response.status_code != 200:
        assert list(values) == ["error"] and 0 < len(values["error"]) < 2_000 and "\n" not in values["error"]
        assert "Traceback" not in values["error"]


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.sampled_from(["serving_default", "half_plus_two", "top", "echo", "total", "strange", "", "no"]), VALUES)
def test_any_values_are_answered_or_refused(client, signature, values):
    for key in ("instances", "inputs"):
        refused_or_answered(client, json.dumps({"signature_name": signature, key: values}))
    refused_or_answered(client, json.dumps(values))


@FUZZ
@given(st.data())
def test_a_request_with_one_other_value_is_answered_or_refused(client, data):
    request = json.loads(json.dumps(GOOD))
    place, key = request, "instances"
    while isinstance(place[key], (list, dict)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        keys = list(range(len(place))) if isinstance(place, list) else sorted(place)
        key = data.draw(st.sampled_from(keys))
    place[key] = data.draw(VALUES)
    refused_or_answered(client, json.dumps(request))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 10_000))
def test_damaged_bytes_are_answered_or_refused(client, changes, cut):
    body = bytearray(json.dumps(GOOD).encode())
    for place, byte in changes:
        body[place % len(body)] = byte
    refused_or_answered(client, bytes(body[: len(body) - cut % len(body)]))
    refused_or_answered(client, bytes(body))
