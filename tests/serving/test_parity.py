# SPDX-License-Identifier: Apache-2.0
"""1,000 random raw rows of every encoding, served without this package, get the predictions of the evaluation."""

import keras
import numpy as np
import polars as pl
import pytest

from mvke_tf.config import ModelConfig
from mvke_tf.data.batches import Interactions
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.encoder import INT64_MIN, EncodedFeature
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import PreparedDataset
from mvke_tf.inference.predictions import predict
from mvke_tf.models import TwoTowerModel, build_model
from mvke_tf.serving import Catalogue, export_saved_model
from tests.serving.helpers import pair_rows, rows_of

pytestmark = pytest.mark.slow

ROWS, WIDTH = 1000, 3
WORDS = tuple("abcdefghijklmnop")
DECLARATION = {
    "format": 1,
    "name": "everything",
    "source": {"time": "time"},
    "keys": {"user": "user", "item": "item"},
    "tables": {"items": {"on": "item"}},
    "split": {"by": "share_of_time"},
    "features": {
        "user": {"tower": "user", "encode": "hash", "bins": 20},
        "city": {"tower": "user", "encode": "vocabulary", "min_count": 3, "max_size": 6, "out_of_vocabulary_bins": 4},
        "zip": {"tower": "user", "encode": "vocabulary", "out_of_vocabulary_bins": 3, "missing": [0]},
        "age": {"tower": "user", "encode": "buckets", "boundaries": [18, 30, 50], "missing": [-1]},
        "height": {"tower": "user", "encode": "number"},
        "income": {"tower": "user", "encode": "number", "scaling": "piecewise", "bins": 5},
        "hour": {"tower": "user", "encode": "integer", "bins": 24, "context": True},
        "interests": {
            **{"tower": "user", "encode": "vocabulary", "length": 3, "keep": "heaviest"},
            **{"weights": "interest_weights", "out_of_vocabulary_bins": 2},
        },
        "codes": {"tower": "user", "encode": "hash", "bins": 9, "length": 2, "keep": "last"},
        "recent": {"tower": "user", "embedding": "item", "length": 4, "history": {"last": "item"}},
        "clicks": {"tower": "user", "encode": "buckets", "bins": 4, "history": {"count": True, "where": "click"}},
        "item": {"tower": "item", "encode": "vocabulary", "min_count": 5},
        "text": {"tower": "item", "encode": "vector", "width": WIDTH},
        "tags": {"tower": "item", "encode": "vocabulary", "length": 3, "keep": "first"},
        "price": {"tower": "item", "encode": "number", "scaling": "piecewise", "boundaries": [1, 5, 20]},
        "popularity": {"tower": "item", "encode": "buckets", "bins": 4, "statistic": {"count": True}},
    },
    "tasks": {
        "click": {"label": "click"},
        "buy": {"label": "buy", "given": "click"},
        "revenue": {"kind": "regression", "label": "revenue", "where": "buy", "transform": "log1p"},
    },
}


def tables(random: np.random.Generator) -> tuple[pl.DataFrame, pl.DataFrame]:
    def maybe(value):
        return None if random.random() < 0.1 else value

    def words(most: int) -> list[str]:
        return random.choice(WORDS, random.integers(0, most + 1)).tolist()

    rows = []
    for number in range(600):
        interests = words(5)
        click = int(random.random() < 0.5)
        rows.append(
            {
                "time": 1_700_000_000 + number,
                "user": f"u{random.integers(40)}",
                "item": int(random.integers(25)),
                "city": maybe(WORDS[min(15, int(random.exponential(3)))]),
                "zip": maybe(int(random.integers(0, 12))),
                "age": maybe(int(random.integers(-1, 80))),
                "height": maybe(float(random.normal(170, 10))),
                "income": maybe(float(random.exponential(1000))),
                "hour": maybe(int(random.integers(0, 30))),
                "interests": interests,
                "interest_weights": random.uniform(0, 3, len(interests)).tolist(),
                "codes": words(4),
                "click": click,
                "buy": int(click and random.random() < 0.5),
                "revenue": float(random.exponential(20)),
            }
        )
    items = [
        {
            "item": item,
            "text": maybe(random.normal(size=WIDTH).tolist()),
            "tags": words(5),
            "price": maybe(float(random.exponential(10))),
        }
        for item in range(30)
    ]
    return pl.DataFrame(rows), pl.DataFrame(items)


@pytest.fixture(scope="module")
def prepared() -> PreparedDataset:
    log, items = tables(np.random.default_rng(0))
    return prepare(Dataset.from_frame(log, DECLARATION, items=items))


@pytest.fixture(scope="module")
def model(prepared) -> TwoTowerModel:
    keras.utils.set_random_seed(0)
    config = ModelConfig(embedding_dim=8, hidden_dims=(8,), virtual_kernel_stddev=1.0, embedding_stddev=0.7)
    return build_model("mvke", prepared.schema(), config)


