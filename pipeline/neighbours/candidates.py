"""Which rows may be among the nearest of each query, from float32 similarities with a proven bound on their error.

The similarities are computed tile by tile. Where the queries are themselves rows, each pair is multiplied once and looked at
from both sides, which halves the arithmetic. A query keeps what reaches its `depth`-th best similarity so far, less twice the
largest error; what cannot be told apart in float32 is left to exact comparison by whoever asked. Which tiles there are, their
order and the number of threads change what is collected on the way, but never whether a true neighbour is in it.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from pipeline.neighbours import kernels
from pipeline.neighbours.kernels import Candidates, Hits, Mask
from pipeline.neighbours.thread_pool import thread_pool

# Rows and columns of a tile at the most: 16 MB; where the dimension is small, 4 MB, since writing and reading it takes longer
# than the product. Not powers of two: rows would fall on the same lines of the cache (4 % slower).
TILE, TILE_OF_SMALL_DIM, SMALL_DIM = 2000, 1000, 128
SMALLEST_TILE = 64
_SMALLEST = float(np.finfo(np.float32).min)

Vectors = Callable[[slice], Any]


@dataclass(frozen=True)
class Search:
    """A search for the candidates of many queries among many rows.

    Attributes:
        queries: float32 vectors [range, dim] of a range of queries; arrays, or tensors on an accelerator.
        rows: The same of a range of rows. The dot product of a query and a row is their similarity.
        num_rows: How many rows there are.
        dim: Width of the vectors.
        mask: Which rows may be found.
        depth: Neighbours wanted of each query.
        margin: Twice the largest error of a similarity, for each query.
        ids, labels: Sample and class of each query.
        reference: Similarity of each query's nearest positive, +inf without one: rows that are nearer are counted, rows within
            the margin are listed.
        same: The queries are the first rows, in the same order, and similarities are symmetric.
        most_close: Rows within the margin of the reference, of one query, before it is given up.
        accelerator: Vectors are tensors on a device other than the CPU.
    """

    queries: Vectors
    rows: Vectors
    num_rows: int
    dim: int
    mask: Mask
    depth: Int64[np.ndarray, " queries"]
    margin: Float32[np.ndarray, " queries"]
    ids: Int64[np.ndarray, " queries"]
    labels: Int64[np.ndarray, " queries"]
    reference: Float32[np.ndarray, " queries"] | None = None
    same: bool = False
    most_close: int = 2**31 - 1
    accelerator: bool = False

    def groups(self, memory_bytes: int) -> list[slice]:
        """Ranges of queries whose candidates take about half the memory, to be searched one after the other."""
        group = np.cumsum(capacity(self.depth)) // max(1, memory_bytes // 2 // 8)
        cuts = [0] if len(self.depth) else []
        for cut in np.flatnonzero(np.diff(group)) + 1:
            if cut - cuts[-1] >= SMALLEST_TILE:
                cuts.append(int(cut))
        return [slice(a, b) for a, b in itertools.pairwise([*cuts, len(self.depth)])]

    def collect(self, group: slice, memory_bytes: int) -> Iterator[tuple[slice, Candidates]]:
        """Sorted candidates of a group of queries, in consecutive blocks; takes about `memory_bytes`."""
        start = group.start
        for block in (self._on_device if self.accelerator else self._in_tiles)(group, memory_bytes):
            yield slice(start, start + len(block.counts)), block
            start += len(block.counts)

    def _in_tiles(self, group: slice, memory_bytes: int) -> list[Candidates]:
        """Candidates of a group of queries on the CPU, several tiles at a time."""
        threads = torch.get_num_threads()
        size = TILE if self.dim > SMALL_DIM else TILE_OF_SMALL_DIM
        size = min(size, max(SMALLEST_TILE, math.isqrt(memory_bytes // 16 // threads)))
        query_blocks = _cut(group.start, group.stop, size)
        row_blocks = _cut(0, self.num_rows, size)
        if self.same:  # the rows that are queries of the group come first, in the same blocks
            others = [*_cut(0, group.start, size), *_cut(group.stop, self.num_rows, size)]
            row_blocks = query_blocks + others
        shared = len(query_blocks) if self.same else 0
        room = memory_bytes // 4 // 8 // len(query_blocks)
        blocks = [_Block(self, part, room) for part in query_blocks]
        first = [(i, i if shared else 0) for i in range(len(query_blocks))]  # to raise the thresholds early
        others_of = [range(i if shared else 0, len(row_blocks)) for i in range(len(query_blocks))]
        other = [(i, j) for i, columns in enumerate(others_of) for j in columns if (i, j) != first[i]]
        memory = threading.local()

        def tile(pair: tuple[int, int]) -> None:
            i, j = pair
            queries, rows = self.queries(query_blocks[i]), self.rows(row_blocks[j])
            if not hasattr(memory, "tile"):
                memory.tile = np.empty((size + 3) * size, np.float32)
                memory.hits = Hits(*(np.empty(8 * size + 1024, dtype) for dtype in (np.int32, np.int32, np.float32)))
            padded = memory.tile[: -(-len(queries) // 4) * 4 * len(rows)].reshape(-1, len(rows))
            similarity = padded[: len(queries)]
            np.matmul(queries, rows.T, out=similarity)
            if i == j < shared:
                np.fill_diagonal(similarity, -np.inf)
            blocks[i].add_tile(similarity, row_blocks[j].start, memory.hits, pair == first[i])
            if i < j < shared:
                padded[len(queries) :] = -np.inf
                blocks[j].add_transposed_tile(padded, query_blocks[i].start, memory.hits)

        with thread_pool() as pool:
            for tiles in (first, other):
                list(pool.map(tile, tiles))
            return list(pool.map(_Block.sorted, blocks))

    @torch.no_grad()
    def _on_device(self, group: slice, memory_bytes: int) -> Iterator[Candidates]:
        """Candidates of a group of queries, by matrix products and selections on their device."""
        for part in _cut(group.start, group.stop, max(1, memory_bytes // (24 * self.num_rows))):
            similarity = multiply_on_device(self.queries(part), self.rows(slice(0, self.num_rows)))

            def move(array: np.ndarray, device: torch.device = similarity.device) -> Tensor:
                return torch.from_numpy(np.ascontiguousarray(array)).to(device)

            hidden = move(self.ids[part])[:, None] == move(self.mask.ids)
            if self.mask.other:
                hidden |= move(self.labels[part])[:, None] == move(self.mask.labels)
            similarity.masked_fill_(hidden, -torch.inf)
            depth = move(self.depth[part])
            nearest = similarity.topk(min(int(depth.max()), self.num_rows)).values
            threshold = nearest.gather(1, (depth.clamp(max=self.num_rows) - 1)[:, None])
            threshold -= move(self.margin[part])[:, None]
            candidate = (similarity >= threshold) & (similarity > -torch.inf)
            reference, width = np.full(len(depth), np.inf, np.float32), 0.0
            if self.reference is not None:
                reference, width = self.reference[part], float(self.margin[part].max())
            above = similarity - move(reference)[:, None]
            close = above.abs() <= width
            given_up = candidate.sum(1) > move(capacity(self.depth[part])) * 7 // 8
            given_up |= close.sum(1) > self.most_close
            for marked in (candidate, close):
                marked[given_up] = False
            threshold[given_up] = torch.inf
            counts, (close_query, close_row) = candidate.sum(1).cpu().numpy(), close.nonzero().T.int().cpu().numpy()
            block = Candidates(
                threshold=threshold[:, 0].cpu().numpy(), margin=self.margin[part], depth=self.depth[part].astype(np.int32),
                starts=np.concatenate([[0], np.cumsum(counts)]), counts=counts.astype(np.int32),
                values=similarity[candidate].cpu().numpy(), rows=candidate.nonzero()[:, 1].int().cpu().numpy(),
                ids=self.ids[part], labels=self.labels[part],
                reference=np.where(given_up.cpu().numpy(), np.float32(np.inf), reference),
                ahead=(above > width).sum(1).int().cpu().numpy(), close=close.sum(1).int().cpu().numpy(),
                close_query=close_query, close_row=close_row,
                close_size=np.array([len(close_row)]), most_close=np.array([self.most_close]),
            )  # fmt: skip
            kernels.sort_candidates(block, self.mask.ids)
            yield block


def multiply_on_device(queries: Tensor, rows: Tensor) -> Tensor:
    """Similarities of float32 vectors in full float32, with neither TF32 nor autocast, for which no margin would hold."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(queries.device.type, enabled=False):
            return queries @ rows.T
    finally:
        torch.set_float32_matmul_precision(before)


