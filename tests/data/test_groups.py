# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import polars as pl
import pytest

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.groups import Grouping, group_counts, groups
from mvke_tf.data.preparation import prepare
from mvke_tf.errors import DeclarationError
from tests.small import small_prepared

ITEMS = pl.DataFrame(
    {
        "item": ["a", "b", "c", "d", "e", "f"],
        "tags": [["x", "y"], ["y"], [], ["z", "x"], ["y"], None],
        "kind": ["new", "old", "new", None, "new", "other"],
        "shelf": [2, 10, 2, 1, None, 10],
        "year": [1989, 1990, 1999, 2000, None, 2015],
        "price": [0.5, 1.5, 2.5, 2.5, 10.0, None],
    }
)
FEATURES = {
    "item": {"tower": "item", "encode": "vocabulary"},
    "tags": {"tower": "item", "encode": "vocabulary", "length": 2},
    "kind": {"tower": "item", "encode": "vocabulary"},
    "shelf": {"tower": "item", "encode": "integer", "bins": 20},
    "year": {"tower": "item", "encode": "buckets", "bins": 3},
    "price": {"tower": "item", "encode": "number"},
    "vector": {"tower": "user", "encode": "vector", "width": 2},
    "age": {"tower": "user", "encode": "buckets", "bins": 3},
    "recent": {"tower": "user", "embedding": "item", "length": 3, "history": {"last": "item"}},
    "user": {"tower": "user", "encode": "hash", "bins": 9},
}


def made(declared: dict | None, items: pl.DataFrame = ITEMS) -> dict[str, Grouping]:
    """Groups of a small dataset, by name."""
    log = pl.DataFrame(
        {
            "user": [1, 1, 2, 2, 3, 3],
            "item": ["a", "b", "c", "d", "e", "f"],
            "time": [1, 2, 3, 4, 5, 6],
            "vector": [[1.0, 2.0]] * 6,
            "age": [0, 0, 17, 17, 30, 30],
            "click": [0, 1, 0, 1, 0, 1],
        }
    )
    declaration = {
        "format": 1,
        "source": {"time": "time"},
        "keys": {"user": "user", "item": "item"},
        "tables": {"items": {}},
        "split": {"by": "time", "validation": 5, "test": 6},
        "features": FEATURES,
        "tasks": {"click": {"label": "click"}},
    }
    if declared is not None:
        declaration["groups"] = declared
    return {one.variable: one for one in groups(prepare(Dataset.from_frame(log, declaration, items=items)))}


def members(grouping: Grouping) -> dict[str, list[int]]:
    """Rows of each group."""
    return {
        name: np.flatnonzero(column).tolist() for name, column in zip(grouping.groups, grouping.members.T, strict=True)
    }


def test_automatic_groups():
    found = made(None)
    # Neither ids nor vectors nor lists of earlier items.
    assert list(found) == ["tags", "kind", "shelf", "year", "price", "age"]
    assert {name: one.side for name, one in found.items()} == {
        "tags": "item",
        "kind": "item",
        "shelf": "item",
        "year": "item",
        "price": "item",
        "age": "user",
    }
    assert members(found["tags"]) == {"x": [0, 3], "y": [0, 1, 4], "z": [3], "unknown": [2, 5]}
    assert members(found["kind"]) == {"new": [0, 2, 4], "old": [1], "other": [5], "unknown": [3]}
    # Numbers in the order of numbers.
    assert members(found["shelf"]) == {"1": [3], "2": [0, 2], "10": [1, 5], "unknown": [4]}
    assert members(found["year"]) == {"1989 to 1990": [0, 1], "1999": [2], "2000": [3], "2015": [5], "unknown": [4]}
    assert members(found["price"]) == {"0.5 to 1.5": [0, 1], "2.5": [2, 3], "10": [4], "unknown": [5]}
    assert members(found["age"]) == {"0": [0, 1], "17": [2, 3], "30": [4, 5]}
    assert found["age"].description == "age"


def test_features_of_many_values_or_one_make_no_automatic_groups():
    many = ITEMS.with_columns(kind=pl.lit("same"), shelf=pl.Series([3] * 6))
    assert list(made(None, many)) == ["tags", "year", "price", "age"]
    assert made({}) == {}
    grouping = made({"kinds": {"feature": "kind"}}, many)["kinds"]
    assert members(grouping) == {"same": [0, 1, 2, 3, 4, 5]}


def test_bounds():
    found = made(
        {
            "age": {"feature": "age", "bounds": [18, 25], "title": "age of the user (years)"},
            "count": {"feature": "age", "bounds": [1, 18]},
            "price": {"feature": "price", "bounds": [1.5, 2.5]},
            "band": {"feature": "shelf", "bounds": [2, 3, 10]},
        }
    )
    assert found["age"].description == "age of the user (years)"
    assert members(found["age"]) == {"below 18": [0, 1, 2, 3], "18 to 24": [], "25 and more": [4, 5]}
    assert members(found["count"]) == {"0": [0, 1], "1 to 17": [2, 3], "18 and more": [4, 5]}
    assert members(found["price"]) == {
        "below 1.5": [0],
        "1.5 to below 2.5": [1],
        "2.5 and more": [2, 3, 4],
        "unknown": [5],
    }
    assert members(found["band"]) == {"below 2": [3], "2": [0, 2], "3 to 9": [], "10 and more": [1, 5], "unknown": [4]}


