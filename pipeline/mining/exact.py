"""Exact nearest neighbours in a table of embeddings, by squared Euclidean distance.

A float32 matrix product proposes rows, with a bound on its error; float64 distances of the proposed pairs decide, ties by
the smaller id. A distance is computed from its two rows alone, so no bit of an answer depends on the size of the blocks,
on what else was asked, or on how rows are spread over shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from methods.base import Which

_GROUP = 16  # of every so many similarities only the largest enters the first selection
_PAIR_ELEMENTS = 2**18  # float64 elements of a temporary array of pairs: 2 MiB, stays in cache
_MOST_PAIRS = 2**21  # pairs that one block of queries may propose before it is cut in two


@dataclass(frozen=True)
class Neighbours:
    """Answers to queries, nearest first.

    Attributes:
        ids: of the found rows; -1 where there are fewer than k.
        distances: squared Euclidean; inf where there is none.
    """

    ids: Int64[np.ndarray, "queries k"]
    distances: Float64[np.ndarray, "queries k"]

    @staticmethod
    def concatenate(parts: Sequence[Neighbours]) -> Neighbours:
        """Joins the answers to consecutive queries."""
        return Neighbours(np.concatenate([p.ids for p in parts]), np.concatenate([p.distances for p in parts]))

    @staticmethod
    def merge(parts: Sequence[Neighbours]) -> Neighbours:
        """The k nearest of the answers that several shards gave to the same queries."""
        ids = np.concatenate([p.ids for p in parts], 1)
        distances = np.concatenate([p.distances for p in parts], 1)
        order = np.lexsort((ids, distances), axis=1)[:, : parts[0].ids.shape[1]]
        return Neighbours(np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1))


@dataclass(frozen=True)
class Rows:
    """What is searched.

    Attributes:
        values: float32 or float16.
        ids, labels: of each row.
        largest: the largest length of a row.
    """

    values: np.ndarray
    ids: Int64[np.ndarray, " rows"]
    labels: np.ndarray
    largest: float

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Queries:
    """What is asked.

    Attributes:
        values: float32 [queries, dim].
        ids: sample that each query is, left out of its own answer; -1: none.
        labels: class of each query, where classes matter.
    """

    values: Float[np.ndarray, "queries dim"]
    ids: Int64[np.ndarray, " queries"]
    labels: Int64[np.ndarray, " queries"] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice | np.ndarray) -> Queries:
        return Queries(self.values[part], self.ids[part], None if self.labels is None else self.labels[part])


def search(queries: Queries, rows: Rows, k: int, which: Which = "all", memory_bytes: int = 64 * 2**20) -> Neighbours:
    """The k nearest rows of each query, exactly.

    Time: a float32 matrix product Q x N x D and five passes over its values; `same` looks at the members of each class
    alone. Memory: about `memory_bytes`, which changes no result.
    """
    if len(rows) == 0 or len(queries) == 0:
        return empty(len(queries), k)
    if which == "same":
        return _search_classes(queries, rows, k)
    size = max(1, memory_bytes // (6 * min(len(rows), 2**16)))
    return Neighbours.concatenate([_search_block(queries[p], rows, k, which) for p in _slices(len(queries), size)])


def rerank(
    queries: Queries, rows: Rows, candidates: Int64[np.ndarray, "queries c"], k: int, which: Which
) -> Neighbours:
    """The k nearest of each query's candidates (positions in `rows`, -1: none) by their exact distances."""
    query, column = np.nonzero(candidates >= 0)
    position = candidates[query, column]
    allowed = rows.ids[position] != queries.ids[query]
    if which != "all":
        same = rows.labels[position] == _labels(queries)[query]
        allowed &= same if which == "same" else ~same
    return _nearest(queries, rows, query[allowed], position[allowed], k)


def empty(queries: int, k: int) -> Neighbours:
    return Neighbours(np.full((queries, k), -1, np.int64), np.full((queries, k), np.inf))


def _labels(queries: Queries) -> np.ndarray:
    if queries.labels is None:
        raise ValueError("the classes of the queries are needed to tell same from other: give labels")
    return queries.labels