@pytest.fixture(scope="module")
def ask(prepared, model, elsewhere, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    path = export_saved_model(model, prepared.encoder, folder, Catalogue.from_prepared(prepared))
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 20e6
    return lambda signature, inputs: elsewhere.ask(path, signature, inputs)


def random_values(feature: EncodedFeature, known: np.ndarray, shape, random: np.random.Generator) -> np.ndarray:
    """Values of a feature: known ones, unseen ones, and those that mean "unknown"."""
    values = random.choice(known.ravel(), shape)
    kind = random.random(shape)
    if feature.raw == "string":
        unseen = np.array([f"{letter}{number}" for letter in "xé=" for number in range(30)], object)
        return np.where(kind < 0.6, values, np.where(kind < 0.85, random.choice(unseen, shape), "")).astype(object)
    if feature.raw == "integer":
        unseen = np.array([*feature.missing, -5, 10**15, 2**63 - 1, 31, 0], np.int64)
        return np.where(kind < 0.6, values, np.where(kind < 0.9, random.choice(unseen, shape), INT64_MIN))
    unseen = np.array([*feature.missing, -30.0, 0.0, 99.0, 5.0, np.inf, -np.inf], np.float32)
    values = np.where(kind < 0.6, values, np.where(kind < 0.9, random.choice(unseen, shape), np.nan))
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def raw(prepared) -> dict[str, np.ndarray]:
    """1,000 rows of all features, lists of any length among them."""
    random, columns = np.random.default_rng(1), {}
    for tower, table in (("user", prepared.users), ("item", prepared.items)):
        for feature in prepared.encoder.of_tower(tower):
            known = np.asarray(table.raw[feature.name])
            if feature.raw == "vector":
                values = random.normal(size=(ROWS, feature.width)).astype(np.float32)
                values[random.random((ROWS, feature.width)) < 0.1] = np.nan
                columns[feature.name] = values
            elif feature.is_list:
                length = feature.length + 3
                columns[feature.name] = random_values(feature, known, (ROWS, length), random)
                weights = random.choice(np.float32([0, 0.5, 1, 2, -1]), (ROWS, length))
                weights[random.random(ROWS) < 0.2] = 0
                columns[feature.name + "_weights"] = weights
            else:
                columns[feature.name] = random_values(feature, known, ROWS, random)
    return columns


@pytest.fixture(scope="module")
def wanted(prepared, model, raw) -> dict[str, np.ndarray]:
    encoded = {side: prepared.encoder.encode_numpy(raw, side) for side in ("user", "item")}
    rows = np.arange(ROWS, dtype=np.int32)
    values = predict(model, Interactions(encoded["user"], encoded["item"], rows, rows, {})).values
    assert min(np.ptp(prediction) for prediction in values.values()) > 0.3
    return values


def assert_equal(answer: dict[str, np.ndarray] | str, wanted: dict[str, np.ndarray]) -> None:
    assert isinstance(answer, dict), answer
    assert sorted(answer) == sorted(wanted)
    for task, values in answer.items():
        if task == "revenue":
            # What is predicted is log(1 + y): at 12, float32 knows y = e^12 to 1e-6 only, however it is computed.
            large = wanted[task] > 1
            logs = (np.log1p(np.asarray(each, np.float64)[large]) for each in (values, wanted[task]))
            # A small one is a sum of large terms, whose rounding stays.
            np.testing.assert_allclose(*logs, rtol=1e-6, atol=3e-6)
            np.testing.assert_allclose(values, wanted[task], rtol=5e-6, atol=1e-6)
        else:
            np.testing.assert_allclose(values, wanted[task], rtol=0, atol=1e-6)


def test_every_encoding_is_there(prepared):
    used = {(feature.encode, feature.raw, feature.is_list, feature.scaling) for feature in prepared.encoder.features}
    encodings = ("vocabulary", "hash", "buckets", "integer", "number", "vector")
    assert {encode for encode, *_ in used} == set(encodings)
    assert {("number", "number", False, scaling) for scaling in ("standard", "piecewise")} <= used
    assert {("vocabulary", raw, False, "standard") for raw in ("string", "integer")} <= used
    assert {feature.keep for feature in prepared.encoder.features} == {"first", "last", "heaviest"}


def test_random_raw_rows_get_the_predictions_of_the_evaluation(raw, wanted, ask):
    assert_equal(ask("serving_default", raw), wanted)
    one = ask("serving_default", {name: column[7:8] for name, column in raw.items()})
    assert_equal(one, {task: values[7:8] for task, values in wanted.items()})


def test_the_prepared_rows_get_those_of_their_encoded_ones(prepared, model, ask):
    test = prepared.part("test")
    assert_equal(ask("serving_default", pair_rows(prepared, "test")), predict(model, test).values)
    items = rows_of(prepared.items.raw, prepared.catalogue)
    users = rows_of(prepared.users.raw, test.user_rows)
    ids = np.asarray(prepared.items.key)[test.item_rows]
    by_id = ask("score_ids", {**users, "item_ids": ids[:, None]})
    assert_equal({task: values[:, 0] for task, values in by_id.items()}, predict(model, test).values)
    assert ask("item_vectors", items)["item_vector_click"].shape[0] == 30


def test_profiles_of_users_have_the_values_that_requests_have(prepared, model, ask):
    latest = prepared.latest_users
    # A context feature is unknown in a profile.
    assert (np.asarray(latest.raw["hour"]) == INT64_MIN).all()
    rows = np.arange(len(latest), dtype=np.int32)
    encoded = Interactions(latest.encoded, prepared.items.encoded, rows, rows % len(prepared.items), {})
    raw = rows_of(latest.raw, rows) | rows_of(prepared.items.raw, rows % len(prepared.items))
    assert_equal(ask("serving_default", raw), predict(model, encoded).values)
