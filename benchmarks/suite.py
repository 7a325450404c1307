# SPDX-License-Identifier: Apache-2.0
"""All of speed in one run: sections that can be run one by one, one JSON file, one page of it for the docs.

    python benchmarks/suite.py --data movielens                      # every section that bench/suite.json lacks
    python benchmarks/suite.py --data movielens --sections training  # one of them, again
    python benchmarks/suite.py --page docs/suite.md             # the page, from what has been measured

Variants of a section take turns, so that a machine that slows down slows all of them. Wall and CPU seconds (of all
threads) are medians with the least and the most. `share` is what matrix products alone would need at the speed of a
product of two 2048 x 2048 matrices, measured between the variants, over the time taken; `flops` per row is counted in
the graph of a training step of each tower, per distinct user and item.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import add_data, import_tensorflow, positive_int, prepared_of, run_main
from mvke_tf.config import MODEL_NAMES, ModelConfig, RunConfig, TrainingConfig
from mvke_tf.errors import ConfigError
from mvke_tf.io import atomic_write, read_json, write_json

Rows = list[dict[str, Any]]
GEMM_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        repeats: Measurements of each variant.
        pairs: Rows of the log of one measurement.
        batch_sizes: Of the training.
        models: Names of models.
        synthetic: Users and items of generated data.
        gemm: Rows of the matrices whose product is the yardstick.
        environments: Folder of the environments of other libraries.
    """

    repeats: int = 5
    pairs: int = 40_000
    batch_sizes: tuple[int, ...] = (256, 1024, 4096)
    models: tuple[str, ...] = tuple(name for name in MODEL_NAMES if name != "single_task")
    synthetic: int = 5_000
    gemm: int = GEMM_SIZE
    environments: str = "bench/environments"


@dataclasses.dataclass
class Variant:
    """Something to measure: `work` does `rows` rows of it, in products of `flops` operations per row.

    Args:
        labels: What tells it from the others of its section.
        work: Does it once; a float that it returns is seconds of CPU of another process, which did it.
        rows: Rows that it does.
        flops: Float operations of a row in matrix products; 0 if they are not what it is about.
        notes: Values that `work` has measured itself, one list per name.
    """

    labels: dict[str, Any]
    work: Callable[[], object]
    rows: int
    flops: float = 0.0
    notes: dict[str, list[float]] = dataclasses.field(default_factory=dict)


# === Measuring ===


def gemm_gflops(size: int) -> float:
    """Float32 operations per second of the best of five products of two large matrices, in 1e9."""
    import tensorflow as tf

    matrix = tf.random.stateless_normal((size, size), (0, 0))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        tf.matmul(matrix, matrix).numpy()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e9


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(variants: Sequence[Variant], size: Size) -> Rows:
    """Measures variants in turns, after one round that does not count, with the yardstick before each round."""
    for variant in variants:
        variant.work()
        for values in variant.notes.values():
            values.clear()
    peaks, wall, cpu = [], [[] for _ in variants], [[] for _ in variants]
    for _ in range(size.repeats):
        peaks.append(gemm_gflops(size.gemm))
        for index, variant in enumerate(variants):
            started, processed = time.perf_counter(), time.process_time()
            elsewhere = variant.work()
            wall[index].append(time.perf_counter() - started)
            cpu[index].append(time.process_time() - processed + (elsewhere if isinstance(elsewhere, float) else 0.0))
    peak = statistics.median(peaks)
    return [
        summary(variant, wall[index], cpu[index], peak) | {"gemm_gflops": spread(peaks)}
        for index, variant in enumerate(variants)
    ]


def summary(variant: Variant, wall: Sequence[float], cpu: Sequence[float], peak: float) -> dict[str, Any]:
    """What is kept of a variant: rows per second, CPU microseconds per row, share of the peak of products."""
    speed = variant.rows / statistics.median(wall)
    return {
        **variant.labels,
        "rows": variant.rows,
        "wall_seconds": spread(wall),
        "cpu_seconds": spread(cpu),
        "rows_per_second": speed,
        "cpu_us_per_row": 1e6 * statistics.median(cpu) / variant.rows,
        "mflops_per_row": variant.flops / 1e6 or None,
        "share": variant.flops * speed / (1e9 * peak) if variant.flops else None,
        **{name: spread(values) for name, values in variant.notes.items()},
    }


