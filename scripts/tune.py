"""Searches good settings of a model with KerasTuner, by the validation score; called again, it goes on.

The number of virtual kernels decides which of them each task sees: task t of T those from floor(t K / 2T) to
K - 1 - floor((T - 1 - t) K / T).

Searched are learning rate, embedding, virtual kernels, hidden layers and dropout, but for those that are given: with
--learning_rate 2e-3 the rest.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_settings, positive_int, read_settings, run_main

# Options of the searched settings, by their names in the search space.
SEARCHED = {
    "learning_rate": "learning_rate",
    "embedding_dim": "embedding_dim",
    "num_virtual_kernels": "num_virtual_kernels",
    "hidden_width": "hidden_dims",
    "dropout_rate": "dropout_rate",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the search, as tuning/<name>")
    parser.add_argument("--trials", type=positive_int, default=20, help="trials in all (default: 20)")
    parser.add_argument("--tuner", choices=("random", "bayesian"), default="random", help="(default: random)")
    parser.add_argument("--seed", type=int, help="seed of the search and of every training (default: 0)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="raw and prepared data (default: data)")
    parser.add_argument("--config", type=Path, help="JSON file of the settings that are not searched")
    add_settings(parser, "data", "model", "training", without=("seed",))
    args = parser.parse_args()
    config = read_settings(args, args.config)
    fixed = [name for name, option in SEARCHED.items() if getattr(args, option) is not None]

    from mvke_tf.finished_runs import configs_of_runs
    from mvke_tf.tuning import tune

    # TensorFlow warns of functions that are traced again and again; here they belong to one model after another.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)

    try:
        table = tune(config, args.out, args.trials, args.tuner, args.data_dir, fixed)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it was.", file=sys.stderr)
        sys.exit(130)
    print(f"\n{table.to_string(index=False)}\n\n{args.out / 'trials.csv'}")
    # A run of single_task learns one task, a trial of its search each.
    for suffix in configs_of_runs(config):
        print(f"Train the best: python scripts/train.py --config {args.out / f'best_config{suffix}.json'}")


if __name__ == "__main__":
    run_main(main)
