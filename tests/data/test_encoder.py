# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import logging
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.encoder import INT64_MIN, EncodedFeature, Encoder, as_kind
from mvke_tf.errors import DataError, DeclarationError
from mvke_tf.schema import Feature, Schema, Task
from tests.small import small_dataset, small_log

NAN, INF = math.nan, math.inf


def texts(*values: str) -> np.ndarray:
    return np.array(values, object)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def feature(name: str, encode: str, raw: str, tower: str = "user", **others) -> EncodedFeature:
    return EncodedFeature(name, tower, encode, raw, **others)


def encoded(one: EncodedFeature, state: list | None, values: np.ndarray, **columns: np.ndarray) -> dict[str, list]:
    """The encoding of the values of one feature, as lists."""
    encoder = Encoder([one], {} if state is None else {one.name: state})
    return {
        name: column.numpy().tolist() for name, column in encoder.encode({one.name: values, **columns}, "user").items()
    }


# One value


def test_vocabulary_of_texts():
    city = feature("city", "vocabulary", "string", missing=("n/a",))
    # Neither the layer's own "[UNK]" nor a missing word that is in the vocabulary by accident is special.
    values = texts("Oslo", "Rome", "", "Paris", "[UNK]", "n/a", "rome", "Zürich")
    assert encoded(city, ["Rome", "Oslo", "[UNK]", "Zürich"], values) == {"city": [2, 1, 0, 0, 3, 0, 0, 4]}


def test_vocabulary_of_whole_numbers():
    user = feature("user", "vocabulary", "integer", missing=(-2,))
    values = np.array([5, 7, -1, 6, INT64_MIN, -2, 2**62])
    assert encoded(user, [7, 5, -1, 2**62], values) == {"user": [2, 1, 3, 0, 0, 0, 4]}


def farm_hash(value: object, bins: int) -> int:
    return int(tf.strings.to_hash_bucket_fast([str(value)], bins)[0])


def test_values_outside_the_vocabulary_are_hashed_into_bins():
    city = feature("city", "vocabulary", "string", out_of_vocabulary_bins=5, missing=("n/a",))
    values = texts("Oslo", "Paris", "Bern", "", "n/a")
    expected = [2, 3 + farm_hash("Paris", 5), 3 + farm_hash("Bern", 5), 0, 0]
    assert encoded(city, ["Rome", "Oslo"], values) == {"city": expected}
    assert encoded(city, [], texts("Paris", "")) == {"city": [1 + farm_hash("Paris", 5), 0]}
    user = feature("user", "vocabulary", "integer", out_of_vocabulary_bins=1_000)
    assert encoded(user, [7], np.array([7, 9, -9, INT64_MIN])) == {
        "user": [1, 2 + farm_hash(9, 1_000), 2 + farm_hash(-9, 1_000), 0]
    }
    encoder = Encoder([city], {"city": ["Rome", "Oslo"]})
    assert encoder.schema_features() == (Feature("city", "user", vocabulary_size=1 + 2 + 5),)


def test_hash():
    device = feature("device", "hash", "string", bins=100, missing=("none",))
    values = texts("a", "Ω", "", "none", "a")
    assert encoded(device, None, values) == {
        "device": [1 + farm_hash("a", 100), 1 + farm_hash("Ω", 100), 0, 0, 1 + farm_hash("a", 100)]
    }
    user = feature("user", "hash", "integer", bins=100)
    # Pinned: what is exported today must agree with what is prepared tomorrow.
    assert farm_hash(12, 2**31 - 1) == 1_832_549_722
    assert encoded(user, None, np.array([12, -3, INT64_MIN])) == {
        "user": [1 + farm_hash("12", 100), 1 + farm_hash("-3", 100), 0]
    }
    assert Encoder([user], {}).schema_features()[0].vocabulary_size == 101


def test_integer():
    hour = feature("hour", "integer", "integer", bins=24, missing=(12,))
    values = np.array([0, 23, 24, -1, 12, INT64_MIN, 2**62])
    assert encoded(hour, None, values) == {"hour": [1, 24, 0, 0, 0, 0, 0]}
    assert Encoder([hour], {}).schema_features()[0].vocabulary_size == 25


def test_buckets():
    age = feature("age", "buckets", "number", missing=(-1.0,))
    values = floats(-1e9, 19.9, 20, 29.9, 30, 49.9, 50, 1e9, NAN, INF, -INF, -1)
    assert encoded(age, [20.0, 30.0, 50.0], values) == {"age": [1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 0, 0]}
    assert Encoder([age], {"age": [20.0, 30.0, 50.0]}).schema_features()[0].vocabulary_size == 5


def test_standard_number():
    price = feature("price", "number", "number", missing=(0.0,))
    assert encoded(price, [10.0, 4.0], floats(10, 18, 4, NAN, INF, 0)) == {
        "price": [[0, 0], [0, 2], [0, -1.5], [1, 0], [1, 0], [1, 0]]
    }
    assert Encoder([price], {"price": [10.0, 4.0]}).schema_features() == (Feature("price", "user", width=2),)
    # Also where the deviation is so small that the quotient is more than float32 holds.
    assert encoded(price, [0.0, 1e-20], floats(1e-20, 1e30)) == {"price": [[0, 1], [0, 1000]]}
    # A constant tells nothing, and divides by nothing.
    assert encoded(price, [10.0, 0.0], floats(10, 12)) == {"price": [[0, 0], [0, 2]]}


