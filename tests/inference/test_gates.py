# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math

import numpy as np
import pytest

from mvke_tf.data.batches import Interactions
from mvke_tf.data.groups import Grouping
from mvke_tf.errors import ConfigError
from mvke_tf.inference.gates import (
    GateUse,
    GateView,
    Thresholds,
    dead,
    entropies,
    entropy_bits,
    gate_state,
    gate_uses,
    gate_weights,
    strongest,
)
from mvke_tf.models import build_mmoe, build_model
from mvke_tf.schema import Task
from tests.layer_checks import assert_close
from tests.models.problems import CONFIG, ITEMS, PAIRS, ROWS, SCHEMA, USERS, numpy_outputs, randomize

DATA = Interactions(USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], {})


def build(name, tasks=SCHEMA.tasks):
    config = dataclasses.replace(CONFIG, name=name, num_experts=5)
    return randomize(build_model(name, SCHEMA.with_tasks(tasks), config))


@pytest.mark.parametrize(("name", "side"), [("mvke", "item"), ("mmoe", "user"), ("cgc", "user"), ("ple", "user")])
def test_weights_per_entity_are_those_of_the_pairs(name, side):
    model = build(name)
    uses = gate_uses(model, DATA)
    expected = numpy_outputs(model.gates, {key: PAIRS[key] for key in model.gates.input})
    rows = ROWS["user_rows" if side == "user" else "item_rows"]
    assert list(uses) == ["ctr", "cvr"]
    for task, use in uses.items():
        assert (use.task, use.side, use.experts) == (task, side, model.experts_of(task))
        assert_close(use.weights[rows], expected[task])
        np.testing.assert_allclose(use.weights.sum(axis=1), 1.0, atol=1e-6)
        assert use.counts.tolist() == np.bincount(rows).tolist()
        # Weighted by impressions: the mean over the pairs.
        assert_close(use.mean_weight, expected[task].mean(axis=0))
        assert_close(use.deviation, expected[task].std(axis=0))


def test_weights_of_some_rows():
    model = build("mmoe")
    weights = gate_weights(model, USERS)
    for task, some in gate_weights(model, USERS, np.array([3, 1])).items():
        assert some.dtype == np.float64
        np.testing.assert_array_equal(some, weights[task][[3, 1]])


def test_the_plain_mmoe():
    features = {"features": np.random.default_rng(0).normal(size=(20, 6)).astype("float32")}
    model = randomize(build_mmoe(6, return_expert_weights=True))
    everything = np.arange(20)
    uses = gate_uses(model, Interactions(features, {}, everything, np.zeros(20, int), {}))
    expected = np.asarray(model(features["features"])["task_1_expert_weights"])
    assert uses["task_1"].side == "user" and uses["task_1"].experts == (0, 1, 2)
    assert_close(uses["task_1"].weights, expected)


def test_a_task_with_one_expert_has_no_gate():
    model = build("mmoe", (Task("ctr", experts=(0,)), Task("cvr", experts=(1, 3))))
    assert {task: use.experts for task, use in gate_uses(model, DATA).items()} == {"cvr": (1, 3)}


@pytest.mark.parametrize("look", [lambda model: gate_weights(model, USERS), lambda model: gate_uses(model, DATA)])
def test_a_model_without_gates_is_an_error(look):
    with pytest.raises(ConfigError, match=r"a model with gates: mvke.* Received: 'hard_sharing', which has none"):
        look(build("hard_sharing"))


def test_a_view_of_no_pairs_is_an_error():
    with pytest.raises(ValueError, match="at least one pair"):
        GateView(build("mvke"), DATA.take(np.array([], int)))


def test_a_view_has_the_weights_of_the_moment():
    model = build("mmoe")
    view = GateView(model, DATA)
    before = view.look()["ctr"]
    model.get_layer("gate_ctr").dense.bias.assign([9.0, 0, 0, 0, 0])
    assert view.look()["ctr"].mean_weight[0] > 0.9 > before.mean_weight[0]


