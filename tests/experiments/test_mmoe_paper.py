# SPDX-License-Identifier: Apache-2.0
import csv
import dataclasses
import runpy
import sys

import numpy as np
import pytest

from mvke_tf.experiments import mmoe_paper
from mvke_tf.experiments.mmoe_paper import (
    MODELS,
    Cell,
    ExperimentConfig,
    StackedModels,
    build_experiment_model,
    figure,
    results_table,
    run_experiment,
    searched,
    train_cells,
    verdict,
)
from mvke_tf.experiments.two_tasks import two_task_regression
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "scripts" / "synthetic_experiment.py"
TINY = ExperimentConfig(steps=20, points=2, test_rows=50, learning_rates=(0.1, 0.2), num_features=10)


def cells_with(losses):
    """Trainings whose final losses are `{model: {correlation: [loss of each seed]}}`."""
    return [
        Cell(model, correlation, seed, 0.01, 10, (5, 10), (9.0, loss), loss)
        for model, by_correlation in losses.items()
        for correlation, final in by_correlation.items()
        for seed, loss in enumerate(final)
    ]


# At 0.5 the paper's ordering, at 1.0 no difference; seeds differ more than models do.
PAPER = cells_with(
    {
        "mmoe": {0.5: [1.0, 2.0, 3.0], 1.0: [1.0, 2.0, 3.0]},
        "omoe": {0.5: [1.5, 2.51, 3.5], 1.0: [1.01, 1.99, 3.0]},
        "shared_bottom": {0.5: [2.0, 3.0, 4.02], 1.0: [1.0, 2.02, 3.0]},
    }
)


def test_the_models_are_those_of_the_paper():
    shapes = {
        name: [tuple(weight.shape) for weight in build_experiment_model(name).trainable_variables]
        for name in ("mmoe", "omoe", "shared_bottom")
    }
    towers = [(16, 8), (8,), (8, 1), (1,)] * 2
    gate = [(100, 8), (8,)]
    assert sorted(shapes["mmoe"]) == sorted([(8, 100, 16), (8, 1, 16), *gate, *gate, *towers])
    assert sorted(shapes["omoe"]) == sorted([(8, 100, 16), (8, 1, 16), *gate, *towers])
    # 113 as in the paper: (100 * 16 * 8 + 16 * 8 * 2) / (100 + 8 * 2) = 112.6.
    assert sorted(shapes["shared_bottom"]) == sorted([(100, 113), (113,), *[(113, 8), (8,), (8, 1), (1,)] * 2])
    with pytest.raises(ValueError, match=r"\['mmoe', 'omoe', 'shared_bottom'\]. Received: 'moe'"):
        build_experiment_model("moe")


@pytest.mark.parametrize("name", MODELS)
def test_stacked_models_are_the_models_side_by_side(name):
    models = [build_experiment_model(name, 6) for _ in range(3)]
    x = np.random.default_rng(0).normal(size=(5, 3, 6)).astype("float32")
    stacked = np.asarray(StackedModels(name, models)(x))
    for seed, model in enumerate(models):
        outputs = model(x[:, seed])
        expected = np.concatenate([outputs["task_0"], outputs["task_1"]], axis=1)
        np.testing.assert_allclose(stacked[:, seed], expected, rtol=1e-5, atol=1e-6)


def test_trainings_learn_and_do_not_depend_on_each_other():
    config = ExperimentConfig(steps=40, points=2, batch_size=128, test_rows=500, num_features=4)
    data = {seed: two_task_regression(40 * 128 + 1000, 0.5, 4, seed=seed) for seed in (3, 8)}
    for model in MODELS:
        cells = train_cells(model, 0.5, data, 0.02, config)
        assert [(cell.model, cell.correlation, cell.seed, cell.steps) for cell in cells] == [
            (model, 0.5, seed, (20, 40)) for seed in data
        ]
        for cell in cells:
            assert cell.losses[1] < cell.losses[0] < data[cell.seed].labels.var()
            assert cell.validation == pytest.approx(cell.losses[1], rel=0.5) and cell.validation != cell.losses[1]
            assert cell.parameters == build_experiment_model(model, 4).count_params()
    (alone,) = train_cells(model, 0.5, {8: data[8]}, 0.02, config)
    assert alone.losses == pytest.approx(cells[1].losses, rel=1e-4)


def test_a_loss_that_is_not_finite_is_an_error():
    data = two_task_regression(4 * 64 + 20, 0.5, 4)
    data.labels[:] = np.inf
    config = ExperimentConfig(4, 1, test_rows=10, num_features=4)
    with pytest.raises(ValueError, match=r"test losses of shared_bottom at correlation 0.5 must be finite; try lower"):
        train_cells("shared_bottom", 0.5, {0: data}, 0.01, config)


