"""The analysis of a run: its files, its pictures, and its page in a real browser."""

import html
import io
import json
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from mvke_tf.analysis import Thresholds, analyze_run, user_state
from mvke_tf.analysis.chapters import user_chapter, verdict_chapter
from mvke_tf.config import ModelConfig
from mvke_tf.models import build_model
from mvke_tf.run import Run
from tests.conftest import REPOSITORY

FIGURES = {
    *(f"weights_by_{name}" for name in ("genre", "popularity", "decade", "age", "gender", "occupation", "history")),
    *("utilisation", "entropy", "effect", "experts_cka", "experts_correlation", "kernels_cosine", "field_attention"),
    *("map_ctr", "map_cvr", "user_ctr", "user_cvr"),
}
TABLES = {
    *("gate_weights", "utilisation", "gate_entropy", "gate_effect", "expert_similarity", "kernel_similarity"),
    *("field_attention", "map_pca", "user"),
}


@pytest.fixture(scope="module")
def analysed(tiny_run_template, tmp_path_factory):
    """The command on the small run: its status, its output, and the run."""
    run = Run(shutil.copytree(tiny_run_template, tmp_path_factory.mktemp("analysed") / "<b>&run"))
    script = REPOSITORY / "scripts" / "analyze.py"
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), "--checkpoint_path", str(run.folder), "--top", "4"])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    return ended.value.code, output.getvalue(), run


def test_the_command_prints_verdict_and_places(analysed):
    status, output, run = analysed
    assert status == 0
    folder = run.folder / "analysis"
    verdict = json.loads((folder / "verdict.json").read_text())
    assert [entry["task"] for entry in verdict] == ["ctr", "cvr"]
    for entry in verdict:
        assert f"{entry['task']}: {', '.join(finding['name'] for finding in entry['findings'])}\n" in output
        assert entry["findings"][0]["text"] in output
    for place in ("analysis.html", "tables", "figures"):
        assert str(folder / place) in output and (folder / place).exists()
    assert list(run.folder.glob(".writing-*")) == []


def test_the_tables(analysed):
    run = analysed[2]
    folder = run.folder / "analysis" / "tables"
    tables = {path.stem: pd.read_csv(path) for path in folder.iterdir()}
    assert set(tables) == TABLES
    sums = tables["gate_weights"].groupby(["task", "variable", "group"])["mean_weight"].sum()
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    assert set(tables["user"]["rank"]) == {1, 2, 3, 4} and tables["user"]["title"].str.startswith("Film ").all()
    user, row, known = user_state(run.prepared, "test")
    assert not set(tables["user"]["item_row"]) & set(known)
    # What the page says of the user is what the model says.
    rows = tables["user"].drop_duplicates(["task", "rank"])
    model, encoded = run.load_model(), run.prepared.encoded
    for task, best in rows.groupby("task"):
        items = best["item_row"].to_numpy()
        features = {name: np.repeat(column[[row]], len(items), axis=0) for name, column in encoded["user"].items()}
        features |= {name: column[items] for name, column in encoded["item"].items()}
        np.testing.assert_allclose(best["logit"], model(features)[task][:, 0], rtol=1e-5, atol=1e-5)
    assert str(user) in (run.folder / "analysis" / "analysis.html").read_text()


def test_the_pictures(analysed):
    folder = analysed[2].folder / "analysis" / "figures"
    assert {path.stem for path in folder.iterdir()} == FIGURES
    for path in folder.iterdir():
        pixels = imread(path)[..., :3]
        assert pixels.shape[0] > 250 and pixels.shape[1] > 400 and path.stat().st_size < 150_000
        # Something is drawn, it survives the loss of colour, and nothing is cut off at the edge.
        grey = pixels @ np.array([0.299, 0.587, 0.114], "float32")
        assert np.ptp(grey) > 0.7 and grey.std() > 0.05
        edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        assert edge.min() > 0.99, path.name


def test_the_page_is_self_contained(analysed):
    text = (analysed[2].folder / "analysis" / "analysis.html").read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text) == []
    assert not re.search(r"@import|url\(|<script", text)
    images = re.findall(r"<img[^>]*>", text)
    assert len(images) == len(FIGURES) and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert text.count("<h1>") == 1 and text.index("Verdict") < text.index("<img")
    assert "&lt;b&gt;&amp;run" in text and "<b>" not in text
    # The points of the map are in the CSV file alone.
    assert text.count("<table") == len(TABLES - {"map_pca"})


