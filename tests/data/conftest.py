# SPDX-License-Identifier: Apache-2.0
"""Prepared datasets that several tests read; none may change them."""

import pytest

from mvke_tf.data.store import PreparedDataset
from tests.small import handmade_prepared, small_prepared


@pytest.fixture(scope="session")
def prepared() -> PreparedDataset:
    """The small declared dataset, prepared."""
    return small_prepared()


@pytest.fixture(scope="session")
def handmade() -> PreparedDataset:
    """Random tables of the small declaration, of the right form."""
    return handmade_prepared()
