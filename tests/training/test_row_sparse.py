# SPDX-License-Identifier: Apache-2.0
"""Tables of which a step updates the touched rows only. All of it passes under JAX, too."""

import dataclasses

import keras
import numpy as np
import pytest

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError
from mvke_tf.layers import embedding
from mvke_tf.losses import task_losses
from mvke_tf.run import Run
from mvke_tf.schema import ITEM_ROWS, USER_ROWS, Feature, Schema, Task
from mvke_tf.training import memory
from mvke_tf.training.loop import build_training_model, train_run
from mvke_tf.training.memory import TableMemory, check_memory, describe_memory, table_memory
from tests.layer_checks import assert_close
from tests.training.helpers import assert_same_state, state

pytestmark = pytest.mark.slow

# Batches of 8 pairs: every user once in each, or some of them; the table of items, which two features share, has fewer
# rows than a batch looks up, and is then updated as a whole.
ROWS = 8
SCHEMA = Schema(
    (
        Feature("user", "user", ROWS),
        Feature("seen", "user", 5, length=2, embedding="item"),
        Feature("item", "item", 5),
    ),
    (Task("click"),),
)
MODEL = ModelConfig("single_task", embedding_dim=3, hidden_dims=(16,), dropout_rate=0.0, embedding_dropout_rate=0.0)
MODEL = dataclasses.replace(MODEL, embedding_stddev=0.5)
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def sparse_gradients(monkeypatch):
    """Those of TensorFlow are slices from three rows on, as they are of large tables."""
    monkeypatch.setattr(embedding, "LARGE_TABLE", 2)


def batch(users):
    x = {
        "user": np.asarray(users, "int32"),
        "seen": RANDOM.integers(0, 5, (len(users), 2)).astype("int32"),
        "seen_weights": RANDOM.uniform(0.5, 1.5, (len(users), 2)).astype("float32"),
        "item": np.resize(np.arange(5), len(users)).astype("int32"),
    }
    return x, {task: RANDOM.integers(0, 2, (len(users), 1)).astype("float32") for task in ("click",)}


BATCHES = [batch(RANDOM.permutation(ROWS)) for _ in range(3)]
# Some users only, one of them twice.
SOME = batch([3, 6, 3, 6, 5, 5, 5, 3])


def build(rule, schema=SCHEMA, **settings):
    keras.utils.set_random_seed(0)
    training = TrainingConfig(embedding_optimizer=rule, learning_rate=0.05, **{"deduplicate": False, **settings})
    return build_training_model(RunConfig(MODEL, training), schema, steps_per_epoch=10)


def table(model, name="user"):
    return keras.ops.convert_to_numpy(model.get_layer(f"embedding_{name}")._embeddings)


def table_state(model, name="user"):
    variables = [variable for variable in model.optimizer.variables if f"embedding_{name}_embeddings" in variable.path]
    return {variable.path.rpartition("_")[2]: keras.ops.convert_to_numpy(variable) for variable in variables}


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "adamw", "weight_decay": 0.1, "global_clipnorm": 0.05, "loss_weighting": "uncertainty"}],
    ids=["plain", "clipped"],
)
def test_lazy_adam_is_the_dense_optimizer_where_every_row_is_touched(settings):
    (dense, dense_model), (lazy, lazy_model) = build("same", **settings), build("lazy_adam", **settings)
    start = dense.get_weights()
    for x, y in BATCHES:
        dense_model.train_on_batch(x, y)
        lazy_model.train_on_batch(x, y)
    for before, ours, theirs in zip(start, lazy.get_weights(), dense.get_weights(), strict=True):
        assert np.abs(theirs - before).max() > 0.01
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rule", ["lazy_adam", "rowwise_adagrad"])
def test_rows_that_are_not_touched_do_not_move_at_all(rule):
    model = build(rule, optimizer="adamw", weight_decay=0.1)[1]
    model.train_on_batch(*BATCHES[0])
    before, state = table(model), table_state(model)
    assert {name: array.shape for name, array in state.items()} == (
        {"momentum": (ROWS, 3), "velocity": (ROWS, 3)} if rule == "lazy_adam" else {"squares": (ROWS,)}
    )
    model.train_on_batch(*SOME)
    moved = [3, 5, 6]
    for old, new in ((before, table(model)), *((state[name], new) for name, new in table_state(model).items())):
        changed = np.any((old != new).reshape(ROWS, -1), axis=1)
        assert np.flatnonzero(changed).tolist() == moved


