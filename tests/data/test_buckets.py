# SPDX-License-Identifier: Apache-2.0
"""A log that is prepared in buckets of its users: the same rows, values and encoder as in memory."""

import copy
import errno
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mvke_tf.data import buckets, preparation
from mvke_tf.data.buckets import number_of_buckets, prepare_in_buckets
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare, prepared_dataset
from mvke_tf.data.store import EntityTable, PreparedDataset
from mvke_tf.errors import DataError
from mvke_tf.io import give_back, on_disk, try_lock, write_array
from tests.data.test_preparation import shop
from tests.small import SMALL, small_dataset, small_log, small_toml

pytestmark = pytest.mark.slow

BUCKETS = 7
STATISTICS = ("popularity", "item_stars")


def in_buckets(dataset: Dataset, folder: Path, buckets: int = BUCKETS) -> PreparedDataset:
    prepare_in_buckets(dataset, folder / "prepared", "contents", buckets)
    assert [path.name for path in folder.iterdir()] == ["prepared"]
    return PreparedDataset.load(folder / "prepared")


def columns_of(table: EntityTable, rows: np.ndarray) -> dict[str, np.ndarray]:
    columns = {"key": table.key, "name": table.name, "time": table.time}
    columns |= {f"raw {name}": column for name, column in table.raw.items()}
    columns |= {f"encoded {name}": column for name, column in table.encoded.items()}
    return {name: np.asarray(column)[rows] for name, column in columns.items() if column is not None}


