# SPDX-License-Identifier: Apache-2.0
import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mvke_tf import datasets
from mvke_tf.config import SECTIONS
from mvke_tf.datasets.options import Option
from mvke_tf.errors import DeclarationError

OWN = """
format = 1
source = { path = "log.csv" }
features.age = { tower = "user", encode = "buckets" }
tasks.click = { label = "click" }
"""


def test_names():
    assert datasets.names() == ("movielens", "movielens/ratings", "adult", "ads")
    assert datasets.DEFAULT in datasets.names()


@pytest.mark.parametrize(
    ("name", "called", "tasks"),
    [
        ("movielens", "movielens", ("ctr", "cvr", "rating")),
        ("movielens/ratings", "movielens-ratings", ("ctr", "cvr", "rating")),
        ("adult", "adult", ("income", "married")),
        ("ads", "ads", ("click", "install", "revenue")),
    ],
)
def test_every_declaration_is_legal(name, called, tasks):
    dataset = datasets.find(name)
    assert (dataset.name, dataset.task_names) == (called, tasks)


def test_a_path_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN, encoding="utf-8")
    for dataset in (datasets.find(path), datasets.find(str(path)), datasets.load(path, tmp_path)):
        assert (dataset.name, dataset.folder) == ("mine", tmp_path)
    assert datasets.options(path) == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("movilens", "There is no dataset 'movilens'. Did you mean 'movielens'? Expected a declaration"),
        ("ad", "one of movielens, movielens/ratings, adult, ads."),
        ("log.csv", "There is no dataset 'log.csv'. A table needs a declaration: `mvke init log.csv` writes a draft"),
        ("nothing.toml", "nothing.toml is no file."),
    ],
)
def test_unknown_dataset(name, message):
    with pytest.raises(DeclarationError) as raised:
        datasets.load(name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "movielens",
            {"protocl": "ratings"},
            "has no option 'protocl'. Did you mean 'protocol'? Options: protocol, split",
        ),
        ("movielens/ratings", {"protocol": "ratings"}, "'movielens/ratings' has no option 'protocol'."),
        ("movielens", {"protocol": "rating"}, "protocol must be one of impressions, ratings. Did you mean 'ratings'?"),
        ("movielens", {"neg_ratio": "2"}, "Option neg_ratio must be of type int. Received: '2'"),
        ("movielens", {"unknown_rate": True}, "Option unknown_rate must be of type float. Received: True"),
        ("movielens", {"unknown_rate": 1.5}, "`unknown_rate` must be a finite number from 0 to 1. Received: 1.5"),
        ("movielens", {"history_length": 1}, "[features.recent_items]: `length`"),
        ("movielens", {"neg_ratio": -1}, "[negatives]: `per_positive` must be"),
        ("movielens", {"protocol": "ratings", "neg_ratio": 2}, "neg_ratio has no effect with protocol = ratings"),
        ("adult", {"rows": 3}, "The dataset 'adult' has no option 'rows'. Options: data_seed"),
        ("ads", {"rows": 0}, "Ad log: `rows` must be from 1 to 100,000,000,000. Received: 0"),
        ("ads", {"agreement": 2.0}, "Ad log: `agreement` must be from -1 to 1. Received: 2.0"),
    ],
)
def test_wrong_options_leave_nothing(tmp_path, name, given, message):
    with pytest.raises(DeclarationError) as raised:
        datasets.load(name, tmp_path, **given)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN, encoding="utf-8")
    with pytest.raises(DeclarationError, match=r"has no option 'split'\. Options: none"):
        datasets.load(path, split="random")


@pytest.mark.parametrize("name", datasets.names())
def test_options_make_a_command_line(name):
    parser = argparse.ArgumentParser()
    for option in datasets.options(name):
        parser.add_argument(f"--{option.name}", help=option.help, **option.argument())
    assert set(vars(parser.parse_args([])).values()) == {None}
    assert "(default: 0)" in parser.format_help()


@pytest.mark.parametrize("name", datasets.names())
def test_options_are_no_settings_of_a_model_or_a_training(name):
    settings = {field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)}
    assert not settings & {option.name for option in datasets.options(name)}


@pytest.mark.parametrize("name", datasets.names())
def test_keys_of_options_exist(name):
    dataset = datasets.find(name)
    for option in datasets.options(name):
        for key in option.keys:
            dataset.replace({key: 1 if option.type is int and "seed" in key else option.default})


def test_option_reads_paths():
    assert Option("folder", "", None, Path).read("x") == Path("x")
    assert Option("rate", "100 % of it", 1, float).help == "100 %% of it (default: 1)"


def test_names_and_options_import_nothing_heavy():
    code = (
        "import sys; from mvke_tf import datasets; [datasets.options(name) for name in datasets.names()]; "
        "print([name for name in ('tensorflow', 'keras', 'polars', 'pandas', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
