"""Obtains, verifies and prepares MovieLens-100K."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_settings, read_settings, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="raw and prepared data (default: data)")
    parser.add_argument(
        "--source",
        choices=("auto", "folder", "grouplens", "recbole"),
        default="auto",
        help="where the raw data comes from (default: the first that answers)",
    )
    parser.add_argument("--folder", type=Path, help="a folder with the raw files u.data, u.user and u.item")
    parser.add_argument("--overwrite", action="store_true", help="prepare again what is prepared already")
    add_settings(parser, "data")
    args = parser.parse_args()
    config = read_settings(args).data

    from mvke_tf.data.prepared import prepare_movielens

    prepare_movielens(args.data_dir, config, args.folder, args.source, args.overwrite)


if __name__ == "__main__":
    run_main(main)