@pytest.mark.parametrize("name", ["mvke", "mmoe"])
def test_means_of_groups_of_either_side(name):
    """Weighted by the pairs of each group; a group without pairs has no mean."""
    model = build(name)
    by_user = Grouping("city", "user", ("a", "b", "none"), np.eye(3, dtype=bool)[[0, 1, 1, 0]])
    # An item may be in several groups.
    by_item = Grouping("kind", "item", ("x", "y"), np.array([[1, 1], [0, 1], [1, 0]], bool))
    view = GateView(model, DATA, (by_user, by_item))
    use = view.look()["ctr"]
    weights = numpy_outputs(model.gates, {key: PAIRS[key] for key in model.gates.input})["ctr"]
    for group, rows in ((by_user, ROWS["user_rows"]), (by_item, ROWS["item_rows"])):
        means, impressions = view.by_group(use, group.variable)
        for index in range(len(group.groups)):
            inside = group.members[rows, index]
            assert impressions[index] == inside.sum()
            if inside.any():
                assert_close(means[index], weights[inside].mean(axis=0))
            else:
                assert np.isnan(means[index]).all()


def test_a_bounded_number_of_entities_evenly_spread():
    rows = np.repeat(np.arange(2, 102, dtype="int32"), 2)
    users = {name: np.resize(column, (200, *column.shape[1:])) for name, column in USERS.items()}
    data = Interactions(users, ITEMS, rows, np.zeros(200, "int32"), {})
    model = build("mmoe")
    use = GateView(model, data, most_entities=10).look()["ctr"]
    chosen = [2, 13, 24, 35, 46, 57, 68, 79, 90, 101]
    assert use.counts.tolist() == [2] * 10
    assert_close(use.weights, gate_weights(model, users)["ctr"][chosen])


# === Statistics ===


def test_entropy_by_hand():
    assert entropy_bits(np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4])).tolist() == [1, 0, 2]


def test_strongest_shares_ties():
    assert strongest(np.array([[0.6, 0.4, 0], [0.4, 0.4, 0.2]])).tolist() == [[1, 0, 0], [0.5, 0.5, 0]]


def test_entropies_by_hand():
    numbers = entropies(np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), np.array([1, 1, 2]))
    assert numbers == {
        "impression_entropy_bits": pytest.approx(0.5),
        "mean_weight_entropy_bits": pytest.approx(1.0),
        "information_bits": pytest.approx(0.5),
        "impression_entropy_share": pytest.approx(0.5),
        "mean_weight_entropy_share": pytest.approx(1.0),
        "information_share": pytest.approx(0.5),
    }
    four = entropies(np.full((3, 4), 0.25), np.ones(3))
    assert four["impression_entropy_bits"] == pytest.approx(2) and four["impression_entropy_share"] == pytest.approx(1)


USE = GateUse("ctr", "item", (4, 1), np.array([[0.75, 0.25], [0.25, 0.75]]), np.array([3, 1]))


def test_numbers_of_a_use_by_hand():
    assert USE.mean_weight.tolist() == [0.625, 0.375] and USE.strongest.tolist() == [0.75, 0.25]
    assert USE.deviation == pytest.approx([math.sqrt(0.75 * 0.125**2 + 0.25 * 0.375**2)] * 2)
    scalars = USE.scalars()
    assert scalars["mean_weight/expert_4"] == 0.625 and scalars["strongest/expert_1"] == 0.25
    assert scalars["information_bits"] == pytest.approx(entropy_bits([0.625, 0.375]) - entropy_bits([0.75, 0.25]))
    assert USE.reweighted(np.array([0, 5])).mean_weight.tolist() == [0.25, 0.75]


# === Judgement ===


