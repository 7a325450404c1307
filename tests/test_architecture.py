"""The plan of the house: imports go down only, and the floors below stay free of what belongs above."""

import ast
import sys

import pytest

from tests.conftest import REPOSITORY

# From the ground up; modules of one floor do not import one another, except inside one package.
FLOORS = (
    {"config", "files"},
    {"schema"},
    {"gate_statistics", "layers", "losses", "metrics", "statistics", "vector_index"},
    {"data", "figures", "models"},
    {"exact", "monitoring", "run"},
    {"training", "evaluation", "serving", "server", "onnx_export", "profiles", "analysis"},
    {"baselines", "finished_runs", "comparison_tables"},
    {"comparison", "tuning", "synthetic_experiment"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted((REPOSITORY / "mvke_tf").rglob("*.py"))


def room(parts):
    return parts[1].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_down(path):
    here = room(path.relative_to(REPOSITORY).parts)
    if here == "__init__":
        return
    for name in imports(path):
        if name.startswith("mvke_tf."):
            there = room(name.split("."))
            assert there == here or FLOOR[there] < FLOOR[here], f"{here} imports {there}"


@pytest.mark.parametrize("folder", ["layers", "models"])
def test_layers_and_models_do_not_import_a_backend(folder):
    for path in (REPOSITORY / "mvke_tf" / folder).glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"tensorflow", "jax", "torch"}, path


def test_command_lines_import_nothing_heavy():
    for module in ("cli", "config"):
        names = {name for name in imports(REPOSITORY / "mvke_tf" / f"{module}.py")} - {"mvke_tf.config"}
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
