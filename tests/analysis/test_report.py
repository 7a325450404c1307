# SPDX-License-Identifier: Apache-2.0
"""The analysis of a run: its files, its pictures, and its page in a real browser."""

import io
import json
import logging
import re
import runpy
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from mvke_tf.analysis import Grouping, Thresholds, analyze_run, gate_weights, report, user_state
from mvke_tf.analysis.figures import (
    explanation_figure,
    map_figure,
    png,
    similarity_figure,
    weights_figure,
    weights_scale,
)
from mvke_tf.analysis.page import Card, Picture, Section, page
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError, DataError
from mvke_tf.models import build_model
from mvke_tf.run import Run
from tests.browser import DESK, PHONE, chromium, faults
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

FIGURES = {
    *("weights_by_tags", "weights_by_age", "weights_by_country"),
    *("utilisation", "entropy", "effect", "experts_cka", "experts_correlation", "kernels_cosine", "field_attention"),
    *("map_click", "map_buy", "user_click", "user_buy"),
}
TABLES = {
    *(
        "gate_weights",
        "contribution_shares",
        "kernel_cards",
        "utilisation",
        "gate_entropy",
        "gate_effect",
        "expert_similarity",
    ),
    *("kernel_similarity", "field_attention", "map_pca", "user"),
}


@pytest.fixture(scope="module")
def analysed(tiny_run_template, tmp_path_factory):
    """The command on the small run: its status, its output, and the run."""
    folder = tmp_path_factory.mktemp("analysed")
    shutil.copytree(tiny_run_template.parents[1], folder / "tiny")
    path = folder / "tiny" / "runs" / tiny_run_template.name
    run = Run(path.rename(path.with_name("<b>&run")))
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
    assert [entry["task"] for entry in verdict] == ["click", "buy"]
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
    assert set(tables["user"]["rank"]) == {1, 2, 3, 4} and tables["user"]["item"].str.startswith("Item ").all()
    prepared = run.prepared
    state = user_state(prepared, "test")
    assert state.known and not set(tables["user"]["item_row"]) & set(state.known)
    # What the page says of the user is what the model says.
    rows = tables["user"].drop_duplicates(["task", "rank"])
    model = run.load_model()
    for task, best in rows.groupby("task"):
        items = best["item_row"].to_numpy()
        features = {
            name: np.repeat(prepared.users.encoded[name][[state.row]], len(items), axis=0)
            for name in model.user_tower.input
        }
        features |= {name: prepared.items.encoded[name][items] for name in model.item_tower.input}
        np.testing.assert_allclose(best["logit"], model(features)[task][:, 0], rtol=1e-5, atol=1e-5)
        assert best["item"].tolist() == prepared.items.names[items].tolist()
    assert state.name in (run.folder / "analysis" / "analysis.html").read_text()


def test_every_kernel_that_a_task_sees_has_a_card(analysed):
    run = analysed[2]
    folder = run.folder / "analysis"
    cards = pd.read_csv(folder / "tables" / "kernel_cards.csv", keep_default_na=False).set_index(["task", "expert"])
    assert cards.index.tolist() == [*(("click", k) for k in (0, 1, 2)), *(("buy", k) for k in (1, 2, 3, 4))]
    prepared, model = run.prepared, run.load_model()
    pairs = prepared.part("test")
    gates = model.gates({name: prepared.items.encoded[name][pairs.item_rows] for name in model.gates.input})
    effect = pd.read_csv(folder / "tables" / "gate_effect.csv").set_index(["task", "expert"])["difference"]
    alike = pd.read_csv(folder / "tables" / "expert_similarity.csv").set_index(["expert_a", "expert_b"])["cka"]
    text = (folder / "analysis.html").read_text(encoding="utf-8")
    shown = dict(re.findall(r'<article class="card">\n<h3>(.*?)</h3>\n(.*?)</article>', text, re.DOTALL))
    assert list(shown) == [f"{task}: kernel {kernel}" for task, kernel in cards.index]
    for (task, kernel), card in cards.iterrows():
        weights = np.asarray(gates[task])[:, list(model.experts_of(task)).index(kernel)]
        assert card["mean_weight"] == pytest.approx(weights.mean(), abs=1e-6)
        assert card["difference"] == pytest.approx(effect[task, kernel])
        others = [other for other in model.experts_of(task) if other != kernel]
        assert card["most_similar"] == max(others, key=lambda other: alike[kernel, other])
        page = shown[f"{task}: kernel {kernel}"]
        assert f"<dd>{weights.mean():.2f} on average, the largest in" in page
        assert f"<dt>Without it</dt><dd>AUC {card['difference']:+z.4f}</dd>" in page
        assert f"<dd>kernel {card['most_similar']} (CKA {card['cka']:.2f})</dd>" in page
        # Items by weight, the highest first, of those with the most impressions.
        highest = [float(entry.rsplit("(", 1)[1].split(",")[0]) for entry in card["items"].split("; ") if entry]
        assert highest == sorted(highest, reverse=True)
        listed = [" ".join(entry.split()) for entry in card["items"].split("; ") if entry]
        assert all(f"<dd>{entry}</dd>" in page for entry in listed)
    assert any(cards["items"])


