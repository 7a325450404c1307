# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the README and the manual runs, the tutorial works as written, and no link is dead."""

import json
import re
import shlex
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

from mvke_tf import cli, datasets
from mvke_tf.config import ModelConfig, RunConfig
from mvke_tf.data.batches import Batches
from mvke_tf.data.groups import groups
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import PreparedDataset
from mvke_tf.models import build_model
from mvke_tf.run import Run
from mvke_tf.serving import export_run
from mvke_tf.training.loop import compile_model
from tests.conftest import REPOSITORY
from tests.small import small_dataset

PAGES = {path: path.read_text(encoding="utf-8") for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]}
README = PAGES[REPOSITORY / "README.md"]
SNIPPETS = [snippet for page in PAGES.values() for snippet in re.findall(r"```python\n(.*?)```", page, re.S)]


def run_snippet(text: str, names: dict | None = None) -> dict:
    """Executes the one snippet that holds `text`, and returns the names that it defines."""
    (snippet,) = [snippet for snippet in SNIPPETS if text in snippet]
    names = {} if names is None else names
    exec(snippet, names)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def movie_tasks(tmp_path_factory):
    """The small dataset with the names of tasks that the page on training uses, in a folder."""
    folder = tmp_path_factory.mktemp("prepared") / "small"
    names = {"click": "ctr", "buy": "cvr", "stars": "rating"}
    dataset = small_dataset()
    values = dataset.to_dict()
    tasks = {names[name]: dict(task) for name, task in values["tasks"].items()}
    tasks["cvr"]["given"] = "ctr"
    renamed = type(dataset).from_frame(dataset.frames["log"], {**values, "tasks": tasks}, items=dataset.frames["items"])
    prepare(renamed).save(folder)
    return PreparedDataset.load(folder)


@pytest.mark.slow
def test_the_front_page():
    names = run_snippet("random = np.random.default_rng(0)")
    predicted = {task: float(p[0, 0]) for task, p in names["model"].predictions(names["model"](names["pair"])).items()}
    # The click happens in a fifth to a third of the rows, a purchase in three of ten of those.
    assert 0.15 < predicted["click"] < 0.4 and 0.2 < predicted["buy"] / predicted["click"] < 0.4


def test_a_dataset_from_frames():
    names = run_snippet("dataset = Dataset.from_frame(log, declaration)")
    assert names["coarser"].feature("age").bins == 5 and names["coarser"].split.by == "hash"
    prepared = prepare(names["dataset"].replace({"split.seed": 1}))
    assert len(prepared) == 3 and prepared.users.key.tolist() == [1, 2]


def test_own_schema():
    model = run_snippet('Task("purchase", kernels=')["model"]
    assert model.task_names == ("click", "install", "purchase")
    assert model.kernels_of("purchase") == (3, 4, 5)
    assert model.input["profile"].shape == (None, 33)


def test_models():
    names = run_snippet("models = [build_model(")
    assert [model.name for model in names["models"]] == ["mvke", "mmoe", "cgc", "ple", "shared_bottom", "hard_sharing"]
    assert names["click_alone"].task_names == ("click",)
    assert names["one_network"].count_params() < names["models"][0].count_params()
    assert [names["published"].experts_of(task) for task in ("click", "buy")] == [
        (0, 1, 2, 3, 4, 5),
        (2, 3, 4, 5, 6, 7, 8, 9),
    ]
    assert names["more_tasks"].experts_of("buy") == (2, 3, 4)


@pytest.mark.slow
def test_three_tasks(movie_tasks):
    names = run_snippet('loss_weighting="uncertainty"', {"prepared": movie_tasks})
    assert set(names["report"]) == {"ctr", "cvr", "rating"}
    assert 0.5 < names["report"]["rating"]["rmse"] < 3
    first, second = names["log_variances"]
    assert first != second and abs(second) < 1


@pytest.mark.slow
def test_clicked_rows_with_weights_under_xla(movie_tasks, monkeypatch):
    # Another test may have made this process deterministic, in which there is no XLA.
    monkeypatch.setattr(tensorflow_config, "is_op_determinism_enabled", lambda: False)
    run = run_snippet('objective="conditional"', {"prepared": movie_tasks})["run"]
    (epoch,) = pd.read_csv(run.log_file).to_dict("records")
    assert epoch["loss"] == pytest.approx(epoch["ctr_loss"] + 0.5 * epoch["cvr_loss"], rel=1e-3)


