# SPDX-License-Identifier: Apache-2.0
"""Count and multi-class tasks go the whole way: from the declaration over training and reports to the SavedModel."""

import dataclasses
import json
import math
import re

import numpy as np
import polars as pl
import pytest
import tensorflow as tf

from mvke_tf.config import RunConfig
from mvke_tf.data.batches import Interactions
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import describe, prepare
from mvke_tf.errors import ConfigError, DataError, DeclarationError
from mvke_tf.evaluation import evaluate_multitask_model, evaluate_run
from mvke_tf.inference.predictions import predict
from mvke_tf.models import build_model
from mvke_tf.run import Run
from mvke_tf.schema import Feature, Schema, Task
from mvke_tf.serving import export_run
from mvke_tf.serving.profiles.profiler import Profiler
from mvke_tf.training import train_run
from tests.small import SMALL, small_log
from tests.training.helpers import MODEL, TRAINING

pytestmark = pytest.mark.slow

TASKS = ("click", "visits", "mood", "grade")
DECLARED = {
    "click": {"label": "clicked"},
    "visits": {"kind": "count", "label": "visits"},
    "mood": {"kind": "multiclass", "label": "mood", "classes": ["it's fine", "bad", "good"]},
    "grade": {"kind": "multiclass", "label": "stars", "classes": [1, 2, 3, 4, 5]},
}
# Four features: every one takes time to trace.
FEATURES = {name: SMALL["features"][name] for name in ("user", "country", "item", "price")}
FEATURES["item"] = {"tower": "item", "encode": "vocabulary"}
DECLARATION = {**SMALL, "features": FEATURES, "tasks": DECLARED, "groups": {"country": {"feature": "country"}}}


def log() -> tuple[pl.DataFrame, pl.DataFrame]:
    frame, items = small_log()
    random = np.random.default_rng(3)
    moods = [["it's fine", "bad", "good", None][index] for index in random.integers(0, 4, len(frame))]
    visits = random.poisson(np.where(frame["clicked"], 3.0, 0.5))
    frame = frame.with_columns(visits=pl.Series(visits), mood=pl.Series(moods, dtype=pl.String))
    return frame.sort("time", maintain_order=True), items


def dataset(**tasks: dict) -> Dataset:
    frame, items = log()
    return Dataset.from_frame(frame, DECLARATION | {"tasks": DECLARED | tasks}, items=items)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("kinds")
    prepared = prepare(dataset())
    prepared.save(folder / "prepared" / "kinds")
    prepared.folder = folder / "prepared" / "kinds"
    model = dataclasses.replace(MODEL, tasks=TASKS, embedding_dim=4, embedding_stddev=1.0, dropout_rate=0.0)
    training = dataclasses.replace(
        TRAINING, epochs=2, batch_size=64, learning_rate=0.02, loss_weighting="uncertainty", monitor_images_epochs=0
    )
    return train_run(Run.create(folder / "run", RunConfig(model, training), prepared)).run


@pytest.fixture(scope="module")
def model(run):
    return run.load_model()


def test_labels_are_counts_and_indices_of_classes(run):
    frame, _ = log()
    prepared = run.prepared
    shown = ~prepared.sampled
    np.testing.assert_array_equal(prepared.label("visits")[shown], frame["visits"].to_numpy())
    expected = [DECLARED["mood"]["classes"].index(mood) if mood else 0 for mood in frame["mood"]]
    np.testing.assert_array_equal(prepared.label("mood")[shown], expected)
    np.testing.assert_array_equal(prepared.weight("mood")[shown], frame["mood"].is_not_null())
    known = frame["stars"].is_not_null().to_numpy()
    np.testing.assert_array_equal(prepared.label("grade")[shown][known], frame["stars"].drop_nulls() - 1)
    # Rows that were drawn count for binary tasks only.
    assert [prepared.weight(task)[~shown].max() for task in TASKS] == [1, 0, 0, 0]
    train = shown & (prepared.split == 0)
    assert prepared.schema().tasks[1].offset == pytest.approx(
        math.log(prepared.label("visits")[train].mean()), abs=1e-4
    )
    assert prepared.schema().tasks[3].classes == ("1", "2", "3", "4", "5")
    assert "commonest mood" in describe(prepared) and "mean visits" in describe(prepared)


def test_a_wrong_label_is_named():
    frame, items = log()
    for change, message in (
        ({"visits": pl.lit(1.5)}, "expected a whole number of at least 0. Received: 1.5"),
        ({"mood": pl.lit("angry")}, "expected one of the classes it's fine, bad, good. Received: another value"),
    ):
        wrong = Dataset.from_frame(frame.with_columns(**change), DECLARATION, items=items)
        with pytest.raises(DataError, match=re.escape(message)):
            prepare(wrong)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"label": "mood", "kind": "multiclass"}, '`classes` goes with kind = "multiclass"'),
        ({"label": "clicked", "classes": [0, 1]}, '`classes` goes with kind = "multiclass"'),
        ({"label": "mood", "kind": "multiclass", "classes": ["a"]}, "2 to 1,000 different texts"),
        ({"label": "mood", "kind": "multiclass", "classes": ["a", 1]}, "2 to 1,000 different texts"),
        ({"label": "visits", "kind": "count", "given": "click"}, "`given` is for binary tasks"),
        ({"label": "visits", "kind": "count", "transform": "log1p"}, "`transform` is for regression tasks"),
    ],
)
def test_wrong_declarations(task, message):
    with pytest.raises(DeclarationError, match=message):
        dataset(more=task)


