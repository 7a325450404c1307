import csv
import runpy
import sys

import numpy as np
import pytest

from mvke_tf.experiments import mmoe_paper
from mvke_tf.experiments.mmoe_paper import (
    MODELS,
    Cell,
    ExperimentConfig,
    build_experiment_model,
    figure,
    results_table,
    run_experiment,
    train_cell,
    verdict,
)
from mvke_tf.experiments.two_tasks import two_task_regression
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "synthetic_experiment.py"
TINY = ExperimentConfig(steps=20, points=2, test_rows=50, num_features=10)


def cells_with(losses):
    """Trainings whose final losses are `{model: {correlation: [loss of each seed]}}`."""
    return [
        Cell(model, correlation, seed, 10, (5, 10), (9.0, loss))
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


def test_trainings_learn_and_are_repeatable():
    config = ExperimentConfig(steps=200, points=2, test_rows=500, learning_rate=0.01, num_features=4)
    data = two_task_regression(200 * 64 + 500, 0.5, 4)
    cells = {model: train_cell(model, 0.5, 3, data, config) for model in MODELS}
    for model, cell in cells.items():
        assert (cell.model, cell.correlation, cell.seed, cell.steps) == (model, 0.5, 3, (100, 200))
        assert cell.losses[1] < cell.losses[0] < data.labels.var()
        assert cell.parameters == build_experiment_model(model, 4).count_params()
    assert train_cell("omoe", 0.5, 3, data, config).losses == pytest.approx(cells["omoe"].losses, rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error():
    data = two_task_regression(4 * 64 + 10, 0.5, 4)
    data.labels[:] = np.inf
    with pytest.raises(
        ValueError, match=r"test loss of shared_bottom at correlation 0.5, seed 0, must be finite; try a lower"
    ):
        train_cell("shared_bottom", 0.5, 0, data, ExperimentConfig(4, 1, test_rows=10, num_features=4))


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by losses that follow from the cell; the trainings that took place."""
    calls = []

    def train(model, correlation, seed, data, config):
        assert len(data.features) == config.steps * config.batch_size + config.test_rows
        calls.append((model, correlation, seed))
        loss = 1.0 + seed / 10 + list(MODELS).index(model)
        return Cell(model, correlation, seed, 10, (config.steps // 2, config.steps), (9.0, loss))

    monkeypatch.setattr(mmoe_paper, "train_cell", train)
    return calls


def test_finished_trainings_are_not_repeated(tmp_path, trained):
    first = run_experiment(tmp_path, [1.0, 0.5], 2, TINY, progress=False)
    assert len(trained) == 12 and trained[:4] == [*((model, 0.5, 0) for model in MODELS), ("mmoe", 1.0, 0)]
    # One training is lost, and a seed is wanted more.
    (tmp_path / "cells" / "omoe_0.5_1.json").unlink()
    trained.clear()
    again = run_experiment(tmp_path, [0.5, 1.0], 3, TINY, progress=False)
    assert trained == [("omoe", 0.5, 1), *((model, p, 2) for p in (0.5, 1.0) for model in MODELS)]
    assert again[:12] == first

    with pytest.raises(ValueError, match=r"other settings; choose another folder.*'steps': 40.*Received.*'steps': 20"):
        run_experiment(tmp_path, [0.5], 2, ExperimentConfig(40, 2, 64, 50, 3e-3, 10), progress=False)
    (tmp_path / "cells" / "omoe_0.5_1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"omoe_0.5_1.json is damaged; delete it"):
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
    turned = [Cell(names[c.model], c.correlation, c.seed, c.parameters, c.steps, c.losses) for c in PAPER]
    lines = verdict(turned).splitlines()
    assert "does not appear: MMoE worse than one-gate MoE (-0.5033" in lines[0]
    assert "shared bottom shrinks (-1.0000" in lines[3]


def test_table():
    lines = results_table(PAPER).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[3:-1]] == ["correlation 0.5", "correlation 1"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["MMoE", "10", "2.0000 ± 2.4841", "2.0000 ± 2.4841"]


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
    assert status == 0 and len(trained) == 6
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[3] == {
        **{"model": "omoe", "correlation": "0.5", "seed": "0", "parameters": "10", "step": "6", "test_loss": "2.0"}
    }
    assert len(rows) == 12
    # 12.7062 is Student's t of one degree of freedom.
    assert f"| MMoE          | 10         | 1.0500 ± {12.7062 * 0.05:.4f} " in output
    assert "Correlation 0.5: the paper's ordering appears: MMoE better than one-gate MoE (+1.0000 ± 0.0000)" in output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "figure.png", "results.csv"]
    # What is there already is only read.
    assert script(*arguments)[1] == output and len(trained) == 6


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
