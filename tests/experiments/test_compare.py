# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from matplotlib.image import imread
from scipy import stats

import mvke_tf.experiments.compare
from mvke_tf import cli
from mvke_tf.config import MODEL_NAMES, ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepared_dataset
from mvke_tf.errors import ConfigError, RunError
from mvke_tf.experiments.compare import Comparison
from mvke_tf.experiments.compare_tables import comparison_figure, markdown, own_settings, summary
from mvke_tf.experiments.runs import finished_run
from mvke_tf.models import unread_settings
from mvke_tf.run import Run
from tests.conftest import REPOSITORY
from tests.small import small_prepared, small_toml

# What the fixture `eager` costs.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`"),
]
CONFIG = RunConfig(
    model=ModelConfig(embedding_dim=4, hidden_dims=(4,), embedding_stddev=1.0),
    training=TrainingConfig(epochs=1, batch_size=128),
)
TASKS = ("click", "buy")
# Runs, in the order in which they are made.
RUNS = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("single_task_click", "single_task_buy", "shared_bottom")]


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Building graphs is most of the time that such small runs take."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module")
def compared_data(tmp_path_factory):
    """The small dataset as `mvke compare --data` prepares it: the declaration, and the prepared data."""
    folder = tmp_path_factory.mktemp("data")
    path = small_toml(folder)
    return path, prepared_dataset(Dataset.from_toml(path), folder / "data")


@pytest.fixture(scope="module")
def comparison(compared_data):
    def make(folder: Path, *models: str, config: RunConfig = CONFIG, seeds: int = 2) -> Comparison:
        return Comparison(folder / "out", dict.fromkeys(models, config), seeds, compared_data[1])

    return make


def test_a_baseline_that_cannot_be_fitted_claims_no_folder(tmp_path, comparison, monkeypatch):
    def refused(*arguments):
        raise ConfigError("leave it or the task out")

    monkeypatch.setattr(mvke_tf.experiments.compare, "check_baseline", refused)
    with pytest.raises(ConfigError, match="leave it"):
        comparison(tmp_path, "shared_bottom", "popularity").run()
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, comparison):
    """A comparison that was interrupted in its fourth run and then finished: folder, table, runs of each call."""
    folder = tmp_path_factory.mktemp("comparison")
    whole = mvke_tf.experiments.compare.finished_run
    calls = []

    def recorded(config, run_folder, prepared, *rest):
        calls.append(run_folder.name)
        if len(calls) == 4:
            # Killed as soon as the run directory was made.
            Run.create(run_folder, config, prepared)
            raise KeyboardInterrupt
        return whole(config, run_folder, prepared, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvke_tf.experiments.compare, "finished_run", recorded)
        compared = comparison(folder, "single_task", "shared_bottom", "popularity")
        with pytest.raises(KeyboardInterrupt):
            compared.run()
        first, halfway = list(calls), pd.read_csv(folder / "out" / "table.csv")
        table = compared.run()
    return folder, table, first, calls[len(first) :], halfway


def report_of(folder: Path, run: str) -> dict:
    return json.loads((folder / "out" / "runs" / run / "report.json").read_text())


def test_only_what_is_missing_is_made(interrupted):
    folder, _, first, second, halfway = interrupted
    assert first == RUNS[:4] and second == RUNS[3:]
    # The seed that was finished has its table already.
    assert halfway["seeds"].tolist() == [1, 1, 1] and halfway["click_auc_ci95"].isna().all()
    assert {path.name for path in (folder / "out" / "runs").iterdir()} == {*RUNS, "popularity-seed0"}
    for name in RUNS:
        run = Run(folder / "out" / "runs" / name)
        assert run.checkpoint.is_file() and run.log_file.is_file() and not run.state_file.exists()
        assert run.config.training == dataclasses.replace(CONFIG.training, seed=int(name[-1]))
    assert (folder / "out" / "training.log").read_text().count("  score ") == len(RUNS)