def step_flops(tower: Any, rows: int = 8) -> float:
    """Float operations of matrix products per row of a tower, forwards and backwards."""
    import tensorflow as tf

    def step(inputs: Mapping[str, Any]) -> Any:
        with tf.GradientTape() as tape:
            total = tf.add_n([tf.reduce_sum(vector) for vector in tower(inputs).values()])
        return [g for g in tape.gradient(total, tower.trainable_variables) if g is not None]

    specs = {name: tf.TensorSpec((rows, *x.shape[1:]), x.dtype) for name, x in tower.input.items()}
    graph = tf.function(step, autograph=False).get_concrete_function(specs).graph
    return sum(map(product_flops, graph.get_operations())) / rows


def product_flops(operation: Any) -> float:
    """Twice the multiplications of one operation of a graph; 0 if it is no matrix product."""
    if operation.type not in ("MatMul", "BatchMatMul", "BatchMatMulV2", "Einsum"):
        return 0.0
    shapes = [tuple(tensor.shape) for tensor in operation.inputs]
    if operation.type == "Einsum":
        terms = operation.get_attr("equation").decode().split("->")[0].split(",")
        sizes = {
            letter: n for term, shape in zip(terms, shapes, strict=True) for letter, n in zip(term, shape, strict=True)
        }
        return 2.0 * math.prod(sizes.values())
    transposed = operation.get_attr("transpose_a" if operation.type == "MatMul" else "adj_x")
    return 2.0 * math.prod(operation.outputs[0].shape) * shapes[0][-2 if transposed else -1]


# === Sections ===


def _training(prepared: Any, config: RunConfig, size: Size, labels: dict[str, Any]) -> Variant:
    """Part of an epoch through `fit`, from the first batch to its return."""
    import keras
    import numpy as np

    from mvke_tf.data.batches import Batches
    from mvke_tf.training.loop import DISTINCT_MULTIPLE, build_training_model, set_seed

    class LastBatch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # Reading the loss waits for the step.
            float(logs["loss"])
            self.ended = time.perf_counter()

    training = config.training
    set_seed(training)
    data = prepared.part("train")
    batches = Batches(data, training.batch_size, training.deduplicate, DISTINCT_MULTIPLE)
    plain, model = build_training_model(config, prepared.schema(), batches.steps)
    steps = min(batches.steps, max(1, size.pairs // training.batch_size))
    # So many distinct users and items have the batches that are measured.
    count, distinct = 0, [0, 0]
    for inputs, targets, *_ in batches.epoch(training.seed, 0).take(steps):
        pairs = [np.asarray(inputs[name]) for name in ("user_rows", "item_rows") if name in inputs]
        size_of_batch = len(next(iter(targets.values())))
        count += size_of_batch
        rows = [len(np.unique(pair)) for pair in pairs] or [size_of_batch] * 2
        distinct = [n + more for n, more in zip(distinct, rows, strict=True)]
    flops = (distinct[0] * step_flops(plain.user_tower) + distinct[1] * step_flops(plain.item_tower)) / count
    watch, late = LastBatch(), []

    def work() -> None:
        model.fit(batches.epoch(training.seed, 0).take(steps), shuffle=False, verbose=0, callbacks=[watch])
        late.append(time.perf_counter() - watch.ended)

    return Variant(labels, work, count, flops, {"seconds_after_last_batch": late})


def training(prepared: Any, size: Size) -> Rows:
    """Rows per second of every model at every batch size, and of MVKE with mixed bfloat16."""
    variants = []
    for batch_size in size.batch_sizes:
        for name in size.models:
            for precision in ("float32", "mixed_bfloat16") if name == "mvke" else ("float32",):
                settings = TrainingConfig(batch_size=batch_size, precision=precision)
                labels = {"model": name, "batch_size": batch_size, "precision": precision}
                variants.append(_training(prepared, RunConfig(ModelConfig(name), settings), size, labels))
    return measure(variants, size)


# Of a module that others train with: what is installed for it, and which models of it `peers.py` knows.
PEERS = {
    "torch_rechub": (
        ("torch==2.13.0", "torch-rechub==0.9.0"),
        ("mvke of torch", "mmoe of torch-rechub", "ple of torch-rechub"),
    ),
    "deepctr": (("tensorflow==2.21.*", "tf_keras==2.21.*", "deepctr==0.9.4"), ("mmoe of deepctr",)),
}


PEER_PROGRAM = Path(__file__).with_name("peers.py")


class Peer:
    """A process that trains a model of another library, in the environment of that one."""

    def __init__(self, python: Path, model: str, file: Path, program: Path = PEER_PROGRAM) -> None:
        self.errors = file.with_name(f"{model}.log")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [str(python), str(program), model, str(file)],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True},
            )
        self._answer()

    def train(self, batch_size: int, rows: int) -> float:
        """Seconds of CPU of an epoch on the first rows."""
        self.process.stdin.write(f"{batch_size} {rows}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.errors.stem} ended with status {self.process.wait()}: {self.errors.read_text()}")
        return answer

    def end(self) -> None:
        """It ends with its input."""
        self.process.communicate()