def test_the_learning_rate_is_that_of_the_lowest_validation_loss():
    """Not of the lowest test loss, and for each model by itself."""
    cells = [
        Cell(model, 0.5, seed, rate, 10, (5,), (test + seed,), validation + seed)
        for model, rate, test, validation in (
            ("mmoe", 0.1, 5.0, 1.0),
            ("mmoe", 0.2, 1.0, 2.0),
            ("omoe", 0.1, 1.0, 3.0),
            ("omoe", 0.2, 5.0, 2.0),
        )
        for seed in (0, 1)
    ]
    assert [(cell.model, cell.learning_rate) for cell in searched(cells)] == [("mmoe", 0.1)] * 2 + [("omoe", 0.2)] * 2


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by losses that follow from the cell; the trainings that took place."""
    calls = []

    def train(model, correlation, data, rate, config):
        rows = config.steps * config.batch_size + 2 * config.test_rows
        assert all(len(each.features) == rows for each in data.values())
        calls.append((model, correlation, rate, tuple(data)))
        losses = {seed: 1.0 + seed / 10 + list(MODELS).index(model) for seed in data}
        steps = (config.steps // 2, config.steps)
        return [Cell(model, correlation, seed, rate, 10, steps, (9.0, loss), rate) for seed, loss in losses.items()]

    monkeypatch.setattr(mmoe_paper, "train_cells", train)
    return calls


def test_finished_trainings_are_not_repeated(tmp_path, trained):
    first = run_experiment(tmp_path, [1.0, 0.5], 2, TINY, progress=False)
    assert len(first) == 24 and len(trained) == 12
    assert trained[:3] == [("mmoe", 0.5, 0.1, (0, 1)), ("mmoe", 0.5, 0.2, (0, 1)), ("omoe", 0.5, 0.1, (0, 1))]
    # One training is lost, and a seed is wanted more.
    (tmp_path / "cells" / "omoe_0.5_0.1_1.json").unlink()
    trained.clear()
    again = run_experiment(tmp_path, [0.5, 1.0], 3, TINY, progress=False)
    assert trained[:3] == [("mmoe", 0.5, 0.1, (2,)), ("mmoe", 0.5, 0.2, (2,)), ("omoe", 0.5, 0.1, (1, 2))]
    assert len(again) == 36 and {cell for cell in first} < set(again)

    with pytest.raises(ValueError, match=r"other settings; choose another folder.*'steps': 40.*Received.*'steps': 20"):
        run_experiment(tmp_path, [0.5], 2, ExperimentConfig(40, 2, 64, 50, (0.1,), 10), progress=False)
    (tmp_path / "cells" / "omoe_0.5_0.1_1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"omoe_0.5_0.1_1.json is damaged; delete it"):
        run_experiment(tmp_path, [0.5], 2, TINY, progress=False)


def test_the_verdict_follows_the_numbers():
    lines = verdict(PAPER).splitlines()
    assert lines[0].startswith("Correlation 0.5: the paper's ordering appears: MMoE better than one-gate MoE (+0.5033")
    assert "one-gate MoE better than shared bottom (+0.5033" in lines[0]
    assert lines[1].startswith(
        "Correlation 1: the paper's ordering does not appear: MMoE not told apart from one-gate MoE (+0.0000"
    )
    assert "gap between MMoE and one-gate MoE grows (+0.5033" in lines[2]
    assert "gap between MMoE and shared bottom grows (+1.0000" in lines[3]

    names = {"mmoe": "shared_bottom", "shared_bottom": "mmoe", "omoe": "omoe"}
    turned = [dataclasses.replace(cell, model=names[cell.model]) for cell in PAPER]
    lines = verdict(turned).splitlines()
    assert "does not appear: MMoE worse than one-gate MoE (-0.5033" in lines[0]
    assert "shared bottom shrinks (-1.0000" in lines[3]


def test_table():
    lines = results_table(PAPER).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[3:-1]] == ["correlation 0.5", "correlation 1"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("MMoE", "10", "2.0000 ± 2.4841 (0.01)", "2.0000 ± 2.4841 (0.01)")
    ]


def test_figure_shows_every_model_with_its_interval():
    panels = figure(PAPER).axes
    assert [panel.get_title() for panel in panels] == ["correlation 0.5", "correlation 1"]
    for panel in panels:
        assert [line.get_label() for line in panel.lines] == ["MMoE", "one-gate MoE", "shared bottom"]
        assert (
            len({line.get_linestyle() for line in panel.lines}) == len({line.get_marker() for line in panel.lines}) == 3
        )
        assert len(panel.collections) == 3
    np.testing.assert_allclose(panels[0].lines[1].get_ydata(), [9.0, np.mean([1.5, 2.51, 3.5])])


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the script: its status, output and error output."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


def test_script(script, tmp_path, trained):
    arguments = ("--output_dir", tmp_path, "--seeds", 2, "--steps", 6, "--points", 2, "--correlations", 0.5)
    status, output, _ = script(*arguments)
    assert status == 0 and len(trained) == 9
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[13] == {
        **{"model": "omoe", "correlation": "0.5", "seed": "0", "learning_rate": "0.0001"},
        **{"parameters": "10", "step": "6", "test_loss": "2.0"},
    }
    assert len(rows) == 36
    # 12.7062 is Student's t of one degree of freedom.
    assert f"| MMoE          | 10         | 1.0500 ± {12.7062 * 0.05:.4f} (0.0001)" in output
    assert "Correlation 0.5: the paper's ordering appears: MMoE better than one-gate MoE (+1.0000 ± 0.0000)" in output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "figure.png", "results.csv"]
    # What is there already is only read.
    assert script(*arguments)[1] == output and len(trained) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "1"), "need two seeds or more"),
        (("--steps", "10", "--points", "3"), "`points` divide `steps`"),
        (("--seeds", "x"), "a whole number of at least 1"),
    ],
)
def test_script_errors(script, tmp_path, arguments, message):
    status, output, error = script("--output_dir", tmp_path / "none", *arguments)
    assert status == 2 and message in error and output == ""
    assert not (tmp_path / "none").exists()
