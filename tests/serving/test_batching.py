# SPDX-License-Identifier: Apache-2.0
"""Several requests in one call of the model."""

import json
import threading

import anyio
import httpx
import numpy as np
import pytest

from mvke_tf.serving.rest.app import Application, Limits
from mvke_tf.serving.rest.batching import answer, answer_all
from mvke_tf.serving.rest.model import Cost, ServedModel
from mvke_tf.serving.rest.protocol import InputSpec, RequestError
from tests.serving.helpers import rows_of
from tests.serving.rest_helpers import PREDICT

pytestmark = pytest.mark.slow

LIMITS = Limits(rows=50, values=1000, threads=1, batch_seconds=0.001)


class Doubling:
    """Gives twice its input, refuses 13, fails on 99, and keeps what it was called with."""

    version = 1

    def __init__(self, by_row: bool = True) -> None:
        self.by_row, self.calls = by_row, []
        self.go = threading.Event()
        self.go.set()

    def inputs(self, signature):
        return {"x": InputSpec("x", "float32", (None,)), "k": InputSpec("k", "int32", ())}

    def cost(self, signature):
        return Cost(per_row=2)

    def is_by_row(self, signature):
        return self.by_row

    def predict(self, signature, arrays, max_values=None):
        assert self.go.wait(60)
        self.calls.append(arrays["x"].tolist())
        if 99 in arrays["x"]:
            raise ZeroDivisionError("a defect")
        if 13 in arrays["x"]:
            raise RequestError("The model refuses 13")
        return {"y": arrays["x"] * 2 + arrays["k"]}


def body(*x: float, k: int = 0) -> bytes:
    return json.dumps({"inputs": {"x": x, "k": k}}).encode()


def answers(model, bodies, limits=LIMITS) -> list:
    found = {}
    answer_all([(model, each) for each in bodies], limits, found.__setitem__)
    return [found[number] for number in range(len(bodies))]


def outputs(results) -> list:
    return [json.loads(result)["outputs"] for result in results]


def test_requests_are_one_call_and_get_their_own_rows():
    model = Doubling()
    results = answers(model, [body(1, 2), body(3), body(4, k=5), body(6, 7, 8)])
    assert outputs(results) == [[2, 4], [6], [13], [12, 14, 16]]
    # Those with another `k` are no rows of the same call; the cheapest call is the first.
    assert model.calls == [[4], [1, 2, 3, 6, 7, 8]]


def test_a_bad_request_fails_none_of_its_neighbours():
    model = Doubling()
    bad = [b"{", body(13), body(99), json.dumps({"inputs": {"x": [1]}}).encode()]
    results = answers(model, [body(1), *bad, body(2)])
    assert outputs([results[0], results[-1]]) == [[2], [4]]
    assert [type(result) for result in results[1:5]] == [RequestError, RequestError, ZeroDivisionError, RequestError]
    assert str(results[2]) == "The model refuses 13"


def test_one_call_stays_within_the_limits_of_one_request():
    model = Doubling()
    assert outputs(answers(model, [body(*[1] * 30)] * 3, Limits(rows=70)))[2] == [2] * 30
    assert [len(call) for call in model.calls] == [30, 60]
    model.calls.clear()
    answers(model, [body(*[1] * 30)] * 3, Limits(numbers=100))
    assert [len(call) for call in model.calls] == [30] * 3
    model.calls.clear()
    answers(model, [body(*[1] * 30)] * 4, Limits(values=60))
    assert [len(call) for call in model.calls] == [60, 60]


def test_only_rows_that_do_not_depend_on_each_other_are_together(toy_model):
    model = Doubling(by_row=False)
    assert outputs(answers(model, [body(1), body(2)])) == [[2], [4]]
    assert model.calls == [[1], [2]]
    total = json.dumps({"signature_name": "total", "inputs": [2.0]}).encode()
    assert [json.loads(result)["outputs"]["sum"] for result in answers(toy_model, [total] * 3)] == [2.0] * 3


def test_an_export_answers_in_a_batch_as_alone(exported, user):
    model, limits = ServedModel(exported), Limits(batch_seconds=0.001)
    columns = {name: column.tolist() for name, column in user.items()}
    bodies = []
    for row in range(3):
        one = rows_of({name: np.asarray(column, object) for name, column in columns.items()}, [row])
        inputs = {name: column.tolist() for name, column in one.items()}
        scored = {**inputs, "item_ids": [["i01", "i02", "nothing"]]}
        best = {**inputs, "k": 4, "task": "buy", "exclude": [["i03"]]}
        for name, values in (("score_ids", scored), ("recommend", best), ("user_vectors", inputs)):
            bodies.append(json.dumps({"signature_name": name, "inputs": values}).encode())
    called = []
    predict = model.predict
    model.predict = lambda name, *rest: called.append(name) or predict(name, *rest)
    together = outputs(answers(model, bodies, limits))
    assert sorted(called) == ["recommend", "score_ids", "user_vectors"]
    for found, each in zip(together, bodies, strict=True):
        alone = json.loads(answer(model, each, limits))["outputs"]
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            if name in ("item_ids", "item_names"):
                assert found[name] == values
            else:
                np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6)


async def send(app: Application, bodies: list[bytes], waiting: int, then) -> list[httpx.Response]:
    """The responses to requests at the same time; `then` is called when so many of them wait."""
    responses: list = [None] * len(bodies)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def post(number: int) -> None:
        responses[number] = await client.post(PREDICT, content=bodies[number])

    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    async with client, anyio.create_task_group() as tasks:
        for number in range(len(bodies)):
            tasks.start_soon(post, number)
        while app.pending < waiting:
            await anyio.sleep(0)
        then()
    return responses


def test_the_server_puts_requests_together_while_its_threads_are_busy():
    model = Doubling()
    model.go.clear()
    app = Application(model, limits=LIMITS)
    responses = anyio.run(send, app, [body(number) for number in range(8)] + [b"{"], 9, model.go.set)
    assert [response.status_code for response in responses] == [200] * 8 + [400]
    assert [response.json()["outputs"] for response in responses[:8]] == [[2 * number] for number in range(8)]
    assert sum(map(len, model.calls)) == 8 and len(model.calls) <= 2


@pytest.mark.parametrize("times", [2, 3])
def test_requests_that_find_no_thread_are_sent_away_each_in_its_time(times):
    model = Doubling()
    app = Application(model, limits=Limits(threads=1, batch_seconds=0.001, wait_seconds=0.1))

    async def busy() -> list[httpx.Response]:
        async with app._turns:
            return await send(app, [body(1)] * times, times, lambda: None)

    for response in anyio.run(busy):
        assert response.status_code == 503 and "No thread was free within 0.1 s" in response.json()["error"]
    assert not model.calls and not app._queue
    assert anyio.run(send, app, [body(3)], 1, lambda: None)[0].json() == {"outputs": [6]}
