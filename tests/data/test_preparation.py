# SPDX-License-Identifier: Apache-2.0
"""From small logs, worked out by hand, to prepared datasets."""

import copy
import logging
import math
import os
import socket
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mvke_tf.data.check import check
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import describe, prepare, prepared_dataset
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import DataError, DeclarationError, MvkeError
from tests.small import small_toml

NAN = math.nan
UNKNOWN = -(2**63)

# In the order of time: ann 10, bob 20, ann 20, ann 30, bob 40; the file has another order.
LOG = {
    "user": ["bob", "ann", "ann", "ann", "bob"],
    "item": [3, 1, 2, 1, 2],
    "at": [40, 10, 20, 30, 20],
    "hour": [4, 1, 2, 3, 2],
    "click": [1, 0, 1, 0, None],
    "spent": [8.0, None, 3.0, 0.0, 1.0],
    "importance": [1.0, 2.0, 0.5, 1.0, 1.0],
}
USERS = {"user": ["ann", "bob", "eve"], "age": [30.0, None, 50.0]}
ITEMS = {"item": [4, 3, 2, 1], "title": ["D", "C", None, "A"], "tags": [["x"], ["y", "x"], None, ["x", "z"]]}

DECLARATION = {
    "format": 1,
    "name": "shop",
    "source": {"time": "at"},
    "keys": {"user": "user", "item": "item", "item_name": "title"},
    "tables": {"users": {}, "items": {}},
    "split": {"by": "time", "validation": 30, "test": 40},
    "features": {
        "user": {"tower": "user", "encode": "vocabulary"},
        "age": {"tower": "user", "encode": "number"},
        "hour": {"tower": "user", "encode": "integer", "bins": 24, "context": True, "profile_value": 12},
        "seen": {
            "tower": "user",
            "embedding": "item",
            "length": 3,
            "history": {"last": "item", "weights": "importance"},
        },
        "tags_seen": {"tower": "user", "embedding": "tags", "length": 2, "history": {"counts": "tags"}},
        "clicks": {"tower": "user", "encode": "number", "history": {"count": True, "where": "click"}},
        "click_rate": {"tower": "user", "encode": "number", "history": {"share": "click"}},
        "mean_spent": {"tower": "user", "encode": "number", "history": {"mean": "spent"}},
        "idle": {"tower": "user", "encode": "number", "history": {"since": True, "within": "15s"}},
        "item": {"tower": "item", "encode": "vocabulary"},
        "tags": {"tower": "item", "encode": "vocabulary", "length": 2},
        "shown": {"tower": "item", "encode": "number", "statistic": {"count": True}},
        "rate": {"tower": "item", "encode": "number", "statistic": {"share": "click"}},
    },
    "tasks": {
        "click": {"label": "click"},
        "buy": {"label": "spent > 2", "given": "click", "weight": "importance"},
        "spent": {"kind": "regression", "label": "spent", "where": "click", "transform": "log1p", "domain": [0, 10]},
    },
}


def shop(log=None, users=USERS, items=ITEMS, changes=None, **parts) -> Dataset:
    """The declaration above with other tables; `changes` are dotted keys, None takes one out."""
    values = copy.deepcopy(DECLARATION) | parts
    for dotted, value in (changes or {}).items():
        *parents, key = dotted.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return Dataset.from_frame(LOG if log is None else LOG | log, values, users, items)


def only(*features: str) -> dict:
    """Changes that take out all features but these."""
    return {f"features.{name}": None for name in DECLARATION["features"] if name not in features}


@pytest.fixture(scope="module")
def prepared() -> PreparedDataset:
    return prepare(shop())


def assert_columns(raw, expected: dict) -> None:
    for name, column in expected.items():
        np.testing.assert_array_equal(np.asarray(raw[name]), np.asarray(column, raw[name].dtype), err_msg=name)


def test_rows_are_in_the_order_of_time_user_and_item(prepared):
    assert (prepared.time / 1000).tolist() == [10, 20, 20, 30, 40]
    assert prepared.users.key[prepared.user_row].tolist() == ["ann", "ann", "bob", "ann", "bob"]
    assert prepared.items.key[prepared.item_row].tolist() == [1, 2, 2, 1, 3]
    assert prepared.split.tolist() == [0, 0, 0, 1, 2]
    assert not prepared.sampled.any()


def test_labels_and_weights(prepared):
    assert prepared.label("click").tolist() == [0, 1, 0, 0, 1]
    assert prepared.weight("click").tolist() == [1, 1, 0, 1, 1]
    # Of the first row nothing is known; the others have the weights of their column.
    assert prepared.label("buy").tolist() == [0, 1, 0, 0, 1]
    assert prepared.weight("buy").tolist() == [0, 0.5, 1, 1, 1]
    np.testing.assert_allclose(prepared.label("spent"), [0, np.log1p(3), 0, 0, np.log1p(8)], rtol=1e-6)
    assert prepared.weight("spent").tolist() == [0, 1, 0, 0, 1]
    assert prepared.offsets == {"spent": round(np.log1p(3), 4)}


