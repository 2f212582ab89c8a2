"""Exact nearest neighbours in a table of embeddings, by squared Euclidean distance.

float32 similarities propose rows, with a bound on their error; float64 distances of the proposed pairs decide, ties by the
smaller id. A distance is computed from its two rows alone, so no bit of an answer depends on the size of the blocks, on the
number of threads, on what else was asked, or on how rows are spread over shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64

from methods.mining import ClassFilter
from pipeline.neighbours import kernels
from pipeline.neighbours.candidates import TILE, Search, given_up
from pipeline.neighbours.kernels import Mask

_MAX_PAIRS = 2**21  # whose distances are computed at once where every pair of some rows is compared


@dataclass(frozen=True)
class Neighbours:
    """Answers to queries, nearest first.

    Attributes:
        ids: Ids of the rows; -1 where there are fewer than k.
        distances: Squared Euclidean distances; inf where there is no row.
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
    """Rows of the embedding table.

    Attributes:
        values: float32 or float16 [rows, dim].
        ids, labels: Id and class of each row.
        largest: The largest length of a row.
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
    """Query embeddings.

    Attributes:
        values: float32 [queries, dim].
        ids: Sample that each query is, left out of its own answer; -1: none.
        labels: Class of each query, where classes matter.
    """

    values: Float[np.ndarray, "queries dim"]
    ids: Int64[np.ndarray, " queries"]
    labels: Int64[np.ndarray, " queries"] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice | np.ndarray) -> Queries:
        return Queries(self.values[part], self.ids[part], None if self.labels is None else self.labels[part])


def search(
    queries: Queries, rows: Rows, k: int, class_filter: ClassFilter = "all", memory_bytes: int = 64 * 2**20
) -> Neighbours:
    """The k nearest rows of each query, exactly.

    Time: a float32 matrix product Q x N x D and two passes over its values; `same` looks at the members of each class
    alone. Memory: about `memory_bytes`, which changes no result.
    """
    if len(rows) == 0 or len(queries) == 0:
        return empty(len(queries), k)
    if class_filter == "same":
        return _search_classes(queries, rows, k)
    labels = _labels(queries) if class_filter == "other" else None
    problem = _problem(np.asarray(queries.values, np.float32), queries.ids, labels, rows, k, same=False)
    answers = _answers(problem, queries.__getitem__, rows, k, class_filter, memory_bytes)
    return Neighbours.concatenate([answer for _, answer in answers])


def rerank(
    queries: Queries, rows: Rows, candidates: Int64[np.ndarray, "queries c"], k: int, class_filter: ClassFilter
) -> Neighbours:
    """The k nearest of each query's candidates (positions in `rows`, -1: none) by their exact distances."""
    query, column = np.nonzero(candidates >= 0)
    position = candidates[query, column]
    allowed = rows.ids[position] != queries.ids[query]
    if class_filter != "all":
        same = rows.labels[position] == _labels(queries)[query]
        allowed &= same if class_filter == "same" else ~same
    return _nearest(queries, rows, query[allowed], position[allowed], k)


def empty(queries: int, k: int) -> Neighbours:
    return Neighbours(np.full((queries, k), -1, np.int64), np.full((queries, k), np.inf))


def _labels(queries: Queries) -> np.ndarray:
    if queries.labels is None:
        raise ValueError("the classes of the queries are needed to tell same from other: give labels")
    return queries.labels


def search_all(
    rows: Rows, k: int, class_filter: ClassFilter = "all", memory_bytes: int = 256 * 2**20
) -> Iterator[tuple[slice, Neighbours]]:
    """The k nearest rows of every row, exactly, in blocks of consecutive rows: `search` of all of them, in less time.

    Each pair of rows is multiplied once, for both, as far as the candidates of both fit into half of `memory_bytes`: they
    take 16 k + 128 bytes a row.
    """
    if len(rows) == 0:
        return
    if class_filter == "same":
        for part in _slices(len(rows), TILE):
            yield part, _search_classes(as_queries(rows, part), rows, k)
        return
    labels = rows.labels if class_filter == "other" else None
    problem = _problem(rows.values, rows.ids, labels, rows, k, same=True)
    yield from _answers(problem, lambda part: as_queries(rows, part), rows, k, class_filter, memory_bytes)