def test_step():
    found = made(
        {
            "decade": {"feature": "year", "step": 10},
            "price": {"feature": "price", "step": 0.5},
            "fine": {"feature": "shelf", "step": 1},
        }
    )
    assert members(found["decade"]) == {
        "1980 to 1989": [0],
        "1990 to 1999": [1, 2],
        "2000 to 2009": [3],
        "2010 to 2019": [5],
        "unknown": [4],
    }
    assert members(found["price"]) == {
        "0.5 to below 1": [0],
        "1.5 to below 2": [1],
        "2.5 to below 3": [2, 3],
        "10 to below 10.5": [4],
        "unknown": [5],
    }
    assert list(members(found["fine"])) == ["1", "2", "10", "unknown"]


def test_a_step_of_tenths_keeps_bounds_in_their_band():
    items = ITEMS.with_columns(price=pl.Series([0.1, 0.3, 0.6, 0.7, 1.1, 1.15]))
    found = made({"price": {"feature": "price", "step": 0.1}}, items)["price"]
    assert [len(rows) for rows in members(found).values()] == [1, 1, 1, 1, 2]
    assert found.groups[1].startswith("0.3 to below 0.4")


def test_a_step_too_small_for_numbers():
    with pytest.raises(DeclarationError, match=r"numbers that are too large"):
        made({"x": {"feature": "price", "step": 1e-308}}, ITEMS.with_columns(price=pl.lit(10.0) ** 6))


def test_too_many_bands():
    items = ITEMS.with_columns(year=pl.Series([1, 2, 3, 4, 5, 10**6]))
    assert len(made({"x": {"feature": "year", "step": 0.001}}, items)["x"].groups) == 6
    many = small_prepared(**{"groups": {"t": {"feature": "price", "step": 1.0}}})
    raw = np.arange(1_001, dtype=np.float32)
    many.items = dataclasses.replace(many.items, key=raw, encoded={}, raw={"price": raw}, name=None)
    with pytest.raises(
        DeclarationError, match=r"small, \[groups\.t\]: .*at most 1,000 bands.*from 0 to 1000.*makes 1,001"
    ):
        groups(many)


def test_quantiles():
    found = made({"two": {"feature": "price", "quantiles": 2}, "shelf": {"feature": "shelf", "quantiles": 2}})
    assert members(found["two"]) == {"0.5 to 2.5": [0, 1, 2, 3], "10": [4], "unknown": [5]}
    assert members(found["shelf"]) == {"1 to 2": [0, 2, 3], "10": [1, 5], "unknown": [4]}
    close = ITEMS.with_columns(price=pl.Series([1.00001, 1.00002, 1.00003, 1.00004, 1.00005, 1.00006]))
    # With as many digits as tell the bands apart.
    assert made({"p": {"feature": "price", "quantiles": 3}}, close)["p"].groups == (
        "1.00001 to 1.00002",
        "1.00003 to 1.00004",
        "1.00005 to 1.00006",
    )


def test_values_and_top():
    found = made(
        {
            "kind": {"feature": "kind", "values": ["old", "new", "gone"]},
            "tags": {"feature": "tags", "top": 1},
            "one": {"feature": "kind", "values": ["other"]},
            "shelf": {"feature": "shelf", "values": [10, 2]},
            "price": {"feature": "price", "values": [2.5]},
            "top": {"feature": "price", "top": 1},
        }
    )
    assert members(found["kind"]) == {"old": [1], "new": [0, 2, 4], "gone": [], "other": [5], "unknown": [3]}
    # An item is in "other", too, if it has another tag.
    assert members(found["tags"]) == {"y": [0, 1, 4], "other": [0, 3], "unknown": [2, 5]}
    assert members(found["one"]) == {"other": [5], "all others": [0, 1, 2, 4], "unknown": [3]}
    assert members(found["shelf"]) == {"10": [1, 5], "2": [0, 2], "other": [3], "unknown": [4]}
    assert members(found["price"]) == {"2.5": [2, 3], "other": [0, 1, 4], "unknown": [5]}
    assert members(found["top"]) == {"2.5": [2, 3], "other": [0, 1, 4], "unknown": [5]}


