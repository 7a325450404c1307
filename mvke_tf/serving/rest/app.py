# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Serving's REST endpoints for one model, as an ASGI application."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mvke_tf.serving.rest.batching import MOST_REQUESTS, Waiting, answer, answer_all
from mvke_tf.serving.rest.metrics import CONTENT_TYPE, Metrics
from mvke_tf.serving.rest.protocol import InputSpec, RequestError, write_error

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
# Bodies above this are of long requests: what a request costs grows with what it sends.
_LONG_BYTES = 2**16
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Model(Protocol):
    """What the application needs of `mvke_tf.serving.rest.model.ServedModel`."""

    version: int

    def inputs(self, signature: str) -> dict[str, InputSpec]: ...
    def cost(self, signature: str) -> Any: ...
    def is_by_row(self, signature: str) -> bool: ...
    def predict(self, signature: str, arrays: Any, max_values: int | None = None) -> dict[str, Any]: ...
    def metadata(self, name: str) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may ask for, and all of them together.

    Args:
        request_bytes: Longest body.
        rows: Most rows of a request.
        values: Most values of one input or output, for example rows x items to score.
        numbers: Most numbers that a request makes the model hold or compute, by what `signatures.json` says of the
            cost of each signature: for example rows x items of the catalogue, which `recommend` scores.
        threads: Requests that are computed at the same time.
        waiting: Complete requests that may wait for a thread, at most half of them longer than 64 KiB; one more is sent
            away with 503.
        buffered_bytes: Bodies that have arrived, or are arriving, and answers that are not sent yet, all together.
        connections: Connections at the same time; one more is sent away with 503.
        head_seconds: Longest time that the head of a request may take to arrive.
        body_seconds: The same of the body.
        wait_seconds: Longest time that a request waits for a thread.
        answer_seconds: Longest time that a client may take to read an answer.
        batch_seconds: How long a request of at most 64 KiB waits for others that one call of the model can answer with
            it, where `signatures.json` says that this changes no answer; 0 lets none wait.
    """

    request_bytes: int = 8 * 2**20
    rows: int = 10_000
    values: int = 200_000
    numbers: int = 64 * 2**20
    threads: int = os.cpu_count() or 1
    waiting: int = 256
    buffered_bytes: int = 256 * 2**20
    connections: int = 512
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    wait_seconds: float = 30.0
    answer_seconds: float = 60.0
    batch_seconds: float = 0.0


class _Digits(StringConvertor):
    # Text, because the `int` of Starlette fails on a number of thousands of digits.
    regex = "[0-9]+"


register_url_convertor("digits", _Digits())


class Application:
    """The application: `POST /v1/models/<name>[/versions/<n>]:predict`, `GET /v1/models/<name>[/versions/<n>]`,
    `GET /v1/models/<name>[/versions/<n>]/metadata` and `GET /metrics`. Every error is `{"error": <message>}`.

    Every answer has the header `X-Request-Id`: that of the request, or a new one.

    Args:
        model: What it serves. The attribute may be replaced at any time by another version: requests that have begun
            end with the one that they began with.
        name: The name of the model in addresses.
        limits: What it refuses; see the defaults of `Limits`.
        token: What every request must bring as `Authorization: Bearer <token>`; nothing by default.
        allowed_hosts: Names, without port, of which the `Host` of every request must be one; any by default.
        log_requests: Whether to log a line for each request.
    """

    def __init__(
        self,
        model: Model,
        name: str = "mvke",
        limits: Limits | None = None,
        token: str | None = None,
        allowed_hosts: Collection[str] | None = None,
        log_requests: bool = False,
    ) -> None:
        self.model, self.name, self.limits = model, name, limits or Limits()
        self.log_requests = log_requests
        self._token = None if token is None else f"bearer {token}".encode()
        self._hosts = None if allowed_hosts is None else {host.lower() for host in allowed_hosts}
        self._threads = concurrent.futures.ThreadPoolExecutor(self.limits.threads, "predict")
        self._turns = asyncio.Semaphore(self.limits.threads)
        # One thread is left to short requests, so that long ones hold none of them up.
        self._long_turns = asyncio.Semaphore(max(1, self.limits.threads - 1))
        self._computing: set[concurrent.futures.Future] = set()
        self._pending = self._pending_long = 0
        self._queue: list[Waiting] = []
        self._collectors: set[asyncio.Task[None]] = set()
        self.buffered_bytes = 0
        self.metrics = Metrics(
            {
                "mvke_model_version": ("Version that is served.", lambda: self.model.version),
                "mvke_requests_pending": ("Complete requests without an answer.", lambda: self.pending),
                "mvke_buffered_bytes": ("Bytes of bodies that are held.", lambda: self.buffered_bytes),
            }
        )
        base = f"/v1/models/{name}"
        routes = [Route("/metrics", self.show_metrics, methods=["GET"])]
        for path in (base, base + "/versions/{version:digits}"):
            routes += [
                Route(path + ":predict", self.predict, methods=["POST"]),
                Route(path + "/metadata", self.metadata, methods=["GET"]),
                Route(path, self.status, methods=["GET"]),
            ]
        handlers = {RequestError: _refused, HTTPException: self.not_found, Exception: _failed}
        self._routes = Starlette(routes=routes, exception_handlers=handlers)
        self._routes.router.redirect_slashes = False

    @property
    def busy(self) -> bool:
        """Whether a thread computes a request, be it one whose client is gone."""
        return bool(self._computing)

    @property
    def pending(self) -> int:
        """Complete requests without an answer."""
        return self._pending

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request, as ASGI has it."""
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        identifier = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        started, status = time.perf_counter(), 500

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identifier.encode())]}
            await send(message)

        try:
            try:
                self._check_sender(headers)
            except RequestError as refused:
                # What follows on the connection may be the rest of this one.
                extra = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {"Connection": "close"}
                await _json(write_error(str(refused)), refused.status, extra)(scope, receive, send_with_id)
            else:
                await self._routes(scope, receive, send_with_id)
        except Exception:
            # Starlette has answered, and raises it again for a log.
            logger.exception("Request %s failed", identifier)
        finally:
            seconds = time.perf_counter() - started
            self.metrics.request(getattr(scope.get("endpoint"), "__name__", "none"), status, seconds)
            if self.log_requests:
                path = json.dumps(scope["path"][:200])
                logger.info(
                    "%s %s %s %d, %.1f ms", identifier, scope["method"][:20], path[1:-1], status, 1000 * seconds
                )

    def _check_sender(self, headers: Headers) -> None:
        if "content-length" in headers and "transfer-encoding" in headers:
            raise RequestError("A body has a length or comes in chunks. Received: Content-Length and Transfer-Encoding")
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts:
            raise RequestError(
                f"The server is for requests to {sorted(self._hosts)}; name the host with --allowed_hosts if it should "
                f"answer. Received: Host {json.dumps(host)[:100]}"
            )
        if self._token is not None:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            # Headers come in Latin-1.
            if not hmac.compare_digest(f"{scheme.lower()} {token.strip()}".encode("latin-1"), self._token):
                raise RequestError("The server needs its token. Expected: Authorization: Bearer <token>", 401)

    async def predict(self, request: Request) -> Response:
        """Answers `:predict`."""
        model = self._checked_version(request)
        held = bytearray()
        try:
            await self._receive(request, held)
            return await self._computed(model, request, bytes(held))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            self.buffered_bytes -= len(held)

    async def _computed(self, model: Model, request: Request, body: bytes) -> Response:
        is_long = len(body) > _LONG_BYTES
        most = self.limits.threads + self.limits.waiting
        if self._pending >= most or (is_long and self._pending_long >= max(1, most // 2)):
            raise RequestError(f"The server is busy; try again. Received: one request after {self._pending}", 503)
        self._pending += 1
        self._pending_long += is_long
        try:
            if self.limits.batch_seconds and not is_long:
                return _json(await self._batched(Waiting(model, body, request.is_disconnected)))
            async with self._turn(is_long):
                if await request.is_disconnected():
                    raise ClientDisconnect
                return _json(await self._compute(answer, model, body, self.limits))
        finally:
            self._pending -= 1
            self._pending_long -= is_long

    async def _compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function in a thread: the event loop goes on reading, answering and refusing."""
        future = self._threads.submit(function, *args)
        self._computing.add(future)
        future.add_done_callback(self._computing.discard)
        return await asyncio.wrap_future(future)

    async def _batched(self, waiting: Waiting) -> bytes:
        """The answer to a request, which may be computed with others."""
        self._queue.append(waiting)
        if len(self._queue) == 1:
            self._collect()
        try:
            async with asyncio.timeout(self.limits.wait_seconds):
                await waiting.taken
        except TimeoutError:
            if waiting in self._queue:
                self._queue.remove(waiting)
                raise self._no_thread() from None
        return await waiting.answered

    def _collect(self) -> None:
        collector = asyncio.get_running_loop().create_task(self._answer_batch())
        self._collectors.add(collector)
        collector.add_done_callback(self._collectors.discard)

    async def _answer_batch(self) -> None:
        """Answers the requests that wait when the time is over and a thread is free."""
        await asyncio.sleep(self.limits.batch_seconds)
        async with self._turns:
            batch = self._queue[:MOST_REQUESTS]
            del self._queue[:MOST_REQUESTS]
            if self._queue:
                self._collect()
            for waiting in batch:
                waiting.taken.set_result(None)
            batch = [waiting for waiting in batch if not await waiting.is_gone()]
            loop = asyncio.get_running_loop()

            def deliver(number: int, result: bytes | Exception) -> None:
                loop.call_soon_threadsafe(batch[number].answer, result)

            entries = [(waiting.model, waiting.body) for waiting in batch]
            try:
                await self._compute(answer_all, entries, self.limits, deliver)
            except Exception as error:
                for waiting in batch:
                    waiting.answer(error)

    def _no_thread(self) -> RequestError:
        return RequestError(
            f"The server is busy; try again. No thread was free within {self.limits.wait_seconds:g} s", 503
        )

    @contextlib.asynccontextmanager
    async def _turn(self, is_long: bool) -> AsyncIterator[None]:
        """Waits until a thread is free, and keeps it."""
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self.limits.wait_seconds):
                    if is_long:
                        await held.enter_async_context(self._long_turns)
                    await held.enter_async_context(self._turns)
            except TimeoutError:
                raise self._no_thread() from None
            yield

    async def _receive(self, request: Request, held: bytearray) -> None:
        """Puts the body of a request into `held`."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise RequestError(f"The body must come uncompressed. Received: Content-Encoding {encoding[:60]}", 415)
        most = self.limits.request_bytes
        # The HTTP library has refused what is not a number.
        if int(request.headers.get("content-length", "0")) > most:
            self._too_long(f"Content-Length {request.headers['content-length'][:20]}")
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    if len(held) + len(chunk) > most:
                        self._too_long("more")
                    if self.buffered_bytes + len(chunk) > self.limits.buffered_bytes:
                        raise RequestError(
                            f"The server is busy; try again. Received: more after {self.buffered_bytes} bytes of "
                            "requests that wait",
                            503,
                        )
                    held += chunk
                    self.buffered_bytes += len(chunk)
        except TimeoutError:
            raise RequestError(
                f"The body must arrive within {self.limits.body_seconds:g} s. Received: {len(held)} bytes", 408
            ) from None

    def _too_long(self, received: str) -> None:
        raise RequestError(
            f"At most {self.limits.request_bytes} bytes in a request; send several. Received: {received}", 413
        )

    async def status(self, request: Request) -> Response:
        """Answers whether the model is there."""
        model = self._checked_version(request)
        state = {"error_code": "OK", "error_message": ""}
        version = {"version": str(model.version), "state": "AVAILABLE", "status": state}
        return _json(_pretty({"model_version_status": [version]}))

    async def metadata(self, request: Request) -> Response:
        """Answers `/metadata`."""
        return _json(_pretty(self._checked_version(request).metadata(self.name)))

    async def show_metrics(self, request: Request) -> Response:
        """Answers `/metrics`."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def _checked_version(self, request: Request) -> Model:
        """The model, if the request asks for its version or for none."""
        model, version = self.model, request.path_params.get("version")
        if version is not None and (version.lstrip("0") or "0") != str(model.version):
            raise RequestError(f"Version {model.version} of the model is served. Received: {version[:20]}", 404)
        return model

    async def not_found(self, request: Request, error: Exception) -> Response:
        """No such path, or another method than the path has."""
        base = f"/v1/models/{self.name}"
        message = f"There are POST {base}:predict, GET {base} and GET {base}/metadata, also with /versions/<n>."
        message += f" Received: {request.method[:20]} {request.url.path[:100]}"
        if not isinstance(error, HTTPException):
            raise error
        return _json(write_error(message), error.status_code, error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return _json(write_error(str(error)), error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def _failed(request: Request, error: Exception) -> Response:
    return _json(write_error("The server failed on this request; its log has the details."), 500)


def _json(body: bytes, status: int = 200, headers: Any = None) -> Response:
    return Response(body, status, dict(headers or {}), "application/json")


def _pretty(values: Any) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
