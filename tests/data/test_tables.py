# SPDX-License-Identifier: Apache-2.0
"""Tables as they are stored, and one-line errors that name file, row, column and value."""

import datetime
import gzip
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.files import Digests, frame_digest
from mvke_tf.data.tables import Lists, Table, _source, fingerprint, read_tables, without
from mvke_tf.errors import DataError


def declaration(**changes) -> dict:
    """A legal declaration of few columns."""
    values = {
        "format": 1,
        "name": "shop",
        "source": {"path": "log.csv"},
        "features": {"age": {"tower": "user", "encode": "number"}},
        "tasks": {"click": {"label": "click"}},
    }
    return values | changes


def dataset(folder: Path, **changes) -> Dataset:
    return Dataset.from_dict(declaration(**changes), folder)


def table(columns, **options) -> Table:
    frame = columns if isinstance(columns, pl.DataFrame) else pl.DataFrame(columns)
    return Table("log", frame, [("log.parquet", frame.height)], "parquet", **options)


def all_columns(declared: Dataset) -> Table:
    """The log with columns that the declaration does not name, too."""
    source = _source(declared, "log")
    return source.read(source.available, None)


def csv_table(tmp_path: Path, text: str, **source) -> Table:
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    declared = dataset(tmp_path, source={"path": "log.csv", **source})
    return all_columns(declared)


def assert_lists(lists: Lists, values: list, weights: list | None = None) -> None:
    offsets = lists.offsets
    assert [lists.values[a:b].to_list() for a, b in itertools.pairwise(offsets)] == values
    if weights is None:
        assert lists.weights is None
    else:
        assert [lists.weights[a:b].tolist() for a, b in itertools.pairwise(offsets)] == weights


# Casts


def test_cells_of_a_csv_are_text_and_cast_by_their_use(tmp_path):
    rows = csv_table(
        tmp_path,
        'user,n,tags,t,flag\nu1,1,a|b,2026-11-24T12:00:00Z,true\n"x,\ny", 2.5,,2026-11-24 13:00:00+02:00,0\n07,NaN,c||,'
        "2026-11-24,\n8,-,\\N,2026-11-24,FALSE\n",
        null=["-", "\\N"],
    )
    assert rows.frame.dtypes == [pl.String] * 5
    assert rows.scalars("user", "string").to_list() == ["u1", "x,\ny", "07", "8"]
    assert rows.numbers("n").to_list() == [1, 2.5, None, None]
    assert rows.numbers("flag", words=True).to_list() == [1, 0, None, 0]
    assert_lists(rows.lists("tags", "string"), [["a", "b"], [], ["c", None, None], []])
    assert rows.times("t", "iso").tolist() == [1795521600000, 1795518000000, 1795478400000, 1795478400000]
    assert rows.natural_kind("user") == "string"


def test_natural_kinds(tmp_path):
    rows = csv_table(tmp_path, "a,b,c,d,e\n1,01,1.0,-5,1|2\n20,2,2,,3\n")
    assert [rows.natural_kind(name) for name in "abcd"] == ["integer", "string", "string", "integer"]
    assert rows.natural_kind("e", lists=True) == "integer"
    typed = table(
        {
            "float": [1.0, None, 3.0],
            "fraction": [1.5, None, 3.0],
            "flag": [True, None, False],
            "text": ["1", "2", "3"],
            "list": [[1], [2, 3], None],
            "nothing": [None, None, None],
            "day": [datetime.date(2026, 1, 1)] * 3,
        }
    )
    kinds = [typed.natural_kind(name) for name in typed.frame.columns]
    assert kinds == ["integer", "string", "integer", "string", "integer", "string", "string"]


