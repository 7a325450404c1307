# SPDX-License-Identifier: Apache-2.0
"""Rows per CPU second that data in buckets give: batches as NumPy arrays, no model.

Makes a log of 19 categorical columns, a list of 20 with weights and 3 labels, each row of another user state (no row is
saved by reading a user once), prepares it in buckets, and reads an epoch in batches of 4096 with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import polars as pl
import pyarrow as pa

from mvke_tf.cli import positive_int, run_main

COLUMNS, LENGTH, VALUES, TASKS = 19, 20, 1000, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=positive_int, default=1_000_000)
    parser.add_argument("--batch_size", type=positive_int, default=4096)
    parser.add_argument("--epochs", type=positive_int, default=5)
    args = parser.parse_args()
    from mvke_tf.data.batches import Batches
    from mvke_tf.data.buckets import prepare_in_buckets
    from mvke_tf.data.store import PreparedDataset

    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare_in_buckets(dataset(args.rows), Path(folder) / "prepared", "generated", 16)
        shards = PreparedDataset.load(Path(folder) / "prepared").shards("train")
        batches, speeds = Batches(shards, args.batch_size, deduplicate=False), []
        for epoch in range(args.epochs):
            started, rows = time.process_time(), 0
            for _, labels, *_ in batches.arrays(0, epoch):
                rows += len(labels["task0"])
            speeds.append(rows / (time.process_time() - started))
    median = round(float(np.median(speeds)))
    result = {"rows": len(shards), "rows_per_cpu_second": median, "slowest": round(min(speeds))}
    print(json.dumps(result | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}))


def dataset(rows: int):
    """The declared log."""
    from mvke_tf.data.declaration import Dataset

    random = np.random.default_rng(0)
    names = [f"column{number}" for number in range(COLUMNS)]
    log = {name: random.integers(0, VALUES, rows) for name in names}
    log |= {"list": random.integers(0, VALUES, (rows, LENGTH)).tolist()}
    log |= {"list_weights": random.random((rows, LENGTH)).tolist()}
    log |= {f"task{number}": random.integers(0, 2, rows) for number in range(TASKS)}
    vocabulary = {"tower": "user", "encode": "vocabulary"}
    declared = {
        "format": 1,
        "name": "wide",
        "source": {},
        "split": {"by": "hash", "column": "column0"},
        "features": {name: vocabulary for name in names}
        | {"list": vocabulary | {"length": LENGTH, "weights": "list_weights", "summary": False}},
        "tasks": {f"task{number}": {"label": f"task{number}"} for number in range(TASKS)},
    }
    return Dataset.from_frame(pl.DataFrame(log), declared)


if __name__ == "__main__":
    run_main(main)
