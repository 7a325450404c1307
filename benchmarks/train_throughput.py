"""Training rows per second, end to end through `model.fit`, and those of the data pipeline alone.

Prints one JSON line; `rows_per_second` is the median of 5 epochs, after one that is not counted (it compiles).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_settings, read_settings, run_main

EPOCHS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="raw and prepared data (default: data)")
    add_settings(parser, "data", "model", "training")
    args = parser.parse_args()
    config = read_settings(args)

    import keras
    import numpy as np

    from mvke_tf.data.dataset import Batches
    from mvke_tf.data.prepared import Prepared, prepare_movielens
    from mvke_tf.training import DISTINCT_MULTIPLE, build_training_model, set_seed

    path = prepare_movielens(args.data_dir, config.data, report=lambda line: print(line, file=sys.stderr))
    prepared = Prepared.load(path)
    set_seed(config.training)
    batches = Batches(
        prepared.part("train", config.model.tasks),
        config.training.batch_size,
        config.training.distinct,
        DISTINCT_MULTIPLE,
    )
    model = build_training_model(config, prepared.schema_for(config.model), batches.steps)[1]

    seconds = []
    for number in range(EPOCHS + 1):
        started = time.perf_counter()
        model.fit(batches.epoch(config.training.seed, number), shuffle=False, verbose=0)
        seconds.append(time.perf_counter() - started)
    rows = len(batches.data)
    print(
        json.dumps(
            {
                "rows_per_second": round(rows / float(np.median(seconds[1:]))),
                "pipeline_rows_per_second": round(rows / float(np.median(_pipeline_seconds(batches)))),
                "epochs": [round(rows / taken) for taken in seconds[1:]],
                "model": config.model.name,
                "batch_size": config.training.batch_size,
                "distinct": config.training.distinct,
                "backend": keras.backend.backend(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


def _pipeline_seconds(batches) -> list[float]:
    """Seconds per epoch of the pipeline alone, after one epoch that is not counted."""
    seconds = []
    for number in range(EPOCHS + 1):
        started = time.perf_counter()
        for _ in batches.epoch(0, number):
            pass
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    run_main(main)