def weights_of(*rows, counts=None):
    weights = np.array(rows, float)
    return GateUse(
        "ctr", "item", tuple(range(weights.shape[1])), weights, np.ones(len(rows)) if counts is None else counts
    )


@pytest.mark.parametrize(
    ("use", "state"),
    [
        (weights_of([0.95, 0.05], [0.9, 0.1]), "collapsed"),
        (weights_of([0.5, 0.5], [0.52, 0.48]), "uniform"),
        (weights_of([0.9, 0.1], [0.1, 0.9]), "specialised"),
        (weights_of([0.8, 0.2, 0.0, 0.0], [0.8, 0.2, 0.0, 0.0]), "skewed"),
        (weights_of([0.5, 0.3, 0.2], [0.45, 0.35, 0.2]), "balanced"),
    ],
)
def test_states(use, state):
    assert use.state() == state


def test_thresholds_move_the_states():
    use = weights_of([0.5, 0.3, 0.2], [0.45, 0.35, 0.2])
    assert use.state(Thresholds(uniform_entropy=0.9)) == "uniform"
    assert use.state(Thresholds(collapsed_weight=0.4)) == "collapsed"
    assert use.state(Thresholds(specialised_information=0.0)) == "specialised"
    assert use.state(Thresholds(balanced_entropy=1.0)) == "skewed"
    assert gate_state(0.5, 0.9, 0.01, 0.8) == "balanced" and gate_state(0.5, 0.9, 0.01, 0.79) == "skewed"


def test_a_choice_of_known_worth_is_uniform_only_if_it_is_worth_nothing():
    numbers = 0.3, 0.97, 0.01, 0.99
    assert gate_state(*numbers) == "balanced"
    assert gate_state(*numbers, worth=0.0001) == "uniform"
    assert gate_state(*numbers, worth=0.01) == "balanced"
    # Nearly even weights, whose choice is worth something all the same.
    assert gate_state(0.3, 0.99, 0.01, 0.99) == "uniform"
    assert gate_state(0.3, 0.99, 0.01, 0.99, worth=0.01) == "balanced"


@pytest.mark.parametrize(
    ("entropy", "worth", "state"),
    [
        # Entropy alone decides where it is not known what the choice is worth.
        (0.979, None, "balanced"),
        (0.98, None, "uniform"),
        # A choice that is worth something is one, and a worthless one is none, on either side of that.
        (0.979, 0.0004, "uniform"),
        (0.95, -0.001, "uniform"),
        (0.949, 0.0004, "balanced"),
        (0.99, 0.0005, "balanced"),
    ],
)
def test_uniform_follows_what_the_choice_is_worth(entropy, worth, state):
    assert gate_state(0.3, entropy, 0.01, 0.99, worth=worth) == state
    if worth is not None:
        assert gate_state(0.3, 0.99, 0.01, 0.99, Thresholds(worthless_choice=1.0), worth) == "uniform"
        assert gate_state(0.3, 0.99, 0.01, 0.99, Thresholds(worthless_entropy=1.0), worth) == "balanced"


def test_dead_experts():
    use = weights_of([0.6, 0.39, 0.01], [0.5, 0.48, 0.02])
    assert use.dead() == (2,)
    # A tenth of an equal share is 0.033; the mean weight is 0.015.
    assert use.dead(Thresholds(dead_weight=0.04)) == ()
    # Seldom weighty, but the strongest of one row in three.
    assert (
        weights_of([0.9, 0.05, 0.05], [0.97, 0.03, 0.0], [0.0, 0.0, 1.0], counts=np.array([2000, 2000, 10])).dead()
        == ()
    )
    assert dead(np.array([0.01, 0.3]), np.array([0.0, 0.0]), 1 / 3).tolist() == [True, False]


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_thresholds_are_shares(value):
    with pytest.raises(ConfigError, match=rf"Thresholds.dead_weight must lie in \[0, 1\]. Received: {value}"):
        Thresholds(dead_weight=value)
