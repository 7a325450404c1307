# SPDX-License-Identifier: Apache-2.0
"""Trains runs as one of several processes under JAX. `test_devices.py` starts it; nothing else collects it.

python several_devices.py RANK PROCESSES PORT RUN...
"""

import json
import logging
import sys
from pathlib import Path

import jax
import keras

if __name__ == "__main__":
    rank, processes, port = map(int, sys.argv[1:4])
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    from mvke_tf.inference.predictions import predict
    from mvke_tf.run import Run
    from mvke_tf.training import devices, follow, loop, train_run

    logging.basicConfig(level=logging.INFO, format="%(message)s")

    class Losses(keras.callbacks.Callback):
        """The mean loss so far after every step."""

        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def on_train_batch_end(self, batch, logs=None):
            self.losses.append(float(logs["loss"]))

    class Watched(devices.Led):
        """Says how many variables are shared."""

        def on_train_begin(self, logs=None):
            shared = [not variable.value.is_fully_replicated for variable in devices.state_of(self.model)]
            print("shared variables:", sum(shared))
            super().on_train_begin(logs)

    loop.Led = Watched
    large = devices.SHARED_BYTES
    for folder in map(Path, sys.argv[4:]):
        # Else every table is shared.
        devices.SHARED_BYTES = large if folder.name == "default" else 1
        if rank:
            follow(Run.open(folder))
        else:
            losses = Losses()
            train_run(Run.open(folder), [losses], devices="all")
            (folder / "losses.json").write_text(json.dumps(losses.losses))
            best, data = Run.open(folder).load_model(), Run.open(folder).prepared.bucket_with("train")
            predicted = predict(best, data.part("train", best.task_names)).values
            (folder / "predicted.json").write_text(json.dumps({name: list(one) for name, one in predicted.items()}))