def as_queries(rows: Rows, part: slice) -> Queries:
    """Rows as queries, each left out of its own answer."""
    values = np.asarray(rows.values[part], np.float32)
    return Queries(values, rows.ids[part], rows.labels[part].astype(np.int64))


class _Lifted:
    """float32 vectors whose dot products order rows as their distances do: [q, 1, -|q|²/2] and [x, -|x|²/2, 1].

    The product is q·x - |q|²/2 - |x|²/2, minus half the squared distance. Vectors are made for a range at a time, and
    multiplied by `scale`, a power of two.
    """

    def __init__(self, values: np.ndarray, lengths: Float64[np.ndarray, " rows"], scale: float) -> None:
        self.values, self.scale = values, np.float32(scale)
        self.lengths = lengths * scale
        self.halves = (-0.5 * np.square(self.lengths)).astype(np.float32)

    def queries(self, part: slice) -> Float32[np.ndarray, "rows lifted"]:
        return self._vectors(part, 1.0, self.halves[part])

    def rows(self, part: slice) -> Float32[np.ndarray, "rows lifted"]:
        return self._vectors(part, self.halves[part], 1.0)

    def _vectors(self, part: slice, before_last: Any, last: Any) -> np.ndarray:
        values = self.values[part]
        out = np.zeros((len(values), self.dim), np.float32)
        np.multiply(values, self.scale, out=out[:, : values.shape[1]])
        out[:, -2], out[:, -1] = before_last, last
        return out

    @property
    def dim(self) -> int:
        """A multiple of eight."""
        return -(-(self.values.shape[1] + 2) // 8) * 8


def _lengths(values: np.ndarray) -> Float64[np.ndarray, " rows"]:
    """Length of each row, in float64."""
    out = np.empty(len(values))
    for part in _slices(len(values), TILE):
        kernels.squared_lengths(np.asarray(values[part], np.float32), out[part])  # numba knows no float16
    return np.sqrt(out)


def _problem(values: np.ndarray, ids: np.ndarray, labels: np.ndarray | None, rows: Rows, k: int, same: bool) -> Search:
    """The search for candidates; with `labels`, among rows of other classes. `same`: the queries are the rows."""
    lengths = _lengths(values)
    longest = max(rows.largest, float(lengths.max()))
    scale = 2.0 ** -int(np.clip(np.frexp(longest)[1], -126, 126))  # so that squares stay in the range of float32
    queries = _Lifted(values, lengths, scale)
    searched = queries if same else _Lifted(rows.values, _lengths(rows.values), scale)
    rounding = (queries.dim + 10) * 2.0**-24  # Higham 2002, 3.1, as `NormedRows.margin`
    error = rounding / (1 - rounding) * (queries.lengths + scale * rows.largest) ** 2 / 2
    other = labels is not None
    return Search(
        queries=queries.queries,
        rows=searched.rows,
        num_rows=len(rows),
        dim=queries.dim,
        mask=Mask(rows.ids, (rows.labels if other else np.zeros(len(rows))).astype(np.int64), other),
        depth=np.full(len(ids), min(k, len(rows))),
        margin=(2.02 * error).astype(np.float32),
        ids=ids,
        labels=(np.zeros(len(ids)) if labels is None else labels).astype(np.int64),
        same=same,
    )


def _answers(
    problem: Search,
    queries: Callable[[slice], Queries],
    rows: Rows,
    k: int,
    class_filter: ClassFilter,
    memory_bytes: int,
) -> Iterator[tuple[slice, Neighbours]]:
    """Neighbours of consecutive blocks of queries: the exact distances of the candidates decide."""
    groups = problem.groups(memory_bytes)
    for part, c in itertools.chain.from_iterable(problem.collect(group, memory_bytes) for group in groups):
        asked, places = queries(part), _ranges(c.starts[:-1], c.counts)
        exact = np.empty(len(c.values))
        exact[places] = -_squared_distances(asked, rows, np.repeat(np.arange(len(asked)), c.counts), c.rows[places])
        kernels.sort_runs(c.starts, c.counts, c.values, c.margin, c.rows, exact, rows.ids)
        answer = _first(k, c.starts[:-1], c.counts, c.rows, exact, rows)
        undecided = given_up(c)  # many (nearly) equal rows: float32 cannot tell
        if len(undecided):
            by_distance = _search_pairs(asked[undecided], rows, k, class_filter)
            answer.ids[undecided], answer.distances[undecided] = by_distance.ids, by_distance.distances
        yield part, answer


def _search_pairs(queries: Queries, rows: Rows, k: int, class_filter: ClassFilter) -> Neighbours:
    """The k nearest by the exact distances to all rows."""
    answers = []
    for part in _slices(len(queries), max(1, _MAX_PAIRS // len(rows))):
        answer = empty(part.stop - part.start, k)
        for block in _slices(len(rows), _MAX_PAIRS):
            positions = np.tile(np.arange(block.start, block.stop), (len(answer.ids), 1))
            answer = Neighbours.merge([answer, rerank(queries[part], rows, positions, k, class_filter)])
        answers.append(answer)
    return Neighbours.concatenate(answers)


def by_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the order of their classes, and the classes in that order."""
    order = np.argsort(labels, kind="stable").astype(np.int32 if len(labels) < 2**31 else np.int64)
    return order, labels[order]


def _search_classes(queries: Queries, rows: Rows, k: int) -> Neighbours:
    order, ordered = rows.classes() if rows.classes is not None else by_class(rows.labels)
    wanted = _labels(queries)
    start, stop = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
    parts = []
    for part in _chunks(stop - start, _MAX_PAIRS):
        counts = (stop - start)[part]
        query = np.repeat(np.arange(len(counts)), counts)
        position = order[_ranges(start[part], counts)]
        other = rows.ids[position] != queries.ids[part][query]
        parts.append(_nearest(queries[part], rows, query[other], position[other], k))
    return Neighbours.concatenate(parts)


def _nearest(queries: Queries, rows: Rows, query: np.ndarray, position: np.ndarray, k: int) -> Neighbours:
    """Of the given pairs the k nearest of each query; `query` ascends."""
    counts = np.bincount(query, minlength=len(queries))
    starts, exact = np.cumsum(counts) - counts, -_squared_distances(queries, rows, query, position)
    position, one_run = np.array(position, np.int64), np.zeros(len(query), np.float32)
    kernels.sort_runs(starts, counts, one_run, np.zeros(len(queries), np.float32), position, exact, rows.ids)
    return _first(k, starts, counts, position, exact, rows)


def _squared_distances(
    queries: Queries, rows: Rows, query: Int[np.ndarray, " pairs"], position: Int[np.ndarray, " pairs"]
) -> Float64[np.ndarray, " pairs"]:
    """Each from its two rows alone."""
    values, out = np.asarray(queries.values, np.float32), np.empty(len(query))
    if rows.values.dtype == np.float32:
        kernels.squared_distances(values, rows.values, query, position, out)
        return out
    for part in _slices(len(query), 2**18 // values.shape[1]):  # numba knows no float16
        gathered = rows.values[position[part]].astype(np.float32)
        kernels.squared_distances(values, gathered, query[part], np.arange(len(gathered)), out[part])
    return out


def _first(
    k: int, starts: np.ndarray, counts: np.ndarray, position: np.ndarray, exact: np.ndarray, rows: Rows
) -> Neighbours:
    """The first k of each query's sorted rows; `exact` is minus their squared distance."""
    answer, taken = empty(len(counts), k), np.minimum(counts, k)
    places, filled = _ranges(starts, taken), np.arange(k) < taken[:, None]
    answer.ids[filled], answer.distances[filled] = rows.ids[position[places]], -exact[places]
    return answer


def _ranges(starts: np.ndarray, counts: np.ndarray) -> Int64[np.ndarray, " places"]:
    """start, ..., start + count - 1 of each, one after the other."""
    counts = counts.astype(np.int64)
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


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
