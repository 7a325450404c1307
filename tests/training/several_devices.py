# SPDX-License-Identifier: Apache-2.0
"""Trains runs as one of several processes under JAX. `test_devices.py` starts it; nothing else collects it.

    python several_devices.py RANK PROCESSES PORT KILL_AT RUN...

With KILL_AT above 0 the last process kills itself after so many steps of its second epoch.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import jax
import keras

if __name__ == "__main__":
    rank, processes, port, kill_at = map(int, sys.argv[1:5])
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank, heartbeat_timeout_seconds=10)
    from mvke_tf.run import Run
    from mvke_tf.training import devices, follow, loop, train_run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Every table is shared.
    devices.SHARED_BYTES = 1

    class Losses(keras.callbacks.Callback):
        """The mean loss so far after every step."""

        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def on_train_batch_end(self, batch, logs=None):
            self.losses.append(float(logs["loss"]))

    class Watched(devices.Led):
        """Says how many variables are shared; the last process may kill itself."""

        def on_train_begin(self, logs=None):
            shared = [not variable.value.is_fully_replicated for variable in devices.state_of(self.model)]
            print("shared variables:", sum(shared))
            super().on_train_begin(logs)

        def on_train_batch_end(self, batch, logs=None):
            if rank and kill_at == batch + 1 and len(self._history) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            super().on_train_batch_end(batch, logs)

    loop.Led = Watched
    for folder in map(Path, sys.argv[5:]):
        if rank:
            follow(Run.open(folder))
        else:
            losses = Losses()
            train_run(Run.open(folder), [losses], devices="all")
            (folder / "losses.json").write_text(json.dumps(losses.losses))
