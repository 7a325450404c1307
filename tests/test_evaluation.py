import dataclasses
import json

import keras
import numpy as np
import pytest
from matplotlib.image import imread
from sklearn.metrics import log_loss, roc_auc_score

from mvke_tf.data.dataset import Batches
from mvke_tf.data.movielens import DataError
from mvke_tf.evaluation import evaluate_model, evaluate_run, predict, predict_conditional, results_table
from mvke_tf.figures import calibration_figure, regression_figure, roc_figure
from mvke_tf.models import build_model
from mvke_tf.models.two_tower import tower
from mvke_tf.run import RunError

METRICS = {"auc", "gauc", "accuracy", "log_loss", "calibration_error", "rows", "positives"}
TEST_SPLITS = {"test", "test_warm_users", "test_cold_users"}


def silent(line):
    pass


def test_predict_gives_the_sigmoid_of_the_logits_in_order(tiny_run):
    model, data = tiny_run.load_model(), tiny_run.prepared.part("test")
    logits = model.predict(Batches(data, len(data)).in_order(), verbose=0)
    probabilities = predict(model, data, batch_size=7)
    assert list(probabilities) == ["ctr", "cvr"]
    for task, probability in probabilities.items():
        assert probability.shape == (len(data),) and probability.dtype == np.float64
        np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logits[task][:, 0].astype(float))), atol=1e-6)
        assert np.ptp(probability) > 0.01


def test_predict_refuses_damaged_weights(tiny_run):
    model = tiny_run.load_model()
    model.set_weights([np.full_like(weight, np.nan) for weight in model.get_weights()])
    with pytest.raises(ValueError, match="finite outputs of task 'ctr'"):
        predict(model, tiny_run.prepared.part("test"))


def test_report_equals_scikit_learn_on_the_model_predictions(tiny_run):
    lines = []
    report = evaluate_run(tiny_run, report=lines.append)
    assert json.loads(tiny_run.report_file.read_text()) == report
    assert set(report) == TEST_SPLITS
    for tasks in report.values():
        assert set(tasks["ctr"]) == METRICS and set(tasks["cvr"]) == {*METRICS, "auc_clicked"}

    model, prepared = tiny_run.load_model(), tiny_run.prepared
    data = prepared.part("test")
    logits = model.predict(Batches(data, 64).in_order(), verbose=0)
    test = prepared.pairs.iloc[prepared.part_rows("test")]
    user_ids = prepared.raw["user"]["user_id"]
    impressions = prepared.pairs[(prepared.pairs["part"] == 0) & (prepared.pairs["rating"] > 0)]
    trained = set(user_ids[impressions["user_row"]])
    warm = np.array([user in trained for user in user_ids[test["user_row"]]])
    assert 0 < warm.sum() < len(warm)
    for split, chosen in (("test", warm | ~warm), ("test_warm_users", warm), ("test_cold_users", ~warm)):
        for task in ("ctr", "cvr"):
            label = test[task].to_numpy()[chosen]
            probability = 1 / (1 + np.exp(-logits[task][chosen, 0].astype(float)))
            metrics = report[split][task]
            assert (metrics["rows"], metrics["positives"]) == (chosen.sum(), label.sum())
            assert metrics["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-6)
            assert metrics["log_loss"] == pytest.approx(log_loss(label, probability), abs=1e-6)
        clicked = chosen & (test["ctr"].to_numpy() == 1)
        expected = roc_auc_score(test["cvr"][clicked], logits["cvr"][clicked, 0])
        assert report[split]["cvr"]["auc_clicked"] == pytest.approx(expected, abs=1e-6)
    assert lines == [f"Evaluating {tiny_run.checkpoint} on {len(test)} rows of the test part ..."]


def test_gauc_groups_by_user_and_not_by_user_state(tiny_run):
    prepared = tiny_run.prepared
    test = prepared.pairs.iloc[prepared.part_rows("test")]
    probability = predict(tiny_run.load_model(), prepared.part("test"))["cvr"]
    users = prepared.raw["user"]["user_id"][test["user_row"]]
    total = weight = 0
    for user in np.unique(users):
        label = test["cvr"].to_numpy()[users == user]
        if 0 < label.sum() < len(label):
            total += len(label) * roc_auc_score(label, probability[users == user])
            weight += len(label)
    measured = evaluate_model(tiny_run.load_model(), prepared, "test")["test"]["cvr"]["gauc"]
    assert measured == pytest.approx(total / weight, abs=1e-9)


def test_another_part_keeps_the_first(tiny_run):
    first = evaluate_run(tiny_run, "test", report=silent)
    both = evaluate_run(tiny_run, "train", report=silent)
    assert set(both) == TEST_SPLITS | {"train", "train_warm_users", "train_cold_users"}
    assert {split: both[split] for split in TEST_SPLITS} == first
    # Every user of the training part is known, so nothing can be said of new ones.
    assert both["train_cold_users"]["ctr"] == {**dict.fromkeys(METRICS), "rows": 0, "positives": 0}
    assert json.loads(tiny_run.report_file.read_text()) == both


def test_pictures_show_something(tiny_run):
    evaluate_run(tiny_run, "validation", report=silent)
    files = [tiny_run.figures / name for name in ("validation_roc.png", "validation_calibration.png")]
    assert sorted(tiny_run.figures.iterdir()) == sorted(files)
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
        pixels = imread(file)
        assert min(pixels.shape[:2]) > 500
        # Two curves of their own colours on white.
        colours = {tuple(colour) for colour in np.round(pixels[..., :3] * 255).astype(int).reshape(-1, 3)}
        assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (255, 255, 255)} <= colours


