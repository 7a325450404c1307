# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of a training step with a large embedding table and with a small one, by --embedding_optimizer.

Batches of 4096 pairs, 7 fields of width 32, the first of which has the large table. Prints one JSON line for each
optimizer: CPU and wall time of a step, the median of 20 after 3 that compile, and the ratio of CPU times.
`KERAS_BACKEND=jax` measures JAX.
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

import keras
import numpy as np

from mvke_tf.config import EMBEDDING_OPTIMIZERS, ModelConfig, RunConfig, TrainingConfig
from mvke_tf.schema import Feature, Schema, Task
from mvke_tf.training.loop import build_training_model, set_seed

BATCH, SMALL, STEPS = 4096, 1000, 20


def step_times(rule: str, rows: int) -> tuple[float, float]:
    """Median milliseconds of CPU and of wall time of a step."""
    others = (Feature(f"user_{number}", "user", SMALL) for number in range(5))
    schema = Schema((Feature("user", "user", rows), *others, Feature("item", "item", SMALL)), (Task("click"),))
    config = RunConfig(
        ModelConfig("single_task", embedding_dim=32, hidden_dims=(64, 32)),
        TrainingConfig(embedding_optimizer=rule, deduplicate=False),
    )
    set_seed(config.training)
    model = build_training_model(config, schema, steps_per_epoch=100)[1]
    random = np.random.default_rng(0)
    y = {"click": (random.random((BATCH, 1)) < 0.1).astype("float32")}
    seconds = []
    for _ in range(3 + STEPS):
        x = {f.name: random.integers(0, f.vocabulary_size, BATCH).astype("int32") for f in schema.features}
        cpu, wall = time.process_time(), time.perf_counter()
        model.train_on_batch(x, y)
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = 1e3 * np.median(seconds[3:], axis=0)
    return float(cpu), float(wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_600_000, help="rows of the large table (default: 1600000)")
    rows = parser.parse_args().rows
    for rule in EMBEDDING_OPTIMIZERS:
        small, large = step_times(rule, SMALL), step_times(rule, rows)
        print(
            json.dumps(
                {
                    "embedding_optimizer": rule,
                    **{f"cpu_ms_{count}_rows": round(ms[0], 1) for count, ms in ((SMALL, small), (rows, large))},
                    **{f"wall_ms_{count}_rows": round(ms[1], 1) for count, ms in ((SMALL, small), (rows, large))},
                    "ratio": round(large[0] / small[0], 2),
                    "backend": keras.backend.backend(),
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