def assert_equal_columns(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert set(left) == set(right)
    for name, column in left.items():
        np.testing.assert_array_equal(column, right[name], err_msg=name)
        assert column.dtype == right[name].dtype, name


def assert_same(whole: PreparedDataset, other: PreparedDataset) -> None:
    """Raises unless both have the same rows, up to their order, in which those of a user stay."""
    assert other.is_in_buckets and not whole.is_in_buckets
    assert len(list(other.buckets())) > 1
    assert whole.encoder.to_dict() == other.encoder.to_dict()
    assert whole.offsets == other.offsets
    items = np.arange(len(whole.items))
    assert_equal_columns(columns_of(whole.items, items), columns_of(other.items, items))
    np.testing.assert_array_equal(whole.catalogue, other.catalogue)
    left, right = (np.argsort(np.asarray(one.users.key)[one.user_row], kind="stable") for one in (whole, other))
    for name, column in whole._columns.items():
        if name != "user_row":
            np.testing.assert_array_equal(column[left], other._columns[name][right], err_msg=name)
    assert len(whole.users) == len(other.users)
    assert_equal_columns(columns_of(whole.users, whole.user_row[left]), columns_of(other.users, other.user_row[right]))
    orders = [np.argsort(np.asarray(one.latest_users.key), kind="stable") for one in (whole, other)]
    assert_equal_columns(columns_of(whole.latest_users, orders[0]), columns_of(other.latest_users, orders[1]))
    for side in ("user", "item"):
        rows = {"user": (whole.user_row[left], other.user_row[right]), "item": (items, items)}[side]
        np.testing.assert_array_equal(whole.known(side)[rows[0]], other.known(side)[rows[1]])


DATASETS = {
    "uniform negatives of all items": lambda: small_dataset(),
    "uniform negatives": lambda: small_dataset(negatives={"kind": "uniform", "per_positive": 3}),
    "popular negatives": lambda: small_dataset(negatives={"kind": "popularity", "per_positive": 2}),
    "popular negatives of all items": lambda: small_dataset(
        negatives={"kind": "popularity", "per_positive": 2, "future": True}
    ),
    "split per user": lambda: small_dataset(**{"split.by": "per_user", "negatives": None}),
    "split at random": lambda: small_dataset(**{"split.by": "random"}),
    "split by hash": lambda: small_dataset(**{"split.by": "hash"}),
    "split by hash of a column": lambda: small_dataset(**{"split": {"by": "hash", "column": "country"}}),
    "split by a column": lambda: small_dataset(
        **{
            "split": {
                "by": "column",
                "column": "item",
                **{
                    part: [f"i{item:02d}" for item in range(first, last)]
                    for part, first, last in (("train", 1, 20), ("validation", 20, 25), ("test", 25, 31))
                },
            },
            "negatives": None,
        }
    ),
    "split by moments": lambda: small_dataset(
        **{"split": {"by": "time", "validation": 1_700_020_000, "test": 1_700_026_000}}
    ),
    "shop": lambda: shop(),
    "other encodings": lambda: small_dataset(
        **{
            "features.country": {"tower": "user", "encode": "hash", "bins": 7},
            "features.age": {"tower": "user", "encode": "number", "scaling": "standard"},
            "features.mean_stars": {"tower": "user", "encode": "number", "boundaries": [2, 3], "scaling": "piecewise"},
            "features.mean_stars.history": {"mean": "stars"},
            "features.years": {"tower": "user", "encode": "integer", "column": "age", "bins": 60},
            "groups": None,
        }
    ),
    "statistics at each moment": lambda: small_dataset(
        **{
            "features.popularity.statistic": {"count": True, "until": "row", "half_life": "2h"},
            "features.item_stars.statistic": {"mean": "stars", "until": "row", "every": "3h"},
        }
    ),
    "statistics with a half-life": lambda: small_dataset(
        **{
            "features.popularity.statistic": {"count": True, "half_life": "2h"},
            "features.item_stars.statistic": {"mean": "stars", "half_life": "2h", "where": "clicked"},
        }
    ),
    # An item of the log has the value of its last training row, and a negative may come before its first.
    "item columns of the log": lambda: small_dataset(
        **{
            "features.land": {"tower": "item", "encode": "vocabulary", "column": "country"},
            "features.fan": {"tower": "item", "encode": "number", "column": "age"},
            "negatives": {"kind": "uniform", "future": True},
        }
    ),
    "no users": lambda: without("keys.user", "clicks", "mean_stars", "recent_items", "liked_tags", "user"),
    "no times": lambda: without("source.time", "clicks", "mean_stars", "recent_items", "liked_tags"),
    "no items": lambda: without("keys.item", *("recent_items", "item", "tags", "price"), *OF_ITEMS),
}
OF_ITEMS = ("year", "popularity", "item_stars", "liked_tags")


def without(key: str, *features: str) -> Dataset:
    """The small dataset without a key and the features that need it."""
    values = copy.deepcopy(SMALL)
    section, name = key.split(".")
    del values[section][name]
    if key == "keys.item":
        del values["keys"]["item_name"], values["tables"]
    if key == "source.time":
        del values["source"]["time_unit"]
        values["split"] = {"by": "random"}
    if key != "source.time":
        del values["negatives"]
    for feature in features:
        del values["features"][feature]
    values["groups"] = {"country": {"feature": "country"}}
    log, items = small_log()
    return Dataset.from_frame(log, values, items=None if key == "keys.item" else items)


@pytest.mark.parametrize("name", DATASETS)
def test_buckets_hold_what_memory_does(tmp_path, monkeypatch, name):
    dataset = DATASETS[name]()
    whole = prepare(dataset)
    for module in (buckets, preparation):
        monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 50)
    assert_same(whole, in_buckets(dataset, tmp_path))


@pytest.mark.parametrize("values", [1, 3, 40, 10**6])
@pytest.mark.parametrize("others", [1, 10])
def test_rows_are_ordered_some_at_a_time(tmp_path, monkeypatch, values, others):
    """However many rows have the same values of some keys."""
    monkeypatch.setattr(buckets, "_ROWS_AT_A_TIME", 64)
    random = np.random.default_rng(0)
    low = np.iinfo(np.int32).min
    keys = [random.integers(low, low + others, 1000, np.int32), random.integers(-values, 0, 1000)]
    # More than half of them have one value.
    keys[1][random.permutation(1000)[:600]] = 7
    some = list(buckets._sorted(keys, tmp_path))
    np.testing.assert_array_equal(np.concatenate(some), np.lexsort(keys))
    assert max(map(len, some)) <= 2 * 64 and not list(tmp_path.iterdir())


def test_arrays_are_those_of_numpy_and_a_full_disk_is_an_error(tmp_path):
    for array in (np.arange(5), np.arange(3, dtype=np.int8)[::-1], np.zeros(0, np.int32)):
        write_array(tmp_path / "ours.npy", array)
        np.save(tmp_path / "theirs.npy", array)
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_array(Path("/dev/full"), np.arange(5))


