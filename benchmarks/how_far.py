# SPDX-License-Identifier: Apache-2.0
"""How far does it go: what 10^7, 10^9 and 10^11 impressions take, computed from rates that were measured.

Prints the table of docs/scale.md, "How far does it go?", which says where each rate is from.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main

GB, HOUR = 1e9, 3600


@dataclasses.dataclass(frozen=True)
class Rates:
    """Factors; seconds are those of a CPU core, and rows those of the log.

    Args:
        log: Bytes of the Parquet files, per row.
        prepared: Bytes of the prepared data, per row.
        prepare: Seconds of preparing, per row.
        alone: Share of them that one process does, whatever the number of workers.
        base: Bytes of the process that prepares, of a few rows, without pages of files.
        held: Bytes of it more per row.
        train: Seconds of an epoch of the small model, per row of all parts.
        read: Seconds of reading, per training row, in each process.
        profile: Seconds per user, for the best ads in one task.
        users: Users per row.
        ids: Indices of all embedding tables, per row.
    """

    log: float = 21
    prepared: float = 34
    prepare: float = 25e-6
    alone: float = 0.13
    base: float = 0.71e9
    held: float = 3.7
    train: float = 37e-6
    read: float = 1 / 840_000
    profile: float = 0.3e-3
    users: float = 1 / 40
    ids: float = 0.105


# 20 million are those that were measured.
SIZES = {"2 · 10⁷": 2e7, "10⁷": 1e7, "10⁹": 1e9, "10¹¹": 1e11}
TRAINING = 0.7
# Bytes per index and number of an embedding table: a weight and two moments of Adam.
PER_WEIGHT = 12


def rows_of(rates: Rates, machines: int, cores: int) -> dict[str, Callable[[float], str]]:
    """What each line of the table says of a number of rows."""
    all_cores = machines * cores

    def prepare(rows: float) -> float:
        return rows * rates.prepare * (rates.alone + (1 - rates.alone) / all_cores)

    def train(rows: float) -> float:
        return max(rows * rates.train / all_cores, rows * TRAINING * rates.read)

    return {
        "log, GB": lambda rows: shown(rows * rates.log / GB),
        "prepared data, GB": lambda rows: shown(rows * rates.prepared / GB),
        "users": lambda rows: f"{rows * rates.users:,.0f}",
        "indices of all tables": lambda rows: f"{rows * rates.ids:,.0f}",
        "their weights and moments, 16 numbers each, GB": lambda rows: shown(rows * rates.ids * 16 * PER_WEIGHT / GB),
        "the same with 64 numbers, GB": lambda rows: shown(rows * rates.ids * 64 * PER_WEIGHT / GB),
        "memory of the process that prepares, GB": lambda rows: shown((rates.base + rows * rates.held) / GB),
        "preparing, hours of a core": lambda rows: shown(rows * rates.prepare / HOUR),
        f"preparing, hours of {machines} machines": lambda rows: shown(prepare(rows) / HOUR),
        "an epoch, hours of a core": lambda rows: shown(rows * rates.train / HOUR),
        f"an epoch, hours of {machines} machines": lambda rows: shown(train(rows) / HOUR),
        "of which reading alone": lambda rows: shown(rows * TRAINING * rates.read / HOUR),
        "profiles of all users, hours of a core": lambda rows: shown(rows * rates.users * rates.profile / HOUR),
    }


def shown(number: float) -> str:
    """Two digits."""
    return f"{float(f'{number:.2g}'):,.10g}"


def table(rates: Rates, machines: int = 8, cores: int = 16) -> str:
    """The table in Markdown."""
    lines = [f"| impressions | {' | '.join(SIZES)} |", "|---|" + "---:|" * len(SIZES)]
    for name, of_rows in rows_of(rates, machines, cores).items():
        lines.append(f"| {name} | {' | '.join(of_rows(rows) for rows in SIZES.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=positive_int, default=8, help="default: 8")
    parser.add_argument("--cores", type=positive_int, default=16, help="of each machine (default: 16)")
    args = parser.parse_args()
    print(table(Rates(), args.machines, args.cores))


if __name__ == "__main__":
    run_main(main)
