# SPDX-License-Identifier: Apache-2.0
"""A sample of the attacks of `make chaos`, the same each time."""

import random

import pytest

from tests.chaos.attacks import ATTACKS
from tests.chaos.nursery import Nursery
from tests.chaos.stages import Workshop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    nursery = Nursery()
    yield Workshop(nursery, tmp_path_factory.mktemp("chaos"))
    nursery.close()


# How often what is done to which command.
SAMPLE = {
    "kill": {"prepare": 8, "prepare in buckets": 8, "train": 1, "export": 1, "profile": 4},
    "full_disk": {"prepare": 2, "prepare in buckets": 2, "profile": 1},
    "read_only": {"prepare": 1, "profile": 1},
    "two_writers": {"prepare": 2, "prepare in buckets": 2, "profile": 1},
    "damage": {"": 8},
}


@pytest.mark.parametrize(
    ("attack", "stage", "seed"),
    [
        (attack, stage, seed)
        for attack, stages in SAMPLE.items()
        for stage, times in stages.items()
        for seed in range(times)
    ],
)
def test_nothing_is_lost(workshop, attack, stage, seed):
    ATTACKS[attack](workshop, stage, random.Random(seed))
