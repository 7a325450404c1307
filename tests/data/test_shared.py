# SPDX-License-Identifier: Apache-2.0
"""Wide columns whose rows share values: in memory, in files, and in the batches of a training."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvke_tf.data import buckets, store
from mvke_tf.data.batches import Batches
from mvke_tf.data.buckets import prepare_in_buckets
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.data.shared import SharedColumn, _shared_events, _shared_rows, joined, shared
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import DataError

WIDTH = 4


def lists(rows: list[list[int]], width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of lists; the weight of value v is v + 0.5."""
    values, weights = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for row, some in enumerate(rows):
        values[row, : len(some)] = some
        weights[row, : len(some)] = np.add(some, 0.5)
    return values, weights


def assert_is(column: SharedColumn, dense: np.ndarray) -> None:
    """The same bits, however it is asked."""
    assert column.problem is None and len(column) == len(dense)
    rows = np.random.default_rng(0).integers(0, len(dense), 50)
    for found, expected in (
        (np.asarray(column), dense),
        (column.take(rows), dense[rows]),
        (np.asarray(column.of(rows)), dense[rows]),
        (column.of(rows).take(rows[rows < 50]), dense[rows][rows[rows < 50]]),
    ):
        assert found.dtype == dense.dtype and found.shape == expected.shape
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_a_history_is_positions_in_its_events():
    """An event, two at a moment, none, one; one leaves a full list, old ones expire, one comes; of another user two."""
    rows = [[], [1], [3, 2, 1], [3, 2, 1], [4, 3, 2, 1], [5, 4, 3, 2], [5, 4], [6, 5, 4], [], [8, 7], [8, 7]]
    values, weights = lists(rows)
    values_as_events, weights_as_events = _shared_events(values, weights)
    assert values_as_events.values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert weights_as_events.values.tolist() == [0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5]
    for column in (values_as_events, weights_as_events):
        assert column.position.tolist() == [0, 1, 3, 3, 4, 5, 5, 6, 6, 8, 8]
        assert column.count.tolist() == list(map(len, rows))
    assert_is(values_as_events, values)
    assert_is(weights_as_events, weights)


def test_profiles_are_positions_in_their_rows():
    profiles = np.array([[1, np.nan], [1, np.nan], [0.0, 2], [-0.0, 2], [1, np.nan]], np.float32).repeat(9, axis=0)
    (column,) = shared(profiles.repeat(3, axis=1))
    # A zero of another sign is another value.
    assert column.position.tolist() == np.repeat([0, 0, 1, 2, 3], 9).tolist() and column.count is None
    assert len(column.values) == 4
    assert_is(column, profiles.repeat(3, axis=1))


@pytest.mark.parametrize("seed", range(20))
def test_any_lists_come_back(seed):
    """Histories of several users that grow, stay, expire and are replaced, with unknown values (0) among them."""
    random = np.random.default_rng(seed)
    rows: list[list[int]] = []
    for _ in range(20):
        events: list[int] = []
        first = 0
        for _ in range(30):
            events = [*random.integers(0, 5, random.choice([0, 0, 1, 2, WIDTH + 1])), *events]
            first = int(random.choice([len(events), max(0, len(events) - 2), random.integers(0, len(events) + 1)]))
            rows.append([int(event) for event in events[:first][:WIDTH]])
    values, weights = lists(rows)
    for column, dense in zip(_shared_events(values, weights), (values, weights), strict=True):
        assert_is(column, dense)
        assert_is(_shared_rows(dense), dense)
    # Fewer than a replaced list would take each.
    assert len(_shared_events(values, weights)[0].values) < 0.75 * np.count_nonzero(weights)


def test_what_does_not_get_smaller_stays():
    random = np.random.default_rng(0)
    assert shared(*lists(random.integers(1, 100, (200, WIDTH)).tolist())) is None
    assert shared(random.random((100, 8), np.float32)) is None
    assert shared(np.zeros((0, 3), np.float32))[0].position.shape == (0,)
    # Every row is new, and its events are not.
    growing = lists([list(range(row, max(row - 20, 0), -1)) for row in range(300)], 20)
    events, _ = shared(*growing)
    assert events.count is not None and len(events.values) == 300
    # Rows are gathered faster, and taken where they are small enough.
    rows, _ = shared(*(np.repeat(column, 9, axis=0) for column in growing))
    assert rows.count is None and len(rows.values) == 300
    # A gap, and a value without weight, cannot be said with events.
    for column, value in ((growing[1], 0.0), (growing[0], 1)):
        changed = [one.copy() for one in growing]
        place = 5 if column is growing[1] else 19
        changed[0 if column is growing[0] else 1][10, place] = value
        assert shared(*changed) is None


