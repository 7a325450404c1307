# SPDX-License-Identifier: Apache-2.0
"""The wheel, in an environment that has its declared dependencies and nothing else."""

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

DRIVER = """
import sys
from mvke_tf import cli
for line in sys.argv[1:]:
    try:
        cli.main(line.split())
    except SystemExit as ended:
        print("status", ended.code, line, flush=True)
"""


def closure(requirements, found):
    """The distributions that requirements stand for, with all that these need, `{name: distribution}`."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name not in found:
                found[name] = distribution(name)
                closure(found[name].requires or (), found)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment variables of a Python that finds the wheel and links to its dependencies only."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"
    source.mkdir()
    for name in ("mvke_tf", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(REPOSITORY / name)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True, timeout=300)
    (wheel,) = folder.glob("mvke_tf-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "installed", wheel], check=True, timeout=300)
    (metadata,) = (folder / "installed").glob("mvke_tf-*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(encoding="utf-8"), re.M)
    links = folder / "dependencies"
    links.mkdir()
    for found in closure([text for text in needed if "extra ==" not in text], {}).values():
        for top in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (links / top).exists():
                (links / top).symlink_to(Path(found.locate_file(top)).resolve())
    path = os.pathsep.join(map(str, (folder / "installed", links)))
    return {"PYTHONPATH": path, "PATH": os.environ["PATH"], "HOME": str(folder)}


def python(environment, folder, *arguments):
    # -S: without the site-packages of the tests.
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_wheel_goes_from_a_table_to_a_model_with_its_core_alone(environment, tmp_path):
    rows = [f"u{row % 40},i{row % 23},{row},{row % 7},{int(row % 7 > 3 or row % 5 == 0)}" for row in range(600)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,ts,age,click", *rows]) + "\n")
    train = "train --data log.toml --run_name mine --epochs 2 --embedding_dim 4 --hidden_dims 4 --num_virtual_kernels 3"
    lines = [
        *("init log.csv", "check log.toml", "prepare --data log.toml", train, "show runs/mine"),
        *("evaluate runs/mine", "export runs/mine", "runs"),
    ]
    done = python(environment, tmp_path, "-c", DRIVER, *lines)
    assert re.findall(r"^status (\d+) (.*)$", done.stdout, re.M) == [("0", line) for line in lines], done
    # Nothing of TensorFlow's and no warning, though curves, bars and pictures are left out.
    assert done.stderr == ""
    assert done.stdout.count("\nNext:  mvke ") == len(lines)
    assert done.stdout.count("pip install 'mvke_tf[analysis]'") == 2
    for what, module in (("curves for TensorBoard", "tensorboard"), ("progress bars", "tqdm")):
        assert done.stdout.count(f"Note: no {what}; they need {module}: pip install 'mvke_tf[train]'") == 1
    assert "--logdir" not in done.stdout and not (tmp_path / "runs" / "mine" / "tensorboard").exists()
    assert (tmp_path / "runs" / "mine" / "export" / "1" / "saved_model.pb").is_file()
    assert re.search(r"^Epoch 2/2  \d+ s  loss .{20,80}$", done.stdout, re.M)


@pytest.mark.slow
def test_the_core_is_six_packages(environment):
    (metadata,) = Path(environment["PYTHONPATH"].split(os.pathsep)[0]).glob("mvke_tf-*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata.read_text(encoding="utf-8"), re.M)
    assert set(needed) == {"keras", "keras-rs", "numpy", "polars", "pyarrow", "tensorflow"}


@pytest.mark.slow
def test_what_the_core_lacks_is_named(environment, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    extras = {
        f"analyze {run}": ("matplotlib, pandas, sklearn, tqdm", "analysis"),
        f"calibrate {run}": ("scipy, sklearn", "train"),
        f"explore {run}": ("gradio, matplotlib, pandas, sklearn, uvicorn", "explore"),
        f"profile {run}": ("pandas, tqdm", "profile"),
        "compare --output_dir c --models mvke": ("matplotlib, pandas, scipy, sklearn, tqdm", "compare"),
        "tune --output_dir t": ("keras_tuner, pandas, tqdm", "tune"),
        f"serve {run}": ("starlette, uvicorn", "serve"),
        f"onnx {run}": ("tf2onnx, onnx, onnxruntime", "onnx"),
        "prepare --data adult": ("pooch", "datasets"),
    }
    done = python(environment, tmp_path, "-c", DRIVER, *extras)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, (missing, extra) in zip(told, extras.values(), strict=True):
        assert line.endswith(f"Install the extra: pip install 'mvke_tf[{extra}]'"), done.stderr
        assert line.startswith(f"error: This needs {missing}"), line


@pytest.mark.slow
def test_the_command_and_the_types_are_in_the_wheel(environment):
    installed = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    done = python(environment, installed, installed / "bin" / "mvke", "--version")
    assert re.fullmatch(r"mvke_tf \d+\.\d+\.\d+\n", done.stdout), done.stderr
    assert (installed / "mvke_tf" / "py.typed").is_file()
    assert (installed / "mvke_tf" / "datasets" / "ads" / "ads.toml").is_file()
