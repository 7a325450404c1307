# SPDX-License-Identifier: Apache-2.0
"""What a training writes for TensorBoard, read back by TensorBoard."""

import dataclasses
import io
import logging
import math
import shutil

import keras
import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.projector import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import _read_tensor_tsv_file
from tensorboard.util.tensor_util import make_ndarray

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.batches import Interactions
from mvke_tf.data.groups import Grouping, groups
from mvke_tf.errors import RunError
from mvke_tf.inference.gates import Thresholds
from mvke_tf.models import build_model
from mvke_tf.run import Run
from mvke_tf.run_folder import best_epoch
from mvke_tf.training import loop, train_run
from mvke_tf.training.loop import build_training_model
from mvke_tf.training.monitoring import Monitor, plugins
from mvke_tf.training.monitoring.gates import ADVICE
from mvke_tf.training.monitoring.plugins import hyperparameters, item_columns, shown_items
from tests.models.problems import CONFIG, ITEMS, ROWS, SCHEMA, USERS, labels, randomize

pytestmark = pytest.mark.slow

MODEL = ModelConfig(embedding_dim=8, hidden_dims=(8,), virtual_kernel_stddev=1.0, embedding_stddev=1.0)
TRAINING = TrainingConfig(
    epochs=3,
    batch_size=32,
    patience=0,
    seed=5,
    learning_rate=0.01,
    loss_weighting="uncertainty",
    monitor_images_epochs=2,
    steps_per_execution=2,
)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def curves(folder):
    events = read(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def watched(uses, thresholds):
    """One event from the first epoch on."""
    return {("click", None): "the gate of click is watched."}


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def make_run(tiny_prepared, tmp_path_factory):
    def make(model=MODEL, **settings):
        config = RunConfig(model, dataclasses.replace(TRAINING, **settings))
        return Run.create(tmp_path_factory.mktemp("runs") / "run", config, tiny_prepared)

    return make


class Lines(logging.Handler):
    """Keeps what is logged, for fixtures of a module."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def finished(make_run):
    """A run that was interrupted between events and state of epoch 2; what it logged; its model after epoch 3."""
    run, handler, real = make_run(), Lines(), Run.save_state
    logger = logging.getLogger("mvke_tf.training")

    def interrupted(self, model, history):
        if len(history) == 2:
            raise KeyboardInterrupt
        real(self, model, history)

    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvke_tf.training.monitoring.callback.gate_events", watched)
        patch.setattr(Run, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_run(run)
        assert [step for step, _ in curves(run.logs / "train")["epoch_loss"]] == [0, 1]
        patch.setattr(Run, "save_state", real)
        result = train_run(run)
    logger.removeHandler(handler)
    plain, model = build_training_model(run.config, run.prepared.schema(), steps_per_epoch=1)
    run.restore_state(model)
    return result, handler.lines, plain


@pytest.fixture(scope="module")
def pairs():
    """Seven pairs of four users and three items."""
    flat = {task: label[:, 0] for task, label in labels().items()}
    return Interactions(USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], flat)


@pytest.fixture
def follow(tmp_path):
    """Follows a model as if it was trained: `follow(monitor)` makes `step(number)`, an epoch."""
    monitors = []

    def make(model, data, **settings):
        model.compile(optimizer=keras.optimizers.SGD(0.5))
        monitor = Monitor(tmp_path / "logs", model, data, warnings_file=tmp_path / "warnings.txt", **settings)
        monitor.set_model(model)
        monitors.append(monitor)

        def step(number):
            monitor.on_epoch_begin(number)
            monitor.on_epoch_end(number, {"loss": 1.0, "val_loss": 2.0})

        return step

    yield make
    for monitor in monitors:
        monitor.close()


def small_model(name, **settings):
    config = dataclasses.replace(CONFIG, name=name, num_virtual_kernels=3, num_experts=4, **settings)
    return randomize(build_model(name, SCHEMA, config))


def set_gate(model, task, weights):
    """Makes the gate of an MMoE put out these weights, whatever the row."""
    dense = model.get_layer(f"gate_{task}").dense
    dense.kernel.assign(np.zeros_like(dense.kernel))
    dense.bias.assign(np.log(weights).astype("float32"))


def test_gate_curves_of_a_training_are_those_of_its_validation_impressions(finished):
    result, _, plain = finished
    written = curves(result.run.logs / "validation")
    data = result.run.prepared.part("validation")
    by_pair = plain.gates(
        {name: np.asarray(data.items[name])[data.item_rows] for name in plain.gates.input}, training=False
    )
    assert plain.gate_side == "item" and tuple(by_pair) == plain.task_names
    for task, weights in by_pair.items():
        weights = np.asarray(weights, "float64")
        experts = plain.kernels_of(task)
        assert len(experts) == weights.shape[1]
        largest = np.bincount(weights.argmax(axis=1), minlength=len(experts)) / len(weights)
        bits = -np.sum(weights * np.log2(weights), axis=1).mean()
        expected = {
            **{f"mean_weight/expert_{e}": weights[:, i].mean() for i, e in enumerate(experts)},
            **{f"strongest/expert_{e}": largest[i] for i, e in enumerate(experts)},
            "impression_entropy_bits": bits,
            "impression_entropy_share": bits / math.log2(len(experts)),
        }
        for name, value in expected.items():
            steps = written[f"gate_{task}/{name}"]
            assert [step for step, _ in steps] == [0, 1, 2]
            assert steps[-1][1] == pytest.approx(value, abs=1e-5), (task, name)


def test_curves_of_losses_metrics_rates_and_weights_of_the_tasks(finished):
    result, _, plain = finished
    train, validation = curves(result.run.logs / "train"), curves(result.run.logs / "validation")
    for step, epoch in enumerate(result.history):
        for name, value in epoch.items():
            if name.startswith("val_"):
                found = validation[f"epoch_{name[4:]}"]
            elif name.startswith(("log_variance_", "examples_per_second")):
                found = train[f"training/{name}"]
            elif name != "epoch":
                found = train[f"epoch_{name}"]
            else:
                continue
            assert found[step] == (step, pytest.approx(value, rel=1e-6)), name
        # With the rate with which the epoch began.
        assert train["training/learning_rate"][step] == (step, pytest.approx(0.01 * 0.7**step, rel=1e-5))
        for task, kind in plain.kinds.items():
            weight = (1.0 if kind == "binary" else 0.5) * math.exp(-epoch[f"log_variance_{task}"])
            assert train[f"training/loss_weight_{task}"][step] == (step, pytest.approx(weight, rel=1e-5))
    assert all(abs(result.history[-1][f"log_variance_{task}"]) > 1e-3 for task in plain.task_names)


def test_losses_and_metrics_come_first(finished):
    run = finished[0].run
    tags = sorted({tag for folder in ("train", "validation", "best") for tag in curves(run.logs / folder)})
    first = [tag for tag in tags if tag.startswith("epoch_")]
    assert len(first) > 5 and tags[: len(first)] == first
    assert {tag.split("/")[0].split("_")[0] for tag in tags} == {"epoch", "gate", "result", "training"}


def test_heat_maps_every_second_epoch(finished):
    run, plain = finished[0].run, finished[2]
    variables = [group.variable for group in groups(run.prepared)]
    events = read(run.logs / "validation")
    expected = {f"gate_{task}/by_{variable}" for task in plain.task_names for variable in variables}
    assert set(events.Tags()["images"]) == expected and expected
    for tag in expected:
        pictures = events.Images(tag)
        assert [picture.step for picture in pictures] == [0, 2]
        image = Image.open(io.BytesIO(pictures[0].encoded_image_string))
        assert image.size == (pictures[0].width, pictures[0].height)
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_a_session_of_hyperparameters_with_the_metrics_of_the_best_epoch(finished):
    result, _, _ = finished
    events = read(result.run.logs / "best")
    content = events.PluginTagToContent("hparams")
    start = hparams_metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert found == hyperparameters(result.run.config) and start.group_name == result.run.folder.name
    assert found["training.learning_rate"] == 0.01 and found["model.hidden_dims"] == "8"
    assert found["model.name"] == "mvke" and {"training.batch_size", "training.seed"} <= found.keys()
    # What nobody has changed stays away.
    assert "training.deduplicate" not in found and len(found) < 15
    assert "_hparams_/session_end_info" in content
    best = best_epoch(result.history)
    scalars = curves(result.run.logs / "best")
    expected = {f"result/{name}": value for name, value in result.history[best].items() if name.startswith("val_")}
    assert len(expected) > 5
    for tag, value in expected.items():
        assert scalars[tag] == [(best, pytest.approx(value, rel=1e-6))]
    assert scalars["result/epoch"] == [(best, best + 1)]


def test_projector_has_the_vectors_of_the_best_checkpoint(finished):
    run = finished[0].run
    folder, prepared = run.logs / "best", run.prepared
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    tower, rows = run.load_model().item_tower, prepared.catalogue
    vectors = tower({name: np.asarray(prepared.items.encoded[name])[rows] for name in tower.input}, training=False)
    assert [embedding.tensor_name for embedding in config.embeddings] == [f"item_vector_{task}" for task in vectors]
    for embedding, expected in zip(config.embeddings, vectors.values(), strict=True):
        array = _read_tensor_tsv_file(str(folder / embedding.tensor_path))
        assert list(array.shape) == list(embedding.tensor_shape) == [len(rows), expected.shape[1]]
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
        lines = [line.split("\t") for line in (folder / embedding.metadata_path).read_text().splitlines()]
        assert lines[0][0] == "name" and {len(line) for line in lines} == {len(lines[0])}
        assert len(lines) == 1 + len(rows)
        assert [line[0] for line in lines[1:]] == list(prepared.items.names[rows])


def test_names_with_tabs_and_items_in_several_groups_or_none():
    topics = Grouping("topic", "item", ("a", "b"), np.array([[1, 1], [0, 0], [0, 1]], bool))
    named = Grouping("name", "item", ("x",), np.array([[1], [0], [1]], bool))
    ages = Grouping("age", "user", ("old",), np.array([[1]], bool))
    columns = item_columns(["One", "Two", "Three"], [topics, ages, named])
    assert columns == {
        "name": ["One", "Two", "Three"],
        "topic": ["a, b", "", "b"],
        "first topic": ["a", "", "b"],
        "name (group)": ["x", "", "x"],
    }
    assert item_columns(["Three", "One"], [topics], np.array([2, 0]))["topic"] == ["b", "a, b"]


def test_of_many_items_those_with_the_most_training_rows_are_shown(tiny_prepared, monkeypatch):
    rows = np.asarray(tiny_prepared.catalogue)
    assert shown_items(tiny_prepared).tolist() == rows.tolist()
    monkeypatch.setattr(plugins, "MOST_ITEMS", 3)
    shown = shown_items(tiny_prepared)
    keys = np.asarray(tiny_prepared.items.key)
    seen = keys[np.asarray(tiny_prepared.item_row)[tiny_prepared.part_rows("train")]]
    counts = {row: int(np.sum(seen == keys[row])) for row in rows}
    assert len(shown) == 3 and set(shown) <= set(rows) and list(shown) == [row for row in rows if row in set(shown)]
    assert sorted(counts[row] for row in shown) == sorted(counts.values())[-3:]


def test_monitoring_does_not_change_the_training(finished, make_run, monkeypatch):
    class Nothing(keras.callbacks.Callback):
        def __init__(self, *arguments, **named):
            super().__init__()

        def close(self):
            """Has nothing to close."""

    monkeypatch.setattr(loop, "Monitor", Nothing)
    monkeypatch.setattr(loop, "_write_best", lambda *arguments: None)
    run = make_run()
    train_run(run)
    assert not list(run.logs.rglob("*.tfevents.*"))
    with np.load(run.state_file) as plain, np.load(finished[0].run.state_file) as monitored:
        assert len(plain.files) == len(monitored.files) > 20
        for name in set(plain.files) - {"history"}:
            np.testing.assert_array_equal(plain[name], monitored[name], err_msg=name)


def test_an_interrupted_training_continues_its_curves_and_repeats_no_warning(finished):
    result, lines, _ = finished
    for folder in ("train", "validation"):
        written = curves(result.run.logs / folder)
        assert len(written) > 5
        for tag, points in written.items():
            assert [step for step, _ in points] == [0, 1, 2], tag
    warning = "the gate of click is watched."
    assert result.run.warnings_file.read_text() == f"epoch 1: {warning}\n"
    assert "warnings.txt" in result.run.contents()
    texts = read(result.run.logs / "validation").Tensors("gates/warnings")
    assert [(text.step, make_ndarray(text.tensor_proto).item().decode()) for text in texts] == [
        (0, f"After epoch 1, {warning}")
    ]
    assert lines.count(f"After epoch 1, {warning}") == 1


def test_a_finished_run_gets_what_is_missing_of_its_end(finished):
    run = finished[0].run
    before = {path.name: path.read_bytes() for path in (run.logs / "best").glob("*.tsv")}
    assert before
    shutil.rmtree(run.logs / "best")
    train_run(run)
    assert {path.name: path.read_bytes() for path in (run.logs / "best").glob("*.tsv")} == before
    assert [step for step, _ in curves(run.logs / "train")["epoch_loss"]] == [0, 1, 2]


def test_a_training_that_goes_on_drops_the_end_and_the_warnings_of_an_earlier_one(follow, pairs, tmp_path, caplog):
    model = small_model("mmoe")
    (tmp_path / "logs" / "best").mkdir(parents=True)
    (tmp_path / "warnings.txt").write_text("epoch 1: said.\nepoch 10: not finished.\n")
    set_gate(model, "ctr", [0.97, 0.01, 0.01, 0.01])
    set_gate(model, "cvr", [0.25] * 4)
    step = follow(model, pairs)
    step(9)
    assert not (tmp_path / "logs" / "best").exists()
    # It had collapsed before the interruption.
    assert said(caplog) == [] and (tmp_path / "warnings.txt").read_text() == "epoch 1: said.\n"
    set_gate(model, "cvr", [0.97, 0.01, 0.01, 0.01])
    step(10)
    (line,) = said(caplog)
    assert "the gate of cvr has collapsed" in line
    assert (tmp_path / "warnings.txt").read_text().startswith("epoch 1: said.\nepoch 11: the gate of cvr has")


@pytest.mark.parametrize("garbage", [b"x", b"epoch 1: said.\nepoch \xff\xfe", b"epoch 99999999999999: said."])
def test_warnings_of_another_hand_name_the_file_and_what_helps(follow, pairs, tmp_path, garbage):
    (tmp_path / "warnings.txt").write_bytes(garbage)
    step = follow(small_model("mmoe"), pairs)
    line = garbage.count(b"\n") + 1
    with pytest.raises(RunError, match=rf"warnings\.txt, line {line}, is not of a training.*Delete the file"):
        step(1)
    (tmp_path / "warnings.txt").unlink()
    step(1)


def test_a_model_without_gates_has_its_other_curves(follow, pairs, tmp_path, caplog):
    follow(small_model("shared_bottom"), pairs)(0)
    events = read(tmp_path / "logs" / "validation")
    assert events.Tags()["scalars"] == ["epoch_loss"] and events.Tags()["images"] == []
    assert not (tmp_path / "warnings.txt").exists() and said(caplog) == []


def test_a_collapsed_gate_is_said_once_per_collapse(follow, pairs, tmp_path, caplog):
    model = small_model("mmoe")
    step = follow(model, pairs)
    healthy, collapsed = [0.25] * 4, [0.02, 0.95, 0.02, 0.01]
    set_gate(model, "cvr", healthy)
    for number, weights in enumerate([healthy, collapsed, collapsed, healthy, collapsed]):
        set_gate(model, "ctr", weights)
        step(number)
    text = "the gate of ctr has collapsed: expert 1 has 95.0% of the weight on average (warned from 90% on). "
    assert [line.removesuffix(ADVICE) for line in said(caplog)] == [f"After epoch {epoch}, {text}" for epoch in (2, 5)]
    assert (tmp_path / "warnings.txt").read_text() == "".join(f"epoch {epoch}: {text}{ADVICE}\n" for epoch in (2, 5))
    texts = read(tmp_path / "logs" / "validation").Tensors("gates/warnings")
    assert [text.step for text in texts] == [1, 4]
    curve = curves(tmp_path / "logs" / "validation")["gate_ctr/mean_weight/expert_1"]
    assert [value for _, value in curve] == pytest.approx([0.25, 0.95, 0.95, 0.25, 0.95])


def test_dead_experts_are_said_in_pythons_log(follow, pairs, caplog):
    model = small_model("mmoe")
    step = follow(model, pairs)
    set_gate(model, "ctr", [0.01, 0.6, 0.37, 0.02])
    set_gate(model, "cvr", [0.1, 0.2, 0.3, 0.4])
    step(0)
    step(1)
    assert [line.split(" (warned")[0] for line in said(caplog)] == [
        "After epoch 1, expert 0 of ctr is dead: mean weight 0.0100",
        "After epoch 1, expert 3 of ctr is dead: mean weight 0.0200",
    ]
    assert "below 0.0250, 0.1 of an equal share), strongest in 0.00% of the impressions" in caplog.text


def test_thresholds_can_be_chosen(follow, pairs, caplog):
    model = small_model("mmoe")
    set_gate(model, "ctr", [0.7, 0.1, 0.1, 0.1])
    set_gate(model, "cvr", [0.4, 0.3, 0.2, 0.1])
    follow(model, pairs, thresholds=Thresholds(collapsed_weight=0.6, dead_weight=0.5))(0)
    assert [line.split(": ")[0] for line in said(caplog)] == [
        "After epoch 1, the gate of ctr has collapsed",
        "After epoch 1, expert 3 of cvr is dead",
    ]


def test_followed_by_hand_without_groups_or_data(follow, tmp_path):
    follow(small_model("mvke"), None)(0)
    assert curves(tmp_path / "logs" / "validation") == {"epoch_loss": [(0, 2.0)]}
    assert curves(tmp_path / "logs" / "train") == {"epoch_loss": [(0, 1.0)], "training/learning_rate": [(0, 0.5)]}