def test_users(prepared):
    assert prepared.users.key.tolist() == ["ann", "ann", "ann", "bob", "bob"]
    assert (prepared.users.time / 1000).tolist() == [10, 20, 30, 20, 40]
    assert_columns(
        prepared.users.raw,
        {
            "user": ["ann", "ann", "ann", "bob", "bob"],
            "age": [30, 30, 30, NAN, NAN],
            "hour": [1, 2, 3, 2, 4],
            "seen": [[UNKNOWN] * 3, [1, UNKNOWN, UNKNOWN], [2, 1, UNKNOWN], [UNKNOWN] * 3, [2, UNKNOWN, UNKNOWN]],
            "seen_weights": [[0, 0, 0], [2, 0, 0], [0.5, 2, 0], [0, 0, 0], [1, 0, 0]],
            # Item 1 has the tags x and z, item 2 none.
            "tags_seen": [["", ""], ["x", "z"], ["x", "z"], ["", ""], ["", ""]],
            "tags_seen_weights": [[0, 0], [1, 1], [1, 1], [0, 0], [0, 0]],
            "clicks": [0, 0, 1, 0, 0],
            # Bob's first row says nothing of clicks.
            "click_rate": [NAN, 0, 0.5, NAN, NAN],
            "mean_spent": [NAN, NAN, 3, NAN, 1],
            "idle": [NAN, 10, 10, NAN, NAN],
        },
    )


def test_latest_users(prepared):
    latest = prepared.latest_users
    assert latest.key.tolist() == ["ann", "bob"]
    assert (latest.time / 1000).tolist() == [30, 40]
    assert_columns(
        latest.raw,
        {
            "user": ["ann", "bob"],
            "age": [30, NAN],
            "hour": [12, 12],
            "seen": [[1, 2, 1], [3, 2, UNKNOWN]],
            "seen_weights": [[1, 0.5, 2], [1, 1, 0]],
            "tags_seen": [["x", "z"], ["x", "y"]],
            "tags_seen_weights": [[2, 2], [1, 1]],
            "clicks": [1, 1],
            "click_rate": np.float32([1 / 3, 1]),
            "mean_spent": [1.5, 4.5],
            "idle": [0, 0],
        },
    )


def test_items(prepared):
    assert prepared.items.key.tolist() == [1, 2, 3, 4]
    assert prepared.items.name.tolist() == ["A", "2", "C", "D"]
    assert prepared.items.time is None
    assert prepared.catalogue.tolist() == [0, 1, 2, 3]
    assert_columns(
        prepared.items.raw,
        {
            "item": [1, 2, 3, 4],
            "tags": [["x", "z"], ["", ""], ["y", "x"], ["x", ""]],
            "tags_weights": [[1, 1], [0, 0], [1, 1], [1, 0]],
            # The training part: item 1 once, item 2 twice.
            "shown": [1, 2, NAN, NAN],
            "rate": [0, 1, NAN, NAN],
        },
    )


def test_vocabularies_are_those_of_the_training_part(prepared):
    assert prepared.encoder.state["user"] == ["ann", "bob"]
    assert prepared.encoder.state["item"] == [1, 2]
    assert prepared.encoder.state["tags"] == ["x", "z"]
    assert prepared.items.encoded["item"].tolist() == [1, 2, 0, 0]
    assert prepared.items.encoded["tags"].tolist() == [[1, 2], [0, 0], [0, 1], [1, 0]]
    assert prepared.users.encoded["seen"].tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 0], [0, 0, 0], [2, 0, 0]]


def test_known_and_description(prepared):
    assert prepared.known("user").all()
    assert prepared.known("item").tolist() == [True, True, False, False]
    lines = [line.split("  ") for line in describe(prepared).splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["part", "rows", "positive click", "positive buy", "mean spent", "new users", "new items"],
        ["train", "3", "1", "1", "1.386", "0.0%", "0.0%"],
        ["validation", "1", "0", "0", "none", "0.0%", "0.0%"],
        ["test", "1", "1", "1", "2.197", "0.0%", "100.0%"],
    ]


def test_the_same_from_csv(prepared, tmp_path):
    pl.DataFrame(LOG).write_csv(tmp_path / "log.csv")
    pl.DataFrame(USERS).write_csv(tmp_path / "users.csv")
    tags = ["|".join(tags or []) for tags in ITEMS["tags"]]
    pl.DataFrame(ITEMS | {"tags": tags}).write_csv(tmp_path / "items.csv")
    values = copy.deepcopy(DECLARATION)
    values["source"]["path"] = "log.csv"
    values["tables"] = {"users": {"path": "users.csv"}, "items": {"path": "items.csv"}}
    again = prepare(Dataset.from_dict(values, tmp_path))
    for name in ("users", "items", "latest_users"):
        for kind in ("raw", "encoded"):
            assert_columns(getattr(getattr(again, name), kind), getattr(getattr(prepared, name), kind))
    for task in prepared.dataset.task_names:
        assert again.label(task).tolist() == prepared.label(task).tolist()
        assert again.weight(task).tolist() == prepared.weight(task).tolist()
    assert again.user_row.tolist() == prepared.user_row.tolist()
    assert again.item_row.tolist() == prepared.item_row.tolist()


def test_order_of_the_log_does_not_matter(prepared):
    order = [4, 2, 0, 3, 1]
    again = prepare(shop({name: [column[row] for row in order] for name, column in LOG.items()}))
    assert_columns(again.users.raw, prepared.users.raw)
    assert again.label("click").tolist() == prepared.label("click").tolist()
    assert again.item_row.tolist() == prepared.item_row.tolist()


# Entities


def test_states_without_histories_are_distinct_combinations():
    declared = shop({"hour": [2, 1, 2, 1, 2]}, changes=only("user", "age", "hour", "item", "tags"))
    users = prepare(declared).users
    assert users.time is None
    assert users.key.tolist() == ["ann", "ann", "bob"]
    assert users.raw["hour"].tolist() == [1, 2, 2]


