# SPDX-License-Identifier: Apache-2.0
"""Several requests in one call of the model, each with its own answer or error."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import ClientDisconnect

from mvke_tf.serving.rest.protocol import (
    PredictRequest,
    check_sizes,
    parse_request,
    read_arrays,
    write_answer,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mvke_tf.serving.rest.app import Limits, Model

# Requests of one batch: more in one call save nothing that is worth the wait.
MOST_REQUESTS = 64


def answer(model: Model, body: bytes, limits: Limits) -> bytes:
    """The body of the answer to the body of a `predict` request.

    Raises:
        RequestError: If the request cannot be answered.
    """
    return _alone(_read(model, body, limits), limits)


@dataclasses.dataclass(frozen=True)
class _Read:
    """A request whose inputs are fit for the model."""

    model: Model
    request: PredictRequest
    arrays: Mapping[str, np.ndarray]
    numbers: int

    @property
    def rows(self) -> int | None:
        """Number of rows of all inputs that have some; None if they differ, or there is none."""
        rows = {len(array) for array in self.arrays.values() if array.ndim}
        return rows.pop() if len(rows) == 1 else None

    @property
    def values(self) -> int:
        return max((array.size for array in self.arrays.values()), default=0)

    def like(self) -> Hashable:
        """What requests that can be one have in common; nothing else has it if this one must be alone."""
        if self.rows is None or not self.model.is_by_row(self.request.signature):
            return id(self)
        shared = {name: array.shape[1:] if array.ndim else array.item() for name, array in self.arrays.items()}
        return id(self.model), self.request.signature, *shared.items()


def _read(model: Model, body: bytes, limits: Limits) -> _Read:
    request = parse_request(body)
    arrays = read_arrays(request, model.inputs(request.signature), limits.rows, limits.values)
    numbers = model.cost(request.signature).check(arrays, limits.values, limits.numbers)
    return _Read(model, request, arrays, numbers)


def _alone(read: _Read, limits: Limits) -> bytes:
    outputs = read.model.predict(read.request.signature, read.arrays, limits.values)
    return write_answer(outputs, read.request.by_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Waiting:
    """A request that waits for the next batch.

    Args:
        model: What is to answer it.
        body: Its body.
        disconnected: Says whether its client is gone.
        taken: Is done when its batch begins.
        answered: Its answer, or what is raised.
    """

    model: Model
    body: bytes
    disconnected: Callable[[], Awaitable[bool]]
    taken: asyncio.Future[None] = dataclasses.field(default_factory=lambda: asyncio.get_running_loop().create_future())
    answered: asyncio.Future[bytes] = dataclasses.field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def is_gone(self) -> bool:
        """Whether nobody waits for the answer any more, which it then never gets."""
        if gone := await self.disconnected():
            self.answer(ClientDisconnect())
        return gone

    def answer(self, result: bytes | Exception) -> None:
        """Gives the answer, or what must be raised, unless nobody waits for it any more."""
        if self.answered.done():
            return
        if isinstance(result, bytes):
            self.answered.set_result(result)
        else:
            self.answered.set_exception(result)


Deliver = Callable[[int, "bytes | Exception"], None]


def answer_all(entries: Sequence[tuple[Model, bytes]], limits: Limits, deliver: Deliver) -> None:
    """Answers requests, those that can be in one call of the model, the cheapest calls first.

    Args:
        entries: Models and bodies of requests.
        limits: Of each request, and of each call.
        deliver: Is given the number of each request and its answer, or what it must raise, once it is known.
    """
    groups: dict[Hashable, list[tuple[int, _Read]]] = {}
    for number, (model, body) in enumerate(entries):
        try:
            read = _read(model, body, limits)
        except Exception as error:
            deliver(number, error)
        else:
            groups.setdefault(read.like(), []).append((number, read))
    calls = [call for group in groups.values() for call in _calls(group, limits)]
    for call in sorted(calls, key=lambda call: sum(read.numbers + read.values for _, read in call)):
        for (number, _), result in zip(call, _answers([read for _, read in call], limits), strict=True):
            deliver(number, result)


def _calls(group: list[tuple[int, _Read]], limits: Limits) -> list[list[tuple[int, _Read]]]:
    """Cuts requests into calls that each stay within the limits of a single request."""
    calls: list[list[tuple[int, _Read]]] = []
    for entry in group:
        together = [read for _, read in [*(calls[-1] if calls else ()), entry]]
        if (
            calls
            and sum(read.rows or 0 for read in together) <= limits.rows
            and sum(read.values for read in together) <= limits.values
            and sum(read.numbers for read in together) <= limits.numbers
        ):
            calls[-1].append(entry)
        else:
            calls.append([entry])
    return calls


def _answers(reads: list[_Read], limits: Limits) -> list[bytes | Exception]:
    if len(reads) > 1:
        first = reads[0]
        merged = {
            name: np.concatenate([read.arrays[name] for read in reads]) if array.ndim else array
            for name, array in first.arrays.items()
        }
        ends = np.cumsum([read.rows for read in reads])
        try:
            outputs = first.model.predict(first.request.signature, merged)
            if all(array.ndim and len(array) == ends[-1] for array in outputs.values()):
                parts = [
                    {name: array[end - (read.rows or 0) : end] for name, array in outputs.items()}
                    for read, end in zip(reads, ends, strict=True)
                ]
                return [_attempt(_written, part, read, limits) for part, read in zip(parts, reads, strict=True)]
        except Exception as error:
            # One of them is wrong: each alone has its own answer or error.
            logger.debug("A batch of %d requests is answered one by one: %s", len(reads), error)
    return [_attempt(_alone, read, limits) for read in reads]


def _written(outputs: Mapping[str, np.ndarray], read: _Read, limits: Limits) -> bytes:
    check_sizes({name: array.size for name, array in outputs.items()}, limits.values)
    return write_answer(outputs, read.request.by_rows)


def _attempt(function: Callable[..., bytes], *args: Any) -> bytes | Exception:
    try:
        return function(*args)
    except Exception as error:
        return error
