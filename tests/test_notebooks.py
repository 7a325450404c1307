# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom on a small budget, with the results that they promise; outputs are committed."""

import json
import re
import subprocess
import sys

import nbformat
import pytest

from scripts.run_notebooks import METADATA, clean, execute
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

NOTEBOOKS = {path.stem: path for path in sorted(REPOSITORY.glob("notebooks/*.ipynb"))}
MOST_BYTES = 200_000


@pytest.fixture
def run(tmp_path):
    """Executes a notebook where the data are, and nothing else, and returns the named values of what it made."""
    # Not there before the first download.
    (REPOSITORY / "data").mkdir(exist_ok=True)
    (tmp_path / "data").symlink_to(REPOSITORY / "data", target_is_directory=True)

    def run(name: str, **values: str) -> dict:
        notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
        pairs = ", ".join(f"{key!r}: {value}" for key, value in values.items())
        code = f"import json\nprint(json.dumps({{{pairs}}}, default=float))"
        notebook.cells.append(nbformat.v4.new_code_cell(code))
        execute(notebook, tmp_path, MVKE_NOTEBOOK_BUDGET="test")
        # Messages of the kernel's libraries may arrive with the last cell.
        printed = [output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout"]
        return json.loads("".join(printed))

    return run


def test_quickstart(run):
    values = run(
        "01_quickstart",
        auc="{task: metrics['auc'] for task, metrics in report['test'].items()}",
        best="best",
        reload_difference="reload_difference",
        served_difference="served_difference",
        signatures="sorted(signatures)",
        titles="[name.decode() for name in top['item_names'][0].numpy()]",
        probabilities="top['predictions'][0].numpy().tolist()",
        seen="prepared.items.names[np.isin(prepared.items.key, seen.numpy())].tolist()",
    )
    assert values["auc"]["ctr"] > 0.7 and values["auc"]["cvr"] > 0.7
    assert values["best"] in (1, 2)
    assert values["reload_difference"] == 0.0 and values["served_difference"] < 1e-5
    assert values["signatures"] == [
        *("gate_weights", "item_vectors", "recommend", "score_ids", "serving_default", "user_vectors")
    ]
    assert len(set(values["titles"])) == 5 and not set(values["titles"]) & set(values["seen"])
    assert values["probabilities"] == sorted(values["probabilities"], reverse=True)


def test_expert_weights(run):
    studies = "{'published': published, 'wide': wide, 'three': studies[3], 'mmoe': mmoe}"
    values = run(
        "02_expert_weights",
        auc="comparison['test AUC'].tolist()",
        sums=f"[f(g.weights.sum(axis=1)) for s in {studies}.values() for g in s.gates.values() for f in (min, max)]",
        experts=f"{{name: {{t: g.experts for t, g in s.gates.items()}} for name, s in {studies}.items()}}",
        entropy="comparison['entropy'].unstack('task').to_dict()",
        states="[verdict.state for verdict in verdicts(published)]",
        explained_error="explained_error",
        model_error="model_error",
        rated="sorted(set(why['item_row']) & set(user.known))",
        tasks="sorted(set(why['task']))",
        kernels="sorted(set(by_number.index.get_level_values('kernels')))",
        cards="cards['weight'].groupby('task').sum().to_dict()",
        shares="cards['share of the output'].groupby('task').sum().to_dict()",
        lost="(cards['AUC without it'] - gate_effect(wide).set_index(['task', 'expert'])['difference']).abs().max()",
        raised="[text for text in cards['items'] if text]",
    )
    assert min(values["auc"]) > 0.7
    assert values["sums"] == pytest.approx([1.0] * 16)
    assert values["experts"]["wide"] == {"ctr": [0, 1, 2], "cvr": [1, 2, 3, 4]}
    assert values["experts"]["three"] == {"ctr": [0, 1], "cvr": [0, 1, 2]}
    assert values["experts"]["mmoe"] == {"ctr": [0, 1, 2, 3], "cvr": [0, 1, 2, 3]}
    # The finding: kernels that start small leave the gate uniform.
    assert values["states"] == ["uniform", "uniform"]
    for entropy in values["entropy"].values():
        assert entropy["0.01"] > 0.995 and 1 - entropy["1.0"] > 100 * (1 - entropy["0.01"])
    assert values["explained_error"] < 1e-5 and values["model_error"] < 1e-5
    assert values["rated"] == [] and values["tasks"] == ["ctr", "cvr"]
    assert values["kernels"] == [3, 5]
    for sums in (values["cards"], values["shares"]):
        assert sums == {"ctr": pytest.approx(1.0, abs=1e-3), "cvr": pytest.approx(1.0, abs=1e-3)}
    assert values["lost"] < 1e-4 and values["raised"]


def test_custom_experts_and_gates(run):
    values = run(
        "03_custom_experts_and_gates",
        accuracy="accuracy",
        auc="auc",
        weights="by_digit.groupby(['task', 'group'])['mean_weight'].sum().tolist()",
        difference="difference",
        gate="loaded.get_layer('cosine_gate').get_config()",
        scale="[float(m.get_layer('cosine_gate').scale) for m in (model, loaded)]",
        report="report['test']",
        constant_rmse="constant_rmse",
        log_variances="log_variances",
        rows="rows",
        pairs="len(train)",
    )
    assert values["accuracy"] > 0.8 and values["auc"] > 0.9
    assert values["weights"] == pytest.approx([1.0] * 22)
    assert values["difference"] == 0.0
    assert (values["gate"]["num_experts"], values["gate"]["width"]) == (3, 16)
    learned, loaded = values["scale"]
    assert learned == loaded and abs(learned - 5.0) > 1e-3
    report = values["report"]
    assert report["ctr"]["auc"] > 0.7 and report["cvr"]["auc"] > 0.7 and report["cvr"]["auc_given"] > 0.6
    assert report["rating"]["rmse"] < values["constant_rmse"]
    assert set(values["log_variances"]) == {"ctr", "cvr", "rating"}
    # They begin at 0 exactly, and one of them may be on its way back.
    moved = sorted(map(abs, values["log_variances"].values()))
    assert moved[0] > 0 and moved[1] > 1e-2
    assert values["rows"]["rating"] < values["rows"]["ctr"] == values["rows"]["cvr"] == values["pairs"]


def test_mmoe_on_any_data(run):
    values = run(
        "04_mmoe_any_data",
        auc="auc",
        r2="r2",
        sums="[sums.min(), sums.max()]",
        used="used.groupby('task')['mean_weight'].sum().to_dict()",
        experts="len(used)",
        synthetic="relatedness.iloc[:, :2].min().tolist()",
        distances="relatedness['distance of the gates'].tolist()",
        difference="difference",
    )
    assert values["auc"] > 0.9 and values["r2"] > 0.7
    assert values["sums"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert values["used"] == {"task_0": pytest.approx(1.0), "task_1": pytest.approx(1.0)} and values["experts"] == 8
    assert min(values["synthetic"]) > 0.05
    assert len(values["distances"]) == 3 and all(0 < distance < 1 for distance in values["distances"])
    assert values["difference"] == 0.0


def test_own_table(run):
    values = run(
        "05_own_table",
        tasks="sorted(report['test'])",
        rows="{part: len(prepared.part_rows(part)) for part in ('train', 'validation', 'test')}",
        auc="report['test']['click']['auc']",
        rmse="report['test']['revenue']['rmse']",
        weights="cards.groupby('task')['mean_weight'].sum().to_dict()",
        groups="sorted(set(weights['variable']))",
        answer="answer",
        served_difference="served_difference",
        ranks="profiles.groupby('user')['rank'].apply(list).tolist()",
        falling="profiles.groupby('user')['probability'].apply(lambda p: p.is_monotonic_decreasing).all()",
        users="[profiles['user'].nunique(), pd.Series(prepared.users.key).nunique()]",
    )
    assert values["tasks"] == ["click", "install", "revenue"]
    assert values["rows"] == {"train": 2_100, "validation": 300, "test": 600}
    assert values["auc"] > 0.5 and values["rmse"] > 0
    assert values["weights"] == {task: pytest.approx(1.0) for task in ("click", "install", "revenue")}
    assert values["groups"] == ["age", "all", "categories", "interests"]
    assert 0 < values["answer"]["install"] < values["answer"]["click"] < 1
    assert values["served_difference"] < 1e-5
    assert set(map(tuple, values["ranks"])) == {(1, 2, 3)} and values["falling"]
    assert values["users"][0] == values["users"][1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOKS[name].stat().st_size < MOST_BYTES
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert len(outputs) > 5
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)
    assert all(cell.metadata == {} for cell in notebook.cells)
    # Paths, machines and people of where it was executed.
    text = re.sub(r'"image/png": "[^"]*"', "", NOTEBOOKS[name].read_text(encoding="utf-8"))
    assert re.findall(r"(?<![\w.)])/(?:home|root|tmp|work|usr|Users|var|opt|mnt)\b[^\s\"]*|[A-Z]:\\\\", text) == []
    title, sentence = notebook.cells[0].source.split("\n\n")[:2]
    assert title.startswith("# ") and sentence.startswith("At the end you will ") and sentence.count(". ") == 0


def test_lint_reads_notebooks():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *map(str, NOTEBOOKS.values())],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_clean_keeps_what_matters():
    def stderr(text):
        return nbformat.v4.new_output("stream", name="stderr", text=text)

    greeting = (
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
        "I0000 00:00:1795304182.678754   16702 port.cc:153] oneDNN custom operations are on.\n"
        "2026-11-21 23:00:00.123456: I tensorflow/core/util/port.cc:153] oneDNN\n"
        "/there/tqdm/auto.py:21: TqdmWarning: IProgress not found. Please update.\n  from .autonotebook import\n"
    )
    cell = nbformat.v4.new_code_cell("1", metadata={"execution": {"iopub.execute_input": "2026"}})
    cell.outputs = [stderr(greeting), stderr(greeting + "UserWarning: this one\n")]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3"}})
    clean(notebook)
    assert [output.text for output in cell.outputs] == ["UserWarning: this one\n"]
    assert cell.metadata == {} and notebook.metadata == METADATA


def test_a_notebook_that_stops_is_left_as_it_was(tmp_path):
    path = tmp_path / "wrong.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    script = [sys.executable, str(REPOSITORY / "scripts" / "run_notebooks.py")]
    done = subprocess.run([*script, str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "wrong.ipynb stopped and is left as it was. Received: " in done.stderr
    assert "ZeroDivisionError" in done.stderr and "Traceback (most recent call last):\n  File" not in done.stderr
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["wrong.ipynb"]
    done = subprocess.run([*script, "missing.ipynb"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no notebook at missing.ipynb" in done.stderr
