"""Exports a trained run as a SavedModel: raw features in; probabilities, vectors and recommendations out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_run_arguments, positive_int, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--export_path", type=Path, help="folder of all versions (default: <run>/export)")
    parser.add_argument(
        "--version", type=positive_int, help="number of the version; one that exists is not overwritten (default: next)"
    )
    args = parser.parse_args()

    # TensorFlow takes seconds to import: only after the arguments have proved right.
    from mvke_tf.run import Run
    from mvke_tf.serving import export_run

    path = export_run(Run.open(args.checkpoint_path, args.model), args.export_path, args.version)
    load = f"import tensorflow as tf; print(tf.saved_model.load({str(path.resolve())!r}).signatures['serving_default'])"
    print(f"SavedModel: {path}   (signatures with their inputs and outputs: {path / 'signatures.json'})")
    print(f'Load it: python -c "{load}"')


if __name__ == "__main__":
    run_main(main)