def test_piecewise_number():
    """Equation 1 of Gorishniy et al.: linear within the bin of the value, 1 below it, 0 above it; the ends go on."""
    price = feature("price", "number", "number", scaling="piecewise")
    values = floats(0, 1, 2, 4, 8, 9, 12, -2, NAN)
    expected = [
        [0, 0, 0, 0],
        [0, 0.5, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1 / 3, 0],
        [0, 1, 1, 0],
        [0, 1, 1, 0.25],
        [0, 1, 1, 1],
        [0, -1, 0, 0],
        [1, 0, 0, 0],
    ]
    found = encoded(price, [0.0, 2.0, 8.0, 12.0], values)["price"]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=0)
    assert encoded(price, [0.0, 2.0, 10.0], floats(18)) == {"price": [[0, 1, 2]]}
    assert encoded(price, [5.0], floats(5, 6, 4, NAN)) == {"price": [[0, 0], [0, 1], [0, -1], [1, 0]]}
    assert Encoder([price], {"price": [0.0, 2.0, 8.0, 12.0]}).schema_features()[0].width == 4
    assert Encoder([price], {"price": [5.0]}).schema_features()[0].width == 2


@pytest.mark.slow
@pytest.mark.parametrize("run", [lambda function: function, tf.function], ids=["eager", "graph"])
def test_extreme_numbers_are_clipped(run):
    """So that a slip of a caller does not overflow the layers behind."""
    standard = feature("standard", "number", "number")
    piecewise = feature("piecewise", "number", "number", scaling="piecewise")
    encoder = Encoder([standard, piecewise], {"standard": [10.0, 4.0], "piecewise": [0.0, 2.0, 10.0]})
    values = floats(1e30, -1e30, 3.4e38, 4010, 4014, 10, NAN)
    found = run(lambda one, other: encoder.encode({"standard": one, "piecewise": other}, "user"))(values, values)
    assert found["standard"].numpy().tolist() == [
        *([0, 1000], [0, -1000], [0, 1000], [0, 1000], [0, 1000], [0, 0], [1, 0])
    ]
    assert found["piecewise"].numpy().tolist() == [
        *([0, 1, 1000], [0, -1000, 0], [0, 1, 1000], [0, 1, 501], [0, 1, 501.5], [0, 1, 1], [1, 0, 0])
    ]


def test_vector():
    text = feature("text", "vector", "vector", width=2)
    values = np.array([[1, -2], [0, 0], [NAN, 1], [1, INF]], np.float32)
    assert encoded(text, None, values) == {"text": [[0, 1, -2], [0, 0, 0], [1, 0, 0], [1, 0, 0]]}
    assert Encoder([text], {}).schema_features() == (Feature("text", "user", width=3),)
    with pytest.raises(ValueError, match=r"'text' is a vector of 2 numbers\. Received: shape \(1, 3\)"):
        encoded(text, None, np.zeros((1, 3), np.float32))


def test_dtypes():
    encoder = Encoder(
        [
            feature("city", "vocabulary", "string"),
            feature("tags", "hash", "string", bins=9, length=2),
            feature("age", "buckets", "number"),
            feature("hour", "integer", "integer", bins=2),
            feature("price", "number", "number"),
            feature("text", "vector", "vector", width=2),
        ],
        {"city": ["a"], "age": [1.0], "price": [0.0, 1.0]},
    )
    table = encoder.unknown_raw("user", 3)
    assert {name: column.dtype.name for name, column in table.items()} == {
        "city": "object",
        "tags": "object",
        "tags_weights": "float32",
        "age": "float32",
        "hour": "int64",
        "price": "float32",
        "text": "float32",
    }
    columns = encoder.encode(table, "user")
    assert {name: (column.dtype.name, column.shape.as_list()) for name, column in columns.items()} == {
        "city": ("int32", [3]),
        "tags": ("int32", [3, 2]),
        "tags_weights": ("float32", [3, 2]),
        "age": ("int32", [3]),
        "hour": ("int32", [3]),
        "price": ("float32", [3, 2]),
        "text": ("float32", [3, 3]),
    }
    nothing = encoder.unknown("user", 3)
    for name, column in columns.items():
        np.testing.assert_array_equal(nothing[name], column, err_msg=name)
        assert nothing[name].dtype == column.dtype.as_numpy_dtype
    assert encoder.raw_inputs("item") == {}
    inputs = encoder.raw_inputs("user")
    assert {name: (dtype, rank, of.name) for name, (dtype, rank, of) in inputs.items()} == {
        "city": ("string", 1, "city"),
        "tags": ("string", 2, "tags"),
        "tags_weights": ("float32", 2, "tags"),
        "age": ("float32", 1, "age"),
        "hour": ("int64", 1, "hour"),
        "price": ("float32", 1, "price"),
        "text": ("float32", 2, "text"),
    }


# Lists


