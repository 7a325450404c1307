"""Preparation from frames to encoded tables, and the one file that holds its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mvke_tf.config import DataConfig, ModelConfig, from_dict
from mvke_tf.data.dataset import PairData
from mvke_tf.data.features import Encoder, Table, item_table, movielens_features, user_states
from mvke_tf.data.movielens import DataError, MovieLens, read_movielens
from mvke_tf.data.protocols import PARTS, describe, labelled_pairs
from mvke_tf.data.sources import obtain_movielens
from mvke_tf.files import DAMAGED, read_arrays, written_whole
from mvke_tf.schema import Schema, Task

FORMAT = 2
# The lowest and the highest rating of MovieLens, in stars.
RATINGS = (1, 5)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that training, evaluation and export need of the data.

    Args:
        config: How it was made.
        encoder: From raw to encoded tables.
        raw: Raw tables, `{"user": ..., "item": ...}`.
        encoded: The same rows, encoded.
        pairs: One row per pair: `user_row`, `item_row`, `timestamp`, `rating`, `ctr`, `cvr`, `part`.
        titles: Title of each item.
    """

    config: DataConfig
    encoder: Encoder
    raw: dict[str, Table]
    encoded: dict[str, Table]
    pairs: pd.DataFrame
    titles: np.ndarray

    @property
    def schema(self) -> Schema:
        """The schema of this data, for the tasks CTR and CVR."""
        return self.encoder.schema()

    def schema_for(self, config: ModelConfig) -> Schema:
        """The schema of this data for the tasks of a model; ratings start from the mean of the training part."""
        tasks = {"ctr": Task("ctr"), "cvr": Task("cvr")}
        if config.conversion != "impressions" and "ctr" in config.tasks:
            tasks["cvr"] = Task("cvr", given="ctr")
        if "rating" in config.tasks:
            known = self.pairs["rating"][(self.pairs["part"] == 0) & (self.pairs["rating"] > 0)]
            tasks["rating"] = Task("rating", "regression", offset=round(float(known.mean()), 4), domain=RATINGS)
        return self.schema.with_tasks(tasks[name] for name in config.tasks)

    def part_rows(self, part: str) -> np.ndarray:
        """Positions in `pairs` of the pairs of one part.

        Raises:
            ValueError: If there is no such part.
        """
        if part not in PARTS:
            raise ValueError(f"Unknown part of the data. Expected one of {PARTS}. Received: {part!r}")
        return np.flatnonzero(self.pairs["part"].to_numpy() == PARTS.index(part))

    def part(self, part: str, tasks: Sequence[str] = ("ctr", "cvr"), clicked: bool = False) -> PairData:
        """The pairs of one part, ready for `mvke_tf.data.dataset.Batches`.

        Ratings of pairs that were never rated (sampled negatives) get weight 0.

        Args:
            part: `"train"`, `"validation"` or `"test"`.
            tasks: Names of the tasks whose labels are wanted: `"ctr"`, `"cvr"`, `"rating"`.
            clicked: Whether only clicked pairs have a weight in the task CVR.

        Raises:
            ValueError: If there is no such part or task.
        """
        unknown = sorted(set(tasks) - {"ctr", "cvr", "rating"})
        if unknown:
            raise ValueError(f"Unknown tasks. Expected some of ctr, cvr, rating. Received: {unknown}")
        pairs = self.pairs.iloc[self.part_rows(part)]
        weights = {}
        if "rating" in tasks and not pairs["rating"].all():
            weights["rating"] = (pairs["rating"] > 0).to_numpy(np.float32)
        if "cvr" in tasks and clicked:
            weights["cvr"] = pairs["ctr"].to_numpy(np.float32)
        return PairData(
            self.encoded["user"],
            self.encoded["item"],
            pairs["user_row"].to_numpy(np.int32),
            pairs["item_row"].to_numpy(np.int32),
            {task: pairs[task].to_numpy(np.float32) for task in tasks},
            weights,
        )

    def known(self, entity: str) -> np.ndarray:
        """Per row of an entity table, whether its id occurs in a training impression: `(n,)` bool."""
        pairs = self.pairs[(self.pairs["part"] == 0) & (self.pairs["rating"] > 0)]
        ids = self.raw[entity][f"{entity}_id"]
        return np.isin(ids, ids[pairs[f"{entity}_row"].unique()])

    def save(self, path: Path) -> None:
        """Writes one `.npz`, whole or not at all."""
        arrays: dict[str, Any] = {
            "meta": json.dumps(
                {"format": FORMAT, "config": dataclasses.asdict(self.config), "encoder": self.encoder.to_dict()}
            ),
            "titles": self.titles.astype(str),
        }
        for kind, tables in (("raw", self.raw), ("encoded", self.encoded)):
            for tower, table in tables.items():
                for name, column in table.items():
                    column = np.asarray(column)
                    arrays[f"{kind}/{tower}/{name}"] = column.astype(str) if column.dtype == object else column
        for name in self.pairs:
            arrays[f"pairs/{name}"] = self.pairs[name].to_numpy()
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Reads what `save` wrote.

        Raises:
            DataError: If the file is missing, damaged or of another version.
        """
        remedy = "Run scripts/preprocess_data.py again."
        try:
            arrays = read_arrays(path)
            meta = json.loads(str(arrays["meta"]))
        except FileNotFoundError:
            raise DataError(f"There is no prepared data at {path}. {remedy}") from None
        except (*DAMAGED, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}). Delete it. {remedy}") from error
        if meta.get("format") != FORMAT:
            raise DataError(f"{path} has format {meta.get('format')}, expected {FORMAT}. Delete it. {remedy}")
        tables: dict[str, dict[str, Table]] = {kind: {"user": {}, "item": {}} for kind in ("raw", "encoded")}
        pairs = {}
        for key, array in arrays.items():
            kind, *rest = key.split("/")
            if kind in tables:
                tables[kind][rest[0]][rest[1]] = array
            elif kind == "pairs":
                pairs[rest[0]] = array
        return cls(
            from_dict(DataConfig, meta["config"]),
            Encoder.from_dict(meta["encoder"]),
            tables["raw"],
            tables["encoded"],
            pd.DataFrame(pairs),
            arrays["titles"],
        )


def prepare(frames: MovieLens, config: DataConfig) -> Prepared:
    """Labels, splits and encodes an interaction log; encoders learn from training impressions only."""
    pairs = labelled_pairs(frames.ratings, frames.items, config)
    states, keys = user_states(frames, config.history_length)
    training = pairs[(pairs["part"] == 0) & (pairs["rating"] > 0)]
    raw = {"user": states, "item": item_table(frames, training)}
    keys["user_row"] = np.arange(len(keys), dtype=np.int32)
    pairs = pairs.merge(keys, on=["user_id", "timestamp"], how="left", validate="many_to_one")
    pairs["item_row"] = pd.Index(raw["item"]["item_id"]).get_indexer(pairs["item_id"]).astype(np.int32)
    training = pairs[(pairs["part"] == 0) & (pairs["rating"] > 0)]
    encoder = Encoder.fit(
        movielens_features(config), raw, {tower: training[f"{tower}_row"].unique() for tower in ("user", "item")}
    )
    encoded = {
        tower: {name: column.numpy() for name, column in encoder.encode(table, tower).items()}
        for tower, table in raw.items()
    }
    columns = ["user_row", "item_row", "timestamp", "rating", "ctr", "cvr", "part"]
    return Prepared(config, encoder, raw, encoded, pairs[columns], frames.items["title"].to_numpy(object))


def prepared_path(data_dir: Path, config: DataConfig) -> Path:
    """Where the preparation of these settings is kept."""
    # Other settings, other features or another format are another file: nothing stale is ever read.
    made_of = [FORMAT, dataclasses.asdict(config), [dataclasses.asdict(f) for f in movielens_features(config)]]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    return Path(data_dir) / "prepared" / f"{config.protocol}-{config.split}-{digest}.npz"


def prepare_movielens(
    data_dir: Path,
    config: DataConfig,
    folder: Path | None = None,
    source: str = "auto",
    overwrite: bool = False,
    report: Callable[[str], object] = print,
) -> Path:
    """Obtains and prepares MovieLens-100K, unless that has been done, and reports what it made.

    Args:
        data_dir: Where raw and prepared data are kept.
        config: How to prepare.
        folder: Folder of the raw files, if the caller has them.
        source: See `mvke_tf.data.sources.obtain_movielens`.
        overwrite: Whether to prepare anew what is there.
        report: Called with lines of text.

    Returns:
        The file that `Prepared.load` reads.
    """
    path = prepared_path(data_dir, config)
    if path.is_file() and not overwrite and folder is None and source == "auto":
        report(f"{path} is prepared already.")
        return path
    raw = obtain_movielens(data_dir, folder, source, report=report)
    prepared = prepare(read_movielens(raw), config)
    prepared.save(path)
    pairs = prepared.pairs.assign(
        user_id=prepared.raw["user"]["user_id"][prepared.pairs["user_row"]],
        item_id=prepared.raw["item"]["item_id"][prepared.pairs["item_row"]],
    )
    report(f"Protocol {config.protocol!r}, split {config.split!r}:")
    report(
        describe(pairs).to_string(
            formatters={name: "{:,}".format for name in ("rows", "positives_ctr", "positives_cvr")}
            | {name: "{:.1%}".format for name in ("new_users", "new_items")}
        )
    )
    return path
