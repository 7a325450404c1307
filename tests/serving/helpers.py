# SPDX-License-Identifier: Apache-2.0
"""What the tests of serving share: a small problem, and a process that has TensorFlow but nothing of ours."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import PreparedDataset
from mvke_tf.models import TwoTowerModel
from tests.small import SMALL, small_log

# Rows of the catalogue that hold the same item but for its id and name, and the number of items.
TWINS, ITEMS = (30, 31), 32

# Pickled requests (way, path of the SavedModel, signature, inputs) in, pickled answers or error messages out. The ways
# are the signature itself and the client.py beside the model.
ASKED = """
import importlib.util, pathlib, pickle, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mvke_tf", "keras_rs", "polars", "pandas"):
            raise ImportError(f"{name} is not for this process")

sys.meta_path.insert(0, Blocked())
import tensorflow as tf

ways = {"signature": {}, "client": {}}
while True:
    try:
        way, path, signature, inputs = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    loaded = ways[way]
    try:
        if path not in loaded and way == "signature":
            loaded[path] = tf.saved_model.load(path).signatures
        elif path not in loaded:
            spec = importlib.util.spec_from_file_location("client", pathlib.Path(path) / "client.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            loaded[path] = module.Client()
        if way == "signature":
            answer = {k: v.numpy() for k, v in loaded[path][signature](**inputs).items()}
        else:
            answer = loaded[path](signature, inputs)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        answer = str(error)
    sys.stdout.buffer.write(pickle.dumps(answer))
    sys.stdout.buffer.flush()
assert not {"mvke_tf", "keras_rs", "polars", "pandas"} & set(sys.modules)
"""


class Elsewhere:
    """The other process."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", ASKED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=environment,
        )

    def ask(self, path: Path, signature: str, inputs: dict, way: str = "signature") -> dict[str, np.ndarray] | str:
        """The outputs of a signature, or the message of its error."""
        self._process.stdin.write(pickle.dumps((way, str(path), signature, inputs)))
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def close(self) -> int:
        """Ends the process; its exit status."""
        self._process.stdin.close()
        return self._process.wait(timeout=60)


def prepared_with_twins() -> PreparedDataset:
    """The small dataset with two more items of equal features, whose ids training never sees."""
    log, items = small_log()
    twin = {"tags": ["news", "film"], "price": 7.0, "year": 2001}
    more = pl.DataFrame([{"item": f"i{row + 1}", "title": f"Item {row + 1}", **twin} for row in TWINS], items.schema)
    return prepare(Dataset.from_frame(log, SMALL, items=pl.concat([items, more])))


def rows_of(table, rows) -> dict[str, np.ndarray]:
    """Some rows of a raw or encoded table."""
    return {name: np.asarray(table[name])[rows] for name in table}


def pair_rows(
    prepared: PreparedDataset, part: str, most: int | None = None, kind: str = "raw"
) -> dict[str, np.ndarray]:
    """The features of the first interactions of a part."""
    rows = prepared.part_rows(part)[:most]
    users, items = getattr(prepared.users, kind), getattr(prepared.items, kind)
    return rows_of(users, prepared.user_row[rows]) | rows_of(items, prepared.item_row[rows])


def predicted(model: TwoTowerModel, encoded: dict) -> dict[str, np.ndarray]:
    """What the Keras model predicts of encoded pairs, `{task: (B,)}`."""
    outputs = model.predictions(model({name: encoded[name] for name in model.input}, training=False))
    return {task: output.numpy()[:, 0] for task, output in outputs.items()}


def predicted_pairs(model: TwoTowerModel, users: dict, items: dict) -> dict[str, np.ndarray]:
    """What the Keras model predicts of encoded users with each encoded item, `{task: (users, items)}`."""
    many, each = len(next(iter(users.values()))), len(next(iter(items.values())))
    encoded = rows_of(users, np.repeat(np.arange(many), each)) | rows_of(items, np.tile(np.arange(each), many))
    return {task: output.reshape(many, each) for task, output in predicted(model, encoded).items()}


def assert_close(answer: dict[str, np.ndarray] | str, wanted: dict[str, np.ndarray]) -> None:
    assert isinstance(answer, dict), answer
    assert sorted(answer) == sorted(wanted)
    for name, values in answer.items():
        assert values.dtype == np.float32
        assert values.shape == wanted[name].shape
        np.testing.assert_allclose(values, wanted[name], rtol=0, atol=1e-6)
