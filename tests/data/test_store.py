# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvke_tf.data import store
from mvke_tf.data.encoder import EncodedFeature, Encoder
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import EntityTable, PreparedDataset, digest
from mvke_tf.errors import ConfigError, DataError
from tests.small import small_dataset, small_prepared

FILES = [
    f"{table}/{name}.parquet" for table in ("users", "items", "latest_users") for name in ("keys", "encoded", "raw")
]
FILES += ["catalogue.parquet", "interactions.parquet", "encoder.json"]


def assert_same(first: PreparedDataset, second: PreparedDataset) -> None:
    assert first.dataset == second.dataset
    assert first.encoder.to_dict() == second.encoder.to_dict()
    assert (first.fingerprint, first.digest, first.offsets) == (second.fingerprint, second.digest, second.offsets)
    np.testing.assert_array_equal(first.catalogue, second.catalogue)
    for name in ("users", "items", "latest_users"):
        one, other = getattr(first, name), getattr(second, name)
        assert len(one) == len(other)
        assert one.side == other.side
        for what in ("key", "name", "time"):
            a, b = getattr(one, what), getattr(other, what)
            assert (a is None) == (b is None), what
            if a is not None:
                np.testing.assert_array_equal(a, b, err_msg=what)
                assert a.dtype == b.dtype
        for a, b in ((one.encoded, other.encoded), (one.raw, other.raw)):
            assert set(a) == set(b)
            for column, values in a.items():
                np.testing.assert_array_equal(values, b[column], err_msg=column)
                assert values.dtype == b[column].dtype, column
    for name in ("user_row", "item_row", "split", "sampled", "time"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert a.dtype == b.dtype
    for task in first.dataset.task_names:
        np.testing.assert_array_equal(first.label(task), second.label(task), err_msg=task)
        np.testing.assert_array_equal(first.weight(task), second.weight(task), err_msg=task)
        assert second.label(task).dtype == second.weight(task).dtype == np.float32


@pytest.fixture(scope="module")
def saved(handmade, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "prepared"
    handmade.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# Saving and loading


def test_load_gives_what_was_saved(handmade, saved):
    loaded = PreparedDataset.load(saved)
    assert_same(handmade, loaded)
    assert loaded.folder == saved
    assert handmade.folder is None
    assert len(loaded) == 400
    assert sorted(path.name for path in saved.parent.iterdir()) == ["prepared"]


def test_a_real_preparation_survives(prepared, tmp_path):
    prepared.save(tmp_path / "a" / "small")
    loaded = PreparedDataset.load(tmp_path / "a" / "small")
    assert_same(prepared, loaded)
    assert loaded.schema() == prepared.schema()
    assert loaded.dataset.folder == prepared.dataset.folder or loaded.dataset.folder.samefile(prepared.dataset.folder)
    # Also what has been loaded can be saved.
    loaded.save(tmp_path / "b")
    assert_same(prepared, PreparedDataset.load(tmp_path / "b"))


def test_saving_again_replaces(handmade, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "other").touch()
    handmade.save(tmp_path / "x")
    assert not (tmp_path / "x" / "other").exists()
    assert_same(handmade, PreparedDataset.load(tmp_path / "x"))


def test_columns_are_read_when_they_are_asked_for(saved, monkeypatch):
    read = []
    original = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda file, columns, **others: (read.extend(columns), original(file, columns))[1]
    )
    loaded = PreparedDataset.load(saved)
    assert read == ["item_row"]  # the catalogue
    assert (len(loaded.users), len(loaded.users.encoded), "age" in loaded.users.raw) == (60, 10, True)
    assert read == ["item_row"]
    for _ in range(2):
        assert loaded.users.encoded["age"].shape == (60,)
        assert loaded.label("buy").shape == (400,)
        assert loaded.users.key[0] == 1
    assert read == ["item_row", "age", "label:buy", "key"]
    with pytest.raises(KeyError, match="nothing"):
        loaded.users.raw["nothing"]


def test_loaded_columns_cannot_be_changed(saved):
    loaded = PreparedDataset.load(saved)
    for column in (loaded.user_row, loaded.users.key, loaded.users.raw["country"], loaded.users.encoded["age"]):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = column[1]


def test_strings_lists_and_dense_columns(saved):
    users, items = PreparedDataset.load(saved).users, PreparedDataset.load(saved).items
    assert users.raw["country"].dtype == object
    assert set(map(type, users.raw["country"])) == {str}
    assert users.raw["recent_items"].shape == users.raw["recent_items_weights"].shape == (60, 5)
    assert users.encoded["mean_stars"].shape == (60, 2)
    assert items.encoded["price"].shape == (30, 5)
    schema = pq.read_schema(saved / "users" / "raw.parquet")
    assert schema.field("recent_items").type == pa.large_list(pa.large_string())
    schema = pq.read_schema(saved / "items" / "encoded.parquet")
    assert schema.field("price").type == pa.list_(pa.float32(), 5)
    # Empty slots cost nothing.
    values = pq.read_table(saved / "users" / "raw.parquet")["recent_items"]
    assert sum(len(one) for one in values) == (users.raw["recent_items_weights"] > 0).sum() < 300


def test_lists_with_gaps_close_up(handmade, tmp_path):
    raw = dict(handmade.items.raw)
    raw["tags"] = np.array([["", "b", ""], ["a", "", "c"], ["", "", ""]] * 10, object)
    raw["tags_weights"] = np.array([[0, 2, 0], [1, 0, 3], [0, 0, 0]] * 10, np.float32)
    changed = prepared_with(handmade, items=dataclasses.replace(handmade.items, raw=raw))
    changed.save(tmp_path / "x")
    loaded = PreparedDataset.load(tmp_path / "x").items.raw
    assert loaded["tags"][:3].tolist() == [["b", "", ""], ["a", "c", ""], ["", "", ""]]
    assert loaded["tags_weights"][:3].tolist() == [[2, 0, 0], [1, 3, 0], [0, 0, 0]]


def test_lists_without_a_slot(handmade, tmp_path):
    raw = {**handmade.items.raw, "tags": np.empty((30, 0), object), "tags_weights": np.empty((30, 0), np.float32)}
    changed = prepared_with(handmade, items=dataclasses.replace(handmade.items, raw=raw))
    changed.save(tmp_path / "x")
    assert_same(changed, PreparedDataset.load(tmp_path / "x"))


def arguments(prepared: PreparedDataset) -> dict:
    names = ("dataset", "encoder", "fingerprint", "users", "items", "latest_users", "catalogue", "offsets")
    names += ("user_row", "item_row", "split", "time", "sampled")
    tasks = prepared.dataset.task_names
    return {name: getattr(prepared, name) for name in names} | {
        "labels": {task: prepared.label(task) for task in tasks},
        "weights": {task: prepared.weight(task) for task in tasks},
    }


def prepared_with(prepared: PreparedDataset, **others) -> PreparedDataset:
    return PreparedDataset(**arguments(prepared) | others)


def test_a_dataset_without_keys_time_items_and_names(tmp_path):
    dataset = small_dataset(
        **{
            "source.time": None,
            "keys": {},
            "tables": {},
            "negatives": {},
            "split": {"by": "random"},
            "groups": None,
            "features": {
                "age": {"tower": "user", "encode": "buckets", "bins": 2},
                "text": {"tower": "user", "encode": "vector", "width": 2},
            },
        }
    )
    kinds = {"age": "number", "text": "vector"}
    features = [EncodedFeature.from_declaration(one, dataset, kinds[one.name]) for one in dataset.features]
    features.append(EncodedFeature.constant_item())
    raw = {"age": np.array([1, 2, np.nan], np.float32), "text": np.array([[1, 2], [3, 4], [np.nan, 0]], np.float32)}
    encoder = Encoder.fit(features, {"user": raw, "item": {}}, {"user": np.arange(3), "item": np.arange(1)})
    users = EntityTable("user", np.arange(3), encoder.encode_numpy(raw, "user"), raw)
    prepared = PreparedDataset(
        dataset=dataset,
        encoder=encoder,
        fingerprint="x",
        users=users,
        items=EntityTable("item", np.arange(1), encoder.encode_numpy({}, "item", 1), {}),
        latest_users=users,
        catalogue=np.arange(1),
        user_row=np.arange(3),
        item_row=np.zeros(3),
        split=np.array([0, 0, 2]),
        labels={task: np.zeros(3) for task in dataset.task_names},
        weights={task: np.ones(3) for task in dataset.task_names},
    )
    prepared.save(tmp_path / "x")
    loaded = PreparedDataset.load(tmp_path / "x")
    assert_same(prepared, loaded)
    assert (loaded.has_users, loaded.has_items, loaded.time, loaded.users.name) == (False, False, None, None)
    assert loaded.sampled.tolist() == [False] * 3
    assert loaded.items.encoded["constant_item"].tolist() == [0]
    assert dict(loaded.items.raw) == {}
    assert loaded.items.names.tolist() == ["0"]
    assert loaded.known("user").tolist() == [True, True, False]
    assert loaded.known("item").tolist() == [True]
    assert loaded.schema().inputs("item") == ("constant_item",)


# Damage


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing\. Delete the folder and run `mvke prepare --data"):
        PreparedDataset.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_shorter_file_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=rf"{name} is damaged: \d+ bytes instead of \d+\. Delete the folder"):
        PreparedDataset.load(folder)


def read_everything(folder: Path) -> None:
    prepared = PreparedDataset.load(folder)
    for table in (prepared.users, prepared.items, prepared.latest_users):
        for columns in (table.encoded, table.raw):
            dict(columns)
        assert len(table.key) == len(table)
        assert table.names is not None
        assert table.time is None or len(table.time) == len(table)
    for column in prepared._columns.values():
        assert len(column) == len(prepared)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_noticed_or_harmless(handmade, folder, name):
    """By structure, by the checksum of the page, or by digest; nothing else is read than what was written."""
    path = folder / name
    content = path.read_bytes()
    noticed = 0
    positions = np.linspace(0, len(content) - 1, 15).astype(int)
    for position in positions if name.endswith(".parquet") else positions[:3]:
        changed = bytearray(content)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            read_everything(folder)
        except DataError as error:
            noticed += 1
            assert path.name in str(error), error
            assert "mvke prepare --data" in str(error)
        else:
            assert_same(handmade, PreparedDataset.load(folder))
    assert noticed >= 3


def rewrite(folder: Path, name: str, change) -> None:
    """Another table in place of a file, as its manifest says."""
    path = folder / name
    pq.write_table(change(pq.read_table(path)), path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = store._stamp(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_column(name: str, values: pa.Array):
    return lambda table: table.set_column(table.schema.names.index(name), name, values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("interactions.parquet", lambda table: table.slice(1), "399 rows instead of 400"),
        ("interactions.parquet", lambda table: table.drop_columns("split"), "columns .* instead of .*'split'"),
        ("interactions.parquet", with_column("user_row", pa.array(np.full(400, 60, np.int32))), "from 60 to 60"),
        ("interactions.parquet", with_column("item_row", pa.array(np.full(400, -1, np.int32))), "from -1 to -1"),
        (
            "interactions.parquet",
            with_column("split", pa.array(np.arange(400) % 4, pa.int8())),
            r"'split': expected values from 0 to 2\. Received: from 0 to 3",
        ),
        ("interactions.parquet", with_column("split", pa.array(np.zeros(400))), "'split' is double, not int8"),
        ("catalogue.parquet", with_column("item_row", pa.array(np.full(30, 30))), "from 30 to 30"),
        ("users/keys.parquet", lambda table: table.rename_columns(["id", "time"]), "its columns are"),
        ("users/encoded.parquet", lambda table: table.slice(0, 10), "10 rows instead of 60"),
        (
            "items/encoded.parquet",
            with_column("price", pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(120, np.float32)), 4)),
            "'price' is fixed_size_list<.*>\\[4\\], not fixed_size_list<.*>\\[5\\]",
        ),
        ("items/encoded.parquet", with_column("year", pa.array(np.zeros(30))), "'year' is double, not int32"),
        ("items/raw.parquet", with_column("year", pa.array(["x"] * 30)), "'year' is string, not float"),
        ("latest_users/raw.parquet", lambda table: table.drop_columns("age"), "columns"),
    ],
)
def test_structure_is_checked_when_loading(folder, name, change, message):
    rewrite(folder, name, change)
    with pytest.raises(DataError, match=rf"{name} is damaged: .*{message}.*\. Delete the folder and run `mvke"):
        PreparedDataset.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "items/raw.parquet",
            with_column("tags", pa.array([["a"] * 9] * 30, pa.large_list(pa.large_string()))),
            "column 'tags': a list of 9 values where at most 3 are expected",
        ),
        (
            "users/raw.parquet",
            with_column("age", pa.array([None] * 60, pa.float32())),
            "column 'age' has 60 null values",
        ),
    ],
)
def test_values_are_checked_when_they_are_read(folder, name, change, message):
    rewrite(folder, name, change)
    with pytest.raises(DataError, match=rf"^[^ ]*{name} is damaged: {message}"):
        read_everything(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "has format 99, expected 2"),
        (lambda m: m.pop("rows"), "'rows' is None"),
        (lambda m: m.update(files=[]), r"'files' is \[\]"),
        (lambda m: m["rows"].update(users=-1), "'rows' of 'users' is -1"),
        (lambda m: m["rows"].update(users=True), "'rows' of 'users' is True"),
        (lambda m: m["rows"].pop("users"), "'rows' has"),
        (lambda m: m["files"].pop("encoder.json"), "'files' has"),
        (lambda m: m["files"].update({"encoder.json": [1]}), r"'files' of 'encoder\.json' is \[1\]"),
        (lambda m: m["files"].update({"encoder.json": 1}), r"'files' of 'encoder\.json' is 1"),
        (lambda m: m["rows"].update(users=61), "keys.parquet is damaged: 60 rows instead of 61"),
        (lambda m: m["offsets"].update(stars="3"), "'offsets' of 'stars' is '3'"),
        (lambda m: m["offsets"].update(likes=3), r"offsets of unknown tasks \['likes'\]"),
        (lambda m: m["list_lengths"].pop("items/tags"), "no list length of items/tags"),
        (lambda m: m.update(dataset={"format": 1}), r"manifest\.json is damaged: .*"),
        (lambda m: m["dataset"]["tasks"]["click"].update(label="bought"), "its digest is not that of its declaration"),
        (lambda m: m.update(fingerprint="other"), "its digest is not that of its declaration"),
    ],
)
def test_a_wrong_manifest(folder, change, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"{message}.*Delete the folder and run `mvke prepare --data"):
        PreparedDataset.load(folder)


