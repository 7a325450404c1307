# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 connections that end: uvicorn's, with a deadline for every part of a request and a bound on their number."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mvke_tf.serving.rest.app import Limits

# How long a connection is kept open for a client that is to read why it is closed.
_LAST_WORDS_SECONDS = 2.0


class GuardedProtocol(H11Protocol):
    """One connection; `guarded` makes a class with limits."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_deadline: asyncio.TimerHandle | None = None
        self._refused = False
        # When the oldest answer was given that the client has not read yet.
        self._unread_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # As uvicorn's own.
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._say_and_close("503 Service Unavailable", "Too many connections; try again.")
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._note_read()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_deadline is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if not self._refused:
            super().shutdown()

    def on_response_complete(self) -> None:
        cycle = self.cycle
        if self.transport.get_write_buffer_size():
            if self._unread_since is None:
                self._unread_since = self.loop.time()
                self.loop.call_later(self.limits.answer_seconds, self._check_read, self._unread_since)
            self._drop_slow_readers()
        super().on_response_complete()
        # Answered before the body had come, which may never end.
        if cycle is self.cycle and self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(_LAST_WORDS_SECONDS, self._check_body, cycle)

    def _expect_head(self) -> None:
        self._head_deadline = self.loop.call_later(self.limits.head_seconds, self._head_is_late)

    def _forget_head(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _head_is_late(self) -> None:
        self._head_deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._say_and_close("408 Request Timeout", f"The head must arrive within {self.limits.head_seconds:g} s.")

    def _say_and_close(self, status: str, message: str) -> None:
        self._refused = True
        body = f'{{"error": "{message}"}}'
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n{body}".encode())
        self.transport.close()
        self.loop.call_later(_LAST_WORDS_SECONDS, self.transport.abort)

    def _check_body(self, cycle: Any) -> None:
        if cycle is self.cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _note_read(self) -> None:
        if not self.transport.get_write_buffer_size():
            self._unread_since = None

    def _check_read(self, since: float) -> None:
        self._note_read()
        if self._unread_since == since:
            self.transport.abort()

    def _drop_slow_readers(self) -> None:
        """Closes connections whose answers are unread, the longest unread first, until what is left fits."""
        # All connections of a server are of the class that it was given.
        connections = cast("set[GuardedProtocol]", self.connections)
        unread = {c: c.transport.get_write_buffer_size() for c in connections}
        total = sum(unread.values())
        waiting = [(c._unread_since, c) for c, size in unread.items() if size and c._unread_since is not None]
        for _, connection in sorted(waiting, key=lambda entry: entry[0]):
            if total <= self.limits.buffered_bytes:
                return
            total -= unread[connection]
            connection.transport.abort()


def guarded(limits: Limits) -> type[GuardedProtocol]:
    """The class of connections of a server with these limits."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})
