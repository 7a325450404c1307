# SPDX-License-Identifier: Apache-2.0
"""Training examples per second, end to end through `model.fit`, and those of the data pipeline alone.

Prints one JSON line; `examples_per_second` is the median of 5 epochs, after one that is not counted (it compiles).
`gemm_gflops` is what a product of two 2048 x 2048 matrices reaches in the same process: machines differ by as much.
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

from mvke_tf.cli import add_data, add_settings, import_tensorflow, prepared_of, read_settings, run_main

EPOCHS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser, sys.argv[1:])
    add_settings(parser, "model", "training")
    args = parser.parse_args()
    config = read_settings(args)
    import_tensorflow()

    import keras
    import numpy as np
    import tensorflow as tf

    from mvke_tf.data.batches import Batches
    from mvke_tf.training.loop import DISTINCT_MULTIPLE, build_training_model, set_seed

    prepared = prepared_of(args)
    set_seed(config.training)
    batches = Batches(
        prepared.part("train", config.model.tasks, config.model.objective),
        config.training.batch_size,
        config.training.deduplicate,
        DISTINCT_MULTIPLE,
    )
    schema = prepared.schema(config.model.tasks, config.model.objective)
    model = build_training_model(config, schema, batches.steps)[1]

    seconds = []
    for number in range(EPOCHS + 1):
        started = time.perf_counter()
        model.fit(batches.epoch(config.training.seed, number), shuffle=False, verbose=0)
        seconds.append(time.perf_counter() - started)
    rows = len(batches.data)
    print(
        json.dumps(
            {
                "examples_per_second": round(rows / float(np.median(seconds[1:]))),
                "pipeline_examples_per_second": round(rows / float(np.median(_pipeline_seconds(batches)))),
                "epochs": [round(rows / taken) for taken in seconds[1:]],
                "model": config.model.name,
                "batch_size": config.training.batch_size,
                "deduplicate": config.training.deduplicate,
                "precision": config.training.precision,
                "gemm_gflops": _gemm_gflops(tf),
                "backend": keras.backend.backend(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


def _gemm_gflops(tf) -> int:
    """Float32 operations per second of the best of ten large matrix products, in 1e9."""
    matrix = tf.random.normal((2048, 2048))
    product = tf.function(lambda: tf.matmul(matrix, matrix))
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        product().numpy()
        seconds.append(time.perf_counter() - started)
    return round(2 * 2048**3 / min(seconds) / 1e9)


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