def test_the_top_of_many_values():
    """Of more than 30 values the 20 most frequent, then the others."""
    prepared = small_prepared(**{"groups": {"shown": {"feature": "item"}}})
    assert len(groups(prepared)[0].groups) == 30
    words = np.array([f"w{number:02d}" for number in range(40)], object)
    raw = np.repeat(words, np.where(np.arange(40) >= 35, 3, 1))
    prepared.items = dataclasses.replace(prepared.items, key=raw, encoded={}, raw={"item": raw}, name=None)
    (grouping,) = groups(prepared)
    assert grouping.groups[:7] == ("w35", "w36", "w37", "w38", "w39", "w00", "w01")
    assert len(grouping.groups) == 21
    assert grouping.groups[-1] == "other"
    assert grouping.members.sum(axis=0).tolist() == [3] * 5 + [1] * 15 + [20]


def test_a_value_that_is_called_unknown():
    items = ITEMS.with_columns(kind=pl.Series(["new", "unknown", None, "new", "new", "new"]))
    assert members(made({"kind": {"feature": "kind"}}, items)["kind"]) == {"new": [0, 3, 4, 5], "unknown": [1, 2]}


def test_missing_values_are_unknown():
    prepared = small_prepared(**{"features.country.missing": ["fr"], "features.price.missing": [2.0]})
    by_name = {one.variable: one for one in groups(prepared)}
    assert by_name["country"].groups == ("de", "us", "unknown")
    prices = {one.variable: one for one in groups(small_prepared(**{"features.price.missing": [2.0], "groups": None}))}
    assert prices["price"].members[:, -1].sum() == 2


def test_values_of_a_number_are_compared_as_it_is_stored():
    items = ITEMS.with_columns(price=pl.Series([0.1, 0.7, 0.1, None, 2.0, 0.3]))
    found = made({"price": {"feature": "price", "values": [0.1, 2, 0.3, 9.5]}}, items)["price"]
    assert members(found) == {"0.1": [0, 2], "2": [4], "0.3": [5], "9.5": [], "other": [1], "unknown": [3]}


@pytest.mark.parametrize(
    ("feature", "values", "message"),
    [
        ("shelf", [2, "a"], r"`values` of the feature 'shelf' must be whole numbers\. Received: 'a'"),
        ("shelf", [2, 2.5], r"`values` of the feature 'shelf' must be whole numbers\. Received: 2\.5"),
        ("price", [0.5, "dear"], r"`values` of the feature 'price' must be numbers\. Received: 'dear'"),
        ("kind", ["new", ""], r"`values` of the feature 'kind' must be texts, not empty\. Received: ''"),
    ],
)
def test_values_of_another_kind(feature, values, message):
    with pytest.raises(DeclarationError, match=rf"\[groups\.of\]: {message}"):
        made({"of": {"feature": feature, "values": values}})


def test_bands_of_texts():
    with pytest.raises(DeclarationError, match=r"\[groups\.kind\]: bands need a number, and the values of 'kind' are"):
        made({"kind": {"feature": "kind", "step": 1}})


def test_nothing_is_known():
    items = ITEMS.with_columns(
        kind=pl.lit(None, pl.String), price=pl.lit(None, pl.Float64), year=pl.lit(None, pl.Float64)
    )
    found = made(
        {
            "kind": {"feature": "kind"},
            "price": {"feature": "price", "step": 1},
            "year": {"feature": "year", "quantiles": 2},
        },
        items,
    )
    assert [members(one) for one in found.values()] == [{"unknown": [0, 1, 2, 3, 4, 5]}] * 3
    assert not {"kind", "price", "year"} & set(made(None, items))


def test_the_small_dataset():
    prepared = small_prepared()
    tags, age, country = groups(prepared)
    assert (tags.variable, tags.side, tags.description) == ("tags", "item", "tag of the item")
    assert tags.members.shape == (len(prepared.items), 6)
    assert age.groups == ("below 25", "25 to 34", "35 to 44", "45 and more", "unknown")
    assert age.members.shape == (len(prepared.users), 5)
    assert (age.members.sum(axis=1) == 1).all()
    assert country.groups == ("de", "fr", "us", "unknown")
    np.testing.assert_array_equal(country.members[:, 3], prepared.users.key == 4)


def test_of_labels():
    grouping = Grouping.of_labels("colour", "user", ["red", "blue", "red"])
    assert members(grouping) == {"blue": [1], "red": [0, 2]}
    assert grouping.description == "colour"
    ordered = Grouping.of_labels("colour", "item", ["red", "blue"], ["red", "green", "blue"], "colour of the item")
    assert members(ordered) == {"red": [0], "green": [], "blue": [1]}
    assert ordered.description == "colour of the item"


def test_group_counts():
    inside = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], bool)
    assert group_counts(inside, np.array([2, 0, 0, 2]), 4).tolist() == [[1, 0, 2, 0], [2, 0, 0, 0]]
    assert group_counts(np.zeros((3, 0), bool), np.arange(3), 4).shape == (0, 4)


def test_errors():
    with pytest.raises(ValueError, match=r"'x': `side` must be one of .*Received: 'users'"):
        Grouping("x", "users", ("a",), np.ones((2, 1), bool))
    with pytest.raises(ValueError, match=r"`members` must be \(rows, 1\)\. Received: \(2, 2\)"):
        Grouping("x", "user", ("a",), np.ones((2, 2), bool))
