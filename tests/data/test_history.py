# SPDX-License-Identifier: Apache-2.0
"""Histories and statistics, by hand and against a slow reference that reads one row after another."""

import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvke_tf.data import history
from mvke_tf.data.history import Events
from mvke_tf.data.tables import Lists

# User 0 at moments 1, 2, 2, 5 (in seconds) and user 1 at 2 and 9; in the order of a log.
USER = np.array([0, 0, 1, 0, 0, 1])
TIME = np.array([1, 2, 2, 2, 5, 9]) * 1000
ITEM = np.array([7, 8, 7, 9, 7, 5])
PRICE = np.array([1.0, 4.0, 2.0, 6.0, 8.0, 3.0])
# Questions: user and moment.
ASKED = np.array([0, 0, 0, 0, 1, 1, 1])
MOMENT = np.array([1, 2, 3, 6, 2, 9, 10]) * 1000


@pytest.fixture
def events() -> Events:
    return Events(USER, TIME)


def singles(values, weights=None) -> Lists:
    series = values if isinstance(values, pl.Series) else pl.Series(values)
    return Lists(np.arange(len(series) + 1), series, weights)


def ragged(lists, weights=None) -> Lists:
    flat = [value for entry in lists for value in entry]
    offsets = np.concatenate([[0], np.cumsum([len(entry) for entry in lists])]).astype(np.int64)
    return Lists(offsets, pl.Series(flat), None if weights is None else np.asarray(weights, float))


def filled(values: np.ndarray, weights: np.ndarray) -> list:
    """Whole numbers with 0 in empty slots, which hold the value that means "unknown"."""
    assert (values[weights == 0] == -(2**63)).all()
    return np.where(weights == 0, 0, values).tolist()


def of_events(events: Events, values: Lists) -> Lists:
    return values.take(events.row)


def test_events_are_in_the_order_of_owner_and_time(events):
    assert events.row.tolist() == [0, 1, 3, 4, 2, 5]
    assert events.owner.tolist() == [0, 0, 0, 0, 1, 1]
    assert (events.time / 1000).tolist() == [1, 2, 2, 5, 2, 9]


def test_count_is_strictly_before(events):
    assert history.count(events.before(ASKED, MOMENT)).tolist() == [0, 1, 3, 4, 0, 1, 2]


def test_count_up_to_and_with_the_moment(events):
    inclusive = np.array([True, True, False, False, True, True, False])
    assert history.count(events.before(ASKED, MOMENT, inclusive=inclusive)).tolist() == [1, 3, 3, 4, 1, 2, 2]


@pytest.mark.parametrize(
    ("within", "expected"),
    [(1000, [0, 1, 2, 1, 0, 0, 1]), (3000, [0, 1, 3, 1, 0, 0, 1]), (4000, [0, 1, 3, 3, 0, 0, 1])],
)
def test_count_within(events, within, expected):
    # At moment 6 an age of 1 s reaches the row of moment 5, one of 4 s those of moment 2 too.
    assert history.count(events.before(ASKED, MOMENT, within=within)).tolist() == expected


def test_count_where(events):
    spans = events.before(ASKED, MOMENT).of(ITEM[events.row] == 7)
    assert history.count(spans).tolist() == [0, 1, 1, 2, 0, 1, 1]


def test_mean(events):
    mean = history.mean(events.before(ASKED, MOMENT), PRICE[events.row])
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, np.float32([math.nan, 1, 11 / 3, 19 / 4, math.nan, 2, 2.5]))


def test_mean_where_and_within(events):
    chosen = PRICE[events.row] > 1
    spans = events.before(ASKED, MOMENT, within=3500).of(chosen)
    mean = history.mean(spans, PRICE[events.row][chosen])
    np.testing.assert_array_equal(mean, np.float32([math.nan, math.nan, 5, 8, math.nan, math.nan, 3]))


def test_since(events):
    seconds = history.since(events.before(ASKED, MOMENT), events.time)
    np.testing.assert_array_equal(seconds, np.float32([math.nan, 1, 1, 1, math.nan, 7, 1]))


def test_last_values_the_most_recent_first(events):
    values, weights = history.last(events.before(ASKED, MOMENT), of_events(events, singles(ITEM)), 3)
    assert filled(values, weights) == [[0, 0, 0], [7, 0, 0], [9, 8, 7], [7, 9, 8], [0, 0, 0], [7, 0, 0], [5, 7, 0]]
    assert weights.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert (values.dtype, weights.dtype) == (np.int64, np.float32)


