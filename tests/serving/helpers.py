"""What the tests of the SavedModel share: a small problem, and a process that has TensorFlow but nothing of ours."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from mvke_tf.data.movielens import GENRES, MovieLens
from mvke_tf.data.prepared import Prepared
from mvke_tf.models.two_tower import predictions

LENGTH = 4  # slots of the lists of items
TWINS = (9, 3)  # rows of the catalogue that hold the same item, but for its id and title

# Pickled requests (way, path of the SavedModel, signature, inputs) in, pickled answers or error messages out. The ways
# are the signature itself and the client.py beside the model.
ASKED = """
import importlib.util, pathlib, pickle, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mvke_tf", "keras_rs"):
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
assert not {"mvke_tf", "keras_rs"} & set(sys.modules)
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


def small_frames(random: np.random.Generator) -> MovieLens:
    users, items, ratings = 12, 15, 120
    # The twins have no ratings, so that their ids are unknown to the encoder.
    rated = np.setdiff1d(np.arange(items), TWINS)
    chosen = random.choice(users * len(rated), ratings, replace=False)
    genres = [tuple(random.choice(GENRES, 2, replace=False)) for _ in range(items)]
    genres[TWINS[1]] = genres[TWINS[0]]
    years = [*range(1980, 1980 + items - 1), None]
    years[TWINS[1]] = years[TWINS[0]]
    return MovieLens(
        ratings=pd.DataFrame(
            {
                "user_id": chosen // len(rated) + 1,
                "item_id": rated[chosen % len(rated)] + 1,
                "rating": random.integers(1, 6, ratings),
                "timestamp": 880_000_000 + random.integers(0, 100, ratings),
            }
        ),
        users=pd.DataFrame(
            {
                "user_id": np.arange(users) + 1,
                "age": random.integers(10, 70, users),
                "gender": random.choice(["F", "M"], users),
                "occupation": random.choice(["artist", "student", "writer"], users),
                "zip_code": "12345",
            }
        ),
        items=pd.DataFrame(
            {
                "item_id": np.arange(items) + 1,
                "title": [f"Film {n}" for n in range(items)],
                "release_year": pd.array(years, dtype="Int64"),
                "genres": genres,
            }
        ),
    )


def rows_of(table: dict, rows) -> dict[str, np.ndarray]:
    """Some rows of a raw or encoded table."""
    return {name: np.asarray(column)[rows] for name, column in table.items()}


def predicted(model: keras.Model, encoded: dict) -> dict[str, np.ndarray]:
    """What the Keras model predicts of encoded pairs, `{task: (B,)}`."""
    outputs = predictions(model, model(encoded, training=False))
    return {task: output.numpy()[:, 0] for task, output in outputs.items()}


def predicted_pairs(model: keras.Model, prepared: Prepared, users, items) -> dict[str, np.ndarray]:
    """What the Keras model predicts of each user row with each item row, `{task: (users, items)}`."""
    users, items = np.asarray(users), np.asarray(items)
    encoded = rows_of(prepared.encoded["user"], np.repeat(users, len(items)))
    encoded |= rows_of(prepared.encoded["item"], np.tile(items, len(users)))
    return {task: output.reshape(len(users), -1) for task, output in predicted(model, encoded).items()}


def assert_close(answer: dict[str, np.ndarray] | str, wanted: dict[str, np.ndarray]) -> None:
    assert isinstance(answer, dict), answer
    assert sorted(answer) == sorted(wanted)
    for name, values in answer.items():
        assert values.dtype == np.float32
        assert values.shape == wanted[name].shape
        np.testing.assert_allclose(values, wanted[name], rtol=0, atol=1e-6)
