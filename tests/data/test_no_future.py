# SPDX-License-Identifier: Apache-2.0
"""What comes later changes nothing before it: no history, statistic, vocabulary, bound or negative."""

import copy

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import PreparedDataset

pytestmark = pytest.mark.slow

# The training part ends before this moment, and no changed row lies before it.
TRAINING_END = 10
LAST = 20
ITEMS = {"item": list("abcdefgh"), "tags": [["x"], ["y", "x"], [], None, ["z"], ["x", "z"], ["y"], ["w"]]}

NUMBER = {"tower": "user", "encode": "number"}
BUCKETS = {"tower": "user", "encode": "buckets", "bins": 3}
ITEM_NUMBER = {"tower": "item", "encode": "number"}


def user_list(**feature) -> dict:
    return {"tower": "user", "encode": "vocabulary", "length": 3} | feature


# Every kind of history and statistic, with and without each of its options, and every encoding that learns something.
FEATURES = {
    "user": {"tower": "user", "encode": "vocabulary", "out_of_vocabulary_bins": 2},
    "hour": {"tower": "user", "encode": "vocabulary", "context": True, "max_size": 3},
    "price_now": BUCKETS | {"column": "price", "context": True},
    "piecewise": NUMBER | {"column": "price", "scaling": "piecewise", "bins": 3},
    "hashed": {"tower": "user", "column": "user", "encode": "hash", "bins": 7},
    "hour_itself": {"tower": "user", "column": "hour", "encode": "integer", "bins": 5, "context": True},
    "last_hashed": user_list(encode="hash", bins=11, history={"last": "item", "where": "click"}),
    "count_itself": {"tower": "user", "encode": "integer", "bins": 9, "history": {"count": True}},
    "liked": user_list(column="tags", weights="tag_weights", keep="heaviest"),
    "last": user_list(embedding="item", encode=None, history={"last": "item"}),
    "last_where": user_list(history={"last": "item", "where": "click", "weights": "weight"}),
    "last_within": user_list(history={"last": "item", "within": "3s"}),
    "last_tags": user_list(history={"last": "item_tags", "where": "price > 2"}),
    "counts": user_list(embedding="item_tags", encode=None, history={"counts": "item_tags"}),
    "counts_within": user_list(history={"counts": "item", "within": "4s", "where": "click"}),
    "count": BUCKETS | {"history": {"count": True}},
    "count_where": NUMBER | {"history": {"count": True, "where": "click", "within": "5s"}},
    "mean": NUMBER | {"history": {"mean": "price"}},
    "mean_within": BUCKETS | {"history": {"mean": "price", "within": "6s", "where": "hour > 1"}},
    "share": NUMBER | {"history": {"share": "click"}},
    "share_within": BUCKETS | {"history": {"share": "price > 3", "within": "2s"}},
    "since": NUMBER | {"history": {"since": True}},
    "since_where": NUMBER | {"history": {"since": True, "where": "click"}},
    "item": {"tower": "item", "encode": "vocabulary"},
    "item_tags": {"tower": "item", "encode": "vocabulary", "length": 2},
    "price_of_item": ITEM_NUMBER | {"column": "price"},
    "shown": ITEM_NUMBER | {"statistic": {"count": True}},
    "shown_where": BUCKETS | {"tower": "item", "statistic": {"count": True, "where": "price > 2"}},
    "mean_price": ITEM_NUMBER | {"statistic": {"mean": "price", "half_life": "6s"}},
    "rate": {"tower": "item", "encode": "buckets", "bins": 2, "statistic": {"share": "click", "half_life": "4s"}},
    "shown_before": ITEM_NUMBER | {"statistic": {"count": True, "until": "row"}},
    "price_before": ITEM_NUMBER | {"statistic": {"mean": "price", "until": "row", "where": "click"}},
    "rate_before": ITEM_NUMBER | {"statistic": {"share": "click", "until": "row", "half_life": "3s"}},
    "shown_every": ITEM_NUMBER | {"statistic": {"count": True, "until": "row", "every": "4s"}},
    "rate_every": ITEM_NUMBER | {"statistic": {"share": "click", "until": "row", "every": "3s", "half_life": "5s"}},
}
FEATURES = {name: {key: value for key, value in f.items() if value is not None} for name, f in FEATURES.items()}

DECLARATION = {
    "format": 1,
    "name": "log",
    "source": {"time": "at"},
    "keys": {"user": "user", "item": "item"},
    "tables": {"items": {}},
    "split": {"by": "time", "validation": TRAINING_END, "test": 15},
    "features": FEATURES,
    "tasks": {"click": {"label": "click"}, "worth": {"kind": "regression", "label": "weight"}},
}

