# SPDX-License-Identifier: Apache-2.0
"""What the explorer says is what the model says of the same pairs."""

import re

import numpy as np
import pytest

from mvke_tf.analysis import Study, explain_user
from mvke_tf.data.batches import Interactions
from mvke_tf.errors import DataError, RunError
from mvke_tf.explore import explorer as module
from mvke_tf.explore.explorer import Explorer, best_of
from mvke_tf.explore.fields import from_text
from tests.explore.conftest import kinds_prepared

pytestmark = pytest.mark.slow
EDIT = {"age": "61", "country": "us", "recent_items": "i04\ni09", "liked_tags": "news = 2\nsport = 1"}


def outputs(explorer, user, edit=()):
    """Predictions and logits of the model for one user and all items, from its raw features."""
    prepared, model = explorer.run.prepared, explorer.model
    raw = {name: column[[user]] for name, column in prepared.latest_users.raw.items()}
    for feature in explorer.fields:
        if feature.name in edit:
            raw |= from_text(feature, edit[feature.name])
    users = prepared.encoder.encode_numpy(raw, "user", 1)
    rows = prepared.catalogue
    pairs = {name: np.repeat(column, len(rows), axis=0) for name, column in users.items()}
    pairs |= {name: column[rows] for name, column in prepared.items.encoded.items()}
    logits = model({name: pairs[name] for name in model.input})
    given = {} if model.conditional is None else model.conditional({n: pairs[n] for n in model.conditional.input})
    predicted = {task: np.asarray(values) for task, values in model.predictions(logits).items()}
    return predicted, {task: np.asarray(given.get(task, logit))[:, 0] for task, logit in logits.items()}


def column(explorer, predicted, target):
    classes = explorer.model.classes.get(target.task)
    return predicted[target.task][:, classes.index(target.label) if classes else 0]


@pytest.mark.parametrize("name", ["mvke", "mmoe", "ple", "stem", "aitm", "shared_bottom"])
def test_an_edited_user(run_of, name):
    explorer = Explorer(run_of(name, tasks=("click", "buy", "stars")))
    user = explorer.find("user", "7")
    assert explorer.texts(user)["age"] == "39"
    view = explorer.user(user, EDIT, top=5)
    assert view.changed == tuple(EDIT) and view.unknown == ()
    (before, _), (now, logits) = outputs(explorer, user), outputs(explorer, user, EDIT)
    assert [ranking.target.name for ranking in view.rankings] == ["click", "buy", "stars"]
    for ranking in view.rankings:
        task = ranking.target.task
        was, current = before[task][:, 0], now[task][:, 0]
        order, order_before = np.argsort(-current, kind="stable"), np.argsort(-was, kind="stable")
        assert [entry.position for entry in ranking.best] == order[:5].tolist()
        assert [entry.position for entry in ranking.left] == [i for i in order_before[:5] if i not in order[:5]]
        for entry in (*ranking.best, *ranking.left):
            assert entry.value == pytest.approx(current[entry.position], rel=1e-5, abs=1e-5)
            assert entry.value_before == pytest.approx(was[entry.position], rel=1e-5, abs=1e-5)
            assert entry.rank == 1 + order.tolist().index(entry.position)
            assert entry.rank_before == 1 + order_before.tolist().index(entry.position)
        if explorer.model.gates is None or task not in explorer.model.gates.output:
            assert ranking.experts == () and {entry.contributions for entry in ranking.best} == {()}
            continue
        what = "kernel" if name == "mvke" else "expert"
        assert ranking.experts == tuple(f"{what} {e}" for e in explorer.model.experts_of(task))
        offset = explorer.model.offsets.get(task, 0.0)
        for entry in ranking.best:
            assert len(entry.contributions) == len(ranking.experts)
            assert sum(entry.contributions) == pytest.approx(logits[task][entry.position] - offset, abs=1e-4)
    assert len(view.gates) == (len(explorer.model.gates.output) if explorer.model.gate_side == "user" else 0)
    assert bool(view.gates) == (name in ("mmoe", "ple", "stem"))
    for gate in view.gates:
        assert gate.weights.sum() == pytest.approx(1) and abs(gate.weights - gate.other).max() > 1e-4


