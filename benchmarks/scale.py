# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of preparing a log, training on it for one epoch and profiling its users, by its rows.

Makes the ad log of `mvke_tf.datasets.ads` with each number of rows (users and ads grow with it), then runs
`mvke prepare`, `mvke train --epochs 1` and `mvke profile --tasks click` on it in processes of their own. Prints one
JSON line per number of rows, and at the end what each further million rows costs. With `--memory_mb` a log that takes
more is prepared and read in buckets, with `--workers` by several processes, of which the peak is that of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main

MIB = 2**20
STEPS = ("prepare", "train", "profile")
# Runs a command line and prints the CPU seconds of its process and its workers, the peak memory of the largest, and
# that of the first one without pages of files, which the system takes back when it is short of memory.
MEASURED = """
import resource, sys, threading, time

def watch():
    global most
    while True:
        with open("/proc/self/status") as file:
            most = max(most, int(file.read().partition("RssAnon:")[2].split()[0]))
        time.sleep(0.05)

if __name__ == "__main__":
    most = 0
    threading.Thread(target=watch, daemon=True).start()
    from mvke_tf.cli import main
    try:
        main(sys.argv[1:])
    finally:
        used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print("MEASURED", sum(of.ru_utime + of.ru_stime for of in used), max(of.ru_maxrss for of in used), most)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=positive_int, nargs="+", default=[250_000, 1_000_000, 4_000_000])
    parser.add_argument("--batch_size", type=positive_int, default=4096, help="of the training (default: 4096)")
    parser.add_argument("--memory_mb", type=positive_int, help="of the preparation (default: half of the machine's)")
    parser.add_argument("--workers", type=positive_int, default=1, help="of preparation and profiles (default: 1)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="what to measure (default: all)")
    parser.add_argument("--settings", default="", help="more options of the training, in one text")
    args = parser.parse_args()
    results = []
    for rows in sorted(args.rows):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(Path(folder), rows, args))
        print(json.dumps(results[-1]), flush=True)
    if len(results) > 1:
        first, last = results[0], results[-1]
        millions = (last["rows"] - first["rows"]) / 1e6
        growth = {
            name: round((last[name] - first[name]) / millions, 1)
            for name in first
            if name.endswith(("_s", "_mib")) and name != "start_mib"
        }
        print(json.dumps({"per_million_rows": growth, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}))


def measure(folder: Path, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the steps cost with a log of so many rows."""
    data = ["--data", "ads", "--rows", str(rows), "--data_dir", str(folder / "data")]
    code = "import sys; from mvke_tf.cli import parse, _dataset; _dataset(parse(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, "prepare", *data], check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = {"rows": rows}
    memory = ["--memory_mb", str(args.memory_mb)] if args.memory_mb else []
    workers = ["--workers", str(args.workers)]
    settings = ["--epochs", "1", "--batch_size", str(args.batch_size), *args.settings.split()]
    run = ["--runs_dir", str(folder / "runs"), "--run_name", "one"]
    commands = {
        "prepare": ["prepare", *data, *memory, *workers],
        "train": ["train", *data, *settings, *run],
        "profile": ["profile", str(folder / "runs" / "one"), "--tasks", "click", "--format", "parquet", *workers],
    }
    for step in args.steps:
        arguments = commands[step]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], check=True, capture_output=True, text=True)
        cpu, peak, own = done.stdout.rpartition("MEASURED")[2].split()
        result |= {
            f"{step}_s": round(time.perf_counter() - started, 1),
            f"{step}_cpu_s": round(float(cpu), 1),
            f"{step}_peak_mib": round(int(peak) * 1024 / MIB),
            f"{step}_own_peak_mib": round(int(own) * 1024 / MIB),
        }
    for name in ("tables", "prepared"):
        files = (path for path in (folder / "data" / name).rglob("*") if path.is_file())
        result[f"{name}_mib"] = round(sum(path.stat().st_size for path in files) / MIB, 1)
    return result


if __name__ == "__main__":
    run_main(main)