@pytest.mark.parametrize("figure_of", [roc_figure, calibration_figure])
def test_curves_differ_without_colour_and_axes_are_labelled(figure_of):
    curves = {
        "CTR": (np.array([0, 1, 1, 0]), np.array([0.1, 0.9, 0.4, 0.6])),
        "CVR": (np.array([0, 1, 0, 0]), np.array([0.2, 0.7, 0.6, 0.1])),
    }
    (axes,) = figure_of(curves, "test").axes
    styles = [(line.get_linestyle(), line.get_marker()) for line in axes.lines]
    assert len(styles) >= 3 and len(set(styles)) == len(styles)
    assert axes.get_xlabel() and axes.get_ylabel()
    assert "test part, 4 rows" in axes.get_title()
    assert "CTR 0.7500" in axes.get_title() and "CVR 1.0000" in axes.get_title()


def test_roc_figure_draws_no_curve_of_one_class():
    scores = np.array([0.2, 0.8, 0.4])
    (axes,) = roc_figure({"CTR": (np.ones(3), scores), "CVR": (np.array([0, 1, 0]), scores)}, "test").axes
    by_label = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert len(by_label["CTR, AUC -, 3 rows"]) == 0
    assert len(by_label["CVR, AUC 1.0000, 3 rows"]) > 0


def test_results_table_is_aligned():
    metrics = {"auc": 0.5, "gauc": None, "log_loss": 0.6931, "calibration_error": 0.01, "rows": 12345, "positives": 9}
    tasks = {"ctr": metrics, "cvr": {**metrics, "auc_clicked": 0.25}}
    report = {"test": tasks, "test_warm_users": tasks, "validation": tasks}
    lines = results_table(report, "test").splitlines()
    assert lines[0].split("  ")[0] == "task"
    assert [line.split()[:2] for line in lines[2:]] == [
        *(["ctr", "all"], ["ctr", "warm"], ["cvr", "all"], ["cvr", "warm"]),
    ]
    assert len({len(line) for line in lines}) == 1
    assert lines[4].split() == ["cvr", "all", "12,345", "9", "0.5000", "0.2500", "-", "0.6931", "0.0100"]
    assert lines[2].split() == ["ctr", "all", "12,345", "9", "0.5000", "-", "-", "0.6931", "0.0100"]


def test_results_table_of_a_part_that_was_not_evaluated():
    with pytest.raises(ValueError, match=r"no split 'test'. It has: \['train'\]"):
        results_table({"train": {}}, "test")


def test_an_unknown_part_is_an_error(tiny_run):
    with pytest.raises(ValueError, match=r"Unknown part of the data.*'tset'"):
        evaluate_run(tiny_run, "tset", report=silent)


def test_an_empty_part_is_an_error(tiny_run):
    prepared = tiny_run.prepared
    only_train = dataclasses.replace(prepared, pairs=prepared.pairs.assign(part=0))
    with pytest.raises(DataError, match="test part of the prepared data has no rows"):
        evaluate_model(tiny_run.load_model(), only_train, "test")


