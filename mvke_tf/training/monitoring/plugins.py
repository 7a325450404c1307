# SPDX-License-Identifier: Apache-2.0
"""What a finished training ends with: hyperparameters with final metrics, and items for the Embedding Projector."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.projector import ProjectorConfig
from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME

from mvke_tf.config import RunConfig
from mvke_tf.data.groups import Grouping, groups
from mvke_tf.data.store import PreparedDataset
from mvke_tf.inference.vectors import vectors_of
from mvke_tf.io import atomic_write
from mvke_tf.models import TwoTowerModel
from mvke_tf.training.monitoring.events import EventFolder

# The projector draws in a browser.
MOST_ITEMS = 10_000
# Hyperparameters of every run.
ALWAYS = (("model", "name"), ("training", "learning_rate"), ("training", "batch_size"), ("training", "seed"))


def write_best(
    folder: Path,
    name: str,
    config: RunConfig,
    metrics: Mapping[str, float],
    epoch: int,
    model: TwoTowerModel,
    prepared: PreparedDataset,
) -> None:
    """Writes what the best model of a finished training is, for the tabs HParams and Projector of TensorBoard.

    Args:
        folder: Where to; what is there is replaced. The run's one session for HParams.
        name: Name of the run, its "Trial ID" there.
        config: The settings of the run, of which some are its hyperparameters.
        metrics: Of the best epoch, by name.
        epoch: The best epoch, from 0: the step of the metrics.
        model: The best model.
        prepared: The data, whose items the projector shows, at most `MOST_ITEMS`; nothing of data without items.
    """
    with atomic_write(folder) as temporary:
        events = EventFolder(temporary)
        events.add(hparams_pb(hyperparameters(config), trial_id=name), 0)
        events.scalars({f"result/{name}": value for name, value in metrics.items()}, epoch)
        events.add(_session_end(), 0)
        events.close()
        if prepared.has_items:
            _write_projector(temporary, model, prepared)


def _write_projector(folder: Path, model: TwoTowerModel, prepared: PreparedDataset) -> None:
    rows = shown_items(prepared)
    columns = item_columns(prepared.items.names[rows], groups(prepared, ("item",)), rows)
    vectors = vectors_of(model.item_tower, prepared.items.encoded, rows)
    projector = ProjectorConfig()
    for task, array in vectors.items():
        # As text: a binary file is told from text by what happens to be in it.
        np.savetxt(folder / f"items_{task}.tsv", array, fmt="%.8g", delimiter="\t")
        projector.embeddings.add(
            tensor_name=f"item_vector_{task}",
            tensor_shape=array.shape,
            tensor_path=f"items_{task}.tsv",
            metadata_path="items.tsv",
        )
    table = (columns, *zip(*columns.values(), strict=True))
    lines = ("\t".join(map(_cell, row)) + "\n" for row in table)
    (folder / "items.tsv").write_text("".join(lines), encoding="utf-8")
    (folder / PROJECTOR_FILENAME).write_text(text_format.MessageToString(projector), encoding="utf-8")


def shown_items(prepared: PreparedDataset) -> np.ndarray:
    """Rows of the items table of the items to show: all, or those with the most training rows, in order of the keys."""
    rows = np.asarray(prepared.catalogue)
    if len(rows) <= MOST_ITEMS:
        return rows
    _, item = np.unique(prepared.items.key, return_inverse=True)
    counts = np.zeros(len(rows), np.int64)
    for bucket in prepared.buckets():
        counts += np.bincount(item[bucket.item_row[bucket.part_rows("train")]], minlength=len(rows))
    most = np.argsort(-counts[item[rows]], kind="stable")[:MOST_ITEMS]
    return rows[np.sort(most)]


def item_columns(
    names: Sequence[str], groupings: Sequence[Grouping], rows: np.ndarray | None = None
) -> dict[str, list[str]]:
    """What the Embedding Projector shows of each item: its name, and its groups, of several also the first.

    Args:
        names: Name of each item.
        groupings: Groups of items; those of users are left out.
        rows: Rows of the groupings' members that the items are; all, in order, by default.
    """
    columns = {"name": [str(name) for name in names]}
    for grouping in groupings:
        if grouping.side == "item":
            members = grouping.members if rows is None else grouping.members[rows]
            inside = [[grouping.groups[index] for index in np.flatnonzero(row)] for row in members]
            title = grouping.variable if grouping.variable not in columns else f"{grouping.variable} (group)"
            columns[title] = [", ".join(some) for some in inside]
            if any(len(some) > 1 for some in inside):
                # The projector colours by columns of few values only.
                columns[f"first {title}"] = [some[0] if some else "" for some in inside]
    return columns


def _cell(text: str) -> str:
    return " ".join(text.split())


def hyperparameters(config: RunConfig) -> dict[str, bool | float | str]:
    """The settings to compare runs by, `{"section.setting": value}`; a tuple becomes a text.

    Those of `ALWAYS`, and those that differ from the defaults: where a run has no value, it has the default.
    """
    values = {name: getattr(getattr(config, section), name) for section, name in ALWAYS}
    shown = {f"{section}.{name}": values[name] for section, name in ALWAYS} | config.changed()
    return {
        name: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value for name, value in shown.items()
    }


def _session_end() -> Summary:
    """As TensorBoard's `session_end_pb`, whose module imports TensorFlow."""
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])
