# SPDX-License-Identifier: Apache-2.0
"""Declarations of datasets: what they mean, and how they say what is wrong."""

import copy
import dataclasses
import datetime
import json
import os
import pickle
import re
import tomllib

import jsonschema
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvke_tf.data.declaration import (
    Dataset,
    FeatureDeclaration,
    Group,
    History,
    Keys,
    Negatives,
    Source,
    Split,
    Statistic,
    TaskDeclaration,
    json_schema,
)
from mvke_tf.errors import DataError, DeclarationError
from tests.conftest import REPOSITORY

ADS = """
format = 1
weight = "importance"

[source]
path = "log/day=*/*.parquet"
time = "ts"

[keys]
user = "user_id"
item = "ad_id"
item_name = "ad_title"

[tables.items]
path = ["catalogue.csv", "more.csv.gz"]
on = "id"

[split]
by = "time"
validation = 2026-11-20T00:00:00Z
test = 2026-11-21

[features.user_id]
tower = "user"
encode = "hash"
bins = 1_000_000
unknown_rate = 0.5

[features.age]
tower = "user"
encode = "buckets"
missing = [-1, 0]
unknown_rate = 0.05

[features.gender]
tower = "user"
encode = "vocabulary"
values = ["f", "m", "x"]

[features.interests]
tower = "user"
encode = "vocabulary"
column = "tags"
weights = "tags_weight"
length = 20
keep = "heaviest"
min_count = 5
max_size = 50_000
out_of_vocabulary_bins = 100

[features.clicked_ads]
tower = "user"
embedding = "ad_id"
length = 50
history = { last = "ad_id", weights = "bid", where = "click and bid > 1", within = "30d" }

[features.seen_advertisers]
tower = "user"
embedding = "advertiser"
length = 10
history = { counts = "advertiser" }

[features.clicks]
tower = "user"
encode = "buckets"
bins = 8
history = { count = true, where = "click", within = "7d" }

[features.click_share]
tower = "user"
encode = "number"
history = { share = "click" }

[features.since]
tower = "user"
encode = "number"
scaling = "piecewise"
history = { since = true }

[features.hour]
tower = "user"
context = true
encode = "integer"
bins = 24

[features.slot]
tower = "user"
context = true
encode = "vocabulary"
profile_value = "top"

[features.ad_id]
tower = "item"
encode = "vocabulary"
unknown_rate = 0.1
unknown_group = "new"

[features.advertiser]
tower = "item"
encode = "vocabulary"

[features.title]
tower = "item"
encode = "vector"
width = 8

[features.bid]
tower = "item"
encode = "number"
scaling = "piecewise"
boundaries = [0, 0.5, 2]

[features.popularity]
tower = "item"
encode = "buckets"
unknown_rate = 0.1
unknown_group = "new"
statistic = { count = true, until = "row", every = "1d", half_life = "30d" }

[tasks.click]
label = "click"

[tasks.install]
label = "install"
given = "click"
objective = "conditional"
weight = "install_weight"

[tasks.revenue]
kind = "regression"
label = "revenue"
where = "install"
transform = "log1p"
domain = [0, 1000]
default = false

[negatives]
kind = "popularity"
per_positive = 2

[groups.age]
feature = "age"
title = "age [years]"
step = 10

[groups.slot]
feature = "slot"
top = 5
"""

_VALUES = tomllib.loads(ADS)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "ads.toml"
    file.write_text(ADS)
    return file


def values() -> dict:
    """The declaration above as a dictionary, anew for each call."""
    return copy.deepcopy(_VALUES)


def changed(changes: dict) -> dict:
    """The declaration with other values by dotted key; "-" takes a key out."""
    result = values()
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
        if value == "-":
            table.pop(key, None)
        else:
            table[key] = value
    return result


def test_reads_the_example(path):
    dataset = Dataset.from_toml(path)
    assert (dataset.name, dataset.folder, dataset.weight) == ("ads", path.parent, "importance")
    assert dataset.source == Source(path=("log/day=*/*.parquet",), time="ts")
    assert dataset.keys == Keys("user_id", "ad_id", "ad_title")
    assert dataset.items.path == ("catalogue.csv", "more.csv.gz") and dataset.items.on == "id"
    assert dataset.users is None
    assert dataset.task_names == ("click", "install", "revenue")
    assert [feature.name for feature in dataset.of_tower("item")] == [
        "ad_id",
        "advertiser",
        "title",
        "bid",
        "popularity",
    ]
    assert dataset.moments == (1_795_132_800_000, 1_795_219_200_000)
    assert dataset.task("revenue").domain == (0.0, 1000.0) and not dataset.task("revenue").default
    assert dataset.groups == (Group("age", "age", "age [years]", step=10.0), Group("slot", "slot", top=5))
    assert dataset.feature("interests") == FeatureDeclaration(
        name="interests",
        tower="user",
        encode="vocabulary",
        column="tags",
        weights="tags_weight",
        length=20,
        keep="heaviest",
        min_count=5,
        max_size=50_000,
        out_of_vocabulary_bins=100,
    )
    assert dataset.feature("clicked_ads").history == History(
        last="ad_id", weights="bid", where="click and bid > 1", within="30d"
    )
    assert dataset.feature("popularity").statistic == Statistic(count=True, until="row", every="1d", half_life="30d")


def test_what_features_read_and_own(path):
    dataset = Dataset.from_toml(path)
    assert dataset.feature("interests").source_column == "tags"
    assert dataset.feature("age").source_column == "age"
    assert dataset.feature("clicks").source_column is None and dataset.feature("popularity").source_column is None
    assert dataset.owner("clicked_ads").name == "ad_id" and dataset.owner("ad_id").name == "ad_id"
    assert dataset.owner(dataset.feature("seen_advertisers")) is dataset.feature("advertiser")
    assert dataset.feature("interests").inputs == ("interests", "interests_weights", "interests_summary")
    without = dataset.replace({"features.interests.summary": False})
    assert without.feature("interests").inputs == ("interests", "interests_weights")
    assert without.to_dict()["features"]["interests"]["summary"] is False
    assert dataset.feature("age").inputs == ("age",)
    assert dataset.feature("age").bins == 20 and dataset.feature("since").bins == 20
    assert dataset.feature("bid").bins == 0 and dataset.feature("bid").boundaries == (0.0, 0.5, 2.0)
    assert dataset.feature("seen_advertisers").keep == "heaviest"


