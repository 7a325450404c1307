# SPDX-License-Identifier: Apache-2.0
"""Seconds that monitoring adds to an epoch, over the seconds of the epoch, on a real training of the given settings.

Trains in a temporary folder and prints one JSON line. The first epoch, which compiles and draws the first heat maps,
is listed but not part of the share: `share` is that of the epochs after it, each of which also pays its part of a heat
map every `--monitor_images_epochs` epochs. What is written once, at the end of a training, has a number of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_data, add_settings, import_tensorflow, prepared_of, read_settings, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser, sys.argv[1:])
    add_settings(parser, "model", "training")
    args = parser.parse_args()
    config = read_settings(args)
    if args.epochs is None:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=3))
    if config.training.epochs < 2:
        parser.error("--epochs must be at least 2: the first one is not part of the share.")

    import_tensorflow()

    import keras
    import numpy as np

    from mvke_tf.training import loop
    from mvke_tf.training.monitoring import Monitor, plugins

    spent: list[float] = []
    epochs: list[float] = []
    pictures: list[float] = []

    class TimedMonitor(Monitor):
        """Times itself; an epoch lasts from the end of the one before to its own end."""

        def on_epoch_begin(self, epoch, logs=None):
            self.began = time.perf_counter()
            super().on_epoch_begin(epoch, logs)
            self.opening = time.perf_counter() - self.began

        def on_epoch_end(self, epoch, logs=None):
            started = time.perf_counter()
            super().on_epoch_end(epoch, logs)
            stopped = time.perf_counter()
            spent.append(self.opening + stopped - started)
            epochs.append(stopped - self.began)

        def _write_images(self, *arguments):
            started = time.perf_counter()
            super()._write_images(*arguments)
            pictures.append(time.perf_counter() - started)

    finishing: list[float] = []

    def timed_write_best(*arguments):
        started = time.perf_counter()
        write_best(*arguments)
        finishing.append(time.perf_counter() - started)

    write_best = plugins.write_best
    loop.Monitor, plugins.write_best = TimedMonitor, timed_write_best

    with tempfile.TemporaryDirectory() as folder:
        loop.train(prepared_of(args), config, "run", runs_dir=Path(folder))
    images = config.training.monitor_images_epochs
    per_epoch = float(np.median(pictures)) / images if pictures else 0.0
    # Epochs in which a picture happened to be drawn are taken without it; every epoch pays its part instead.
    plain = [
        seconds - (pictures[epoch // images] if images and pictures and epoch % images == 0 else 0.0)
        for epoch, seconds in enumerate(spent)
    ]
    later = float(np.median(plain[1:])) + per_epoch
    print(
        json.dumps(
            {
                "share": round(later / float(np.median(epochs[1:])), 5),
                "seconds_per_epoch": round(later, 4),
                "epoch_seconds": [round(seconds, 3) for seconds in epochs],
                "monitoring_seconds": [round(seconds, 4) for seconds in spent],
                "heat_maps_seconds": [round(seconds, 4) for seconds in pictures],
                "once_at_the_end_seconds": [round(seconds, 3) for seconds in finishing],
                "model": config.model.name,
                "batch_size": config.training.batch_size,
                "deduplicate": config.training.deduplicate,
                "backend": keras.backend.backend(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


if __name__ == "__main__":
    run_main(main)