def test_uncertainty_weights(capsys):
    model = run_snippet("model = with_uncertainty(build_model(")["model"]
    assert model.log_variances.by_task() == {"click": 0.0, "purchase": 0.0, "stars": 0.0}
    assert model.kinds == {"click": "binary", "purchase": "binary", "stars": "regression"}
    assert model.given == {"purchase": "click"}


def test_dense_mmoe():
    names = run_snippet("return_expert_weights=True")
    assert {name: output.shape for name, output in names["model"].output.items()} == {
        **{"task_0": (None, 1), "task_1": (None, 1)},
        **{"task_0_expert_weights": (None, 3), "task_1_expert_weights": (None, 3)},
    }
    assert names["deep_gates"].output["task_1"].shape == (None, 5)
    assert {name: tensor.shape for name, tensor in names["recommender"].input.items()} == {
        **{"user_id": (None,), "item_id": (None,), "dense_features": (None, 8)},
    }


@pytest.mark.slow
def test_own_parts():
    names = run_snippet("class Bilinear")
    model, loaded, x = names["model"], names["loaded"], names["x"]
    losses = names["history"].history["loss"]
    assert losses[1] < losses[0]
    for task, output in model.predict(x, verbose=0).items():
        np.testing.assert_array_equal(loaded.predict(x, verbose=0)[task], output)
    weights = keras.ops.convert_to_numpy(loaded.gates(x)["task_0"])
    assert ((weights > 0).sum(axis=1) == 2).all()


def test_synthetic_tasks():
    correlations = run_snippet("two_task_regression(num_rows")["label_correlations"]
    assert correlations[0.5] < correlations[0.9] < correlations[1.0]
    assert correlations[1.0] > 0.99


@pytest.mark.slow
def test_comparison(tiny_prepared):
    names = run_snippet('Comparison(Path("comparisons/small")', {"prepared": tiny_prepared})
    table = names["table"].set_index("model")
    assert list(table.index) == ["shared_bottom", "popularity"]
    results = pd.read_csv("comparisons/small/results.csv").set_index("model")
    assert table["click_auc"].tolist() == pytest.approx(results["test_click_auc"].tolist())
    model = Run(Path("comparisons/small/runs/shared_bottom-seed0")).load_model()
    assert table.loc["shared_bottom", "parameters"] == model.count_params()


@pytest.mark.slow
def test_search(tiny_prepared):
    (trial,) = run_snippet("trials = tune(", {"prepared": tiny_prepared})["trials"].itertuples()
    log = pd.read_csv("tuning/small/runs/trial-000/log.csv")
    assert trial.val_score == log["val_score"].max()
    best = RunConfig.from_dict(json.loads(Path("tuning/small/best_config.json").read_text()))
    assert best.model.embedding_dim == trial.embedding_dim