def test_a_summary_needs_weights_and_names_of_its_own(path):
    dataset = Dataset.from_toml(path)
    with pytest.raises(DeclarationError, match=r"\[features\.age\]: `summary` is for lists with weights"):
        dataset.replace({"features.age.summary": False})
    taken = {"features.interests_summary": {"tower": "user", "encode": "buckets", "column": "age"}}
    with pytest.raises(
        DeclarationError, match=r"unless it has `summary = false`\)\. Received twice: 'interests_summary'"
    ):
        dataset.replace(taken)


def test_round_trip(path):
    dataset = Dataset.from_toml(path)
    written = dataset.to_dict()
    read = Dataset.from_dict(json.loads(json.dumps(written)), dataset.folder)
    assert read == dataset and read.folder == dataset.folder
    assert read.to_dict() == written
    assert written["split"] == {
        "by": "time",
        "validation": "2026-11-20T00:00:00Z",
        "test": "2026-11-21T00:00:00Z",
    }
    assert "bins" not in written["features"]["age"] and written["features"]["hour"]["bins"] == 24
    assert pickle.loads(pickle.dumps(dataset)) == dataset


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ({}, (0.7, 0.1, 0.2)),
        ({"by": "random", "seed": 3}, (0.7, 0.1, 0.2)),
        ({"by": "share_of_time", "validation": 0.05, "test": 0.15}, (0.8, 0.05, 0.15)),
        ({"by": "per_user", "train": 0.5, "validation": 0.25, "test": 0.25}, (0.5, 0.25, 0.25)),
        ({"by": "hash"}, (0.7, 0.1, 0.2)),
        ({"by": "hash", "column": "session"}, (0.7, 0.1, 0.2)),
        (
            {"by": "column", "column": "fold", "train": ["a", "b"], "validation": 1, "test": True},
            (("a", "b"), (1,), (True,)),
        ),
        ({"by": "time", "validation": 5, "test": 6}, (None, 5, 6)),
    ],
)
def test_splits(split, expected):
    dataset = Dataset.from_dict(changed({"split": split}))
    assert (dataset.split.train, dataset.split.validation, dataset.split.test) == expected
    assert Dataset.from_dict(dataset.to_dict()) == dataset


def test_split_by_files():
    parts = {"by": "files", "train": ["a.csv", "b.csv"], "validation": "c.csv", "test": "d/*.csv"}
    dataset = Dataset.from_dict(changed({"source.path": "-", "split": parts}))
    assert dataset.split.test == ("d/*.csv",)
    assert Dataset.from_dict(dataset.to_dict()) == dataset


@pytest.mark.parametrize(
    ("moment", "unit", "expected"),
    [
        (datetime.date(2026, 11, 20), "s", 1_795_132_800_000),
        (datetime.datetime(2026, 11, 20, 1), "s", 1_795_136_400_000),
        (
            datetime.datetime(2026, 11, 20, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
            "s",
            1_795_132_800_000,
        ),
        ("2026-11-20T00:00:00.5+00:00", "iso", 1_795_132_800_500),
        ("2026-11-20", "us", 1_795_132_800_000),
        (1_795_132_800, "s", 1_795_132_800_000),
        (1_795_132_800_000, "ms", 1_795_132_800_000),
        (1_795_132_800_000_999, "us", 1_795_132_800_000),
    ],
)
def test_moments(moment, unit, expected):
    last = 2_000_000_000_000_000 if isinstance(moment, int) else "2030-01-01"
    dataset = Dataset.from_dict(
        changed({"source.time_unit": unit, "split": {"by": "time", "validation": moment, "test": last}})
    )
    assert dataset.moments[0] == expected
    assert Dataset.from_dict(json.loads(json.dumps(dataset.to_dict()))) == dataset


def test_no_moments_of_another_split():
    with pytest.raises(ValueError, match="by = 'time'"):
        _ = Dataset.from_dict(changed({"split": {}})).moments


def test_formats():
    dataset = Dataset.from_dict(values())
    assert dataset.format_of("a/B.PARQUET") == "parquet" and dataset.format_of("x.csv.gz", "items") == "csv"
    assert dataset.format_of("x.tfrecord.gz") == "tfrecord"
    stated = dataset.replace({"source.path": "u.data", "source.format": "csv", "source.delimiter": "\t"})
    assert stated.format_of("u.data") == "csv"
    assert stated.format_of("u.item", "items") == "csv" and stated.format_of("u.parquet", "items") == "parquet"


def test_folders_and_globs_have_no_ending():
    for pattern in ("log", "log/*", "../log/day=*/", "log/*.c*"):
        assert Dataset.from_dict(changed({"source.path": pattern})).source.path == (pattern,)


def test_replace(path):
    dataset = Dataset.from_toml(path)
    other = dataset.replace(
        {"split.by": "hash", "features.age.bins": 5, "name": "other", "groups": None, "tasks.revenue.default": True}
    )
    assert other.split == Split(by="hash") and other.feature("age").bins == 5
    assert (other.name, other.groups, other.folder) == ("other", None, dataset.folder)
    assert other.task("revenue").default and not dataset.task("revenue").default
    assert other.replace({"split.test": 0.3}).split.train == pytest.approx(0.6)
    assert other.replace({"split.by": "random", "split.seed": 4}).split == Split("random", 0.7, 0.1, 0.2, seed=4)
    assert dataset.replace({"features.age.missing": None}).feature("age").missing == ()
    assert dataset.replace({"tables.users.path": "users.csv"}).users.path == ("users.csv",)
    assert dataset.replace({}) == dataset
    with pytest.raises(
        DeclarationError, match=r"^ads\.toml, \[features.age\]: has no key 'bin'\. Did you mean 'bins'\?"
    ):
        dataset.replace({"features.age.bin": 3})
    with pytest.raises(DeclarationError, match=r"has no table in which 'weight\.x' could be replaced"):
        dataset.replace({"weight.x": 3})


def test_unknown_names_of_features_and_tasks(path):
    dataset = Dataset.from_toml(path)
    with pytest.raises(DeclarationError, match=r"no feature 'intersts'\. Did you mean 'interests'\?"):
        dataset.feature("intersts")
    with pytest.raises(DeclarationError, match=r"no task 'clik'\. Did you mean 'click'\?"):
        dataset.task("clik")


FRAME = {"user_id": [1, 2], "ad_id": [3, 4], "age": [30.0, None], "click": [0, 1]}
SMALL = {
    "format": 1,
    "keys": {"user": "user_id", "item": "ad_id"},
    "features": {"age": {"tower": "user", "encode": "buckets"}},
    "tasks": {"click": {"label": "click"}},
}


@pytest.mark.parametrize(
    "log",
    [
        FRAME,
        pl.DataFrame(FRAME),
        pl.DataFrame(FRAME).lazy(),
        pd.DataFrame(FRAME),
        pa.table(FRAME),
        {**FRAME, "age": np.array([30.0, np.nan])},
    ],
    ids=["dictionary", "polars", "lazy", "pandas", "arrow", "numpy"],
)
def test_from_frame(log):
    dataset = Dataset.from_frame(log, SMALL, items={"ad_id": [3, 4], "title": np.zeros((2, 3))})
    assert set(dataset.frames) == {"log", "items"} and dataset.items.path == () and dataset.source.path == ()
    assert dataset.frames["log"].columns == list(FRAME) and dataset.frames["log"]["ad_id"].to_list() == [3, 4]
    assert dataset.frames["items"]["title"].dtype == pl.Array(pl.Float64, 3)
    assert dataset.replace({"features.age.bins": 4}).frames is not None
    assert dataset.replace({"features.age.bins": 4}).frames["log"].height == 2
    assert Dataset.from_dict(dataset.to_dict()) == dataset


def test_from_frame_with_a_file(path):
    dataset = Dataset.from_frame(FRAME, path)
    assert dataset.name == "ads" and dataset.source.path == () and dataset.source.time == "ts"
    assert dataset.items.path == ("catalogue.csv", "more.csv.gz") and dataset.folder == path.parent
    both = Dataset.from_frame(FRAME, path, users=FRAME, items=FRAME)
    assert both.items.path == () and both.items.on == "id" and set(both.frames) == {"log", "users", "items"}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (3, r"The log table must be a Polars or pandas frame, .* Received: int"),
        ({"a": [1, 2], "b": [1]}, "The log table cannot be read: "),
        (pd.DataFrame({"a": [1, "x"]}), "The log table cannot be read: "),
        (pd.Series([1]), "The log table must be a Polars or pandas frame, .* Received: Series"),
    ],
)
def test_from_frame_of_what_is_no_table(log, message):
    with pytest.raises(DataError, match=message):
        Dataset.from_frame(log, SMALL)