def test_stored_types():
    rows = table(
        {
            "f": pl.Series([1.0, None, 3.0], dtype=pl.Float32),
            "i": pl.Series([1, 2, 3], dtype=pl.UInt8),
            "b": [True, None, False],
            "day": [datetime.date(2026, 1, 1)] * 3,
            "zone": pl.Series([datetime.datetime(2026, 1, 1, 12)] * 3).dt.replace_time_zone("Europe/Rome"),
            "bytes": [b"a", None, "ü".encode()],
            "decimal": pl.Series(["1.5", "2.0", None]).cast(pl.Decimal(10, 2)),
            "null": [None] * 3,
        }
    )
    assert rows.scalars("f", "integer").to_list() == [1, None, 3]
    assert rows.scalars("f", "string").to_list() == ["1", None, "3"]
    assert rows.scalars("i", "string").to_list() == ["1", "2", "3"]
    assert rows.scalars("b", "string").to_list() == ["true", None, "false"]
    assert rows.scalars("b", "integer").to_list() == [1, None, 0]
    assert rows.numbers("b").to_list() == [1, None, 0]
    assert rows.scalars("day", "string").to_list() == ["2026-01-01"] * 3
    assert rows.scalars("bytes", "string").to_list() == ["a", None, "ü"]
    assert rows.numbers("decimal").to_list() == [1.5, 2, None]
    assert rows.scalars("null", "string").to_list() == [None] * 3
    assert rows.scalars("null", "integer").to_list() == rows.numbers("null").to_list() == [None] * 3
    assert rows.times("day", "s").tolist() == [1767225600000] * 3
    assert rows.times("zone", "s").tolist() == [1767225600000 + 11 * 3_600_000] * 3


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0, 5, -3], "s", [0, 5000, -3000]),
        ([1.2345, 2.0], "s", [1234, 2000]),
        ([1700000000123], "ms", [1700000000123]),
        ([1700000000123456], "us", [1700000000123]),
        (["1.5", "2"], "s", [1500, 2000]),
        (["2026-11-24T00:00:00.5", "2026-11-24 00:00:00.25+00:00"], "iso", [1795478400500, 1795478400250]),
    ],
)
def test_moments(values, unit, expected):
    assert table({"t": values}).times("t", unit).tolist() == expected


def test_weighted_lists(tmp_path):
    rows = csv_table(tmp_path, "tags,w\nsport:0.8|a:b:0.1,1|2\n,\nx:2,3\n")
    assert_lists(rows.lists("tags", "string", weighted=True), [["sport", "a:b"], [], ["x"]], [[0.8, 0.1], [], [2]])
    typed = table({"tags": [["a", "b"], None, []], "w": [[1, 2], None, None]})
    assert_lists(typed.lists("tags", "string", "w"), [["a", "b"], [], []], [[1, 2], [], []])


def test_vectors(tmp_path):
    typed = table({"v": [[1.0, 2.0], None, [], [float("nan"), 1.0]]})
    np.testing.assert_array_equal(typed.vectors("v", 2), np.float32([[1, 2], *[[np.nan, np.nan]] * 3]))
    fixed = table({"v": pl.Series([[1.0, 2.0], None], dtype=pl.Array(pl.Float64, 2))})
    np.testing.assert_array_equal(fixed.vectors("v", 2), np.float32([[1, 2], [np.nan, np.nan]]))
    rows = csv_table(tmp_path, "v,x\n1|2.5,0\n,0\n")
    np.testing.assert_array_equal(rows.vectors("v", 2), np.float32([[1, 2.5], [np.nan, np.nan]]))


def test_missing_words():
    assert without(pl.Series(["a", "?", None, "-1"]), ["?", -1]).to_list() == ["a", None, None, None]
    assert without(pl.Series([1, -1, None]), [-1, "?", 0.5]).to_list() == [1, None, None]
    assert without(pl.Series([1.5, -1, 0]), [-1, 1.5]).to_list() == [None, None, 0]
    words = table({"n": ["1", "?", "-1", "2"]})
    assert words.scalars("n", "number", ["?", -1]).to_list() == [1, None, None, 2]
    assert words.scalars("n", "integer", ["?", -1]).to_list() == [1, None, None, 2]


def test_lists_take():
    lists = Lists(np.array([0, 2, 2, 3]), pl.Series(["a", "b", "c"]), np.array([1.0, 2.0, 3.0]))
    assert_lists(
        lists.take(np.array([2, -1, 0, 1, 0])), [["c"], [], ["a", "b"], [], ["a", "b"]], [[3], [], [1, 2], [], [1, 2]]
    )


# Sources