def test_the_schema_rejects_what_a_kind_does_not_have():
    with pytest.raises(ValueError, match="two or more different names of a multi-class task"):
        Task("mood", "multiclass", classes=("a", "a"))
    with pytest.raises(ValueError, match="`offset` is for regression and count tasks"):
        Task("mood", "multiclass", classes=("a", "b"), offset=1.0)
    pairs = Interactions({}, {}, np.zeros(2, int), np.zeros(2, int), {"t": np.array([0.0, 2.0])})
    pairs.check_labels([Task("t", "count")])
    with pytest.raises(ValueError, match=r"must be indices of the 2 classes. Received: 1 others, such as 2.0"):
        pairs.check_labels([Task("t", "multiclass", classes=("a", "b"))])


def test_the_report_of_every_kind(run, model):
    report = evaluate_run(run)["test"]
    assert {"poisson_deviance", "rmse", "rows"} < set(report["visits"])
    assert {"macro_auc", "accuracy", "log_loss", "rows"} == set(report["mood"])
    test = run.prepared.part("test", TASKS)
    values = predict(model, test).values
    assert values["mood"].shape == (len(test), 3) and values["visits"].shape == (len(test),)
    counts = test.weights["mood"] > 0
    labels = test.labels["mood"][counts].astype(int)
    expected = -np.log(values["mood"][counts][np.arange(len(labels)), labels]).mean()
    assert report["mood"]["log_loss"] == pytest.approx(expected, rel=1e-9)
    history = run.history()[-1]
    assert history["val_visits_poisson_deviance"] > 0 and 0 <= history["val_grade_accuracy"] <= 1
    assert history["val_score"] == pytest.approx(
        np.mean([history[f"val_{task}_auc"] for task in ("click", "mood", "grade")])
    )
    assert evaluate_multitask_model(model, test)["visits"] == pytest.approx(report["visits"])


def test_predictions_equal_the_models(run, model):
    """From the vectors of distinct entities, and pair by pair."""
    test = run.prepared.part("test", TASKS)
    pairs = {name: np.asarray(column)[test.user_rows] for name, column in test.users.items()}
    pairs |= {name: np.asarray(column)[test.item_rows] for name, column in test.items.items()}
    direct = model.predictions(model({name: pairs[name] for name in model.input}))
    for task, values in predict(model, test).values.items():
        np.testing.assert_allclose(np.reshape(direct[task], values.shape), values, atol=1e-5)
    assert model.kinds == {"click": "binary", "visits": "count", "mood": "multiclass", "grade": "multiclass"}
    assert [task.classes for task in model.schema_tasks] == [task.classes for task in run.prepared.schema().tasks]


def test_the_saved_model_has_every_kind(run, model):
    exported = export_run(run)
    prepared = run.prepared
    test = prepared.part_rows("test")
    raw = {
        name: tf.convert_to_tensor(table.raw[name][rows[test]])
        for table, rows in ((prepared.users, prepared.user_row), (prepared.items, prepared.item_row))
        for name in prepared.encoder.raw_inputs(table.side)
    }
    signatures = tf.saved_model.load(exported).signatures
    answer = signatures["serving_default"](**raw)
    for task, values in predict(model, prepared.part("test", TASKS)).values.items():
        np.testing.assert_allclose(answer[task], values, atol=1e-5)
    users = {name: raw[name] for name in prepared.encoder.raw_inputs("user")}
    ids = tf.constant(prepared.items.key[prepared.item_row[test]])[:, None]
    scored = signatures["score_ids"](item_ids=ids, **users)
    np.testing.assert_allclose(scored["mood"][:, 0], answer["mood"], atol=1e-5)
    assert scored["mood"].shape == (len(test), 1, 3)
    nothing = tf.constant([[]] * len(test), tf.string)
    best = signatures["recommend"](k=tf.constant(2), task=tf.constant("visits"), exclude=nothing, **users)
    assert (best["predictions"].numpy()[:, 0] >= best["predictions"].numpy()[:, 1]).all()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"task must be one of: click, visits\."):
        signatures["recommend"](k=tf.constant(2), task=tf.constant("mood"), exclude=nothing, **users)
    described = json.loads((exported / "signatures.json").read_text())["tasks"]["mood"]
    assert described["classes"] == ["it's fine", "bad", "good"] and len(described["class_vectors"]) == 3


def test_a_multi_class_task_ranks_nothing(model):
    features = (Feature("u", "user", 3), Feature("i", "item", 3))
    only = build_model("mvke", Schema(features, (Task("mood", "multiclass", classes=("a", "b")),)))
    with pytest.raises(ConfigError, match="Items are ranked by one number per pair"):
        Profiler(only, None)
    with pytest.raises(ConfigError, match=r"some of the tasks \['click', 'visits'\]. Received: \['mood'\]"):
        Profiler(model, None, ("click", "mood"))