def test_the_pictures(analysed):
    folder = analysed[2].folder / "analysis" / "figures"
    assert {path.stem for path in folder.iterdir()} == FIGURES
    for path in folder.iterdir():
        pixels = imread(path)[..., :3]
        assert pixels.shape[0] > 250 and pixels.shape[1] > 400
        # Something is drawn, it survives the loss of colour, and nothing is cut off at the edge.
        grey = pixels @ np.array([0.299, 0.587, 0.114], "float32")
        assert np.ptp(grey) > 0.7
        edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        assert edge.min() > 0.99, path.name


def test_the_page_is_self_contained(analysed):
    text = (analysed[2].folder / "analysis" / "analysis.html").read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text) == []
    assert not re.search(r"@import|url\(|<script", text)
    images = re.findall(r"<img[^>]*>", text)
    assert len(images) == len(FIGURES) and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert text.count("<h1>") == 1 and text.index("Verdict") < text.index("<img")
    assert "What the experts of &lt;b&gt;&amp;run learned" in text and "<b>" not in text
    # The points of the map, and the cards, are tables in CSV files alone.
    assert text.count("<table") == len(TABLES - {"map_pca", "kernel_cards"})
    assert text.count('class="card"') == 7 and "<h3>buy: kernel 4</h3>" in text
    assert "Heat map of the mean gate weight of each expert by age of the user (years), per task" in text


