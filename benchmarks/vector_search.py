# SPDX-License-Identifier: Apache-2.0
"""Where a vector index pays: time per user, recall and memory of exact scoring and of FAISS on a large catalogue.

The items are random mixtures of the features of the items of a run, the users its users, and the vectors those that the
towers of a run make of them; or, with `--vectors gaussian`, independent normal numbers, in which there is no
neighbourhood to search and every index is at its worst. Prints one JSON line per method and effort of its search.
Queries are answered all in one call (`ms_per_user`) and one at a time (`ms_per_user_alone`; not by the scoring of all
pairs, which is made for many users: one at a time, the flat index is the exact method). `memory_mib` is what a method
holds: of exact scoring the vectors themselves, of an index the growth of the process by its end; `build_memory_mib` is
the most that the process grew meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import positive_int, run_main

MIB = 2**20
METHODS = ("exact", "flat", "ivf", "hnsw")
EFFORTS = {"flat": (1,), "ivf": (1, 4, 16, 64, 256), "hnsw": (32, 128, 512)}
ALONE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint_path", type=Path, required=True, metavar="RUN", help="folder of a run")
    parser.add_argument("--task", required=True, help="task whose vectors are searched")
    parser.add_argument(
        "--vectors", choices=("model", "gaussian"), default="model", help="where they come from (default: model)"
    )
    parser.add_argument("--items", type=positive_int, default=1_000_000, help="catalogue (default: 1000000)")
    parser.add_argument("--users", type=positive_int, default=256, help="queries (default: 256)")
    parser.add_argument("--top", type=positive_int, default=20, help="items per user (default: 20)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(default: all)")
    parser.add_argument("--links", type=positive_int, default=16, help="HNSW: links per item (default: 16)")
    parser.add_argument(
        "--construction_effort", type=positive_int, default=40, help="HNSW: candidates per link (default: 40)"
    )
    parser.add_argument("--cells", type=positive_int, default=1024, help="IVF: number of cells (default: 1024)")
    args = parser.parse_args()

    import numpy as np

    from mvke_tf.inference.index import IndexConfig, VectorIndex, recall
    from mvke_tf.inference.topk import best_products
    from mvke_tf.inference.vectors import vectors_of
    from mvke_tf.run import Run
    from mvke_tf.serving.profiles import Users

    measures = runpy.run_path(str(Path(__file__).with_name("profile_users.py")))
    growth, resident = measures["growth"], measures["resident"]
    random = np.random.default_rng(0)
    run = Run.open(args.checkpoint_path)
    model = run.load_model().for_tasks([args.task])
    item_tower, everyone = model.item_tower, Users.of(run.prepared)
    chosen = random.choice(len(everyone), args.users, replace=args.users > len(everyone))
    width = item_tower.output[args.task].shape[-1]
    if args.vectors == "gaussian":
        users, items = (random.standard_normal((count, width), np.float32) for count in (args.users, args.items))
    else:
        users = vectors_of(model.user_tower, everyone.table, chosen)[args.task]
        table = {name: np.asarray(column) for name, column in run.prepared.items.encoded.items()}
        items = np.empty((args.items, width), np.float32)
        for start in range(0, args.items, 65536):
            rows = slice(start, min(start + 65536, args.items))
            count = rows.stop - rows.start
            # A list and its weights belong together; everything else is mixed.
            sources: dict[str, np.ndarray] = {}
            for name in table:
                sources[name] = sources.get(name.removesuffix("_weights"), random.integers(0, len(table[name]), count))
            items[rows] = vectors_of(item_tower, {name: table[name][rows] for name, rows in sources.items()})[args.task]

    def seconds(search) -> tuple[float, float, np.ndarray]:
        """Per user: of a call with one user (median), and of one with all; and what the latter found."""
        alone = []
        for user in users[:ALONE]:
            started = time.perf_counter()
            search(user[None])
            alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = search(users)[1]
        return float(np.median(alone)), (time.perf_counter() - started) / len(users), found

    def report(method: str, **values) -> None:
        about = {"method": method, "vectors": args.vectors, "items": args.items, "width": width, "top": args.top}
        print(json.dumps(about | values | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}), flush=True)

    def speed(together: float, alone: float | None = None) -> dict[str, float | None]:
        return {
            "ms_per_user": round(1e3 * together, 3),
            "ms_per_user_alone": None if alone is None else round(1e3 * alone, 3),
        }

    best_products(users[:1], items[:5000], args.top)
    with growth() as grown:
        started = time.perf_counter()
        _, exact = best_products(users, items, args.top)
        together = (time.perf_counter() - started) / len(users)
    if "exact" in args.methods:
        vectors = round(items.nbytes / MIB, 1)
        report("exact", **speed(together), recall=1.0, memory_mib=vectors, search_memory_mib=grown[0])
    for kind in (method for method in args.methods if method != "exact"):
        config = IndexConfig(kind, args.links, args.construction_effort, args.cells, threads=0)
        started, before = time.perf_counter(), resident()
        with growth(0.05) as grown:
            index = VectorIndex.build(items, config)
        built, held = time.perf_counter() - started, (resident() - before) / MIB
        for effort in EFFORTS[kind]:
            alone, together, found = seconds(lambda queries, n=effort, i=index: i.search(queries, args.top, n))
            report(
                kind,
                **({} if kind == "flat" else {"effort": effort}),
                **speed(together, alone),
                recall=round(recall(found, exact), 4),
                memory_mib=round(held, 1),
                build_memory_mib=grown[0],
                build_seconds=round(built, 1),
            )
        del index


if __name__ == "__main__":
    run_main(main)
