# SPDX-License-Identifier: Apache-2.0
"""Attacks on files at random until the time is over: `make chaos`, or `python -m tests.chaos.campaign --help`.

Prints its seed first, which repeats it, and a line per failure; ends with status 1 if there was any.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.attacks import ATTACKS
from tests.chaos.nursery import Nursery
from tests.chaos.stages import STAGES, Workshop


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="each as often as it is named"
    )
    parser.add_argument("--most", type=int, default=sys.maxsize, help="attacks at most")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    chance = random.Random(args.seed)
    done: collections.Counter[str] = collections.Counter()
    failures = 0
    nursery = Nursery()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(nursery, Path(folder))
        print(f"operations: {workshop.operations}", flush=True)
        until = time.monotonic() + 60 * args.minutes
        while time.monotonic() < until and done.total() < args.most:
            attack, stage = chance.choice(args.attacks), chance.choice(args.stages)
            seed = chance.randrange(2**32)
            try:
                what = ATTACKS[attack](workshop, stage, random.Random(seed))
            except AssertionError as failure:
                failures += 1
                print(f"FAILED {attack} of {stage}, seed {seed}: {failure}", flush=True)
            else:
                done[f"{attack} of {stage}: {what}"] += 1
            if (done.total() + failures) % 50 == 0:
                print(f"{done.total() + failures} attacks, {failures} failures", flush=True)
    nursery.close()
    for what, times in sorted(done.items()):
        print(f"{times:6} {what}")
    print(f"{done.total() + failures} attacks, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