def environment(module: str, packages: Sequence[str], folder: Path) -> Path | None:
    """The Python that can import a module, which is installed if it is not there; `None` if that fails."""
    python = folder / module / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    tried = [str(python), "-c", f"import {module}"]
    if subprocess.run(tried, capture_output=True).returncode:
        print(f"peers: installing {' '.join(packages)} into {python.parents[1]}", flush=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages])
        if (done := subprocess.run(tried, capture_output=True, text=True)).returncode:
            print(f"warning: {module} is left out: {done.stderr.strip()[-300:]}", flush=True)
            return None
    return python


def write_columns(prepared: Any, rows: int, file: Path) -> int:
    """Writes the fields of the first rows of the training part, in a random order, for `peers.py`; how many rows."""
    import numpy as np

    data, schema = prepared.part("train"), prepared.schema()
    chosen = np.random.default_rng(0).permutation(len(data))[:rows]
    of = {"user": (data.users, data.user_rows[chosen]), "item": (data.items, data.item_rows[chosen])}
    sizes = {feature.name: feature.vocabulary_size for feature in schema.features}
    columns, fields = {}, []
    for feature in schema.features:
        kind = "dense" if feature.is_dense else "list" if feature.length > 1 else "index"
        described = (feature.name, feature.tower, kind, feature.width or feature.length, feature.table)
        names = ("name", "side", "kind", "width", "table")
        fields.append(dict(zip(names, described, strict=True)) | {"rows": sizes[feature.table]})
        table, indices = of[feature.tower]
        columns |= {name: np.asarray(table[name])[indices] for name in feature.inputs}
    labels = [np.float32(data.labels[task.name][chosen]) for task in schema.tasks[:2]]
    np.savez(file, fields=json.dumps(fields), label_0=labels[0], label_1=labels[1], **columns)
    return len(chosen)


def peers(prepared: Any, size: Size) -> Rows:
    """Training beside other libraries, on the same columns: theirs are in memory in order, ours come from `tf.data`.

    The models have the same sizes (`benchmarks/peers.py`). MVKE in PyTorch is written as usual, in a loop over the
    virtual kernels. The models of torch-rechub and DeepCTR have no two towers: user and item go into every expert.
    "Every row by itself" is `--no-deduplicate`.
    """
    ours = (("mvke", True), ("mvke", False), ("mmoe", True), ("ple", True))
    variants, left_out = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        file = Path(folder) / "columns.npz"
        rows = write_columns(prepared, size.pairs, file)
        for batch_size in size.batch_sizes:
            for name, distinct in ours:
                labels = {"model": name if distinct else f"{name}, every row by itself", "batch_size": batch_size}
                config = RunConfig(ModelConfig(name), TrainingConfig(batch_size=batch_size, deduplicate=distinct))
                variants.append(_training(prepared, config, size, labels))
        for module, (packages, models) in PEERS.items():
            python = environment(module, packages, Path(size.environments))
            if python is None:
                left_out += models
                continue
            for model in models:
                peer = Peer(python, model, file)
                ending.callback(peer.end)
                for batch_size in size.batch_sizes:
                    whole = rows - rows % batch_size
                    work = functools.partial(peer.train, batch_size, whole)
                    labels = {"model": model, "batch_size": batch_size}
                    variants.append(Variant(labels, work, whole))
        measured = measure(variants, size)
    return measured + [dict.fromkeys(measured[0]) | {"model": f"{model} (not installed)"} for model in left_out]


