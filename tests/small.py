# SPDX-License-Identifier: Apache-2.0
"""A small declared dataset for everybody's tests: an ad-like log of 240 impressions, 12 users and 30 items."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mvke_tf.data.declaration import Dataset
from mvke_tf.data.encoder import EncodedFeature, Encoder
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import EntityTable, PreparedDataset
from mvke_tf.schema import Schema

USERS, ITEMS, IMPRESSIONS = 12, 30, 240
COUNTRIES = ("de", "fr", "us")
TAGS = ("news", "sport", "music", "film", "travel")

SMALL: dict[str, Any] = {
    "format": 1,
    "name": "small",
    "source": {"time": "time", "time_unit": "s"},
    "keys": {"user": "user", "item": "item", "item_name": "title"},
    "tables": {"items": {"on": "item"}},
    "split": {"by": "share_of_time"},
    "negatives": {"kind": "uniform", "per_positive": 1, "future": True},
    "features": {
        "user": {"tower": "user", "encode": "vocabulary", "unknown_rate": 0.5},
        "age": {"tower": "user", "encode": "buckets", "bins": 4, "unknown_rate": 0.05},
        "country": {"tower": "user", "encode": "vocabulary", "unknown_rate": 0.05},
        "clicks": {"tower": "user", "encode": "buckets", "bins": 5, "history": {"count": True, "where": "clicked"}},
        "mean_stars": {"tower": "user", "encode": "number", "history": {"mean": "stars"}},
        "recent_items": {"tower": "user", "embedding": "item", "length": 5, "history": {"last": "item"}},
        "liked_tags": {
            "tower": "user",
            "embedding": "tags",
            "length": 4,
            "history": {"counts": "tags", "where": "stars >= 4"},
        },
        "item": {"tower": "item", "encode": "vocabulary", "unknown_rate": 0.05, "unknown_group": "item"},
        "tags": {"tower": "item", "encode": "vocabulary", "length": 3},
        "price": {"tower": "item", "encode": "number", "scaling": "piecewise", "bins": 4, "unknown_rate": 0.05},
        "year": {"tower": "item", "encode": "buckets", "bins": 4, "unknown_rate": 0.05},
        "popularity": {
            "tower": "item",
            "encode": "buckets",
            "bins": 4,
            "unknown_rate": 0.05,
            "unknown_group": "item",
            "statistic": {"count": True},
        },
        "item_stars": {
            "tower": "item",
            "encode": "number",
            "unknown_rate": 0.05,
            "unknown_group": "item",
            "statistic": {"mean": "stars"},
        },
    },
    "tasks": {
        "click": {"label": "clicked"},
        "buy": {"label": "bought", "given": "click", "objective": "marginal"},
        "stars": {"kind": "regression", "label": "stars", "domain": [1.0, 5.0], "default": False},
    },
    "groups": {
        "tags": {"feature": "tags", "title": "tag of the item"},
        "age": {"feature": "age", "bounds": [25, 35, 45], "title": "age of the user (years)"},
        "country": {"feature": "country"},
    },
}


def small_log() -> tuple[pl.DataFrame, pl.DataFrame]:
    """The log and the table of items.

    Users come in turn, each overlapping the next, so that the test part has known and new users. The age of user 3, the
    country of user 4, the price of item i05, the year of i06 and the tags of i07 are unknown. Who is younger clicks
    more.
    """
    random = np.random.default_rng(0)
    rows = []
    for user in range(1, USERS + 1):
        for item in random.choice(np.arange(1, ITEMS + 1), IMPRESSIONS // USERS, replace=False).tolist():
            clicked = int(random.random() < (0.7 if user <= 6 else 0.3))
            rows.append(
                {
                    "user": user,
                    "item": f"i{item:02d}",
                    "time": 1_700_000_000 + 2_000 * user + int(random.integers(6_000)),
                    "age": None if user == 3 else 18 + 3 * user,
                    "country": None if user == 4 else COUNTRIES[user % 3],
                    "clicked": clicked,
                    "bought": int(clicked and random.random() < 0.4),
                    "stars": int(random.integers(1, 6)) if random.random() < 0.6 else None,
                }
            )
    items = [
        {
            "item": f"i{item:02d}",
            "title": f"Item {item}",
            "tags": [] if item == 7 else [TAGS[item % 5]] if item % 3 else [TAGS[item % 5], TAGS[(item + 2) % 5]],
            "price": None if item == 5 else 0.5 * item + 1,
            "year": None if item == 6 else 1990 + item,
        }
        for item in range(1, ITEMS + 1)
    ]
    return pl.DataFrame(rows), pl.DataFrame(items)


def small_dataset(**overrides: Any) -> Dataset:
    """The declared dataset, with other values by dotted key: `small_dataset(**{"features.age.bins": 2})`."""
    log, items = small_log()
    dataset = Dataset.from_frame(log, SMALL, items=items)
    return dataset.replace(overrides) if overrides else dataset


@functools.cache
def _prepared() -> PreparedDataset:
    return prepare(small_dataset())


def small_prepared(**overrides: Any) -> PreparedDataset:
    """The prepared dataset, see `small_dataset`; without overrides one for all tests: do not change it."""
    return prepare(small_dataset(**overrides)) if overrides else _prepared()


def small_schema(tasks: tuple[str, ...] = (), objective: str = "") -> Schema:
    """The schema of `small_prepared`."""
    return small_prepared().schema(tasks, objective)


def handmade_prepared() -> PreparedDataset:
    """Random raw values, encoded, of the declaration `SMALL`, without any preparation: only the forms are right."""
    random = np.random.default_rng(1)
    dataset = small_dataset()
    kinds = {"user": "integer", "country": "string", "item": "string", "tags": "string"}
    kinds |= {"recent_items": "string", "liked_tags": "string"}
    features = [
        EncodedFeature.from_declaration(feature, dataset, kinds.get(feature.name, "number"))
        for feature in dataset.features
    ]
    numbers = range(1, ITEMS + 1)
    keys = {"user": np.repeat(np.arange(1, USERS + 1), 5), "item": np.array([f"i{n:02d}" for n in numbers], object)}
    names = np.array([f"Item {n}" for n in numbers], object)
    words = {"country": [*COUNTRIES, ""], "tags": [*TAGS, ""], "liked_tags": [*TAGS, ""], "recent_items": keys["item"]}
    raw: dict[str, dict[str, np.ndarray]] = {"user": {}, "item": {}}
    for feature in features:
        rows = len(keys[feature.tower])
        shape = (rows, feature.length) if feature.is_list else (rows,)
        if feature.name in keys:
            values = keys[feature.name]
        elif feature.raw == "string":
            values = np.array(words[feature.name], object)[random.integers(0, len(words[feature.name]), shape)]
        else:
            values = random.normal(30, 9, shape).round(1).astype(np.float32)
            values[::7] = np.nan
        raw[feature.tower][feature.name] = values
        if feature.is_list:
            weights = np.arange(feature.length) < random.integers(0, feature.length + 1, (rows, 1))
            raw[feature.tower][feature.name + "_weights"] = weights.astype(np.float32)
            values[~weights] = ""
    encoder = Encoder.fit(features, raw, {side: np.arange(len(keys[side])) for side in keys})
    encoded = {side: encoder.encode_numpy(raw[side], side) for side in keys}
    last = np.arange(4, 5 * USERS, 5)
    pairs = 400
    user_row = np.sort(random.integers(0, 60, pairs))
    sampled = random.random(pairs) < 0.5
    click = (random.random(pairs) < 0.5) & ~sampled
    labels = {"click": click, "buy": click & (random.random(pairs) < 0.4), "stars": random.integers(1, 6, pairs)}
    counts = ~sampled & (random.random(pairs) < 0.6)
    return PreparedDataset(
        dataset=dataset,
        encoder=encoder,
        fingerprint="handmade",
        users=EntityTable("user", keys["user"], encoded["user"], raw["user"], time=np.tile(np.arange(5) * 1000, USERS)),
        items=EntityTable("item", keys["item"], encoded["item"], raw["item"], names),
        latest_users=EntityTable(
            "user",
            keys["user"][last],
            {name: column[last] for name, column in encoded["user"].items()},
            {name: column[last] for name, column in raw["user"].items()},
            time=np.full(USERS, 9_000),
        ),
        catalogue=np.arange(ITEMS),
        user_row=user_row,
        item_row=random.integers(0, ITEMS, pairs),
        split=np.sort(random.integers(0, 3, pairs)),
        time=np.arange(pairs) * 10,
        sampled=sampled,
        labels={**labels, "stars": np.where(counts, labels["stars"], 0)},
        weights={"click": np.ones(pairs), "buy": np.ones(pairs), "stars": counts},
        offsets={"stars": 3.0},
    )


def small_toml(folder: Path) -> Path:
    """The same dataset as files: two tables and a declaration, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    log, items = small_log()
    log.write_parquet(folder / "log.parquet")
    items.write_parquet(folder / "items.parquet")
    declared = {**SMALL, "source": {"path": "log.parquet", **SMALL["source"]}}
    declared["tables"] = {"items": {"path": "items.parquet", **SMALL["tables"]["items"]}}
    lines = [f"{key} = {_toml(value)}" for key, value in declared.items()]
    path = folder / "small.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + " }"
    return json.dumps(value)
