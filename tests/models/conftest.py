# SPDX-License-Identifier: Apache-2.0
import keras
import pytest

from mvke_tf.models.mvke import build_mvke
from tests.models.problems import CONFIG, SCHEMA, randomize


@pytest.fixture(scope="package")
def built() -> keras.Model:
    """An MVKE with random weights; tests leave it as it is."""
    return randomize(build_mvke(SCHEMA, CONFIG))


@pytest.fixture(scope="package")
def loaded(built, tmp_path_factory) -> keras.Model:
    """The same after a round trip through a `.keras` file."""
    path = tmp_path_factory.mktemp("model") / "model.keras"
    built.save(path)
    return keras.saving.load_model(path)


@pytest.fixture(params=["built", "loaded"])
def model(request) -> keras.Model:
    return request.getfixturevalue(request.param)