def test_rows_that_only_fill_up_a_batch_are_not_touched():
    """A batch of distinct users and items: the first user is there as filling, and `seen` of a weight of 0 too."""
    plain, model = build("lazy_adam", deduplicate=True)
    y = BATCHES[0][1]
    users = {"user": np.array([3, 6, 5, 0], "int32"), "seen": np.array([[1, 2], [1, 4], [2, 1], [3, 3]], "int32")}
    users["seen_weights"] = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], "float32")
    rows = {USER_ROWS: np.array([0, 1, 2, 0, 1, 2, 0, 1], "int32"), ITEM_ROWS: np.array([0, 1] * 4, "int32")}
    start = [table(plain), table(plain, "item")]
    for _ in range(2):
        model.train_on_batch({**users, "item": np.array([1, 2], "int32"), **rows}, y)
    changed = [
        np.flatnonzero(np.any(new != old, axis=1))
        for old, new in zip(start, (table(plain), table(plain, "item")), strict=True)
    ]
    assert [rows.tolist() for rows in changed] == [[3, 5, 6], [1, 2]]


def test_a_replaced_index_touches_row_0_instead():
    features = (dataclasses.replace(SCHEMA.features[0], unknown_rate=1.0), *SCHEMA.features[1:])
    plain, model = build("lazy_adam", Schema(features, SCHEMA.tasks))
    before = table(plain)
    model.train_on_batch(*BATCHES[0])
    assert np.flatnonzero(np.any(table(plain) != before, axis=1)).tolist() == [0]


def test_rowwise_adagrad_by_hand():
    plain, model = build("rowwise_adagrad", embedding_learning_rate=0.2)
    descent = build("same")[1]
    expected, squares = {name: table(plain, name) for name in ("user", "item")}, {"user": 0.0, "item": 0.0}
    for x, y in (BATCHES[0], SOME):
        # The gradient is what plain descent at a rate of 1 takes from the same weights.
        descent.compile(keras.optimizers.SGD(1.0), loss=task_losses(plain.kinds), jit_compile=False)
        descent.set_weights(model.get_weights())
        descent.train_on_batch(x, y)
        for name in expected:
            gradient = table(model, name).astype("float64") - table(descent, name)
            squares[name] += np.mean(np.square(gradient), axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                step = gradient / np.sqrt(squares[name])[:, None]
            expected[name] = expected[name] - 0.2 * np.nan_to_num(step)
        model.train_on_batch(x, y)
        for name in expected:
            assert_close(table(plain, name), expected[name], 1e-4)
    assert_close(table_state(model)["squares"], squares["user"], 1e-4)


@pytest.mark.parametrize(("optimizer", "steps"), [("rowwise_adagrad", 0), ("lazy_adam", 2)])
def test_rows_resume_bit_identically(new_run, monkeypatch, optimizer, steps):
    """With distinct users and items, of which some fill up a batch, and a rate that falls; after and in an epoch."""
    options = {"embedding_optimizer": optimizer, "loss_weighting": "uncertainty", "epochs": 2}
    unbroken, broken = new_run("unbroken", **options), new_run("broken", **options, checkpoint_steps=steps)
    train_run(unbroken)
    save_state = Run.save_state

    def interrupt(self, *args):
        save_state(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(broken)
    monkeypatch.setattr(Run, "save_state", save_state)
    assert [len(broken.history()), broken.progress() and broken.progress().step] == ([0, 2] if steps else [1, None])
    train_run(broken)
    assert_same_state(state(unbroken), state(broken))


def test_low_precision_and_several_steps_per_call():
    plain, model = build("lazy_adam", precision="mixed_bfloat16", steps_per_execution=2)
    x, y = (
        {name: np.concatenate([first[name], second[name]]) for name in first}
        for first, second in zip(*BATCHES[:2], strict=True)
    )
    same = build("lazy_adam")[0]
    model.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0)
    assert table(plain).dtype == np.float32
    assert np.abs(table(plain) - table(same)).max() == pytest.approx(2 * 0.05, rel=0.2)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"gradient_accumulation_steps": 2}, "1 where embedding_optimizer='lazy_adam' updates single rows; a larger"),
        ({"precision": "mixed_float16"}, "float32 or mixed_bfloat16 where embedding_optimizer='lazy_adam'"),
    ],
)
def test_what_does_not_go_together_is_an_error(setting, expected):
    with pytest.raises(ConfigError, match=expected):
        TrainingConfig(embedding_optimizer="lazy_adam", **setting)


