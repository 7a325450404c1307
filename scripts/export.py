"""Exports a trained run as a SavedModel: raw features in, probabilities out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint_path", type=Path, required=True, help="folder of the run, or the best.keras in it"
    )
    parser.add_argument("--export_path", type=Path, help="folder of all versions (default: <run>/export)")
    parser.add_argument("--model", help="name of the model, to make sure that the run holds it")
    args = parser.parse_args()
    if not args.checkpoint_path.exists():
        parser.error(f"argument --checkpoint_path: there is nothing at {args.checkpoint_path}")

    from mvke_tf.run import Run
    from mvke_tf.serving import export_run

    run = Run.open(args.checkpoint_path)
    name = run.config.model.name
    if args.model not in (None, name):
        raise ValueError(f"--model does not fit the run {run.folder}. Expected: {name}. Received: {args.model}")
    path = export_run(run, args.export_path)
    load = f"import tensorflow as tf; print(tf.saved_model.load({str(path.resolve())!r}).signatures['serving_default'])"
    print(f"SavedModel: {path}   (its inputs and outputs: {path / 'signatures.json'})")
    print(f'Load it: python -c "{load}"')


if __name__ == "__main__":
    run_main(main)