@pytest.mark.parametrize("name", ["mvke", "mmoe"])
def test_contributions_are_those_of_the_analysis(run_of, name):
    explorer = Explorer(run_of(name))
    prepared, rows = explorer.run.prepared, explorer.run.prepared.catalogue
    pairs = Interactions(prepared.latest_users.encoded, prepared.items.encoded, np.zeros(len(rows), np.int32), rows, {})
    why = explain_user(Study(explorer.model, pairs, rows), 3, top=4)
    for ranking in explorer.user(3, top=4).rankings:
        expected = why[why["task"] == ranking.target.task]
        parts = np.array([entry.contributions for entry in ranking.best])
        np.testing.assert_allclose(parts.ravel(), expected["contribution"], rtol=1e-4, atol=1e-5)
        first = expected.drop_duplicates("rank")
        assert [int(rows[entry.position]) for entry in ranking.best] == first["item_row"].tolist()
        np.testing.assert_allclose([entry.value for entry in ranking.best], first["prediction"], rtol=1e-5)


def test_an_unedited_user_is_what_the_user_was(explorer):
    for texts in (None, explorer.texts(2), {"age": explorer.texts(2)["age"]}):
        view = explorer.user(2, texts)
        assert view.changed == () and len(view.rankings[0].best) == 10
        for ranking in view.rankings:
            assert ranking.left == ()
            assert all((e.value, e.rank) == (e.value_before, e.rank_before) for e in ranking.best)


def test_what_training_did_not_know_is_said(explorer):
    view = explorer.user(0, {"country": "Atlantis", "liked_tags": "news = 1\nchess = 2", "age": ""})
    assert view.changed == ("age", "country", "liked_tags") and view.unknown == ("country", "liked_tags")


def test_every_wrong_value_is_named(explorer):
    with pytest.raises(DataError) as raised:
        explorer.user(0, {"age": "old", "liked_tags": "news = much"})
    assert str(raised.value).splitlines() == [
        "age: expected a number. Received: 'old'",
        "liked_tags: expected a weight above 0 after ' = '. Received: 'much'",
    ]
    with pytest.raises(DataError, match=re.escape("Expected features of a user. Received: ['price']")):
        explorer.user(0, {"price": "3"})


def test_an_item(explorer, monkeypatch):
    item = explorer.find("item", "i05")
    view = explorer.item(item, top=3)
    weights = [gate.weights for gate in view.gates]
    assert [gate.task for gate in view.gates] == ["click", "buy", "stars"]
    prepared, model = explorer.run.prepared, explorer.model
    rows = prepared.catalogue
    items = {name: prepared.items.encoded[name][rows] for name in model.gates.input}
    for gate in view.gates:
        expected = np.asarray(model.gates(items)[gate.task])
        np.testing.assert_allclose(gate.weights, expected[item], rtol=1e-5)
        np.testing.assert_allclose(gate.other, expected.mean(axis=0), rtol=1e-5)
    assert sum(map(len, weights)) == sum(len(model.experts_of(task)) for task in model.task_names)
    vectors = model.item_tower({name: prepared.items.encoded[name][rows] for name in model.item_tower.input})
    for task, entries in view.neighbours.items():
        unit = np.asarray(vectors[task]) / np.linalg.norm(vectors[task], axis=1, keepdims=True)
        cosine = unit @ unit[item]
        order = [other for other in np.argsort(-cosine, kind="stable") if other != item][:3]
        assert [entry.position for entry in entries] == order
        np.testing.assert_allclose([entry.value for entry in entries], cosine[order], rtol=1e-5)
    of_users = [outputs(explorer, user)[0] for user in range(len(explorer.users))]
    for ranking in view.users:
        values = np.array([predicted[ranking.target.task][item, 0] for predicted in of_users])
        best = np.argsort(-values, kind="stable")[:3]
        assert [entry.position for entry in ranking.best] == best.tolist()
        np.testing.assert_allclose([entry.value for entry in ranking.best], values[best], rtol=1e-5)


def test_of_many_users_some_are_asked(run_of, monkeypatch):
    monkeypatch.setattr(module, "MOST_USERS", 4)
    explorer = Explorer(run_of("shared_bottom"))
    positions = {entry.position for entry in explorer.item(0).users[0].best}
    assert explorer.asked_users == 4 and positions == {0, 3, 7, 11}