def test_mean_weight_and_length_of_a_list():
    tags = feature("tags", "integer", "integer", bins=9, length=3, weighted=True, summary=True)
    weights = np.float32([[4, 5, 0, 5], [2, NAN, 0, 0], [0, -1, 0, 0], [3, 3, INF, 1]])
    table = {"tags": np.arange(16).reshape(4, 4), "tags_weights": weights}
    encoder = Encoder([tags], {"tags_mean_weight": [2.0, 4.0, 5.0], "tags_length": [0.0, 2.0, 3.0]})
    # [unknown, of mean and length the share of the way from the first bound to the second, then to the third]
    columns = encoder.encode(table, "user")
    wanted = [[0, 1, 2 / 3, 1, 1], [0, 0, 0, 0.5, 0], [1, 0, 0, 0, 0], [0, 1 / 6, 0, 1, 1]]
    np.testing.assert_allclose(columns["tags_summary"], wanted, rtol=1e-6)
    assert [(f.name, f.tower, f.width) for f in encoder.schema_features()] == [
        ("tags", "user", 0),
        ("tags_summary", "user", 5),
    ]
    assert list(encoder.raw_inputs("user")) == ["tags", "tags_weights"]
    nothing = encoder.unknown("user", 2)
    np.testing.assert_array_equal(nothing["tags_summary"], [[1, 0, 0, 0, 0]] * 2)


def test_mean_weight_and_length_follow_the_slots_that_are_kept():
    tags = feature("tags", "integer", "integer", bins=9, length=2, keep="heaviest", weighted=True, summary=True)
    table = {"tags": np.array([[1, 2, 3], [4, 5, 6]]), "tags_weights": np.float32([[1, 6, 2], [0, 3, 0]])}
    encoder = Encoder.fit([tags], {"user": table, "item": {}}, {"user": np.arange(2), "item": np.arange(0)})
    # Of weights 6 and 2, and of weight 3: two means, 4 and 3, two lengths, 2 and 1.
    assert encoder.state == {
        "tags_mean_weight": pytest.approx(np.linspace(3, 4, 21)),
        "tags_length": pytest.approx(np.linspace(1, 2, 21)),
    }
    columns = encoder.encode(table, "user")
    np.testing.assert_array_equal(columns["tags_summary"], [[0] + [1] * 40, [0] * 41])
    again = Encoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    np.testing.assert_array_equal(again.encode(table, "user")["tags_summary"], columns["tags_summary"])


@pytest.mark.slow
def test_mean_weight_does_not_depend_on_the_batch():
    tags = feature("tags", "integer", "integer", bins=9, length=50, weighted=True, summary=True)
    random = np.random.default_rng(0)
    table = {
        "tags": np.zeros((300, 50), np.int64),
        "tags_weights": random.uniform(0, 5, (300, 50)).astype(np.float32),
    }
    rows = {"user": np.arange(300), "item": np.arange(0)}
    encoder = Encoder.fit([tags], {"user": table, "item": {}}, rows)
    whole, blocks = encoder.encode_numpy(table, "user"), encoder.encode_numpy(table, "user", block=7)
    traced = tf.function(lambda **columns: encoder.encode(columns, "user"))(**table)
    np.testing.assert_array_equal(whole["tags_summary"], blocks["tags_summary"])
    np.testing.assert_array_equal(whole["tags_summary"], traced["tags_summary"])


@pytest.mark.parametrize(
    ("keep", "items", "weights", "index", "weight"),
    [
        ("first", [40], [5], [1, 0, 0], [5, 0, 0]),
        ("first", [30, 10], [2, 4], [3, 2, 0], [2, 4, 0]),
        ("first", [30, 10, 40, 10, 10], [2, 4, 1, 5, 5], [3, 2, 1], [2, 4, 1]),
        ("last", [30, 10, 40, 10, 20], [2, 4, 1, 5, 3], [1, 2, 0], [1, 5, 3]),
        ("heaviest", [30, 10, 40, 10, 20], [2, 4, 1, 5, 3], [2, 2, 0], [4, 5, 3]),
        # Of equal weights the first are kept.
        ("heaviest", [30, 10, 40, 20, 20], [1, 1, 1, 1, 1], [3, 2, 1], [1, 1, 1]),
        # Slots stay where they are while there is room; else filled ones go before empty ones.
        ("first", [30, 10, 40], [0, 4, 0], [0, 2, 0], [0, 4, 0]),
        ("first", [30, 10, 40, 40], [0, 0, 0, 9], [0, 0, 1], [0, 0, 9]),
        ("first", [30, 10, 40, 30, 10], [1, 0, 2, 0, 3], [3, 1, 2], [1, 2, 3]),
        ("last", [30, 10, 40, 30, 10], [1, 5, 2, 4, 0], [2, 1, 3], [5, 2, 4]),
        # Not a weight: an empty slot.
        ("first", [30, 10, 40], [-1, 4, NAN], [0, 2, 0], [0, 4, 0]),
        ("heaviest", [30, 10, 40, 10, 30], [INF, 4, -INF, 1, 2], [2, 2, 3], [4, 1, 2]),
        # Unknown values keep their weight.
        ("first", [99, INT64_MIN, 77, 40], [1, 2, 3, 4], [0, 0, 0], [1, 2, 3]),
        # An empty list is one "unknown".
        ("first", [], [], [0, 0, 0], [1, 0, 0]),
        ("last", [], [], [0, 0, 0], [1, 0, 0]),
        ("heaviest", [30, 10], [0, 0], [0, 0, 0], [1, 0, 0]),
        ("heaviest", [30, 10, 10, 40], [0, 0, 0, 0], [0, 0, 0], [1, 0, 0]),
        ("last", [30, 10], [-1, NAN], [0, 0, 0], [1, 0, 0]),
    ],
)
def test_lists_of_any_length(keep, items, weights, index, weight):
    recent = feature("recent", "vocabulary", "integer", length=3, keep=keep, missing=(77,))
    encoder = Encoder([recent], {"recent": [40, 10, 30]})
    table = {"recent": np.array([items] * 2, np.int64), "recent_weights": np.array([weights] * 2, np.float32)}
    traced = tf.function(
        lambda values, weights: encoder.encode({"recent": values, "recent_weights": weights}, "user"),
        input_signature=[tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None, None], tf.float32)],
    )
    for columns in (encoder.encode(table, "user"), traced(*table.values())):
        assert columns["recent"].numpy().tolist() == [index] * 2
        assert columns["recent_weights"].numpy().tolist() == [weight] * 2
        assert columns["recent"].shape == (2, 3)


