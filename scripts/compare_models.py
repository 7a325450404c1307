"""Compares models with the same budget over several seeds: tables, tests against single-task learning, a picture.

Interrupted, it goes on when it is called again; models and seeds can be added to a comparison that is there.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_settings, positive_int, read_settings, run_main
from mvke_tf.config import BASELINE_NAMES, MODEL_NAMES

NAMES = (*MODEL_NAMES, *BASELINE_NAMES)


def own_settings(text: str) -> tuple[str, Path]:
    model, _, path = text.partition("=")
    if model not in NAMES or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected MODEL=FILE with one of {NAMES} and a JSON file, received {text!r}")
    return model, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, help="rows of the table (default: all)")
    parser.add_argument("--seeds", type=positive_int, default=5, help="seeds per model, from 0 (default: 5)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison, as comparisons/<name>")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="raw and prepared data (default: data)")
    parser.add_argument("--config", type=Path, help="JSON file of settings of all models")
    parser.add_argument(
        "--configs",
        nargs="+",
        type=own_settings,
        default=[],
        metavar="MODEL=FILE",
        help="settings of one model each, such as the best_config.json of scripts/tune.py; data, tasks, epochs, batch "
        "size and patience must be the same for all",
    )
    add_settings(parser, "data", "model", "training", without=("model", "seed"))
    args = parser.parse_args()
    files = dict(args.configs)
    configs = {model: read_settings(args, files.get(model, args.config)) for model in dict.fromkeys(args.models)}
    if unused := sorted(set(files) - set(configs)):
        parser.error(f"--configs has settings of {unused}, which --models does not name.")

    from mvke_tf.comparison import Comparison

    # TensorFlow warns of functions that are traced again and again; here they belong to one model after another.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)

    comparison = Comparison(args.out, configs, args.seeds, args.data_dir)
    try:
        comparison.run()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it was.", file=sys.stderr)
        sys.exit(130)
    print(f"\n{(args.out / 'table.md').read_text(encoding='utf-8')}")
    for name in ("table.md", "table.csv", "results.csv", "comparison.png", "runs"):
        print(args.out / name)


if __name__ == "__main__":
    run_main(main)
