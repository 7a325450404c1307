# SPDX-License-Identifier: Apache-2.0
"""What embedding tables and their optimizer hold in memory, known before anything of it is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import keras

from mvke_tf.config import RunConfig
from mvke_tf.errors import ConfigError
from mvke_tf.schema import Schema

# Of a float32 weight.
BYTES = 4


@dataclasses.dataclass(frozen=True)
class TableMemory:
    """What one embedding table holds.

    Args:
        name: Name of the feature that owns it.
        rows: Number of indices.
        width: Width of a row.
        weights: Bytes of its weights.
        state: Bytes of what the optimizer keeps of it, and of a gradient as large as the table where there is one.
    """

    name: str
    rows: int
    width: int
    weights: int
    state: int


def table_memory(schema: Schema, config: RunConfig) -> list[TableMemory]:
    """The embedding tables of a model, the largest first."""
    rule = config.training.embedding_optimizer
    # Moments; gradients, where they are as large as the table, and their sums.
    per_weight = 2 if rule == "lazy_adam" else 3 + (config.training.gradient_accumulation_steps > 1)
    tables = []
    for feature in schema.features:
        if not feature.is_dense and feature.embedding is None:
            rows, width = feature.vocabulary_size, config.model.embedding_dim
            state = rows if rule == "rowwise_adagrad" else rows * width * per_weight
            tables.append(TableMemory(feature.name, rows, width, rows * width * BYTES, state * BYTES))
    return sorted(tables, key=lambda table: -table.rows)


def describe_memory(tables: Sequence[TableMemory]) -> str:
    """One line per table and one of their sum."""
    total = TableMemory(
        "total", sum(table.rows for table in tables), 0, *(sum(part) for part in zip(*map(_parts, tables), strict=True))
    )
    lines = [f"  {'embedding table':<24}{'rows x width':>20}{'weights':>12}{'optimizer':>12}"]
    for table in (*tables, total):
        shape = f"{table.rows:,} x {table.width}" if table.width else f"{table.rows:,}"
        lines.append(f"  {table.name:<24}{shape:>20}{_megabytes(table.weights):>12}{_megabytes(table.state):>12}")
    return "\n".join(lines)


def check_memory(tables: Sequence[TableMemory]) -> None:
    """Does nothing if the tables fit the memory that is available, as far as the system says how much that is.

    Raises:
        ConfigError: If they do not; with the sums, and what to do.
    """
    available = available_memory()
    needed = sum(sum(_parts(table)) for table in tables)
    if available is not None and needed > available:
        raise ConfigError(
            f"The embedding tables do not fit the memory. Available: {_megabytes(available)}. Needed: at least "
            f"{_megabytes(needed)}\n{describe_memory(tables)}\nCap the rows of a feature in the declaration "
            '(min_count, max_size, or encode = "hash" with fewer bins), take a smaller --embedding_dim, or let the '
            "optimizer keep one number per row: --embedding_optimizer rowwise_adagrad."
        )


def available_memory() -> int | None:
    """Bytes that this process may still allocate where the model computes; None where the system does not say."""
    if keras.backend.backend() == "jax":
        import jax

        statistics = jax.local_devices()[0].memory_stats()
        if statistics and "bytes_limit" in statistics:
            return statistics["bytes_limit"] - statistics["bytes_in_use"]
    limits = [_host_memory(), *(_group_memory(*files) for files in _GROUPS)]
    return min((limit for limit in limits if limit is not None), default=None)


_GROUPS = tuple(
    tuple(Path("/sys/fs/cgroup", name) for name in names)
    for names in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    )
)


def _host_memory() -> int | None:
    kilobytes = _fields(Path("/proc/meminfo")).get("MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _group_memory(limit: Path, usage: Path, statistics: Path) -> int | None:
    """What a control group of Linux, such as a container, leaves to its processes."""
    try:
        # Without a limit, version 2 says "max".
        most, used = int(limit.read_text()), int(usage.read_text())
    except (OSError, ValueError):
        return None
    # Files that are kept in memory are dropped before anybody runs out of it.
    return most - used + _fields(statistics).get("inactive_file", 0)


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in map(str.split, lines) if len(words) > 1 and words[1].isdecimal()}


def _parts(table: TableMemory) -> tuple[int, int]:
    return table.weights, table.state


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