def test_features_of_users_in_the_log():
    # Ann's plan is unknown in her last row: her latest state has the plan that was said last.
    log = {"plan": ["free", "pro", "max", None, None]}
    declared = shop(
        log, changes=only("user", "item", "tags") | {"features.plan": {"tower": "user", "encode": "vocabulary"}}
    )
    made = prepare(declared)
    assert made.users.raw["plan"][made.user_row].tolist() == ["pro", "max", "", "", "free"]
    assert made.latest_users.raw["plan"].tolist() == ["max", "free"]


def test_features_of_items_in_the_log():
    # Item 1: rows at 10 (training) and 30; item 2: two rows of training at 20; item 3: one row of the test part.
    log = {"price": [9.0, 1.0, 2.0, 5.0, None]}
    changes = only("user", "item") | {"features.price": {"tower": "item", "encode": "number"}, "keys.item_name": None}
    items = {"item": [1, 2, 3, 4]}
    made = prepare(shop(log, items=items, changes=changes))
    assert_columns(made.items.raw, {"price": [1, 2, 9, NAN]})
    # Nothing known in training: the first row, even if later ones know more.
    log = {"price": [9.0, None, 2.0, 5.0, None]}
    assert_columns(prepare(shop(log, items=items, changes=changes)).items.raw, {"price": [NAN, 2, 9, NAN]})


def test_nothing_is_known_from_the_log_of_an_item_that_is_drawn_before_its_first_row():
    # Item 3 of the side table has its first row, with its price, at 40.
    log = {"price": [9.0, 1.0, 2.0, 5.0, 3.0]}
    changes = only("user", "item") | {"features.price": {"tower": "item", "encode": "number"}, "keys.item_name": None}
    made = prepare(shop(log, changes=changes, negatives={"kind": "uniform", "per_positive": 20}))
    drawn = made.items.key[made.item_row] == 3
    early = made.time < 40000
    assert (drawn & early).any()
    assert np.isnan(made.items.raw["price"][made.item_row[drawn & early]]).all()
    assert made.items.raw["price"][made.item_row[drawn & ~early]].tolist() == [9]
    # Item 4 has no row, and one state like the items of the training part.
    assert made.items.key.tolist() == [1, 2, 3, 3, 4]
    assert_columns(made.items.raw, {"price": [1, 3, NAN, 9, NAN]})
    assert made.catalogue.tolist() == [0, 1, 3, 4]


def test_without_user_keys_each_row_is_a_user():
    changes = only("hour", "item", "tags") | {"keys.user": None, "tables.users": None}
    made = prepare(shop(users=None, changes=changes))
    assert not made.has_users
    assert made.users.key.tolist() == [0, 1, 2, 3, 4]
    # Rows of the file in the order of time: 1, then 2 and 4, then 3, then 0.
    assert made.user_row.tolist() == [1, 2, 4, 3, 0]
    assert made.users.raw["hour"].tolist() == LOG["hour"]
    assert made.latest_users.raw["hour"].tolist() == [12] * 5


def test_without_item_keys_items_are_distinct_combinations():
    changes = only("user") | {
        "keys.item": None,
        "keys.item_name": None,
        "tables.items": None,
        "features.hour": {"tower": "item", "encode": "vocabulary"},
    }
    made = prepare(shop({"hour": [2, 1, 2, 1, 2]}, items=None, changes=changes))
    assert not made.has_items
    assert made.items.raw["hour"].tolist() == [1, 2]
    assert made.item_row.tolist() == [0, 1, 1, 0, 1]


def test_without_item_features_there_is_one_constant_item():
    changes = only("user", "hour") | {"keys.item": None, "keys.item_name": None, "tables.items": None}
    made = prepare(shop(items=None, changes=changes))
    assert len(made.items) == 1
    assert made.item_row.tolist() == [0] * 5
    assert {name: column.tolist() for name, column in made.items.encoded.items()} == {"constant_item": [0]}
    assert made.catalogue.tolist() == [0]


def test_keys_that_are_not_in_a_side_table(caplog):
    made = prepare(shop(users={"user": ["bob"], "age": [40.0]}, items={k: v[:2] for k, v in ITEMS.items()}))
    assert_columns(made.latest_users.raw, {"user": ["ann", "bob"], "age": [NAN, 40]})
    assert made.items.key.tolist() == [1, 2, 3, 4]
    # An item that only the log has keeps its id.
    assert made.items.raw["item"].tolist() == [1, 2, 3, 4]
    assert made.items.raw["tags_weights"].tolist() == [[0, 0], [0, 0], [1, 1], [1, 0]]
    assert "1 of the 2 users of the log are not in the frame 'users'" in caplog.text
    assert "2 of the 3 items of the log are not in the frame 'items'" in caplog.text


def test_keys_of_different_types_meet():
    # Texts in the side table, whole numbers in the log.
    items = ITEMS | {"item": ["4", "3", "2", "one"]}
    made = prepare(shop(items=items, changes={"features.item.type": "string"}))
    assert made.items.key.tolist() == ["1", "2", "3", "4", "one"]
    made = prepare(shop(items=ITEMS | {"item": ["4", "3", "2", "1"]}, changes={"features.item.type": "integer"}))
    assert made.items.key.tolist() == [1, 2, 3, 4]