# One row of a log: user, item, hour, click, price, weight and tags.
contents = st.tuples(
    st.sampled_from(["u", "v", "w", "x"]),
    st.sampled_from(ITEMS["item"] + ["i", "j"]),
    st.integers(0, 3),
    st.sampled_from([0, 1, None]),
    st.sampled_from([0.1, 1.7, 2.3, 3.9, 1e6, None]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.lists(st.sampled_from("xyz"), max_size=4),
)


def rows(first: int, last: int, **sizes):
    return st.lists(st.tuples(st.integers(first, last), contents), **sizes)


def dataset(log, negatives: dict) -> Dataset:
    # One row of training that counts, so that there is something to learn from.
    log = [(0, ("u", "a", 1, 1, 2.0, 1.0, ["x"])), *log]
    names = ("user", "item", "hour", "click", "price", "weight", "tags")
    types = (pl.String, pl.String, pl.Int64, pl.Int64, pl.Float64, pl.Float64, pl.List(pl.String))
    columns = {
        name: pl.Series([row[1][number] for row in log], dtype=kind)
        for number, (name, kind) in enumerate(zip(names, types, strict=True))
    }
    columns["at"] = pl.Series([row[0] for row in log], dtype=pl.Int64)
    columns["tag_weights"] = pl.Series(
        [[float(len(tag) + place % 2) for place, tag in enumerate(row[1][6])] for row in log], dtype=pl.List(pl.Float64)
    )
    items = pl.DataFrame({"item": ITEMS["item"], "item_tags": ITEMS["tags"]})
    return Dataset.from_frame(pl.DataFrame(columns), copy.deepcopy(DECLARATION) | {"negatives": negatives}, items=items)


def seen(made: PreparedDataset, moment: int) -> list[dict]:
    """All that belongs to the interactions up to and with a moment, those that were sampled included."""
    chosen = made.time <= moment * 1000
    columns = {"sampled": made.sampled, "split": made.split, "time": made.time}
    columns |= {f"label {task}": made.label(task) for task in made.dataset.task_names}
    columns = {name: column[chosen] for name, column in columns.items()}
    for side, table, row in (("user", made.users, made.user_row), ("item", made.items, made.item_row)):
        columns[f"{side} key"] = table.key[row[chosen]]
        for kind in ("raw", "encoded"):
            for name, column in getattr(table, kind).items():
                columns[f"{side} {kind} {name}"] = np.asarray(column)[row[chosen]]
    return columns


def differences(first: PreparedDataset, second: PreparedDataset, moment: int) -> list[str]:
    """What differs among the interactions up to and with a moment, to the last bit."""
    before, after = seen(first, moment), seen(second, moment)
    assert list(before) == list(after)
    differing = [
        name
        for name in before
        if len(before[name]) != len(after[name])
        or not np.array_equal(before[name], after[name], equal_nan=before[name].dtype.kind == "f")
    ]
    if first.encoder.to_dict() != second.encoder.to_dict():
        differing.append("encoder")
    return differing


NEGATIVES = [
    {"kind": "none"},
    {"kind": "uniform", "per_positive": 2, "seed": 3},
    {"kind": "popularity", "per_positive": 2},
]


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
@given(
    rows(0, TRAINING_END - 1, max_size=12),
    rows(TRAINING_END, LAST, max_size=12),
    rows(TRAINING_END + 1, LAST + 5, max_size=12),
    st.integers(TRAINING_END, LAST),
    st.sampled_from(NEGATIVES),
)
def test_later_rows_change_nothing(training, later, others, moment, negatives):
    kept = [row for row in later if row[0] <= moment]
    replaced = [row for row in others if row[0] > moment]
    first = prepare(dataset(training + later, negatives))
    second = prepare(dataset(training + kept + replaced, negatives))
    assert differences(first, second, moment) == []


def some_log(seed: int = 0, number: int = 60) -> list:
    random = np.random.default_rng(seed)
    return [
        (
            int(random.integers(0, LAST + 1)),
            (
                str(random.choice(list("uvwx"))),
                str(random.choice(ITEMS["item"] + ["i", "j"])),
                int(random.integers(0, 4)),
                [0, 1, None][random.integers(3)],
                [0.1, 1.7, 2.3, 3.9, 1e6, None][random.integers(6)],
                1.0,
                [str(tag) for tag in random.choice(list("xyz"), random.integers(0, 4))],
            ),
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_moved_altered_and_deleted_rows_of_a_longer_log(negatives):
    log, moment = some_log(), 14
    first = prepare(dataset(log, negatives))
    later = [row for row in log if row[0] > moment]
    kept = [row for row in log if row[0] <= moment]
    moved = [(row[0] + 7, row[1]) for row in later]
    altered = [(row[0], ("new", "z", 9, 1, -5.0, 2.0, ["q"])) for row in later]
    for changed in (moved, altered, later[::2], []):
        assert differences(first, prepare(dataset(kept + changed, negatives)), moment) == []
    # And what lies at the moment itself changes no history, only its own rows.
    assert len(seen(first, moment)["time"]) > 40


def test_the_test_sees_a_leak():
    log, moment = some_log(), 14
    first = prepare(dataset(log, {"kind": "uniform", "future": True}))
    earlier = [row for row in log if row[0] <= moment - 4 or row[0] > moment]
    second = prepare(dataset(earlier, {"kind": "uniform", "future": True}))
    assert differences(first, second, moment)
    kept = prepare(dataset([row for row in log if row[0] <= moment], {"kind": "uniform", "future": True}))
    # Negatives that may know the future do.
    assert any(name.startswith("item key") for name in differences(first, kept, moment))


@pytest.mark.parametrize("name", [name for name in FEATURES if "history" in FEATURES[name]])
def test_histories_know_the_rows_before(name):
    """No history is empty by mistake: rows of the past do change it."""
    first = prepare(dataset(some_log(), {"kind": "none"}))
    past = first.users.raw[name]
    assert len(np.unique(past.astype(str), axis=0)) > 1