def test_a_run_without_checkpoint_is_an_error(tiny_run):
    tiny_run.checkpoint.unlink()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        evaluate_run(tiny_run, report=silent)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_report_is_an_error_and_stays(tiny_run, content):
    tiny_run.report_file.write_text(content)
    with pytest.raises(RunError, match="Delete it and evaluate again"):
        evaluate_run(tiny_run, report=silent)
    assert tiny_run.report_file.read_text() == content and not tiny_run.figures.exists()


def test_predict_needs_a_two_tower_model(tiny_run):
    inputs = {
        name: keras.Input(tensor.shape[1:], name=name, dtype=tensor.dtype)
        for name, tensor in tiny_run.load_model().input.items()
    }
    other = keras.Model(inputs, keras.layers.Dense(1)(keras.ops.cast(inputs["age"], "float32")[:, None]))
    with pytest.raises(ValueError, match="two-tower model"):
        predict(other, tiny_run.prepared.part("test"))


def test_regression_figure_shows_the_bins_of_values():
    labels, values = np.array([1.0, 3.0, 5.0]), np.array([2.0, 3.0, 4.0])
    (axes,) = regression_figure({"rating": (labels, values)}, "test").axes
    diagonal, line = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [1.0, 5.0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2.0, 3.0, 4.0], [1.0, 3.0, 5.0])
    assert "test part, 3 rows" in axes.get_title() and f"rating {np.sqrt(2 / 3):.4f}" in axes.get_title()
    assert axes.get_xlabel() and axes.get_ylabel()


def test_conversion_given_a_click_and_ratings_are_reported(tiny_run):
    """CVR over all impressions is the product, over the clicked rows the conditional; ratings of rated pairs only."""
    prepared = tiny_run.prepared
    config = dataclasses.replace(tiny_run.config.model, tasks=("ctr", "cvr", "rating"), conversion="esmm")
    model = build_model("mvke", prepared.schema_for(config), config)
    data = prepared.part("test", ("ctr", "cvr", "rating"))
    vectors = {}
    for side, rows in (("user", data.user_rows), ("item", data.item_rows)):
        part = tower(model, side)
        table = {name: prepared.encoded[side][name][rows] for name in part.input}
        vectors[side] = {task: np.asarray(vector, np.float64) for task, vector in part(table).items()}
    dots = {task: np.sum(vectors["user"][task] * vectors["item"][task], axis=1) for task in vectors["user"]}
    click, given = (1 / (1 + np.exp(-dots[task])) for task in ("ctr", "cvr"))
    np.testing.assert_allclose(predict(model, data)["cvr"], click * given, atol=1e-6)
    np.testing.assert_allclose(predict_conditional(model, data)["cvr"], given, atol=1e-6)

    report = evaluate_model(model, prepared, "test")["test"]
    labels, clicked = data.labels["cvr"], data.labels["ctr"] == 1
    assert report["cvr"]["auc"] == pytest.approx(roc_auc_score(labels, click * given), abs=1e-6)
    assert report["cvr"]["auc_clicked"] == pytest.approx(roc_auc_score(labels[clicked], given[clicked]), abs=1e-6)
    rated = data.labels["rating"] > 0
    mean = prepared.pairs["rating"][(prepared.pairs["part"] == 0) & (prepared.pairs["rating"] > 0)].mean()
    errors = data.labels["rating"][rated] - (round(mean, 4) + dots["rating"][rated])
    assert report["rating"]["rows"] == rated.sum() < len(rated)
    assert report["rating"]["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), abs=1e-5)
    assert report["rating"]["mse"] == pytest.approx(np.mean(errors**2), abs=1e-5)
    assert report["rating"]["mae"] == pytest.approx(np.mean(np.abs(errors)), abs=1e-5)
    table = results_table({"test": report}, "test").splitlines()
    assert table[0].split()[-3:] == ["mse", "rmse", "mae"]
    assert table[-1].split()[-3:] == [f"{report['rating'][name]:.4f}" for name in ("mse", "rmse", "mae")]


def test_a_model_without_conditional_task_has_no_conditional_predictions(tiny_run):
    assert predict_conditional(tiny_run.load_model(), tiny_run.prepared.part("test")) == {}