def test_the_page_in_a_browser(analysed, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "This test looks at the page in Chromium, which is not installed: apt-get install chromium"
    text = (analysed[2].folder / "analysis" / "analysis.html").read_text(encoding="utf-8")
    # Each frame tells the page around it what it looks like; no window can be as narrow as a phone.
    tell = """<script>addEventListener("load", () => parent.postMessage({
        width: innerWidth, needed: document.documentElement.scrollWidth, client: document.documentElement.clientWidth,
        images: document.images.length, failed: [...document.images].filter(image => !image.naturalWidth).length,
        first: document.querySelector(".verdict").getBoundingClientRect().top,
        verdict: [...document.querySelectorAll(".verdict h3")].map(heading => heading.innerText)}, "*"))</script>"""
    (tmp_path / "page.html").write_text(text.replace("</body>", tell + "</body>"), encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in (400, 1200)
    )
    (tmp_path / "around.html").write_text(
        '<!DOCTYPE html><meta charset="utf-8"><pre></pre><script>addEventListener("message", event => {'
        'document.querySelector("pre").textContent += JSON.stringify(event.data) + "\\n"})</script>' + frames,
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=10000", "--dump-dom", (tmp_path / "around.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)
    assert done.returncode == 0 and told, done.stderr
    seen = sorted((json.loads(line) for line in html.unescape(told[1]).splitlines()), key=lambda one: one["width"])
    assert [one["width"] for one in seen] == [400, 1200]
    verdict = json.loads((analysed[2].folder / "analysis" / "verdict.json").read_text())
    for one in seen:
        assert one["needed"] <= one["client"], f"The page is wider than {one['width']} pixels"
        assert (one["images"], one["failed"]) == (len(FIGURES), 0)
        assert [line.split(":")[0] for line in one["verdict"]] == ["ctr", "cvr", "field attention"]
        assert one["verdict"][0].endswith(", ".join(finding["name"] for finding in verdict[0]["findings"]))
        # The verdict is what a reader sees first.
        assert 0 < one["first"] < 500


def silent(line):
    pass


def test_an_earlier_analysis_is_replaced_and_nothing_else_is(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mvke_tf.analysis.runs.chapters_of", lambda model: (verdict_chapter, user_chapter))
    out = tmp_path / "out"
    out.mkdir()
    first = analyze_run(tiny_run, out, "validation", user="9", top=1, report=silent)
    (out / "stale.txt").write_text("")
    other = analyze_run(
        tiny_run, out, "validation", user="9", thresholds=Thresholds(collapsed_weight=0.0), report=silent
    )
    assert not (out / "stale.txt").exists() and (out / "analysis.html").is_file()
    assert {verdict.state for verdict in other.verdicts} == {"collapsed"} != {v.state for v in first.verdicts}
    assert pd.read_csv(out / "tables" / "user.csv")["rank"].max() == 10
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for target in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(ValueError, match=r"new, empty, or holds an earlier one. Received: .*mine"):
            analyze_run(tiny_run, target, report=silent)
    for settings, message in (
        ({"part": "tset"}, "Unknown part of the data"),
        ({"user": "99"}, r"a user with an impression in the test part, such as \[.*Received: '99'"),
        ({"map_method": "lda"}, "Received: 'lda'"),
    ):
        with pytest.raises(ValueError, match=message):
            analyze_run(tiny_run, out, **settings, report=silent)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["ple", "hard_sharing"])
def test_other_models(tiny_run, name, monkeypatch):
    # The pictures are looked at above; here, whether each model gets those that suit it.
    monkeypatch.setattr("mvke_tf.analysis.figures.png", lambda figure: bytes(32))
    prepared = tiny_run.prepared
    config = ModelConfig(name, embedding_dim=8, hidden_dims=(8,), num_experts=4)
    tiny_run.save_checkpoint(build_model(name, prepared.schema, config))
    analysis = analyze_run(tiny_run, report=silent)
    pictures = {path.stem for path in (analysis.folder / "figures").iterdir()}
    if name == "hard_sharing":
        assert analysis.verdicts == () and "no gates" in analysis.summary
        assert pictures == {"map_ctr", "map_cvr"} and "This model has no gates" in analysis.page.read_text()
    else:
        # Gates start near uniform.
        assert [verdict.state for verdict in analysis.verdicts] == ["uniform", "uniform"]
        assert pictures == FIGURES - {"field_attention", "kernels_cosine"}


def test_the_last_state_of_a_user(small_run):
    prepared = small_run.prepared
    user, row, known = user_state(prepared, "test", "10")
    raw, pairs = prepared.raw["user"], prepared.pairs
    assert user == "10" and raw["user_id"][row] == 10
    ours = pairs[(raw["user_id"][pairs["user_row"]] == 10)]
    inside = ours[ours["part"] == 2]
    assert inside.loc[inside["user_row"] == row, "timestamp"].unique().tolist() == [inside["timestamp"].max()]
    before = ours[(ours["rating"] > 0) & (ours["timestamp"] < inside["timestamp"].max())]
    assert known == sorted(set(before["item_row"])) and len(known) == raw["rating_count"][row]
