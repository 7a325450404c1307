# SPDX-License-Identifier: Apache-2.0
import dataclasses
import gc
import itertools
import warnings
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.data.batches import Batches, Interactions
from mvke_tf.data.store import PreparedDataset
from mvke_tf.schema import Task
from tests.conftest import REPOSITORY

PAIRS, STATES, ITEMS, BATCH = 103, 31, 17, 10
STEPS = 11
# First numbers of epoch 3 of seed 7, plain and deduplicated, as all versions so far have drawn them.
PINNED = {False: [22, 68, 48, 6, 40, 73, 76, 8], True: [43, 60, 12, 37, 40, 86, 54, 55]}


@pytest.fixture(scope="module")
def data() -> Interactions:
    """Random interactions; the label `pair` is the number of the pair."""
    random = np.random.default_rng(0)
    return Interactions(
        users={
            "user_id": random.integers(0, 99, STATES).astype(np.int32),
            "recent": random.integers(0, 99, (STATES, 3)).astype(np.int32),
            "recent_weights": random.random((STATES, 3), np.float32),
        },
        items={
            "item_id": random.integers(0, 99, ITEMS).astype(np.int32),
            "price": random.random((ITEMS, 2), np.float32),
        },
        user_rows=random.integers(0, STATES, PAIRS).astype(np.int32),
        item_rows=random.integers(0, ITEMS, PAIRS).astype(np.int32),
        labels={"pair": np.arange(PAIRS), "click": random.integers(0, 2, PAIRS).astype(np.int8)},
    )


def read(dataset: tf.data.Dataset) -> list[tuple[dict, dict]]:
    return list(dataset.as_numpy_iterator())


def order(batches: list[tuple[dict, dict]]) -> list[int]:
    """Numbers of the pairs in the order in which they came."""
    return [int(pair) for _, labels in batches for pair in labels["pair"][:, 0]]


def check_batches(data: Interactions, batches: list[tuple[dict, dict]]) -> None:
    """Every batch, plain or deduplicated, holds the features and labels of its pairs, by naive gathers."""
    for inputs, labels in batches:
        pairs = labels["pair"][:, 0].astype(int)
        user, item = inputs.get("user_rows", slice(None)), inputs.get("item_rows", slice(None))
        for tower, table, rows in ((user, data.users, data.user_rows), (item, data.items, data.item_rows)):
            for name, column in table.items():
                expected = np.array([column[rows[pair]] for pair in pairs])
                np.testing.assert_array_equal(inputs[name][tower], expected, err_msg=name)
                assert inputs[name].dtype == column.dtype
        assert set(inputs) - {"user_rows", "item_rows"} == {*data.users, *data.items}
        assert set(labels) == {"pair", "click"}
        assert labels["click"].shape == (len(pairs), 1)
        assert labels["click"].dtype == np.float32
        assert labels["click"][:, 0].tolist() == [data.labels["click"][pair] for pair in pairs]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_pipelines_end_with_their_data(data, deduplicate):
    """An autotuner would sleep on for up to 41 s, and `fit` wait for it."""
    batches = Batches(data, BATCH, deduplicate)
    for dataset in (batches.in_order(), batches.shuffled(1), batches.epoch(0, 0), batches.in_order().map(lambda *x: x)):
        assert dataset.options().autotune.enabled is False


