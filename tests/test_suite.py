# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite on a small dataset: its sums are right, and what has been measured is kept."""

import dataclasses
import json
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import peers, suite
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.preparation import prepare
from mvke_tf.errors import ConfigError
from mvke_tf.io import read_json
from tests.small import small_toml

pytestmark = pytest.mark.slow
SMALL = suite.Size(repeats=2, pairs=130, batch_sizes=(64,), models=("shared_bottom",), synthetic=20, gemm=64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(Dataset.from_toml(small_toml(tmp_path_factory.mktemp("tables"))))


def test_operations_of_a_step_by_hand():
    x = keras.Input((3,), name="x")
    tower = keras.Model({"x": x}, {"task": keras.layers.Dense(2)(keras.layers.Dense(4)(x))})
    # Forwards, weights of both layers, and back to the hidden layer; nothing goes back to the input.
    assert suite.step_flops(tower) == 2 * (3 * 4 + 4 * 2) + 2 * (3 * 4 + 4 * 2) + 2 * 4 * 2


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (lambda a, b: tf.matmul(a, b, transpose_a=True), ((7, 5), (7, 3)), 2 * 5 * 3 * 7),
        (lambda a, b: tf.matmul(a, b), ((2, 5, 7), (2, 7, 3)), 2 * 2 * 5 * 3 * 7),
        (lambda a, b: tf.raw_ops.Einsum(inputs=[a, b], equation="bi,io->bo"), ((5, 7), (7, 3)), 2 * 5 * 7 * 3),
        (lambda a, b: a + b, ((5, 7), (5, 7)), 0),
    ],
)
def test_operations_of_a_product(function, shapes, flops):
    graph = tf.function(function).get_concrete_function(*(tf.TensorSpec(shape) for shape in shapes)).graph
    assert sum(map(suite.product_flops, graph.get_operations())) == flops


def test_a_summary_by_hand():
    variant = suite.Variant({"model": "a"}, lambda: None, rows=100, flops=2e6, notes={"late": [0.25, 0.5, 0.75]})
    row = suite.summary(variant, wall=[1.0, 2.0, 4.0], cpu=[3.0, 1.0, 2.0], peak=5.0)
    assert row == {
        **{"model": "a", "rows": 100, "rows_per_second": 50.0, "cpu_us_per_row": 20_000.0, "mflops_per_row": 2.0},
        **{
            "wall_seconds": {"median": 2.0, "min": 1.0, "max": 4.0},
            "cpu_seconds": {"median": 2.0, "min": 1.0, "max": 3.0},
        },
        # 50 rows of 2 MFLOP in a second, of 5 GFLOP.
        **{"share": 0.02, "late": {"median": 0.5, "min": 0.25, "max": 0.75}},
    }


def test_sections_are_kept_and_not_measured_again(prepared, tmp_path, monkeypatch):
    measured = suite.run(prepared, tmp_path, ["training", "inference", "preparation"], SMALL)
    kept = read_json(tmp_path / "suite.json", ConfigError)
    assert kept == json.loads(json.dumps(measured))
    (trained,) = measured["sections"]["training"]["rows"]
    assert (trained["model"], trained["batch_size"], trained["rows"]) == ("shared_bottom", 64, 128)
    assert trained["share"] == pytest.approx(
        trained["mflops_per_row"] * trained["rows_per_second"] / (1e3 * trained["gemm_gflops"]["median"])
    )
    pairs, everyone = measured["sections"]["inference"]["rows"]
    assert pairs["rows"] == len(prepared.part_rows("test"))
    assert everyone["rows"] == len(prepared.latest_users) * len(prepared.catalogue)
    assert [row["rows"] for row in measured["sections"]["preparation"]["rows"]] == [len(prepared)] * 2
    monkeypatch.setattr(suite, "SECTIONS", {"training": None})
    assert suite.run(prepared, tmp_path, ["training"], SMALL) == kept
    monkeypatch.undo()

    page = suite.page(measured)
    assert page.count("\n## ") == 3 and "| model | batch size | precision | rows per second | cpu us per row |" in page
    speed = trained["rows_per_second"]
    assert f"| shared_bottom | 64 | float32 | {speed:,.0f} | " in page and " | 128 | " in page
    assert f"{trained['wall_seconds']['median']:.3g} (" in page