def _search_block(queries: Queries, rows: Rows, k: int, which: Which) -> Neighbours:
    values = torch.from_numpy(np.ascontiguousarray(queries.values, np.float32))
    best = torch.full((len(queries), k), -torch.inf)
    margin = _margin(queries.values, rows)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for part in _slices(len(rows), 2**16):
        similarity = _similarity(values, rows.values[part])
        _mask(similarity, queries, rows, part, which)
        best = torch.cat([best, _large(similarity, k)], 1).topk(k).values  # their k-th is never above the true k-th
        near = (similarity >= best[:, -1:] - margin) & (similarity > -torch.inf)
        query, column = np.divmod(np.flatnonzero(near.numpy()), near.shape[1])
        found.append((query, column + part.start, similarity.numpy()[query, column]))
        if sum(len(f[0]) for f in found) > _MOST_PAIRS and len(queries) > 1:  # (nearly) equal rows: float32 cannot tell
            half = len(queries) // 2
            parts = (queries[:half], queries[half:])
            return Neighbours.concatenate([_search_block(p, rows, k, which) for p in parts])
    query, position, scores = (np.concatenate(f) for f in zip(*found, strict=True))
    kept = scores >= (best[:, -1:] - margin).numpy()[query, 0]  # what earlier parts let through
    return _nearest(queries, rows, query[kept], position[kept], k)


def _similarity(values: Tensor, part: np.ndarray) -> Tensor:
    """q·x - |x|²/2, which orders rows as their distance does, nearest highest."""
    x = torch.from_numpy(part).float()
    return torch.addmm(-0.5 * x.square().sum(1)[None], values, x.T)


def _mask(similarity: Tensor, queries: Queries, rows: Rows, part: slice, which: Which) -> None:
    if which == "other":
        wanted, present = torch.from_numpy(_labels(queries)), torch.from_numpy(rows.labels[part].astype(np.int64))
        similarity.masked_fill_(wanted[:, None] == present[None], -torch.inf)
    own = np.flatnonzero(queries.ids >= 0)
    order = np.argsort(queries.ids[own])
    position = np.searchsorted(queries.ids[own], rows.ids[part], sorter=order)
    hit = np.flatnonzero(position < len(own))
    hit = hit[queries.ids[own][order[position[hit]]] == rows.ids[part][hit]]
    if len(hit) == 0:
        return
    by_id = dict(zip(rows.ids[part][hit].tolist(), hit.tolist(), strict=True))
    pairs = [(q, by_id[i]) for q, i in enumerate(queries.ids.tolist()) if i in by_id]  # a sample may be asked for twice
    query, column = torch.tensor(pairs).T
    similarity[query, column] = -torch.inf


def _large(similarity: Tensor, k: int) -> Tensor:
    """Of each row, values of different entries that hold (nearly) the k largest; at most k of them."""
    columns = similarity.shape[1]
    groups = columns // _GROUP
    if groups < 2 * k:
        return similarity.topk(min(k, columns)).values
    whole = similarity[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amax(1)
    return torch.cat([whole, similarity[:, groups * _GROUP :]], 1).topk(k).values


def _margin(values: np.ndarray, rows: Rows) -> Tensor:
    """Twice the largest error of a float32 similarity (Higham 2002, 3.1), [queries, 1]."""
    rounding = (values.shape[1] + 8) * 2.0**-24
    lengths = np.sqrt(np.square(values, dtype=np.float64).sum(1))
    bound = 2 * rounding / (1 - rounding) * (lengths * rows.largest + rows.largest**2)
    return torch.from_numpy(bound.astype(np.float32) * np.float32(1.01))[:, None]


def _search_classes(queries: Queries, rows: Rows, k: int) -> Neighbours:
    order = np.argsort(rows.labels, kind="stable")
    ordered, wanted = rows.labels[order], _labels(queries)
    start, stop = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
    parts = []
    for part in _chunks(stop - start, _MOST_PAIRS):
        counts = (stop - start)[part]
        query = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        position = order[np.repeat(start[part], counts) + within]
        other = rows.ids[position] != queries.ids[part][query]
        parts.append(_nearest(queries[part], rows, query[other], position[other], k))
    return Neighbours.concatenate(parts)


def _nearest(queries: Queries, rows: Rows, query: np.ndarray, position: np.ndarray, k: int) -> Neighbours:
    """Of the given pairs the k nearest of each query."""
    distances = np.empty(len(query))
    for part in _slices(len(query), _PAIR_ELEMENTS // queries.values.shape[1]):
        difference = queries.values[query[part]].astype(np.float64)
        difference -= rows.values[position[part]]
        distances[part] = np.square(difference, out=difference).sum(1)
    ids = rows.ids[position]
    order = np.lexsort((ids, distances, query))
    query, ids, distances = query[order], ids[order], distances[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)
    listed = place < k
    out = empty(len(queries), k)
    out.ids[query[listed], place[listed]] = ids[listed]
    out.distances[query[listed], place[listed]] = distances[listed]
    return out


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, max(1, size)))


def _chunks(counts: np.ndarray, most: int) -> Iterator[slice]:
    """Consecutive slices whose counts sum to about `most` at most."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield slice(start, stop)
        start = stop