def test_lists_of_every_kind():
    hashed = feature("tags", "hash", "string", bins=50, length=2)
    columns = {"tags_weights": np.array([[1, 0], [2, 3]], np.float32)}
    expected = [[1 + farm_hash("a", 50), 0], [0, 1 + farm_hash("c", 50)]]
    assert encoded(hashed, None, np.array([["a", "b"], ["", "c"]], object), **columns) == {
        "tags": expected,
        "tags_weights": [[1, 0], [2, 3]],
    }
    hours = feature("hours", "integer", "integer", bins=24, length=2)
    assert encoded(hours, None, np.array([[0, 23], [24, 5]]), hours_weights=columns["tags_weights"])["hours"] == [
        [1, 0],
        [0, 6],
    ]
    prices = feature("prices", "buckets", "number", length=2)
    values = np.array([[1, 2], [NAN, 9]], np.float32)
    assert encoded(prices, [2.0, 5.0], values, prices_weights=columns["tags_weights"])["prices"] == [[1, 0], [0, 3]]


def test_a_list_shares_a_vocabulary():
    item = feature("item", "vocabulary", "string", tower="item", out_of_vocabulary_bins=2)
    recent = dataclasses.replace(item, name="recent", tower="user", length=2, embedding="item", missing=("?",))
    encoder = Encoder([recent, item], {"item": ["b", "a"]})
    assert set(encoder.layers) == {"item"}
    table = {"recent": np.array([["a", "?"], ["x", "b"]], object), "recent_weights": np.ones((2, 2), np.float32)}
    expected = [[2, 0], [3 + farm_hash("x", 2), 1]]
    assert encoder.encode(table, "user")["recent"].numpy().tolist() == expected
    assert encoder.schema_features() == (
        Feature("recent", "user", vocabulary_size=5, length=2, embedding="item"),
        Feature("item", "item", vocabulary_size=5),
    )


# A side without features


def test_constant_item():
    encoder = Encoder([feature("hour", "integer", "integer", bins=2), EncodedFeature.constant_item()], {})
    assert encoder.raw_inputs("item") == {}
    assert encoder.encode({}, "item", rows=3)["constant_item"].numpy().tolist() == [0, 0, 0]
    assert encoder.encode_numpy({}, "item", rows=2, block=1)["constant_item"].tolist() == [0, 0]
    assert encoder.unknown("item", 2)["constant_item"].tolist() == [0, 0]
    assert encoder.unknown_raw("item", 2) == {}
    assert encoder.schema_features()[1] == Feature("constant_item", "item", vocabulary_size=1)
    assert Encoder.from_dict(json.loads(json.dumps(encoder.to_dict()))).features == encoder.features
    counted = tf.function(lambda hour: encoder.encode({}, "item", tf.shape(hour)[0]))
    assert counted(tf.zeros(4))["constant_item"].shape == (4,)
    with pytest.raises(ValueError, match=r"item side has no raw features\. Expected `rows`"):
        encoder.encode({}, "item")


# From a declaration


