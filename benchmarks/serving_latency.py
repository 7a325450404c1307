# SPDX-License-Identifier: Apache-2.0
"""Milliseconds per request of an exported run, in process: `score_ids` of one user, and `recommend` for one.

Exports the run into a temporary folder, loads it, and sends requests one after the other, each with the raw features of
another user state of the test part as NumPy arrays. Prints one JSON line; the first requests are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main

WARM_UP = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint_path", type=Path, required=True, metavar="RUN", help="folder of a run")
    parser.add_argument("--items", type=positive_int, default=100, help="items of a score_ids request (default: 100)")
    parser.add_argument("--k", type=positive_int, default=20, help="items that recommend returns (default: 20)")
    parser.add_argument("--requests", type=positive_int, default=1000, help="requests of each kind (default: 1000)")
    args = parser.parse_args()

    import numpy as np
    import tensorflow as tf

    from mvke_tf.run import Run
    from mvke_tf.serving import export_run

    run = Run.open(args.checkpoint_path)
    prepared = run.prepared
    ids = np.asarray(prepared.items.key)[prepared.catalogue]
    states = np.unique(prepared.user_row[prepared.part_rows("test")])
    random = np.random.default_rng(0)
    raw = {name: np.asarray(column) for name, column in prepared.users.raw.items()}
    users = [
        {name: column[row : row + 1] for name, column in raw.items()}
        for row in random.choice(states, 500, replace=len(states) < 500)
    ]
    task = prepared.task_names(run.config.model.tasks)[0]
    with tempfile.TemporaryDirectory() as folder:
        signatures = tf.saved_model.load(export_run(run, Path(folder))).signatures

        def milliseconds(signature: str, requests: list[dict]) -> dict[str, float]:
            serve = signatures[signature]
            seconds = []
            for request in itertools.islice(itertools.cycle(requests), WARM_UP + args.requests):
                started = time.perf_counter()
                answer = serve(**request)
                for tensor in answer.values():
                    tensor.numpy()
                seconds.append(time.perf_counter() - started)
            median, p99 = np.percentile(np.array(seconds[WARM_UP:]) * 1000, [50, 99])
            return {"median_ms": round(float(median), 2), "p99_ms": round(float(p99), 2)}

        scored = milliseconds(
            "score_ids", [{**user, "item_ids": random.choice(ids, (1, args.items))} for user in users]
        )
        none = tf.zeros((1, 0), tf.string if ids.dtype == object else tf.int64)
        recommended = milliseconds(
            "recommend", [{**user, "k": args.k, "task": task, "exclude": none} for user in users]
        )
    print(
        json.dumps(
            {
                "score_ids": {"items": args.items, **scored},
                "recommend": {"k": args.k, "catalogue": len(ids), **recommended},
                "requests": args.requests,
                "model": run.config.model.name,
                "tensorflow": tf.__version__,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


if __name__ == "__main__":
    run_main(main)
