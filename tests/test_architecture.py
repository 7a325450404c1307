# SPDX-License-Identifier: Apache-2.0
"""The plan of the house: imports go down only, and each floor stays free of what belongs above."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import REPOSITORY

# The six floors from the ground up. Rooms of one step do not import one another; a floor may have a few steps.
FLOORS = (
    (1, {"errors"}),
    (1, {"config", "engine", "io"}),
    (1, {"schema"}),
    (2, {"layers", "losses", "metrics"}),
    (2, {"figures"}),
    (3, {"data", "models"}),
    (4, {"run_folder"}),
    (4, {"datasets", "inference", "run"}),
    (5, {"analysis", "evaluation", "serving", "training"}),
    (5, {"explore"}),
    (6, {"experiments"}),
    (6, {"cli"}),
    (6, {"__main__"}),
)
STEP = {room: step for step, (_, rooms) in enumerate(FLOORS) for room in rooms}
FLOOR = {room: floor for floor, rooms in FLOORS for room in rooms}
PACKAGE = REPOSITORY / "mvke_tf"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Words of single datasets: only what makes and compares those may know them.
DATASET_WORDS = re.compile(r"(?<![a-z])(movielens|genres?|ratings?|ctr|cvr)(?![a-z])", re.IGNORECASE)


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(nodes):
    """Names of the modules that some statements import; of `from mvke_tf import data` that is `mvke_tf.data`."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"mvke_tf.{name.name}" for name in node.names) if node.module == "mvke_tf" else (node.module,)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_every_room_has_a_floor():
    assert {room(path) for path in MODULES} - {"__init__"} == set(FLOOR)
    assert [floor for floor, _ in FLOORS] == sorted(floor for floor, _ in FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    if here == "__init__":
        return
    for name in imports(ast.walk(tree(path))):
        there = name.split(".")[1] if name.startswith("mvke_tf.") else None
        # The other public names are those of the package itself, such as its version.
        if there in STEP:
            assert there == here or STEP[there] < STEP[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_datasets_and_experiments_know_the_words_of_a_dataset(path):
    if room(path) in ("datasets", "experiments"):
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if DATASET_WORDS.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("word", ["MovieLens", "rating_count", "auc_ctr", "Genres", "a rating."])
def test_the_words_are_found(word):
    assert DATASET_WORDS.search(word)
    assert not DATASET_WORDS.search("iterating over operating, generating and separating spectra; cvrt")


def test_only_models_look_their_layers_up():
    for path in MODULES:
        if room(path) != "models":
            assert "get_layer(f" not in path.read_text(encoding="utf-8"), path


def test_only_inference_runs_models_batch_by_batch():
    """Besides `fit`, and the paper's experiment, whose models are not those of models/."""
    loops = re.compile(r"(?<![.\w])model\.(?:predict|evaluate)\(|predict_on_batch")
    assert loops.search("x = model.predict(data)") and loops.search("self.model.predict_on_batch(data)")
    for path in MODULES:
        if room(path) not in ("inference", "experiments"):
            assert not loops.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("folder", ["layers", "models"])
def test_layers_and_models_do_not_import_a_backend(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(ast.walk(tree(path)))} & {"tensorflow", "jax", "torch"}, path


def test_command_lines_import_nothing_heavy():
    code = "import sys, mvke_tf.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "mvke_tf" in loaded
    assert not loaded & {"jax", "keras", "matplotlib", "numpy", "pandas", "polars", "pyarrow", "sklearn", "tensorflow"}


def test_no_pipeline_is_tuned_by_tensorflow():
    for path in MODULES:
        assert "AUTOTUNE" not in path.read_text(encoding="utf-8"), path


@pytest.mark.slow
def test_only_the_command_line_prints():
    for path in MODULES:
        if FLOOR.get(room(path), 0) < 6:
            for node in ast.walk(tree(path)):
                printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
                assert not printed, f"{path}:{node.lineno}"


def test_errors_are_raised_and_caught_by_name():
    for path in MODULES:
        for node in ast.walk(tree(path)):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno} catches all"


def test_every_file_names_the_licence_of_the_project():
    licence = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"]
    line = f"# SPDX-License-Identifier: {licence}\n"
    files = [
        path
        for folder in ("mvke_tf", "scripts", "benchmarks", "tests", "docs")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    assert len(files) > 250
    without = [str(path) for path in files if not path.read_text(encoding="utf-8").startswith(line)]
    assert not without, f"The first line must be {line!r} in: {', '.join(without)}"
    assert f"license: {licence}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
