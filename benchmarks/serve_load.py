# SPDX-License-Identifier: Apache-2.0
"""Requests per second and latencies of the local server under many clients at a time, on this machine.

Starts `mvke serve` on a free port of the loopback address, and lets every client send one request after the other
over a connection of its own: one user with many items to `score_ids`, or, where the export has none, many rows to
`serving_default`. Clients and server share the cores. Prints one JSON line; `errors` counts answers that are not
complete and well, and lost connections. Ends with status 1 if there were any.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main

# Different requests that each client sends in turn, and slots of each list.
REQUESTS, SLOTS = 20, 10
WORDS = ("a", "b", "de", "en", "sport", "news", "music")
VALUES = {
    "DT_STRING": lambda: random.choice(WORDS),
    "DT_FLOAT": lambda: round(random.uniform(0, 5), 2),
    "DT_INT64": lambda: random.randint(1, 1500),
    "DT_INT32": lambda: random.randint(1, 1500),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export_path", type=Path, required=True, help="folder of versions of an export")
    parser.add_argument("--clients", type=positive_int, default=50, help="at a time (default: 50)")
    parser.add_argument("--seconds", type=positive_int, default=30, help="how long (default: 30)")
    parser.add_argument("--items", type=positive_int, default=100, help="items of a request (default: 100)")
    parser.add_argument("--batch_ms", type=float, default=0.0, help="of the server (default: 0)")
    args = parser.parse_args()

    code = "import sys; from mvke_tf.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", str(args.export_path.resolve()), "--port", "0"]
    command += ["--batch_ms", str(args.batch_ms)]
    repository = Path(__file__).resolve().parents[1]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository)
    try:
        base = _wait_for(server)
        signature, bodies = _requests(base, args.items, args.clients * REQUESTS)
        clients = [Client(base, bodies[number :: args.clients], args.items) for number in range(args.clients)]
        # The first call of a signature takes long.
        clients[0].send(bodies[0])
        started = time.perf_counter()
        threads = [threading.Thread(target=client.run, args=(started + args.seconds,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - started
    finally:
        server.terminate()
        status = server.wait()
    seconds = sorted(second for client in clients for second in client.seconds)
    slowest, its_start = max(pair for client in clients for pair in zip(client.seconds, client.starts, strict=True))
    errors = collections.Counter(error for client in clients for error in client.errors)
    print(
        json.dumps(
            {
                "requests_per_second": round(len(seconds) / elapsed, 1),
                "median_ms": round(1000 * statistics.median(seconds), 1),
                "p99_ms": round(1000 * seconds[int(0.99 * len(seconds))], 1),
                "max_ms": round(1000 * slowest, 1),
                "max_sent_at_second": round(its_start - started, 2),
                "requests": len(seconds),
                "errors": errors.total(),
                "signature": signature,
                "items": args.items,
                "clients": args.clients,
                "batch_ms": args.batch_ms,
                "seconds": args.seconds,
                "server_exit_status": status,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )
    for error, times in errors.most_common(5):
        print(f"{times} x {error}", file=sys.stderr)
    sys.exit(bool(errors))


def _wait_for(server: subprocess.Popen) -> tuple[str, int, str]:
    """Host, port and path of the model, once the server listens."""
    for line in server.stdout:
        print(line.rstrip()[:160], file=sys.stderr)
        found = re.search(r"Serving version \d+ at http://([\d.]+):(\d+)(\S+)", line)
        if found:
            return found[1], int(found[2]), found[3]
    raise ValueError(f"The server did not start. Received: exit status {server.wait()}")


def _requests(base: tuple[str, int, str], items: int, number: int) -> tuple[str, list[bytes]]:
    """A signature and bodies of requests with made-up values for it."""
    connection = http.client.HTTPConnection(*base[:2])
    connection.request("GET", f"{base[2]}/metadata")
    signatures = json.load(connection.getresponse())["metadata"]["signature_def"]["signature_def"]
    name = "score_ids" if "score_ids" in signatures else "serving_default"
    random.seed(0)
    rows = 1 if name == "score_ids" else items

    def column(key: str, info: dict[str, Any]) -> list:
        value = VALUES[info["dtype"]]
        if len(info["tensor_shape"]["dim"]) == 1:
            return [value() for _ in range(rows)]
        return [[value() for _ in range(items if key == "item_ids" else SLOTS)] for _ in range(rows)]

    inputs = signatures[name]["inputs"]
    bodies = [
        {"signature_name": name, "inputs": {key: column(key, inputs[key]) for key in inputs}} for _ in range(number)
    ]
    return name, [json.dumps(body).encode() for body in bodies]


class Client:
    """Sends one request after the other over one connection, and keeps time.

    Args:
        base: Host, port and path of the model.
        bodies: What to send, in turn.
        items: Scores per task that make an answer complete.
    """

    def __init__(self, base: tuple[str, int, str], bodies: list[bytes], items: int) -> None:
        self.connection = http.client.HTTPConnection(*base[:2], timeout=60)
        self.path, self.bodies, self.items = f"{base[2]}:predict", bodies, items
        self.seconds: list[float] = []
        self.starts: list[float] = []
        self.errors: list[str] = []

    def run(self, until: float) -> None:
        """Sends until then."""
        sent = 0
        while time.perf_counter() < until:
            started = time.perf_counter()
            try:
                error = self.send(self.bodies[sent % len(self.bodies)])
            except (OSError, http.client.HTTPException) as lost:
                error = repr(lost)
                self.connection.close()
            sent += 1
            self.seconds.append(time.perf_counter() - started)
            self.starts.append(started)
            if error:
                self.errors.append(error)

    def send(self, body: bytes) -> str | None:
        """Sends one request; what is wrong with the answer."""
        self.connection.request("POST", self.path, body)
        response = self.connection.getresponse()
        answer = json.load(response)
        if response.status != 200:
            return f"{response.status}: {answer['error']}"
        complete = all(
            len(scores[0] if isinstance(scores[0], list) else scores) == self.items
            for scores in answer["outputs"].values()
        )
        return None if complete else "incomplete"


if __name__ == "__main__":
    run_main(main)