def test_the_package_makes_no_autotuned_pipeline():
    for folder in ("mvke_tf", "benchmarks", "scripts"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert "AUTOTUNE" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("deduplicate", [False, True])
def test_in_order(data, deduplicate):
    batches = read(Batches(data, BATCH, deduplicate).in_order())
    assert order(batches) == list(range(PAIRS))
    assert [len(labels["pair"]) for _, labels in batches] == [BATCH] * (STEPS - 1) + [3]
    check_batches(data, batches)


def test_indices_are_int32_and_the_rest_float32(data):
    element = Batches(data, BATCH, deduplicate=True).in_order().element_spec[0]
    assert {name: spec.dtype.name for name, spec in element.items()} == {
        "user_id": "int32",
        "recent": "int32",
        "recent_weights": "float32",
        "item_id": "int32",
        "price": "float32",
        "user_rows": "int32",
        "item_rows": "int32",
    }
    assert [element[name].shape.as_list() for name in ("user_id", "recent", "price")] == [
        [None],
        [None, 3],
        [None, 2],
    ]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_shuffled_holds_every_pair_once_per_epoch(data, deduplicate):
    batches = Batches(data, BATCH, deduplicate)
    dataset = batches.shuffled(seed=1)
    epochs = [read(dataset) for _ in range(3)]
    for epoch in epochs:
        assert sorted(order(epoch)) == list(range(PAIRS))
        assert len(epoch) == STEPS
        check_batches(data, epoch)
    orders = [order(epoch) for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    again = batches.shuffled(seed=1)
    assert [order(read(again)) for _ in range(3)] == orders
    assert order(read(batches.shuffled(seed=2))) != orders[0]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_epochs_depend_on_seed_and_number_alone(data, deduplicate):
    batches = Batches(data, BATCH, deduplicate)
    five = [batch for number in range(5) for batch in read(batches.epoch(5, number))]
    again = Batches(data, BATCH, deduplicate)
    resumed = [batch for number in (3, 4) for batch in read(again.epoch(5, number))]
    orders = [order(five[epoch * STEPS : (epoch + 1) * STEPS]) for epoch in range(5)]
    assert all(sorted(one) == list(range(PAIRS)) for one in orders)
    assert len(set(map(tuple, orders))) == 5
    for (inputs, labels), (resumed_inputs, resumed_labels) in zip(five[3 * STEPS :], resumed, strict=True):
        for name in inputs:
            np.testing.assert_array_equal(inputs[name], resumed_inputs[name], err_msg=name)
        for name in labels:
            np.testing.assert_array_equal(labels[name], resumed_labels[name], err_msg=name)
    assert order(read(batches.epoch(6, 0))) != orders[0]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_tensorflow_gathers_what_numpy_does(data, deduplicate):
    batches = Batches(data, 64, deduplicate, pad=8)
    for (start, gathered), plain in zip(
        ((start, batches.epoch(3, 1, start)) for start in (0, 2)),
        (batches.arrays(3, 1, start) for start in (0, 2)),
        strict=True,
    ):
        arrays = list(plain)
        assert len(arrays) == batches.steps - start
        for ours, theirs in zip(gathered.as_numpy_iterator(), arrays, strict=True):
            keras.tree.assert_same_structure(ours, theirs)
            for one, other in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("global_seed", [0, 1])
def test_epochs_do_not_depend_on_the_global_seed(data, global_seed):
    expected = order(read(Batches(data, BATCH).epoch(5, 0)))
    keras.utils.set_random_seed(global_seed)
    assert order(read(Batches(data, BATCH).epoch(5, 0))) == expected


def test_shuffling_is_no_mere_rotation(data):
    position = np.array(order(read(Batches(data, BATCH).shuffled(seed=0))))
    assert abs(np.corrcoef(position, np.arange(PAIRS))[0, 1]) < 0.3
    assert (np.diff(position) == 1).mean() < 0.1


@pytest.mark.parametrize(
    ("pairs", "batch_size", "steps"), [(PAIRS, BATCH, STEPS), (100, BATCH, 10), (5, BATCH, 1), (3, 1, 3)]
)
def test_cardinality(data, pairs, batch_size, steps):
    data = data.take(np.arange(pairs))
    batches = Batches(data, batch_size)
    assert data.steps(batch_size) == batches.steps == steps
    assert batches.in_order().cardinality() == steps
    assert batches.shuffled(seed=0).cardinality() == steps
    assert len(read(batches.in_order())) == len(read(batches.shuffled(seed=0))) == steps
    assert batches.epoch(0, 0).cardinality() == steps


def test_fit_for_two_epochs_does_not_run_out_of_data(data):
    inputs = {name: keras.Input((), dtype="int32", name=name) for name in ("user_id", "item_id")}
    vectors = [keras.layers.Embedding(99, 2)(tensor) for tensor in inputs.values()]
    model = keras.Model(inputs, {"click": keras.layers.Dot(1, name="click")(vectors)})
    model.compile("sgd", {"click": keras.losses.BinaryCrossentropy(from_logits=True)})
    batches = Batches(data, BATCH)
    for dataset in (batches.shuffled(seed=0), batches.epoch(0, 0)):
        dataset = dataset.map(
            lambda inputs, labels: ({name: inputs[name] for name in ("user_id", "item_id")}, {"click": labels["click"]})
        )
        seen = []
        count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs, seen=seen: seen.append(batch))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*ran out of data")
            model.fit(dataset, epochs=2, callbacks=[count], shuffle=False, verbose=0)
        assert seen == [*range(STEPS)] * 2


def test_deduplicated_rows_occur_once(data):
    # Columns that tell rows apart.
    data = Interactions(
        {"user": np.arange(STATES)}, {"item": np.arange(ITEMS)}, data.user_rows, data.item_rows, data.labels
    )
    for inputs, labels in read(Batches(data, 40, deduplicate=True).shuffled(seed=0)):
        pairs = labels["pair"][:, 0].astype(int)
        assert len(inputs["user_rows"]) == len(inputs["item_rows"]) == len(pairs)
        assert sorted(inputs["user"]) == sorted(set(data.user_rows[pairs]))
        assert sorted(inputs["item"]) == sorted(set(data.item_rows[pairs]))


@pytest.mark.parametrize("pad", [1, 8, 64])
def test_padding_fills_up_to_a_multiple(data, pad):
    plain = read(Batches(data, 40, deduplicate=True).in_order())
    padded = read(Batches(data, 40, deduplicate=True, pad=pad).in_order())
    check_batches(data, padded)
    for (inputs, _), (wide, _) in zip(plain, padded, strict=True):
        for rows, table in (("user_rows", data.users), ("item_rows", data.items)):
            np.testing.assert_array_equal(wide[rows], inputs[rows])
            for name, column in table.items():
                count = len(inputs[name])
                assert len(wide[name]) == -(-count // pad) * pad
                np.testing.assert_array_equal(wide[name][:count], inputs[name])
                assert (wide[name][count:] == column[0]).all()
                assert wide[rows].max() < count


def test_an_epoch_that_is_over_lets_go_of_its_data(data):
    batches = Batches(data, BATCH, deduplicate=True)
    assert len(read(batches.epoch(0, 0))) == STEPS
    window = weakref.ref(batches._whole)
    del batches
    gc.collect()
    assert window() is None


def test_pairs_of_one_state_stay_together(data):
    dataset = Batches(data, BATCH, deduplicate=True).shuffled(seed=3)
    orders = [[data.user_rows[pair] for pair in order(read(dataset))] for _ in range(2)]
    for states in orders:
        changes = 1 + sum(before != after for before, after in itertools.pairwise(states))
        assert changes == len(set(states))
    assert orders[0] != orders[1]


def test_take(data):
    rows = np.array([7, 3, 3, 100])
    taken = data.take(rows)
    assert len(taken) == 4
    assert taken.users is data.users
    batches = read(Batches(taken, 3).in_order())
    assert order(batches) == [7, 3, 3, 100]
    check_batches(data, batches)


def test_errors(data):
    with pytest.raises(ValueError, match=r"`batch_size` must be at least 1\. Received: 0"):
        Batches(data, 0)
    with pytest.raises(ValueError, match=r"`pad` must be 0 .*Received: -8"):
        Batches(data, BATCH, deduplicate=True, pad=-8)
    with pytest.raises(ValueError, match=r"at least one pair.*Received: no pair"):
        Batches(data.take(np.arange(0)), BATCH)


def test_weights_are_the_third_part_of_a_batch(data):
    weight = np.arange(PAIRS) % 2
    weighted = dataclasses.replace(data, weights={"click": weight})
    chosen = weighted.take(np.arange(1, PAIRS))
    assert list(chosen.weights["click"]) == list(weight[1:])
    for _, labels, weights in Batches(chosen, BATCH).in_order():
        assert labels.keys() == weights.keys() == {"pair", "click"}
        assert weights["pair"].numpy().min() == 1.0
        assert weights["click"].shape == labels["click"].shape
    together = np.concatenate([weights["click"] for _, _, weights in Batches(chosen, BATCH).in_order()])[:, 0]
    assert list(together) == list(weight[1:])


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        (Task("click"), 0.5, "binary task 'click' must be 0 or 1. Received: 1 others, such as 0.5"),
        (Task("click", "regression", domain=(1, 5)), 6.0, r"in \[1, 5\]. Received: 1 others, such as 6.0"),
        (
            Task("click", "regression", domain=(0, 5), transform="log1p"),
            1.8,
            r"log\(1 \+ y\) of y in \[0, 5\]\. Received: 1 ",
        ),
        (Task("click", "regression"), np.nan, r"in \[-inf, inf\]. Received: 1 others, such as nan"),
        (Task("like"), 1.0, r"Task 'like' has no labels. Received labels of: \['click', 'pair'\]"),
    ],
)
def test_labels_outside_their_domain(data, task, label, message):
    labels = np.ones(PAIRS)
    labels[3] = label
    wrong = dataclasses.replace(data, labels={**data.labels, "click": labels})
    with pytest.raises(ValueError, match=message):
        wrong.check_labels([task])
    if task.name == "click":
        dataclasses.replace(wrong, weights={"click": np.arange(PAIRS) != 3}).check_labels([task])