def test_generated_data_grow_by_one_setting():
    variant = suite._generated("history", 4, SMALL)
    variant.work()
    assert (variant.labels, variant.rows) == ({"setting": "history", "value": 4}, 130)
    # 20 users and 20 items; their layers forwards and twice backwards, to which the attention adds little.
    experts = 5 * (6 * 64 * 256 + 256 * 128 + 128 * 64)
    tags = 2 * (5 * 64 * 256 + 256 * 128 + 128 * 64)
    assert 1 < variant.flops * 130 / (20 * 3 * 2 * (experts + tags)) < 1.05


def test_peers_read_the_columns_and_the_labels_of_the_same_rows(prepared, tmp_path):
    rows = suite.write_columns(prepared, 50, tmp_path / "columns.npz")
    log = peers.Log.of(tmp_path / "columns.npz")
    data, schema = prepared.part("train"), prepared.schema()
    chosen = np.random.default_rng(0).permutation(len(data))[:50]
    assert rows == 50 and [field.name for field in log.fields] == [feature.name for feature in schema.features]
    for field, feature in zip(log.fields, schema.features, strict=True):
        table, indices = (data.users, data.user_rows) if feature.tower == "user" else (data.items, data.item_rows)
        for name in feature.inputs:
            np.testing.assert_array_equal(log.columns[name], np.asarray(table[name])[indices[chosen]])
        assert field.kind == ("dense" if feature.is_dense else "list" if feature.length > 1 else "index")
        if not feature.is_dense:
            assert field.rows > log.columns[field.name].max() and field.table == feature.table
    for label, task in zip(log.labels, schema.tasks, strict=False):
        np.testing.assert_array_equal(label, data.labels[task.name][chosen])


def test_a_library_that_cannot_be_imported_is_left_out_by_name(prepared, tmp_path, monkeypatch, capsys):
    python = tmp_path / "no_such_module" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ $2 = pip ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(suite, "PEERS", {"no_such_module": (("no-such-package",), ("mmoe of nobody",))})
    monkeypatch.setattr(suite, "_training", lambda prepared, config, size, labels: suite.Variant(labels, dict, 1))
    monkeypatch.setattr(suite, "measure", lambda variants, size: [variant.labels for variant in variants])
    rows = suite.peers(prepared, dataclasses.replace(SMALL, environments=str(tmp_path)))
    assert [row["model"] for row in rows[:2]] == ["mvke", "mvke, every row by itself"]
    assert rows[-1] == {"model": "mmoe of nobody (not installed)", "batch_size": None}
    printed = capsys.readouterr().out
    assert "installing no-such-package" in printed and "no_such_module is left out" in printed


def test_a_peer_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"mmoe of nobody ended with status 1: (.|\n)*KeyError"):
        suite.Peer(sys.executable, "mmoe of nobody", tmp_path / "columns.npz")


SPINS = """
import time
print("ready", flush=True)
for line in open(0):
    while time.process_time() < float(line.split()[1]):
        pass
    print(time.process_time(), flush=True)
"""


def test_a_peer_answers_with_its_seconds_of_cpu(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SPINS)
    peer = suite.Peer(sys.executable, "any", tmp_path / "columns.npz", program)
    assert 0.5 <= peer.train(7, 0.5) < 60
    peer.end()
    assert peer.process.returncode == 0


def test_pictures_of_what_has_been_measured(tmp_path):
    def row(speed, **labels):
        return {**labels, "rows_per_second": speed}

    rows = [row(10.0 * size, model=model, batch_size=size) for model in ("mvke", "mmoe of x") for size in (1, 2)]
    grown = [row(5.0, setting="users", value=1), row(4.0, setting="users", value=10)]
    sections = {"peers": {"rows": [*rows, row(None, model="left out", batch_size=None)]}, "growth": {"rows": grown}}
    drawn = suite.draw({"sections": sections}, tmp_path / "page")
    assert drawn == {"peers": "page_peers.png", "growth": "page_growth.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn.values())
