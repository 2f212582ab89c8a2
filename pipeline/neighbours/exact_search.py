"""Exact nearest neighbours in a table of embeddings, by squared Euclidean distance.

A float32 matrix product proposes rows, with a bound on its error; float64 distances of the proposed pairs decide, ties by
the smaller id. A distance is computed from its two rows alone, so no bit of an answer depends on the size of the blocks,
on what else was asked, or on how rows are spread over shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from methods.mining import ClassFilter

_GROUP = 16  # of every so many similarities only the largest enters the first selection
SYMMETRIC_ROWS = 2**17  # up to which `search_all` compares each pair once
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
        classes: (positions in the order of their classes, the classes in that order), where it is known already.
    """

    values: np.ndarray
    ids: Int64[np.ndarray, " rows"]
    labels: np.ndarray
    largest: float
    classes: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None

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


def search(
    queries: Queries, rows: Rows, k: int, which: ClassFilter = "all", memory_bytes: int = 64 * 2**20
) -> Neighbours:
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
    queries: Queries, rows: Rows, candidates: Int64[np.ndarray, "queries c"], k: int, which: ClassFilter
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


def search_all(rows: Rows, k: int, which: ClassFilter = "all", block: int = 3072) -> Iterator[tuple[slice, Neighbours]]:
    """The k nearest rows of every row, exactly, in blocks of consecutive rows: `search` of all of them, in less time.

    Each pair of rows is compared once, for both. Memory: a float32 copy of the rows, and about 3 k candidates a row, which
    is why more rows than `SYMMETRIC_ROWS` are searched block by block instead.
    """
    if which == "same" or len(rows) > SYMMETRIC_ROWS:
        for part in _slices(len(rows), block):
            yield part, search(as_queries(rows, part), rows, k, which)
        return
    vectors, margin = _lifted(rows.values), _margin(rows.values, rows)[:, 0].numpy()
    blocks = list(_slices(len(rows), block))
    finders = [_Finder(p.stop - p.start, k, margin[p]) for p in blocks]
    labels = torch.from_numpy(rows.labels.astype(np.int64))
    tile, near = torch.empty(block * block), np.empty(block * block, bool)  # one piece of memory for all tiles
    for i, part in enumerate(blocks):
        left = vectors[part].clone()
        left[:, -2:] = left[:, [-1, -2]]  # so that the product of two rows is minus half their squared distance
        for j in range(i, len(blocks)):
            other = blocks[j]
            shape = (len(left), other.stop - other.start)
            similarity = torch.mm(left, vectors[other].T, out=tile[: shape[0] * shape[1]].view(shape))
            if i == j:
                similarity.fill_diagonal_(-torch.inf)
            if which == "other":
                similarity.masked_fill_(labels[part, None] == labels[None, other], -torch.inf)
            finders[i].look(similarity, other.start, True, near)
            if i != j:
                finders[j].look(similarity, part.start, False, near)
        queries = as_queries(rows, part)
        if finders[i].full:  # many (nearly) equal rows: float32 cannot tell
            yield part, search(queries, rows, k, which)
        else:
            yield part, _nearest(queries, rows, *finders[i].found(), k)
        finders[i] = _Finder(0, k, margin[:0])


def as_queries(rows: Rows, part: slice) -> Queries:
    """Rows as queries, each left out of its own answer."""
    values = np.asarray(rows.values[part], np.float32)
    return Queries(values, rows.ids[part], rows.labels[part].astype(np.int64))