def test_results_are_those_of_the_reports(interrupted):
    folder, *_ = interrupted
    results = pd.read_csv(folder / "out" / "results.csv").set_index(["model", "seed"])
    assert len(results) == 5
    for seed in (0, 1):
        shared = report_of(folder, f"shared_bottom-seed{seed}")
        alone = {task: report_of(folder, f"single_task_{task}-seed{seed}") for task in TASKS}
        assert shared["test"] != shared["validation"]
        for part in ("validation", "test"):
            row = results.loc["shared_bottom", seed]
            for task, metrics in shared[part].items():
                for name, value in metrics.items():
                    assert row[f"{part}_{task}_{name}"] == pytest.approx(value)
                assert results.loc["single_task", seed][f"{part}_{task}_auc"] == alone[task][part][task]["auc"]
            assert row[f"{part}_mean_auc"] == pytest.approx(np.mean([shared[part][task]["auc"] for task in TASKS]))
        models = {
            name: Run(folder / "out" / "runs" / f"{name}-seed{seed}") for name in ("single_task_click", "shared_bottom")
        }
        assert results.loc["shared_bottom", seed]["parameters"] == models["shared_bottom"].load_model().count_params()
        # Two networks of the same shape, and both have to see every pair.
        assert (
            results.loc["single_task", seed]["parameters"]
            == 2 * models["single_task_click"].load_model().count_params()
        )
        speeds = [
            pd.read_csv(folder / "out" / "runs" / f"single_task_{task}-seed{seed}" / "log.csv")["examples_per_second"][
                0
            ]
            for task in TASKS
        ]
        expected = speeds[0] * speeds[1] / sum(speeds)
        assert results.loc["single_task", seed]["examples_per_second"] == pytest.approx(expected)
        assert results.loc["single_task", seed]["epochs"] == 2
    assert math.isnan(results.loc["popularity", 0]["examples_per_second"])


def test_table_is_computed_from_the_results(interrupted):
    folder, table, *_ = interrupted
    assert table["model"].tolist() == ["single_task", "shared_bottom", "popularity"]
    by_model = table.set_index("model")
    areas = {
        "single_task": [report_of(folder, f"single_task_buy-seed{seed}")["test"]["buy"]["auc"] for seed in (0, 1)],
        "shared_bottom": [report_of(folder, f"shared_bottom-seed{seed}")["test"]["buy"]["auc"] for seed in (0, 1)],
        # Its one row stands for both seeds.
        "popularity": [report_of(folder, "popularity-seed0")["test"]["buy"]["auc"]] * 2,
    }
    for model, (first, second) in areas.items():
        assert by_model.loc[model, "buy_auc"] == pytest.approx((first + second) / 2)
    first, second = areas["shared_bottom"]
    # Two seeds: half the distance, times the 97.5 % point of t with 1 degree of freedom.
    assert by_model.loc["shared_bottom", "buy_auc_ci95"] == pytest.approx(abs(first - second) / 2 * 12.7062, rel=1e-4)
    assert math.isnan(by_model.loc["popularity", "buy_auc_ci95"])
    p_values = [stats.ttest_rel(areas[model], areas["single_task"]).pvalue for model in ("shared_bottom", "popularity")]
    smaller, larger = sorted(p_values)
    corrected = {smaller: min(1, 2 * smaller), larger: max(min(1, 2 * smaller), larger)}
    for model, p_value in zip(("shared_bottom", "popularity"), p_values, strict=True):
        assert by_model.loc[model, "buy_auc_p"] == pytest.approx(corrected[p_value])
    assert math.isnan(by_model.loc["single_task", "buy_auc_p"])
    pd.testing.assert_frame_equal(pd.read_csv(folder / "out" / "table.csv"), table, check_dtype=False)
    row = next(line for line in (folder / "out" / "table.md").read_text().splitlines() if "| shared_bottom" in line)
    cell = f"{by_model.loc['shared_bottom', 'click_auc']:.4f} ± {by_model.loc['shared_bottom', 'click_auc_ci95']:.4f}"
    assert row.split(" | ")[1] == cell
    assert imread(folder / "out" / "comparison.png").std() > 0.01


def test_the_table_names_the_settings_in_which_models_differ(interrupted):
    _, table, *_ = interrupted
    wide = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, hidden_dims=(8, 4), num_virtual_kernels=3),
        training=dataclasses.replace(CONFIG.training, learning_rate=0.5),
    )
    settings = own_settings({"single_task": CONFIG, "shared_bottom": wide, "mvke": CONFIG, "popularity": CONFIG})
    # Only MVKE reads the number of kernels.
    assert settings == {
        "hidden_dims": {"single_task": (4,), "shared_bottom": (8, 4), "mvke": (4,)},
        "learning_rate": {"single_task": 0.001, "shared_bottom": 0.5, "mvke": 0.001},
    }
    lines = markdown(table, "data", settings).splitlines()
    assert lines[-4:] == [
        "| model | hidden_dims | learning_rate |",
        "| --- | ---: | ---: |",
        "| single_task | 4 | 0.001 |",
        "| shared_bottom | 8, 4 | 0.5 |",
    ]
    assert own_settings({"single_task": CONFIG, "shared_bottom": CONFIG}) == {}
    assert markdown(table, "data", {}) == markdown(table, "data") and "differ;" not in markdown(table, "data")


