# SPDX-License-Identifier: Apache-2.0
"""What the workers of `test_engine.py` do. They import it: it imports nothing that takes long."""

import os
import signal
import sys
import time
from pathlib import Path

from mvke_tf.errors import DataError


class Counted:
    """Returns its process, how many items it has had in it, and the square of the item."""

    def __init__(self, slow: int = -1) -> None:
        self.slow, self.calls = slow, 0

    def __call__(self, item: int) -> tuple[int, int, int]:
        self.calls += 1
        time.sleep(0.3 if item == self.slow else 0)
        return os.getpid(), self.calls, item**2


def refuse(item: int) -> int:
    if item > 1:
        raise DataError(f"item {item}: expected at most 1")
    return item


class DieOnce:
    """Kills its own process the first time that it gets item 2; an item that had been begun comes back negative."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> int:
        begun = self.folder / str(item)
        if begun.exists():
            return -item
        begun.touch()
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


def die(item: int) -> None:
    os._exit(7)


class Unlike(Exception):
    """An error that cannot be made of what it holds."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} is not {right}")


def differ(item: int) -> None:
    raise Unlike(item, 2)


class Backend:
    """Is, in a worker, the backend that would be chosen where this item is read."""

    def __reduce__(self):
        return backend, ()


def backend() -> str | None:
    return os.environ.get("KERAS_BACKEND")


def same(item: object) -> object:
    return item


def devices(item: int) -> str:
    time.sleep(0.5)
    return f"{os.environ['CUDA_VISIBLE_DEVICES']}:{os.environ.get('JAX_PLATFORMS')}"


def imported(item: str) -> list[str]:
    """What has been imported with Keras of what only other programs need; they can be imported afterwards."""
    import keras

    offered = ("jax", "matplotlib", "pandas", "sklearn")
    found = [name for name in offered if name in sys.modules]
    import pandas

    return [keras.config.backend(), pandas.__name__, *found]
