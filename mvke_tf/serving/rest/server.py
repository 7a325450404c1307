# SPDX-License-Identifier: Apache-2.0
"""The process of the server: which version, which socket, who may ask, how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import ipaddress
import json
import logging
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from mvke_tf.errors import ConfigError, DataError, MvkeError
from mvke_tf.io import one_line
from mvke_tf.serving.rest.app import Application, Limits, answer
from mvke_tf.serving.rest.connections import guarded
from mvke_tf.serving.rest.protocol import DESCRIPTIONS_FILE, RequestError

if TYPE_CHECKING:
    from mvke_tf.serving.rest.model import ServedModel

logger = logging.getLogger(__name__)

# Seconds that requests under way have to end after a signal.
GRACE_SECONDS = 10
# And how much later the process ends even if its event loop hangs.
_LAST_SECONDS = 5
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
ANY_HOST = "*"


def serve(
    model_dir: Path,
    name: str = "mvke",
    host: str = "127.0.0.1",
    port: int = 8501,
    limits: Limits | None = None,
    token: str | None = None,
    allowed_hosts: Collection[str] = (),
    reload_seconds: float = 10.0,
    log_requests: bool = False,
) -> None:
    """Serves the newest version of an exported model until SIGINT or SIGTERM.

    Args:
        model_dir: Folder of all versions, such as `runs/mine/export`; one version in it; or a run directory.
        name: Name of the model in addresses.
        host: Address to listen on.
        port: Its port; 0 takes any free one.
        limits: What is refused.
        token: What requests must bring as `Authorization: Bearer <token>`; needed beyond the loopback address.
        allowed_hosts: Names of this server that requests may be addressed to, `"*"` for any; needed beyond the loopback
            address, and by default its names.
        reload_seconds: How often to look for a newer version, which then answers; 0 never does.
        log_requests: Whether to log a line for each request.

    Raises:
        DataError: If there is no model that can be loaded.
        ConfigError: If token or names are missing.
        OSError: If the address cannot be had.
    """
    limits = limits or Limits()
    versions = versions_of(model_dir)
    with bind(host, port) as bound:
        hosts = _allowed(bound, host, token, allowed_hosts)
        # TensorFlow takes seconds to import: only after the arguments have proved right.
        model = _load_newest(versions, limits)
        settle()
        application = Application(model, name, limits, token, hosts, log_requests)
        bound.listen(limits.connections)
        address = f"{url(bound)}/v1/models/{name}"
        logger.info("Serving version %d at %s", model.version, address)
        logger.info("Signatures, with what they take at %s/metadata: %s", address, ", ".join(model.descriptions))
        for title, signature in (("Try it", model.default_signature), ("Recommend", "recommend")):
            if signature in model.descriptions:
                logger.info("%s: %s", title, curl(address + ":predict", model.example(signature), token is not None))
        logger.info("Ctrl-C stops it.")
        watch = Watch(model_dir, model.folder, application, reload_seconds) if reload_seconds else None
        run(application, bound, watch)
    logger.info("Stopped.")


def _load_newest(versions: Sequence[Path], limits: Limits) -> ServedModel:
    """The newest version that can be loaded; those that cannot are logged."""
    for folder in versions[:-1]:
        logger.info("Loading %s", folder)
        try:
            return load(folder, limits)
        except MvkeError as error:
            logger.warning("An older version is served: %s", " ".join(str(error).split()))
    logger.info("Loading %s", versions[-1])
    return load(versions[-1], limits)


def newest_version(path: Path) -> Path:
    """The folder of the newest version of a SavedModel.

    Args:
        path: Folder of all versions, such as `runs/mine/export`; one version in it; or a run directory with `export/`.

    Raises:
        DataError: If there is none.
    """
    return versions_of(path)[0]


def versions_of(path: Path) -> list[Path]:
    """The folders of all versions of a SavedModel, the newest first; arguments and errors as of `newest_version`."""
    path = Path(path)
    for folder in (path, path / "export"):
        versions = [p.parent for p in folder.glob("*/saved_model.pb") if p.parent.name.isdecimal() and p.is_file()]
        if (folder / "saved_model.pb").is_file():
            return [folder]
        if versions:
            return sorted(versions, key=lambda folder: int(folder.name), reverse=True)
    for run in (path, path.parent):
        if (run / "config.json").is_file():
            raise DataError(f"{run} has not been exported yet: mvke export {shlex.quote(str(run))}")
    raise DataError(
        "Expected a folder of versions of a SavedModel, such as `mvke export` makes (runs/<name>/export with 1/ in "
        f"it), or one version. Received: {path}"
    )


def load(folder: Path, limits: Limits) -> ServedModel:
    """One version, each of its signatures called once: the first call takes long.

    Raises:
        DataError: If it cannot be loaded.
    """
    from mvke_tf.serving.rest.model import ServedModel

    model = ServedModel(folder)
    for signature in model.descriptions:
        try:
            answer(model, json.dumps(model.example(signature)).encode(), limits)
        except RequestError as error:
            if signature == model.default_signature:
                logger.info("The made-up example does not fit this model: %s", error)
        except Exception as error:
            # Whatever the functions of somebody else's model raise.
            raise DataError(
                f"{folder}: expected a model that answers a request. Received from its signature {signature!r}: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
    return model


def settle() -> None:
    """What is loaded by now is left out of collections of garbage: one that walks it stops all requests for half a
    second, which was the slowest one of tens of thousands."""
    # What went with the version before.
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class Watch:
    """Puts newer versions of a SavedModel into an application, in a thread of its own.

    A version that cannot be loaded is logged, once until its files change, and the one before goes on. So is one
    without descriptions where the served one has some: it is still being copied. If the served version is deleted, the
    newest that is left takes over.

    Args:
        path: Folder of all versions.
        folder: The version that is served.
        application: Where the newer ones go.
        seconds: How often to look.
    """

    def __init__(self, path: Path, folder: Path, application: Application, seconds: float) -> None:
        self._path, self._folder, self._application = path, folder, application
        self._seconds = seconds
        self._refused: tuple[Any, ...] = ()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="versions", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def end(self) -> None:
        """Looks no more."""
        self._ended.set()

    @property
    def busy(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.look()

    def look(self) -> None:
        """Takes the newest version, if it is another one than that which is served."""
        try:
            folder = newest_version(self._path)
            if folder == self._folder or (state := _files(folder)) == self._refused:
                return
            logger.info("Loading %s", folder)
            try:
                self._check_complete(folder)
                model = load(folder, self._application.limits)
            except MvkeError as error:
                self._refused = state
                self._application.metrics.load(well=False)
                logger.warning("Version %d goes on: %s", self._application.model.version, " ".join(str(error).split()))
            else:
                self._folder, self._application.model = folder, model
                settle()
                self._application.metrics.load(well=True)
                logger.info("Serving version %d", model.version)
        except (DataError, OSError) as error:
            # Nothing there, for now: versions come and go.
            logger.warning("Version %d goes on: %s", self._application.model.version, " ".join(str(error).split()))

    def _check_complete(self, folder: Path) -> None:
        described, served = folder / DESCRIPTIONS_FILE, self._folder / DESCRIPTIONS_FILE
        if served.is_file() and not described.is_file():
            raise DataError(
                f"{folder} has no {DESCRIPTIONS_FILE} yet, which the served version has. It is taken when that is there"
            )


def _files(folder: Path) -> tuple[Any, ...]:
    """What tells whether the files of a folder have changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return (folder, *((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 is any free one.

    Raises:
        OSError: If the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; choose another --host", host) from error
    family, kind, _, _, address = found[0]
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{error.strerror}; choose another --port", f"{host}:{port}") from error
    return bound


def _allowed(
    bound: socket.socket, host: str, token: str | None, allowed_hosts: Collection[str]
) -> Collection[str] | None:
    """The names that requests may be addressed to, None for any."""
    loopback = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
    if not loopback and (token is None or not allowed_hosts):
        raise ConfigError(
            f"Other machines can reach a server on {host}, so it needs a token and the names that it answers to: "
            "--token_file FILE --allowed_hosts NAME ... (or '*' for any). "
            f"Received: {'no token' if token is None else 'no names'}"
        )
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ConfigError("A token must be ASCII text without spaces. Received: something else")
    if wrong := [name for name in allowed_hosts if not name.strip() or "/" in name or " " in name]:
        raise ConfigError(f"--allowed_hosts takes names such as models.example.com, or '*'. Received: {wrong}")
    if ANY_HOST in allowed_hosts:
        return None
    # As those of requests are: without the port.
    return [re.sub(r"^([^:]+|\[.*\]):\d*$", r"\1", name) for name in allowed_hosts] or {*LOOPBACK_NAMES, host}


def url(bound: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def curl(address: str, request: dict[str, Any], with_token: bool = False) -> str:
    """A command line that sends a request; the token is to be put in."""
    token = """-H "Authorization: Bearer $TOKEN" """ if with_token else ""
    return f"curl {token}-d {shlex.quote(json.dumps(request))} {address}"


class _Server(uvicorn.Server):
    """A server whose process ends a while after the first signal, whatever its threads do."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        if not self.should_exit:
            self.ends_at = time.monotonic() + GRACE_SECONDS
            faulthandler.dump_traceback_later(GRACE_SECONDS + _LAST_SECONDS, exit=True)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A connection that has just been accepted is not yet among those that are told to end: the process then waited
        # for its client.
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def run(application: Application, bound: socket.socket, watch: Watch | None = None) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the requests under way.

    Those that have not ended after `GRACE_SECONDS` end with the process, whose status is then 1.

    Args:
        application: What to serve.
        bound: Where it listens.
        watch: What looks for newer versions meanwhile.
    """
    config = uvicorn.Config(
        application,
        http=guarded(application.limits),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        backlog=application.limits.connections,
    )
    server = _Server(config)
    try:
        if watch is not None:
            watch.start()
        with signals_end_well():
            server.run(sockets=[bound])
    finally:
        if watch is not None:
            watch.end()
        # The thread that looks for versions needs a moment to see that it is to end, even if the time is up.
        until = max(getattr(server, "ends_at", 0.0), time.monotonic() + 1)
        _wait_for_threads(application, watch, until)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def signals_end_well() -> Iterator[None]:
    """Lets a server of uvicorn end with status 0.

    It stops well on SIGINT and SIGTERM and then raises them again, for the handlers that were there before: by default
    the process would end as if it had been killed.
    """
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_threads(application: Application, watch: Watch | None, until: float) -> None:
    """Waits for threads at work; ends the process if that takes too long, because no thread can be ended."""
    while application.busy or (watch is not None and watch.busy):
        if time.monotonic() > until:
            logger.warning("Stopped. Requests that took longer than %d s were cut off.", GRACE_SECONDS)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        time.sleep(0.02)