def test_a_disk_without_room_for_an_array_is_an_error(tmp_path, monkeypatch):
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    column = on_disk(tmp_path, 1000, np.int16)
    column[7] = 3
    assert column.sum() == 3 and len(column) == 1000 and type(column) is np.ndarray
    # The file keeps what memory need not hold.
    for some in (column, column[5:].reshape(5, -1), np.zeros(3), np.zeros(3)[1:]):
        give_back(some)
    assert column.sum() == 3 and column[7] == 3
    np.save(tmp_path / "kept.npy", np.zeros(3))
    changed = np.load(tmp_path / "kept.npy", mmap_mode="c")
    changed[1] = 7
    give_back(changed[1:])
    assert changed[1] == 7
    del changed
    (tmp_path / "kept.npy").unlink()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        on_disk(tmp_path, 1000, np.int16)
    assert not list(tmp_path.iterdir()) and not len(on_disk(tmp_path, 0, np.int16))


LISTS = {
    "format": 1,
    "name": "lists",
    "source": {"path": ["a.csv", "b.csv"], "time": "at"},
    "keys": {"user": "user", "item": "item"},
    "tables": {"users": {"path": "users.csv"}},
    "split": {"by": "per_user"},
    "features": {
        "user": {"tower": "user", "encode": "vocabulary"},
        "words": {"tower": "user", "encode": "vocabulary", "length": 3, "weighted": True, "keep": "heaviest"},
        "had": {"tower": "user", "embedding": "item", "length": 2, "history": {"last": "item", "where": "click"}},
        "size": {"tower": "user", "encode": "vocabulary"},
        "item": {"tower": "item", "encode": "vocabulary"},
    },
    "tasks": {"click": {"label": "click"}},
}


def written(folder: Path, last_item: str = "9") -> Dataset:
    """A log in two CSV files: what kind of values a column has shows in its last cell."""
    random = np.random.default_rng(0)
    rows = []
    for row in range(60):
        user, item = f"0{random.integers(1, 9)}", random.integers(1, 9)
        words = "|".join(f"w{word}:{random.random():.1f}" for word in random.integers(0, 6, random.integers(0, 5)))
        rows.append(f"{row},{user},{item},{words},{'true' if random.random() < 0.4 else 'false'},{user[1]}\n")
    rows[-1] = f"60,08,{last_item},,true,8\n"
    header = "at,user,item,words,click,size\n"
    (folder / "a.csv").write_text(header + "".join(rows[:25]), encoding="utf-8")
    (folder / "b.csv").write_text(header + "".join(rows[25:]), encoding="utf-8")
    users = "".join(f"0{user},{'' if user == 3 else user * 1.5}\n" for user in range(1, 8))
    (folder / "users.csv").write_text("user,size\n" + users, encoding="utf-8")
    return Dataset.from_dict(LISTS, folder)


@pytest.mark.parametrize("last_item", ["9", "nine"])
def test_how_a_column_is_read_depends_on_every_cell_of_it(tmp_path, caplog, last_item):
    dataset = written(tmp_path, last_item)
    whole = prepare(dataset)
    warnings = [record.getMessage() for record in caplog.records]
    caplog.clear()
    (tmp_path / "other").mkdir()
    assert_same(whole, in_buckets(dataset, tmp_path / "other"))
    assert whole.encoder.raw_inputs("user")["user"][0] == "string"
    assert whole.encoder.raw_inputs("item")["item"][0] == ("int64" if last_item == "9" else "string")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == warnings
    assert any(text.startswith("1 of the 8 users of the log are not in users.csv") for text in warnings)