def test_lists_are_cut_as_they_are_kept():
    lists = [["a", "b", "c"], ["b"], [], None, ["c", "b", "a"]]
    weights = [[1.0, 3.0, 2.0], [0.0], [], None, [1.0, 1.0, 0.5]]
    for keep, expected, expected_weights in (
        ("first", ["a", "b"], [1, 3]),
        ("last", ["b", "c"], [3, 2]),
        ("heaviest", ["b", "c"], [3, 2]),
    ):
        feature = {"tower": "user", "encode": "vocabulary", "length": 2, "keep": keep, "weights": "tag_weights"}
        changes = only("item", "tags", "user") | {"features.liked": feature | {"column": "likes"}}
        made = prepare(shop({"likes": lists, "tag_weights": weights}, changes=changes))
        raw = {name: made.users.raw[name][made.user_row] for name in ("liked", "liked_weights")}
        assert raw["liked"][4].tolist() == expected
        assert raw["liked_weights"][4].tolist() == expected_weights
        # A weight of 0 is an empty slot.
        assert raw["liked_weights"][0].tolist() == [0, 0]
        assert raw["liked"][0].tolist() == ["", ""]


def test_words_for_missing():
    changes = only("user", "item", "tags", "hour") | {"features.hour.missing": [2], "features.user.missing": ["ann"]}
    made = prepare(shop(changes=changes))
    assert made.users.raw["hour"][made.user_row].tolist() == [1, UNKNOWN, UNKNOWN, 3, 4]
    assert made.latest_users.raw["user"].tolist() == ["", "bob"]
    assert made.latest_users.key.tolist() == ["ann", "bob"]


# Statistics at a point in time


def moving(**statistic) -> dict:
    return only("user", "item", "tags") | {
        "features.s": {"tower": "item", "encode": "number", "statistic": {"until": "row"} | statistic}
    }


def of_interactions(made: PreparedDataset) -> np.ndarray:
    return made.items.raw["s"][made.item_row]


def test_statistics_strictly_before_each_row():
    made = prepare(shop(changes=moving(count=True)))
    # Items 1, 2, 2, 1, 3 at 10, 20, 20, 30, 40.
    np.testing.assert_array_equal(of_interactions(made), np.float32([NAN, NAN, NAN, 1, NAN]))
    assert made.items.key.tolist() == [1, 1, 1, 2, 2, 3, 3, 4]
    assert made.items.key[made.catalogue].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(made.items.raw["s"][made.catalogue], np.float32([2, 2, 1, NAN]))
    assert (made.items.time / 1000).tolist() == [10, 30, 40, 20, 40, 40, 40, 40]
    # All states of an item have its other features.
    assert made.items.raw["tags_weights"][:3].tolist() == [[1, 1]] * 3
    assert made.known("item").tolist() == [True] * 5 + [False] * 3

    made = prepare(shop(changes=moving(mean="spent", where="hour < 4")))
    np.testing.assert_array_equal(of_interactions(made), np.float32([NAN, NAN, NAN, NAN, NAN]))
    np.testing.assert_array_equal(made.items.raw["s"][made.catalogue], np.float32([0, 2, NAN, NAN]))


def test_statistics_that_change_only_so_often():
    log = {"item": [1, 1, 1, 1, 1], "at": [40, 10, 19, 30, 25]}
    made = prepare(shop(log, changes=moving(count=True, every="15s")))
    # Moments 10, 19, 25, 30, 40 see what was known at 10, 10, 25, 25, 40.
    np.testing.assert_array_equal(of_interactions(made), np.float32([NAN, NAN, 2, 2, 4]))
    assert (made.items.key == 1).sum() == 4
    np.testing.assert_array_equal(made.items.raw["s"][made.catalogue], np.float32([5, NAN, NAN, NAN]))


def test_statistics_with_a_half_life():
    log = {"item": [1] * 5, "at": [40, 10, 20, 30, 20], "click": [1, 0, 1, 0, None]}
    made = prepare(shop(log, changes=moving(count=True, half_life="10s")))
    np.testing.assert_array_equal(of_interactions(made), np.float32([NAN, 0.5, 0.5, 1.25, 1.125]))
    np.testing.assert_array_equal(made.items.raw["s"][made.catalogue], np.float32([2.125, NAN, NAN, NAN]))
    made = prepare(shop(log, changes=moving(share="click", half_life="10s")))
    # Rows at 10 (0), 20 (1) and 30 (0) count 1/8, 1/4 and 1/2 at 40.
    expected = np.float32([NAN, 0, 0, 0.5 / 0.75, 0.25 / 0.875])
    np.testing.assert_allclose(of_interactions(made), expected, rtol=1e-6)


def test_frozen_statistics_with_a_half_life():
    changes = {"features.shown.statistic": {"count": True, "half_life": "10s"}}
    # The training part ends at 20: its row at 10 counts half.
    assert_columns(prepare(shop(changes=changes)).items.raw, {"shown": [0.5, 2, NAN, NAN]})


# Conditions


@pytest.mark.parametrize(
    ("label", "cells", "expected"),
    [
        ("x", ["1", "0", "true", "FALSE", ""], [0, 1, 0, 0, 1]),
        ("x >= 4", ["4", "3.5", "10", "", "0"], [0, 1, 0, 0, 1]),
        ("x = 'yes'", ["yes", "no", "yes", "", "no"], [0, 1, 0, 0, 1]),
        ("x = '01'", ["01", "1", "01", "2", "3"], [0, 1, 0, 0, 1]),
        ("x in ('yes', 'y')", ["y", "no", "yes", "no", "no"], [0, 1, 0, 0, 1]),
        ("x > 1 and hour < 9", ["2", "1", "2", "1", "0"], [0, 1, 0, 0, 1]),
        ("x is not null", ["a", "", "b", "", ""], [0, 1, 0, 0, 1]),
    ],
)
def test_conditions_on_the_cells_of_a_csv(tmp_path, label, cells, expected):
    pl.DataFrame(LOG | {"x": cells}).write_csv(tmp_path / "log.csv")
    values = copy.deepcopy(DECLARATION)
    values |= {
        "tables": {},
        "tasks": {"t": {"label": label}},
        "features": {"hour": {"tower": "user", "encode": "number"}},
    }
    values["source"]["path"] = "log.csv"
    values["keys"] = {"user": "user"}
    made = prepare(Dataset.from_dict(values, tmp_path))
    assert made.label("t").tolist() == expected