def test_other_damage(folder, tmp_path):
    with pytest.raises(DataError, match=r"There is no prepared dataset in .*nowhere\. Run `mvke prepare --data"):
        PreparedDataset.load(tmp_path / "nowhere")
    encoder = (folder / "encoder.json").read_text()
    (folder / "encoder.json").write_text(encoder.replace('"vocabulary"', '"vocabulari"'))
    with pytest.raises(DataError, match=r"encoder\.json is damaged: its checksum is not that of the manifest"):
        PreparedDataset.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["encoder.json"] = store._stamp(folder / "encoder.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"encoder\.json is damaged: .*`encode` must be one of"):
        PreparedDataset.load(folder)
    for text, message in (("[1]", "it is no object"), ("{", "no valid JSON")):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=rf"manifest\.json .*{message}.*Delete the folder"):
            PreparedDataset.load(folder)


def test_a_folder_without_summaries_of_lists_is_read_as_it_is(tmp_path):
    old = prepare(small_dataset(**{"features.liked_tags.summary": False}))
    # Format 1 did not know that key.
    old.dataset, old._version = small_dataset(), 1
    old.save(tmp_path / "old")
    read = PreparedDataset.load(tmp_path / "old")
    assert json.loads((tmp_path / "old" / "manifest.json").read_text())["format"] == 1
    assert read.digest == digest(small_dataset(), old.fingerprint, 1) != digest(small_dataset(), old.fingerprint)
    assert tuple(read.users.encoded) == read.schema().inputs("user")
    assert not any(name.endswith("_summary") for name in read.users.encoded)


