# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite on a small dataset: its sums are right, and what has been measured is kept."""

import json

import keras
import pytest
import tensorflow as tf

from benchmarks import suite
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
    assert page.count("\n## ") == 3 and "| shared_bottom | 64 | float32 | 128 |" in page
    assert f"{trained['wall_seconds']['median']:.3g} (" in page


def test_generated_data_grow_by_one_setting():
    variant = suite._generated("history", 4, SMALL)
    variant.work()
    assert (variant.labels, variant.rows) == ({"setting": "history", "value": 4}, 130)
    # 20 users and 20 items; their layers forwards and twice backwards, to which the attention adds little.
    experts = 5 * (6 * 64 * 256 + 256 * 128 + 128 * 64)
    tags = 2 * (5 * 64 * 256 + 256 * 128 + 128 * 64)
    assert 1 < variant.flops * 130 / (20 * 3 * 2 * (experts + tags)) < 1.05