def test_histories_of_lists_in_the_cells_of_a_csv(tmp_path):
    pl.DataFrame(LOG | {"x": ["a:1|b:2", "c:1", "", "b:3|c:1", "a:1"]}).write_csv(tmp_path / "log.csv")
    values = copy.deepcopy(DECLARATION) | {"tables": {}, "tasks": {"click": {"label": "click"}}}
    values["source"]["path"] = "log.csv"
    values["keys"] = {"user": "user"}
    tags = {"tower": "user", "encode": "vocabulary", "column": "x", "length": 2, "weighted": True}
    last = {"tower": "user", "encode": "vocabulary", "length": 3, "history": {"last": "x"}}
    values["features"] = {"tags": tags, "last": last}
    latest = prepare(Dataset.from_dict(values, tmp_path)).latest_users
    assert latest.key.tolist() == ["ann", "bob"]
    assert latest.raw["last"].tolist() == [["b", "c", "c"], ["a", "b", "a"]]
    assert latest.raw["last_weights"].tolist() == [[1, 1, 1]] * 2
    assert latest.raw["tags_weights"].tolist() == [[3, 1], [1, 2]]
    # Nothing says that these cells are lists.
    values["features"] = {"last": last}
    with pytest.raises(
        DataError, match=r"line 2, column 'x': expected a single value, without the list separator '\|'"
    ):
        prepare(Dataset.from_dict(values, tmp_path))


# Splits and negatives


def test_split_by_files(tmp_path):
    for part, rows in (("a", [0, 1]), ("b", [2, 3]), ("c", [4])):
        pl.DataFrame(LOG)[rows].write_parquet(tmp_path / f"{part}.parquet")
    values = copy.deepcopy(DECLARATION) | {"tables": {}}
    values["keys"] = {"user": "user"}
    values["features"] = {"hour": {"tower": "user", "encode": "integer", "bins": 24}}
    values["split"] = {"by": "files", "train": ["a.parquet"], "validation": "b.parquet", "test": "c.parquet"}
    made = prepare(Dataset.from_dict(values, tmp_path))
    assert made.split.tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"by": "column", "column": "hour", "train": [1, 2], "validation": [3], "test": [4]}, [0, 0, 0, 1, 2]),
        ({"by": "column", "column": "age", "train": [30], "validation": [9], "test": [40]}, [0, 0, 2, 0, 2]),
        ({"by": "share_of_time", "validation": 0.2, "test": 0.2}, [0, 0, 0, 1, 2]),
        ({"by": "per_user", "train": 0.34, "validation": 0.33, "test": 0.33}, [0, 1, 1, 2, 2]),
    ],
)
def test_splits(declared, expected):
    users = USERS | {"age": [30, 40, 50]}
    changes = {"tasks": {"click": {"label": "click"}}}
    assert prepare(shop(users=users, split=declared, changes=changes)).split.tolist() == expected


def test_split_by_hash_keeps_users_together():
    made = prepare(shop(split={"by": "hash", "train": 0.5, "validation": 0.25, "test": 0.25, "seed": 2}))
    parts = dict(zip(made.users.key[made.user_row], made.split.tolist(), strict=True))
    assert made.split.tolist() == [parts[user] for user in ("ann", "ann", "bob", "ann", "bob")]


def test_negatives_follow_their_rows():
    declared = shop(negatives={"kind": "uniform", "per_positive": 2, "future": True})
    made = prepare(declared)
    assert made.sampled.tolist() == [False, True, True] * 5
    # Ann has the items 1 and 2, bob 2 and 3.
    for row in np.flatnonzero(made.sampled):
        had = {"ann": {1, 2}, "bob": {2, 3}}[made.users.key[made.user_row[row]]]
        assert made.items.key[made.item_row[row]] not in had
    assert made.split.tolist() == [part for part in (0, 0, 0, 1, 2) for _ in range(3)]
    assert made.time.tolist() == [time for time in (10000, 20000, 20000, 30000, 40000) for _ in range(3)]
    for task in ("click", "buy", "spent"):
        assert not made.label(task)[made.sampled].any()
        assert (made.weight(task)[made.sampled] == (task != "spent")).all()
    plain = prepare(shop())
    assert_columns(made.users.raw, plain.users.raw)
    assert_columns(made.items.raw, plain.items.raw)
    assert made.encoder.to_dict() == plain.encoder.to_dict()
    assert made.offsets == plain.offsets


def test_negatives_have_item_states_of_their_moment():
    made = prepare(shop(negatives={"kind": "uniform", "per_positive": 3}, changes=moving(count=True)))
    times, keys = (np.array(LOG["at"]) * 1000, np.array(LOG["item"]))
    assert made.sampled.sum() == 15
    for row in range(len(made)):
        key = made.items.key[made.item_row[row]]
        number = int(((keys == key) & (times < made.time[row])).sum())
        np.testing.assert_equal(of_interactions(made)[row], np.float32(number or NAN))


# Folders


