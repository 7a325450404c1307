# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from mvke_tf.analysis import Study, UserState, explain_user, user_state
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.errors import ConfigError, DataError
from mvke_tf.schema import Task
from tests.models.problems import ITEMS, SCHEMA, USERS
from tests.small import small_prepared

SEVERAL = SCHEMA.with_tasks((Task("ctr"), Task("cvr", given="ctr"), Task("rating", "regression", offset=3.5)))


def of_user(user):
    """Features of one user with every item."""
    return {name: np.repeat(column[[user]], 3, axis=0) for name, column in USERS.items()} | ITEMS


@pytest.mark.parametrize("name", ["mvke", "mmoe", "cgc", "ple"])
def test_contributions_add_up_to_the_logit_of_every_user(make_model, pairs, name):
    model = make_model(name)
    study = Study(model, pairs)
    for user in range(4):
        logits = model(of_user(user))
        frame = explain_user(study, user, top=3)
        np.testing.assert_array_equal(frame["contribution"], frame["weight"] * frame["score"])
        for task in ("ctr", "cvr"):
            rows = frame[frame["task"] == task]
            total = rows.groupby("item_row")["contribution"].sum()
            expected = np.asarray(logits[task])[:, 0]
            np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
            best = rows.drop_duplicates("rank")
            assert best["item_row"].tolist() == np.argsort(-expected).tolist()
            np.testing.assert_allclose(best["prediction"], 1 / (1 + np.exp(-expected[best["item_row"]])), rtol=1e-5)
            assert rows.groupby("rank")["weight"].sum().tolist() == pytest.approx([1.0] * 3)