def test_columns_are_joined():
    growing, width = lists([list(range(row, max(row - 20, 0), -1)) for row in range(1, 200)], 20), 20
    repeated = [np.repeat(column, 9, axis=0) for column in growing]
    as_events, as_rows = shared(*growing)[0], shared(*repeated)[0]
    for columns, dense in (
        ([as_events, as_events.of(np.arange(50)), as_events], [growing[0], growing[0][:50], growing[0]]),
        ([as_rows, as_rows.of(np.arange(70))], [repeated[0], repeated[0][:70]]),
    ):
        assert_is(joined(columns), np.concatenate(dense))
        assert joined(columns).width == width
    for columns in ([as_events, as_rows], [as_rows, repeated[0]]):
        assert isinstance(joined(columns), np.ndarray)
        np.testing.assert_array_equal(joined(columns), np.concatenate([np.asarray(one) for one in columns]))
    assert joined([as_rows]) is as_rows and joined([growing[0]]) is growing[0]


def test_what_does_not_fit_together():
    values, position = np.arange(5), np.array([1, 4], np.int32)
    assert SharedColumn(values, position, np.array([1, 4], np.int32), 4).problem is None
    assert "positions from 0 to 4" in SharedColumn(values, position, np.array([3, 1], np.int32), 4).problem
    assert "positions from 0 to 4" in SharedColumn(values, position + 1, np.array([1, 1], np.int32), 4).problem
    assert "from 0 to 2 filled" in SharedColumn(values, position, np.array([1, 3], np.int32), 2).problem
    assert "positions" in SharedColumn(np.zeros((4, 2)), position, None, 2).problem
    # A difference that 32 bits cannot hold, and events whose first is that of empty slots, and is not 0.
    lowest = np.array([-(2**31), 1], np.int32)
    assert "positions" in SharedColumn(values, lowest, np.array([2, 1], np.int32), 4).problem
    for wrong in (values + 1, values[:0]):
        assert "0 as the first" in SharedColumn(wrong, position, np.array([1, 1], np.int32), 4).problem
    with pytest.raises(ValueError, match="no array without a copy"):
        np.array(SharedColumn(values, position, np.array([1, 1], np.int32), 4), copy=False)


# In files


