# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from mvke_tf.experiments.significance import holm, mean_interval, paired_p_value


def test_interval_by_hand():
    # Mean 3, standard deviation sqrt(2.5); the 97.5 % point of t with 4 degrees of freedom is 2.776445.
    mean, half = mean_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), abs=1e-6)
    # With 1 degree of freedom t is Cauchy: its 95 % point is tan(0.45 pi).
    assert mean_interval([0, 2], confidence=0.9) == (1, pytest.approx(math.tan(0.45 * math.pi)))


def test_interval_of_too_few_values():
    assert mean_interval([0.7]) == (0.7, pytest.approx(math.nan, nan_ok=True))
    assert np.isnan(mean_interval([])).all()


def test_paired_test_by_hand():
    # Differences 1 and 3: mean 2, standard error 1, so t = 2 with 1 degree of freedom: p = 1 - 2 atan(2) / pi.
    assert paired_p_value([2, 5], [1, 2]) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert paired_p_value([1, 2], [2, 5]) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert paired_p_value([0.1, 0.2], [0.1, 0.2]) == 1
    assert math.isnan(paired_p_value([1], [2]))
    with pytest.raises(ValueError, match="Received: 2 and 3 values"):
        paired_p_value([1, 2], [1, 2, 3])


def test_holm_by_hand():
    # Ordered 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, and 0.04 raised to the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, math.nan, 0.03]) == pytest.approx([0.04, math.nan, 0.04], nan_ok=True)
    assert len(holm([])) == 0