def test_transformed_labels_at_the_ends_of_their_domain(data):
    task = Task("click", "regression", domain=(0.1, 1000.3), transform="log1p")
    label = np.where(np.arange(PAIRS) % 2, np.log1p(np.float32(0.1)), np.log1p(np.float32(1000.3)))
    dataclasses.replace(data, labels={"click": label.astype(np.float32)}).check_labels([task])


@pytest.mark.parametrize("deduplicate", [False, True])
def test_columns_in_files(prepared, tmp_path, deduplicate):
    """Batches of what was loaded equal those of what was prepared, and read the columns of no other part."""
    prepared.save(tmp_path / "prepared")
    loaded = PreparedDataset.load(tmp_path / "prepared")
    tasks = ("click", "buy", "stars")
    first, second = (
        Batches(one.part("train", tasks), 50, deduplicate, pad=8 * deduplicate) for one in (prepared, loaded)
    )
    for batch, again in zip(read(first.epoch(1, 2)), read(second.epoch(1, 2)), strict=True):
        assert len(batch) == len(again) == 3
        for columns, others in zip(batch, again, strict=True):
            assert columns.keys() == others.keys()
            for name, column in columns.items():
                np.testing.assert_array_equal(column, others[name], err_msg=name)
    inputs = set(prepared.schema().inputs("user")) | set(prepared.schema().inputs("item"))
    assert set(batch[0]) - {"user_rows", "item_rows"} == inputs
    assert batch[0]["price"].dtype == batch[0]["mean_stars"].dtype == np.float32
    assert batch[0]["price"].shape[1] == 5


