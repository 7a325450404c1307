"""TensorFlow Serving's REST endpoints for one model, as a Starlette application."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Protocol

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mvke_tf.server.answers import write_answer, write_error
from mvke_tf.server.protocol import InputSpec, RequestError, parse_request, read_arrays

CLIENT_CLOSED_REQUEST = 499


class Model(Protocol):
    """What the application needs of `mvke_tf.server.model.ServedModel`."""

    version: int

    def inputs(self, signature: str) -> dict[str, InputSpec]: ...
    def predict(self, signature: str, arrays: Any) -> dict[str, Any]: ...
    def metadata(self, name: str) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may ask for, and all of them together.

    Args:
        request_bytes: Longest body.
        rows: Most rows of a request. What a row costs depends on the model: `recommend` scores its whole catalogue.
        values: Most values of one input, for example rows x items to score.
        threads: Requests that are computed at the same time.
        waiting: Requests that may be under way beyond those; one more is sent away with 503.
        body_seconds: Longest time that a body may take to arrive.
    """

    request_bytes: int = 8 * 2**20
    rows: int = 10_000
    values: int = 200_000
    threads: int = os.cpu_count() or 1
    waiting: int = 256
    body_seconds: float = 30.0


class _Digits(StringConvertor):
    # Text, because the `int` of Starlette fails on a number of thousands of digits.
    regex = "[0-9]+"


register_url_convertor("digits", _Digits())


def create_app(model: Model, name: str = "mvke", limits: Limits | None = None) -> Starlette:
    """The application.

    Args:
        model: What it serves.
        name: The name of the model in addresses.
        limits: What it refuses; see the defaults of `Limits`.

    Returns:
        An ASGI application with `POST /v1/models/<name>[/versions/<n>]:predict`, `GET /v1/models/<name>[/versions/<n>]`
        and `GET /v1/models/<name>[/versions/<n>]/metadata`. Every error is `{"error": <message>}`.
    """
    endpoints = _Endpoints(model, name, limits or Limits())
    base = f"/v1/models/{name}"
    routes = []
    for path in (base, base + "/versions/{version:digits}"):
        routes += [
            Route(path + ":predict", endpoints.predict, methods=["POST"]),
            Route(path + "/metadata", endpoints.metadata, methods=["GET"]),
            Route(path, endpoints.status, methods=["GET"]),
        ]
    handlers = {RequestError: _refused, HTTPException: endpoints.not_found, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def answer(model: Model, body: bytes, limits: Limits) -> bytes:
    """The body of the answer to the body of a `predict` request.

    Raises:
        RequestError: If the request cannot be answered.
    """
    request = parse_request(body)
    arrays = read_arrays(request, model.inputs(request.signature), limits.rows, limits.values)
    return write_answer(model.predict(request.signature, arrays), request.by_rows)


class _Endpoints:
    def __init__(self, model: Model, name: str, limits: Limits) -> None:
        self.model, self.name, self.limits = model, name, limits
        self._threads = anyio.CapacityLimiter(limits.threads)
        self._pending = 0

    async def predict(self, request: Request) -> Response:
        self._check_version(request)
        if self._pending >= self.limits.threads + self.limits.waiting:
            raise RequestError(f"The server is busy; try again. Received: one request after {self._pending}", 503)
        self._pending += 1
        try:
            body = await self._body(request)
            # In a thread, parsing included: the event loop goes on reading, answering and refusing.
            return _json(await to_thread.run_sync(answer, self.model, body, self.limits, limiter=self._threads))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            self._pending -= 1

    async def _body(self, request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise RequestError(f"The body must come uncompressed. Received: Content-Encoding {encoding[:60]}", 415)
        most = self.limits.request_bytes
        # The HTTP library has refused what is not a number.
        if int(request.headers.get("content-length", "0")) > most:
            self._too_long(f"Content-Length {request.headers['content-length'][:20]}")
        body = bytearray()
        try:
            with anyio.fail_after(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        self._too_long("more")
        except TimeoutError:
            raise RequestError(
                f"The body must arrive within {self.limits.body_seconds:g} s. Received: {len(body)} bytes", 408
            ) from None
        return bytes(body)

    def _too_long(self, received: str) -> None:
        raise RequestError(
            f"At most {self.limits.request_bytes} bytes in a request; send several. Received: {received}", 413
        )

    async def status(self, request: Request) -> Response:
        self._check_version(request)
        state = {"error_code": "OK", "error_message": ""}
        version = {"version": str(self.model.version), "state": "AVAILABLE", "status": state}
        return _json(_pretty({"model_version_status": [version]}))

    async def metadata(self, request: Request) -> Response:
        self._check_version(request)
        return _json(_pretty(self.model.metadata(self.name)))

    def _check_version(self, request: Request) -> None:
        version = request.path_params.get("version")
        if version is not None and version.lstrip("0") != str(self.model.version):
            raise RequestError(f"Version {self.model.version} of the model is served. Received: {version[:20]}", 404)

    async def not_found(self, request: Request, error: Exception) -> Response:
        """No such path, or another method than the path has."""
        base = f"/v1/models/{self.name}"
        message = f"There are POST {base}:predict, GET {base} and GET {base}/metadata, also with /versions/<n>."
        message += f" Received: {request.method[:20]} {request.url.path[:100]}"
        return _json(write_error(message), error.status_code, error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    return _json(write_error(str(error)), error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def _failed(request: Request, error: Exception) -> Response:
    return _json(write_error("The server failed on this request; its log has the details."), 500)


def _json(body: bytes, status: int = 200, headers: Any = None) -> Response:
    return Response(body, status, dict(headers or {}), "application/json")


def _pretty(values: Any) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
