# SPDX-License-Identifier: Apache-2.0
import pytest

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepared_dataset
from tests.small import small_toml


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The small dataset as `mvke tune --data` prepares it: the declaration, and the prepared data."""
    folder = tmp_path_factory.mktemp("data")
    path = small_toml(folder)
    return path, prepared_dataset(Dataset.from_toml(path), folder / "data")
