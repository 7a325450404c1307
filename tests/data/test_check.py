# SPDX-License-Identifier: Apache-2.0
"""What `mvke check` says of the first rows of a dataset."""

import numpy as np
import polars as pl
import pytest

from mvke_tf.data.check import FeatureReport, check
from mvke_tf.data.declaration import Dataset
from mvke_tf.errors import DataError, DeclarationError

ROWS = 40
DAY = 86_400
DECLARATION = {
    "format": 1,
    "source": {"time": "ts"},
    "keys": {"user": "user", "item": "item"},
    "split": {"by": "share_of_time"},
    "features": {
        "age": {"tower": "user", "encode": "buckets", "bins": 4},
        "tags": {"tower": "user", "encode": "vocabulary", "length": 3},
        "clicks": {"tower": "user", "encode": "number", "history": {"count": True, "where": "click"}},
        "recent": {"tower": "user", "embedding": "ad", "length": 5, "history": {"last": "item"}},
        "hour": {"tower": "user", "context": True, "encode": "integer", "bins": 24},
        "ad": {"tower": "item", "encode": "vocabulary", "column": "item"},
        "text": {"tower": "item", "encode": "vector", "width": 2},
        "price": {"tower": "item", "encode": "number", "scaling": "piecewise", "bins": 3},
    },
    "tasks": {
        "click": {"label": "click"},
        "buy": {"label": "buy", "given": "click"},
        "spent": {"kind": "regression", "label": "spent", "where": "buy", "transform": "log1p"},
    },
}


