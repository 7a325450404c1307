"""Shows what the experts of a run learned: a verdict, tables, pictures, and one page to open and send on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_run_arguments, positive_int, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder to write to (default: analysis in the folder of the run)")
    parser.add_argument(
        "--part", choices=("train", "validation", "test"), default="test", help="part of the data (default: test)"
    )
    parser.add_argument("--user", help="id of the user to explain (default: the one with the most impressions)")
    parser.add_argument("--top", type=positive_int, default=10, help="items of that user, per task (default: 10)")
    parser.add_argument(
        "--map",
        choices=("pca", "tsne", "umap"),
        default="pca",
        help="plane of the map; umap is an extra (default: pca)",
    )
    args = parser.parse_args()

    # TensorFlow takes seconds to import: only after the arguments have proved right.
    from mvke_tf.analysis import analyze_run
    from mvke_tf.run import Run

    run = Run.open(args.checkpoint_path, args.model)
    analysis = analyze_run(run, args.out, args.part, args.user, args.map, args.top)
    print(f"\n{analysis.summary}\n")
    places = {"page": analysis.page, "tables": analysis.folder / "tables", "figures": analysis.folder / "figures"}
    for what, place in places.items():
        print(f"{what + ':':<9}{place}")


if __name__ == "__main__":
    run_main(main)