def test_last_values_with_weights_and_unknown_ones(events):
    items = pl.Series(["g", None, "g", "i", "g", "e"])
    weights = np.array([0.5, 1, 2, 0, 3, 4])
    values, weights = history.last(events.before(ASKED, MOMENT), of_events(events, singles(items, weights)), 2)
    # The unknown value of the second row and the weight 0 of the fourth take no slot.
    assert values.tolist() == [["", ""], ["g", ""], ["g", ""], ["g", "g"], ["", ""], ["g", ""], ["e", "g"]]
    assert weights.tolist() == [[0, 0], [0.5, 0], [0.5, 0], [3, 0.5], [0, 0], [2, 0], [4, 2]]
    assert values.dtype == object


def test_last_values_of_lists(events):
    tags = ragged([["a", "b"], [], ["c"], ["b", "d", "e"], ["a"], []], [1, 2, 3, 4, 5, 6, 7])
    values, weights = history.last(events.before(ASKED, MOMENT), of_events(events, tags), 4)
    assert values.tolist() == [
        ["", "", "", ""],
        ["a", "b", "", ""],
        ["b", "d", "e", "a"],
        ["a", "b", "d", "e"],
        ["", "", "", ""],
        ["c", "", "", ""],
        ["c", "", "", ""],
    ]
    assert weights[3].tolist() == [7, 4, 5, 6]


def test_counts(events):
    values, counts = history.counts(events.before(ASKED, MOMENT), events.owner, of_events(events, singles(ITEM)), 3)
    assert filled(values, counts) == [[0, 0, 0], [7, 0, 0], [7, 8, 9], [7, 8, 9], [0, 0, 0], [7, 0, 0], [5, 7, 0]]
    assert counts.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1], [2, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert counts.dtype == np.float32


def test_counts_keep_the_most_frequent_and_of_equal_ones_the_first(events):
    values, counts = history.counts(events.before(ASKED, MOMENT), events.owner, of_events(events, singles(ITEM)), 2)
    assert values[2:4].tolist() == [[7, 8], [7, 8]]
    assert counts[2:4].tolist() == [[1, 1], [2, 1]]


def test_counts_of_lists_within(events):
    tags = ragged([["a", "b"], [], ["c"], ["b", "d", "b"], ["a"], []])
    spans = events.before(ASKED, MOMENT, within=4000)
    values, counts = history.counts(spans, events.owner, of_events(events, tags), 3)
    assert values[3].tolist() == ["a", "b", "d"]
    assert counts[3].tolist() == [1, 2, 1]
    assert values[2].tolist() == ["a", "b", "d"]
    assert counts[2].tolist() == [1, 3, 1]


def test_no_events_at_all():
    events = Events(np.zeros(0, int), np.zeros(0, int))
    spans = events.before(np.array([0, 3]), np.array([5, 6]))
    nothing = Lists(np.zeros(1, np.int64), pl.Series([], dtype=pl.String))
    assert history.count(spans).tolist() == [0, 0]
    assert np.isnan(history.mean(spans, np.zeros(0))).all()
    assert np.isnan(history.since(spans, events.time)).all()
    for values, weights in (history.last(spans, nothing, 2), history.counts(spans, events.owner, nothing, 2)):
        assert values.tolist() == [["", ""]] * 2
        assert weights.tolist() == [[0, 0]] * 2


def test_decayed_by_hand():
    # One item at moments 0, 10 and 30 with values 1, 2 and 6; half-life 10.
    owner, time, values = np.zeros(3, int), np.array([0, 10, 30]), np.array([1.0, 2.0, 6.0])
    events = Events(owner, time)
    spans = events.before(np.zeros(4, int), np.array([0, 10, 30, 40]))
    counts = history.decayed(spans, events.owner, events.time, None, 10)
    np.testing.assert_array_equal(counts, np.float32([math.nan, 0.5, 0.125 + 0.25, 0.0625 + 0.125 + 0.5]))
    means = history.decayed(spans, events.owner, events.time, values, 10)
    expected = [math.nan, 1, (0.125 + 0.5) / 0.375, (0.0625 + 0.25 + 3) / 0.6875]
    np.testing.assert_allclose(means, expected, rtol=1e-6)


def test_decay_over_thousands_of_half_lives_is_finite():
    time = np.arange(5000) * 1000
    events = Events(np.zeros(5000, int), time)
    spans = events.before(np.zeros(2, int), np.array([5_000_000, 10_000_000]))
    counts = history.decayed(spans, events.owner, events.time, None, 1)
    assert counts.tolist() == [0, 0]
    means = history.decayed(spans, events.owner, events.time, np.arange(5000.0), 1)
    np.testing.assert_allclose(means, [4999, 4999])


# The same by a loop over rows.


def earlier(rows, user, moment, within):
    return [row for row in rows if row[0] == user and row[1] < moment and (within is None or row[1] >= moment - within)]


logs = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 12),
        st.lists(st.integers(0, 4), max_size=3),
        st.one_of(st.none(), st.integers(0, 5)),
    ),
    max_size=25,
)