def log(**columns) -> pl.DataFrame:
    row = np.arange(ROWS)
    table = {
        "user": row % 4,
        "item": [f"i{r % 5}" for r in row],
        "ts": 1_795_132_800 + row * DAY,
        "age": [None if r % 4 == 3 else 20.0 + r % 4 for r in row],
        "tags": [[], ["a"], ["a", "b"], ["c"]] * (ROWS // 4),
        "hour": row % 24,
        "text": np.stack([row % 5, row % 5], axis=1).astype(float),
        "price": (row % 5).astype(float),
        "click": (row % 2 == 0).astype(int),
        "buy": (row % 4 == 0).astype(int),
        "spent": np.where(row % 4 == 0, 3.0, 0.0) + np.where(row % 8 == 0, 2.0, 0.0),
        "unread": row,
    }
    return pl.DataFrame(table | columns)


def dataset(changes: dict | None = None, **columns) -> Dataset:
    return Dataset.from_frame(log(**columns), DECLARATION).replace(changes or {})


def test_every_feature_task_and_part():
    report = check(dataset())
    assert (report.rows, report.is_sample, report.users, report.items) == (40, False, 4, 5)
    assert report.features == (
        FeatureReport("age", "user", "age", "number", 0.25, 3, "5 indices"),
        FeatureReport("tags", "user", "tags", "string list", 0.25, 3, "3 slots, 4 indices"),
        FeatureReport("clicks", "user", "history: count", "number", 0.0, 10, "2 numbers"),
        FeatureReport("recent", "user", "history: last of item", "string list", 0.1, 5, "5 slots, 6 indices of ad"),
        FeatureReport("hour", "context", "hour", "integer", 0.0, 24, "25 indices"),
        FeatureReport("ad", "item", "item", "string", 0.0, 5, "6 indices"),
        FeatureReport("text", "item", "text", "vector", 0.0, None, "3 numbers"),
        FeatureReport("price", "item", "price", "number", 0.0, 5, "4 numbers"),
    )
    click, buy, spent = report.tasks
    assert (click.rows, click.mean) == (40, 0.5) and (buy.rows, buy.mean) == (40, 0.25)
    assert (spent.rows, spent.mean, spent.deviation) == (10, pytest.approx(4.0), pytest.approx(1.0))
    assert report.parts == {"train": 28, "validation": 4, "test": 8}
    assert report.unused == ("unread",) and report.warnings == ()


def test_table_is_text_of_bounded_width():
    name = "x" * 90
    features = {**DECLARATION["features"], name: {"tower": "user", "encode": "hash", "bins": 10, "column": "y" * 90}}
    frame = log().with_columns(pl.lit("z").alias("y" * 90), pl.lit(1).alias("v" * 300))
    text = check(Dataset.from_frame(frame, {**DECLARATION, "features": features})).table()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert text.splitlines()[0] == "data: 40 rows, 4 users, 5 items"
    plain = check(dataset()).table().splitlines()
    assert plain[2].split() == ["feature", "tower", "from", "type", "unknown", "distinct", "becomes"]
    assert plain[3].split() == ["age", "user", "age", "number", "25.0%", "3", "5", "indices"]
    assert plain[12].split() == ["task", "kind", "label", "rows", "events", "or", "mean"]
    assert plain[13].split() == ["click", "binary", "click", "40", "20", "(50.00%)"]
    assert plain[15].split() == ["spent", "regression", "spent", "10", "4", "±", "1"]
    assert plain[-2:] == ["Parts: train 28, validation 4, test 8 rows", "Not read: unread"]


@pytest.mark.parametrize(
    ("changes", "columns", "warning"),
    [
        ({}, {"click": [1] * ROWS}, "[tasks.click]: all labels are 1; there is nothing to tell apart."),
        ({}, {"buy": [0, 1] * (ROWS // 2)}, "[tasks.buy]: in 20 rows the label is 1, but that of 'click'"),
        ({}, {"age": [None] * ROWS}, "Nothing is known of the feature 'age' in the training part"),
        ({}, {"spent": [7.0] * ROWS}, "[tasks.spent]: the label is 7 in all rows that count"),
        ({}, {"age": [None] * 30 + [1.0, 2.0] * 5}, "[features.age]: it is unknown in 75% of the rows."),
        ({}, {"tags": [[]] * (ROWS - 1) + [["a"]]}, "[features.tags]: it is unknown in 98% of the rows."),
        ({}, {"age": [1.0] * ROWS}, "[features.age]: it has one value only"),
        ({}, {"hour": [24] * 4 + [5, 6] * 18}, "[features.hour]: 10.0% of the values lie outside 0 to 23, such as 24"),
        (
            {"features.ad.values": ["i0", "i1", "i2", "i3"]},
            {},
            "[features.ad]: 20.0% of the values are not among `values`, such as 'i4'",
        ),
        (
            {"features.ad.min_count": 20},
            {},
            "[features.ad]: 100.0% of the values are too rare for the vocabulary, such as 'i0'",
        ),
        (
            {"features.hour.encode": "buckets", "features.hour.bins": None, "features.hour.column": "user"},
            {},
            '[features.hour]: it looks like an id, but is encoded as a number by "buckets".',
        ),
        (
            {"features.tags.length": 2},
            {"tags": [["a"], ["a"], ["a", "b", "c"], ["b"]] * (ROWS // 4)},
            "[features.tags]: 25% of the lists are longer than `length`; the longest has 3.",
        ),
        (
            {},
            {"ts": np.arange(ROWS) + 1_795_132},
            "[source]: moments from 1970-01-21 to 1970-01-21: is the unit of 'ts' \"s\", its `time_unit`?",
        ),
        (
            {"split.by": "time", "split.validation": "2026-12-20", "split.test": "2030-01-01"},
            {},
            "[split] gives the test part no row.",
        ),
    ],
)
def test_warnings(changes, columns, warning, caplog):
    report = check(dataset(changes, **columns))
    assert not caplog.records
    assert any(found.startswith(warning) for found in report.warnings), report.warnings
    assert warning[:60] in " ".join(report.table().split())


def test_all_rows_of_one_moment():
    assert (
        check(dataset({"split.by": "random"}, ts=[1_795_132_800] * ROWS))
        .warnings[-1]
        .startswith("[source]: all rows have the same moment, 2026-11-20")
    )


def test_too_many_values_for_a_vocabulary():
    rows = 200
    table = {"q": [f"q{row}" for row in range(rows)], "y": [0, 1] * (rows // 2)}
    declaration = {
        "format": 1,
        "features": {"q": {"tower": "user", "encode": "vocabulary"}},
        "tasks": {"y": {"label": "y"}},
    }
    report = check(Dataset.from_frame(table, declaration))
    assert report.users is None and report.items is None
    assert any("200 values in 200 rows are too many to learn" in warning for warning in report.warnings)


def test_only_the_first_rows_are_read(tmp_path):
    """Later rows are not looked at, but all of the side table is."""
    frame = log().drop("tags", "text").with_columns(pl.Series("age", [20.0] * (ROWS - 1) + [30.0]))
    frame.drop("price").write_csv(tmp_path / "log.csv")
    items = pl.DataFrame({"item": [f"i{i}" for i in range(50)], "price": np.arange(50.0)})
    items.reverse().write_csv(tmp_path / "items.csv")
    features = {name: value for name, value in DECLARATION["features"].items() if name not in ("tags", "text")}
    values = {
        **DECLARATION,
        "source": {"time": "ts", "path": "log.csv"},
        "tables": {"items": {"path": "items.csv"}},
        "features": features,
    }
    report = check(Dataset.from_dict(values, tmp_path), rows=20)
    assert (report.rows, report.is_sample, report.users, report.items) == (20, True, 4, 50)
    found = {feature.name: feature for feature in report.features}
    assert found["age"].distinct == 1 and found["price"].unknown == 0.0
    assert found["price"].source == "price (items)"
    assert report.table().startswith("data: the first 20 rows, 4 users, 50 items\n")
    assert "becomes (so far)" in report.table()


def test_first_rows_without_all_parts():
    """A sample need not have rows of the training part; a whole table must."""
    declared = {
        "split.by": "column",
        "split.column": "fold",
        "split.train": "c",
        "split.validation": "b",
        "split.test": "a",
    }
    fold = ["a"] * 20 + ["b"] * 10 + ["c"] * 10
    report = check(dataset(declared, fold=fold), rows=20)
    assert report.parts is None
    assert report.warnings[-1] == "[split]: the first rows do not have what each part needs; look at more of them."
    assert check(dataset(declared, fold=fold)).parts == {"train": 10, "validation": 10, "test": 20}
    with pytest.raises(DataError, match="training part no row"):
        check(dataset(declared, fold=["a"] * 20 + ["b"] * 20))


def test_other_errors_of_the_split_are_errors_of_a_sample_too():
    changes = {
        "split.by": "column",
        "split.column": "fold",
        "split.train": "a",
        "split.validation": "b",
        "split.test": "c",
    }
    declared = dataset(changes, fold=["a", "b", "c", "z"] * (ROWS // 4))
    for rows in (10_000, 20):
        with pytest.raises(DataError, match=r"column 'fold': expected a value that \[split\] names: .*Received: 'z'"):
            check(declared, rows=rows)


def test_a_sample_does_not_warn_of_parts_without_rows():
    changes = {"split.by": "time", "split.validation": "2026-12-20", "split.test": "2026-12-29"}
    found = [check(dataset(changes), rows=rows).warnings for rows in (32, 10_000)]
    assert found == [(), ()]
    assert check(dataset(changes, ts=1_795_132_800 + np.arange(ROWS) * DAY // 2)).warnings == (
        "[split] gives the validation part no row.",
        "[split] gives the test part no row.",
    )


def test_groups_that_cannot_be_made_are_errors():
    with pytest.raises(DeclarationError, match=r"\[groups\.g\]: bands need a number, and the values of 'ad' are texts"):
        check(dataset({"groups.g": {"feature": "ad", "step": 10}}))


def test_warning_of_a_feature_that_a_label_is_computed_from():
    label = "click = 1 and hour < 12"
    found = check(dataset({"tasks.click.label": label, "tasks.buy.given": None})).warnings
    assert found == (
        "[features.hour]: the label of [tasks.click] is computed from its column 'hour'; is that known when a "
        "prediction is made?",
    )


def test_sampled_negatives_do_not_count():
    report = check(dataset({"negatives.kind": "uniform", "negatives.per_positive": 1}))
    assert report.rows == 40 and report.tasks[0].rows == 40 and report.tasks[0].mean == 0.5


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        (
            {"features.age.column": "agge"},
            {},
            r"\[features.age\] column: .* has no column 'agge'\. Did you mean 'age'\?",
        ),
        ({}, {"click": [2] * ROWS}, r"\[tasks.click\] label = 'click': expected 0 or 1. Received: 2"),
        ({}, {"age": ["old"] * ROWS}, "column 'age': expected a finite number or nothing. Received: 'old'"),
        ({"features.text.width": 3}, {}, "column 'text': expected a list of 3 numbers. Received: 2 numbers"),
        ({}, {"user": [None] * ROWS}, "column 'user': expected a key in every row"),
        ({}, {"ts": [None] * ROWS}, "column 'ts': expected a moment in every row"),
    ],
)
def test_tables_that_do_not_fit(changes, columns, message):
    for rows in (10_000, 10):
        with pytest.raises(DataError, match=message) as error:
            check(dataset(changes, **columns), rows=rows)
        assert "\n" not in str(error.value)