def write_shop(folder: Path, log=None) -> Dataset:
    folder.mkdir(exist_ok=True)
    pl.DataFrame(LOG | (log or {})).write_parquet(folder / "log.parquet")
    pl.DataFrame(USERS).write_parquet(folder / "users.parquet")
    pl.DataFrame(ITEMS).write_parquet(folder / "items.parquet")
    values = copy.deepcopy(DECLARATION)
    values["source"]["path"] = "log.parquet"
    values["tables"] = {"users": {"path": "users.parquet"}, "items": {"path": "items.parquet"}}
    return Dataset.from_dict(values, folder)


@pytest.mark.slow
def test_prepared_datasets_are_found_again(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mvke_tf")
    declared, data = write_shop(tmp_path / "source"), tmp_path / "data"
    first = prepared_dataset(declared, data)
    assert first.folder.parent == data / "prepared"
    assert first.folder.name == f"shop-{first.digest[:12]}"
    assert "Prepared shop in" in caplog.text
    assert "positive click" in caplog.text
    assert_columns(first.users.raw, prepare(declared).users.raw)
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns

    caplog.clear()
    again = prepared_dataset(declared, data)
    assert "is prepared already" in caplog.text
    assert again.folder == first.folder
    assert (again.folder / "manifest.json").stat().st_mtime_ns == stamp
    assert (prepared_dataset(declared, data, overwrite=True).folder / "manifest.json").stat().st_mtime_ns != stamp

    # Another declaration, and another source, are other folders.
    folders = {first.folder, prepared_dataset(declared.replace({"features.age.unknown_rate": 0.5}), data).folder}
    folders.add(prepared_dataset(write_shop(tmp_path / "source", {"hour": [5] * 5}), data).folder)
    assert len(folders) == 3
    # And what has been is still there.
    assert prepared_dataset(write_shop(tmp_path / "source"), data).folder == first.folder


WRONG = {
    "negative weight": (
        {"importance": [1, 1, -1, 1, 1]},
        {},
        r"row 2, column 'importance': expected the weight.*: -1\.",
    ),
    "no weight": ({"importance": [1, 1, None, 1, 1]}, {}, r"row 2, column 'importance'.*Received: nothing"),
    "no time": ({"at": [1, None, 3, 4, 5]}, {}, r"row 1, column 'at': expected a moment in every row"),
    "time in ms": ({"at": [1.7e12] * 5}, {}, r"row 0, column 'at'.*to 2200.*time_unit = \"ms\""),
    "no user": ({"user": ["a", "b", "", "d", "e"]}, {}, r"row 2, column 'user': expected a key in every row of 'log'"),
    "no item": ({"item": [1, 2, 3, None, 4]}, {}, r"row 3, column 'item': expected a key"),
    "label of another value": (
        {"click": [0, 1, 2, 0, 0]},
        {},
        r"row 2: \[tasks\.click\] label = 'click': expected 0 or 1\. Received: 2\.",
    ),
    "label of text": (
        {"click": ["0", "1", "x", "0", "1"]},
        {},
        r"\[features\.clicks\] history\.where = 'click'|\[tasks\.click\] label = 'click': .*row 2, column 'click'.*'x'",
    ),
    "label out of its domain": (
        {"spent": [1.0, 2.0, 11.0, 3.0, 4.0]},
        {},
        r"row 2.*from 0 to 10, its `domain`.*: 11\.",
    ),
    "label that has no logarithm": (
        {"spent": [1.0, 2.0, -1.0, 3.0, 4.0]},
        {"tasks.spent.domain": None},
        r"row 2.*expected a number above -1, for transform",
    ),
    "infinite label": ({"spent": [1.0, 2.0, math.inf, 3.0, 4.0]}, {}, r"row 2.*(finite number|from 0 to 10)"),
    "no label": ({"click": [None] * 5}, {}, r"\[tasks\.click\]: no row of the training part counts"),
    "part without name": (
        {},
        {"split": {"by": "column", "column": "hour", "train": [1, 2], "validation": [3], "test": [5]}},
        r"row 0, column 'hour': expected a value that \[split\] names: 1, 2, 3, 5\. Received: 4",
    ),
    "empty training part": ({}, {"split.validation": 5}, r"training part no row.*train 0, validation 4, test 1"),
    "condition on text": (
        {"hour": list("abcde")},
        {"features.hour.encode": "vocabulary", "features.hour.bins": None, "tasks.click.where": "hour > 2"},
        r"\[tasks\.click\] where = 'hour > 2'.*row 0, column 'hour': expected a finite number.*'a'",
    ),
    "no such column in a condition": (
        {},
        {"tasks.click.where": "hours > 2"},
        r"\[tasks\.click\] where: .*no column 'hours'\. Did you mean 'hour'\?",
    ),
    "no such column of a history": (
        {},
        {"features.seen.history": {"last": "itme"}},
        r"\[features\.seen\] history\.last: .*no column 'itme'\. Did you mean 'item'\?",
    ),
    "fractions as a vocabulary": (
        {"hour": [0.5, 1, 2, 3, 4]},
        {"features.hour.encode": "vocabulary", "features.hour.bins": None},
        r"row 0, column 'hour': expected a text or a whole number. Received: 0\.5\. A feature of numbers has encode",
    ),
    "fractions as indices": ({"hour": [0.5, 1, 2, 3, 4]}, {}, r"row 0, column 'hour': expected a whole number"),
    "negative weight of a history": (
        {"importance": [1, 1, 1, 1, -2]},
        {"tasks.buy.weight": None},
        r"row 4, column 'importance': expected a weight, a number of at least 0\. Received: -2",
    ),
    "single values as a list": (
        {},
        {"features.hour.length": 2, "features.hour.profile_value": None},
        r"column 'hour': expected lists\. Received a column of type Int64",
    ),
    "user had everything": (
        {"user": ["ann"] * 5, "item": [3, 1, 2, 1, 4]},
        {"negatives": {"kind": "uniform", "future": True}},
        r"user 'ann' has had all 4 items\. Declare more items",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tables_are_one_line_and_leave_nothing(what, tmp_path):
    log, changes, message = WRONG[what]
    with pytest.raises(MvkeError, match=message) as error:
        prepared_dataset(shop(log, changes=changes), tmp_path / "data")
    assert isinstance(error.value, DataError)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_an_error_in_a_place_of_the_declaration_names_its_file(tmp_path):
    declared = Dataset.from_toml(small_toml(tmp_path / "source"))
    with pytest.raises(DataError, match=r"^small\.toml, \[tasks\.click\]: no row of the training part counts\."):
        prepared_dataset(declared.replace({"tasks.click.where": "age < 0"}), tmp_path / "data")
    with pytest.raises(DataError, match=r"^small\.toml, \[features\.age\] column: .*no column 'agee'\. Did you mean"):
        check(declared.replace({"features.age.column": "agee"}))
    (tmp_path / "source" / "log.parquet").unlink()
    with pytest.raises(DataError, match=r"^small\.toml, \[source\] path: there is no file"):
        prepared_dataset(declared, tmp_path / "data")


WRONG_SIDES = {
    "user twice": (
        {"user": ["ann", "bob", "ann"], "age": [1, 2, 3]},
        ITEMS,
        r"'users', row 2, column 'user': expected each key once",
    ),
    "item unknown": (
        USERS,
        ITEMS | {"item": [4, 3, None, 1]},
        r"the frame 'items', row 2, column 'item': expected a key",
    ),
    "no key": (
        {"users": ["ann"], "age": [1]},
        ITEMS,
        r"\[tables\.users\] on: the frame 'users' has no column 'user'\. Did you mean 'users'",
    ),
    "text as a number": (
        {"user": ["ann"], "age": ["old"]},
        ITEMS,
        r"the frame 'users', row 0, column 'age': expected a finite number",
    ),
    "keys of other types": (
        USERS,
        ITEMS | {"item": [1.5, 2, 3, 4]},
        r"the frame 'items', row 0, column 'item': expected a",
    ),
}


@pytest.mark.parametrize("what", WRONG_SIDES)
def test_wrong_side_tables(what, tmp_path):
    users, items, message = WRONG_SIDES[what]
    with pytest.raises(DataError, match=message) as error:
        prepared_dataset(shop(users=users, items=items), tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_unlikely_labels_are_noticed(caplog):
    prepare(shop({"click": [0, 0, 0, 0, 0], "spent": [0.0, 0, 3, 0, 0]}, changes={"tasks.spent": None}))
    assert "[tasks.click]: all labels are 0" in caplog.text
    assert "[tasks.buy]: in 1 rows the label is 1, but that of 'click', which comes first, is 0" in caplog.text


# What would be silently wrong


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("concat(x, z) = '17'", [0, 1, 0, 0, 1]),
        ("x || z = '17'", [0, 1, 0, 0, 1]),
        ("cast(x as varchar) = '1'", [0, 1, 0, 1, 1]),
        ("coalesce(x, 5) = 5", [0, 0, 1, 0, 0]),
        ("x / z > 0.1", [0, 1, 0, 0, 1]),
        ("cast(b as varchar) = 'true'", [1, 0, 0, 1, 1]),
        ("b and x", [0, 0, 0, 1, 1]),
        ("cast(f as varchar) = '2.5'", [0, 1, 0, 0, 1]),
    ],
)
def test_conditions_mean_the_same_of_csv_and_parquet(tmp_path, label, expected):
    columns = {
        "x": [0, 1, None, 1, 1],
        "z": [7, 7, 7, 0, 7],
        "b": [True, False, None, True, True],
        "f": [1.0, 2.5, None, 1.5, 2.5],
    }
    log = pl.DataFrame({"user": list("abcde"), **columns})
    log.write_csv(tmp_path / "log.csv")
    log.write_parquet(tmp_path / "log.parquet")
    for name in ("log.csv", "log.parquet"):
        values = {
            "format": 1,
            "source": {"path": name},
            "split": {"by": "random"},
            "features": {"user": {"tower": "user", "encode": "vocabulary"}},
            "tasks": {"t": {"label": label}},
        }
        assert prepare(Dataset.from_dict(values, tmp_path)).label("t").tolist() == expected, name


def test_forms_of_many_columns_are_chosen_quickly(tmp_path):
    names = [f"c{number}" for number in range(40)]
    pl.DataFrame({"user": list("abcde"), **{name: list("01010") for name in names}}).write_csv(tmp_path / "log.csv")
    values = {
        "format": 1,
        "source": {"path": "log.csv"},
        "split": {"by": "random"},
        "features": {"user": {"tower": "user", "encode": "vocabulary"}},
        "tasks": {"t": {"label": " or ".join(f"{name} = '1'" for name in names) + " or c0 = 'x'"}},
    }
    assert prepare(Dataset.from_dict(values, tmp_path)).label("t").tolist() == [0, 1, 0, 1, 0]
    values["tasks"]["t"]["label"] += " or c39 > 1"
    with pytest.raises(DataError, match=r"\[tasks\.t\] label = .* does not fit its columns: "):
        prepare(Dataset.from_dict(values, tmp_path))


@pytest.mark.parametrize(
    ("feature", "key"),
    [
        ({"column": "click", "encode": "vocabulary"}, "column"),
        ({"column": "tags_of_log", "weights": "click", "encode": "vocabulary", "length": 3}, "weights"),
    ],
)
def test_a_label_is_no_feature_though_there_is_a_side_table(feature, key):
    log = {"tags_of_log": [["a"]] * 5, "click": [0, 1, 1, 0, 1]}
    with pytest.raises(DeclarationError, match=rf"\[features\.leak\]: `{key}` must not be the label.*\[tasks\.click\]"):
        prepare(shop(log, changes={"features.leak": {"tower": "user", **feature}}))
    # A column of the side table may have the name.
    users = USERS | {"click": ["x", "y", "z"], "tags_of_log": [["a"], ["b"], ["c"]]}
    if key == "column":
        made = prepare(shop(log, users, changes={"features.leak": {"tower": "user", **feature}}))
        assert sorted(set(made.users.raw["leak"])) == ["x", "y"]


def test_labels_and_weights_that_32_bits_cannot_hold():
    changes = {"tasks.spent.domain": None, "tasks.spent.where": None}
    log = {"spent": [1.0, 2.0, 1e30, 0.0, 1.0], "click": [0, 1, 0, 1, 0]}
    huge = {**only("user"), **changes, "tasks.buy": None, "tasks.spent.label": "1e10 * spent"}
    with pytest.raises(DataError, match=r"row 2: \[tasks\.spent\] label = '1e10 \* .*32 bits.*Received: 1e\+40"):
        prepare(shop(log, changes={**huge, "tasks.spent.transform": None}))
    # Its logarithm is small.
    made = prepare(shop(log, changes=huge))
    assert made.label("spent").max() == np.float32(np.log1p(1e40))
    weights = {"importance": [1.0, 1.0, 1e30, 1.0, 1.0], "click": [0, 1, 0, 1, 0]}
    with pytest.raises(DataError, match=r"row 2: \[tasks\.click\]: the product of both weights.*Received: 1e\+60"):
        prepare(
            shop(
                weights,
                changes={**only("user"), "tasks.buy": None, "tasks.spent": None, "tasks.click.weight": "importance"},
                weight="importance",
            )
        )


def test_a_weight_may_be_unknown_where_the_row_does_not_count():
    # The label of the last row is unknown.
    log = {"importance": [1.0, 2.0, 0.5, 1.0, None]}
    changes = {**only("user"), "tasks.buy": None, "tasks.spent": None, "tasks.click.weight": "importance"}
    assert prepare(shop(log, changes=changes)).weight("click").tolist() == [2, 0.5, 0, 1, 1]


def test_item_features_that_vary_within_an_item_are_noticed(caplog):
    changes = {**only("user", "tags"), "features.hour": {"tower": "item", "encode": "vocabulary"}}
    prepare(shop(changes=changes, items={"item": ITEMS["item"], "title": ITEMS["title"], "tags": ITEMS["tags"]}))
    # Item 1 has hours 1 and 3, of which the training part knows 1.
    assert "[features.hour]: 20.0% of the rows have another value than the one that their item gets" in caplog.text
    assert "context = true, or a `statistic`" in caplog.text
    caplog.clear()
    prepare(shop({"hour": [3, 1, 2, 1, 2]}, changes=changes))
    assert "another value" not in caplog.text


def test_frozen_means_of_items_that_are_long_gone():
    log = {"item": [3, 1, 1, 2, 2], "at": [1, 2, 3, 10**6, 10**6 + 1], "spent": [8.0, 1.0, 3.0, 2.0, 2.0]}
    rate = {"tower": "item", "encode": "number", "statistic": {"mean": "spent", "half_life": "1s"}}
    changes = {**only("user"), "features.rate": rate, "tasks.buy": None, "tasks.click.label": "item = 1"}
    changes |= {"split": {"by": "time", "validation": 2 * 10**6, "test": 3 * 10**6}}
    made = prepare(shop({**log, "click": [1] * 5}, changes=changes))
    means = dict(zip(made.items.key.tolist(), made.items.raw["rate"].tolist(), strict=True))
    assert means[1] == pytest.approx((0.5 * 1 + 3) / 1.5)
    assert means[2] == 2 and means[3] == 8 and math.isnan(means[4])


def test_a_group_that_cannot_be_made_fails_before_anything_is_written(tmp_path):
    declared = shop(changes={"groups": {"users": {"feature": "user", "step": 10}}})
    with pytest.raises(DeclarationError, match=r"\[groups\.users\]: bands need a number.*'ann'|texts, such as"):
        prepared_dataset(declared, tmp_path / "data")
    assert not list(tmp_path.rglob("*.parquet"))


def test_what_killed_processes_left_is_removed(tmp_path):
    data = tmp_path / "data"
    gone = f".writing-{2**22 + 1}-{socket.gethostname().replace('-', '_')}-abc"
    folders = [data / "prepared" / gone, data / "tables" / "shop" / gone]
    kept = data / "prepared" / f".writing-{os.getpid()}-abc"
    for folder in (*folders, kept):
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
    prepared_dataset(shop(), data)
    assert not any(folder.exists() for folder in folders)
    assert kept.exists()


def test_frames_of_other_objects_are_one_line(tmp_path):
    log = {**LOG, "other": pl.Series([object()] * 5, dtype=pl.Object)}
    with pytest.raises(DataError, match="The frame 'log', column 'other': expected texts, numbers"):
        prepared_dataset(shop(log), tmp_path / "data")
