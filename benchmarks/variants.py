# SPDX-License-Identifier: Apache-2.0
"""What other ways of doing a training step would cost: CPU milliseconds per step, beside the way that it is done.

Steps of the same batches in turns, after some that do not count. Prints a line per variant: the median of its rounds,
and the median of its ratio to the step as it is in the same round; above 1 it costs more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_data, add_settings, import_tensorflow, positive_int, prepared_of, read_settings, run_main

WARMING = 5
BASE = "as it is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser, sys.argv[1:])
    add_settings(parser, "model", "training")
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--rows", type=positive_int, default=16_000, help="of a round (default: 16000)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    config = read_settings(args)
    import_tensorflow()

    prepared = prepared_of(args)
    steps = max(1, args.rows // config.training.batch_size)
    names = [BASE, *(name for name in args.variants if name != BASE)]
    runs = {name: _steps(prepared, VARIANTS[name], config, steps) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            spent[name].append(1000 * (time.process_time() - started) / steps)
    print(f"batch {config.training.batch_size}, {args.rounds} rounds, {platform.machine()}, {os.cpu_count()} cores")
    for name, times in spent.items():
        ratios = [mine / base for mine, base in zip(times, spent[BASE], strict=True)]
        print(f"{name:28} {statistics.median(times):8.1f} ms  {statistics.median(ratios):6.2f}")


def _steps(prepared: Any, variant: Variant, config: Any, steps: int) -> Callable[[], None]:
    """What takes the steps once; the first steps have been taken."""
    from mvke_tf.data.batches import Batches
    from mvke_tf.training.loop import DISTINCT_MULTIPLE, build_training_model

    training = dataclasses.replace(config.training, **variant.training)
    config = dataclasses.replace(config, training=training)
    data = prepared.part("train", config.model.tasks, config.model.objective)
    batches = Batches(data, training.batch_size, training.deduplicate, DISTINCT_MULTIPLE)
    with variant.patched():
        schema = prepared.schema(config.model.tasks, config.model.objective)
        model = build_training_model(config, schema, batches.steps)[1]
        model.make_train_function()
        step = model.train_function
        taken = list(batches.shuffled(0).take(WARMING + steps))
        for batch in taken[:WARMING]:
            step(iter([batch]))

    def run() -> None:
        for batch in taken[WARMING:]:
            logs = step(iter([batch]))
        # Reading the loss waits for the step.
        float(logs["loss"])

    return run


def _gathered(self: Any, inputs: Any, weights: Any = None, training: Any = None) -> Any:
    """A weighted mean by gathering the rows, in place of a product with a bag."""
    from keras import ops

    if self._read is None:
        with self.reading(self.embeddings * 1.0):
            return _gathered(self, inputs, weights)
    table = ops.cast(self.embeddings, self.compute_dtype)
    if weights is None:
        return ops.take(table, inputs, axis=0)
    weights = ops.cast(weights, self.compute_dtype)
    total = ops.squeeze(ops.matmul(ops.expand_dims(weights, 1), ops.take(table, inputs, axis=0)), 1)
    return ops.divide_no_nan(total, ops.sum(weights, axis=-1, keepdims=True))


@contextlib.contextmanager
def _gathering() -> Iterator[None]:
    from mvke_tf.layers import FieldEmbedding

    with mock.patch.object(FieldEmbedding, "call", _gathered):
        yield


@contextlib.contextmanager
def _adam_of_keras() -> Iterator[None]:
    import keras

    from mvke_tf.training import loop

    with mock.patch.object(loop, "FusedAdam", keras.optimizers.Adam):
        yield


@dataclasses.dataclass(frozen=True)
class Variant:
    """Another way.

    Args:
        training: Settings of the training that differ.
        patched: Replaces what is no setting while the step is built.
    """

    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    patched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


VARIANTS = {
    BASE: Variant(),
    "lists by gather": Variant(patched=_gathering),
    "Keras' Adam": Variant(patched=_adam_of_keras),
    "every pair by itself": Variant({"deduplicate": False}),
    "mixed_bfloat16": Variant({"precision": "mixed_bfloat16"}),
}


if __name__ == "__main__":
    run_main(main)