def test_files_do_not_split_a_frame():
    split = {"by": "files", "train": "a.csv", "validation": "b.csv", "test": "c.csv"}
    with pytest.raises(DeclarationError, match=r"\[split\]: by = \"files\" needs files"):
        Dataset.from_frame(FRAME, {**SMALL, "split": split})


WRONG = [
    # top level
    ({"format": "-"}, "top level", "`format`", "must be 1", "no `format`"),
    ({"format": 2}, "top level", "`format`", "must be 1", "Received: 2"),
    ({"format": True}, "top level", "`format`", "must be 1", "Received: True"),
    ({"featurs": {}}, "top level", "'featurs'", "Did you mean 'features'?", "Known keys: format"),
    ({"name": "a/b"}, "top level", "`name`", "letters, digits", "Received: 'a/b'"),
    ({"name": ""}, "top level", "`name`", "not empty", "Received: ''"),
    ({"weight": ["x"]}, "top level", "`weight`", "name of a column", "Received: ['x']"),
    ({"source": "-"}, "[source]", "must be given", "no such table", ""),
    ({"features": []}, "[features]", "one table per name", "Received: []", ""),
    ({"features": {}}, "[features]", 'tower = "user"', "Received: none", ""),
    ({"tasks": {}}, "[tasks]", "at least one task", "Received: none", ""),
    ({"tasks.click": "click"}, "[tasks.click]", "must be a table", "Received: 'click'", ""),
    (
        {"features.my-feature": {"tower": "user"}},
        "[features]",
        "a letter and then letters",
        "Received: 'my-feature'",
        "",
    ),
    ({"features." + "x" * 101: {"tower": "user"}}, "[features]", "at most 100", "Received: 'xxx", ""),
    # source, keys and tables
    ({"source.pth": "x"}, "[source]", "'pth'", "Did you mean 'path'?", "Known keys: path"),
    ({"source.path": 3}, "[source]", "`path`", "a path or a list of paths", "Received: 3"),
    ({"source.path": ["a.csv", 3]}, "[source]", "`path`", "a path or a list of paths", "Received: ['a.csv', 3]"),
    ({"source.path": "log.txt"}, "[source]", "`path`", "must end in .csv", "Received: 'log.txt'"),
    ({"source.path": ["a.csv", "b.parquet"]}, "[source]", "one format", "a.csv, b.parquet", ""),
    ({"source.format": "tsv"}, "[source]", "`format`", "one of csv, parquet, tfrecord", "Received: 'tsv'"),
    ({"source.time": ""}, "[source]", "`time`", "name of a column", "Received: ''"),
    ({"source.time_unit": "seconds"}, "[source]", "`time_unit`", "one of s, ms, us, iso", "Received: 'seconds'"),
    ({"source.time": "-", "source.time_unit": "ms"}, "[source]", "`time_unit`", "needs `time`", "Received: 'ms'"),
    ({"source.delimiter": ";;"}, "[source]", "`delimiter`", "one ASCII character", "Received: ';;'"),
    ({"source.null": "NA"}, "[source]", "`null`", "a list of texts", "Received: 'NA'"),
    ({"source.weight_separator": "|"}, "[source]", "`weight_separator`", "must differ", "'|'"),
    ({"keys.item": "-"}, "[keys]", "`item_name`", "needs `item`", "Received: 'ad_title'"),
    ({"keys.user": "ad_id"}, "[keys]", "`user` and `item`", "two columns", "'ad_id'"),
    ({"keys.user": "^.*$"}, "[keys]", "`user`", "name of a column", "Received: '^.*$'"),
    ({"tables.item": {}}, "[tables]", "'item'", "Did you mean 'items'?", ""),
    ({"tables.users": 3}, "[tables.users]", "must be a table", "Received: 3", ""),
    ({"tables.items.path": "x.txt"}, "[tables.items]", "`path`", "must end in", "Received: 'x.txt'"),
    ({"tables.items.key": "x"}, "[tables.items]", "'key'", "Known keys: path, on", ""),
    ({"keys.user": "-", "tables.users": {"path": "u.csv"}}, "[tables.users]", "`user` in [keys]", "no user key", ""),
    # split
    ({"split": {"by": "date"}}, "[split]", "`by`", "one of share_of_time, time", "Received: 'date'"),
    ({"split": {"test": 0.2}}, "[split]", "`validation`", "a share between 0 and 1", ""),
    ({"split": {"validation": 0, "test": 0.2}}, "[split]", "`validation`", "a share between 0 and 1", "Received: 0"),
    ({"split": {"validation": "x", "test": 0.2}}, "[split]", "`validation`", "a share", "Received: 'x'"),
    ({"split": {"validation": 0.5, "test": 0.5}}, "[split]", "`train`", "a share between 0 and 1", "Received: 0"),
    ({"split": {"train": 0.5, "validation": 0.1, "test": 0.1}}, "[split]", "sum to 1", "0.5 + 0.1 + 0.1 = 0.7", ""),
    ({"split.test": "-"}, "[split]", "`test`", "the first moment", "Received: None"),
    ({"split.test": "tomorrow"}, "[split]", "`test`", "such as 2026-11-20", "Received: 'tomorrow'"),
    ({"split.test": datetime.time(1)}, "[split]", "`test`", "such as 2026-11-20", "Received: datetime.time(1, 0)"),
    ({"split.test": datetime.date(2026, 11, 19)}, "[split]", "`validation`", "before `test`", "2026-11-19T00:00:00Z"),
    ({"split.test": 5}, "[split]", "`validation`", "written alike", "and 5"),
    ({"split.train": 0.7}, "[split]", "`train`", 'by = "time"', "Received: 0.7"),
    ({"split.column": "x"}, "[split]", "`column`", "by = hash or by = column", "Received: 'x'"),
    ({"split.seed": 3}, "[split]", "`seed`", "by = hash or by = random", "Received: 3"),
    ({"split": {"seed": -1}}, "[split]", "`seed`", "from 0 to 4,294,967,295", "Received: -1"),
    ({"source.time": "-", "split": {"by": "share_of_time"}}, "[split]", "`time` in [source]", "no time column", ""),
    ({"source.time_unit": "iso", "split.validation": 1, "split.test": 2}, "[split]", "dates or times", "1, 2", ""),
    (
        {"split": {"by": "column", "column": "f", "train": "a", "validation": "a", "test": "c"}},
        "[split]",
        "one part",
        "`train` and `validation`",
        "'a'",
    ),
    ({"split": {"by": "column", "train": 1, "validation": 2, "test": 3}}, "[split]", "`column`", "must be given", ""),
    (
        {"split": {"by": "column", "column": "f", "train": 1, "test": 3}},
        "[split]",
        "`validation`",
        "a list of values of 'f'",
        "Received: None",
    ),
    (
        {"split": {"by": "files", "train": "a.csv", "validation": "b.csv", "test": "c.csv"}},
        "[source]",
        "`path`",
        "must be left out",
        "log/day",
    ),
    # features
    ({"features.age.tower": "-"}, "[features.age]", "`tower`", "one of user, item", "no `tower`"),
    ({"features.age.tower": "usr"}, "[features.age]", "`tower`", "Did you mean 'user'?", "Received: 'usr'"),
    ({"features.age.bin": 3}, "[features.age]", "'bin'", "Did you mean 'bins'?", "Known keys: tower"),
    ({"features.age.encode": "bucket"}, "[features.age]", "`encode`", "Did you mean 'buckets'?", "Received: 'bucket'"),
    ({"features.age.encode": "-"}, "[features.age]", "`encode`", "`embedding`", "Received: neither"),
    ({"features.gender.embedding": "ad_id"}, "[features.gender]", "`encode`", "`embedding`", "Received: both"),
    ({"features.age.bins": "ten"}, "[features.age]", "`bins`", "a whole number", "Received: 'ten'"),
    ({"features.age.bins": True}, "[features.age]", "`bins`", "a whole number", "Received: True"),
    ({"features.age.bins": 2.0}, "[features.age]", "`bins`", "a whole number", "Received: 2.0"),
    ({"features.age.bins": 1}, "[features.age]", "`bins`", "from 2 to 65,536", "Received: 1"),
    ({"features.age.bins": 70_000}, "[features.age]", "`bins`", "from 2 to 65,536", "Received: 70000"),
    ({"features.age.bins": 10**30}, "[features.age]", "`bins`", "from 0 to 2,147,483,646", "Received: 1000"),
    ({"features.user_id.bins": "-"}, "[features.user_id]", "`bins`", "the number of indices", "no `bins`"),
    ({"features.hour.bins": 0}, "[features.hour]", "`bins`", "from 1 to", "no `bins`"),
    (
        {"features.user_id.bins": 2**31},
        "[features.user_id]",
        "`bins`",
        "from 0 to 2,147,483,646",
        "Received: 2147483648",
    ),
    ({"features.title.width": "-"}, "[features.title]", "`width`", "must be given", "no `width`"),
    ({"features.title.width": 65_537}, "[features.title]", "`width`", "from 0 to 65,536", "Received: 65537"),
    (
        {"features.age.min_count": 3},
        "[features.age]",
        "`min_count`",
        'no effect with encode = "buckets"',
        "Received: 3",
    ),
    ({"features.clicked_ads.bins": 3}, "[features.clicked_ads]", "`bins`", "embedding = 'ad_id'", "Received: 3"),
    ({"features.gender.min_count": 0}, "[features.gender]", "`min_count`", "from 1 to", "Received: 0"),
    ({"features.gender.min_count": 2}, "[features.gender]", "`values`", "the whole vocabulary", "`min_count`"),
    ({"features.gender.values": ["f", 1]}, "[features.gender]", "`values`", "texts or whole numbers", "['f', 1]"),
    ({"features.gender.values": ["f", "f"]}, "[features.gender]", "`values`", "must differ", "Received twice: f"),
    ({"features.gender.values": ["f", ""]}, "[features.gender]", "`values`", "none empty", "['f', '']"),
    (
        {"features.gender.type": "integer"},
        "[features.gender]",
        "`values`",
        "whole numbers",
        "Received: ['f', 'm', 'x']",
    ),
    ({"features.gender.type": "float"}, "[features.gender]", "`type`", "one of string, integer", "Received: 'float'"),
    ({"features.bid.boundaries": [1, 1]}, "[features.bid]", "`boundaries`", "increasing", "Received: [1.0, 1.0]"),
    ({"features.bid.boundaries": [1, float("inf")]}, "[features.bid]", "`boundaries`", "finite", "Received: [1, inf]"),
    ({"features.bid.boundaries": [1]}, "[features.bid]", "`boundaries`", "at least 2", "Received: [1.0]"),
    ({"features.bid.bins": 3}, "[features.bid]", "`bins` or `boundaries`", "Received: both", ""),
    ({"features.bid.scaling": "standard"}, "[features.bid]", "`boundaries`", 'scaling = "piecewise"', ""),
    ({"features.bid.scaling": "log"}, "[features.bid]", "`scaling`", "one of standard, piecewise", "Received: 'log'"),
    ({"features.interests.length": 10_001}, "[features.interests]", "`length`", "from 1 to 10,000", "Received: 10001"),
    ({"features.interests.length": 1}, "[features.interests]", "`keep`", "at least 2", "length = 1"),
    ({"features.interests.keep": "best"}, "[features.interests]", "`keep`", "first, last, heaviest", "'best'"),
    ({"features.interests.weighted": True}, "[features.interests]", "`weights`", "`weighted`", "Received: both"),
    ({"features.age.length": 3}, "[features.age]", "`length`", "no effect", "Received: 3"),
    (
        {"features.interests.unknown_rate": 0.5},
        "[features.interests]",
        "`unknown_rate`",
        "single values",
        "length = 20",
    ),
    ({"features.age.unknown_rate": 1.5}, "[features.age]", "`unknown_rate`", "from 0 to 1", "Received: 1.5"),
    ({"features.age.unknown_rate": float("nan")}, "[features.age]", "`unknown_rate`", "finite number", "Received: nan"),
    ({"features.gender.unknown_group": "g"}, "[features.gender]", "`unknown_group`", "`unknown_rate` above 0", "'g'"),
    ({"features.popularity.unknown_rate": 0.2}, "[features.popularity]", "`unknown_rate`", "one tower", "item, 0.2"),
    ({"features.age.unknown_group": "ad_id"}, "[features.age]", "`unknown_group`", "name of a feature", "'ad_id'"),
    ({"features.age.missing": -1}, "[features.age]", "`missing`", "a list of texts or numbers", "Received: -1"),
    ({"features.clicks.missing": [0]}, "[features.clicks]", "`missing`", "use its `where`", "Received: [0]"),
    ({"features.ad_id.context": True}, "[features.ad_id]", "`context`", 'tower = "user"', "Received: 'item'"),
    ({"features.clicks.context": True}, "[features.clicks]", "`context`", "not for a history", "Received: true"),
    ({"features.gender.profile_value": "f"}, "[features.gender]", "`profile_value`", "context = true", "Received: 'f'"),
    ({"features.slot.profile_value": ["a"]}, "[features.slot]", "`profile_value`", "a text or a number", "['a']"),
    ({"features.gender.column": "click"}, "[features.gender]", "`column`", "the label of a task", "[tasks.click]"),
    (
        {"source.delimiter": "|", "features.gender.length": 3},
        "[source]",
        "`delimiter` and `list_separator` must differ",
        "[features.gender]",
        "Received twice: '|'",
    ),
    (
        {"source.delimiter": ":", "features.gender.length": 3, "features.gender.weighted": True},
        "[source]",
        "`delimiter` and `weight_separator` must differ",
        "[features.gender]",
        "Received twice: ':'",
    ),
    (
        {"features.clicked_ads.embedding": "adid"},
        "[features.clicked_ads]",
        "`embedding`",
        "Did you mean 'ad_id'?",
        "'adid'",
    ),
    (
        {"features.clicked_ads.embedding": "age"},
        "[features.clicked_ads]",
        "`embedding`",
        "has indices",
        "Received: 'age'",
    ),
    (
        {
            "features.tags": {"tower": "user", "encode": "hash", "bins": 3, "length": 2},
            "features.tags_weights": {"tower": "user", "encode": "hash", "bins": 3},
        },
        "[features.tags_weights]",
        "different names",
        "[features.tags]",
        "",
    ),
    (
        {"features.click": {"tower": "user", "encode": "hash", "bins": 3, "column": "c"}},
        "[tasks.click]",
        "different names",
        "'click'",
        "[features.click]",
    ),
    (
        {"features.user_rows": {"tower": "user", "encode": "hash", "bins": 3}},
        "[features.user_rows]",
        "different names",
        "the model itself",
        "",
    ),
    (
        {"features.k": {"tower": "user", "encode": "hash", "bins": 3}},
        "[features.k]",
        "an input of exported models",
        'column = "k"',
        "",
    ),
    (
        {"features.class": {"tower": "user", "encode": "hash", "bins": 3}},
        "[features.class]",
        "a word of Python",
        'column = "class"',
        "",
    ),
    (
        {"features.Age": {"tower": "user", "encode": "hash", "bins": 3}},
        "[features.Age]",
        "more than capital letters",
        "'Age' and 'age'",
        "",
    ),
    (
        {"features.age_weights": {"tower": "user", "encode": "hash", "bins": 3}},
        "[features.age_weights]",
        "belongs to the feature 'age'",
        'column = "age_weights"',
        "",
    ),
    (
        {"tasks.val_click": {"label": "click"}},
        "[tasks.val_click]",
        "another name for the task",
        "'val_click'",
        "",
    ),
    # histories and statistics
    ({"features.clicks.history": "click"}, "[features.clicks] history", "must be a table", "Received: 'click'", ""),
    ({"features.clicks.history": {}}, "[features.clicks] history", "exactly one of last, counts", "Received: none", ""),
    (
        {"features.clicks.history": {"count": True, "since": True}},
        "[features.clicks] history",
        "exactly one",
        "Received: count, since",
        "",
    ),
    (
        {"features.clicks.history": {"count": "click"}},
        "[features.clicks] history",
        "`count` must be true",
        "where = 'click'",
        "",
    ),
    ({"features.clicks.history": {"of": "click"}}, "[features.clicks] history", "'of'", "Known keys: last", ""),
    (
        {"features.clicks.history.within": "a week"},
        "[features.clicks] history",
        "`within`",
        'such as "30d"',
        "'a week'",
    ),
    ({"features.clicks.history.where": "sum(x) > 1"}, "[features.clicks] history", "`where`", "one row", "'sum'"),
    ({"features.clicks.history.weights": "x"}, "[features.clicks] history", "`weights`", "no `last`", "Received: 'x'"),
    (
        {"features.clicks.encode": "vocabulary", "features.clicks.bins": "-"},
        "[features.clicks]",
        "`encode`",
        "buckets, number, integer",
        "'vocabulary'",
    ),
    (
        {"features.click_share.encode": "integer", "features.click_share.bins": 3},
        "[features.click_share]",
        "`encode`",
        "buckets, number",
        "'integer'",
    ),
    ({"features.clicked_ads.length": "-"}, "[features.clicked_ads]", "`length`", "history.last", "Received: 1"),
    (
        {"features.seen_advertisers.length": "-"},
        "[features.seen_advertisers]",
        "`length`",
        "history.counts",
        "Received: 1",
    ),
    ({"features.clicked_ads.keep": "last"}, "[features.clicked_ads]", "`keep`", "list columns", "Received: 'last'"),
    ({"features.clicked_ads.weights": "w"}, "[features.clicked_ads]", "`weights`", "history.weights", "Received: 'w'"),
    ({"features.clicks.column": "c"}, "[features.clicks]", "`column` or `history`", "Received: 'c'", ""),
    ({"features.clicks.tower": "item"}, "[features.clicks]", "`history`", 'tower = "user"', "Received: 'item'"),
    ({"features.popularity.tower": "user"}, "[features.popularity]", "`statistic`", 'tower = "item"', "'user'"),
    (
        {"features.popularity.statistic.until": "now"},
        "[features.popularity] statistic",
        "`until`",
        "training, row",
        "'now'",
    ),
    (
        {"features.popularity.statistic.until": "training"},
        "[features.popularity] statistic",
        "`every`",
        'until = "row"',
        "'1d'",
    ),
    (
        {"features.popularity.statistic.half_life": "1y"},
        "[features.popularity] statistic",
        "`half_life`",
        "a duration",
        "'1y'",
    ),
    (
        {"features.popularity.history": {"count": True}},
        "[features.popularity]",
        "`history` or `statistic`",
        "Received: both",
        "",
    ),
    ({"keys.user": "-", "negatives": "-"}, "[features.clicked_ads]", "`history`", "`user` in [keys]", "no user key"),
    (
        {"source.time": "-", "split": {}, "negatives": "-"},
        "[features.clicked_ads]",
        "`history`",
        "`time` in [source]",
        "no time column",
    ),
    # tasks
    ({"tasks.click.label": "-"}, "[tasks.click]", "`label`", "must be given", "no `label`"),
    ({"tasks.click.label": 3}, "[tasks.click]", "`label`", "a column or a SQL condition", "Received: 3"),
    ({"tasks.click.label": "click >"}, "[tasks.click]", "`label`", "a column or a SQL condition", "'click >'"),
    (
        {"tasks.click.kind": "classification"},
        "[tasks.click]",
        "`kind`",
        "one of binary, regression",
        "'classification'",
    ),
    ({"tasks.install.given": "clik"}, "[tasks.install]", "`given`", "Did you mean 'click'?", "Received: 'clik'"),
    ({"tasks.click.given": "install"}, "[tasks.click]", "`given`", "a binary task before it: none", "'install'"),
    ({"tasks.revenue.given": "click"}, "[tasks.revenue]", "`given`", "for binary tasks", "kind = 'regression'"),
    ({"tasks.click.transform": "log1p"}, "[tasks.click]", "`transform`", "for regression tasks", "kind = 'binary'"),
    ({"tasks.revenue.transform": "log"}, "[tasks.revenue]", "`transform`", "one of log1p", "Received: 'log'"),
    ({"tasks.revenue.domain": [3, 1]}, "[tasks.revenue]", "`domain`", "lowest and the highest", "[3.0, 1.0]"),
    ({"tasks.revenue.domain": [1, 2, 3]}, "[tasks.revenue]", "`domain`", "lowest and the highest", "[1.0, 2.0, 3.0]"),
    ({"tasks.revenue.domain": [-2, 3]}, "[tasks.revenue]", "`domain`", "above -1", "[-2.0, 3.0]"),
    ({"tasks.click.objective": "marginal"}, "[tasks.click]", "`objective`", "needs `given`", "'marginal'"),
    ({"tasks.install.objective": "esmm"}, "[tasks.install]", "`objective`", "one of joint", "Received: 'esmm'"),
    ({"tasks.click.default": 1}, "[tasks.click]", "`default`", "true or false", "Received: 1"),
    (
        {"tasks.click.default": False, "tasks.install.default": False},
        "[tasks]",
        "at least one task",
        "default = false in all",
        "",
    ),
    # negatives and groups
    ({"negatives.kind": "random"}, "[negatives]", "`kind`", "none, uniform, popularity", "Received: 'random'"),
    ({"negatives.per_positive": 0}, "[negatives]", "`per_positive`", "from 1 to 1,000", "Received: 0"),
    ({"negatives.future": "yes"}, "[negatives]", "`future`", "true or false", "Received: 'yes'"),
    ({"groups.age.feature": "aeg"}, "[groups.age]", "`feature`", "Did you mean 'age'?", "Received: 'aeg'"),
    ({"groups.age.feature": "title"}, "[groups.age]", "a vector", "Received: 'title'", ""),
    ({"groups.age.feature": "-"}, "[groups.age]", "`feature`", "must be given", ""),
    ({"groups.age.top": 3}, "[groups.age]", "at most one of bounds, step", "Received: step, top", ""),
    ({"groups.age.bounds": [3, 2], "groups.age.step": "-"}, "[groups.age]", "`bounds`", "increasing", "[3.0, 2.0]"),
    ({"groups.age.step": -1}, "[groups.age]", "`step`", "from 0 to", "Received: -1"),
    (
        {"groups.slot": {"feature": "slot", "step": 2}, "features.slot.type": "string"},
        "[groups.slot]",
        "bands need a number",
        'type = "string"',
        "step",
    ),
]