def test_globs_lists_folders_and_gzip(tmp_path):
    (tmp_path / "log").mkdir()
    for name, value in (("b", 2), ("a", 1), ("c", 3)):
        (tmp_path / "log" / f"{name}.csv.gz").write_bytes(gzip.compress(f"age,click\n{value},0\n".encode()))
    (tmp_path / "log" / "_SUCCESS").write_text("")

    def ages(path):
        return read_tables(dataset(tmp_path, source={"path": path, "format": "csv"})).log["age"].to_list()

    assert ages("log/*.csv.gz") == ages("log") == ["1", "2", "3"]
    assert ages(["log/c.csv.gz", "log/[ab].csv.gz"]) == ["3", "1", "2"]


def test_only_needed_columns_are_read(tmp_path):
    (tmp_path / "log.csv").write_text("click,other,age\n1,x,2\n")
    tables = read_tables(dataset(tmp_path))
    assert sorted(tables.log.columns) == ["age", "click"]
    assert tables.tables["log"].available == ("click", "other", "age")
    assert tables.users is None and tables.items is None
    assert all_columns(dataset(tmp_path)).frame.columns == ["click", "other", "age"]


def test_first_rows(tmp_path):
    (tmp_path / "log.csv").write_text("age,click\n" + "1,0\n" * 50)
    pl.DataFrame({"age": [1] * 50, "click": 0}).write_parquet(tmp_path / "log.parquet")
    for path in ("log.csv", "log.parquet"):
        declared = dataset(tmp_path, source={"path": path})
        assert read_tables(declared, rows=7).log.height == 7
        assert read_tables(declared).log.height == 50


def test_unknown_is_null_in_conditions_too(tmp_path):
    pl.DataFrame({"age": [1.0, float("nan"), None], "click": ["", "1", None]}).write_parquet(tmp_path / "log.parquet")
    log = read_tables(dataset(tmp_path, source={"path": "log.parquet"})).log
    assert log["age"].to_list() == [1, None, None]
    assert log["click"].to_list() == [None, "1", None]


def test_whole_numbers_and_fractions_in_several_files(tmp_path):
    pl.DataFrame({"age": [1], "click": [0]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"click": [None], "age": [1.5]}).write_parquet(tmp_path / "b.parquet")
    log = read_tables(dataset(tmp_path, source={"path": "*.parquet"})).log
    assert log["age"].to_list() == [1, 1.5]
    assert log["click"].to_list() == [0, None]


def write_records(path: Path, records: list[dict], compression: str = "") -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for record in records:
            features = {}
            for name, values in record.items():
                if isinstance(values, bytes):
                    writer.write(values)
                    break
                if not values:
                    features[name] = tf.train.Feature()
                    continue
                features[name] = {
                    int: lambda v: tf.train.Feature(int64_list=tf.train.Int64List(value=v)),
                    float: lambda v: tf.train.Feature(float_list=tf.train.FloatList(value=v)),
                    str: lambda v: tf.train.Feature(bytes_list=tf.train.BytesList(value=[x.encode() for x in v])),
                }[type(values[0])](values)
            else:
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


LISTS = {
    "age": {"tower": "user", "encode": "number"},
    "tags": {"tower": "user", "encode": "vocabulary", "length": 3},
}


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_records(tmp_path, compression):
    path = "log.tfrecord" + (".gz" if compression else "")
    records = [
        {"click": [1], "tags": ["a"]},
        {"click": [0], "age": [2.5], "tags": ["b"], "more": [1, 2]},
        {"click": [0], "age": [], "other": [1]},
    ]
    write_records(tmp_path / path, records, compression)
    tables = read_tables(dataset(tmp_path, source={"path": path}, features=LISTS))
    assert tables.log["click"].to_list() == [1, 0, 0]
    assert tables.log["age"].to_list() == [None, 2.5, None]
    # A list by declaration, though no record has two values.
    assert tables.log["tags"].to_list() == [["a"], ["b"], []]
    every = all_columns(dataset(tmp_path, source={"path": path}, features=LISTS)).frame
    assert every["more"].to_list() == [[], [1, 2], []]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"click": [1], "age": [1.0]}, {"click": ["x"]}],
            r"record 2, column 'click': expected values of type int64.*: string",
        ),
        ([{"click": [1], "age": [1.0]}, {"raw": b"\xff\xff"}], r"record 2: expected a tf\.train\.Example"),
        ([{"click": [1], "ages": [1.0]}], r"no column 'age'\. Did you mean 'ages'\?"),
    ],
)
def test_wrong_records(tmp_path, records, message):
    write_records(tmp_path / "log.tfrecord", records)
    with pytest.raises(DataError, match=message):
        read_tables(dataset(tmp_path, source={"path": "log.tfrecord"}))