def watched(task: str = "click") -> Dataset:
    """A log in which every row is an event, and profiles stay."""
    random = np.random.default_rng(0)
    rows, users = 1200, 12
    log = pl.DataFrame(
        {
            "at": np.arange(rows),
            "user": random.integers(0, users, rows),
            "item": [f"i{item}" for item in random.integers(0, 40, rows)],
            "stars": random.integers(1, 6, rows),
            "click": random.integers(0, 2, rows),
        }
    )
    words = [[f"w{word}" for word in random.integers(0, 9, 6)] for _ in range(users)]
    declared = {
        "format": 1,
        "name": "watched",
        "source": {"time": "at"},
        "keys": {"user": "user", "item": "item"},
        "split": {"by": "share_of_time", "train": 0.7, "validation": 0.2, "test": 0.1},
        "features": {
            "user": {"tower": "user", "encode": "vocabulary"},
            "words": {"tower": "user", "encode": "vocabulary", "length": 6},
            "seen": {
                "tower": "user",
                "embedding": "item",
                "length": 9,
                "history": {"last": "item", "weights": "stars"},
            },
            "item": {"tower": "item", "encode": "vocabulary"},
        },
        "tasks": {task: {"label": "click"}},
    }
    return Dataset.from_frame(log, declared, users=pl.DataFrame({"user": np.arange(users), "words": words}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "prepared"
    prepare_in_buckets(watched(), folder, "contents", 3)
    return folder


@pytest.mark.slow
def test_histories_lie_as_positions_and_counts(folder):
    users = folder / "bucket-0000" / "users"
    names = pq.read_schema(users / "encoded.parquet").names
    assert names == ["user", "words:row", "words_weights:row", "seen:event", "seen:count", "seen_summary"]
    table = pq.read_table(users / "shared.parquet")
    columns = dict(zip(*(table[name].to_pylist() for name in ("column", "values")), strict=True))
    bucket = PreparedDataset.load(folder).bucket(0)
    events, states = len(columns["seen"]) // 4, len(bucket.users)
    # An event for every state but the last ones of users.
    assert states - len(bucket.latest_users) <= events - 1 <= states
    assert len(columns["words"]) // 24 == len(bucket.latest_users)


def test_batches_are_those_of_dense_columns(folder):
    shards = PreparedDataset.load(folder).shards("train")
    assert isinstance(shards.read(0).users["seen"], SharedColumn)

    def dense(data):
        users = {name: np.asarray(column) for name, column in data.users.items()}
        return data.__class__(**(vars(data) | {"users": users}))

    for per_window in (1, 3):
        for deduplicate in (False, True):
            pair = [
                list(Batches(one.__class__(one.sizes, one.read, per_window), 64, deduplicate).arrays(0, 1))
                for one in (shards, shards.map(dense))
            ]
            assert len(pair[0]) == -(-len(shards) // 64)
            for (inputs, labels), (others, other_labels) in zip(*pair, strict=True):
                assert set(inputs) == set(others) > {"seen", "seen_weights", "words", "words_weights"}
                for name, column in (inputs | labels).items():
                    assert isinstance(column, np.ndarray)
                    np.testing.assert_array_equal(column, (others | other_labels)[name], err_msg=name)


@pytest.mark.slow
def test_what_was_prepared_by_an_earlier_version_is_read(folder, tmp_path, monkeypatch):
    """Format 3 has dense columns only."""
    monkeypatch.setattr(store, "IN_BUCKETS", 3)
    monkeypatch.setattr(store, "write_shared", lambda path, states: store.write_encoded(path, states, packed=True))
    prepare_in_buckets(watched(), tmp_path / "old", "contents", 3)
    monkeypatch.undo()
    assert json.loads((tmp_path / "old" / "manifest.json").read_text())["format"] == 3
    old, new = PreparedDataset.load(tmp_path / "old"), PreparedDataset.load(folder)
    assert not list((tmp_path / "old").rglob("shared.parquet")) and old.digest != new.digest
    every = [prepare(watched()), old, new]
    orders = [np.argsort(one.users.key, kind="stable") for one in every]
    for name in new.users.encoded:
        whole, *others = (one.users.encoded[name][order] for one, order in zip(every, orders, strict=True))
        for column in others:
            np.testing.assert_array_equal(column, whole, err_msg=name)
    assert not isinstance(old.shards("train").read(0).users["seen"], SharedColumn)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["count", "event", "row"])
def test_tasks_may_be_called_like_the_places(tmp_path, task):
    """Their labels are columns that end in the name."""
    prepare_in_buckets(watched(task), tmp_path / "prepared", "contents", 3)
    bucket = PreparedDataset.load(tmp_path / "prepared").bucket(0)
    assert set(bucket.label(task).tolist()) == {0.0, 1.0}
    prepare(watched(task)).save(tmp_path / "whole")
    assert len(PreparedDataset.load(tmp_path / "whole")) == 1200


@pytest.mark.slow
def test_a_window_is_as_small_as_its_columns_are_together(folder, tmp_path, monkeypatch):
    """Where one bucket has a column in another form, together they are an array."""
    real, calls = store.shared, []

    def other(values, weights=None):
        calls.append(1)
        return None if len(calls) == 2 else real(values, weights)

    monkeypatch.setattr(store, "shared", other)
    prepare_in_buckets(watched(), tmp_path / "mixed", "contents", 3)
    alike, mixed = PreparedDataset.load(folder), PreparedDataset.load(tmp_path / "mixed")
    assert not isinstance(mixed.shards("train").read(0).users["seen"], SharedColumn)
    assert alike._dense_together() == set() and mixed._dense_together() == {"seen", "seen_weights"}
    bucket = mixed.bucket(1)
    sizes = [store._bytes_to_train(bucket, dense) for dense in (set(), {"seen", "seen_weights"})]
    # Two columns of 9 slots in place of an event and a count for each state, and an event.
    assert sizes[1] - sizes[0] == pytest.approx((2 * 9 - 2 * 2 - 2) * 4 * len(bucket.users), rel=0.02)
    assert sizes[0] == pytest.approx(64 * len(bucket) + 4 * len(bucket.users) * (1 + 2 + 2 * 2 + 2 + 20), rel=0.2)
    largest = max(store._bytes_to_train(bucket, {"seen", "seen_weights"}) for bucket in mixed.buckets())
    monkeypatch.setattr(store, "WINDOW_BYTES", 2 * largest - 1)
    assert (mixed.shards("train").per_window, alike.shards("train").per_window) == (1, 2)


def damaged(folder, tmp_path, change):
    """A copy of the prepared folder with another `shared.parquet` in its first bucket, and a manifest that knows it."""
    copy = tmp_path / "copy"
    buckets.shutil.copytree(folder, copy)
    path = copy / "bucket-0000" / "users" / "shared.parquet"
    table = change(pq.read_table(path))
    pq.write_table(table, path, row_group_size=1)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["bucket-0000/users/shared.parquet"] = store._stamp(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return PreparedDataset.load(copy).bucket(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values: values[:-40],
            r"column 'seen', or its places beside it: expected positions from 0 to \d+\. Delete",
        ),
        (lambda values: values[:-3], "buffer size must be a multiple"),
    ],
)
def test_damaged_values(folder, tmp_path, change, message):
    def changed(table):
        names, values = (table[name].to_pylist() for name in ("column", "values"))
        values[names.index("seen")] = change(values[names.index("seen")])
        return pa.table({"column": names, "values": pa.array(values, pa.large_binary())})

    bucket = damaged(folder, tmp_path, changed)
    with pytest.raises(DataError, match=rf"shared\.parquet is damaged: .*{message}"):
        bucket.users.encoded["seen"]
    # The others are what they were.
    assert len(bucket.users.encoded["seen_weights"]) == len(bucket.users)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names, _: pa.table({"column": names, "values": pa.array([1] * len(names))}), "expected columns"),
        (lambda names, _: pa.table({"column": [[name] for name in names], "values": names}), "expected columns"),
        (lambda names, _: store._VALUES.empty_table(), "expected columns|no values of column 'words'"),
        (
            lambda names, values: pa.table(
                [pa.array(names), pa.array([None, *values[1:]], pa.large_binary())], schema=store._VALUES
            ),
            "column 'words' has no values",
        ),
    ],
)
def test_other_values(folder, tmp_path, change, message):
    bucket = damaged(
        folder, tmp_path, lambda table: change(*(table[name].to_pylist() for name in ("column", "values")))
    )
    with pytest.raises(DataError, match=rf"shared\.parquet is damaged: .*({message}).*Delete the folder"):
        bucket.users.encoded["words"]


