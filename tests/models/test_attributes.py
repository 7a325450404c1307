# SPDX-License-Identifier: Apache-2.0
"""What every two-tower model knows of itself, built, loaded, and as a part of its tasks."""

import dataclasses
import errno
import os
import re
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.errors import ConfigError, RunError
from mvke_tf.layers import GatedTag, MixExperts, SelectExperts
from mvke_tf.losses import task_losses
from mvke_tf.models import MODELS, TwoTowerModel, build_model, build_two_tower, load_model, save_model, with_uncertainty
from mvke_tf.schema import Task
from tests.layer_checks import assert_close
from tests.models.problems import (
    CONFIG,
    ITEMS,
    JIT_COMPILE,
    NUM_ITEMS,
    NUM_USERS,
    PAIRS,
    ROWS,
    SCHEMA,
    USERS,
    labels,
    numpy_outputs,
    randomize,
)

pytestmark = pytest.mark.slow

TASKS = (
    Task("click"),
    Task("buy", given="click", objective="conditional"),
    Task("like", given="click", objective="marginal"),
    Task("share", given="buy"),
    Task("seconds", "regression", offset=1.5, transform="log1p"),
)
SEEN = {
    "mvke": ((0,), (0, 1), (1, 2), (1, 2, 3), (2, 3, 4)),
    "mmoe": ((0, 1, 2, 3, 4, 5, 6),) * 5,
    "stem": ((0, 1, 2, 3, 4, 5, 6),) * 5,
    "cgc": tuple((task, 5, 6) for task in range(5)),
    "ple": tuple((task, 5, 6) for task in range(5)),
}


def settings(name):
    return dataclasses.replace(CONFIG, name=name, num_experts=7)


