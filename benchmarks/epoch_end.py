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

from mvke_tf.cli import add_settings, positive_int, read_settings, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="raw and prepared data (default: data)")
    parser.add_argument("--batch_sizes", nargs="+", type=positive_int, default=[256, 1024, 4096])
    parser.add_argument("--measured_epochs", type=positive_int, default=20)
    add_settings(parser, "data", "model", "training", without=("batch_size",))
    args = parser.parse_args()
    config = read_settings(args)

    import keras
    import numpy as np

    from mvke_tf.data.dataset import Batches
    from mvke_tf.data.prepared import Prepared, prepare_movielens
    from mvke_tf.training import DISTINCT_MULTIPLE, build_training_model, set_seed

    class LastBatch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # Reading the loss waits for the step.
            float(logs["loss"])
            self.ended = time.perf_counter()

    path = prepare_movielens(args.data_dir, config.data, report=lambda line: print(line, file=sys.stderr))
    prepared = Prepared.load(path)
    for batch_size in args.batch_sizes:
        set_seed(config.training)
        batches = Batches(
            prepared.part("train", config.model.tasks), batch_size, config.training.distinct, DISTINCT_MULTIPLE
        )
        model = build_training_model(config, prepared.schema_for(config.model), batches.steps)[1]
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
