"""The process of the server: which version, which socket, how it stops. Imports TensorFlow only with the model."""

from __future__ import annotations

import json
import shlex
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn

# Seconds that requests under way have to end after a signal.
GRACE_SECONDS = 10


def newest_version(path: Path) -> Path:
    """The folder of the newest version of a SavedModel.

    Args:
        path: Folder of all versions, such as `runs/mine/export`; one version in it; or a run directory with `export/`.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    for folder in (path, path / "export"):
        versions = [p for p in folder.glob("*/saved_model.pb") if p.parent.name.isdecimal()]
        if (folder / "saved_model.pb").is_file():
            return folder
        if versions:
            return max((p.parent for p in versions), key=lambda folder: int(folder.name))
    raise ValueError(
        "Expected a folder of versions of a SavedModel, such as scripts/export.py makes (runs/<name>/export with 1/ in "
        f"it), or one version. Received: {path}"
    )


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 is any free one.

    Raises:
        OSError: If the address cannot be had.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{error.strerror}; choose another --port", f"{host}:{port}") from error
    return bound


def url(bound: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def curl(address: str, request: dict[str, Any]) -> str:
    """A command line that sends a request."""
    return f"curl -d {shlex.quote(json.dumps(request))} {address}"


def run(app: Any, bound: socket.socket, log_requests: bool = False) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the requests under way and returns.

    Args:
        app: An ASGI application.
        bound: Where it listens.
        log_requests: Whether to print a line for each request.
    """
    config = uvicorn.Config(
        app,
        # One implementation everywhere, whatever else is installed.
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="info" if log_requests else "error",
        access_log=log_requests,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    # uvicorn stops well on these signals and then raises them again, for the handlers that were there before: by
    # default the process would end as if it had been killed.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
