# SPDX-License-Identifier: Apache-2.0
"""Repeats the MMoE paper's experiment on two synthetic tasks: a figure, a table, and whether its ordering appears."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/synthetic"), help="where results are kept; run again to go on"
    )
    parser.add_argument(
        "--correlations", type=float, nargs="+", default=[0.5, 0.9, 1.0], help="cosines of the two tasks' weights"
    )
    parser.add_argument("--seeds", type=positive_int, default=5, help="seeds of data and weights, at least 2")
    parser.add_argument("--steps", type=positive_int, default=4000, help="steps of each training")
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2], help="searched for each model"
    )
    parser.add_argument("--points", type=positive_int, default=20, help="points of each curve; divides --steps")
    args = parser.parse_args()

    from mvke_tf.experiments.mmoe_paper import (
        ExperimentConfig,
        results_table,
        run_experiment,
        searched,
        verdict,
        write_results,
    )

    config = ExperimentConfig(steps=args.steps, points=args.points, learning_rates=tuple(args.learning_rates))
    try:
        cells = run_experiment(args.output_dir, args.correlations, args.seeds, config)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on where {args.output_dir} ends.", file=sys.stderr)
        sys.exit(130)
    table, picture = write_results(cells, args.output_dir)
    best = searched(cells)
    print(
        f"\nFinal test loss, mean ± 95 % interval of {args.seeds} seeds (best learning rate)\n\n{results_table(best)}"
    )
    print(f"\n{verdict(best)}")
    print(f"\nFigure: {picture}   Losses: {table}")


if __name__ == "__main__":
    run_main(main)