@given(logs, st.one_of(st.none(), st.integers(0, 6)), st.integers(1, 4), st.sampled_from([1, 3, 10_000]))
def test_equals_a_loop(rows, within, length, block):
    rows = sorted(rows, key=lambda row: row[1])
    events = Events(np.array([row[0] for row in rows], int), np.array([row[1] for row in rows], int))
    questions = [(user, moment) for user in range(5) for moment in range(-1, 15, 3)]
    # Questions in any order.
    questions = questions[::2] + questions[1::2][::-1]
    spans = events.before(*(np.array(column) for column in zip(*questions, strict=True)), within=within)
    lists = [row[2] for row in rows]
    lists = Lists(
        np.concatenate([[0], np.cumsum([len(entry) for entry in lists], dtype=np.int64)]).astype(np.int64),
        pl.Series([value for entry in lists for value in entry], dtype=pl.Int64),
    ).take(events.row)
    known = np.array([rows[row][3] is not None for row in events.row], bool)
    prices = np.array([rows[row][3] for row in events.row[known]], float)

    before, history._BLOCK = history._BLOCK, block
    try:
        last, last_weights = history.last(spans, lists, length)
        counts, numbers = history.counts(spans, events.owner, lists, length)
    finally:
        history._BLOCK = before
    count = history.count(spans)
    mean = history.mean(spans.of(known), prices)
    for i, (user, moment) in enumerate(questions):
        past = earlier(rows, user, moment, within)
        assert count[i] == len(past)
        expected = [value for row in reversed(past) for value in row[2]][:length]
        assert filled(last[i], last_weights[i]) == expected + [0] * (length - len(expected))
        assert last_weights[i].sum() == len(expected)
        frequent = sorted(
            Counter(value for row in past for value in row[2]).items(), key=lambda pair: (-pair[1], pair[0])
        )
        frequent = sorted(frequent[:length])
        assert filled(counts[i], numbers[i]) == [value for value, _ in frequent] + [0] * (length - len(frequent))
        assert numbers[i].tolist() == [number for _, number in frequent] + [0] * (length - len(frequent))
        values = [row[3] for row in past if row[3] is not None]
        np.testing.assert_equal(mean[i], np.float32(sum(values) / len(values) if values else math.nan))


@given(logs, st.integers(1, 9))
def test_decay_equals_a_loop(rows, half_life):
    rows = sorted(rows, key=lambda row: row[1])
    events = Events(np.array([row[0] for row in rows], int), np.array([row[1] for row in rows], int))
    questions = [(user, moment) for user in range(5) for moment in range(-1, 15, 3)]
    spans = events.before(*(np.array(column) for column in zip(*questions, strict=True)))
    values = np.array([len(rows[row][2]) for row in events.row], float)
    counts = history.decayed(spans, events.owner, events.time, None, half_life)
    means = history.decayed(spans, events.owner, events.time, values, half_life)
    for i, (user, moment) in enumerate(questions):
        weights = [(0.5 ** ((moment - row[1]) / half_life), len(row[2])) for row in earlier(rows, user, moment, None)]
        total = sum(weight for weight, _ in weights)
        np.testing.assert_allclose(counts[i], total if weights else math.nan, rtol=1e-5)
        mean = sum(weight * value for weight, value in weights) / total if weights else math.nan
        np.testing.assert_allclose(means[i], mean, rtol=1e-5, atol=1e-6)


def test_means_do_not_carry_what_came_before():
    events = Events(np.zeros(4, np.int64), np.array([0, 10, 11, 12]))
    spans = events.before([0, 0, 0], [11, 12, 13], within=2)
    np.testing.assert_array_equal(history.mean(spans, np.array([1e20, 1.0, 3.0, 0.5])), np.float32([1, 2, 1.75]))


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
def test_means_of_every_range(length):
    values = np.random.default_rng(length).random(length)
    start, end = (part.ravel() for part in np.triu_indices(length + 1))
    spans = history.Spans(start * 0, start, start * 0, start, end)
    expected = [values[a:b].mean() if b > a else math.nan for a, b in zip(start, end, strict=True)]
    np.testing.assert_allclose(history.mean(spans, values), expected, rtol=1e-6)
