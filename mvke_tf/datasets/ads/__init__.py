# SPDX-License-Identifier: Apache-2.0
"""An ad log that a program makes: of any size, with known true probabilities, and three tasks."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvke_tf.datasets.options import Option

if TYPE_CHECKING:
    from mvke_tf.data.declaration import Dataset

logger = logging.getLogger(__name__)

_OPTIONS = (
    Option("rows", "number of impressions", 200_000, int),
    Option("users", "number of users", "one per 40 rows, at most two million", int),
    Option("ads", "number of ads", "one per 1000 rows, 50 to 20000", int),
    Option("days", "number of days", 14, int),
    Option("interests", "interests of each user, 1 to 8", 3, int),
    Option("agreement", "correlation of what makes users click with what makes them install, -1 to 1", 0.5, float),
    Option("drift", "how far the appeal of a category moves over the days, in log-odds of a click", 0.5, float),
    Option("cold", "share of users and ads that turn up after the first day", 0.3, float),
    Option("data_seed", "seed of the log", 0, int),
)


def options(name: str) -> tuple[Option, ...]:
    """What can be chosen."""
    return _OPTIONS


def load(name: str, dataset: Dataset, data_dir: Path, given: dict[str, Any]) -> Dataset:
    """Makes the log and returns the declaration that reads it.

    The folder of the log also has the truth, see `mvke_tf.datasets.ads.generator.read_truth`.

    Raises:
        DeclarationError: If an option has no legal value.
    """
    import dataclasses

    from mvke_tf.datasets.ads.generator import FORMAT, AdLog, write_tables

    settings = AdLog(**{{"data_seed": "seed"}.get(name, name): value for name, value in given.items()})
    values = json.dumps([FORMAT, dataclasses.asdict(settings)])
    digest = hashlib.sha256(values.encode()).hexdigest()[:12]
    folder = data_dir / "tables" / "ads" / f"{settings.rows}-{digest}"
    if not (folder / "settings.json").is_file():
        write_tables(settings, folder)
        logger.info("Ad log of %s rows, %s users and %s ads: %s", *_shown(settings), folder)
    # Few users share an index of the hash, however many there are.
    bins = min(max(2 ** (4 * settings.users - 1).bit_length(), 1_024), 2**22)
    return dataclasses.replace(dataset.replace({"features.user_id.bins": bins}), folder=folder)


def _shown(settings: Any) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in (settings.rows, settings.users, settings.ads))