def test_a_run_does_not_depend_on_those_before_it(interrupted, comparison, tmp_path):
    folder, *_ = interrupted
    comparison(tmp_path, "shared_bottom", seeds=1).run()
    assert report_of(tmp_path, "shared_bottom-seed0") == report_of(folder, "shared_bottom-seed0")
    assert report_of(folder, "shared_bottom-seed0") != report_of(folder, "shared_bottom-seed1")
    assert "there is no test of transfer" in (tmp_path / "out" / "table.md").read_text()


def test_other_settings_are_refused_and_more_models_are_not(interrupted, comparison, compared_data):
    folder, *_ = interrupted
    before = (folder / "out" / "comparison.json").read_bytes()
    other = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, learning_rate=0.5))
    with pytest.raises(RunError, match=r"single_task: training.learning_rate was 0.001, received 0.5"):
        comparison(folder, "single_task", config=other).run()
    longer = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, epochs=9))
    with pytest.raises(ConfigError, match=r"need one `training.epochs`. Received: 1 of single_task and 9 of mvke"):
        comparison(folder, "mvke", config=longer).run()
    assert (folder / "out" / "comparison.json").read_bytes() == before
    with pytest.raises(RunError, match=r"data were .*, received"):
        Comparison(folder / "out", {"shared_bottom": CONFIG}, 1, small_prepared(**{"split.by": "random"})).run()
    assert (folder / "out" / "comparison.json").read_bytes() == before
    Comparison(folder / "out", {"mvke": other}, 1, compared_data[1])._claim_folder()
    assert set(json.loads((folder / "out" / "comparison.json").read_text())["models"]) == {
        *("single_task", "shared_bottom", "popularity", "mvke")
    }


def test_single_task_learns_each_task_by_itself(comparison, tmp_path):
    model = dataclasses.replace(CONFIG.model, objective="joint")
    training = dataclasses.replace(CONFIG.training, task_weights=(1.0, 2.0))
    compared = comparison(tmp_path, "single_task", "mvke", config=RunConfig(model, training))
    assert compared.run_configs("mvke", 1)["mvke-seed1"].model.objective == "joint"
    runs = compared.run_configs("single_task", 1)
    assert list(runs) == ["single_task_click-seed1", "single_task_buy-seed1"]
    for task, config in zip(TASKS, runs.values(), strict=True):
        assert (config.model.tasks, config.model.objective) == ((task,), "marginal")
        assert (config.training.task_weights, config.training.seed) == ((), 1)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({}, r"at least one model and one seed. Received: models=\[\]"),
        ({"mvk": CONFIG}, "Unknown model"),
        (
            {"mvke": CONFIG, "mmoe": dataclasses.replace(CONFIG, model=ModelConfig(tasks=("click",)))},
            r"one `model.tasks`. Received: \(\) of mvke and \('click',\) of mmoe",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(configs, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Comparison(tmp_path / "out", configs, 2, small_prepared())


def made_up(**areas) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": model,
            "seed": seed,
            "test_click_auc": area,
            "test_click_log_loss": 1 - area,
            "parameters": 1234,
            "examples_per_second": None if model == "lightgbm" else 1000.0,
            "epochs": 3,
        }
        for model, values in areas.items()
        for seed, area in enumerate(values)
    )


def test_a_run_of_other_settings_is_not_taken(tiny_run, tmp_path):
    before = {path: path.read_bytes() for path in tiny_run.folder.iterdir() if path.is_file()}
    with pytest.raises(RunError, match="holds a run of other settings"):
        finished_run(CONFIG, tiny_run.folder, tiny_run.prepared, tmp_path / "log")
    assert {path: path.read_bytes() for path in tiny_run.folder.iterdir() if path.is_file()} == before


