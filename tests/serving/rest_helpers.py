# SPDX-License-Identifier: Apache-2.0
"""A SavedModel of known answers, and clients of a server in this process."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import httpx
import numpy as np
import tensorflow as tf
from anyio.from_thread import start_blocking_portal

from mvke_tf.serving.rest.model import DESCRIPTIONS_FILE, Cost

PREDICT = "/v1/models/mvke:predict"
ROW = {"user": 3, "age": 0.5, "gender": "F", "items": [2, 5], "items_weights": [1.0, 0.5]}
GOOD = {"instances": [ROW, {"user": -1, "age": 1e-3, "gender": "né", "items": [7, 7], "items_weights": [0, 2]}]}
ANSWER = {"predictions": [{"ctr": 4.166667, "cvr": 4.5}, {"ctr": 2.0003333, "cvr": 14.0}]}


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


def export_toy(folder: Path) -> Path:
    """Writes the model into a folder, and descriptions of some of its signatures beside it."""
    toy = Toy()
    signatures = {name: getattr(toy, name) for name in ("half_plus_two", "top", "echo", "strange", "total")}
    signatures["serving_default"] = toy.score
    tf.saved_model.save(toy, str(folder), signatures=signatures)
    inputs = {name: {"description": f"the {name}"} for name in ("user", "items", "items_weights")}
    described = {
        "serving_default": {
            "description": "scores",
            "inputs": inputs,
            "cost": {"per_value": {"items": 8, "user": "x"}},
        },
        "top": {"cost": {"per_row": 50, "answer_per_row": {"input": "k", "most": 40}}},
        "echo": "odd",
    }
    (folder / DESCRIPTIONS_FILE).write_text(json.dumps({"signatures": described}))
    return folder


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


def predict(client, request, path: str = PREDICT) -> httpx.Response:
    return client.post(path, content=request if isinstance(request, bytes | str) else json.dumps(request))


def answer(client, request) -> dict:
    response = predict(client, request)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


class Stub:
    """A model that does what a test tells it."""

    version = 1

    def __init__(self, behave) -> None:
        self.behave = behave

    def inputs(self, signature):
        return {}

    def cost(self, signature):
        return Cost()

    def is_by_row(self, signature):
        return False

    def predict(self, signature, arrays, max_values=None):
        self.behave()
        return {"y": np.arange(2)}

    def metadata(self, name):
        return {"name": name}
