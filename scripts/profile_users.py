"""Makes the profiles of users: the items or genres that each is most likely to click or convert on, as files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_run_arguments, positive_int, run_main


def user_id(text: str) -> int | str:
    """Type of an id, or the word `all`."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected ids of users, or all; received {text!r}")
    return text if text == "all" else int(text)


SEARCHES = ("flat", "hnsw", "ivf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--task", nargs="+", help="tasks, for example cvr (default: all of the model)")
    parser.add_argument("--top", type=positive_int, default=20, help="ranks per user (default: 20)")
    parser.add_argument("--by", choices=("item", "genre"), default="item", help="what to rank (default: item)")
    parser.add_argument(
        "--users", nargs="+", type=user_id, default=["all"], metavar="ID", help="ids of users, or all (default: all)"
    )
    parser.add_argument("--exclude_seen", action="store_true", help="leave out what a user has rated")
    parser.add_argument(
        "--genre_items",
        type=positive_int,
        default=10,
        help="a genre's score is the mean over so many of its items, the user's best (default: 10)",
    )
    parser.add_argument(
        "--memory_mb", type=positive_int, default=512, help="bound of the working memory, in MiB (default: 512)"
    )
    parser.add_argument("--out", type=Path, help="folder of the files (default: <run>/profiles)")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=("parquet", "csv"),
        default=["parquet", "csv"],
        help="formats of the files (default: both)",
    )
    search = parser.add_argument_group(
        "vector search",
        "an index finds the items, approximately, instead of scoring them all; pays for large catalogues",
    )
    search.add_argument("--index", choices=("faiss",), help="library of the index (default: none, exact scoring)")
    search.add_argument("--index_kind", choices=SEARCHES, help="kind of the index (default: hnsw)")
    search.add_argument("--links", type=positive_int, help="HNSW: links per item (default: 32)")
    search.add_argument("--cells", type=positive_int, help="IVF: number of cells (default: 4 sqrt(items))")
    search.add_argument(
        "--effort",
        type=positive_int,
        help="HNSW: candidates kept while searching; IVF: cells looked into (default: 64)",
    )
    args = parser.parse_args()
    if "all" in args.users and len(args.users) > 1:
        parser.error(f"argument --users: expected ids or all, received {args.users}")
    kind = (args.index_kind or "hnsw") if args.index else None
    for option, kinds in {"index_kind": SEARCHES, "links": ("hnsw",), "cells": ("ivf",), "effort": SEARCHES}.items():
        if getattr(args, option) is not None and kind not in kinds:
            found = f"an index of the kind {kind}" if kind else "no --index"
            parser.error(
                f"argument --{option}: belongs to --index with --index_kind {'|'.join(kinds)}, received {found}"
            )

    # TensorFlow takes seconds to import: only after the arguments have proved right.
    from mvke_tf.profiles import profile_run
    from mvke_tf.run import Run
    from mvke_tf.vector_index import IndexConfig

    files = profile_run(
        Run.open(args.checkpoint_path, args.model),
        tasks=args.task,
        top=args.top,
        by=args.by,
        users=None if args.users == ["all"] else args.users,
        exclude_seen=args.exclude_seen,
        memory_mb=args.memory_mb,
        genre_items=args.genre_items,
        formats=args.format,
        folder=args.out,
        index=IndexConfig(kind, links=args.links or 32, cells=args.cells or 0) if kind else None,
        effort=args.effort or 64,
    )
    for task, paths in files.items():
        print(f"{task}: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    run_main(main)
