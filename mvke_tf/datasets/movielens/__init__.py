# SPDX-License-Identifier: Apache-2.0
"""MovieLens: 100K, which is downloaded, or 1M, 10M, 20M or 25M from a folder that the user has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvke_tf.datasets.options import Option, changes
from mvke_tf.errors import DeclarationError

if TYPE_CHECKING:
    from mvke_tf.data.declaration import Dataset

logger = logging.getLogger(__name__)

_SPLITS = {"temporal": "share_of_time", "random": "random", "per_user": "per_user"}
_PROFILE = ("age", "gender", "occupation")
_MAY_BE_UNKNOWN = (
    *_PROFILE,
    *("rating_count", "mean_rating", "item_id", "release_year", "popularity", "item_mean_rating"),
)
_ITEM_GROUP = ("item_id", "popularity", "item_mean_rating")
_OPTIONS = (
    Option(
        "protocol",
        "what is a row: impressions (ratings, and items that the user never rated) or ratings alone",
        "impressions",
        choices=("impressions", "ratings"),
    ),
    Option(
        "split",
        "which rows are the test part: the last ones, of all users (temporal) or of each (per_user), or any",
        "temporal",
        choices=tuple(_SPLITS),
    ),
    Option("neg_ratio", "items drawn per impression, of those that the user never rated", 1, int),
    Option(
        "history_length",
        "slots of the lists of recent and of liked items",
        50,
        int,
        keys=("features.recent_items.length", "features.liked_items.length"),
    ),
    Option(
        "unknown_rate",
        "share of rows in which training takes a single-valued feature, other than the user's id, for unknown",
        0.05,
        float,
    ),
    Option("unknown_user_rate", "the same of the user's id", 0.9, float, keys=("features.user_id.unknown_rate",)),
    Option("data_seed", "seed of the drawn items and of the random split", 0, int),
    Option(
        "source",
        "where the raw files come from",
        "auto, the first that answers",
        choices=("auto", "folder", "grouplens", "recbole"),
    ),
    Option("folder", "a folder with the raw files of MovieLens 100K, 1M, 10M, 20M or 25M", "100K, downloaded", Path),
)

# What `Dataset.replace` changes for 10M and larger data sets.
_WITHOUT_USERS: dict[str, Any] = {
    "tables.users": None,
    "tasks.rating.domain": [0.5, 5],
    **{f"features.{feature}": None for feature in _PROFILE},
    **{f"groups.{feature}": None for feature in _PROFILE},
}


def options(name: str) -> tuple[Option, ...]:
    """What can be chosen."""
    return tuple(option for option in _OPTIONS if name == "movielens" or option.name not in ("protocol", "neg_ratio"))


def load(name: str, dataset: Dataset, data_dir: Path, given: dict[str, Any]) -> Dataset:
    """Makes the tables and returns the declaration that reads them.

    Raises:
        DataError: If the raw files cannot be had, or are damaged.
        DeclarationError: If an option has no legal value.
    """
    import dataclasses

    from mvke_tf import datasets
    from mvke_tf.datasets.movielens.read import WITH_USERS
    from mvke_tf.datasets.movielens.tables import make_tables

    if name == "movielens" and given.get("protocol") == "ratings":
        if "neg_ratio" in given:
            raise DeclarationError(
                "neg_ratio has no effect with protocol = ratings, which draws no items. Leave it out."
            )
        dataset = datasets.find("movielens/ratings")
    dataset = dataset.replace(_changes(dataset, given))
    tables, size = make_tables(data_dir, given.get("folder"), given.get("source", "auto"))
    if size not in WITH_USERS:
        logger.info(
            "MovieLens %s does not say who its users are: the features %s are left out. Its ratings have half stars.",
            size,
            ", ".join(_PROFILE),
        )
        dataset = dataset.replace(_WITHOUT_USERS)
    return dataclasses.replace(dataset, folder=tables)


def _changes(dataset: Dataset, given: dict[str, Any]) -> dict[str, Any]:
    changed = changes(_OPTIONS, given)
    split = given.get("split", "temporal")
    if split != "temporal":
        changed["split.by"] = _SPLITS[split]
    if "data_seed" in given:
        if split == "random":
            changed["split.seed"] = given["data_seed"]
        if dataset.negatives.kind != "none":
            changed["negatives.seed"] = given["data_seed"]
    if given.get("neg_ratio") == 0:
        changed["negatives"] = None
    elif "neg_ratio" in given:
        changed["negatives.per_positive"] = given["neg_ratio"]
    if "unknown_rate" in given:
        changed |= {f"features.{feature}.unknown_rate": given["unknown_rate"] for feature in _MAY_BE_UNKNOWN}
        if not given["unknown_rate"]:
            changed |= {f"features.{feature}.unknown_group": None for feature in _ITEM_GROUP}
    return changed