def test_damaged_records(tmp_path):
    path = tmp_path / "log.tfrecord"
    write_records(path, [{"click": [1], "age": [1.0]}] * 3)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"log\.tfrecord is damaged after record 2"):
        read_tables(dataset(tmp_path, source={"path": "log.tfrecord"}))


# Wrong tables: the message is one line, and names the place.

CELLS = "age,click,tags,w,t\n30,1,a:1|b:2,1|2,10\n"


@pytest.mark.parametrize(
    ("line", "use", "message"),
    [
        (
            "abc,,,,",
            lambda t: t.numbers("age"),
            r"log\.csv, line 3, column 'age': expected a finite number.*Received: 'abc'",
        ),
        ("inf,,,,", lambda t: t.numbers("age"), r"log\.csv, line 3, column 'age': expected a finite number.*'inf'"),
        ("1_000,,,,", lambda t: t.numbers("age"), "line 3, column 'age'.*'1_000'"),
        (
            "1.5,,,,",
            lambda t: t.scalars("age", "integer"),
            r"line 3, column 'age': expected a whole number.*'1\.5'.*type = \"string\"",
        ),
        (
            "9223372036854775808,,,,",
            lambda t: t.scalars("age", "integer"),
            "line 3.*expected a whole number of 64 bits",
        ),
        (",yes,,,", lambda t: t.numbers("click", words=True), "line 3, column 'click': expected.*true or false.*'yes'"),
        (
            ",,a,,",
            lambda t: t.lists("tags", "string", weighted=True),
            "line 3, column 'tags': expected a value and its weight",
        ),
        (
            ",,a:x,,",
            lambda t: t.lists("tags", "string", weighted=True),
            "line 3, column 'tags': expected a finite number.*'x'",
        ),
        (
            ",,a:-1,,",
            lambda t: t.lists("tags", "string", weighted=True),
            "line 3, column 'tags': expected a weight.*'-1'",
        ),
        (
            ",,a:,,",
            lambda t: t.lists("tags", "string", weighted=True),
            "line 3, column 'tags': expected a weight.*nothing",
        ),
        (
            ",,a|b,1,",
            lambda t: t.lists("tags", "string", "w"),
            "line 3: expected as many weights in column 'w' as values in 'tags'. Received: 1 weights of 2",
        ),
        (",,,1|x,", lambda t: t.lists("w", "number"), "line 3, column 'w'.*Received: 'x'"),
        (",,,1|2|3,", lambda t: t.vectors("w", 2), "line 3, column 'w': expected a list of 2 numbers. Received: 3"),
        (",,,,", lambda t: t.times("t", "s"), "line 3, column 't': expected a moment in every row"),
        (
            ",,,,2026-11-24",
            lambda t: t.times("t", "s"),
            "line 3, column 't': expected a number since 1970.*time_unit = \"iso\"",
        ),
        (",,,,noon", lambda t: t.times("t", "iso"), "line 2, column 't': expected a moment such as.*'10'"),
        (
            ",,,,1700000000000",
            lambda t: t.times("t", "s"),
            "line 3, column 't': expected a moment from 1700 to 2200.*time_unit = \"ms\"",
        ),
        (",,,,1700000000000000", lambda t: t.times("t", "ms"), "line 3, column 't'.*to 2200.*time_unit = \"us\""),
        (",,,,", lambda t: t.keys("age", "string"), "line 3, column 'age': expected a key in every row of 'log'"),
        (
            "30,,,,",
            lambda t: t.unique_keys("age", "integer"),
            r"line 3, column 'age': expected each key once \(it stands in log\.csv, line 2 already\)",
        ),
        ('\n\n"a\nb",,,,', lambda t: t.numbers("age"), "line 5, column 'age'"),
        (",,,,", lambda t: t.series("tag"), "log.csv has no column 'tag'. Did you mean 'tags'?"),
    ],
)
def test_wrong_cells(tmp_path, line, use, message):
    rows = csv_table(tmp_path, CELLS + line + "\n")
    with pytest.raises(DataError, match=message) as error:
        use(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "use", "message"),
    [
        (
            {"a": [1, 2]},
            lambda t: t.lists("a", "integer"),
            "column 'a': expected lists. Received a column of type Int64",
        ),
        (
            {"a": ["x|y"]},
            lambda t: t.lists("a", "string"),
            "column 'a': expected lists.*Only the cells of a CSV are split",
        ),
        (
            {"a": [[1], [2]]},
            lambda t: t.scalars("a", "integer"),
            "column 'a': expected single values. Received a column of type List",
        ),
        (
            {"a": [1.0, 2.5]},
            lambda t: t.scalars("a", "string"),
            "row 2, column 'a': expected a text or a whole number. Received: 2.5",
        ),
        (
            {"a": [datetime.date(2026, 1, 1)]},
            lambda t: t.numbers("a"),
            "column 'a': expected a finite number.*type Date",
        ),
        ({"a": [2**63]}, lambda t: t.scalars("a", "integer"), r"row 1, column 'a'.*9223372036854775808"),
        ({"a": [b"\xff"]}, lambda t: t.scalars("a", "string"), "row 1, column 'a': expected UTF-8 text"),
        ({"a": [1]}, lambda t: t.times("a", "iso"), "column 'a': expected text such as.*type Int64"),
        ({"a": [{"x": 1}]}, lambda t: t.scalars("a", "string"), "column 'a': expected single texts.*Struct"),
        (
            {"a": [[1.0], [float("inf")]]},
            lambda t: t.lists("a", "number"),
            "row 2, column 'a': expected a finite number",
        ),
        (
            {"a": [["x"]], "w": [[None]]},
            lambda t: t.lists("a", "string", "w"),
            "row 1, column 'w': expected a weight.*nothing",
        ),
    ],
)
def test_wrong_columns(columns, use, message):
    with pytest.raises(DataError, match=message) as error:
        use(table(columns))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"log\.csv is empty"),
        (b"\n\n", r"log\.csv is empty\. Expected a header"),
        (b"age,click\n", r"log\.csv has no rows"),
        (b"age,age,click\n1,2,3\n", r"log\.csv, line 1: the column 'age' appears twice in the header"),
        (b"age,,click\n1,2,3\n", r"log\.csv, line 1: column 2 has no name"),
        (b"age,click\n1,2\n3\n", r"log\.csv, line 3: expected 2 columns separated by ','\. Received: 1"),
        (b"age,click\n1,2\n\n3,4,5\n", r"log\.csv, line 4: expected 2 columns separated by ','\. Received: 3"),
        (b'age,click\n"1,2\n3,4\n', r"log\.csv, line 2: expected 2 columns"),
        (b"age,click\n1,2\n\xff,4\n", r"log\.csv, line 3: expected UTF-8 text\. Received: the byte 0xff"),
        (b"age;click\n1;2\n", r"log\.csv has no column 'age'\. Columns: 'age;click'"),
        (b"Age,click\n1,2\n", r"\[features\.age\] column: log\.csv has no column 'age'\. Did you mean 'Age'\?"),
        (b"age\n1\n", r"\[tasks\.click\] label: log\.csv has no column 'click'"),
    ],
)
def test_wrong_csv_files(tmp_path, content, message):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_tables(dataset(tmp_path))
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path):
    (tmp_path / "logs.csv").write_text("age,click\n1,0\n")
    (tmp_path / "bad.csv.gz").write_bytes(b"\x1f\x8b no")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty").mkdir()
    pl.DataFrame({"age": [1], "click": [0]}).write_parquet(tmp_path / "a1.parquet")
    pl.DataFrame({"age": ["x"], "click": [0]}).write_parquet(tmp_path / "a2.parquet")
    pl.DataFrame({"age": [1], "clicks": [0]}).write_parquet(tmp_path / "a3.parquet")
    for path, message in {
        "log.csv": r"\[source\] path: there is no file .*log\.csv\. Did you mean 'logs\.csv'\?",
        "x*.csv": r"\[source\] path: no file matches 'x\*\.csv' in the folder",
        "bad.csv.gz": r"bad\.csv\.gz cannot be read as CSV",
        "bad.parquet": r"bad\.parquet cannot be read as Parquet",
        "a[12].parquet": r"a2\.parquet: column 'age' has type String, but Int64 in a1\.parquet",
        "a[13].parquet": r"a3\.parquet has no column 'click', which a1\.parquet has\. Did you mean 'clicks'\?",
    }.items():
        with pytest.raises(DataError, match=message):
            read_tables(dataset(tmp_path, source={"path": path}))
    with pytest.raises(DataError, match=r"a1\.parquet is read twice"):
        read_tables(dataset(tmp_path, source={"path": ["a1.parquet", "*1.parquet"]}))
    with pytest.raises(DataError, match=r"folder .*empty has no file that ends in \.csv"):
        read_tables(dataset(tmp_path, source={"path": "empty", "format": "csv"}))