def test_the_page_in_a_browser(analysed):
    folder = analysed[2].folder / "analysis"
    verdict = json.loads((folder / "verdict.json").read_text())
    look = """() => { const all = selector => [...document.querySelectorAll(selector)]; return {
        images: document.images.length, failed: [...document.images].filter(image => !image.naturalWidth).length,
        scrolling: all("figure.wide").filter(one => one.scrollWidth > one.clientWidth).length,
        hints: all("figure.wide figcaption").filter(one => one.offsetHeight > 0).length,
        legible: Math.min(...all("figure img").map(image => image.width)),
        first: document.querySelector(".verdict").getBoundingClientRect().top,
        verdict: all(".verdict h3").map(heading => heading.innerText)}}"""
    with chromium() as browser:
        for width in (PHONE, DESK):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto((folder / "analysis.html").as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert faults(page) == []
            seen = page.evaluate(look)
            assert (seen["images"], seen["failed"]) == (len(FIGURES), 0)
            # A picture that is too wide scrolls, and says so.
            assert seen["scrolling"] == seen["hints"] and (seen["hints"] > 0) == (width == PHONE)
            assert seen["legible"] > 300
            assert [line.split(":")[0] for line in seen["verdict"]] == ["click", "buy", "field attention"]
            assert seen["verdict"][0].endswith(", ".join(finding["name"] for finding in verdict[0]["findings"]))
            # The verdict is what a reader sees first.
            assert 0 < seen["first"] < 500


def test_an_earlier_analysis_is_replaced_and_nothing_else_is(tiny_run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report, "CHAPTERS", (report.verdict_chapter, report.user_chapter))
    out = tmp_path / "out"
    out.mkdir()
    with caplog.at_level(logging.INFO):
        first = analyze_run(tiny_run, out, "validation", user="9", top=1)
    assert f"Analysing {tiny_run.checkpoint} on 48 rows of the validation part ..." in caplog.messages
    (out / "stale.txt").write_text("")
    other = analyze_run(tiny_run, out, "validation", user=9, thresholds=Thresholds(collapsed_weight=0.0))
    assert not (out / "stale.txt").exists() and (out / "analysis.html").is_file()
    assert {verdict.state for verdict in other.verdicts} == {"collapsed"} != {v.state for v in first.verdicts}
    assert pd.read_csv(out / "tables" / "user.csv")["rank"].max() == 10
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for target in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(ConfigError, match=r"new, empty, or holds an earlier one. Received: .*mine"):
            analyze_run(tiny_run, target)
    for settings, error, message in (
        ({"part": "tset"}, ConfigError, "The parts of the data are"),
        ({"user": "99"}, DataError, r"a user with a row in the test part, such as .* Received: '99'"),
        ({"map_method": "lda"}, ConfigError, "Received: 'lda'"),
    ):
        with pytest.raises(error, match=message):
            analyze_run(tiny_run, out, **settings)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert list(tmp_path.glob(".writing-*")) == []


@pytest.mark.parametrize("name", ["ple", "hard_sharing"])
def test_other_models(tiny_run, name, monkeypatch):
    # The pictures are looked at above; here, whether each model gets those that suit it.
    monkeypatch.setattr("mvke_tf.analysis.figures.png", lambda figure: bytes(32))
    config = ModelConfig(name, embedding_dim=8, hidden_dims=(8,), num_experts=4)
    tiny_run.save_checkpoint(build_model(name, tiny_run.prepared.schema(), config))
    analysis = analyze_run(tiny_run)
    pictures = {path.stem for path in (analysis.folder / "figures").iterdir()}
    if name == "hard_sharing":
        assert analysis.verdicts == () and "no gates" in analysis.summary
        assert pictures == {"map_click", "map_buy"} and "This model has no gates" in analysis.page.read_text()
        assert {path.stem for path in (analysis.folder / "tables").iterdir()} == {"map_pca"}
    else:
        # Gates start near uniform, and nothing is lost without their choice.
        assert [verdict.state for verdict in analysis.verdicts] == ["uniform", "uniform"]
        assert pictures == FIGURES - {"field_attention", "kernels_cosine"}
        text = analysis.page.read_text()
        assert "What each expert stands for" in text and "<h3>click: expert 0</h3>" in text and "kernel 0" not in text


def test_more_rows_than_are_looked_at(tiny_run, monkeypatch, caplog):
    monkeypatch.setattr(report, "CHAPTERS", (report.verdict_chapter,))
    with caplog.at_level(logging.INFO):
        analysis = analyze_run(tiny_run, most_rows=50)
    assert caplog.messages[-1].endswith("on 50 rows of the test part ...")
    text = analysis.page.read_text()
    assert "50 rows of the test part of small (split by share_of_time), drawn at random of 96." in text
    assert analysis.summary.startswith("click: ") and "Over 50 impressions" in analysis.summary


def run_of(tmp_path, prepared, name="mmoe", **settings):
    prepared.save(tmp_path / "prepared")
    prepared = PreparedDataset.load(tmp_path / "prepared")
    config = ModelConfig(name, embedding_dim=4, hidden_dims=(4,), num_experts=3, embedding_stddev=1.0, **settings)
    run = Run.create(tmp_path / "runs" / name, RunConfig(config, TrainingConfig()), prepared)
    run.save_checkpoint(build_model(name, prepared.schema(config.tasks, config.objective), config))
    return run


def test_a_table_without_users_and_items(tmp_path):
    """Rows of their own, one constant item, no groups but those found in the data, names that look like formulas."""
    random = np.random.default_rng(0)
    rows = 300
    log = {
        "city": np.array(["=cmd()", "$5 {town", "Москва"])[random.integers(0, 3, rows)],
        "age": random.integers(18, 80, rows),
        "bought": random.integers(0, 2, rows),
        "spent": random.exponential(10, rows).round(2),
    }
    declaration = {
        "format": 1,
        "source": {},
        "features": {"city": {"tower": "user", "encode": "vocabulary"}, "age": {"tower": "user", "encode": "buckets"}},
        "tasks": {
            "bought": {"label": "bought"},
            "spent": {"label": "spent", "kind": "regression", "transform": "log1p", "where": "bought"},
        },
    }
    run = run_of(tmp_path, prepare(Dataset.from_frame(log, declaration)))
    analysis = analyze_run(run)
    folder = analysis.folder / "tables"
    assert {path.stem for path in folder.iterdir()} == TABLES - {"kernel_similarity", "field_attention", "map_pca"}
    user = pd.read_csv(folder / "user.csv")
    assert set(user["task"]) == {"bought", "spent"} and set(user["rank"]) == {1} and set(user["item"]) == {"item 0"}
    text = analysis.page.read_text()
    assert "There are too few items for a map." in text and "; there is a single item" in text
    assert re.search(r"Row \d+, the last state in this part", text) and "=cmd()" in text
    # In the CSV file no cell begins a formula.
    groups = pd.read_csv(folder / "gate_weights.csv")["group"]
    assert {"'=cmd()", "$5 {town", "Москва"} <= set(groups)
    effect = pd.read_csv(folder / "gate_effect.csv").set_index(["task", "change"])
    assert effect.loc[("spent", "as trained"), "metric"] == "rmse"
    inside = run.prepared.part_rows("test")
    assert effect.loc[("spent", "as trained"), "impressions"] == run.prepared.label("bought")[inside].sum()


def test_items_without_ids_are_called_by_their_features(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CHAPTERS", (report.user_chapter,))
    log = {
        "tag": ["a", "b", None, "rare"] * 30,
        "price": [1.5, 2.0, 2.5, 3.0] * 30,
        "age": range(120),
        "click": [0, 1] * 60,
    }
    log["part"] = [2 * (number % 4 < 3) * (number > 60) for number in range(120)]
    features = {
        "tag": {"tower": "item", "encode": "vocabulary"},
        "price": {"tower": "item", "encode": "number"},
        "age": {"tower": "user", "encode": "buckets"},
    }
    split = {"by": "column", "column": "part", "train": 0, "validation": 1, "test": 2}
    tasks = {"click": {"label": "click"}}
    declaration = {"format": 1, "source": {}, "split": split, "features": features, "tasks": tasks}
    run = run_of(tmp_path, prepare(Dataset.from_frame(log, declaration)), "mvke", num_virtual_kernels=2)
    table = pd.read_csv(analyze_run(run).folder / "tables" / "user.csv")
    # The combination of the value "rare" is in none of the rows that are looked at.
    assert set(table["item"]) == {"tag a, price 1.5", "tag b, price 2.0", "no tag, price 2.5"}


def test_a_task_given_an_event_that_the_model_does_not_predict_counts_on_its_rows(small_run):
    prepared = small_run.prepared
    rows = prepared.part_rows("test")
    clicked = prepared.event("click")[rows]
    assert 0 < clicked.sum() < len(rows)
    alone = report._interactions(prepared, "test", ("buy",), "conditional")
    assert alone.weights["buy"].tolist() == clicked.tolist()
    for tasks, objective in ((("click", "buy"), "conditional"), (("buy",), ""), (("buy",), "joint")):
        assert "buy" not in report._interactions(prepared, "test", tasks, objective).weights


# === Pictures ===


def weights_of_groups(**groups):
    """A table of gate weights of one task and two experts: `group=(weight of the first, impressions)`."""
    everything = {"all": (0.5, 10_000), **groups}
    return pd.DataFrame(
        [
            ("buy", "all" if group == "all" else "place", group, expert, value, impressions)
            for group, (weight, impressions) in everything.items()
            for expert, value in ((1, weight), (3, 1 - weight))
        ],
        columns=["task", "variable", "group", "expert", "mean_weight", "impressions"],
    )


def test_all_heat_maps_of_gates_have_one_scale():
    flat = weights_of_groups(here=(0.51, 5000), there=(0.49, 5000))
    assert (weights_scale(flat).vmin, weights_scale(flat).vmax) == (0.0, 2.0)
    # Of another variable and task, with three experts of which one has 0.9: 2.7 times an equal share.
    three = pd.DataFrame(
        [("click", "age", "old", expert, weight, 5000) for expert, weight in ((0, 0.05), (1, 0.9), (2, 0.05))],
        columns=flat.columns,
    )
    steep = pd.concat([flat, three, three.assign(variable="all", group="all", mean_weight=1 / 3)])
    for variable in ("place", "age"):
        bars = [axes for axes in weights_figure(steep, variable).axes if axes.get_label() == "<colorbar>"]
        assert [bar.get_ylim() for bar in bars] == [(0.0, pytest.approx(2.7))]
    # A small group has no say in the scale.
    assert weights_scale(weights_of_groups(here=(0.5, 5000), there=(1.0, 99))).vmax == 2.0


def test_the_title_names_the_variable_and_small_groups_are_pale():
    frame = weights_of_groups(large=(0.9, 9901), small=(0.9, 99))
    figure = weights_figure(frame, "place", "place of the $hop (city)")
    assert " ".join(figure.get_suptitle().split()) == ("Mean gate weight of each expert by place of the \\$hop (city)")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["large (9,901)", "small (99)"]
    cells = axes.images[0].get_array()
    # The same weight, yet three quarters of the way to white.
    np.testing.assert_allclose(cells[1, :, :3], 0.25 * cells[0, :, :3] + 0.75)
    assert len(axes.patches) == 2 and {patch.get_hatch() for patch in axes.patches} == {"////"}
    assert [text.get_text() for text in figure.legends[0].texts] == ["fewer than 100 impressions or 1% of them"]
    assert weights_figure(weights_of_groups(large=(0.5, 9901)), "place").legends == []
    with pytest.raises(ValueError, match="no groups of 'age'"):
        weights_figure(frame, "age")


def test_grey_has_a_legend():
    other = weights_of_groups(here=(0.5, 10_000)).assign(task="click").replace({"expert": {3: 2}})
    figure = weights_figure(pd.concat([weights_of_groups(here=(0.5, 10_000)), other]), "place")
    assert [text.get_text() for text in figure.legends[0].texts] == ["the task does not see this expert"]
    frame = pd.DataFrame({"expert_a": [0, 0, 1, 1], "expert_b": [0, 1, 0, 1], "cka": [1.0, np.nan, np.nan, np.nan]})
    assert "never changes" in similarity_figure(frame, "cka").legends[0].texts[0].get_text()


def test_of_many_groups_the_largest_are_drawn():
    frame = weights_of_groups(**{f"g{number}": (0.5, 100 + number) for number in range(60)})
    figure = weights_figure(frame, "place")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"g{number} ({100 + number})" for number in range(20, 60)]
    assert figure.get_suptitle().replace("\n", " ").endswith("by place (the 40 largest of 60 groups)")


def test_names_of_the_data_are_no_formulas(run_study, small_run):
    name = "$\\frac{ " + "long " * 30
    groups = Grouping("kind", "item", (name, "none of them"), np.eye(2, dtype=bool)[[0] * 29 + [0]])
    assert png(weights_figure(gate_weights(run_study, [groups]), "kind", name))[:4] == b"\x89PNG"
    frame = report.tables.item_map(run_study)
    figure = map_figure(frame, "click", groups)
    assert figure.axes[0].get_title().endswith("… (30)")
    # Groups without any of the items are as good as none.
    empty = Grouping("kind", "item", ("a",), np.zeros((30, 1), bool))
    assert [axes.get_title() for axes in map_figure(frame, "click", empty).axes] == ["all items"]
    explained = report.explain_user(run_study, 0, [name] * 30, top=1)
    assert png(explanation_figure(explained, "click", "user $"))[:4] == b"\x89PNG"


def test_the_page_escapes_what_it_shows():
    wide, narrow = (b"\x89PNG" + bytes(12) + width.to_bytes(4, "big") for width in (701, 700))
    section = Section(
        "<heading>",
        ("<text>",),
        (Picture("w", wide, 'alt "wide" <'), Picture("n", narrow, "alt narrow")),
        {"<caption>": pd.DataFrame({"<column>": ["<cell>"], "number": [0.5], "none": [np.nan]})},
        ("<quote>\n  <line>\n  Try: <this>",),
        (Card("<card>", {"<what>": ["<one>", "<two>"]}),),
    )
    text = page("<title>", [section])
    assert text.count("<heading>") + text.count("<text>") + text.count("<cell>") + text.count("<card>") == 0
    assert '<p class="try">Try: &lt;this&gt;</p>' in text and '<article class="card">\n<h3>&lt;card&gt;</h3>' in text
    assert "<dt>&lt;what&gt;</dt><dd>&lt;one&gt;</dd><dd>&lt;two&gt;</dd>" in text
    assert "<td>0.5000</td>" in text and "<td></td>" in text
    assert text.count("Scroll sideways") == 1 and text.count('class="wide"') == 2
    assert 'alt="alt &quot;wide&quot; &lt;"' in text
