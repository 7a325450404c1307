# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from fractions import Fraction

import numpy as np
import polars as pl
import pytest

from mvke_tf.data import split
from mvke_tf.data.declaration import Split
from mvke_tf.errors import DataError

ENDS = [0.7, 0.8]


def expected_parts(times: list[int], ends=ENDS) -> list[int]:
    """By the share of rows that are not later."""
    shares = [Fraction(sum(other <= time for other in times), len(times)) for time in times]
    train, validation = (Fraction(str(end)) for end in ends)
    return [0 if share <= train else 1 if share <= validation else 2 for share in shares]


def test_ends_have_no_rounding():
    assert split.share_ends(Split(by="random")) == [0.7, 0.8]
    assert split.share_ends(Split(by="random", train=0.6, validation=0.1, test=0.3)) == [0.6, 0.7]


@pytest.mark.parametrize("seed", range(5))
def test_share_of_time(seed):
    times = np.random.default_rng(seed).integers(0, 30, 100)
    parts = split.by_share_of_time(times, ENDS)
    assert parts.tolist() == expected_parts(times.tolist())
    assert parts.dtype == np.int8
    # Rows of one moment are on one side.
    for time in set(times.tolist()):
        assert len(set(parts[times == time])) == 1


def test_per_user():
    random = np.random.default_rng(0)
    users, times = random.integers(0, 5, 90), random.integers(0, 40, 90)
    parts = split.per_user(users, times, ENDS)
    for user in range(5):
        assert parts[users == user].tolist() == expected_parts(times[users == user].tolist())


def test_time():
    parts = split.by_time(np.array([5, 10, 19, 20, 21]), 10, 20)
    assert parts.tolist() == [0, 1, 1, 2, 2]


def test_chance_is_that_of_a_permutation():
    parts = split.by_chance(10, ENDS, 3)
    order = np.random.default_rng([3, 0]).permutation(10) + 1
    assert parts.tolist() == [0 if number <= 7 else 1 if number == 8 else 2 for number in order]
    assert parts.tolist() != split.by_chance(10, ENDS, 4).tolist()


def test_hash_keeps_values_together_and_shares():
    values = pl.Series([f"user {number % 4000}" for number in range(8000)])
    parts = split.by_hash(values, ENDS, 0)
    assert (parts[:4000] == parts[4000:]).all()
    np.testing.assert_allclose(np.bincount(parts) / 8000, [0.7, 0.1, 0.2], atol=0.02)
    assert (parts != split.by_hash(values, ENDS, 1)).mean() > 0.2


def test_hash_is_the_same_in_another_process():
    values = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    parts = split.by_hash(pl.Series(values), ENDS, 7).tolist()
    assert parts == split.by_hash(pl.Series(map(str, values)), ENDS, 7).tolist()
    code = (
        "import polars as pl; from mvke_tf.data import split; "
        f"print(split.by_hash(pl.Series({values}), {ENDS}, 7).tolist())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(parts) == "[0, 0, 2, 0, 0, 0, 0, 0, 1, 0]"


def test_column():
    of_folds = Split(by="column", column="fold", train=(1, 2), validation=(3,), test=(4,))
    for values in ([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"], [1.0, 2.0, 3.0, 4.0, 5.0]):
        assert split.by_column(pl.Series(values), of_folds).tolist() == [0, 0, 1, 2, -1]
    of_flags = Split(by="column", column="held_out", train=(False,), validation=("x",), test=(True,))
    assert split.by_column(pl.Series([True, False, None]), of_flags).tolist() == [2, 0, -1]


def test_empty_training_part_is_an_error():
    with pytest.raises(DataError, match=r"training part no row.*Received: train 0, validation 1, test 2 rows"):
        split.check_parts([0, 1, 2])
    split.check_parts([2, 0, 0])


@pytest.mark.parametrize("values", [[["a"], ["b"]], [{"a": 1}, {"a": 2}]])
def test_a_column_of_lists_makes_no_split(values):
    declared = Split(by="column", column="p", train=("a",), validation=("b",), test=("c",))
    with pytest.raises(DataError, match=r"\[split\] column: expected a column of single values.*of type (List|Struct)"):
        split.by_column(pl.Series(values), declared)