def test_frames():
    declared = Dataset.from_frame({"age": [1.0, None], "click": [1, 0]}, declaration())
    assert read_tables(declared).log["age"].to_list() == [1, None]
    assert read_tables(declared).tables["log"].place(1) == "the frame 'log', row 1"
    with pytest.raises(DataError, match="The frame 'log' has no rows"):
        read_tables(Dataset.from_frame({"age": [], "click": []}, declaration()))
    with pytest.raises(DataError, match=r"the frame 'log' has no column 'age'\. Did you mean 'aged'"):
        read_tables(Dataset.from_frame({"aged": [1], "click": [1]}, declaration()))


# Fingerprint


def test_fingerprint_follows_contents(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("age,click\n1,0\n")
    declared = dataset(tmp_path)
    first = fingerprint(declared)
    assert first == read_tables(declared).fingerprint
    path.write_text("age,click\n1,1\n")
    assert fingerprint(declared) != first
    path.write_text("age,click\n1,0\n")
    assert fingerprint(declared) == first
    moved = tmp_path / "moved"
    moved.mkdir()
    path.rename(moved / "log.csv")
    assert fingerprint(dataset(moved)) == first


def test_fingerprint_of_frames():
    frames = [
        {"age": [1.0, 2.0], "click": [0, 1]},
        {"age": [1.0, 2.0], "click": [0, 1]},
        {"age": [1.0, 3.0], "click": [0, 1]},
    ]
    digests = [fingerprint(Dataset.from_frame(frame, declaration())) for frame in frames]
    assert digests[0] == digests[1] != digests[2]


def test_digests_are_remembered_by_size_and_times_of_change(tmp_path, monkeypatch):
    path, cache = tmp_path / "log.csv", tmp_path / "kept" / "digests.json"
    path.write_text("age,click\n1,0\n")
    digests = Digests(cache)
    first = digests.of(path)
    assert not cache.exists()
    digests.save()
    stamp = path.stat()
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert Digests(cache).of(path) == first
    # As `cp -p` and `rsync -t` leave another file of the same size.
    path.write_text("age,click\n1,1\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert Digests(cache).of(path) != first
    # Without the second time, of an earlier version: it is read again, without a warning.
    entry = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: [*values[:2], values[3]] for key, values in entry.items()}))
    assert Digests(cache).of(path) != first
    cache.write_text("{")
    assert Digests(cache).of(path) != first


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([-(2**63)], "ms"),
        ([-(10**17)], "s"),
        ([-1e12], "s"),
        (["-9223372036854775808"], "us"),
        ([datetime.datetime(1699, 12, 31)], "s"),
        (["0001-01-01T00:00:00+14:00"], "iso"),
    ],
)
def test_moments_before_1700(values, unit):
    with pytest.raises(DataError, match="row 1, column 't': expected a moment from 1700 to 2200"):
        table({"t": values}).times("t", unit)
    assert table({"t": [datetime.datetime(1700, 1, 1)]}).times("t", "s").tolist() == [-8_520_336_000_000]


