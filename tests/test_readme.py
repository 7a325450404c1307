"""The README and the pages in docs/ are kept true: their Python runs, their files exist."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorflow.python.framework import config as tensorflow_config

from mvke_tf.config import DataConfig, RunConfig
from mvke_tf.data.dataset import Batches
from mvke_tf.data.groups import movielens_groups
from mvke_tf.data.prepared import Prepared, prepared_path
from mvke_tf.models.two_tower import predictions, task_kinds
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from mvke_tf.training import compile_model
from tests.conftest import REPOSITORY

PAGES = {path: path.read_text(encoding="utf-8") for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]}
README = PAGES[REPOSITORY / "README.md"]
SNIPPETS = [snippet for page in PAGES.values() for snippet in re.findall(r"```python\n(.*?)```", page, re.S)]


def run_snippet(text: str, names: dict | None = None) -> dict:
    """Executes the one snippet that holds `text`, and returns the names that it defines."""
    (snippet,) = [snippet for snippet in SNIPPETS if text in snippet]
    names = {} if names is None else names
    exec(snippet, names)
    return names


@pytest.fixture
def small_data(tiny_run, tmp_path, monkeypatch):
    """The small data set, put where the snippets look for the prepared one."""
    monkeypatch.chdir(tmp_path)
    target = prepared_path(Path("data"), DataConfig())
    target.parent.mkdir(parents=True)
    (tiny_run.folder / "prepared.npz").rename(target)
    return target


def test_own_script(small_data):
    names = run_snippet("build_mvke(prepared.schema")
    rows = len(Prepared.load(small_data).part_rows("test"))
    assert {task: weights.shape for task, weights in names["weights"].items()} == {"ctr": (rows, 3), "cvr": (rows, 4)}
    assert names["weights"]["cvr"].sum(axis=1) == pytest.approx(1.0)
    assert Path("mvke.keras").is_file()


def test_own_schema():
    names = run_snippet('Task("purchase", kernels=')
    model = names["model"]
    assert list(model.output) == ["click", "install", "purchase"]
    assert model.get_layer("gate_purchase").kernels == (3, 4, 5)
    assert model.get_layer("embedding_ad_id").input_dim == 5_001


def test_train(small_data):
    names = run_snippet("result = train(config")
    assert names["result"].run.checkpoint == Path("runs/from_python/best.keras")
    assert 0 < names["report"]["test"]["ctr"]["auc"] < 1


def test_three_tasks(small_data):
    names = run_snippet('name="mmoe",')
    assert set(names["report"]) == {"ctr", "cvr", "rating"}
    assert 0.5 < names["report"]["rating"]["rmse"] < 3
    first, second = names["log_variances"]
    assert first != second and abs(second) < 1


def test_clicked_rows_with_weights_under_xla(small_data, monkeypatch):
    # Another test may have made this process deterministic, in which there is no XLA.
    monkeypatch.setattr(tensorflow_config, "is_op_determinism_enabled", lambda: False)
    run = run_snippet('conversion="clicked"')["run"]
    (epoch,) = pd.read_csv(run.log_file).to_dict("records")
    assert epoch["loss"] == pytest.approx(epoch["ctr_loss"] + 0.5 * epoch["cvr_loss"], rel=1e-3)


def test_uncertainty_weights():
    names = run_snippet("model = with_uncertainty(plain)")
    assert names["uncertainty_layer"](names["model"]).by_task() == {"click": 0.0, "purchase": 0.0, "stars": 0.0}
    assert names["task_kinds"](names["plain"]) == {"click": "binary", "purchase": "binary", "stars": "regression"}
    assert [loss.kind for loss in names["model"].loss.values()] == ["binary", "binary", "regression"]


def test_models():
    names = run_snippet("models = [build_model(")
    assert [model.name for model in names["models"]] == ["mvke", "mmoe", "cgc", "ple", "shared_bottom", "hard_sharing"]
    assert list(names["click_alone"].output) == ["ctr"]
    separate = names["models"][0].get_layer("virtual_kernel_experts")
    assert names["one_network"].get_layer("virtual_kernel_experts").count_params() == separate.count_params() / 5
    assert [names["published"].get_layer(f"gate_{task}").experts for task in ("ctr", "cvr")] == [
        (0, 1, 2, 3, 4, 5),
        (2, 3, 4, 5, 6, 7, 8, 9),
    ]
    assert names["more_tasks"].get_layer("gate_buy").experts == (2, 3, 4)


def test_dense_mmoe():
    names = run_snippet("return_expert_weights=True")
    assert {name: output.shape for name, output in names["model"].output.items()} == {
        **{"task_0": (None, 1), "task_1": (None, 1)},
        **{"task_0_expert_weights": (None, 3), "task_1_expert_weights": (None, 3)},
    }
    assert names["deep_gates"].output["task_1"].shape == (None, 5)
    assert names["deep_gates"].get_layer("gate_hidden_task_0_0").units == 32
    assert {name: tensor.shape for name, tensor in names["recommender"].input.items()} == {
        **{"user_id": (None,), "item_id": (None,), "dense_features": (None, 8)},
    }


def test_own_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_snippet("class Bilinear")
    model, loaded, x = names["model"], names["loaded"], names["x"]
    losses = names["history"].history["loss"]
    assert losses[1] < losses[0]
    for task, output in model.predict(x, verbose=0).items():
        np.testing.assert_array_equal(loaded.predict(x, verbose=0)[task], output)
    weights = keras.Model(loaded.input, loaded.get_layer("gate_task_0").output).predict(x, verbose=0)
    assert ((weights > 0).sum(axis=1) == 2).all()


def test_synthetic_tasks():
    correlations = run_snippet("two_task_regression(num_rows")["label_correlations"]
    assert correlations[0.5] < correlations[0.9] < correlations[1.0]
    assert correlations[1.0] > 0.99


def test_comparison(small_data):
    table = run_snippet('Comparison(Path("comparisons/small")')["table"].set_index("model")
    assert list(table.index) == ["shared_bottom", "popularity"]
    results = pd.read_csv("comparisons/small/results.csv").set_index("model")
    assert table["ctr_auc"].tolist() == pytest.approx(results["test_ctr_auc"].tolist())
    model = Run(Path("comparisons/small/runs/shared_bottom-seed0")).load_model()
    assert table.loc["shared_bottom", "parameters"] == model.count_params()


def test_search(small_data):
    (trial,) = run_snippet("trials = tune(")["trials"].itertuples()
    log = pd.read_csv("tuning/small/runs/trial-000/log.csv")
    assert trial.val_score == log["val_score"].max()
    best = RunConfig.from_dict(json.loads(Path("tuning/small/best_config.json").read_text()))
    assert best.model.embedding_dim == trial.embedding_dim


@pytest.fixture
def mine(tiny_run, tmp_path, monkeypatch):
    """The small run, put where the snippets look for theirs."""
    monkeypatch.chdir(tmp_path)
    return Run(Path(shutil.copytree(tiny_run.folder, "runs/mine")))


def test_analysis(mine, capsys):
    names = run_snippet("study = Study(run.load_model()")
    sums = names["by_genre"].groupby(["task", "group"])["mean_weight"].sum()
    assert sums.to_numpy() == pytest.approx(1.0)
    why = names["why"]
    assert why["contribution"].tolist() == (why["weight"] * why["score"]).tolist()
    total = why.groupby(["task", "rank"])["contribution"].sum()
    assert total.to_numpy() == pytest.approx(why.drop_duplicates(["task", "rank"])["logit"].to_numpy())
    output = capsys.readouterr().out
    assert "ctr: " in output and "cvr: " in output


def test_monitor_by_hand(mine):
    prepared, model = mine.prepared, mine.load_model()
    train, validation = (Batches(prepared.part(part), 64) for part in ("train", "validation"))
    compile_model(model, task_kinds(model), mine.config.training, train.steps)
    names = {
        "model": model,
        "validation": validation.data,
        "groups": movielens_groups(prepared)[:1],
        "train": train.in_order(),
        "check": validation.in_order(),
    }
    run_snippet("from mvke_tf.monitoring import Monitor", names)
    events = EventAccumulator("logs/validation").Reload()
    weights = [[event.value for event in events.Scalars(f"gate_ctr/mean_weight/expert_{e}")] for e in range(3)]
    assert np.allclose(np.sum(weights, axis=0), [1.0, 1.0], atol=1e-5)
    assert [image.step for image in events.Images("gate_cvr/by_genre")] == [0]


def test_onnx(mine):
    names = run_snippet("onnxruntime.InferenceSession(")
    model = mine.load_model()
    expected = predictions(model, model(names["rows"], training=False))["ctr"]
    np.testing.assert_allclose(names["probability"], expected, rtol=0, atol=1e-5)
    assert np.ptp(names["probability"]) > 0.01 and Path("runs/mine/onnx/model.json").is_file()


def test_profiles(mine):
    names = run_snippet("profiler = Profiler(")
    profiles, genres = names["profiles"], names["genres"]
    assert profiles["user"].tolist() == [1] * 5 + [7] * 5 and profiles["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    assert list(profiles) == ["user", "rank", "item", "title", "genres", "probability", "kernel"]
    raw, pairs = mine.prepared.raw, mine.prepared.pairs
    rated = pairs[(pairs["rating"] > 0) & (raw["user"]["user_id"][pairs["user_row"]] == 1)]
    assert not set(profiles["item"][:5]) & set(raw["item"]["item_id"][rated["item_row"]])
    vectors, items = names["vectors"], names["profiler"].item_vectors["cvr"]
    first = list(raw["item"]["item_id"]).index(profiles["item"][0])
    assert profiles["probability"][0] == pytest.approx(1 / (1 + np.exp(-vectors[0] @ items[first])), abs=1e-6)
    assert genres["user"].tolist() == [1] * 3 + [7] * 3 and list(genres)[2:] == ["genre", "items", "probability"]


def test_exported_model(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    export_run(tiny_run, Path("runs/mine/export"))
    names = run_snippet('signatures["recommend"]')
    assert {task: values.shape for task, values in names["pair"].items()} == {"ctr": (1,), "cvr": (1,)}
    assert {task: values.shape for task, values in names["scores"].items()} == {"ctr": (1, 3), "cvr": (1, 3)}
    assert {task: weights.shape for task, weights in names["gates"].items()} == {"gate_ctr": (1, 3), "gate_cvr": (1, 4)}
    probability = 1 / (1 + np.exp(-names["logit"].numpy()))
    assert probability == pytest.approx(names["pair"]["ctr"].numpy(), abs=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(re.fullmatch(r"0\.\d{3} Film \d+", line) for line in lines)
    assert not any(line.endswith("Film 1") for line in lines)
    run_snippet("from client import Client", names)
    monkeypatch.delitem(sys.modules, "client")
    scores, error = capsys.readouterr().out.splitlines()
    assert np.fromstring(scores.strip("[]"), sep=" ") == pytest.approx(names["scores"]["ctr"][0].numpy(), abs=1e-6)
    assert error.startswith(
        "'age' must be float32 with 1 axes (user feature, number; NaN means unknown). Received: <U2"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(path):
    assert not re.search(r"PLACEHOLDER|TODO|TBD|XXX|@[A-Z]{3}|_TABLE\b", PAGES[path])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path):
    page = PAGES[path]
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    named = re.findall(r"`((?:scripts|benchmarks|notebooks|tests|docs)/[\w/.]*)", page)
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    linked = [name.split("#")[0] for name in re.findall(r"\]\(([^)]+)\)", text) if "://" not in name]
    assert [name for name in linked if name and not (path.parent / name).exists()] == []


def test_every_script_is_in_the_readme():
    scripts = [*REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
    assert scripts
    assert [path.name for path in scripts if path.name not in README] == []


def test_every_snippet_is_run():
    """By a test of this file."""
    source = Path(__file__).read_text(encoding="utf-8")
    texts = [eval(text) for text in re.findall(r"run_snippet\(((?:\"[^\"]*\")|(?:'[^']*'))", source)]
    assert [snippet for snippet in SNIPPETS if not any(text in snippet for text in texts)] == []


def test_make_targets_that_the_readme_names_exist():
    for target in set(re.findall(r"make ([a-z]+)", README)) - {"do"}:
        done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, f"make {target}: {done.stderr}"
