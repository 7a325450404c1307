"""Named protocols: which pairs are labelled with what, and which part of the log each pair belongs to."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mvke_tf.config import DataConfig

PARTS = ("train", "validation", "test")
# Shares of the log, by time or by chance, that end the training and the validation part.
TRAIN_END, VALIDATION_END = 0.7, 0.8


def labelled_pairs(ratings: pd.DataFrame, items: pd.DataFrame, config: DataConfig) -> pd.DataFrame:
    """Labels, negatives and split of an interaction log.

    `impressions`: every rating is an impression that was clicked (`ctr = 1`, `cvr = rating >= 4`); for each,
    `neg_ratio` items that this user never rated, drawn uniformly, with the same timestamp (`ctr = cvr = 0`).
    `ratings`: rated pairs only, `ctr = rating >= 4`, `cvr = rating == 5`.

    Args:
        ratings: Columns `user_id`, `item_id`, `rating` (1 to 5), `timestamp` (Unix seconds).
        items: Column `item_id`: the catalogue that negatives are drawn from.
        config: Protocol, split, negatives per impression and seed.

    Returns:
        One row per pair, ordered by time: `user_id`, `item_id`, `timestamp`, `rating` (0 for a negative),
        `ctr`, `cvr` (0 or 1) and `part` (0 training, 1 validation, 2 test).
    """
    # Two generators, so that the split does not change with the number of negatives.
    split_random, negative_random = (np.random.default_rng([config.seed, stream]) for stream in range(2))
    pairs = ratings[["user_id", "item_id", "timestamp", "rating"]].sort_values(
        ["timestamp", "user_id", "item_id"], kind="stable", ignore_index=True
    )
    pairs["part"] = split_parts(pairs, config.split, split_random)
    if config.protocol == "ratings":
        pairs["ctr"] = (pairs["rating"] >= 4).astype("int8")
        pairs["cvr"] = (pairs["rating"] == 5).astype("int8")
        return pairs
    pairs["ctr"] = np.int8(1)
    pairs["cvr"] = (pairs["rating"] >= 4).astype("int8")
    negatives = pairs.loc[pairs.index.repeat(config.neg_ratio)].copy()
    negatives["item_id"] = sample_unrated(
        negatives["user_id"].to_numpy(), ratings, items["item_id"].to_numpy(), negative_random
    )
    negatives[["rating", "ctr", "cvr"]] = np.int8(0)
    return pd.concat([pairs, negatives]).sort_index(kind="stable", ignore_index=True).astype(pairs.dtypes)


def sample_unrated(
    user_ids: np.ndarray, ratings: pd.DataFrame, item_ids: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """For each entry of `user_ids`, one item that this user never rated, drawn uniformly.

    Exact, without rejection: the catalogue is ordered per user with the unrated items first.

    Args:
        user_ids: `(n,)`, users that occur in `ratings`.
        ratings: Columns `user_id` and `item_id`.
        item_ids: The catalogue.
        random: Source of chance.

    Returns:
        Item ids `(n,)`.

    Raises:
        ValueError: If one of these users has rated the whole catalogue.
    """
    users, rows = np.unique(ratings["user_id"].to_numpy(), return_inverse=True)
    items, columns = np.unique(np.concatenate([item_ids, ratings["item_id"].to_numpy()]), return_inverse=True)
    rated = np.zeros((len(users), len(items)), dtype=bool)
    rated[rows, columns[len(item_ids) :]] = True
    row = np.searchsorted(users, user_ids)
    choices = (len(items) - rated.sum(axis=1))[row]
    if not choices.all():
        raise ValueError(
            f"A negative is an item that the user never rated, but user {user_ids[choices.argmin()]} has rated all "
            f"{len(items)} items. Use the protocol 'ratings', or neg_ratio=0, or remove the user."
        )
    unrated_first = np.argsort(rated, axis=1, kind="stable")
    return items[unrated_first[row, (random.random(len(row)) * choices).astype(np.int64)]]


def split_parts(pairs: pd.DataFrame, split: str, random: np.random.Generator) -> np.ndarray:
    """The part of each pair: 70 % training, 10 % validation, 20 % test.

    `temporal`: by time, all pairs of one timestamp on one side. `per_user`: the same within each user, whose last
    pairs are the test part. `random`: by chance.

    Args:
        pairs: Columns `user_id` and `timestamp`.
        split: `"temporal"`, `"per_user"` or `"random"`.
        random: Source of chance of the random split.

    Returns:
        int8 `(n,)`: 0 training, 1 validation, 2 test.
    """
    if split == "random":
        share = (1 + random.permutation(len(pairs))) / len(pairs)
    else:
        times = pairs["timestamp"] if split == "temporal" else pairs.groupby("user_id")["timestamp"]
        # The share of pairs that are not later: equal for all pairs of one timestamp.
        share = times.rank(method="max", pct=True).to_numpy()
    return np.searchsorted([TRAIN_END, VALIDATION_END], share, side="left").astype(np.int8)


def describe(pairs: pd.DataFrame) -> pd.DataFrame:
    """What a preparation made, one row per part.

    Returns:
        Per part: `rows`, `positives_ctr`, `positives_cvr`, and the share of rows whose user or item never occurs in
        a training impression (`new_users`, `new_items`).
    """
    known = pairs[(pairs["part"] == 0) & (pairs["rating"] > 0)]
    new = pairs.assign(
        new_users=~pairs["user_id"].isin(known["user_id"]), new_items=~pairs["item_id"].isin(known["item_id"])
    )
    table = new.groupby("part").agg(
        rows=("ctr", "size"),
        positives_ctr=("ctr", "sum"),
        positives_cvr=("cvr", "sum"),
        new_users=("new_users", "mean"),
        new_items=("new_items", "mean"),
    )
    table.index = pd.Index([PARTS[part] for part in table.index], name="part")
    return table
