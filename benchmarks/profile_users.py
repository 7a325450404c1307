# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory of exact profiles: all users of a run, all items, every task of the model, top 20.

Prints one JSON line. Times start from encoded tables and end with frames of items, names and probabilities; they hold
both towers. Memory is the growth of the process while profiles are made and written, beside the model and the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main

MIB = 2**20


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def growth(interval: float = 0.002) -> Iterator[list[float]]:
    """The most that the process grows inside the block, in MiB: the one entry of the list, once the block has ended."""
    before, peak, result = resident(), [0], []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
        result.append(round((max(peak[0], resident()) - before) / MIB, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint_path", type=Path, required=True, metavar="RUN", help="folder of a run")
    parser.add_argument("--top", type=positive_int, default=20, help="ranks per user (default: 20)")
    parser.add_argument("--memory_mb", type=positive_int, default=512, help="bound of memory, in MiB (default: 512)")
    parser.add_argument("--repeats", type=positive_int, default=9, help="warm runs (default: 9)")
    parser.add_argument(
        "--synthetic_users",
        type=positive_int,
        default=100_000,
        help="users of the test of memory, with random features (default: 100000)",
    )
    args = parser.parse_args()

    import keras
    import numpy as np

    from mvke_tf.run import Run
    from mvke_tf.serving.profiles import Candidates, Profiler, Users
    from mvke_tf.serving.profiles.files import write_profiles

    run = Run.open(args.checkpoint_path)
    model, candidates, users = run.load_model(), Candidates.of(run.prepared), Users.of(run.prepared)

    def profile() -> tuple[float, dict]:
        started = time.perf_counter()
        frames = profiler.profiles(users, top=args.top, memory_mb=args.memory_mb)
        return time.perf_counter() - started, frames

    with growth() as first_growth:
        started = time.perf_counter()
        profiler = Profiler(model, candidates)
        _, frames = profile()
        cold = time.perf_counter() - started
    rows = {task: len(frame) for task, frame in frames.items()}

    random = np.random.default_rng(0)
    chosen = random.integers(0, len(users), (len(users.table), args.synthetic_users))
    # Every feature of a synthetic user is that of some real one.
    table = {name: column[row] for (name, column), row in zip(users.table.items(), chosen, strict=True)}
    synthetic = Users(table, np.arange(args.synthetic_users))
    with tempfile.TemporaryDirectory() as folder, growth() as synthetic_growth:
        started = time.perf_counter()
        blocks = profiler.blocks(synthetic, top=args.top, memory_mb=args.memory_mb)
        write_profiles(blocks, profiler.tasks, Path(folder), "item")
        synthetic_seconds = time.perf_counter() - started

    warm = [profile()[0] for _ in range(args.repeats)]
    with_items = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        profiler.refresh()
        profile()
        with_items.append(time.perf_counter() - started)

    print(
        json.dumps(
            {
                "seconds": round(float(np.median(with_items)), 3),
                "seconds_without_item_tower": round(float(np.median(warm)), 3),
                "seconds_first_call": round(cold, 3),
                "seconds_of_repeats": [round(seconds, 3) for seconds in with_items],
                "users": len(users),
                "items": len(candidates.ids),
                "rows": rows,
                "synthetic_users": args.synthetic_users,
                "synthetic_seconds": round(synthetic_seconds, 1),
                "synthetic_memory_mib": synthetic_growth[0],
                "first_call_memory_mib": first_growth[0],
                "memory_bound_mib": args.memory_mb,
                "backend": keras.backend.backend(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


if __name__ == "__main__":
    run_main(main)
