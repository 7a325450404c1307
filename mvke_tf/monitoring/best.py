"""What a finished training ends with: hyperparameters with final metrics, and items for the Embedding Projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
from google.protobuf import text_format
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.api import hparams_pb
from tensorboard.plugins.hparams.summary import session_end_pb
from tensorboard.plugins.projector import ProjectorConfig
from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME

from mvke_tf.config import RunConfig
from mvke_tf.data.dataset import Table
from mvke_tf.data.groups import Grouping
from mvke_tf.files import written_whole
from mvke_tf.models.two_tower import tower
from mvke_tf.monitoring.events import EventFolder

BATCH_SIZE = 4096


def item_columns(titles: Sequence[str], groups: Sequence[Grouping]) -> dict[str, list[str]]:
    """What the Embedding Projector shows of each item: title, and groups, of several also the first.

    Args:
        titles: Title of each item.
        groups: Groups of items; those of users are left out.
    """
    columns = {"title": [str(title) for title in titles]}
    for group in groups:
        if group.side == "item":
            names = [[group.groups[index] for index in np.flatnonzero(row)] for row in group.members]
            columns[group.variable] = [", ".join(some) for some in names]
            if any(len(some) > 1 for some in names):
                # The projector colours by columns of few values only.
                columns[f"first {group.variable}"] = [some[0] if some else "" for some in names]
    return columns


def write_best(
    folder: Path,
    name: str,
    config: RunConfig,
    metrics: Mapping[str, float],
    epoch: int,
    model: keras.Model,
    items: Table,
    columns: Mapping[str, Sequence[str]],
) -> None:
    """Writes what the best model of a finished training is, for the tabs HParams and Projector of TensorBoard.

    Args:
        folder: Where to, whole or not at all; what is there is replaced. The run's one session for HParams.
        name: Name of the run, its "Trial ID" there.
        config: The settings of the run: its hyperparameters.
        metrics: Of the best epoch, by name.
        epoch: The best epoch, from 0: the step of the metrics.
        model: The best model.
        items: Encoded features of all items.
        columns: What is shown of each item, by name, as `item_columns` makes it.
    """
    vectors = item_vectors(model, items)
    with written_whole(folder) as temporary:
        events = EventFolder(temporary)
        events.add(hparams_pb(hyperparameters(config), trial_id=name), 0)
        events.scalars({f"best/{name}": value for name, value in metrics.items()}, epoch)
        events.add(session_end_pb(api_pb2.STATUS_SUCCESS), 0)
        events.close()
        projector = ProjectorConfig()
        for task, array in vectors.items():
            # As text: a binary file is told from text by what happens to be in it.
            np.savetxt(temporary / f"items_{task}.tsv", array, fmt="%.8g", delimiter="\t")
            projector.embeddings.add(
                tensor_name=f"item_vector_{task}",
                tensor_shape=array.shape,
                tensor_path=f"items_{task}.tsv",
                metadata_path="items.tsv",
            )
        lines = ["\t".join(columns), *("\t".join(map(_cell, row)) for row in zip(*columns.values(), strict=True))]
        (temporary / "items.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (temporary / PROJECTOR_FILENAME).write_text(text_format.MessageToString(projector), encoding="utf-8")
        if folder.exists():
            # No folder can be renamed onto one with files: the earlier one leaves with the temporary folder.
            folder.rename(temporary.with_name("earlier"))


def _cell(text: str) -> str:
    return " ".join(text.split())


def hyperparameters(config: RunConfig) -> dict[str, bool | float | str]:
    """Settings as HParams knows them, `{"section.setting": value}`; a tuple becomes a text."""
    return {
        f"{section}.{name}": ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        for section, settings in config.to_dict().items()
        for name, value in settings.items()
    }


def item_vectors(model: keras.Model, items: Table) -> dict[str, np.ndarray]:
    """The vectors of all items, `{task: (I, W_task)}` float32."""
    part = tower(model, "item")
    batches = []
    for start in range(0, len(next(iter(items.values()))), BATCH_SIZE):
        batch = {name: items[name][start : start + BATCH_SIZE] for name in part.input}
        batches.append(keras.tree.map_structure(keras.ops.convert_to_numpy, part(batch, training=False)))
    return {task: np.concatenate([batch[task] for batch in batches]).astype(np.float32) for task in part.output}