def test_all_kinds_of_tasks_are_explained(make_model, pairs):
    model = make_model("mvke", SEVERAL)
    outputs, given = model(of_user(2)), model.conditional(of_user(2))["cvr"]
    frame = explain_user(Study(model, pairs), 2, top=3)
    expected = {
        "ctr": (outputs["ctr"], 1 / (1 + np.exp(-np.asarray(outputs["ctr"])))),
        "cvr": (given, 1 / (1 + np.exp(-np.asarray(outputs["cvr"])))),
        "rating": (np.asarray(outputs["rating"]) - 3.5, outputs["rating"]),
    }
    for task, (logit, prediction) in expected.items():
        rows = frame[frame["task"] == task].drop_duplicates("rank")
        np.testing.assert_allclose(rows["logit"], np.asarray(logit)[rows["item_row"], 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rows["prediction"], np.asarray(prediction)[rows["item_row"], 0], rtol=1e-5)
        assert rows["prediction"].is_monotonic_decreasing


def test_what_is_shown_of_a_user(make_model, pairs):
    study = Study(make_model("mvke"), pairs)
    frame = explain_user(study, 1, names=["A", "B", "C"], top=1, exclude=[2])
    assert frame.groupby("task", sort=False).size().to_dict() == {
        task: len(gate.experts) for task, gate in study.gates.items()
    }
    everything = explain_user(study, 1, names=["A", "B", "C"])
    kept = everything[everything["item"] != "C"]
    assert (
        frame["item"].tolist() == kept[kept["rank"] == kept.groupby("task")["rank"].transform("min")]["item"].tolist()
    )
    with pytest.raises(ValueError, match=r"a row of the table of users, 0 to 3. Received: 9"):
        explain_user(study, 9)
    with pytest.raises(ValueError, match=r"an item to rank. Received: top=10, 0 items"):
        explain_user(study, 1, exclude=[0, 1, 2])
    with pytest.raises(ConfigError, match="model with gates"):
        explain_user(Study(make_model("hard_sharing"), pairs), 0)


@pytest.mark.parametrize("name", ["mvke", "mmoe"])
def test_only_the_catalogue_is_ranked_for_a_user_who_need_not_occur(make_model, pairs, name):
    model = make_model(name)
    some = pairs.take(np.flatnonzero(pairs.user_rows != 2))
    frame = explain_user(Study(model, some, catalogue=np.array([0, 2])), 2, names=["A", "B", "C"])
    logits = np.asarray(model(of_user(2))["ctr"])[:, 0]
    rows = frame[frame["task"] == "ctr"].drop_duplicates("rank").set_index("item")
    assert set(rows.index) == {"A", "C"} and set(rows["item_row"]) == {0, 2}
    assert rows.loc["A", "logit"] == pytest.approx(logits[0], rel=1e-4)
    assert rows.loc["C", "logit"] == pytest.approx(logits[2], rel=1e-4)


def test_tasks_without_a_gate_take_part_in_what_comes_after(make_model, pairs):
    schema = SCHEMA.with_tasks((Task("ctr", experts=(0,)), Task("cvr", given="ctr", experts=(1, 2))))
    model = make_model("mmoe", schema)
    frame = explain_user(Study(model, pairs), 3)
    assert set(frame["task"]) == {"cvr"}
    rows = frame.drop_duplicates("rank")
    expected = 1 / (1 + np.exp(-np.asarray(model(of_user(3))["cvr"], float)[:, 0]))
    np.testing.assert_allclose(rows["prediction"], expected[rows["item_row"]], rtol=1e-5)


# === Who is explained ===


@pytest.mark.parametrize("user", [10, "10"])
def test_the_last_state_of_a_user(user):
    prepared = small_prepared()
    state = user_state(prepared, "test", user)
    of_user = prepared.users.key[prepared.user_row] == 10
    inside = of_user & (prepared.split == 2)
    assert (state.name, state.key) == ("user 10", 10)
    last = prepared.time[inside].max()
    assert prepared.users.key[state.row] == 10 and prepared.users.time[state.row] == last
    before = of_user & ~prepared.sampled & (prepared.time < last)
    assert list(state.known) == sorted(set(prepared.item_row[before].tolist())) and len(state.known) > 10


def test_by_default_the_user_with_the_most_rows():
    prepared = small_prepared()
    ids, counts = np.unique(prepared.users.key[prepared.user_row[prepared.split == 2]], return_counts=True)
    assert user_state(prepared, "test").name == f"user {ids[counts.argmax()]}"
    # In the training part several users have as many: the first one.
    assert user_state(prepared, "train").name == "user 1"


def test_a_user_who_is_not_there():
    with pytest.raises(DataError, match=r"a user with a row in the test part, such as .*12.* Received: '99'"):
        user_state(small_prepared(), "test", "99")
    with pytest.raises(DataError, match=r"Received: 1$"):
        user_state(small_prepared(), "test", 1)
    with pytest.raises(ConfigError, match=r"parts of the data are train, validation, test. Received: 'tset'"):
        user_state(small_prepared(), "tset")


def test_users_without_ids_are_rows_and_items_of_earlier_parts_are_known_without_moments():
    features = {"age": {"tower": "user", "encode": "buckets"}, "item": {"tower": "item", "encode": "vocabulary"}}
    log = {"user": ["a", "b", "a", "b", "a"], "item": [1, 2, 3, 1, 2], "age": [20, 30, 20, 30, 20]}
    log |= {"click": [0, 1, 1, 0, 1], "part": [0, 0, 0, 1, 2]}
    split = {"by": "column", "column": "part", "train": 0, "validation": 1, "test": 2}
    tasks = {"click": {"label": "click"}}
    declaration = {"format": 1, "source": {}, "split": split, "features": features, "tasks": tasks}

    def prepared(keys):
        return prepare(Dataset.from_frame(log, {**declaration, "keys": keys}))

    with_users = prepared({"user": "user", "item": "item"})
    # The items table is in the order of the ids 1, 2, 3.
    assert user_state(with_users, "test") == UserState("a", 0, (0, 2))
    assert user_state(with_users, "train", "a").known == ()
    without = prepared({"item": "item"})
    state = user_state(without, "test")
    assert state.name == f"row {without.users.key[state.row]}" and state.known == ()
    assert user_state(prepared({"user": "user"}), "test").known == ()
