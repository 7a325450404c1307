# SPDX-License-Identifier: Apache-2.0
"""The table of docs/scale.md is what its rates say."""

import re

from benchmarks.how_far import Rates, rows_of, shown, table
from tests.conftest import REPOSITORY


def test_sums_by_hand():
    rates = Rates(prepare=36e-6, alone=0.5, train=72e-6, read=1 / 7000, base=1e9, held=3.0, users=0.1, ids=2.0)
    lines = rows_of(rates, machines=2, cores=5)
    # 10 hours of a core: half of them alone, the other half by ten.
    assert lines["preparing, hours of a core"](1e9) == "10"
    assert lines["preparing, hours of 2 machines"](1e9) == "5.5"
    # Ten cores compute what takes one of them 20 hours; reading a tenth of a second per 700 training rows takes longer.
    assert lines["an epoch, hours of a core"](1e9) == "20"
    assert lines["an epoch, hours of 2 machines"](1e9) == lines["of which reading alone"](1e9) == shown(1e5 / 3600)
    assert lines["memory of the process that prepares, GB"](1e9) == "4"
    assert lines["the same with 64 numbers, GB"](1e6) == shown(2e6 * 64 * 12 / 1e9) == "1.5"
    assert lines["users"](1e6) == "100,000"


def test_the_page_shows_what_the_program_prints():
    page = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    shown_there = re.search(r"^\| impressions .*?(?=\n\n)", page, re.M | re.S)[0]
    assert shown_there == table(Rates())