def test_who_is_meant(explorer):
    assert explorer.users[4] == "5" and explorer.find("user", " 5 ") == 4
    assert explorer.items[2] == "Item 3 (i03)"
    assert [explorer.find("item", text) for text in ("i03", "Item 3", "Item 3 (i03)")] == [2, 2, 2]
    with pytest.raises(
        DataError, match=r"name or id of an item of the data. Did you mean 'Item 3'\? Received: 'Itm 3'"
    ):
        explorer.find("item", "Itm 3")
    with pytest.raises(DataError, match=r"id of a user of the data. Received: ''"):
        explorer.find("user", None)


def test_a_single_task_without_items_ids_or_gates(run_of):
    explorer = Explorer(run_of("single_task", tasks=("click",)))
    assert [target.name for target in explorer.targets] == ["click"]
    view = explorer.user(0)
    assert view.gates == () and view.rankings[0].experts == ()
    assert explorer.item(0).gates == ()


@pytest.fixture(scope="module")
def kinds(run_of):
    return Explorer(run_of("mvke", kinds_prepared()))


def test_all_kinds_of_tasks_and_values_without_any_ids(kinds):
    """Users are rows of the log, items what differs in its features."""
    assert len(kinds.users) == 240 and kinds.users[3] == "row 3" and kinds.items[0] == "item 0"
    assert kinds.find("user", "3") == kinds.find("user", "row 3") == 3
    assert [(target.name, target.unit) for target in kinds.targets] == [
        *(("click", "probability"), ("buy", "probability"), ("visits", "rate"), ("stars", "value")),
        *(("mood: good", "probability"), ("mood: bad", "probability")),
    ]
    edit = {"age": "44.5", "shape": "0.25 3", "hour": "5", "liked": "news = 0.5\nfilm"}
    texts = kinds.texts(3)
    assert set(texts) == {"age", "country", "shape", "hour", "liked"}
    assert texts["shape"] == "0.03 0.5" and texts["hour"] == "3"
    view = kinds.user(3, {**texts, **edit})
    assert view.changed == ("age", "shape", "hour", "liked") and view.unknown == ()
    (before, _), (now, logits) = outputs(kinds, 3), outputs(kinds, 3, edit)
    for ranking in view.rankings:
        was, current = (column(kinds, predicted, ranking.target) for predicted in (before, now))
        assert [entry.position for entry in ranking.best] == np.argsort(-current, kind="stable")[:10].tolist()
        for entry in ranking.best:
            assert entry.value == pytest.approx(current[entry.position], rel=1e-4, abs=1e-5)
            assert entry.value_before == pytest.approx(was[entry.position], rel=1e-4, abs=1e-5)
            # A task with a single kernel, or with classes, has nothing to take apart.
            if ranking.target.task in ("buy", "visits", "stars"):
                offset = kinds.model.offsets.get(ranking.target.task, 0.0)
                logit = logits[ranking.target.task][entry.position]
                assert sum(entry.contributions) == pytest.approx(logit - offset, abs=1e-4)
            else:
                assert entry.contributions == () and ranking.experts == ()
    assert len(kinds.item(1).users) == 6


def test_texts_of_all_users_are_their_values(kinds, explorer):
    for each in (kinds, explorer):
        prepared = each.run.prepared
        for user in range(len(each.users)):
            raw, texts = {}, each.texts(user)
            for feature in each.fields:
                raw |= from_text(feature, texts[feature.name])
            encoded = prepared.encoder.encode_numpy(raw, "user", 1)
            for name, values in prepared.latest_users.encoded.items():
                np.testing.assert_array_equal(encoded[name][0], values[user], err_msg=name)


def test_runs_that_cannot_be_explored(tiny_run):
    tiny_run.checkpoint.rename(tiny_run.folder / "elsewhere")
    with pytest.raises(RunError, match="has no checkpoint yet"):
        Explorer(tiny_run)
    (tiny_run.folder / "elsewhere").rename(tiny_run.checkpoint)
    tiny_run.prepared_folder.rename(tiny_run.prepared_folder.with_name("gone"))
    with pytest.raises(RunError, match=r"The prepared data of .* are not at"):
        Explorer(tiny_run)


def test_the_best_and_ties():
    values = np.array([0.5, 0.9, 0.5, 0.1, 0.9])
    assert best_of(values, 3).tolist() == [1, 4, 0]
    assert best_of(values, 9).tolist() == [1, 4, 0, 2, 3]
    assert best_of(values, 0).tolist() == []
