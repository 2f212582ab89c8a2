"""The exact nearest of a few queries among memory-mapped rows, with no index.

faiss compares in float32 and proposes; float64 distances decide, ties by the smaller position. A query is done when the bound on
float32's error proves that no row beyond the proposals can be nearer; else more are asked for. One query reads every row once, at
the speed of memory: 60,000 × 128 in 1 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np
from jaxtyping import Float32, Float64, Int64

_QUERIES = 256  # compared at once
_FEW = 16  # queries for which faiss's threads would cost more than they give
_CHUNK = 8192  # rows whose float64 distances are computed at once


@contextmanager
def faiss_threads(queries: int) -> Iterator[None]:
    """A block in which faiss uses one thread of its caller's for a few queries: waking others takes longer than the search."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if queries < _FEW else before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest(
    queries: Float32[np.ndarray, "queries dim"],
    rows: Float32[np.ndarray, "rows dim"],
    k: int,
    removed: Int64[np.ndarray, " removed"],
    largest: float,
) -> tuple[Int64[np.ndarray, "queries k"], Float64[np.ndarray, "queries k"]]:
    """Positions of the k nearest rows of each query, nearest first, and their squared Euclidean distances.

    Args:
        queries: Any number.
        rows: Memory-mapped or not.
        k: Neighbours wanted; positions are -1 and distances infinite where there are fewer.
        removed: Positions that are not to be found, ascending.
        largest: A bound on the length of the rows.
    """
    positions, distances = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf)
    for start in range(0, len(queries), _QUERIES):
        block = slice(start, start + _QUERIES)
        _search_block(queries[block], rows, removed, largest, positions[block], distances[block])
    return positions, distances


def _search_block(
    queries: np.ndarray,
    rows: np.ndarray,
    removed: np.ndarray,
    largest: float,
    positions: np.ndarray,
    distances: np.ndarray,
) -> None:
    """Writes the answers of a block of queries into `positions` and `distances`."""
    k, dim = positions.shape[1], queries.shape[1]
    # The largest error of a squared distance in float32, whichever way it is computed (Higham 2002, 3.1).
    error = 1.02 * (dim + 10) * 2.0**-24 * (np.linalg.norm(queries.astype(np.float64), axis=1) + largest) ** 2
    waiting, depth = np.arange(len(queries)), 2 * k + 32
    while len(waiting):
        if depth > len(rows) // 2:
            for query in waiting:
                positions[query], distances[query] = _compare_all(queries[query], rows, k, removed)
            return
        with faiss_threads(len(waiting)):
            values, found = faiss.knn(np.ascontiguousarray(queries[waiting]), rows, depth, metric=faiss.METRIC_L2)
        done = np.zeros(len(waiting), bool)
        for i, query in enumerate(waiting):
            positions[query], distances[query] = decide(queries[query], rows, found[i], k, removed)
            done[i] = distances[query, -1] < values[i, -1] - error[query]
        waiting, depth = waiting[~done], 4 * depth


def decide(
    query: Float32[np.ndarray, " dim"],
    rows: Float32[np.ndarray, "rows dim"],
    candidates: Int64[np.ndarray, " candidates"],
    k: int,
    removed: Int64[np.ndarray, " removed"],
) -> tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """The k nearest of some rows by their exact distances; candidates of -1 are none."""
    candidates = candidates[candidates >= 0]
    candidates = np.sort(candidates[~_among(candidates, removed)])
    exact = np.square(rows[candidates].astype(np.float64) - query.astype(np.float64)).sum(1)
    order = np.argsort(exact, kind="stable")[:k]
    positions, distances = np.full(k, -1, np.int64), np.full(k, np.inf)
    positions[: len(order)], distances[: len(order)] = candidates[order], exact[order]
    return positions, distances


def merge(
    ids: Int64[np.ndarray, "queries found"], distances: Float64[np.ndarray, "queries found"], k: int
) -> tuple[Int64[np.ndarray, "queries k"], Float64[np.ndarray, "queries k"]]:
    """The k nearest of what several segments gave, ties by the smaller id."""
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def _compare_all(query: np.ndarray, rows: np.ndarray, k: int, removed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of all rows, compared in float64: of small segments, and where very many rows are (nearly) equal."""
    best, nearest_distances = np.full((1, 0), -1, np.int64), np.full((1, 0), np.inf)
    for start in range(0, max(1, len(rows)), _CHUNK):
        part = np.arange(start, min(start + _CHUNK, len(rows)))
        positions, distances = decide(query, rows, part, k, removed)
        best, nearest_distances = merge(
            np.concatenate([best, positions[None]], 1), np.concatenate([nearest_distances, distances[None]], 1), k
        )
    return best[0], nearest_distances[0]


def _among(positions: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Which positions are removed."""
    if not len(removed):
        return np.zeros(len(positions), bool)
    place = np.minimum(np.searchsorted(removed, positions), len(removed) - 1)
    return removed[place] == positions
