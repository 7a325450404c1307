# SPDX-License-Identifier: Apache-2.0
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvke_tf.data import negatives
from mvke_tf.data.declaration import Negatives
from mvke_tf.data.negatives import draw
from mvke_tf.errors import DataError


def former_draws(user_ids, users, items, catalogue, random) -> np.ndarray:
    """The draws of the former implementation, with a dense matrix of users and items."""
    user_names, rows = np.unique(users, return_inverse=True)
    names, columns = np.unique(np.concatenate([catalogue, items]), return_inverse=True)
    had = np.zeros((len(user_names), len(names)), dtype=bool)
    had[rows, columns[len(catalogue) :]] = True
    row = np.searchsorted(user_names, user_ids)
    choices = (len(names) - had.sum(axis=1))[row]
    unseen_first = np.argsort(had, axis=1, kind="stable")
    return unseen_first[row, (random.random(len(row)) * choices).astype(np.int64)]


def random_log(seed: int, rows: int = 300, users: int = 8, items: int = 40):
    random = np.random.default_rng(seed)
    time = np.sort(random.integers(0, rows // 3, rows))
    return random.integers(0, users, rows), np.minimum(random.geometric(0.08, rows) - 1, items - 4), time


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 100, negatives._BLOCK])
def test_uniform_draws_are_those_of_the_former_implementation(seed, block, monkeypatch):
    monkeypatch.setattr(negatives, "_BLOCK", block)
    user, item, time = random_log(seed)
    declared = Negatives("uniform", per_positive=3, future=True, seed=seed)
    origin, drawn = draw(declared, user, item, time, 40)
    assert origin.tolist() == np.repeat(np.arange(300), 3).tolist()
    expected = former_draws(user[origin], user, item, np.arange(40), np.random.default_rng([seed, 1]))
    assert drawn.tolist() == expected.tolist()


def chi_square(drawn: np.ndarray, shares: dict[int, float]) -> float:
    values, counts = np.unique(drawn, return_counts=True)
    assert set(values.tolist()) <= set(shares)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    expected = {value: share * len(drawn) / sum(shares.values()) for value, share in shares.items()}
    return sum((found.get(value, 0) - number) ** 2 / number for value, number in expected.items())


# The chi-square statistic of at most 4 degrees of freedom passes 20 once in 2,000 samples.


@pytest.mark.parametrize("attempts", [0, 24])
def test_uniform_over_what_is_in_sight_and_has_not_been_had(attempts, monkeypatch):
    monkeypatch.setattr(negatives, "_ATTEMPTS", attempts)
    # Items 0 to 5 come into sight one after another; user 0 has 0, 2 and then 4.
    user, item, time = np.array([0, 1, 0, 1, 0, 1]), np.arange(6), np.arange(6)
    declared = Negatives("uniform", per_positive=1000)
    origin, drawn = draw(declared, user, item, time, 6)
    candidates = {1: [0], 2: [1], 3: [0, 2], 4: [1, 3], 5: [0, 2, 4]}
    assert set(origin.tolist()) == set(candidates)
    for row, items in candidates.items():
        assert chi_square(drawn[origin == row], dict.fromkeys(items, 1.0)) < 20


def test_uniform_over_a_catalogue():
    user, item, time = np.array([0, 0]), np.array([2, 3]), np.array([5, 6])
    catalogue = np.array([True, True, True, False, True])
    origin, drawn = draw(Negatives("uniform", per_positive=1000), user, item, time, 5, catalogue)
    # Item 3 is not in the side table: it comes into sight with its row.
    assert chi_square(drawn[origin == 0], {0: 1.0, 1: 1.0, 4: 1.0}) < 20
    assert chi_square(drawn[origin == 1], {0: 1.0, 1: 1.0, 4: 1.0}) < 20


