# SPDX-License-Identifier: Apache-2.0
import pandas as pd
import pytest

from mvke_tf.data.values import frame
from mvke_tf.errors import DataError


def test_a_table_of_values_that_no_file_can_hold():
    with pytest.raises(DataError, match=r"^The log table cannot be read: Unsupported numpy type"):
        frame(pd.DataFrame({"x": [1j, 2j]}), "log")