def _lifted(values: np.ndarray) -> Tensor:
    """Rows [x, 0 ..., 1, -|x|²/2] in float32."""
    out = torch.zeros((len(values), -(-(values.shape[1] + 2) // 8) * 8))
    out[:, : values.shape[1]] = torch.from_numpy(values)
    out[:, -2] = 1
    out[:, -1] = torch.from_numpy(-0.5 * np.square(values, dtype=np.float64).sum(1))
    return out


class _Finder:
    """Collects, for a block of queries, the rows that may be among their k nearest, one tile of similarities at a time.

    Args:
        queries: how many.
        k: neighbours wanted.
        margin: how far below the k-th best similarity a row may lie and still be one of them, [queries].
    """

    def __init__(self, queries: int, k: int, margin: np.ndarray) -> None:
        self.margin = margin
        self._best = np.full((queries, k), -np.inf, np.float32)  # the least of them is never above the true k-th
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._pairs, self._most = 0, max(_MOST_PAIRS, 8 * k * queries) if queries > 1 else math.inf
        self.full = False  # found so many that it has given up

    def look(
        self, similarity: Tensor, start: int, rows_are_queries: bool = True, memory: np.ndarray | None = None
    ) -> None:
        """A tile [queries, rows], or its transpose; `start` is the position of its first row; `memory` to work in."""
        if self.full:
            return
        axis = 1 if rows_are_queries else 0
        count, k = similarity.shape[axis], self._best.shape[1]
        groups = count // _GROUP if count >= k * _GROUP else count // 2 if count >= 2 * k else count
        size = count // max(1, groups)
        grouped = similarity.narrow(axis, 0, groups * size).unflatten(axis, (size, groups)).amax(axis)
        rest = similarity.narrow(axis, groups * size, count - groups * size)
        large = torch.cat([grouped, rest], axis)
        candidates = np.concatenate([self._best, (large if rows_are_queries else large.T).numpy()], 1)
        self._best = np.partition(candidates, candidates.shape[1] - k, axis=1)[:, -k:]
        bound, tile = self._bound(), similarity.numpy()
        out = None if memory is None else memory[: tile.size].reshape(tile.shape)
        # numpy compares three times as fast as torch
        near = np.flatnonzero(np.greater_equal(tile, bound[:, None] if rows_are_queries else bound, out=out))
        first, second = np.divmod(near, tile.shape[1])
        query, row = (first, second) if rows_are_queries else (second, first)
        self._found.append((query, row + start, tile.ravel()[near]))
        self._pairs += len(near)
        if self._pairs > self._most:
            self._found, self.full = [], True

    def _bound(self) -> np.ndarray:
        return np.maximum(self._best.min(1) - self.margin, np.finfo(np.float32).min)  # what is masked is -inf

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """(query, position) of all that can still be among the nearest."""
        query, position, values = (np.concatenate(part) for part in zip(*self._found, strict=True))
        kept = values >= self._bound()[query]
        return query[kept], position[kept]


def _search_block(queries: Queries, rows: Rows, k: int, which: ClassFilter) -> Neighbours:
    values = torch.from_numpy(np.ascontiguousarray(queries.values, np.float32))
    finder = _Finder(len(queries), k, _margin(queries.values, rows)[:, 0].numpy())
    for part in _slices(len(rows), 2**16):
        similarity = _similarity(values, rows.values[part])
        _mask(similarity, queries, rows, part, which)
        finder.look(similarity, part.start)
    if finder.full:  # many (nearly) equal rows: float32 cannot tell
        half = len(queries) // 2
        parts = (queries[:half], queries[half:])
        return Neighbours.concatenate([_search_block(p, rows, k, which) for p in parts])
    return _nearest(queries, rows, *finder.found(), k)


def _similarity(values: Tensor, part: np.ndarray) -> Tensor:
    """q·x - |x|²/2, which orders rows as their distance does, nearest highest."""
    x = torch.from_numpy(part).float()
    return torch.addmm(-0.5 * x.square().sum(1)[None], values, x.T)


def _mask(similarity: Tensor, queries: Queries, rows: Rows, part: slice, which: ClassFilter) -> None:
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


def _margin(values: np.ndarray, rows: Rows) -> Tensor:
    """Twice the largest error of a float32 similarity (Higham 2002, 3.1), [queries, 1]."""
    rounding = (values.shape[1] + 8) * 2.0**-24
    lengths = np.sqrt(np.square(values, dtype=np.float64).sum(1))
    bound = 2 * rounding / (1 - rounding) * (lengths * rows.largest + rows.largest**2)
    return torch.from_numpy(bound.astype(np.float32) * np.float32(1.01))[:, None]


def by_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the order of their classes, and the classes in that order."""
    order = np.argsort(labels, kind="stable").astype(np.int32 if len(labels) < 2**31 else np.int64)
    return order, labels[order]


def _search_classes(queries: Queries, rows: Rows, k: int) -> Neighbours:
    order, ordered = rows.classes() if rows.classes is not None else by_class(rows.labels)
    wanted = _labels(queries)
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
    counts = np.bincount(query, minlength=len(queries))
    width = int(counts.max(initial=0))
    out = empty(len(queries), max(k, width))
    position = np.sort(query * np.int64(len(rows)) + position) % len(rows)  # by query, then by position
    stops, asked = np.cumsum(counts).tolist(), queries.values.astype(np.float64)
    for q, stop in enumerate(stops):
        where = position[stops[q - 1] if q else 0 : stop]
        difference = rows.values.take(where, 0).astype(np.float64)
        difference -= asked[q]
        out.distances[q, : len(where)] = np.vecdot(difference, difference)
        out.ids[q, : len(where)] = rows.ids[where]
    order = np.argsort(out.distances, axis=1, kind="stable")
    distances = np.take_along_axis(out.distances, order, 1)
    tied = np.flatnonzero(((distances[:, 1:] == distances[:, :-1]) & np.isfinite(distances[:, 1:])).any(1))
    order[tied] = np.lexsort((out.ids[tied], out.distances[tied]), axis=1)
    return Neighbours(np.take_along_axis(out.ids, order, 1)[:, :k], distances[:, :k])


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
