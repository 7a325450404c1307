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

from mvke_tf import training
from mvke_tf.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.dataset import PairData
from mvke_tf.data.groups import Grouping
from mvke_tf.models import build_model
from mvke_tf.models.two_tower import gate_model, tower
from mvke_tf.monitoring import Monitor, gates, item_columns
from mvke_tf.monitoring.best import hyperparameters
from mvke_tf.run import Run
from mvke_tf.training import best_epoch, build_training_model, train_run
from tests.models.problems import CONFIG, ITEMS, PAIRS, ROWS, SCHEMA, USERS, labels, randomize

MODEL = ModelConfig(tasks=("ctr", "rating"), embedding_dim=8, hidden_dims=(8,), kernel_stddev=1.0, embedding_stddev=1.0)
TRAINING = TrainingConfig(
    epochs=3,
    batch_size=32,
    patience=0,
    seed=5,
    learning_rate=0.01,
    loss_weighting="uncertainty",
    monitor_images_epochs=2,
    distinct=True,
    steps_per_execution=2,
)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def curves(folder):
    events = read(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def quiet(line):
    """Reports nothing."""


def watched(uses, *thresholds):
    """One event from the first epoch on."""
    return {("ctr", None): "the gate of ctr is watched."}


@pytest.fixture(scope="module")
def make_run(tiny_run_template, tmp_path_factory):
    def make(model=MODEL, **settings):
        config = RunConfig(DataConfig(history_length=5), model, dataclasses.replace(TRAINING, **settings))
        return Run.create(tmp_path_factory.mktemp("runs") / "run", config, tiny_run_template / "prepared.npz")

    return make


@pytest.fixture(scope="module")
def finished(make_run):
    """A run that was interrupted between events and state of epoch 2; what it reported; its model after epoch 3."""
    run, lines, real = make_run(), [], Run.save_state

    def interrupted(self, model, history):
        if len(history) == 2:
            raise KeyboardInterrupt
        real(self, model, history)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvke_tf.monitoring.callback.gate_events", watched)
        patch.setattr(Run, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_run(run, lines.append)
        assert [step for step, _ in curves(run.logs / "train")["epoch_loss"]] == [0, 1]
        patch.setattr(Run, "save_state", real)
        result = train_run(run, lines.append)
    plain, model = build_training_model(run.config, run.prepared.schema_for(run.config.model), steps_per_epoch=1)
    run.restore_state(model)
    return result, lines, plain


@pytest.fixture(scope="module")
def pairs():
    """Seven pairs of four users and three items."""
    flat = {task: label[:, 0] for task, label in labels().items()}
    return PairData(USERS, ITEMS, ROWS["user_rows"], ROWS["item_rows"], flat)


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


def by_row(model):
    """The gate weights of each of the seven pairs."""
    part = gate_model(model)
    weights = part({name: PAIRS[name] for name in part.input}, training=False)
    return {task: np.asarray(weight, "float64") for task, weight in weights.items()}


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
    by_pair = gate_model(plain)({name: column[data.item_rows] for name, column in data.items.items()}, training=False)
    assert set(by_pair) == {"ctr", "rating"}
    for task, weights in by_pair.items():
        weights = np.asarray(weights, "float64")
        experts = plain.get_layer(f"user_vector_{task}").indices
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
    result, _, _ = finished
    train, validation = curves(result.run.logs / "train"), curves(result.run.logs / "validation")
    for step, epoch in enumerate(result.history):
        for name, value in epoch.items():
            if name != "epoch":
                found = validation[f"epoch_{name[4:]}"] if name.startswith("val_") else train[f"epoch_{name}"]
                assert found[step] == (step, pytest.approx(value, rel=1e-6))
        # With the rate with which the epoch began.
        assert train["epoch_learning_rate"][step] == (step, pytest.approx(0.01 * 0.7**step, rel=1e-5))
        for task, factor in {"ctr": 1.0, "rating": 0.5}.items():
            weight = factor * math.exp(-epoch[f"log_variance_{task}"])
            assert train[f"epoch_loss_weight_{task}"][step] == (step, pytest.approx(weight, rel=1e-5))
    assert abs(result.history[-1]["log_variance_ctr"]) > 1e-3


def test_heat_maps_every_second_epoch(finished):
    events = read(finished[0].run.logs / "validation")
    assert events.Tags()["images"] == [f"gate_{task}/by_genre" for task in ("ctr", "rating")]
    for tag in events.Tags()["images"]:
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
    assert found["training.learning_rate"] == 0.01 and found["model.tasks"] == "ctr, rating"
    assert found["training.distinct"] is True and found["model.name"] == "mvke"
    assert "_hparams_/session_end_info" in content
    best = best_epoch(result.history)
    scalars = curves(result.run.logs / "best")
    expected = {f"best/{name}": value for name, value in result.history[best].items() if name.startswith("val_")}
    assert len(expected) > 5
    for tag, value in expected.items():
        assert scalars[tag] == [(best, pytest.approx(value, rel=1e-6))]
    assert scalars["best/epoch"] == [(best, best + 1)]


def test_projector_has_the_vectors_of_the_best_checkpoint(finished):
    run = finished[0].run
    folder = run.logs / "best"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    items = run.prepared.encoded["item"]
    vectors = tower(run.load_model(), "item")({name: items[name] for name in items}, training=False)
    assert [embedding.tensor_name for embedding in config.embeddings] == [f"item_vector_{task}" for task in vectors]
    for embedding, expected in zip(config.embeddings, vectors.values(), strict=True):
        array = _read_tensor_tsv_file(str(folder / embedding.tensor_path))
        assert list(array.shape) == list(embedding.tensor_shape) == [30, expected.shape[1]]
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
        rows = [line.split("\t") for line in (folder / embedding.metadata_path).read_text().splitlines()]
        assert rows[0] == ["title", "genre", "first genre", "popularity", "decade"]
        assert len(rows) == 31 and {len(row) for row in rows} == {5}
        assert rows[1][0] == "Film 1" and rows[1][1].split(", ")[0] == rows[1][2]


def test_titles_with_tabs_and_items_without_a_group():
    genres = Grouping("genre", "item", ("a", "b"), np.array([[1, 1], [0, 0]], bool))
    ages = Grouping.of_labels("age", "user", ["old"])
    columns = item_columns(["One", "Two"], [genres, ages])
    assert columns == {"title": ["One", "Two"], "genre": ["a, b", ""], "first genre": ["a", ""]}


def test_monitoring_does_not_change_the_training(finished, make_run, monkeypatch):
    class Nothing(keras.callbacks.Callback):
        def __init__(self, folder, *arguments):
            super().__init__()
            self.best = folder

        def close(self):
            """Has nothing to close."""

    monkeypatch.setattr(training, "Monitor", Nothing)
    run = make_run()
    run.logs.mkdir()
    train_run(run, quiet)
    assert not list(run.logs.iterdir())
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
    warning = "the gate of ctr is watched."
    assert result.run.warnings_file.read_text() == f"epoch 1: {warning}\n"
    assert "warnings.txt" in result.run.contents()
    texts = read(result.run.logs / "validation").Tensors("gates/warnings")
    assert [(text.step, make_ndarray(text.tensor_proto).item().decode()) for text in texts] == [
        (0, f"After epoch 1, {warning}")
    ]
    assert lines.count(f"Warning: after epoch 1, {warning}") == 1


def test_a_finished_run_gets_what_is_missing_of_its_end(finished):
    run = finished[0].run
    table = run.logs / "best" / "items_ctr.tsv"
    before = table.read_bytes()
    shutil.rmtree(run.logs / "best")
    train_run(run, quiet)
    assert table.read_bytes() == before
    assert [step for step, _ in curves(run.logs / "train")["epoch_loss"]] == [0, 1, 2]


def test_a_training_that_goes_on_drops_the_end_and_the_warnings_of_an_earlier_one(follow, pairs, tmp_path):
    model, lines = small_model("mmoe"), []
    (tmp_path / "logs" / "best").mkdir(parents=True)
    (tmp_path / "warnings.txt").write_text("epoch 1: said.\nepoch 10: not finished.\n")
    set_gate(model, "ctr", [0.97, 0.01, 0.01, 0.01])
    set_gate(model, "cvr", [0.25] * 4)
    step = follow(model, pairs, report=lines.append)
    step(9)
    assert not (tmp_path / "logs" / "best").exists()
    # It had collapsed before the interruption.
    assert lines == [] and (tmp_path / "warnings.txt").read_text() == "epoch 1: said.\n"
    set_gate(model, "cvr", [0.97, 0.01, 0.01, 0.01])
    step(10)
    assert len(lines) == 1 and "the gate of cvr has collapsed" in lines[0]
    assert (tmp_path / "warnings.txt").read_text().startswith("epoch 1: said.\nepoch 11: the gate of cvr has")


def test_a_model_without_gates_has_its_other_curves(follow, pairs, tmp_path):
    follow(small_model("shared_bottom"), pairs, report=pytest.fail)(0)
    events = read(tmp_path / "logs" / "validation")
    assert events.Tags()["scalars"] == ["epoch_loss"] and events.Tags()["images"] == []
    assert not (tmp_path / "warnings.txt").exists()


@pytest.mark.parametrize("name", ["mvke", "mmoe", "cgc", "ple"])
def test_gates_of_every_model_weigh_impressions(pairs, name):
    model = small_model(name)
    genres = Grouping("genre", "item", ("a", "b", "none"), np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], bool))
    view = gates.GateView(model, pairs, [genres])
    by_pair = by_row(model)
    uses = view.look()
    assert uses.keys() == by_pair.keys()
    for task, use in uses.items():
        weights = by_pair[task]
        mixture = model.get_layer(f"user_vector_{task}")
        assert use.experts == (mixture.indices if name == "mvke" else mixture.experts)
        np.testing.assert_allclose(use.mean_weight, weights.mean(axis=0), atol=1e-6)
        assert use.mean_weight.sum() == pytest.approx(1.0, abs=1e-6)
        means, impressions = view.by_group(use, "genre")
        np.testing.assert_allclose(means[0], weights[np.isin(ROWS["item_rows"], [0, 1])].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(means[1], weights[ROWS["item_rows"] == 1].mean(axis=0), atol=1e-6)
        assert np.isnan(means[2]).all() and impressions.tolist() == [5, 2, 0]


def test_a_view_of_many_entities_takes_some_spread_evenly(pairs, monkeypatch):
    monkeypatch.setitem(gates.MOST_ENTITIES, "user", 2)
    model = small_model("mmoe")
    use = gates.GateView(model, pairs).look()["ctr"]
    chosen = np.isin(ROWS["user_rows"], [0, 3])
    weights = by_row(model)["ctr"]
    assert use.weights.shape == (2, 4) and use.counts.tolist() == [2, 2]
    np.testing.assert_allclose(use.mean_weight, weights[chosen].mean(axis=0), atol=1e-6)


def test_a_gate_that_reads_both_sides_is_an_error(pairs):
    both = dataclasses.replace(pairs, items={}, users={name: USERS[name] for name in ("user_id",)})
    with pytest.raises(ValueError, match=r"must read one side only.* Received: gates that read \['age', 'history'"):
        gates.GateView(small_model("mmoe"), both)


def test_a_collapsed_gate_is_said_once_per_collapse(follow, pairs, tmp_path):
    model, lines = small_model("mmoe"), []
    step = follow(model, pairs, report=lines.append)
    healthy, collapsed = [0.25] * 4, [0.02, 0.95, 0.02, 0.01]
    set_gate(model, "cvr", healthy)
    for number, weights in enumerate([healthy, collapsed, collapsed, healthy, collapsed]):
        set_gate(model, "ctr", weights)
        step(number)
    text = "the gate of ctr has collapsed: expert 1 has 95.0% of the weight on average (warned from 90% on). "
    assert [line.removesuffix(gates.ADVICE) for line in lines] == [
        f"Warning: after epoch {epoch}, {text}" for epoch in (2, 5)
    ]
    assert (tmp_path / "warnings.txt").read_text() == "".join(
        f"epoch {epoch}: {text}{gates.ADVICE}\n" for epoch in (2, 5)
    )
    texts = read(tmp_path / "logs" / "validation").Tensors("gates/warnings")
    assert [text.step for text in texts] == [1, 4]
    curve = curves(tmp_path / "logs" / "validation")["gate_ctr/mean_weight/expert_1"]
    assert [value for _, value in curve] == pytest.approx([0.25, 0.95, 0.95, 0.25, 0.95])


def test_dead_experts_are_said_in_pythons_log(follow, pairs, caplog):
    model = small_model("mmoe")
    step = follow(model, pairs)
    set_gate(model, "ctr", [0.01, 0.6, 0.37, 0.02])
    set_gate(model, "cvr", [0.1, 0.2, 0.3, 0.4])
    with caplog.at_level(logging.WARNING, "mvke_tf.monitoring"):
        step(0)
        step(1)
    assert [record.getMessage().split(" (warned")[0] for record in caplog.records] == [
        "Warning: after epoch 1, expert 0 of ctr is dead: mean weight 0.0100",
        "Warning: after epoch 1, expert 3 of ctr is dead: mean weight 0.0200",
    ]
    assert "below 0.0250, 0.1 of an equal share), strongest in 0.00% of the impressions" in caplog.text


def test_thresholds_can_be_chosen(follow, pairs):
    model, lines = small_model("mmoe"), []
    set_gate(model, "ctr", [0.7, 0.1, 0.1, 0.1])
    set_gate(model, "cvr", [0.4, 0.3, 0.2, 0.1])
    follow(model, pairs, report=lines.append, collapsed_weight=0.6, dead_weight=0.5)(0)
    assert [line.split(": ")[1] for line in lines] == [
        "after epoch 1, the gate of ctr has collapsed",
        "after epoch 1, expert 3 of cvr is dead",
    ]


def test_followed_by_hand_without_groups_or_data(follow, pairs, tmp_path):
    follow(small_model("mvke"), None)(0)
    assert curves(tmp_path / "logs" / "validation") == {"epoch_loss": [(0, 2.0)]}
    assert curves(tmp_path / "logs" / "train") == {"epoch_loss": [(0, 1.0)], "epoch_learning_rate": [(0, 0.5)]}