def inference(prepared: Any, size: Size) -> Rows:
    """Pairs of the test part, and all users' best 20 of all items."""
    from mvke_tf.inference.predictions import predict
    from mvke_tf.models import build_model
    from mvke_tf.serving.profiles import Candidates, Profiler, Users

    variants, test = [], prepared.part("test")
    for name in size.models:
        model = build_model(name, prepared.schema(), ModelConfig(name))
        variants.append(Variant({"what": "test pairs", "model": name}, lambda m=model: predict(m, test), len(test)))
        users, profiler = Users.of(prepared), Profiler(model, Candidates.of(prepared))
        scored = len(users) * len(Candidates.of(prepared).ids)
        what = {"what": "all pairs, top 20", "model": name}
        variants.append(Variant(what, lambda p=profiler, u=users: p.profiles(u, top=20), scored))
    return measure(variants, size)


# What a command imports, it imports as the command does.
FIRST_STEP = """
import os, sys
from mvke_tf import cli
cli.import_backend()
from mvke_tf.training.callbacks import EpochWatch

def stop(self, batch, logs=None):
    float(logs["loss"])
    os._exit(0)

EpochWatch.on_train_batch_end = stop
cli.main(sys.argv[1:])
"""


TABLE = """
import os, sys
from mvke_tf import cli
cli.import_backend()
from mvke_tf.evaluation import report

report._write_pictures = lambda *of_run: os._exit(0)
cli.main(sys.argv[1:])
"""


def start_up(prepared: Any, size: Size) -> Rows:
    """Processes of their own: `--help`, `train` up to its first step, `evaluate` to its table and with pictures."""
    from mvke_tf.training import train

    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quick = RunConfig(training=TrainingConfig(epochs=1, batch_size=4096, monitor_images_epochs=0))
        run = train(prepared, quick, "run", folder / "runs", folder / "data").run
        data = ["--data", str(run.folder), "--data_dir", str(run.prepared_folder.parents[1])]
        commands = {
            "mvke --help": ["-c", "from mvke_tf import cli; cli.main()", "--help"],
            "import tensorflow": ["-c", "import tensorflow"],
            "mvke train, to the first step": ["-c", FIRST_STEP, "train", *data, "--runs_dir", str(folder / "new")],
            "mvke evaluate, to its table": ["-c", TABLE, "evaluate", str(run.folder)],
            "mvke evaluate, with pictures": ["-c", "from mvke_tf import cli; cli.main()", "evaluate", str(run.folder)],
        }
        rows = []
        for what, arguments in commands.items():
            wall, cpu = [], []
            for _ in range(size.repeats):
                before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
                wall.append(time.perf_counter() - started)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                if done.returncode:
                    raise RuntimeError(f"{what}: {done.stderr}")
                cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            rows.append({"what": what, "wall_seconds": spread(wall), "cpu_seconds": spread(cpu)})
    return rows


def preparation(prepared: Any, size: Size) -> Rows:
    """From tables to encoded arrays, and those read back from a folder; rows are those of the log."""
    from mvke_tf.data.preparation import prepare
    from mvke_tf.data.store import PreparedDataset

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "prepared"
        prepared.save(saved)
        variants = [
            Variant({"what": "prepare"}, lambda: prepare(prepared.dataset), len(prepared)),
            Variant({"what": "load"}, lambda: PreparedDataset.load(saved).part("train"), len(prepared)),
        ]
        return measure(variants, size)