# === Memory ===

HUGE = Schema(
    (
        Feature("user", "user", 3_000_000_000),
        Feature("last", "user", 40, embedding="item"),
        Feature("item", "item", 40),
    ),
    SCHEMA.tasks,
)


@pytest.mark.parametrize(
    ("settings", "user"),
    [
        ({"embedding_optimizer": "rowwise_adagrad"}, (480, 12)),
        ({"embedding_optimizer": "lazy_adam"}, (480, 960)),
        ({}, (480, 1440)),
        ({"gradient_accumulation_steps": 2}, (480, 1920)),
    ],
)
def test_memory_of_tables_by_hand(settings, user):
    """In GB, of 3e9 rows of 40 float32: moments, gradient and its sum are as large as the table."""
    config = RunConfig(ModelConfig(embedding_dim=40), TrainingConfig(**settings))
    tables = table_memory(HUGE, config)
    assert [(table.name, table.rows, table.width) for table in tables] == [("user", 3 * 10**9, 40), ("item", 40, 40)]
    assert (tables[0].weights, tables[0].state) == (user[0] * 10**9, user[1] * 10**9)
    assert tables[1].weights == 40 * 40 * 4


def test_tables_that_do_not_fit_are_an_error_with_the_sums(monkeypatch):
    tables = [
        TableMemory("user", 3_000_000_000, 40, 480 * 10**9, 960 * 10**9),
        TableMemory("item", 40, 40, 6400, 12800),
    ]
    lines = [" ".join(line.split()) for line in describe_memory(tables).splitlines()]
    assert lines[1] == "user 3,000,000,000 x 40 480.0 GB 960.0 GB"
    assert lines[-1] == "total 3,000,000,040 480.0 GB 960.0 GB"
    with pytest.raises(ConfigError, match=r"Available: .*Needed: at least 1,440\.0 GB\n(.*\n)*Cap .*min_count"):
        check_memory(tables)
    check_memory(tables[1:])
    # Where the system does not say.
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory(tables)


def test_available_memory_is_the_least_of_what_the_system_says(tmp_path, monkeypatch):
    host = memory.available_memory()
    assert host is None or 10**6 < host < 10**15
    limit, usage, statistics = (tmp_path / name for name in ("limit", "usage", "stat"))
    usage.write_text("700000\n")
    statistics.write_text("anon 600000\ninactive_file 50000\n")
    monkeypatch.setattr(memory, "_GROUPS", ((limit, usage, statistics),))
    limit.write_text("max\n")
    assert memory.available_memory() in (None, pytest.approx(host, rel=0.5))
    limit.write_text("1000000\n")
    assert memory.available_memory() == 350_000