def test_digest():
    dataset = small_dataset()
    assert digest(dataset, "a") == digest(small_dataset(), "a") != digest(dataset, "b")
    assert digest(dataset, "a") != digest(small_dataset(**{"features.age.bins": 2}), "a")
    assert len(digest(dataset, "a")) == 64


# What training and evaluation ask


def test_tasks(handmade):
    assert handmade.task_names() == ("click", "buy")
    assert handmade.task_names(("stars", "click")) == ("click", "stars")
    with pytest.raises(
        ConfigError, match=r"small has no task 'clik'\. Did you mean 'click'\? Tasks: click, buy, stars"
    ):
        handmade.task_names(("clik",))
    with pytest.raises(ConfigError, match="different tasks"):
        handmade.task_names(("click", "click"))
    with pytest.raises(ConfigError, match="no task 'x'"):
        handmade.label("x")


@pytest.mark.parametrize(
    ("tasks", "objective", "given", "objectives", "factorised"),
    [
        ((), "", [None, "click"], ["joint", "marginal"], [None, None]),
        ((), "joint", [None, "click"], ["joint", "joint"], [None, "click"]),
        (("buy", "click"), "conditional", [None, "click"], ["joint", "conditional"], [None, "click"]),
        (("buy",), "", [None], ["marginal"], [None]),
        (("buy",), "conditional", [None], ["conditional"], [None]),
        (("stars",), "joint", [None], ["joint"], [None]),
    ],
)
def test_schema(handmade, tasks, objective, given, objectives, factorised):
    schema = handmade.schema(tasks, objective)
    assert schema.features == handmade.encoder.schema_features()
    assert [task.given for task in schema.tasks] == given
    assert [task.objective for task in schema.tasks] == objectives
    assert [task.factorised_by for task in schema.tasks] == factorised