class _Block:
    """Candidates of consecutive queries; tiles may come from several threads."""

    def __init__(self, search: Search, part: slice, room: int) -> None:
        depth = search.depth[part].astype(np.int32)
        num, starts = len(depth), np.concatenate([[0], np.cumsum(capacity(search.depth[part]))])
        self.mask, self.lock = search.mask, threading.Lock()
        self.room = max(room, 2 * num + 32)
        reference = np.full(num, np.inf, np.float32)
        self.width = np.float32(0)
        if search.reference is not None:
            reference, self.width = search.reference[part].copy(), search.margin[part].max()
        self.candidates = Candidates(
            threshold=np.full(num, _SMALLEST, np.float32), margin=search.margin[part], depth=depth, starts=starts,
            counts=np.zeros(num, np.int32), values=np.empty(starts[-1], np.float32), rows=np.zeros(starts[-1], np.int32),
            ids=search.ids[part], labels=search.labels[part], reference=reference, ahead=np.zeros(num, np.int32),
            close=np.zeros(num, np.int32), close_query=np.empty(num + 16, np.int32), close_row=np.empty(num + 16, np.int32),
            close_size=np.zeros(1, np.int64), most_close=np.array([search.most_close]),
        )  # fmt: skip

    def add_tile(self, similarity: np.ndarray, first_row: int, hits: Hits, first: bool) -> None:
        """A tile whose rows are the block's queries; `first` is the block's first tile."""
        with self.lock:
            if first:
                kernels.raise_thresholds(similarity, self.candidates, self.mask, first_row)
            self._scan(kernels.scan_rows, similarity, first_row, hits)

    def add_transposed_tile(self, similarity: np.ndarray, first_row: int, hits: Hits) -> None:
        """A tile whose columns are the block's queries; it has a multiple of four rows."""
        with self.lock:
            self._scan(kernels.scan_columns, similarity, first_row, hits)

    def _scan(self, scan: Callable[..., tuple[int, int]], similarity: np.ndarray, first_row: int, hits: Hits) -> None:
        row = 0
        while row < len(similarity):
            c = self.candidates
            row, size = scan(similarity, row, c.threshold, c.reference, c.ahead, self.width, first_row, hits)
            taken = kernels.take_hits(c, self.mask, hits, 0, size, self.width)
            while taken < size:
                self._make_room()
                taken = kernels.take_hits(self.candidates, self.mask, hits, taken, size, self.width)

    def _make_room(self) -> None:
        """For more rows close to a reference; beyond the memory allowed, those queries are given up that have most."""
        while True:
            c = self.candidates
            kept = np.flatnonzero(np.isfinite(c.reference[c.close_query[: c.close_size[0]]]))
            for array in (c.close_query, c.close_row):
                array[: len(kept)] = array[kept]
            c.close_size[0], size = len(kept), len(c.close_row)
            if size - len(kept) >= size // 4:
                return
            if size < self.room:
                query, row = (np.resize(a, min(self.room, 2 * size)) for a in (c.close_query, c.close_row))
                self.candidates = c._replace(close_query=query, close_row=row)
                continue
            c.most_close[0] = max(1, min(c.most_close[0], int(c.close.max())) // 2)
            for place in np.flatnonzero((c.close > c.most_close[0]) & np.isfinite(c.reference)):
                kernels.give_up(c, place)

    def sorted(self) -> Candidates:
        kernels.sort_candidates(self.candidates, self.mask.ids)
        return self.candidates


def given_up(c: Candidates) -> np.ndarray:
    """Queries [some] of which float32 could not tell the nearest, or could not within the memory."""
    return np.flatnonzero(np.isposinf(c.threshold))


def close_rows(c: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """(query, row) of the rows within the margin of the reference, of all queries that were not given up."""
    query, row = c.close_query[: c.close_size[0]], c.close_row[: c.close_size[0]]
    kept = np.isfinite(c.reference[query])
    return query[kept], row[kept]


def capacity(depth: Int64[np.ndarray, " queries"]) -> Int64[np.ndarray, " queries"]:
    """Places for the candidates of a query: beyond `depth`, as many as make dropping the far ones rare."""
    return 2 * depth + 16


def _cut(start: int, stop: int, size: int) -> list[slice]:
    return [slice(s, min(s + size, stop)) for s in range(start, stop, size)]
