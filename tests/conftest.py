"""Fixtures that several test folders share."""

from pathlib import Path

import pytest

from mvke_tf.data.sources import obtain_movielens

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def movielens_folder() -> Path:
    """The real ML-100K in the repository's `data/`; the first run downloads it."""
    return obtain_movielens(REPOSITORY / "data")