def test_from_declaration():
    log, items = small_log()
    declaration = {
        "format": 1,
        "source": {"time": "time"},
        "keys": {"user": "user", "item": "item"},
        "tables": {"items": {}},
        "features": {
            "user": {"tower": "user", "encode": "hash", "bins": 9, "type": "string", "unknown_rate": 0.5},
            "age": {"tower": "user", "encode": "buckets", "missing": [0, "?", -1]},
            "slot": {
                "tower": "user",
                "column": "country",
                "encode": "vocabulary",
                "values": ["de", "fr"],
                "context": True,
                "profile_value": "fr",
            },
            "seen": {"tower": "user", "embedding": "item", "length": 3, "history": {"counts": "item"}},
            "item": {
                "tower": "item",
                "encode": "vocabulary",
                "min_count": 2,
                "max_size": 7,
                "out_of_vocabulary_bins": 3,
                "missing": ["i00"],
            },
            "price": {"tower": "item", "encode": "number", "scaling": "piecewise", "boundaries": [1, 2.5]},
        },
        "tasks": {"click": {"label": "clicked"}},
    }
    dataset = Dataset.from_frame(log, declaration, items=items)
    kinds = {"age": "number", "price": "number"}
    made = [EncodedFeature.from_declaration(f, dataset, kinds.get(f.name, "string")) for f in dataset.features]
    shared = {"out_of_vocabulary_bins": 3, "min_count": 2, "max_size": 7, "missing": ("i00",)}
    assert made == [
        EncodedFeature("user", "user", "hash", "string", bins=9, unknown_rate=0.5),
        EncodedFeature("age", "user", "buckets", "number", bins=20, missing=(0.0, -1.0)),
        EncodedFeature("slot", "user", "vocabulary", "string", values=("de", "fr"), context=True, profile_value="fr"),
        EncodedFeature(
            "seen",
            "user",
            "vocabulary",
            "string",
            length=3,
            keep="heaviest",
            weighted=True,
            summary=True,
            embedding="item",
            **shared,
        ),
        EncodedFeature("item", "item", "vocabulary", "string", **shared),
        EncodedFeature("price", "item", "number", "number", scaling="piecewise", boundaries=(1.0, 2.5)),
    ]
    encoder = Encoder.fit(
        made,
        {
            "user": {name: column for f in made[:4] for name, column in f.unknown_raw(2, profile=True).items()},
            "item": {"item": texts("i01", "i02"), "price": floats(1, 2)},
        },
        {"user": np.arange(2), "item": np.arange(2)},
        {"user": np.array([1, 1]), "item": np.array([5, 1])},
    )
    assert encoder.state == {
        **{"age": [], "slot": ["de", "fr"], "seen_mean_weight": [], "seen_length": [0.0]},
        **{"item": ["i01"], "price": [1.0, 2.5]},
    }


def test_profile_values_of_context():
    slot = feature("slot", "vocabulary", "string", context=True, profile_value="top")
    tags = feature("tags", "vocabulary", "integer", length=3, context=True, profile_value=(4, 2))
    text = feature("text", "vector", "vector", width=2, context=True, profile_value=[1.0, 2.0])
    assert slot.unknown_raw(2)["slot"].tolist() == ["", ""]
    assert slot.unknown_raw(2, profile=True)["slot"].tolist() == ["top", "top"]
    raw = tags.unknown_raw(2, profile=True)
    assert raw["tags"].tolist() == [[4, 2], [4, 2]]
    assert raw["tags_weights"].tolist() == [[1, 1], [1, 1]]
    assert tags.unknown_raw()["tags_weights"].tolist() == [[0]]
    assert text.unknown_raw(2, profile=True)["text"].tolist() == [[1, 2], [1, 2]]
    assert np.isnan(text.unknown_raw(2)["text"]).all()


@pytest.mark.parametrize(
    ("column", "others", "value", "message"),
    [
        ("i", {}, "abc", "must be a whole number, as its column has. Received: 'abc'"),
        ("i", {}, 2.5, "must be a whole number, as its column has. Received: 2.5"),
        ("i", {"length": 2}, [1, "abc"], "must be a whole number, as its column has. Received: 'abc'"),
        ("s", {"length": 2}, ["a", ""], "must be a text, not empty, as its column has. Received: ''"),
    ],
)
def test_profile_values_of_another_kind(column, others, value, message):
    declared = {"tower": "user", "encode": "vocabulary", "context": True, "profile_value": value, **others}
    declaration = {"format": 1, "features": {column: declared}, "tasks": {"y": {"label": "y"}}}
    dataset = Dataset.from_frame({"i": [1], "s": ["a"], "y": [1]}, declaration)
    kind = {"i": "integer", "s": "string"}[column]
    with pytest.raises(DeclarationError) as error:
        EncodedFeature.from_declaration(dataset.features[0], dataset, kind)
    assert str(error.value) == f"data, [features.{column}]: `profile_value` {message}"


def test_an_empty_profile_value_is_unknown():
    declared = {"tower": "user", "encode": "vocabulary", "context": True, "profile_value": ""}
    declaration = {"format": 1, "features": {"s": declared}, "tasks": {"y": {"label": "y"}}}
    dataset = Dataset.from_frame({"s": ["a"], "y": [1]}, declaration)
    assert EncodedFeature.from_declaration(dataset.features[0], dataset, "string").profile_value is None


def test_declared_values_of_a_kind():
    assert as_kind([1, 2.5, True, "a", "", -1.0, "-1"], "string") == ("1", "2.5", "true", "a", "-1")
    assert as_kind([1, 2.0, 2.5, "7", "x", 2**62 + 1, 2**63, NAN, INF], "integer") == (1, 2, 7, 2**62 + 1)
    assert as_kind([1, "2.5", "x", INF, 1.0], "number") == (1.0, 2.5)


# Fitting


