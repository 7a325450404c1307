"""Small MovieLens folders in both layouts."""

from pathlib import Path

import pytest

from tests.data_tests.layouts import small_movielens, write_original, write_recbole


@pytest.fixture
def original_folder(tmp_path: Path) -> Path:
    return write_original(tmp_path / "original", small_movielens())


@pytest.fixture
def recbole_folder(tmp_path: Path) -> Path:
    return write_recbole(tmp_path / "recbole", small_movielens())