def test_places_are_those_of_lists(folder, tmp_path):
    copy = tmp_path / "copy"
    buckets.shutil.copytree(folder, copy)
    path = copy / "bucket-0000" / "users" / "encoded.parquet"
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["user:row", *table.column_names[1:]]), path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["bucket-0000/users/encoded.parquet"] = store._stamp(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"encoded\.parquet is damaged: columns .*'user:row'.* instead of .*'user'"):
        PreparedDataset.load(copy)


def test_missing_values(folder, tmp_path):
    bucket = damaged(folder, tmp_path, lambda table: table.filter(pa.compute.field("column") != "words"))
    for read in (bucket.users.encoded.__getitem__, bucket.users.encoded.size):
        with pytest.raises(
            DataError, match=r"shared\.parquet is damaged: no values of column 'words'\. Delete the folder"
        ):
            read("words")
    (tmp_path / "copy" / "bucket-0000" / "users" / "shared.parquet").unlink()
    with pytest.raises(DataError, match=r"users/shared\.parquet is missing"):
        PreparedDataset.load(tmp_path / "copy")


def test_a_bucket_has_rows_of_all_days(folder):
    """Rows lie by user and not by day, so that every window of a training mixes all days."""
    prepared = PreparedDataset.load(folder)
    every = prepared.of_part("train", lambda bucket: bucket.time)
    for bucket in prepared.buckets():
        some = bucket.time[bucket.part_rows("train")]
        counts, _ = np.histogram(some, np.quantile(every, np.linspace(0, 1, 7)))
        assert counts.min() > 0.7 * len(some) / 6