def test_transfer_is_named_where_it_is_significant():
    results = made_up(
        # Constant differences would leave the test no variance.
        mvke=[0.951, 0.96, 0.97],
        mmoe=[0.90, 0.93, 0.90],
        ple=[0.85, 0.862, 0.87],
        single_task=[0.90, 0.91, 0.92],
        lightgbm=[0.50, 0.511, 0.52],
    )
    table = summary(results, list(dict.fromkeys(results["model"])), ("click",))
    text = markdown(table, "here")
    assert "Holm-corrected over the 4 models" in text
    lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[3].splitlines()]
    assert lines[0] == ["model", "CLICK AUC", "against single_task"]
    assert lines[2][1].startswith("+0.0503 (p ")
    said = {line[0]: line[-1] for line in lines[2:]}
    assert said == {
        "mvke": "positive transfer: CLICK AUC",
        "mmoe": "no significant difference",
        "ple": "negative transfer: CLICK AUC",
        "lightgbm": "worse: CLICK AUC",
    }
    row = next(line for line in text.splitlines() if line.startswith("| lightgbm"))
    assert row.split(" | ")[2:4] == ["1,234", "-"]
    (axes,) = comparison_figure(table, "here").axes
    assert axes.get_xlabel() == "CLICK AUC" and [tick.get_text() for tick in axes.get_yticklabels()] == [
        *table["model"]
    ]
    # LightGBM lies far beyond the networks: an arrow with its value.
    assert [text.get_text() for text in axes.texts] == ["0.5103"]
    shown = {round(container.lines[0].get_xdata()[0], 6) for container in axes.containers}
    assert shown == {round(value, 6) for value in table["click_auc"][:4]}


def test_a_run_on_other_data_is_not_taken(tiny_run, tmp_path):
    with pytest.raises(RunError, match="holds a run on other data"):
        finished_run(tiny_run.config, tiny_run.folder, small_prepared(**{"split.by": "random"}), tmp_path / "log")


def test_the_command(interrupted, compared_data, capsys):
    folder, *_ = interrupted
    path, _ = compared_data

    def call(*arguments: object) -> tuple[int, str, str]:
        settings = ["--embedding_dim=4", "--epochs=1", "--batch_size=128", "--embedding_stddev=1", "--hidden_dims", "4"]
        where = ["--data", path, "--data_dir", path.parent / "data", "--out", folder / "out"]
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *settings, *map(str, [*where, *arguments])])
        return ended.value.code, *capsys.readouterr()

    status, output, error = call("--models", "single_task", "shared_bottom", "popularity", "--seeds", 2)
    assert status == 0, error
    assert (folder / "out" / "table.md").read_text() in output and output.endswith(f"{folder / 'out' / 'runs'}\n")
    status, _, error = call("--models", "shared_bottom", "--dropout_rate", 0.1)
    assert status == 2 and "shared_bottom: model.dropout_rate was 0.3, received 0.1" in error
    status, _, error = call("--models", "mvke", "--configs", f"mmoe={path}")
    assert status == 2 and "--configs has settings of ['mmoe'], which --models does not name." in error
    status, _, error = call("--configs", "mmoe=nowhere")
    assert status == 2 and "expected MODEL=FILE" in error


def test_the_committed_settings_are_one_comparison(tmp_path):
    """The outcomes of the searches: one file per model, all with one budget."""
    files = sorted(REPOSITORY.glob("configs/*.json"))
    configs = {path.stem: RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in files}
    # Its kernels choose (docs/analysis.md); all else is the outcome of the search of MVKE.
    choosing = configs.pop("mvke_choosing")
    changed = {"embedding_dim": 8, "num_virtual_kernels": 8, "virtual_kernel_stddev": 3.0, "attention_stddev": 0.5}
    changed_model = dataclasses.replace(configs["mvke"].model, **changed, objective="joint")
    changed_training = dataclasses.replace(configs["mvke"].training, in_batch_weight=0.1)
    assert choosing == dataclasses.replace(configs["mvke"], model=changed_model, training=changed_training)
    # No search has been made yet of the last three.
    assert set(configs) == set(MODEL_NAMES) - {"stem", "aitm", "resflow"}
    assert all(config.model.name == name and not unread_settings(config.model) for name, config in configs.items())
    assert Comparison(tmp_path, configs, 5, small_prepared()).tasks == ("click", "buy")