def test_the_order_of_an_epoch_is_pinned(data):
    """A run that was interrupted by an earlier version goes on with the same batches."""
    assert order(read(Batches(data, BATCH).epoch(7, 3)))[:8] == PINNED[False]
    assert order(read(Batches(data, BATCH, deduplicate=True).epoch(7, 3)))[:8] == PINNED[True]


@pytest.mark.parametrize("pad", [0, 8])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_slices_are_the_batch(data, deduplicate, pad):
    """What each of three devices gets, one of them in a process of its own, is together what one device gets."""
    whole = list(Batches(data, BATCH, deduplicate, pad).arrays(1, 0))
    first, rest = (list(Batches(data, BATCH, deduplicate, pad, 3, own).arrays(1, 0)) for own in (range(1), range(1, 3)))
    assert len(whole) == len(first) == len(rest) == STEPS
    for (_, labels), *parts in zip(whole, first, rest, strict=True):
        pairs = len(labels["pair"])
        height = -(-pairs // 3)
        assert [len(part_labels["pair"]) for _, part_labels, _ in parts] == [height, 2 * height]
        inputs, together, weights = (
            {name: np.concatenate([part[number][name] for part in parts]) for name in parts[0][number]}
            for number in range(3)
        )
        check_batches(data, [(inputs, together)])
        for task in labels:
            np.testing.assert_array_equal(together[task][:pairs], labels[task])
            np.testing.assert_array_equal(weights[task][:, 0], np.arange(3 * height) < pairs)
        if deduplicate:
            rows = len(inputs["user_id"]) // 3
            assert [len(part["user_id"]) for part, _, _ in parts] == [rows, 2 * rows]
            assert not pad or rows % pad == 0
            np.testing.assert_array_equal(inputs["user_rows"] // rows, np.repeat(np.arange(3), height))


def test_slices_keep_weights(data):
    weighted = dataclasses.replace(data, weights={"click": np.arange(PAIRS, dtype=np.float32)})
    parts = [list(Batches(weighted, BATCH, True, 0, 2, range(n, n + 1)).arrays(1, 0))[-1] for n in (0, 1)]
    # Three pairs, of which the last one fills up.
    assert [part[2]["pair"][:, 0].tolist() for part in parts] == [[1, 1], [1, 0]]
    last = [int(pair) for part in parts for pair in part[1]["pair"][:, 0]]
    assert last[2] == last[3]
    assert [float(weight) for part in parts for weight in part[2]["click"][:, 0]] == [*last[:3], 0]