@pytest.mark.parametrize(("changes", "place", "key", "expected", "received"), WRONG)
def test_wrong_declarations(changes, place, key, expected, received):
    with pytest.raises(DeclarationError) as error:
        Dataset.from_dict(changed(changes), where="ads.toml")
    message = str(error.value)
    assert message.startswith(f"ads.toml, {place}: ")
    assert key in message and expected in message and received in message
    assert "\n" not in message and len(message) < 900


def test_kinds_of_wrong_declarations_are_many():
    assert len(WRONG) >= 150


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ([], r"declaration, top level: must be a table\. Received: \[\]"),
        (None, "declaration, top level: must be a table. Received: None"),
        ({3: 4}, "declaration, top level: has no key 3"),
    ],
)
def test_what_is_no_table(declaration, message):
    with pytest.raises(DeclarationError, match=message):
        Dataset.from_dict(declaration)


def test_negatives_need_keys_time_and_a_binary_task():
    feature = {"u": {"tower": "user", "encode": "hash", "bins": 3}}
    small = {
        "format": 1,
        "source": {},
        "features": feature,
        "tasks": {"t": {"label": "y"}},
        "negatives": {"kind": "uniform"},
    }
    with pytest.raises(DeclarationError, match=r"\[negatives\]: needs `user` in \[keys\]"):
        Dataset.from_dict(small)
    with pytest.raises(DeclarationError, match=r"\[negatives\]: needs `item` in \[keys\]"):
        Dataset.from_dict({**small, "keys": {"user": "u"}})
    keyed = {**small, "keys": {"user": "u", "item": "i"}}
    with pytest.raises(DeclarationError, match=r"\[negatives\]: needs `time` in \[source\], or `future = true`"):
        Dataset.from_dict(keyed)
    future = {**keyed, "negatives": {"kind": "uniform", "future": True}}
    assert Dataset.from_dict(future).negatives.future
    with pytest.raises(DeclarationError, match=r"\[negatives\]: needs a binary task"):
        Dataset.from_dict({**future, "tasks": {"t": {"label": "y", "kind": "regression"}}})