def test_fit_orders_vocabularies_by_entities_and_then_by_value():
    features = [
        feature("user", "vocabulary", "integer"),
        feature("city", "vocabulary", "string", missing=("?",)),
        feature("tags", "vocabulary", "string", length=2),
        feature("age", "buckets", "number"),
        feature("fixed", "vocabulary", "string", values=("b", "a")),
    ]
    table = {
        "user": np.array([5, 7, 7, INT64_MIN, 9]),
        "city": texts("Rome", "Oslo", "Oslo", "?", "Bern"),
        "tags": np.array([["War", "Drama"], ["War", "War"], ["Drama", "Art"], ["", "Drama"], ["Zoo", "Zoo"]], object),
        "tags_weights": np.array([[0, 1], [1, 1], [1, -1], [1, NAN], [1, 1]], np.float32),
        "age": floats(NAN, NAN, NAN, NAN, 30),
        "fixed": texts("x", "x", "x", "x", "x"),
    }
    encoder = Encoder.fit(features, {"user": table}, {"user": np.arange(4)})
    assert encoder.state == {
        "user": [7, 5],
        "city": ["Oslo", "Rome"],
        # Twice in one list is one entity.
        "tags": ["Drama", "War"],
        "age": [],
        "fixed": ["b", "a"],
    }
    # Order of the rows of the table does not matter.
    assert Encoder.fit(features, {"user": table}, {"user": np.array([3, 1, 0, 2])}).state == encoder.state


def test_counts_of_rows_decide_what_is_in_a_vocabulary_and_entities_its_order():
    table = {"city": texts("a", "b", "b", "c", "d")}
    rows, counts = {"user": np.arange(5)}, {"user": np.array([9, 1, 2, 2, 1])}

    def fitted(**others: int) -> list:
        return Encoder.fit([feature("city", "vocabulary", "string", **others)], {"user": table}, rows, counts).state[
            "city"
        ]

    assert fitted() == ["b", "a", "c", "d"]
    assert fitted(min_count=2) == ["b", "a", "c"]
    assert fitted(min_count=3) == ["b", "a"]
    assert fitted(max_size=1) == ["a"]
    assert fitted(max_size=2) == ["b", "a"]
    assert fitted(min_count=10) == []


def test_bounds_are_those_of_keras():
    values = np.random.default_rng(0).normal(40, 12, 500).round().astype(np.float32)
    values[::9] = NAN
    layer = keras.layers.Discretization(num_bins=7)
    layer.adapt(values[np.isfinite(values)][:, None])
    encoder = Encoder.fit(
        [feature("age", "buckets", "number", bins=7)], {"user": {"age": values}}, {"user": np.arange(500)}
    )
    assert encoder.state["age"] == np.unique(layer.bin_boundaries).tolist()
    share = np.bincount(encoder.encode_numpy({"age": values}, "user")["age"])[1:] / 444
    assert len(share) == 7
    assert share.max() < 0.25


def test_fitted_numbers():
    rows = {"user": np.arange(1, 6)}
    table = {"user": {"x": floats(1e6, 1, 3, 3, 5, NAN)}}
    assert Encoder.fit([feature("x", "number", "number")], table, rows).state == {"x": [3.0, math.sqrt(2)]}
    piecewise = feature("x", "number", "number", scaling="piecewise", bins=4)
    assert Encoder.fit([piecewise], table, rows).state == {"x": [1.0, 2.5, 3.0, 3.5, 5.0]}
    two = dataclasses.replace(piecewise, bins=2)
    assert Encoder.fit([two], table, rows).state == {"x": [1.0, 3.0, 5.0]}
    constant = Encoder.fit([piecewise], table, {"user": np.array([2, 3])})
    assert constant.state == {"x": [3.0]}
    declared = dataclasses.replace(piecewise, boundaries=(0.0, 10.0))
    assert Encoder.fit([declared], table, rows).state == {"x": [0.0, 10.0]}
    missing = feature("x", "number", "number", missing=(3.0,))
    assert Encoder.fit([missing], table, rows).state == {"x": [3.0, 2.0]}


def test_nothing_known_in_training(caplog):
    features = [
        feature("city", "vocabulary", "string"),
        feature("age", "buckets", "number"),
        feature("price", "number", "number"),
        feature("size", "number", "number", scaling="piecewise"),
    ]
    table = {"city": texts("", "Rome"), "age": floats(NAN, 3), "price": floats(NAN, 3), "size": floats(NAN, 3)}
    with caplog.at_level(logging.WARNING, "mvke_tf"):
        encoder = Encoder.fit(features, {"user": table}, {"user": np.array([0])})
    assert [record.args[0] for record in caplog.records] == ["city", "age", "price", "size"]
    assert "every value of it is unknown" in caplog.text
    columns = encoder.encode_numpy(table, "user")
    assert columns["city"].tolist() == columns["age"].tolist() == [0, 0]
    assert columns["price"].tolist() == columns["size"].tolist() == [[1, 0], [1, 0]]
    assert [f.vocabulary_size or f.width for f in encoder.schema_features()] == [1, 2, 2, 2]


# The same everywhere


