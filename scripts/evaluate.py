"""Evaluates the best checkpoint of a run: a table on screen, pictures, and the run's report.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_run_arguments, positive_int, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="part of the data (default: test)"
    )
    parser.add_argument("--batch_size", type=positive_int, default=4096, help="pairs per step (default: 4096)")
    args = parser.parse_args()

    # TensorFlow takes seconds to import: only after the arguments have proved right.
    from mvke_tf.evaluation import evaluate_run, results_table
    from mvke_tf.run import Run

    run = Run.open(args.checkpoint_path, args.model)
    report = evaluate_run(run, args.split, args.batch_size)
    print(f"\n{results_table(report, args.split)}\n\n{run.contents()}")


if __name__ == "__main__":
    run_main(main)
