# SPDX-License-Identifier: Apache-2.0
"""Small MovieLens folders in both layouts of 100K, and the real one."""

from pathlib import Path

import pytest

from mvke_tf.datasets.movielens.obtain import obtain_movielens
from tests.datasets.layouts import small_movielens, write_original, write_recbole

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture
def original_folder(tmp_path: Path) -> Path:
    return write_original(tmp_path / "original", small_movielens())


@pytest.fixture
def recbole_folder(tmp_path: Path) -> Path:
    return write_recbole(tmp_path / "recbole", small_movielens())


@pytest.fixture(scope="session")
def movielens_folder() -> Path:
    """The real ML-100K in the repository's `data/`; the first run downloads it."""
    return obtain_movielens(DATA)[0]
