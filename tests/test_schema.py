# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from mvke_tf.schema import CONSTANT_ITEM, Feature, Schema, Task

USER = Feature("user_id", "user", 12, unknown_rate=0.1)
ITEM = Feature("item_id", "item", 9)
HISTORY = Feature("history", "user", 9, length=4, embedding="item_id")
PRICE = Feature("price", "item", width=3, unknown_rate=0.2, unknown_group="item")
CLICK_BUY = (Task("click"), Task("buy", given="click"))
SCHEMA = Schema((USER, ITEM, HISTORY), (Task("click", kernels=(0, 2)), Task("rating", "regression", transform="log1p")))


def test_round_trip_through_json():
    assert Schema.from_dict(json.loads(json.dumps(SCHEMA.to_dict()))) == SCHEMA


def test_features_by_tower_in_order():
    assert SCHEMA.of_tower("user") == (USER, HISTORY)
    assert SCHEMA.of_tower("item") == (ITEM,)


def test_a_multi_valued_feature_has_a_second_input():
    assert SCHEMA.inputs("user") == ("user_id", "history", "history_weights")
    assert SCHEMA.inputs("item") == ("item_id",)


def test_table_of_a_feature():
    assert [feature.table for feature in SCHEMA.features] == ["user_id", "item_id", "item_id"]


def test_lists_become_tuples():
    assert Schema([USER, ITEM], [Task("click", kernels=[0, 1])]) == Schema(
        (USER, ITEM), (Task("click", kernels=(0, 1)),)
    )


def test_dense_features():
    schema = Schema((USER, ITEM, PRICE), CLICK_BUY)
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert PRICE.is_dense and not ITEM.is_dense
    assert schema.inputs("item") == ("item_id", "price") and PRICE.inputs == ("price",)


def test_an_item_side_of_one_constant():
    schema = Schema((USER, Feature(CONSTANT_ITEM, "item", 1)), CLICK_BUY)
    assert schema.inputs("item") == ("constant_item",)


@pytest.mark.parametrize(("objective", "by"), [("joint", "click"), ("conditional", "click"), ("marginal", None)])
def test_what_a_task_is_factorised_by(objective, by):
    assert Task("buy", given="click", objective=objective).factorised_by == by
    assert Task("buy", objective=objective).factorised_by is None


def test_tasks():
    assert SCHEMA.task_names == ("click", "rating")
    other = SCHEMA.with_tasks([Task("buy")])
    assert (other.task_names, other.features) == (("buy",), SCHEMA.features)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMA.tasks = ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tower": "tag"}, r"'age': `tower` must be one of \('user', 'item'\). Received: 'tag'"),
        ({"vocabulary_size": 0}, "'age': either `vocabulary_size` or `width` .* Received: vocabulary_size=0, width=0"),
        ({"width": 3}, "'age': either .* must be at least 1, the other 0. Received: vocabulary_size=5, width=3"),
        ({"vocabulary_size": 0, "width": -1}, "'age': either .* Received: vocabulary_size=0, width=-1"),
        ({"vocabulary_size": 0, "width": 3, "length": 2}, "and 1 of a dense feature. Received: length=2, width=3"),
        ({"vocabulary_size": 0, "width": 3, "embedding": "x"}, "no embedding table to share. Received: embedding='x'"),
        ({"length": 0}, "'age': `length` must be at least 1.* Received: length=0, width=0"),
        ({"unknown_rate": 1.5}, r"'age': `unknown_rate` must lie in \[0, 1\]. Received: 1.5"),
        ({"unknown_rate": 0.1, "length": 3}, "'age': `unknown_rate` is for single-valued features. Received: length=3"),
        ({"unknown_rate": -0.5}, r"'age': `unknown_rate` must lie in \[0, 1\]. Received: -0.5"),
    ],
)
def test_rejects_features(changes, message):
    with pytest.raises(ValueError, match=message):
        Feature(**{"name": "age", "tower": "user", "vocabulary_size": 5, **changes})


def test_rejects_another_kind_of_task():
    with pytest.raises(
        ValueError,
        match=r"`kind` must be one of \('binary', 'regression', 'count', 'multiclass'\). Received: 'ranking'",
    ):
        Task("click", "ranking")


@pytest.mark.parametrize(
    ("features", "tasks", "message"),
    [
        ((USER, ITEM, USER), CLICK_BUY, r"Every feature needs a name of its own. Received twice: \['user_id'\]"),
        (
            (USER, ITEM),
            (Task("click"), Task("click")),
            r"Every task needs a name of its own. Received twice: \['click'\]",
        ),
        ((USER, ITEM), (), "A schema needs at least one task. Received: no task"),
        (
            (USER, ITEM, Feature("age", "user", 3, unknown_rate=0.2, unknown_group="user_id")),
            CLICK_BUY,
            "unknown_group 'user_id' need one tower and one unknown_rate",
        ),
        ((USER,), CLICK_BUY, "The item tower needs at least one feature. Received: "),
        ((ITEM,), CLICK_BUY, "The user tower needs at least one feature. Received: "),
        (
            (USER, ITEM, Feature("liked", "user", 9, embedding="items")),
            CLICK_BUY,
            r"'liked': `embedding` must name a feature that owns a table. Received: 'items'; "
            r"tables: \['item_id', 'user_id'\]",
        ),
        (
            (USER, ITEM, HISTORY, Feature("liked", "user", 9, embedding="history")),
            CLICK_BUY,
            "'liked': `embedding` must name a feature that owns a table. Received: 'history'",
        ),
        (
            (USER, ITEM, Feature("liked", "user", 8, embedding="item_id")),
            CLICK_BUY,
            "'liked' shares the table of 'item_id' and needs its vocabulary_size 9. Received: 8",
        ),
        ((USER, ITEM), (Task("item_id"),), r"need different names. Received twice: \['item_id'\]"),
    ],
)
def test_rejects_schemas(features, tasks, message):
    with pytest.raises(ValueError, match=message):
        Schema(features, tasks)


def test_rejects_unknown_settings():
    values = SCHEMA.to_dict()
    values["features"][0]["size"] = 3
    with pytest.raises(ValueError, match=r"Feature has no setting 'size'.* Known settings: "):
        Schema.from_dict(values)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "regression", "given": "click"}, "`given` is for binary tasks"),
        ({"offset": 1.0}, "`offset` is for regression and count tasks. Received: 1.0"),
        ({"domain": (0, 1)}, "`transform` are for regression tasks"),
        ({"transform": "log1p"}, "`transform` are for regression tasks. .*, transform=log1p"),
        (
            {"kind": "regression", "transform": "log2"},
            r"`transform` must be one of \(None, 'log1p'\). Received: 'log2'",
        ),
        ({"objective": "esmm"}, r"`objective` must be one of \('joint', 'conditional', 'marginal'\). Received: 'esmm'"),
        ({"kind": "regression", "domain": (5, 1)}, r"lowest and the highest legal label. Received: \(5, 1\)"),
        ({"kind": "regression", "domain": (5,)}, r"lowest and the highest legal label. Received: \(5,\)"),
    ],
)
def test_settings_of_another_kind_of_task(task, message):
    with pytest.raises(ValueError, match=message):
        Task("x", **task)


@pytest.mark.parametrize("given", ["buy", "rating", "later"])
def test_given_names_an_earlier_binary_task(given):
    tasks = [Task("click"), Task("rating", "regression"), Task("buy", given=given), Task("later")]
    with pytest.raises(ValueError, match=rf"one of \['click'\]. Received: '{given}'"):
        Schema((USER, ITEM), tasks)