GROWTH: dict[str, tuple[int, ...]] = {
    "batch_size": (64, 256, 1024, 4096),
    "num_virtual_kernels": (1, 5, 16),
    "embedding_dim": (16, 64, 128),
    "history": (10, 50, 200),
    "users": (1, 10, 100),
    "items": (1, 10, 100),
}


def growth(prepared: Any, size: Size) -> Rows:
    """One setting at a time, on generated data: users and items in multiples of those of the base."""
    variants = []
    for setting, values in GROWTH.items():
        for value in values:
            variants.append(_generated(setting, value, size))
    return measure(variants, size)


def _generated(setting: str, value: int, size: Size) -> Variant:
    import numpy as np

    from mvke_tf.data.batches import Interactions
    from mvke_tf.schema import Feature, Schema, Task

    given = {"batch_size": 256, "history": 50, "users": 1, "items": 1} | {setting: value}
    users, items = size.synthetic * given["users"], size.synthetic * given["items"]
    random = np.random.default_rng(0)
    schema = Schema(
        (
            *(Feature(f"profile_{n}", "user", 100) for n in range(4)),
            Feature("user", "user", users + 1),
            Feature("history", "user", items + 1, length=given["history"], embedding="item"),
            *(Feature(f"kind_{n}", "item", 100) for n in range(4)),
            Feature("item", "item", items + 1),
        ),
        (Task("click"), Task("buy", given="click")),
    )
    shape = (users, given["history"])
    history = {"history": random.integers(1, items + 1, shape), "history_weights": np.ones(shape)}
    tables = {
        "user": {"user": np.arange(1, users + 1), **history},
        "item": {"item": np.arange(1, items + 1)},
    }
    for feature in schema.features:
        if feature.name not in tables[feature.tower]:
            count = users if feature.tower == "user" else items
            tables[feature.tower][feature.name] = random.integers(1, 100, count)
    kinds = {True: np.float32, False: np.int32}
    encoded = {
        side: {name: column.astype(kinds[name.endswith("_weights")]) for name, column in table.items()}
        for side, table in tables.items()
    }
    click = random.random(size.pairs) < 0.3
    data = Interactions(
        encoded["user"],
        encoded["item"],
        random.integers(0, users, size.pairs),
        random.integers(0, items, size.pairs),
        {"click": click, "buy": click & (random.random(size.pairs) < 0.3)},
    )

    class Generated:
        def part(self, name: str) -> Interactions:
            return data

        def schema(self) -> Schema:
            return schema

    model = {name: given[name] for name in ("num_virtual_kernels", "embedding_dim") if name in given}
    config = RunConfig(ModelConfig(**model), TrainingConfig(batch_size=given["batch_size"]))
    return _training(Generated(), config, size, {"setting": setting, "value": value})


SECTIONS: dict[str, Callable[[Any, Size], Rows]] = {
    function.__name__: function for function in (training, peers, inference, start_up, preparation, growth)
}


# === The run ===


