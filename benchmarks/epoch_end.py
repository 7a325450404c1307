# SPDX-License-Identifier: Apache-2.0
"""Seconds between the last batch of an epoch and the return of `fit`, in epochs of several batch sizes.

Prints one JSON line per batch size.
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

from mvke_tf.cli import add_data, add_settings, import_tensorflow, positive_int, prepared_of, read_settings, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser, sys.argv[1:])
    parser.add_argument("--batch_sizes", nargs="+", type=positive_int, default=[256, 1024, 4096])
    parser.add_argument("--measured_epochs", type=positive_int, default=20)
    add_settings(parser, "model", "training", without=("batch_size",))
    args = parser.parse_args()
    config = read_settings(args)
    import_tensorflow()

    import keras
    import numpy as np

    from mvke_tf.data.batches import Batches
    from mvke_tf.training.loop import DISTINCT_MULTIPLE, build_training_model, set_seed

    class LastBatch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # Reading the loss waits for the step.
            float(logs["loss"])
            self.ended = time.perf_counter()

    prepared = prepared_of(args)
    schema = prepared.schema(config.model.tasks, config.model.objective)
    for batch_size in args.batch_sizes:
        set_seed(config.training)
        data = prepared.part("train", config.model.tasks, config.model.objective)
        batches = Batches(data, batch_size, config.training.deduplicate, DISTINCT_MULTIPLE)
        model = build_training_model(config, schema, batches.steps)[1]
        watch, waits, seconds = LastBatch(), [], []
        for number in range(args.measured_epochs):
            started = time.perf_counter()
            model.fit(batches.epoch(config.training.seed, number), shuffle=False, verbose=0, callbacks=[watch])
            waits.append(time.perf_counter() - watch.ended)
            seconds.append(watch.ended - started)
        print(
            json.dumps(
                {
                    "batch_size": batch_size,
                    "epochs": args.measured_epochs,
                    "seconds_after_last_batch": {
                        "median": round(float(np.median(waits)), 4),
                        "max": round(max(waits), 4),
                    },
                    "seconds_per_epoch": {"median": round(float(np.median(seconds)), 2), "max": round(max(seconds), 2)},
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    run_main(main)