def test_durations_are_no_texts():
    values = {"x": [datetime.timedelta(seconds=5)]}
    with pytest.raises(DataError, match=r"column 'x': expected single texts or whole numbers.*type Duration"):
        table(values).scalars("x", "string")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", None, "-20"], pl.Series([1, None, -20])),
        (["1", "007"], pl.Series([1.0, 7.0])),
        (["1", "2.5"], pl.Series([1.0, 2.5])),
        (["true", "false", None], pl.Series([True, False, None])),
        (["True", "0"], pl.Series([1.0, 0.0])),
    ],
)
def test_what_texts_are_texts_of(texts, expected):
    assert table({"x": texts}).values("x").to_list() == expected.to_list()
    assert table({"x": texts}).values("x").dtype == expected.dtype


def test_lines_after_a_long_cell(tmp_path):
    rows = csv_table(tmp_path, "a,b\n" + "x" * 200_000 + ",1\ny,2\ny,zz\n")
    with pytest.raises(DataError, match=r"log\.csv, line 4, column 'b'.*Received: 'zz'"):
        rows.numbers("b")
    (tmp_path / "log.csv").write_text("a,b\n" + "x" * 200_000 + ",1\ny,2,3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3: expected 2 columns separated by ','. Received: 3"):
        all_columns(dataset(tmp_path))


