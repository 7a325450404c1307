# SPDX-License-Identifier: Apache-2.0
"""Vector search: an index over item vectors that finds the largest inner products without computing all of them.

The graph and the cells of approximate search are made for distances: a vector that is long but points elsewhere
confuses them. Such an index therefore holds each vector x with one more coordinate, sqrt(R^2 - |x|^2), R being the
length of the longest; a query gets a 0 there. All vectors then have the length R, and the nearest of a query is the one
with the largest inner product (Bachrach et al., RecSys 2014).

Needs FAISS (`pip install '.[faiss]'`). It pays where the catalogue is large: benchmarks/vector_search.py measures
from where on; a few thousand items are scored exactly in less time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvke_tf.errors import ConfigError, DataError, MissingExtraError
from mvke_tf.io import CORRUPT_FILE_ERRORS, atomic_write, read_arrays

INDEX_KINDS = ("flat", "hnsw", "ivf")
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How an index is built.

    Args:
        kind: `"flat"` compares all vectors and is exact; `"hnsw"` walks a graph of near neighbours (Malkov and
            Yashunin, TPAMI 2020); `"ivf"` looks into the cells nearest to the query, of a k-means partition.
        links: Links per vector (HNSW).
        construction_effort: How many candidates are looked at when a vector is linked (HNSW).
        cells: Number of cells (IVF); 0 takes about four times the square root of the number of vectors.
        threads: Threads that build; 0 takes all. An HNSW graph is the same every time with one thread only.
    """

    kind: str = "hnsw"
    links: int = 32
    construction_effort: int = 80
    cells: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.kind not in INDEX_KINDS:
            raise ConfigError(f"`kind` of an index must be one of {INDEX_KINDS}. Received: {self.kind!r}")
        for name, least in (("links", 2), ("construction_effort", 1), ("cells", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` of an index must be at least {least}. Received: {getattr(self, name)}")


class VectorIndex:
    """An inner-product index; `build` or `load` makes one."""

    def __init__(self, index: Any, config: IndexConfig, digest: str, longest: float) -> None:
        self._index, self.config, self._digest, self._longest = index, config, digest, longest

    def __len__(self) -> int:
        return self._index.ntotal

    @classmethod
    def build(cls, vectors: np.ndarray, config: IndexConfig | None = None) -> VectorIndex:
        """Indexes the rows of `vectors` `(M, W)`.

        Raises:
            ValueError: If there are no vectors.
            MissingExtraError: If FAISS is not installed.
        """
        faiss = _faiss()
        config = config or IndexConfig()
        vectors = _contiguous(vectors)
        if not len(vectors):
            raise ValueError("Expected vectors to index. Received: none")
        square = np.einsum("nw,nw->n", vectors, vectors)
        longest = float(np.sqrt(square.max()))
        if config.kind == "flat":
            held, index = vectors, faiss.IndexFlatIP(vectors.shape[1])
        else:
            held = np.concatenate([vectors, np.sqrt(np.maximum(longest**2 - square, 0))[:, None]], axis=1)
            index = _approximate_index(faiss, held.shape, config)
        with _threads(faiss, config.threads):
            index.train(held)
            index.add(held)
        return cls(index, config, _digest(vectors), longest)

    def fits(self, vectors: np.ndarray) -> bool:
        """Whether this is an index of just these vectors."""
        return self._digest == _digest(_contiguous(vectors))

    def search(self, queries: np.ndarray, k: int, effort: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """The k rows with the largest inner product with each query, as far as the index finds them.

        Args:
            queries: `(N, W)`.
            k: How many.
            effort: How thoroughly to look: candidates kept on the way (HNSW, at least k), or cells looked into (IVF).

        Returns:
            Products `(N, k)`, exact of a flat index and otherwise up to about 1e-6 of the squares of the longest query
            and vector, largest first, of equal ones the earlier row first (which of many equal ones are found at
            all is up to FAISS); and rows `(N, k)` int64, -1 with product minus infinity where fewer were found.

        Raises:
            ValueError: If the queries have another width than the vectors, or `k` or `effort` is below 1.
        """
        faiss = _faiss()
        queries = _contiguous(queries)
        width = self._index.d - (self.config.kind != "flat")
        if queries.shape[1] != width:
            raise ValueError(f"The index holds vectors of width {width}. Received: queries {queries.shape}")
        if k < 1 or effort < 1:
            raise ValueError(f"`k` and `effort` must be at least 1. Received: k={k}, effort={effort}")
        parameters = None
        if self.config.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k))
        elif self.config.kind == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=min(effort, self._index.nlist))
        if parameters is None:
            products, rows = self._index.search(queries, k)
        else:
            distances, rows = self._index.search(np.pad(queries, [(0, 0), (0, 1)]), k, params=parameters)
            squares = np.einsum("nw,nw->n", queries, queries, dtype=np.float64)[:, None] + self._longest**2
            products = ((squares - distances) / 2).astype(np.float32)
        products = np.where(rows < 0, -np.inf, products)
        order = np.lexsort((rows, -products), axis=1)
        return np.take_along_axis(products, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def save(self, path: Path) -> None:
        """Writes one file, atomically; `load` reads it."""
        meta = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "digest": self._digest,
            "longest": self._longest,
        }
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, meta=json.dumps(meta), index=_faiss().serialize_index(self._index))

    @classmethod
    def load(cls, path: Path) -> VectorIndex:
        """Reads what `save` wrote.

        Raises:
            DataError: If the file is missing or damaged.
            MissingExtraError: If FAISS is not installed.
        """
        faiss = _faiss()
        try:
            arrays = read_arrays(path)
            meta = json.loads(str(arrays["meta"]))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, expected {FORMAT}")
            index = faiss.deserialize_index(arrays["index"])
            return cls(index, IndexConfig(**meta["config"]), meta["digest"], meta["longest"])
        except FileNotFoundError:
            raise DataError(f"There is no index at {path}. Build it and save it there.") from None
        except (*CORRUPT_FILE_ERRORS, KeyError, TypeError) as error:
            raise DataError(f"The index {path} cannot be used ({error}). Delete it and build it again.") from error


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact best rows `(N, k)` that are among the found ones `(N, any)`; rows of -1 are none."""
    return float(np.mean([np.isin(best, rows).mean() for rows, best in zip(found, exact, strict=True)]))


def _approximate_index(faiss: Any, shape: tuple[int, int], config: IndexConfig) -> Any:
    count, width = shape
    if config.kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, config.links)
        index.hnsw.efConstruction = config.construction_effort
        return index
    cells = min(config.cells or max(1, round(4 * count**0.5)), count)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, cells)
    # Few vectors per cell are no reason for a warning: the catalogue is what it is.
    index.cp.min_points_per_centroid = 1
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            f"Vector search needs FAISS: pip install '.[faiss]' (or faiss-cpu). Received: {error}"
        ) from error
    return faiss


@contextlib.contextmanager
def _threads(faiss: Any, count: int) -> Iterator[None]:
    """Lets FAISS use this number of threads inside a block; 0 leaves it as it is."""
    before = faiss.omp_get_max_threads()
    if count:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _contiguous(vectors: np.ndarray) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"Expected vectors (n, W). Received: shape {vectors.shape}")
    return vectors


def _digest(vectors: np.ndarray) -> str:
    digest = hashlib.blake2b(str(vectors.shape).encode(), digest_size=16)
    digest.update(vectors.data)
    return digest.hexdigest()