def test_schema_of_a_regression(handmade):
    (task,) = handmade.schema(("stars",)).tasks
    assert (task.kind, task.offset, task.domain, task.transform) == ("regression", 3.0, (1, 5), None)
    with pytest.raises(ConfigError, match=r"`objective` must be one of .*Received: 'esmm'"):
        handmade.schema((), "esmm")


def test_part(handmade):
    for number, part in enumerate(("train", "validation", "test")):
        rows = np.flatnonzero(handmade.split == number)
        np.testing.assert_array_equal(handmade.part_rows(part), rows)
        data = handmade.part(part, ("click", "buy", "stars"))
        assert data.users is handmade.users.encoded
        np.testing.assert_array_equal(data.user_rows, handmade.user_row[rows])
        np.testing.assert_array_equal(data.item_rows, handmade.item_row[rows])
        for task, label in data.labels.items():
            np.testing.assert_array_equal(label, handmade.label(task)[rows])
        # Where every row counts, there are no weights.
        assert set(data.weights) == {"stars"}
        np.testing.assert_array_equal(data.weights["stars"], handmade.weight("stars")[rows])
        data.check_labels(handmade.schema(("click", "buy", "stars")).tasks)
    assert handmade.part("test").weights == {}
    with pytest.raises(ConfigError, match=r"The parts of the data are train, validation, test\. Received: 'tests'"):
        handmade.part("tests")


