"""Evaluates the best checkpoint of a run: a table on screen, pictures, and the run's report.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint_path", type=Path, required=True, help="folder of the run, or the best.keras in it"
    )
    parser.add_argument("--model", help="name of the model, to make sure that the run holds it")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="part of the data (default: test)"
    )
    parser.add_argument("--batch_size", type=positive_int, default=4096, help="pairs per step (default: 4096)")
    arguments = parser.parse_args()
    if not arguments.checkpoint_path.exists():
        parser.error(f"argument --checkpoint_path: there is nothing at {arguments.checkpoint_path}")
    return arguments


def main() -> None:
    arguments = parse_arguments()

    # TensorFlow takes seconds to import: only after the arguments have proved right.
    from mvke_tf.evaluation import evaluate_run, picture_files, results_table
    from mvke_tf.run import Run

    run = Run.open(arguments.checkpoint_path)
    name = run.config.model.name
    if arguments.model not in (None, name):
        raise ValueError(f"--model does not fit the run {run.folder}. Expected: {name}. Received: {arguments.model}")
    report = evaluate_run(run, arguments.split, arguments.batch_size)
    print(f"\n{results_table(report, arguments.split)}\n")
    for path in (run.report_file, *picture_files(run, arguments.split)):
        print(path)


if __name__ == "__main__":
    run_main(main)
