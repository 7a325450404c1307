"""Trains a multi-task model on MovieLens-100K, or continues an interrupted training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_settings, given_settings, read_settings, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_name", help="name of the folder under --runs_dir (default: the model and the time)")
    parser.add_argument("--resume", type=Path, help="run folder to continue; its own settings hold")
    parser.add_argument("--config", type=Path, help="JSON file of settings, such as the config.json of a run")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="raw and prepared data (default: data)")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    add_settings(parser, "data", "model", "training")
    args = parser.parse_args()
    config = read_settings(args, args.config)
    if args.resume and (args.run_name or args.config or given_settings(args)):
        parser.error("--resume continues a run with the settings in its config.json; leave the other settings out.")

    from mvke_tf.run import Run
    from mvke_tf.training import train, train_run

    try:
        if args.resume:
            result = train_run(Run.open(args.resume))
        else:
            result = train(config, args.run_name, args.data_dir, args.runs_dir)
    except KeyboardInterrupt:
        print("\nInterrupted. Continue: python scripts/train.py --resume runs/<name>", file=sys.stderr)
        sys.exit(130)
    print(f"Best epoch {result.best_epoch} of {len(result.history)}: {result.run.checkpoint}")
    if result.rows_per_second:
        print(f"{result.rows_per_second:,.0f} training rows per second (median of the epochs)")
    print(f"Peak memory {result.peak_memory / 2**30:.2f} GiB")
    if result.gpu_peak_memory is not None:
        print(f"Peak GPU memory {result.gpu_peak_memory / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_main(main)