def machine() -> str:
    """The processor and the number of cores, as figures name them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def run(prepared: Any, folder: Path, sections: Sequence[str], size: Size, again: bool = False) -> dict[str, Any]:
    """Measures sections, and keeps each as soon as it is done.

    Args:
        prepared: The data.
        folder: Holds `suite.json`.
        sections: Their names, in order.
        size: How much is measured.
        again: Whether those that have been measured are measured again.

    Returns:
        All that the file holds.
    """
    file = folder / "suite.json"
    kept: dict[str, Any] = read_json(file, ConfigError) if file.is_file() else {"sections": {}}
    folder.mkdir(parents=True, exist_ok=True)
    for name in sections:
        if name in kept["sections"] and not again:
            print(f"{name}: has been measured, {kept['sections'][name]['date']}", flush=True)
            continue
        started = time.perf_counter()
        rows = SECTIONS[name](prepared, size)
        seconds = time.perf_counter() - started
        kept["sections"][name] = {
            **{"date": time.strftime("%Y-%m-%d"), "machine": machine(), "data": prepared.dataset.name},
            **{"load": os.getloadavg()[0], "seconds": seconds, "size": dataclasses.asdict(size), "rows": rows},
        }
        write_json(file, kept)
        print(f"{name}: {seconds:.0f} s, {len(rows)} rows", flush=True)
    return kept


# === The page ===


def page(kept: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """The page of the docs, from what has been measured, with a picture of some sections."""
    lines = [
        "# The benchmark suite",
        "",
        "`make bench` measures, and `python benchmarks/suite.py --page docs/suite.md` writes this page of it.",
        "Medians, with the least and the most in brackets; `share` is that of the speed of a product of two",
        "2048 x 2048 matrices, measured in turn with the rest.",
    ]
    if not kept["sections"]:
        lines += ["", "Nothing has been measured by it yet; [benchmarks](benchmarks.md) has the figures there are."]
    for name, section in kept["sections"].items():
        made = f"{section['data']}, {section['machine']}, {section['date']}, load {section['load']:.1f} at the end"
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", inspect.getdoc(SECTIONS[name]) or ""]
        lines += ["", f"(`python benchmarks/suite.py --sections {name}`; {made}.)", ""]
        if pictures and name in pictures:
            lines += [f"![{name}]({pictures[name]})", ""]
        lines += _table(section["rows"])
    return "\n".join(lines) + "\n"


def draw(kept: Mapping[str, Any], stem: Path) -> dict[str, str]:
    """Draws speed by batch size, and by what grows, into `<stem>_<section>.png`; the names of the files."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    drawn = {}
    for name, key in (("training", "model"), ("peers", "model"), ("growth", "setting")):
        rows = [row for row in kept["sections"].get(name, {}).get("rows", []) if row.get("rows_per_second")]
        if not rows:
            continue
        groups: dict[str, Rows] = {}
        for row in rows:
            group = row[key] if row.get("precision", "float32") == "float32" else f"{row[key]}, {row['precision']}"
            groups.setdefault(group, []).append(row)
        count, x = (len(groups), "value") if name == "growth" else (1, "batch_size")
        figure = Figure(figsize=(11, 2.4) if name == "growth" else (9, 4), layout="constrained")
        axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for index, (group, measured) in enumerate(groups.items()):
            panel = axes[index % count]
            speeds = [row["rows_per_second"] for row in measured]
            style = {"linestyle": "--"} if " of " in group else {}
            panel.plot([row[x] for row in measured], speeds, marker="o", markersize=4, label=group, **style)
            panel.set(xscale="log", yscale="log", xlabel=group.replace("_", " ") if count > 1 else "batch size")
            panel.set_xticks([row[x] for row in measured], [f"{row[x]:,}" for row in measured])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("rows per second")
        if count == 1:
            axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        drawn[name] = f"{stem.name}_{name}.png"
        figure.savefig(stem.with_name(drawn[name]), dpi=130)
    return drawn


def _table(rows: Rows) -> list[str]:
    names = [name for name in rows[0] if any(row.get(name) not in (None, 0.0) for row in rows)]
    labels = names.index("rows") if "rows" in names else len(names)
    # What a narrow window shows first.
    first = ("rows_per_second", "cpu_us_per_row", "share")
    columns = names[:labels] + sorted(names[labels:], key=lambda name: name not in first)
    text = {True: "---", False: "---:"}
    return [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "|".join(text[isinstance(rows[0][name], str)] for name in columns) + "|",
        *("| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows),
    ]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_cell(value['median'])} ({_cell(value['min'])}-{_cell(value['max'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser, sys.argv[1:])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="(default: those that are not there yet)")
    parser.add_argument("--output_dir", type=Path, default=Path("bench"), help="(default: bench)")
    parser.add_argument("--repeats", type=positive_int, default=Size.repeats, help=f"(default: {Size.repeats})")
    parser.add_argument("--page", type=Path, help="writes the page instead of measuring")
    args = parser.parse_args()
    if args.page is not None:
        kept = read_json(args.output_dir / "suite.json", ConfigError)
        text = page(kept, draw(kept, args.page.with_suffix("")))
        with atomic_write(args.page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    import_tensorflow()
    size = Size(repeats=args.repeats)
    run(prepared_of(args), args.output_dir, args.sections or tuple(SECTIONS), size, again=args.sections is not None)


if __name__ == "__main__":
    run_main(main)