def test_conditional_tasks_count_where_the_event_happened(handmade):
    rows = handmade.part_rows("train")
    clicked = handmade.event("click")[rows]
    assert 0 < clicked.sum() < len(rows)
    for tasks in (("click", "buy"), ("buy",)):
        weights = handmade.part("train", tasks, "conditional").weights
        assert list(weights) == ["buy"]
        assert weights["buy"].tolist() == clicked.tolist()
    assert handmade.part("train", objective="joint").weights == {}
    half = prepared_with(handmade, weights={task: np.full(400, 0.5) for task in ("click", "buy", "stars")}).part(
        "train", objective="conditional"
    )
    assert half.weights["buy"].tolist() == (0.5 * clicked).tolist()
    assert half.weights["click"].tolist() == [0.5] * len(rows)
    declared = prepared_with(handmade, dataset=small_dataset(**{"tasks.buy.objective": "conditional"}))
    assert declared.part("train").weights["buy"].tolist() == clicked.tolist()
    assert declared.part("train", objective="marginal").weights == {}


def test_known(handmade):
    training = (handmade.split == 0) & ~handmade.sampled
    for side, table, rows in (
        ("user", handmade.users, handmade.user_row),
        ("item", handmade.items, handmade.item_row),
    ):
        keys = {table.key[row] for row in rows[training]}
        assert handmade.known(side).tolist() == [key in keys for key in table.key]
    assert 0 < handmade.known("user").sum() < 60
    # A user whose one state was in training is known in every state.
    assert len(np.unique(handmade.user_row[training])) < handmade.known("user").sum()


