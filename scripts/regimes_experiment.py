# SPDX-License-Identifier: Apache-2.0
"""When does MVKE help? Trains models on generated ad logs whose truth is known: a figure, a table, and a verdict."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import import_tensorflow, positive_int, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/regimes"), help="where results are kept; run again to go on"
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the logs are kept")
    parser.add_argument("--interests", type=positive_int, nargs="+", default=[1, 2, 4, 8], help="interests of a user")
    parser.add_argument(
        "--agreements", type=float, nargs="+", default=[-0.5, 0.0, 0.5, 1.0], help="correlations of the two tasks"
    )
    parser.add_argument("--worlds", type=positive_int, default=5, help="seeds of log and weights, at least 2")
    parser.add_argument("--rows", type=positive_int, default=100_000, help="impressions of a log")
    parser.add_argument("--epochs", type=positive_int, default=15, help="most epochs of a training")
    args = parser.parse_args()
    import_tensorflow()

    from mvke_tf.experiments.regimes import RegimesConfig, results_table, run_experiment, verdict, write_results

    config = RegimesConfig(tuple(args.interests), tuple(args.agreements), worlds=args.worlds, rows=args.rows)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=args.epochs))
    try:
        results = run_experiment(args.output_dir, args.data_dir, config)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on where {args.output_dir} ends.", file=sys.stderr)
        sys.exit(130)
    table, picture = write_results(results, config, args.output_dir)
    print(f"\nShare of the attainable AUC, mean ± 95 % interval of {args.worlds} worlds\n")
    print(f"{results_table(results, config)}\n\n{verdict(results, config)}\n\nFigure: {picture}   AUCs: {table}")


if __name__ == "__main__":
    run_main(main)