def build(name, tasks=TASKS):
    schema = SCHEMA.with_tasks(tasks[:1] if name == "single_task" else tasks)
    return randomize(build_model(name, schema, settings(name)))


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Every model as it was built, and with log-variances after a round trip through a `.keras` file."""
    model = build(request.param)
    path = tmp_path_factory.mktemp("attributes") / "model.keras"
    with_uncertainty(model).save(path)
    return model, load_model(path)


@pytest.mark.one_backend
def test_tasks(pair):
    for model in pair:
        assert isinstance(model, TwoTowerModel)
        assert model.task_names == tuple(task.name for task in model.schema_tasks)
        if model.name == "single_task":
            assert model.kinds == {"click": "binary"} and model.given == {} and model.offsets == {}
            continue
        assert model.kinds == {**dict.fromkeys(("click", "buy", "like", "share"), "binary"), "seconds": "regression"}
        assert model.given == {"buy": "click", "share": "buy"}
        assert model.transforms == {**dict.fromkeys(("click", "buy", "like", "share")), "seconds": "log1p"}
        assert model.offsets == {"seconds": 1.5}
        assert [task.objective for task in model.schema_tasks] == ["joint", "conditional", "joint", "joint", "joint"]
        assert model.schema_tasks[4].transform == "log1p" and model.schema_tasks[3].given == "buy"
    assert pair[0].schema_tasks == pair[1].schema_tasks
    assert pair[0].log_variances is None
    assert list(pair[1].log_variances.by_task()) == list(pair[1].task_names)


@pytest.mark.one_backend
def test_towers_fields_and_tags(pair):
    for model in pair:
        assert set(model.user_tower.input) == set(USERS) and set(model.item_tower.input) == set(ITEMS)
        assert model.user_fields == ("user_id", "age", "history")
        tags = numpy_outputs(model.tags, ITEMS)
        width = dict.fromkeys(model.task_names, 8)
        if model.name == "resflow":  # The vectors of the binary tasks before stand beside a task's own.
            width.update(buy=16, like=24, share=32)
        assert {task: tag.shape for task, tag in tags.items()} == {task: (NUM_ITEMS, d) for task, d in width.items()}
        items = numpy_outputs(model.item_tower, ITEMS)
        for task, tag in tags.items():
            # Gate weights sum to 1, so that the gated tags of MVKE sum to the tag.
            assert_close(items[task].reshape(NUM_ITEMS, -1, width[task]).sum(axis=1), tag)


@pytest.mark.one_backend
def test_gates_and_experts(pair):
    for model in pair:
        if model.name not in SEEN:
            assert model.gates is model.gate_side is model.expert_outputs is None
            assert model.experts_of("click") == model.kernels_of("click") == ()
            continue
        side, table = ("item", ITEMS) if model.name == "mvke" else ("user", USERS)
        assert model.gate_side == side and set(model.gates.input) == set(table)
        assert tuple(map(model.experts_of, model.task_names)) == SEEN[model.name]
        kernels = tuple(map(model.kernels_of, model.task_names))
        assert kernels == (SEEN["mvke"] if model.name == "mvke" else ((),) * 5)
        gates = numpy_outputs(model.gates, {name: PAIRS[name] for name in table})
        # A task with a single expert has nothing to choose.
        assert set(gates) == {task for task in model.task_names if len(model.experts_of(task)) > 1}
        gates = {task: np.ones((len(ROWS["user_rows"]), 1)) for task in model.task_names} | gates
        experts = ops.convert_to_numpy(model.expert_outputs({name: PAIRS[name] for name in USERS}))
        assert experts.shape == (len(ROWS["user_rows"]), 5 if model.name == "mvke" else 7, 8)
        tags = numpy_outputs(model.tags, {name: PAIRS[name] for name in ITEMS})
        outputs = numpy_outputs(model, PAIRS)
        for task, offset in (("click", 0.0), ("like", 0.0), ("seconds", 1.5)):
            mixed = np.einsum("be,bed->bd", gates[task], experts[:, list(model.experts_of(task))])
            assert_close(np.sum(mixed * tags[task], axis=1, keepdims=True) + offset, outputs[task])


@pytest.mark.one_backend
def test_virtual_kernels_and_field_attention(pair):
    for model in pair:
        if model.name != "mvke":
            assert model.field_attention is model.virtual_kernels is None
            continue
        attention = ops.convert_to_numpy(model.field_attention(USERS))
        assert attention.shape == (NUM_USERS, 3, 5)
        assert_close(attention.sum(axis=1), np.ones((NUM_USERS, 5)))
        np.testing.assert_array_equal(model.virtual_kernels, model.get_layer("virtual_kernels").get_weights()[0])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


def test_outputs_of_products_and_predictions(pair):
    for model in pair:
        users = numpy_outputs(model.user_tower, {name: PAIRS[name] for name in USERS})
        items = numpy_outputs(model.item_tower, {name: PAIRS[name] for name in ITEMS})
        products = {task: np.sum(users[task] * items[task], axis=1, keepdims=True) for task in users}
        outputs = {task: ops.convert_to_numpy(x) for task, x in model.outputs_of_products(products).items()}
        for task, output in numpy_outputs(model, PAIRS).items():
            assert_close(outputs[task], output)
        predicted = {task: ops.convert_to_numpy(x) for task, x in model.predictions(outputs).items()}
        assert_close(predicted["click"], sigmoid(products["click"]))
        if model.name == "single_task":
            assert model.conditional is None
            continue
        assert_close(predicted["like"], sigmoid(products["like"]))
        assert_close(predicted["buy"], sigmoid(products["click"]) * sigmoid(products["buy"]))
        assert_close(predicted["share"], predicted["buy"] * sigmoid(products["share"]))
        assert_close(predicted["seconds"], np.exp(products["seconds"] + 1.5) - 1)
        assert set(model.predictions({"like": outputs["like"]})) == {"like"}
        given = numpy_outputs(model.conditional, PAIRS)
        assert list(given) == ["buy", "share"]
        again = model.outputs_of_products(products, conditional=True)
        for task in ("buy", "share"):
            assert_close(given[task], products[task])
            assert_close(again[task], products[task])
        assert_close(again["like"], products["like"])


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (["share"], ("click", "buy", "share")),
        (["like"], ("like",)),
        (["seconds", "click"], ("click", "seconds")),
    ],
)
def test_a_part_of_the_tasks(pair, tasks, expected):
    for model in pair:
        if model.name == "single_task":
            continue
        part = model.for_tasks(tasks)
        assert isinstance(part, TwoTowerModel) and part.task_names == expected and part.log_variances is None
        assert part.given == {task: first for task, first in model.given.items() if task in expected}
        assert tuple(part.user_tower.output) == expected
        outputs, all_outputs = numpy_outputs(part, PAIRS), numpy_outputs(model, PAIRS)
        for task in expected:
            np.testing.assert_array_equal(outputs[task], all_outputs[task])


@pytest.mark.parametrize("tasks", [["rating"], []])
def test_unknown_tasks_are_an_error(tasks):
    with pytest.raises(ConfigError, match=r"model 'mmoe', which are \['click', .*'seconds'\]. Received: "):
        build("mmoe").for_tasks(tasks)


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize(("conditional", "expected"), [(None, {"buy"}), (True, {"buy", "share"}), (False, set())])
def test_the_training_model_puts_out_what_each_objective_learns(pair, deduplicate, conditional, expected):
    for model in pair:
        if model.name == "single_task":
            continue
        trained = model.training_model(deduplicate, conditional)
        assert (trained.log_variances is None) == (model.log_variances is None)
        assert {id(weight) for weight in trained.weights} == {id(weight) for weight in model.weights}
        outputs = numpy_outputs(trained, {**USERS, **ITEMS, **ROWS} if deduplicate else PAIRS)
        joint, given = numpy_outputs(model, PAIRS), numpy_outputs(model.conditional, PAIRS)
        assert trained.task_names == model.task_names and set(outputs) == set(model.task_names)
        for task, output in outputs.items():
            assert_close(output, (given if task in expected else joint)[task])


def test_a_clone_is_of_the_same_class(pair):
    for model in pair:
        clone = keras.models.clone_model(model)
        assert isinstance(clone, TwoTowerModel) and clone.schema_tasks == model.schema_tasks


def test_towers_of_any_kind_need_no_names():
    """Towers that a caller builds, with a gate on the item side that is not that of virtual kernels."""

    def towers(user_fields, item_fields, tasks, config):
        users = keras.layers.Reshape((3, 8))(user_fields)
        flat = keras.layers.Flatten()(item_fields)
        user_vectors, item_vectors = {}, {}
        for task in tasks:
            tag = keras.layers.Dense(8)(flat)
            user_vectors[task.name] = SelectExperts((2, 0))(users)
            item_vectors[task.name] = GatedTag()(tag, keras.layers.Dense(2, activation="softmax")(flat))
        return user_vectors, item_vectors

    model = randomize(build_two_tower(SCHEMA, CONFIG, towers, "custom"))
    assert (model.name, model.gate_side, model.experts_of("cvr"), model.kernels_of("cvr")) == (
        "custom",
        "item",
        (2, 0),
        (),
    )
    gates, tags = (numpy_outputs(part, {n: PAIRS[n] for n in ITEMS}) for part in (model.gates, model.tags))
    experts = ops.convert_to_numpy(model.expert_outputs({name: PAIRS[name] for name in USERS}))[:, [2, 0]]
    logits = np.einsum("be,bed,bd->b", gates["cvr"], experts, tags["cvr"])
    assert_close(numpy_outputs(model, PAIRS)["cvr"][:, 0], logits)


def test_towers_that_read_both_sides_are_refused():
    def towers(user_fields, item_fields, tasks, config):
        flat = keras.layers.Flatten()(item_fields)
        return {task.name: flat for task in tasks}, {task.name: flat for task in tasks}

    with pytest.raises(ValueError, match=r"must read different features. Received: both read \['genres'"):
        build_two_tower(SCHEMA, CONFIG, towers)


def test_gates_of_both_sides_are_refused():
    def towers(user_fields, item_fields, tasks, config):
        users, items = keras.layers.Reshape((3, 8))(user_fields), keras.layers.Flatten()(item_fields)
        first, second = (task.name for task in tasks)
        gate = keras.layers.Dense(2)(keras.layers.Flatten()(user_fields))
        return (
            {first: MixExperts((0, 1))(users, gate), second: SelectExperts((0, 1))(users)},
            {
                first: keras.layers.Dense(8)(items),
                second: GatedTag()(keras.layers.Dense(8)(items), keras.layers.Dense(2)(items)),
            },
        )

    model = build_two_tower(SCHEMA, CONFIG, towers)
    with pytest.raises(ValueError, match=r"must read the same side\. Received: {'ctr': 'user', 'cvr': 'item'}"):
        _ = model.gates


def test_a_deduplicated_step_of_training_changes_the_model():
    model = build("mvke", (Task("ctr"), Task("cvr", given="ctr")))
    before = model.get_weights()
    trained = model.training_model()
    trained.compile(keras.optimizers.Adam(0.01), loss=task_losses(model.kinds), jit_compile=JIT_COMPILE)
    trained.train_on_batch({**USERS, **ITEMS, **ROWS}, labels())
    assert all(np.abs(new - old).max() > 0 for new, old in zip(model.get_weights(), before, strict=True) if new.ndim)


def test_files_that_are_no_two_tower_model(tmp_path):
    with pytest.raises(RunError, match=r"There is no model at .*none.keras"):
        load_model(tmp_path / "none.keras")
    (tmp_path / "damaged.keras").write_bytes(b"PK")
    with pytest.raises(RunError, match=r"damaged.keras is damaged .* Train again"):
        load_model(tmp_path / "damaged.keras")
    with zipfile.ZipFile(tmp_path / "damaged.keras", "w") as file:
        file.writestr("metadata.json", "{}")
    with pytest.raises(RunError, match=r"damaged.keras is damaged"):
        load_model(tmp_path / "damaged.keras")
    symbol = keras.Input((3,))
    keras.Model(symbol, keras.layers.Dense(1)(symbol)).save(tmp_path / "other.keras")
    with pytest.raises(RunError, match=r"Expected a two-tower model.* Received: Functional in .*other.keras"):
        load_model(tmp_path / "other.keras")


def test_a_large_model_is_written_and_read_unpacked(tmp_path, monkeypatch, caplog):
    """What Keras would write and read in memory; on a full disk it does, which is said."""
    model, kept = build("mvke"), tmp_path / "kept"
    kept.mkdir()
    model.save(tmp_path / "keras.keras")
    monkeypatch.setattr("mvke_tf.models._LARGE", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save_model(model, kept / "large.keras")
    assert [path.name for path in kept.iterdir()] == ["large.keras"]
    with zipfile.ZipFile(tmp_path / "keras.keras") as file, zipfile.ZipFile(kept / "large.keras") as other:
        members = {name: file.read(name) for name in file.namelist()}
        assert other.namelist() == file.namelist() and other.read("config.json") == members["config.json"]
        assert all(member.date_time[0] == 1980 for member in other.infolist())
    real, read = keras.saving.load_model, []
    monkeypatch.setattr(keras.saving, "load_model", lambda path, **options: read.append(path) or real(path, **options))

    def written(name, compression, **changed):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as file:
            for member, content in (members | changed).items():
                file.writestr(member, content)
        return tmp_path / name

    def assert_loads(*paths):
        for path in paths:
            for loaded, own in zip(load_model(path).weights, model.weights, strict=True):
                np.testing.assert_array_equal(loaded, own)

    # All members as they are; packed ones, and others, are for Keras.
    as_they_are = tmp_path / "keras.keras", kept / "large.keras"
    others = [
        written("packed.keras", zipfile.ZIP_DEFLATED),
        written("more.keras", zipfile.ZIP_STORED, **{"assets/layer": "x"}),
    ]
    assert_loads(*as_they_are, *others)
    assert read[2:] == others and {Path(path).parent for path in read[:2]} == {tmp_path}
    damaged = (tmp_path / "keras.keras").read_bytes()
    place = damaged.index(members["model.weights.h5"][-100:])
    (tmp_path / "damaged.keras").write_bytes(damaged[:place] + b"x" + damaged[place + 1 :])
    with pytest.raises(RunError, match=r"damaged.keras is damaged \(Bad CRC-32 .*Train again"):
        load_model(tmp_path / "damaged.keras")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [kept] and not caplog.records

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    monkeypatch.setattr(os, "posix_fallocate", full)
    save_model(model, kept / "full.keras")
    assert_loads(kept / "full.keras")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert_loads(kept / "full.keras")
    written_in, *read_in = (record.getMessage() for record in caplog.records)
    assert re.match(r"full.keras is made in memory, because it cannot be made on the disk: .*No space left", written_in)
    assert len(read_in) == 2
    for text in read_in:
        assert re.match(
            r".*full.keras is read in memory, because it cannot be unpacked on the disk: .*No space left", text
        )