@pytest.mark.parametrize("content", ["5", "[1]", "[{size}, {time}]", '[{size}, {time}, "deadbeef"]', '["a", "b", "c"]'])
def test_damaged_memory_of_digests(tmp_path, content, caplog):
    path, memory = tmp_path / "log.csv", tmp_path / "digests.json"
    path.write_text("a\n1\n")
    state = path.stat()
    shown = content.format(size=state.st_size, time=state.st_mtime_ns)
    memory.write_text(f'{{"{path.resolve()}": {shown}}}')
    assert Digests(memory).of(path) == Digests().of(path)
    assert "digests.json is damaged" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        [1, None, 3],
        [1.5, None, 2.0],
        ["a", None, "ccccccccccccccccccccccccc"],
        [True, None, False],
        [[1, None], None, []],
        [["a"], None, ["b", None]],
        [{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}],
        [b"a", None, b"\xff"],
        [datetime.date(2026, 1, 1), None, datetime.date(2026, 1, 2)],
        [datetime.timedelta(1), None, datetime.timedelta(2)],
        [None, None, None],
    ],
)
def test_equal_frames_have_equal_digests(values):
    one = pl.DataFrame({"x": values})
    # The same after something else was stored where nothing is known.
    filled = one.with_columns(pl.col("x").fill_null(pl.col("x").first()))
    other = filled.select(pl.when(pl.Series([True, values[1] is not None, True])).then("x"))
    pieces = pl.concat([one[:1], one[1:]], rechunk=False)
    if values[0] is not None:
        assert other.equals(one)
        assert frame_digest(other) == frame_digest(one) != frame_digest(filled)
    assert frame_digest(pieces) == frame_digest(one)
    assert frame_digest(one[1:]) == frame_digest(pl.DataFrame({"x": values[1:]}, schema=one.schema))
    assert len({frame_digest(frame) for frame in (one, one[:2], one.rename({"x": "y"}), one[[2, 1, 0]])}) >= 3


def test_digests_tell_frames_apart():
    frames = [
        pl.DataFrame({"x": values})
        for values in (["ab", "c"], ["a", "bc"], [["a"], ["b", "c"]], [["a", "b"], ["c"]], [1, 2], [1.0, 2.0], [0, 1])
    ]
    frames += [pl.DataFrame({"x": [[], None]}, schema={"x": pl.List(pl.Int64)}), pl.DataFrame({"x": [None, 1]})]
    frames.append(pl.DataFrame({"x": [None, []]}, schema={"x": pl.List(pl.Int64)}))
    assert len({frame_digest(frame) for frame in frames}) == len(frames)


def test_texts_with_nul_are_refused():
    """NumPy's arrays of texts end at it, so that "a" and "a\\0" would be one value in training and two in serving."""
    read = table({"user": ["a", "a\0", None]})
    with pytest.raises(DataError, match=r"column 'user'.*without the character NUL"):
        read._cells("user").strings()
    assert table({"user": ["a", None]})._cells("user").strings().to_list() == ["a", None]
