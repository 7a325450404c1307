# SPDX-License-Identifier: Apache-2.0
"""Memory and good answers of the local server under many hostile clients at a time, on this machine.

Starts `mvke serve` on a free port of the loopback address. Every hostile client opens one connection after the other
and does something bad with it, drawn at random with a seed that is printed: the longest body, the largest answer,
thousands of keys, deep lists, damaged bytes, half a head, a slow body, an answer that is never read, a connection that
is cut. One good client goes on asking. Prints one JSON line: peak memory of the server, good requests and their
answers, the time to end. Ends with status 1 if a good request got another answer than 200 or 503, or the server an
error of its own (500) or an unclean end.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main

MIB = 2**20
# A hostile client leaves a connection after this time at the latest.
PATIENCE = 20.0
Bad = Callable[[socket.socket, "Requests", random.Random], None]


class Requests:
    """Bodies for one model.

    Args:
        base: Host, port and path of the model.
        described: What `signatures.json` says of its signatures.
    """

    def __init__(self, base: tuple[str, int, str], described: dict[str, dict]) -> None:
        self.host, self.port, self.path = base[0], int(base[1]), base[2]
        self.task = next(iter(described["serving_default"]["outputs"]))
        self.examples = {name: _example(signature["inputs"]) for name, signature in described.items()}

    def good(self, rows: int = 1, signature: str = "serving_default") -> bytes:
        """A body of equal rows."""
        return json.dumps({"signature_name": signature, "instances": [self.examples[signature]] * rows}).encode()

    def head(self, length: int, more: str = "") -> bytes:
        """The head of a request with a body of this length."""
        return (
            f"POST {self.path}:predict HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {length}\r\n{more}\r\n"
        ).encode()

    def connect(self) -> socket.socket:
        """A new connection."""
        connection = socket.create_connection((self.host, self.port), timeout=PATIENCE)
        connection.settimeout(PATIENCE)
        return connection


def _example(inputs: dict[str, dict]) -> dict[str, object]:
    """`{input: value of one row}` of those that have one; every entry of a list weighs 1."""
    values = {name: about["example"] for name, about in inputs.items() if "example" in about}
    weights = {name: name.removesuffix("_weights") for name in inputs if name.endswith("_weights")}
    return values | {name: [1.0] * len(values[owner]) for name, owner in weights.items() if owner in values}


def send(connection: socket.socket, requests: Requests, body: bytes) -> None:
    """Sends a whole request and reads the status of its answer, and the rest."""
    connection.sendall(requests.head(len(body), "Connection: close\r\n") + body)
    while connection.recv(65_536):
        pass


def longest_body(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    send(connection, requests, b'{"instances": [' + b"0," * (4 * MIB - 20) + b"0]}")


def too_long_a_body(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    send(connection, requests, b" " * (9 * MIB))


def many_rows(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    send(connection, requests, requests.good(chance.choice([2_000, 9_000, 20_000])))


def largest_answer(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    rows, items = chance.choice([(50, 1_000), (500, 1_000), (2_000, 2_000)])
    inputs: dict[str, object] = {name: [value] * rows for name, value in requests.examples["user_vectors"].items()}
    inputs |= {"k": items, "task": requests.task, "exclude": [[]] * rows}
    send(connection, requests, json.dumps({"signature_name": "recommend", "inputs": inputs}).encode())


def thousands_of_keys(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    send(connection, requests, ("{" + ",".join(f'"k{i // 2}":1' for i in range(60_000)) + "}").encode())


def deep_lists(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    send(connection, requests, b"[" * 4 * MIB)


def damaged_bytes(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    body = bytearray(requests.good(20))
    for _ in range(chance.randrange(1, 20)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    send(connection, requests, bytes(body))


def half_a_head(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    connection.sendall(requests.head(5)[: chance.randrange(1, 60)])
    connection.recv(1)


def slow_body(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    body = requests.good(200)
    connection.sendall(requests.head(len(body)))
    for byte in range(0, len(body), 100):
        connection.sendall(body[byte : byte + 100])
        time.sleep(0.5)
        if byte > 4_000:
            return


def unread_answer(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    body = requests.good(9_000)
    connection.sendall(requests.head(len(body)) + body)
    time.sleep(PATIENCE / 2)


def cut_connection(connection: socket.socket, requests: Requests, chance: random.Random) -> None:
    body = requests.good(9_000)
    connection.sendall(requests.head(len(body)) + body[: chance.randrange(len(body))])


BAD: tuple[Bad, ...] = (
    *(longest_body, too_long_a_body, many_rows, largest_answer, thousands_of_keys, deep_lists, damaged_bytes),
    *(half_a_head, slow_body, unread_answer, cut_connection),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export_path", type=Path, required=True, help="folder of versions of an export")
    parser.add_argument("--clients", type=positive_int, default=50, help="hostile ones at a time (default: 50)")
    parser.add_argument("--seconds", type=positive_int, default=600, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of what is drawn")
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr)

    code = "import sys; from mvke_tf.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", str(args.export_path.resolve()), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1])
    try:
        requests = _requests(server, args.export_path)
        good = _Good(requests)
        # The first call of a signature takes long.
        good.ask()
        idle = _memory(server.pid, "VmRSS")
        until = time.monotonic() + args.seconds
        done: collections.Counter[str] = collections.Counter()
        threads = [
            threading.Thread(target=_attack, args=(requests, random.Random(args.seed + number), until, done))
            for number in range(args.clients)
        ]
        for thread in threads:
            thread.start()
        while time.monotonic() < until and server.poll() is None:
            good.ask()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        errors = _own_errors(requests)
        peak = _memory(server.pid, "VmHWM")
    finally:
        ended = time.monotonic()
        server.terminate()
        status = server.wait()
        ended = time.monotonic() - ended
    seconds = sorted(good.seconds)
    result = {
        "idle_mib": idle,
        "peak_mib": peak,
        "attacks": dict(sorted(done.items())),
        "good_requests": len(seconds),
        "good_answers": dict(good.statuses),
        "good_median_ms": round(1000 * statistics.median(seconds), 1),
        "good_p99_ms": round(1000 * seconds[int(0.99 * len(seconds))], 1),
        "server_errors": errors,
        "server_exit_status": status,
        "seconds_to_end": round(ended, 1),
        "clients": args.clients,
        "seconds": args.seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result))
    sys.exit(bool(set(good.statuses) - {200, 503} or errors or status))


def _requests(server: subprocess.Popen, export: Path) -> Requests:
    """Bodies for a model, once its server listens."""
    newest = max((path for path in export.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    described = json.loads((newest / "signatures.json").read_text(encoding="utf-8"))["signatures"]
    for line in server.stdout or ():
        found = re.search(r"Serving version \d+ at http://([\d.]+):(\d+)(\S+)", line)
        if found:
            threading.Thread(target=lambda: [None for _ in server.stdout or ()], daemon=True).start()
            return Requests((found[1], int(found[2]), found[3]), described)
    raise ValueError(f"The server did not start. Received: exit status {server.wait()}")


def _attack(requests: Requests, chance: random.Random, until: float, done: collections.Counter[str]) -> None:
    while time.monotonic() < until:
        bad = chance.choice(BAD)
        try:
            with requests.connect() as connection:
                bad(connection, requests, chance)
        except OSError:
            # Cut off, as it should be; or refused, because there are too many.
            time.sleep(0.05)
        done[bad.__name__] += 1


class _Good:
    """A client that asks for one row, and keeps time and statuses."""

    def __init__(self, requests: Requests) -> None:
        self.requests, self.seconds = requests, list[float]()
        self.statuses: collections.Counter[int] = collections.Counter()

    def ask(self) -> None:
        started, body = time.perf_counter(), self.requests.good()
        try:
            with socket.create_connection((self.requests.host, self.requests.port), timeout=60) as connection:
                connection.sendall(self.requests.head(len(body), "Connection: close\r\n") + body)
                answer = b""
                while part := connection.recv(65_536):
                    answer += part
            status = int(answer.split(b" ", 2)[1])
        except (OSError, IndexError, ValueError):
            status = 0
        self.statuses[status] += 1
        self.seconds.append(time.perf_counter() - started)


def _own_errors(requests: Requests) -> int:
    """Answers 500 that the server counts."""
    with requests.connect() as connection:
        connection.sendall(f"GET /metrics HTTP/1.1\r\nHost: {requests.host}\r\nConnection: close\r\n\r\n".encode())
        text = b""
        while part := connection.recv(65_536):
            text += part
    return sum(int(float(count)) for count in re.findall(rb'status="500"\S* (\S+)', text))


def _memory(process: int, field: str) -> int:
    """Memory of a process in MiB, as Linux counts it."""
    text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) // 1024  # type: ignore[index]


if __name__ == "__main__":
    run_main(main)
