"""The README is kept true: its Python runs, its files exist."""

import re
import subprocess
from pathlib import Path

import pytest

from mvke_tf.config import DataConfig
from mvke_tf.data.prepared import Prepared, prepared_path
from mvke_tf.serving import export_run
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def small_data(tiny_run, tmp_path, monkeypatch):
    """The small data set, put where the snippets look for the prepared one."""
    monkeypatch.chdir(tmp_path)
    target = prepared_path(Path("data"), DataConfig())
    target.parent.mkdir(parents=True)
    (tiny_run.folder / "prepared.npz").rename(target)
    return target


def test_own_script(small_data):
    names = {}
    exec(SNIPPETS[0], names)
    rows = len(Prepared.load(small_data).part_rows("test"))
    assert {task: weights.shape for task, weights in names["weights"].items()} == {"ctr": (rows, 3), "cvr": (rows, 4)}
    assert names["weights"]["cvr"].sum(axis=1) == pytest.approx(1.0)
    assert Path("mvke.keras").is_file()


def test_own_schema():
    names = {}
    exec(SNIPPETS[1], names)
    model = names["model"]
    assert list(model.output) == ["click", "install", "purchase"]
    assert model.get_layer("gate_purchase").kernels == (3, 4, 5)
    assert model.get_layer("embedding_ad_id").input_dim == 5_001


def test_train(small_data):
    names = {}
    exec(SNIPPETS[2], names)
    assert names["result"].run.checkpoint == Path("runs/from_python/best.keras")
    assert 0 < names["report"]["test"]["ctr"]["auc"] < 1


def test_models():
    names = {}
    exec(SNIPPETS[3], names)
    assert [model.name for model in names["models"]] == ["mvke", "mmoe", "cgc", "ple", "shared_bottom", "hard_sharing"]


def test_dense_mmoe():
    names = {}
    exec(SNIPPETS[4], names)
    assert {name: output.shape for name, output in names["model"].output.items()} == {
        **{"task_0": (None, 1), "task_1": (None, 1)},
        **{"task_0_expert_weights": (None, 3), "task_1_expert_weights": (None, 3)},
    }
    assert set(names["recommender"].input) == {"user_id", "item_id", "dense_features"}


def test_exported_model(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export_run(tiny_run, Path("runs/mine/export"))
    exec(SNIPPETS[5], {})
    assert "'recent_items': tf.int64" in capsys.readouterr().out
    assert len(SNIPPETS) == 6


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"PLACEHOLDER|TODO|TBD|XXX", README)


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"`((?:scripts|benchmarks|notebooks|tests|docs)/[\w/.]*)", README))
    assert {"scripts/train.py", "scripts/evaluate.py", "benchmarks/train_throughput.py"} <= named
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert [name for name in pictures if not (REPOSITORY / name).is_file()] == []


def test_every_script_is_in_the_readme():
    scripts = [*REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
    assert scripts
    assert [path.name for path in scripts if path.name not in README] == []


def test_make_targets_that_the_readme_names_exist():
    for target in set(re.findall(r"make ([a-z]+)", README)) - {"do"}:
        done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, f"make {target}: {done.stderr}"