@pytest.fixture(scope="module")
def rich() -> tuple[Encoder, dict[str, np.ndarray]]:
    """An encoder of every encoding, and 1,000 random raw rows: null, unseen, hashed, empty and long lists."""
    random = np.random.default_rng(0)
    n = 1_000
    words = texts("", "a", "b", "c", "n/a", "[UNK]", "ü", "unseen")
    features = [
        feature("city", "vocabulary", "string", missing=("n/a",)),
        feature("binned", "vocabulary", "string", out_of_vocabulary_bins=3),
        feature("user", "vocabulary", "integer", missing=(4,)),
        feature("device", "hash", "string", bins=17),
        feature("number_hash", "hash", "integer", bins=17),
        feature("hour", "integer", "integer", bins=24),
        feature("age", "buckets", "number", missing=(-1.0,)),
        feature("price", "number", "number"),
        feature("size", "number", "number", scaling="piecewise"),
        feature("text", "vector", "vector", width=3),
        *(feature(keep, "vocabulary", "string", length=3, keep=keep) for keep in ("first", "last", "heaviest")),
        feature("hashed_list", "hash", "integer", bins=9, length=2, keep="heaviest", weighted=True),
    ]
    state = {
        "city": ["b", "a", "[UNK]"],
        "binned": ["b", "a"],
        "user": [3, 1, -1],
        "age": [20.0, 30.0, 50.0],
        "price": [30.0, 7.0],
        "size": [0.0, 10.0, 40.0, 90.0],
        **{keep: ["a", "ü", "c"] for keep in ("first", "last", "heaviest")},
    }
    numbers = np.array([NAN, INF, -INF, -1, 0, 20, 35.5, 1e30], np.float32)
    whole = np.array([INT64_MIN, -1, 0, 1, 3, 4, 23, 24, 2**62])
    table: dict[str, np.ndarray] = {}
    for f in features:
        shape = (n, 5) if f.is_list else (n, 3) if f.raw == "vector" else (n,)
        choices = {"string": words, "integer": whole}.get(f.raw, numbers)
        table[f.name] = choices[random.integers(0, len(choices), shape)]
        if f.is_list:
            weights = np.array([0, 0, 1, 1, 0.3, 2.5, -1, NAN, INF], np.float32)[random.integers(0, 9, shape)]
            weights[::5] = 0
            table[f.name + "_weights"] = weights
    return Encoder(features, state), table


@pytest.mark.slow
def test_a_thousand_rows_are_encoded_the_same_inside_a_graph(rich, tmp_path):
    encoder, table = rich
    in_blocks = encoder.encode_numpy(table, "user", block=64)
    signature = {
        name: tf.TensorSpec([None] * rank, dtype) for name, (dtype, rank, _) in encoder.raw_inputs("user").items()
    }
    module = tf.Module()
    module.lookups = dict(encoder.layers)
    module.encode = tf.function(lambda raw: encoder.encode(raw, "user"), input_signature=[signature])
    tf.saved_model.save(module, tmp_path / "module")
    raw = {name: tf.constant(column, signature[name].dtype) for name, column in table.items()}
    loaded = tf.saved_model.load(tmp_path / "module")
    for encode in (module.encode, loaded.encode):
        columns = encode(raw)
        assert columns.keys() == in_blocks.keys()
        for name, column in columns.items():
            np.testing.assert_array_equal(column, in_blocks[name], err_msg=name)
            assert column.dtype.as_numpy_dtype == in_blocks[name].dtype
    one_by_one = [encoder.encode({name: column[i : i + 1] for name, column in table.items()}, "user") for i in range(5)]
    for name in in_blocks:
        np.testing.assert_array_equal(np.concatenate([row[name] for row in one_by_one]), in_blocks[name][:5])


def test_every_index_is_in_its_range(rich):
    encoder, table = rich
    columns = encoder.encode_numpy(table, "user")
    for one in encoder.schema_features():
        if not one.is_dense:
            assert 0 <= columns[one.name].min() <= columns[one.name].max() < one.vocabulary_size, one.name
        else:
            assert columns[one.name].shape == (1_000, one.width)
            assert np.isfinite(columns[one.name]).all()
            unknown = columns[one.name][:, 0] == 1
            assert 0 < unknown.sum() < 1_000
            assert (columns[one.name][unknown, 1:] == 0).all()
        if one.length > 1:
            weights = columns[one.name + "_weights"]
            assert (weights >= 0).all()
            assert (weights.sum(axis=1) > 0).all()
            assert (columns[one.name][weights == 0] == 0).all()


def test_no_row(rich):
    encoder, table = rich
    columns = encoder.encode_numpy({name: column[:0] for name, column in table.items()}, "user")
    for one in encoder.schema_features():
        shape = (one.width,) if one.is_dense else (one.length,) if one.length > 1 else ()
        assert columns[one.name].shape == (0, *shape)


def test_json_round_trip_encodes_identically(rich):
    encoder, table = rich
    read = Encoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert read.features == encoder.features
    assert read.to_dict() == encoder.to_dict()
    assert read.schema_features() == encoder.schema_features()
    before, after = (one.encode_numpy(table, "user") for one in (encoder, read))
    for name, column in before.items():
        np.testing.assert_array_equal(after[name], column, err_msg=name)


def test_the_schema_of_a_prepared_dataset(prepared):
    schema = Schema(prepared.encoder.schema_features(), (Task("click"),))
    assert schema.inputs("user") == (
        "user",
        "age",
        "country",
        "clicks",
        "mean_stars",
        "recent_items",
        "recent_items_weights",
        "liked_tags",
        "liked_tags_weights",
        "liked_tags_summary",
    )
    by_name = {one.name: one for one in schema.features}
    assert by_name["recent_items"].embedding == "item"
    assert by_name["recent_items"].vocabulary_size == by_name["item"].vocabulary_size
    assert by_name["mean_stars"].width == 2
    assert by_name["price"].width == 5
    assert {one.unknown_group for one in schema.features} == {None, "item"}
    for side, table in (("user", prepared.users), ("item", prepared.items)):
        assert tuple(table.encoded) == schema.inputs(side)


# Errors


