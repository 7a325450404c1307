# SPDX-License-Identifier: Apache-2.0
"""Runs to explore, with untrained models of large weights."""

import keras
import polars as pl
import pytest

from mvke_tf.config import ModelConfig, RunConfig
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.explore.explorer import Explorer
from mvke_tf.models import build_model
from mvke_tf.run import Run
from tests.small import SMALL, small_log, small_prepared

TITLE = "<script>alert(1)</script> ${1+1} {{value}}"
# Every kind of task and of value, and neither users nor items with ids.
KINDS = {
    **SMALL,
    "keys": {},
    "source": {},
    "split": {"by": "random", "train": 0.6, "validation": 0.2, "test": 0.2},
    "negatives": {"kind": "none"},
    "features": {
        "age": {"tower": "user", "encode": "number"},
        "country": {"tower": "user", "encode": "vocabulary"},
        "shape": {"tower": "user", "encode": "vector", "width": 2},
        "hour": {"tower": "user", "encode": "integer", "bins": 24},
        "liked": {"tower": "user", "encode": "vocabulary", "length": 3, "weights": "liking"},
        "tags": {"tower": "item", "encode": "vocabulary", "length": 3},
    },
    "tasks": {
        "click": {"label": "clicked"},
        "buy": {"label": "bought", "given": "click"},
        "visits": {"kind": "count", "label": "visits"},
        "stars": {"kind": "regression", "label": "stars", "transform": "log1p"},
        "mood": {"kind": "multiclass", "label": "mood", "classes": ["good", "bad"]},
    },
    "groups": {},
}
del KINDS["tables"]


def kinds_prepared():
    log, items = small_log()
    frame = log.join(items, on="item").with_row_index("number")
    frame = frame.with_columns(
        shape=pl.concat_list(pl.col("number").cast(pl.Float32) / 100, pl.lit(0.5, pl.Float32)),
        hour=(pl.col("number") % 24).cast(pl.Int64),
        liked=pl.col("tags"),
        liking=pl.col("tags").list.eval(pl.lit(1.5) + pl.int_range(pl.len())),
        visits=pl.col("number") % 4,
        mood=pl.when(pl.col("number") % 3 == 0).then(pl.lit("good")).otherwise(pl.lit("bad")),
    )
    return prepare(Dataset.from_frame(frame, KINDS))


def hostile_prepared():
    log, items = small_log()
    items = items.with_columns(title=pl.when(pl.col("item") == "i01").then(pl.lit(TITLE)).otherwise("title"))
    log = log.with_columns(country=pl.when(pl.col("user") == 1).then(pl.lit(TITLE)).otherwise("country"))
    return prepare(Dataset.from_frame(log, SMALL, items=items))


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """Makes a run: `run_of(model, prepared, tasks)`."""

    def make(name="mvke", prepared=None, tasks=()):
        folder = tmp_path_factory.mktemp("explore")
        prepared = prepared or small_prepared()
        saved = folder / "prepared" / "data"
        prepared.save(saved)
        prepared = type(prepared).load(saved)
        model = ModelConfig(
            name=name,
            embedding_dim=8,
            hidden_dims=(8,),
            tasks=tasks,
            virtual_kernel_stddev=1.0,
            embedding_stddev=1.0,
        )
        run = Run.create(folder / "runs" / "tiny", RunConfig(model), prepared)
        keras.utils.set_random_seed(0)
        run.save_checkpoint(build_model(name, prepared.schema(tasks), model))
        return run

    return make


@pytest.fixture(scope="session")
def explorer(run_of):
    """The small dataset and an MVKE, with all three tasks."""
    return Explorer(run_of(tasks=("click", "buy", "stars")))
