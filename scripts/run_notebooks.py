# SPDX-License-Identifier: Apache-2.0
"""Executes the notebooks from top to bottom and writes them back with their outputs; after an error, nothing of it."""

from __future__ import annotations

import argparse
import os
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mvke_tf.cli import run_main
from mvke_tf.errors import MvkeError, require_extra

if TYPE_CHECKING:
    from nbformat import NotebookNode

# TensorFlow greets with time, process and machine, and tqdm misses widgets that nothing here uses. Everything else that
# comes on stderr stays.
GREETING = re.compile(
    r"^(?:[IWE]\d{4} .*|WARNING: All log messages before absl.*|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: .*"
    r"|.*TqdmWarning: IProgress not found.*\n.*)\n?",
    re.MULTILINE,
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: NotebookNode, folder: Path, **environment: str) -> None:
    """Executes a notebook in place, in a Python of its own, with this repository's package.

    Args:
        notebook: The notebook; its outputs are replaced.
        folder: Where it runs.
        **environment: Further environment variables.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises an error.
    """
    from nbclient import NotebookClient
    from tqdm import tqdm

    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=cells, unit="cell", disable=None) as bar:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
            on_cell_executed=lambda **_: bar.update(),
        )
        client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment})


def clean(notebook: NotebookNode) -> None:
    """Takes out what differs from machine to machine: versions and times in metadata, TensorFlow's greeting."""
    from nbformat import from_dict

    notebook.metadata = from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = from_dict({})
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stderr":
                    output.text = GREETING.sub("", output.text).lstrip("\n")
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="the notebooks (default: all in notebooks/)")
    args = parser.parse_args()
    missing = [str(path) for path in args.notebooks if not path.is_file()]
    if missing:
        parser.error(f"there is no notebook at {', '.join(missing)}")
    require_extra("notebooks", "ipykernel", "nbclient", "nbformat")

    import nbformat
    from nbclient.exceptions import CellExecutionError

    from mvke_tf.io import atomic_write

    for path in args.notebooks or sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        print(f"{path.name} ...", flush=True)
        notebook, before = nbformat.read(path, as_version=4), _cpu_seconds()
        try:
            execute(notebook, path.resolve().parent, MVKE_NOTEBOOK_BUDGET="full")
        except CellExecutionError as error:
            raise MvkeError(f"{path} stopped and is left as it was. Received: {error}") from error
        clean(notebook)
        with atomic_write(path) as temporary:
            nbformat.write(notebook, temporary)
        print(
            f"{path.name}: {_cpu_seconds() - before:.0f} s of CPU, {path.stat().st_size / 1024:.0f} KiB, written back"
        )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    run_main(main)