def test_a_split_by_files(tmp_path):
    written(tmp_path)
    header, *rows = (tmp_path / "b.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "b.csv").write_text(header + "".join(rows[:15]), encoding="utf-8")
    (tmp_path / "c.csv").write_text(header + "".join(rows[15:]), encoding="utf-8")
    parts = {"train": "a.csv", "validation": "b.csv", "test": "c.csv"}
    values = copy.deepcopy(LISTS) | {"split": {"by": "files", **parts}}
    del values["source"]["path"]
    dataset = Dataset.from_dict(values, tmp_path)
    whole = prepare(dataset)
    assert np.bincount(whole.split, minlength=3).tolist() == [25, 15, 20]
    (tmp_path / "other").mkdir()
    assert_same(whole, in_buckets(dataset, tmp_path / "other"))


def test_errors_name_the_row(tmp_path):
    dataset = written(tmp_path)
    lines = (tmp_path / "b.csv").read_text().splitlines()
    lines[7] = lines[7].replace("true", "maybe").replace("false", "maybe")
    (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
    messages = []
    for prepared in (lambda: prepare(dataset), lambda: in_buckets(dataset, tmp_path)):
        with pytest.raises(DataError, match=r"b\.csv, line 8, column 'click'.*Received: 'maybe'") as error:
            prepared()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_is_unfinished_of_other_data_is_not_gone_on_with(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("mvke_tf.data.buckets.items_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_buckets(shop(), tmp_path)
    assert (tmp_path / "prepared.unfinished" / "pieces").is_dir()
    monkeypatch.undo()
    changed = shop({"spent": [9.0, None, 3.0, 0.0, 1.0]})
    prepare_in_buckets(changed, tmp_path / "prepared", "other contents", BUCKETS)
    assert_same(prepare(changed), PreparedDataset.load(tmp_path / "prepared"))
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_the_number_of_buckets_follows_from_the_log_and_the_memory(caplog):
    dataset = small_dataset()
    assert number_of_buckets(dataset) == 1
    # 240 rows of 14 slots and 1 negative, 920 bytes each, are 221 KB.
    assert number_of_buckets(dataset, 1) == 1
    large = Dataset.from_frame(pl.concat([small_log()[0]] * 50), SMALL, items=small_log()[1])
    assert number_of_buckets(large, 1) == 12_000 * 920 // (2**20 // 4 // 8) + 1
    assert number_of_buckets(large, 16) == 12_000 * 920 // (4 * 2**20 // 8) + 1
    assert number_of_buckets(large, 1024) == 1
    without_items = {"keys.item": None, "keys.item_name": None, "tables": None, "negatives": None, "groups": None}
    kept = ("user", "age", "country", "clicks")
    removed = {f"features.{name}": None for name in SMALL["features"] if name not in kept}
    column = {"features.item": {"tower": "item", "encode": "vocabulary"}}
    assert number_of_buckets(large.replace(without_items | removed | column), 1) == 1
    assert "the log is prepared in memory" in caplog.text


def test_what_a_killed_process_left_is_removed_or_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mvke_tf.data.buckets.number_of_buckets", lambda dataset, memory_mb: 4)
    dataset = Dataset.from_toml(small_toml(tmp_path))
    folder = prepared_dataset(dataset, tmp_path).folder
    own, other = (folder.with_name(f"{name}.unfinished") for name in (folder.name, "small-0123456789ab"))
    for work in (own, other):
        (work / "pieces").mkdir(parents=True)
    with caplog.at_level("INFO", "mvke_tf"), open(own / ".lock", "a") as lock:
        assert try_lock(lock)
        prepared_dataset(dataset, tmp_path)
        # Another process is at it.
        assert own.is_dir()
    assert [record.getMessage() for record in caplog.records if "interrupted" in record.getMessage()] == [
        f"{other}: an interrupted preparation of other tables. Delete it to free its space."
    ]
    prepared_dataset(dataset, tmp_path)
    assert not own.exists() and other.is_dir()


@pytest.mark.parametrize("half_life", [None, "1h"])
def test_frozen_statistics_do_not_depend_on_how_many_rows_are_read_at_a_time(monkeypatch, half_life):
    more = {} if half_life is None else {f"features.{name}.statistic.half_life": half_life for name in STATISTICS}
    before = prepare(small_dataset(**more)).items.raw
    monkeypatch.setattr("mvke_tf.data.preparation._ROWS_AT_A_TIME", 7)
    after = prepare(small_dataset(**more)).items.raw
    for name in STATISTICS:
        assert np.isfinite(before[name]).any()
        np.testing.assert_array_equal(after[name], before[name])