def test_names(handmade):
    assert handmade.items.names[:2].tolist() == ["Item 1", "Item 2"]
    assert handmade.users.names[:2].tolist() == ["1", "1"]
    assert repr(handmade) == "<PreparedDataset small: 400 interactions of 60 user states and 30 items>"


# Columns that do not fit


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"user_row": np.full(400, 60)}, "'user_row' of the interactions: expected values from 0 to 59"),
        ({"item_row": np.full(400, -1)}, "'item_row' of the interactions: expected values from 0 to 29"),
        ({"split": np.full(400, 3)}, r"'split' of the interactions: expected values from 0 to 2\. Received: from 3"),
        ({"split": np.zeros(399)}, "interactions need as many rows"),
        ({"catalogue": np.array([30])}, "The catalogue: expected values from 0 to 29"),
        ({"labels": {}}, r"a label column per task, \('click', 'buy', 'stars'\)\. Received: \[\]"),
        ({"weights": {"click": np.ones(400)}}, "a weight column per task"),
    ],
)
def test_interactions_that_do_not_fit(handmade, others, message):
    with pytest.raises(ValueError, match=message):
        prepared_with(handmade, **others)


def test_entities_that_do_not_fit():
    with pytest.raises(ValueError, match=r"need as many rows\. Received: {'key': 3, 'raw/age': 2}"):
        EntityTable("user", np.arange(3), {}, {"age": np.zeros(2)})
    with pytest.raises(ValueError, match="need as many rows"):
        EntityTable("item", np.arange(3), {}, {}, name=np.array(["a"]))
    with pytest.raises(ValueError, match="`side` must be one of"):
        EntityTable("users", np.arange(3), {}, {})


def test_overrides_prepare_anew():
    assert small_prepared() is small_prepared()
    changed = small_prepared(**{"negatives": None})
    assert not changed.sampled.any()
    assert changed.digest != small_prepared().digest
    assert store.FORMATS == (1, 2, 3, 4)


def test_a_sample_has_some_of_the_interactions_and_all_entities():
    prepared = small_prepared()
    some = prepared.sample(0.25, seed=3)
    assert len(some) == round(0.25 * len(prepared)) and some.users is prepared.users and some.items is prepared.items
    pairs = list(zip(prepared.user_row.tolist(), prepared.item_row.tolist(), strict=True))
    chosen = list(zip(some.user_row.tolist(), some.item_row.tolist(), strict=True))
    assert set(chosen) <= set(pairs) and some.label("click").sum() < prepared.label("click").sum()
    assert np.array_equal(some.user_row, prepared.sample(0.25, seed=3).user_row)
    assert not np.array_equal(some.user_row, prepared.sample(0.25, seed=4).user_row)
    assert some.digest != prepared.digest
    with pytest.raises(ValueError, match=r"share.*Received: 0"):
        prepared.sample(0)