@pytest.fixture
def mine(tiny_run, tmp_path):
    """The small run, put where the snippets look for theirs."""
    shutil.copytree(tiny_run.folder.parents[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs" / tiny_run.folder.name).rename(tmp_path / "runs" / "mine")
    return Run(Path("runs/mine"))


@pytest.mark.slow
def test_analysis(mine, capsys):
    names = run_snippet("study = Study(run.load_model()")
    sums = names["by_country"].groupby(["task", "group"])["mean_weight"].sum()
    assert len(sums) and sums.to_numpy() == pytest.approx(1.0)
    why = names["why"]
    np.testing.assert_allclose(why["contribution"], why["weight"] * why["score"], rtol=1e-6)
    total = why.groupby(["task", "rank"], sort=False)["contribution"].sum()
    assert total.to_numpy() == pytest.approx(why.drop_duplicates(["task", "rank"])["logit"].to_numpy(), abs=1e-6)
    output = capsys.readouterr().out
    assert "click" in output and "buy" in output


@pytest.mark.slow
def test_monitor_by_hand(mine):
    prepared, model = mine.prepared, mine.load_model()
    train, validation = (Batches(prepared.part(part), 64) for part in ("train", "validation"))
    compile_model(model, model.kinds, mine.config.training, train.steps)
    of_items = [group for group in groups(prepared) if group.side == "item"][:1]
    names = {
        "model": model,
        "validation": validation.data,
        "groups": of_items,
        "train": train.in_order(),
        "check": validation.in_order(),
    }
    run_snippet("from mvke_tf.training.monitoring import Monitor", names)
    events = EventAccumulator("logs/validation").Reload()
    weights = [[event.value for event in events.Scalars(f"gate_click/mean_weight/expert_{e}")] for e in range(3)]
    assert np.allclose(np.sum(weights, axis=0), [1.0, 1.0], atol=1e-5)
    assert [image.step for image in events.Images(f"gate_buy/by_{of_items[0].variable}")] == [0]


@pytest.fixture(scope="module")
def movie_run(tmp_path_factory):
    """An untrained MVKE on MovieLens-100K, as the page on serving has it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("movies")
    prepare(datasets.load("movielens", REPOSITORY / "data")).save(folder / "prepared" / "movielens")
    prepared = PreparedDataset.load(folder / "prepared" / "movielens")
    config = RunConfig(ModelConfig(embedding_dim=8, hidden_dims=(8,), virtual_kernel_stddev=1.0, embedding_stddev=1.0))
    run = Run.create(folder / "runs" / "mine", config, prepared)
    keras.utils.set_random_seed(0)
    run.save_checkpoint(build_model("mvke", prepared.schema(), config.model))
    return folder


@pytest.mark.slow
def test_serving(movie_run, monkeypatch, capsys):
    monkeypatch.chdir(movie_run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    export_run(Run.open(Path("runs/mine")))
    capsys.readouterr()
    names = run_snippet('signatures["recommend"]')
    assert {task: values.shape for task, values in names["pair"].items()} == {"ctr": (1,), "cvr": (1,)}
    assert {task: values.shape for task, values in names["scores"].items()} == {"ctr": (1, 3), "cvr": (1, 3)}
    assert {task: weights.shape for task, weights in names["gates"].items()} == {"gate_ctr": (1, 3), "gate_cvr": (1, 4)}
    probability = 1 / (1 + np.exp(-names["logit"].numpy()))
    assert probability == pytest.approx(names["pair"]["ctr"].numpy(), abs=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(re.fullmatch(r"[01]\.\d{3} \S.*", line) for line in lines)
    run_snippet("from client import Client", names)
    monkeypatch.delitem(sys.modules, "client")
    scores, error = capsys.readouterr().out.splitlines()
    assert np.fromstring(scores.strip("[]"), sep=" ") == pytest.approx(names["scores"]["ctr"][0].numpy(), abs=1e-6)
    assert error.startswith(
        "'age' must be float32 with 1 axes (user feature, number; NaN means unknown). Received: <U2"
    )


@pytest.mark.slow
def test_profiles(movie_run, monkeypatch):
    monkeypatch.chdir(movie_run)
    names = run_snippet("profiler = Profiler(")
    profiles, prepared = names["profiles"], names["run"].prepared
    assert profiles["user"].tolist() == [1] * 5 + [7] * 5 and profiles["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    assert list(profiles) == ["user", "rank", "item", "item_name", "genre", "probability", "kernel"]
    of_user = (prepared.users.key[prepared.user_row] == 1) & ~prepared.sampled
    assert not set(profiles["item"][:5]) & set(prepared.items.key[prepared.item_row[of_user]])
    first = list(prepared.items.key).index(profiles["item"][0])
    logit = names["vectors"][0] @ names["profiler"].item_vectors["cvr"][first]
    assert profiles["probability"][0] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)


@pytest.mark.slow
def test_onnx(movie_run, monkeypatch):
    monkeypatch.chdir(movie_run)
    names = run_snippet("onnxruntime.InferenceSession(")
    model = names["run"].load_model()
    expected = model.predictions(model(names["rows"], training=False))["ctr"]
    np.testing.assert_allclose(names["probability"], expected, rtol=0, atol=1e-5)
    assert np.ptp(names["probability"]) > 0.01 and Path("runs/mine/onnx/model.json").is_file()


def commands_of(page: str) -> list[list[str]]:
    """The command lines in the shell blocks of a page, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line.startswith(("mvke ", "python -c "))]
    return [shlex.split(line, comments=True) for line in lines]


def mvke(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


@pytest.mark.slow
def test_the_tutorial_command_by_command(capsys, tmp_path):
    """From ads.csv to a served and profiled model: exactly the commands of the page, and the edits that it names."""
    page = PAGES[REPOSITORY / "docs" / "own_data.md"]
    make, *commands = commands_of(page)
    subprocess.run([sys.executable, *make[1:]], check=True, cwd=tmp_path, env=_environment())
    assert len(Path("ads.csv").read_text().splitlines()) == 5_001
    assert [command[:2] for command in commands] == [
        ["mvke", verb] for verb in ("init", "check", "train", "evaluate", "analyze", "export", "serve", "profile")
    ]
    (edited,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    for command in commands:
        if command[1] == "serve":
            continue
        assert mvke(*command[1:]) == 0, (command, capsys.readouterr().err)
        if command[1] == "init":
            assert _edit(Path("ads.toml"), edited) <= 5
    run = Path("runs/ads")
    report = json.loads((run / "report.json").read_text())["test"]
    assert set(report) == {"click", "install", "revenue"}
    assert report["click"]["auc"] > 0.5 and "auc_given" in report["install"] and report["revenue"]["rmse"] > 0
    assert (run / "analysis" / "analysis.html").is_file() and (run / "test_groups.csv").is_file()
    assert (run / "export" / "1" / "signatures.json").is_file()
    profiles = pd.read_parquet(run / "profiles" / "install_item.parquet")
    assert profiles.groupby("user")["rank"].max().eq(20).all()
    _serve_and_ask(next(command for command in commands if command[1] == "serve"))
    names = run_snippet('dataset = Dataset.from_toml(Path("ads.toml"))')
    assert names["report"]["test"]["click"]["auc"] > 0.5 and (names["folder"] / "saved_model.pb").is_file()


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def _edit(path: Path, wanted: str) -> int:
    """Puts the tables that the tutorial shows in place of the draft's; returns how many lines were touched."""
    touched = 0
    text = path.read_text(encoding="utf-8")
    for name, body in re.findall(r"\[(tasks\.\w+)\]\n(.*?)(?=\n\[|\Z)", wanted, re.S):
        found = re.search(rf"\[{re.escape(name)}\]\n(.*?)(?=\n\[|\Z)", text, re.S)
        present = set() if found is None else {_key(line) for line in found[1].splitlines()}
        touched += sum(_key(line) not in present for line in body.strip().splitlines())
        table = f"[{name}]\n{body.strip()}\n"
        text = text + f"\n{table}" if found is None else text[: found.start()] + table + text[found.end() :]
    path.write_text(text, encoding="utf-8")
    return touched


def _key(line: str) -> str:
    return re.sub(r"\s+", "", line.split("#")[0])


def _serve_and_ask(command: list[str]) -> None:
    """Starts the tutorial's server on a free port, and sends it the request that it prints."""
    arguments = [text if text != "8501" else "0" for text in command[1:]]
    code = f"from mvke_tf import cli; cli.main({arguments!r})"
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
    )
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("Try it: "):
                break
        request = shlex.split(lines[-1].removeprefix("Try it: "))
        assert request[0] == "curl", lines
        done = subprocess.run(request, capture_output=True, text=True, timeout=60)
        answer = json.loads(done.stdout)
        assert {"click", "install", "revenue"} <= set(json.dumps(answer).replace('"', " ").split()), answer
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_nothing_is_left_to_fill_in(path):
    assert not re.search(r"PLACEHOLDER|TODO|TBD|XXX|@[A-Z]{3}|_TABLE\b|_SECTION\b", PAGES[path])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path):
    page = PAGES[path]
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    named = re.findall(r"`((?:scripts|benchmarks|notebooks|tests|docs|configs|mvke_tf)/[\w/.]*)`", page)
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    linked = [name.split("#")[0] for name in re.findall(r"\]\(([^)]+)\)", text) if "://" not in name]
    assert [name for name in linked if name and not (path.parent / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_that_a_page_shows_are_understood(path):
    """Parsed, not run: every option exists."""
    for command in commands_of(PAGES[path]):
        if command[:1] == ["mvke"]:
            cli.parse(command[1:])


def test_the_front_page_is_short_and_links_every_page():
    assert len(README.splitlines()) <= 150
    linked = set(re.findall(r"\]\(docs/([\w.]+)\)", README))
    assert {path.name for path in REPOSITORY.glob("docs/*.md")} <= linked


@pytest.mark.parametrize(
    "folder, page", [("scripts", "commands.md"), ("benchmarks", "benchmarks.md"), ("notebooks", "notebooks.md")]
)
def test_every_program_is_on_its_page(folder, page):
    programs = [*REPOSITORY.glob(f"{folder}/*.py"), *REPOSITORY.glob(f"{folder}/*.ipynb")]
    assert programs
    assert [path.name for path in programs if path.name not in PAGES[REPOSITORY / "docs" / page]] == []


def test_every_snippet_is_run():
    """By a test of this file, or of the serving room."""
    files = [Path(__file__), *REPOSITORY.glob("tests/*/test_*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    texts = [eval(text) for text in re.findall(r"run_snippet\(((?:\"[^\"]*\")|(?:'[^']*'))", source)]
    assert [snippet for snippet in SNIPPETS if not any(text in snippet for text in texts)] == []


@pytest.mark.slow
def test_make_targets_that_the_pages_name_exist():
    for target in {target for page in PAGES.values() for target in re.findall(r"(?:`|^)make ([a-z]+)", page, re.M)}:
        done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, f"make {target}: {done.stderr}"