def test_keys_that_splits_and_statistics_need():
    small = {**SMALL, "source": {"time": "t"}, "keys": {}}
    with pytest.raises(DeclarationError, match=r'\[split\]: by = "per_user" needs `user` in \[keys\]'):
        Dataset.from_dict({**small, "split": {"by": "per_user"}})
    with pytest.raises(DeclarationError, match=r'\[split\]: by = "hash" needs `column`, or `user` in \[keys\]'):
        Dataset.from_dict({**small, "split": {"by": "hash"}})
    mean = {"tower": "item", "encode": "number", "statistic": {"mean": "bid"}}
    with pytest.raises(DeclarationError, match=r"\[features.mean\]: `statistic` needs `item` in \[keys\]"):
        Dataset.from_dict({**small, "features": {**SMALL["features"], "mean": mean}})
    decayed = {**mean, "statistic": {"mean": "bid", "half_life": "1d"}}
    timeless = {**small, "source": {}, "keys": {"item": "i"}, "features": {**SMALL["features"], "mean": decayed}}
    with pytest.raises(DeclarationError, match=r"\[features.mean\]: statistic.half_life needs `time` in \[source\]"):
        Dataset.from_dict(timeless)


def test_a_side_table_may_have_a_column_of_the_labels_name():
    changes = {"features.advertiser.column": "click"}
    assert Dataset.from_dict(changed(changes)).feature("advertiser").column == "click"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("format = 1\nformat = 2\n", r"is no valid TOML: Cannot overwrite a value \(at line 2, column 11\)"),
        ("format = 1\n[source\n", r"is no valid TOML: .* \(at line 2, column 8\)"),
        ("x = " + "[" * 50_000, "is nested too deeply"),
        ("a." * 50_000 + "a = 1", "line 1: a key has too many dots. Expected: at most 64"),
        ("x = 1" + "0" * 5_000, "is no valid TOML: "),
        ("x = 2026-13-45", "is no valid TOML: "),
        (b"format = 1\n# \xff\n", "line 2: no text in UTF-8"),
        (b"\0", "is no valid TOML: "),
        ("x" * (2**24 + 1), "is too large for a declaration. Expected: at most 16,777,216 bytes"),
        ("", "top level: `format` must be 1"),
        (
            ADS.replace('path = "log/day=*/*.parquet"', ""),
            r"ads.toml, \[source\]: `path` must be a path or a list of paths",
        ),
        (
            ADS.replace('path = ["catalogue.csv", "more.csv.gz"]', ""),
            r"ads.toml, \[tables.items\]: `path` must be a path",
        ),
    ],
)
def test_wrong_files(path, content, message):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DeclarationError, match=message) as error:
        Dataset.from_toml(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_files_that_cannot_be_read(path, tmp_path):
    with pytest.raises(DeclarationError, match=r"adds.toml is no file. Did you mean 'ads.toml'\?"):
        Dataset.from_toml(tmp_path / "adds.toml")
    with pytest.raises(DeclarationError, match="is no file"):
        Dataset.from_toml(tmp_path)
    with pytest.raises(DeclarationError, match="is no file"):
        Dataset.from_toml("nul\0byte.toml")
    log = tmp_path / "log.csv"
    log.write_text("a,b\n1,2\n")
    with pytest.raises(DeclarationError, match=r"log.csv is a table\. .*`mvke init .*log.csv` writes a draft"):
        Dataset.from_toml(log)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(DeclarationError, match="is no file"):
        Dataset.from_toml(tmp_path / "pipe.toml")


def test_byte_order_mark_and_windows_lines(path):
    path.write_bytes(b"\xef\xbb\xbf" + ADS.replace("\n", "\r\n").encode())
    assert Dataset.from_toml(str(path)).task_names == ("click", "install", "revenue")


def test_names_from_files(path):
    for stem, name in (("my data (1)", "my_data_1_"), ("-x", "x"), ("ä", "data"), ("2026-11.clicks", "2026-11.clicks")):
        renamed = path.rename(path.with_name(stem + ".toml"))
        assert Dataset.from_toml(renamed).name == name
        path = renamed


def test_dataclasses_check_without_a_file():
    with pytest.raises(DeclarationError, match=r"^\[features.age\]: `bins` must be a whole number. Received: 'x'$"):
        FeatureDeclaration("age", "user", "buckets", bins="x")
    with pytest.raises(DeclarationError, match=r"^\[features.age\] history: exactly one of "):
        FeatureDeclaration("age", "user", "buckets", history={})
    with pytest.raises(DeclarationError, match=r"^\[tasks.t\]: `label` must be given"):
        TaskDeclaration("t")
    feature = FeatureDeclaration("age", "user", "buckets", bins=np.int64(4), unknown_rate=np.float32(0.5))
    assert type(feature.bins) is int and type(feature.unknown_rate) is float
    assert type(Source(path=["a.csv"]).path) is tuple


def test_published_schema_fits():
    """Keys and legal words of the JSON Schema are those that are read, and all are explained."""
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    feature = schema["properties"]["features"]["additionalProperties"]
    assert feature["properties"]["encode"]["enum"] == ["vocabulary", "hash", "buckets", "integer", "number", "vector"]
    assert feature["properties"]["unknown_rate"]["maximum"] == 1 and feature["required"] == ["tower"]
    assert "last" in feature["properties"]["history"]["properties"]
    assert schema["additionalProperties"] is False and feature["additionalProperties"] is False

    def check(schema, declared):
        assert set(declared) <= set(schema["properties"])
        for key, value in declared.items():
            part = schema["properties"][key]
            if isinstance(value, dict) and "properties" in part:
                check(part, value)
            elif isinstance(value, dict):
                for name, table in value.items():
                    assert re.fullmatch(part["propertyNames"]["pattern"][1:-1], name)
                    check(part["additionalProperties"], table)

    check(schema, values())
    texts = list(_descriptions(schema))
    assert len(texts) > 80 and all(len(text) > 5 for text in texts)


def test_published_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    # JSON has no dates.
    declared = Dataset.from_dict(values()).to_dict()
    assert not list(validator.iter_errors(declared))
    for changes in ({"features.age.bin": 3}, {"features.age.encode": "bucket"}, {"tasks.click.label": "-"}, {"x": 1}):
        assert list(validator.iter_errors({**changed(changes), "split": {}})), changes


def test_the_page_is_true():
    """Every piece of TOML on the page is legal, as a whole or with what it needs beside it."""
    page = (REPOSITORY / "docs" / "dataset.md").read_text(encoding="utf-8")
    pieces = [tomllib.loads(piece) for piece in re.findall(r"```toml\n(.*?)```", page, re.DOTALL)]
    wholes = [piece for piece in pieces if "format" in piece]
    assert len(wholes) == 2 and len(pieces) > 15
    for whole in wholes:
        Dataset.from_dict(whole)
    for piece in pieces:
        if "format" not in piece:
            small = changed({"groups": "-", "negatives": "-", "split": piece.get("split", {}), "source.path": "x.csv"})
            ad = {"tower": "item", "encode": "vocabulary"}
            some = {"tower": "user", "encode": "hash", "bins": 3}
            small["features"] = {"ad_id": ad, "some": some, **piece.get("features", {})}
            small["tasks"] |= piece.get("tasks", {})
            Dataset.from_dict(small)
    # Every key is explained.
    for cls in (Source, Keys, FeatureDeclaration, TaskDeclaration, History, Statistic, Group, Negatives, Split):
        for field in dataclasses.fields(cls):
            assert field.name == "name" or re.search(rf"`[^`]*\b{field.name}\b[^`]*`", page), (cls, field.name)


def _descriptions(schema):
    for key, value in schema.items():
        if key == "description" and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _descriptions(value)


def _paths(table, prefix=()):
    for key, value in table.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.datetimes(),
    st.times(),
    st.binary(max_size=3),
    st.sampled_from(["user", "item", "vocabulary", "hash", "vector", "30d", "ad_id", "click", "time", "row", "files"]),
)
_ANYTHING = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(_paths(_VALUES))),
            st.sampled_from(["replace", "remove", "add"]),
            st.sampled_from(["bins", "length", "history", "values", "x", ""]) | st.text(max_size=4),
            _ANYTHING,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_change_is_legal_or_an_error_of_one_line(mutations):
    mutated = values()
    for path, what, name, value in mutations:
        table = mutated
        for key in path[:-1]:
            table = table.get(key) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            continue
        if what == "remove":
            table.pop(path[-1], None)
        elif what == "replace":
            table[path[-1]] = value
        elif isinstance(table.get(path[-1]), dict):
            table[path[-1]][name] = value
    try:
        dataset = Dataset.from_dict(mutated)
    except DeclarationError as error:
        assert "\n" not in str(error) and len(str(error)) < 1_500 and str(error).startswith("declaration, ")
    else:
        assert Dataset.from_dict(json.loads(json.dumps(dataset.to_dict()))) == dataset


@given(_ANYTHING)
def test_anything_at_all(value):
    with pytest.raises(DeclarationError):
        Dataset.from_dict(value)
