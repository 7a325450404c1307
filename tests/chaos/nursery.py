# SPDX-License-Identifier: Apache-2.0
"""Command lines in processes that fork in milliseconds, each of whose file operations is counted and may be its last.

`Nursery` talks to a process that has imported TensorFlow and the package and run nothing: a child forked from it starts
with everything imported. In the child, whatever opens, writes, syncs, renames, makes or deletes a file is an operation
with a number. Before operation n the child can be killed, stopped, or told that the disk is full.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
# A child that takes longer hangs.
SECONDS = 240
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
# What a full disk, or one that must not be written to, still allows.
_FREES = ("os.remove", "os.rmdir", "close")


class Ended(NamedTuple):
    """How a command line ended: status (negative: by which signal), what it wrote, its operations."""

    status: int
    output: str
    errors: str
    operations: list[str]


class Nursery:
    """The process whose children run command lines."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(REPOSITORY)},
        )

    def run(
        self,
        folder: Path,
        *argv: str,
        kill: int | None = None,
        fail: tuple[int, int] | None = None,
        pause: int | None = None,
        meanwhile: Sequence[str] = (),
    ) -> Ended:
        """Runs one command line of `mvke` in a folder.

        Args:
            folder: Its working directory.
            argv: The command line; `python PATH` runs a file instead.
            kill: It is killed before the operation of this number, from 0.
            fail: From the operation of this number on, everything that writes fails with this error number.
            pause: It stops before the operation of this number until `meanwhile` has ended.
            meanwhile: Another command line, or the same one.
        """
        job = {"folder": str(folder), "argv": argv, "kill": kill, "fail": fail, "pause": pause, "meanwhile": meanwhile}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


class _Operations:
    """Counts the operations of this process on files below the working directory."""

    def __init__(self, kill: int | None, fail: tuple[int, int] | None, pause: int | None) -> None:
        self.names: list[str] = []
        self._kill, self._fail, self._pause = kill, fail, pause
        self._root, self._busy = os.getcwd() + os.sep, False
        self._fsync, self._allocate, self._open = os.fsync, os.posix_fallocate, io.open

    def start(self) -> None:
        sys.addaudithook(self._audit)
        os.fsync = self._synced  # type: ignore[assignment]
        os.posix_fallocate = self._allocated  # type: ignore[assignment]
        builtins.open = io.open = self._opened  # type: ignore[assignment]

    def before(self, name: str, about: str = "") -> None:
        """Counts an operation that is about to be done."""
        number = len(self.names)
        self.names.append(f"{name} {about.removeprefix(self._root)}".strip())
        if number == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self._pause:
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._fail is not None and number >= self._fail[0] and name not in _FREES:
            raise OSError(self._fail[1], os.strerror(self._fail[1]), about)

    def is_ours(self, path: Any) -> bool:
        if isinstance(path, int):
            return False
        text = os.fsdecode(path)
        return not os.path.isabs(text) or text.startswith(self._root)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, _, flags = args
            if not self.is_ours(path) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in _CHANGES or not self.is_ours(args[0]):
            return
        self._busy = True
        try:
            self.before(event, os.fsdecode(args[0]))
        finally:
            self._busy = False

    def _synced(self, descriptor: int) -> None:
        self.before("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self._fsync(descriptor)

    def _allocated(self, descriptor: int, offset: int, size: int) -> None:
        self.before("allocate", os.readlink(f"/proc/self/fd/{descriptor}"))
        self._allocate(descriptor, offset, size)

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int) or not self.is_ours(file):
            return self._open(file, mode, buffering, *args, **kwargs)
        # `tempfile` opens a folder, with an opener that makes a file in it.
        raw = _File(file, mode.replace("b", "").replace("t", ""), opener=kwargs.pop("opener", None))
        raw.operations = self
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)  # type: ignore[type-var]
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)


class _File(io.FileIO):
    """An open file; one that is killed or out of space while it writes has written half."""

    operations: _Operations

    def write(self, data: Any) -> int:  # type: ignore[override]
        half = memoryview(data).cast("B")[: len(data) // 2]
        operations, number = self.operations, len(self.operations.names)
        last = number == operations._kill or (operations._fail and number == operations._fail[0])
        if last and len(half):
            super().write(half)
        operations.before("write", str(self.name))
        return super().write(data) or 0

    def truncate(self, size: int | None = None) -> int:
        self.operations.before("truncate", str(self.name))
        return super().truncate(size)

    def close(self) -> None:
        if not self.closed:
            self.operations.before("close", str(self.name))
        super().close()


def _child(job: dict[str, Any], files: Sequence[Any]) -> None:
    """Runs a command line and ends this process."""
    for number, file in enumerate(files[:2], 1):
        os.dup2(file.fileno(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    signal.alarm(SECONDS)
    status, report = 70, os.dup(files[2].fileno())
    operations = _Operations(job["kill"], job["fail"], job["pause"])
    try:
        operations.start()
        if job["argv"][0] == "python":
            exec(compile(Path(job["argv"][1]).read_text(), job["argv"][1], "exec"), {"__name__": "__main__"})
            status = 0
        else:
            from mvke_tf.cli import main

            main(job["argv"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        operations._busy = True
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(report, json.dumps(operations.names).encode())
        os._exit(status)


def _start(job: dict[str, Any]) -> tuple[int, list[Any]]:
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    pid = os.fork()
    if not pid:
        _child(job, files)
    return pid, files


def _status(waited: int) -> int:
    return -os.WTERMSIG(waited) if os.WIFSIGNALED(waited) else os.WEXITSTATUS(waited)


def _ended(status: int, files: Sequence[Any]) -> Ended:
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
        file.close()
    return Ended(status, texts[0], texts[1], json.loads(texts[2] or "[]"))


def _do(job: dict[str, Any]) -> Ended:
    pid, files = _start(job)
    waited = os.waitpid(pid, os.WUNTRACED)[1]
    other = None
    if os.WIFSTOPPED(waited):
        alone = {**job, "argv": job["meanwhile"], "kill": None, "fail": None, "pause": None}
        other = _do(alone)
        os.kill(pid, signal.SIGCONT)
        waited = os.waitpid(pid, 0)[1]
    ended = _ended(_status(waited), files)
    if other is None:
        return ended
    return ended._replace(
        output=f"{ended.output}\nMEANWHILE {other.status}\n{other.output}",
        errors=f"{ended.errors}\nMEANWHILE\n{other.errors}",
    )


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # All that the commands import, and nothing that starts a thread, which a fork would lose.
    import mvke_tf.data.preparation
    import mvke_tf.serving.export
    import mvke_tf.serving.profiles
    import mvke_tf.serving.rest.model
    import mvke_tf.training  # noqa: F401

    for line in sys.stdin:
        answers.write(json.dumps(_do(json.loads(line))) + "\n")
        answers.flush()


# No space, and a file system that may be read only.
FULL, READ_ONLY = errno.ENOSPC, errno.EROFS

if __name__ == "__main__":
    _main()