@pytest.mark.parametrize("future", [False, True])
def test_popularity(future):
    # Up to moment 8 item 1 has three rows, item 2 two and item 3 one; item 2 has three more later.
    user = np.array([1, 1, 1, 1, 1, 1, 0, 1, 1, 1])
    item = np.array([1, 1, 1, 2, 2, 3, 0, 2, 2, 2])
    time = np.array([1, 2, 3, 4, 5, 6, 8, 9, 9, 9])
    origin, drawn = draw(Negatives("popularity", per_positive=1000, future=future), user, item, time, 4)
    shares = {1: 3.0, 2: 5.0, 3: 1.0} if future else {1: 3.0, 2: 2.0, 3: 1.0}
    assert chi_square(drawn[origin == 6], shares) < 20


def test_popularity_falls_back_to_uniform_where_only_unpopular_items_are_left(caplog):
    # The user has had all items that have rows; only 3 and 4 of the catalogue are left.
    user, item, time = np.zeros(3, int), np.arange(3), np.arange(3)
    with caplog.at_level(logging.INFO, "mvke_tf"):
        origin, drawn = draw(Negatives("popularity", per_positive=500), user, item, time, 5, np.ones(5, bool))
    assert chi_square(drawn[origin == 2], {3: 1.0, 4: 1.0}) < 20
    assert "drawn uniformly from the candidates" in caplog.text


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_no_candidates(kind):
    user, item, time = np.array([0, 1, 1]), np.array([0, 0, 1]), np.arange(3)
    for declared, catalogue in ((Negatives(kind, future=True), None), (Negatives(kind), np.ones(2, bool))):
        with pytest.raises(
            DataError, match=r"user 'ann' has had all 2 items\. Declare more items in \[tables\.items\]"
        ):
            draw(declared, user, item, time, 2, catalogue, ["bob", "ann"])
    with pytest.raises(DataError, match="has had all 1 items"):
        draw(Negatives(kind), np.zeros(2, int), np.zeros(2, int), np.arange(2), 1)


def test_rows_before_anything_else_was_seen_have_no_negatives(caplog):
    user, item, time = np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([1, 2, 3])
    origin, drawn = draw(Negatives("uniform", per_positive=2), user, item, time, 2)
    assert origin.tolist() == [2, 2]
    assert drawn.tolist() == [1, 1]
    assert "2 of 3 rows have no negatives" in caplog.text


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_seeds(kind):
    log = random_log(1)
    first, again, other = (draw(Negatives(kind, seed=seed), *log, 40, np.ones(40, bool))[1] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert (first != other).mean() > 0.5


rows = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 7)), min_size=1, max_size=30)


@settings(deadline=None)
@given(
    rows,
    rows,
    st.integers(0, 9),
    st.sampled_from(["uniform", "popularity"]),
    st.booleans(),
    st.sampled_from([0, 2, 24]),
)
def test_later_rows_change_no_draw(rows, others, moment, kind, with_catalogue, attempts):
    before, negatives._ATTEMPTS = negatives._ATTEMPTS, attempts
    try:
        results = []
        for log in (rows, [row for row in rows if row[0] <= moment] + [row for row in others if row[0] > moment]):
            if not log:
                results.append(None)
                continue
            time, user, item = (np.array(column, int) for column in zip(*sorted(log), strict=True))
            catalogue = np.arange(12) >= 5 if with_catalogue else None
            try:
                origin, drawn = draw(Negatives(kind, per_positive=2), user, item, time, 12, catalogue)
            except DataError:
                results.append(None)
                continue
            early = time[origin] <= moment
            results.append(list(zip(origin[early].tolist(), drawn[early].tolist(), strict=True)))
            # And none is an item that the user has had, or that was out of sight.
            for row, hit in zip(origin, drawn, strict=True):
                past = time <= time[row]
                assert hit not in item[past & (user == user[row])]
                assert hit in item[past] or (with_catalogue and catalogue[hit])
    finally:
        negatives._ATTEMPTS = before
    if None not in results:
        assert results[0] == results[1]