def test_a_missing_column_is_named(rich):
    encoder, table = rich
    names = ("city", "last_weights")
    with pytest.raises(
        ValueError, match=r"user features \['city', 'last_weights'\] are missing\. Expected: .*Received"
    ):
        encoder.encode({name: column for name, column in table.items() if name not in names}, "user")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tower": "users"}, "`tower` must be one of"),
        ({"encode": "onehot"}, "`encode` must be one of"),
        ({"keep": "best"}, "`keep` must be one of"),
        ({"scaling": "log"}, "`scaling` must be one of"),
        ({"raw": "number"}, r"'vocabulary' reads raw values of the kinds \('string', 'integer'\). Received: 'number'"),
        ({"length": 0}, "`length` must be at least 1. Received: 0"),
        ({"encode": "hash"}, "`bins` must be at least 1. Received: 0"),
        ({"encode": "vector", "raw": "vector"}, "`width` must be at least 1. Received: 0"),
        ({"encode": "number", "raw": "number", "length": 2}, "is for single values"),
    ],
)
def test_features_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        EncodedFeature(**{"name": "x", "tower": "user", "encode": "vocabulary", "raw": "string"} | values)


def broken(change) -> dict:
    values = {
        "features": [
            {"name": "city", "tower": "user", "encode": "vocabulary", "raw": "string"},
            {"name": "age", "tower": "user", "encode": "buckets", "raw": "number"},
            {"name": "price", "tower": "user", "encode": "number", "raw": "number"},
            {"name": "user", "tower": "user", "encode": "vocabulary", "raw": "integer"},
        ],
        "state": {"city": ["a", "b"], "age": [1.0, 2.0], "price": [0.0, 1.0], "user": [1, 2]},
    }
    change(values)
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("state"), "An encoder is an object of `features` and `state`"),
        (lambda v: v.update(features=[]), "`features` must be a list, not empty"),
        (lambda v: v.update(state=[1]), "`state` must be an object of lists"),
        (lambda v: v["state"].update(city="ab"), "`state` must be an object of lists"),
        (lambda v: v["features"].append(3), "A feature of an encoder is an object"),
        (lambda v: v["features"][0].update(colour=1), "A feature of an encoder is an object"),
        (lambda v: v["features"][0].pop("raw"), "A feature of an encoder is an object"),
        (lambda v: v["features"][0].update(length="3"), "'city': `length` has the wrong type. Received: '3'"),
        (lambda v: v["features"][0].update(length=True), "'city': `length` has the wrong type. Received: True"),
        (lambda v: v["features"][0].update(missing=[1]), "'city': `missing` must have texts only. Received: 1"),
        (lambda v: v["features"][1].update(missing=["a"]), "'age': `missing` must have finite numbers only"),
        (lambda v: v["features"][0].update(encode="magic"), "`encode` must be one of"),
        (lambda v: v["features"][0].update(embedding="x"), r"must name a feature with a vocabulary, one of \['age', "),
        (lambda v: v["features"][0].update(embedding="user"), "needs its encoding and kind of values"),
        (lambda v: v["features"].append(v["features"][0]), "Every encoded feature needs another name"),
        (lambda v: v["state"].pop("age"), "needs vocabularies, bounds or moments of"),
        (lambda v: v["state"].update(size=[1]), "needs vocabularies, bounds or moments of"),
        (lambda v: v["state"].update(city=["a", 1]), "'city': the vocabulary must have texts only. Received: 1"),
        (lambda v: v["state"].update(city=["a", "a"]), "'city': the vocabulary must have each value once"),
        (lambda v: v["state"].update(city=["a", ""]), "'city': the vocabulary must have each value once, and not ''"),
        (lambda v: v["state"].update(user=[1, "a"]), "'user': the vocabulary must have finite numbers only"),
        (lambda v: v["state"].update(user=[1, 2.5]), "'user': the vocabulary must have finite numbers only"),
        (lambda v: v["state"].update(user=[1, 2**63]), "'user': the vocabulary must have finite numbers only"),
        (lambda v: v["state"].update(age=[2.0, 1.0]), "'age': bounds must increase"),
        (lambda v: v["state"].update(age=[1.0, NAN]), "'age': bounds or moments must have finite numbers only"),
        (lambda v: v["state"].update(price=[1.0]), r"'price': expected \[mean, standard deviation\]"),
        (lambda v: v["state"].update(price=[1.0, -1.0]), r"'price': expected \[mean, standard deviation\]"),
    ],
)
def test_what_is_no_encoder(change, message):
    Encoder.from_dict(broken(lambda values: None))
    with pytest.raises(DataError, match=message):
        Encoder.from_dict(broken(change))


def test_bounds_that_float32_does_not_tell_apart():
    with pytest.raises(DataError, match="'x': bounds must increase"):
        Encoder([feature("x", "number", "number", scaling="piecewise")], {"x": [1.0, 1.0 + 1e-12]})
    declared = feature("x", "number", "number", scaling="piecewise", boundaries=(1.0, 1.0 + 1e-12, 2.0))
    assert Encoder.fit([declared], {"user": {"x": floats(1)}}, {"user": np.arange(1)}).state == {"x": [1.0, 2.0]}


def test_small_dataset_replaces_values():
    assert small_dataset(**{"features.age.bins": 2}).feature("age").bins == 2
