"""Exact retrieval metrics: Recall@k, MAP@R and R-Precision, by cosine similarity or Euclidean distance.

Distinctive:

- **Exact.** float32 similarities propose neighbours, with a proven bound on their error; what the bound leaves open is
  decided in float64, ties by the smaller gallery row. No bit of a result depends on the size of the blocks, on how the
  queries are shared among ranks, on the number of threads, or on the device that proposed.
- **Each pair once.** Without a gallery, the similarity of two rows serves both as a query.
- **Recall at any k.** The rank of the first positive is counted, not searched, so its cost does not grow with k.
- **Classes of any number and size.** Each query collects as many candidates as its own class needs.

MAP@R and R-Precision are those of Musgrave et al., "A Metric Learning Reality Check", ECCV 2020, arXiv 2003.08505. For a
query with R relevant gallery rows:

    R-Precision = hits among the R nearest / R            MAP@R = 1/R * sum_{i <= R} precision(i) * [i-th is relevant]

By Euclidean distance every pair is compared in float64: see `exact_euclidean`.

Embeddings that collapsed to (nearly) one point, of which float32 can order nothing, cost about 20 times the usual time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from pipeline.neighbours import kernels
from pipeline.neighbours.candidates import Search, close_rows, given_up, multiply_on_device
from pipeline.neighbours.exact_cosine import Concatenable, ExactCosine, NormedRows, run_blocks, slices
from pipeline.neighbours.exact_euclidean import ExactEuclidean
from pipeline.neighbours.kernels import Candidates, Mask, compiled

PAIR_COST = 32  # comparing one pair exactly costs about as much as 32 elements of the exact matrix product
Distance = Literal["cosine", "euclidean"]
_CLASS_QUERIES, _CLASS_ROWS = 64, 2048  # of a tile in which the nearest positives are looked for


@dataclass(frozen=True)
class Retrieval(Concatenable):
    """Results per query.

    Attributes:
        first_hit: Rank of the nearest relevant gallery row, 0 is the nearest of all; -1 if the query has none.
        average_precision: The query's term of MAP@R, in [0, 1]; 0 if it has no relevant row.
        r_precision: Share of relevant rows among the R nearest, in [0, 1]; 0 if it has no relevant row.
        num_relevant: R, the number of gallery rows of the query's class (itself not counted).
        neighbours: Gallery rows of the nearest `keep`, nearest first; -1 where the gallery is smaller than that.
    """

    first_hit: Int64[np.ndarray, " queries"]
    average_precision: Float64[np.ndarray, " queries"]
    r_precision: Float64[np.ndarray, " queries"]
    num_relevant: Int64[np.ndarray, " queries"]
    neighbours: Int64[np.ndarray, "queries keep"]

    def summary(self, recall_at: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float | int]:
        """Average over the queries that have a relevant gallery row.

        Args:
            recall_at: The k of Recall@k: the share of queries with a relevant row among their k nearest.

        Returns:
            `recall@k` for each k, `map@r` and `r_precision` in percent; `queries`, the number averaged over;
            `queries_without_positive`, the number left out.

        Raises:
            ValueError: No query has a relevant row, so that there is nothing to average.
        """
        counted = self.num_relevant > 0
        if not counted.any():
            raise ValueError(f"none of the {len(counted)} queries has another row of its class in the gallery")
        first_hit = self.first_hit[counted]
        return {
            **{f"recall@{k}": 100.0 * float(np.mean(first_hit < k)) for k in recall_at},
            "map@r": 100.0 * float(np.mean(self.average_precision[counted])),
            "r_precision": 100.0 * float(np.mean(self.r_precision[counted])),
            "queries": int(counted.sum()),
            "queries_without_positive": int((~counted).sum()),
        }


def retrieve(
    embeddings: Float[Tensor, "num dim"],
    labels: Int[Tensor, " num"],
    *,
    gallery: Float[Tensor, "num_gallery dim"] | None = None,
    gallery_labels: Int[Tensor, " num_gallery"] | None = None,
    queries: slice | None = None,
    keep: int = 10,
    distance: Distance = "cosine",
    memory_bytes: int = 64 * 2**20,
) -> Retrieval:
    """Rank the gallery for each query by cosine similarity or Euclidean distance, exactly.

    Without a gallery every row is a query against all the others; it is left out by its index, so that its duplicates
    count. Time: a float32 matrix product Q x N x D, half of it without a gallery, and two passes over its values. Memory: a
    float32 copy of the rows and about `memory_bytes`. Embeddings on an accelerator are multiplied there.

    Args:
        embeddings: float32 or float64, by cosine of any length but zero; float64 is compared as float64.
        labels: Class of each embedding.
        gallery: Rows to search instead of the embeddings themselves.
        gallery_labels: Class of each gallery row.
        queries: Range of rows of `embeddings` to do, for one rank's share; default all.
        keep: Neighbours to return for each query.
        distance: "cosine", or "euclidean", which takes some 30 times the CPU time.
        memory_bytes: Size of the temporary blocks. It changes time, never the result.

    Raises:
        ValueError: Wrong dtype or shape; a row with a NaN or infinity, or (by cosine) of length zero; nothing to search.
    """
    if keep < 1:
        raise ValueError(f"got keep={keep}: expected at least 1")
    ranking = _Ranking(embeddings, labels, gallery, gallery_labels, queries, keep, distance, memory_bytes)
    ranking.run()
    return ranking.result


class _Ranking:
    """One call of `retrieve`: the queries in the order of their depth, so that deep ones share their blocks.

    Attributes:
        order: Places in the result, in that order.
        asked: Rows of the embeddings, in that order.
        row_order: Gallery rows in the order in which they are searched: without a gallery, the queries come first.
    """

    def __init__(
        self, embeddings: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None,
        queries: slice | None, keep: int, distance: Distance, memory_bytes: int,
    ) -> None:  # fmt: skip
        if (gallery is None) != (gallery_labels is None):
            raise ValueError("got only one of gallery and gallery_labels: give both or neither")
        self.keep, self.memory_bytes, self.leave_one_out = keep, memory_bytes, gallery is None
        lengths = distance == "cosine"
        rows = target = labelled_rows(embeddings, labels, "embeddings", lengths)
        if gallery is not None and gallery_labels is not None:
            target = labelled_rows(gallery, gallery_labels, "gallery", lengths)
        if self.leave_one_out and len(rows) == 1:
            raise ValueError("got 1 embedding: expected a row to find besides the query")
        self.cosine, self.device = ExactCosine(rows, target), embeddings.device
        other = embeddings if gallery is None else gallery
        self.exact = self.cosine if lengths else ExactEuclidean.of(embeddings, other)
        wanted = labels.cpu().numpy()
        searched = wanted if gallery_labels is None else gallery_labels.cpu().numpy()
        classes, self.gallery_classes, sizes = np.unique(searched, return_inverse=True, return_counts=True)
        position = np.minimum(np.searchsorted(classes, wanted), len(classes) - 1)
        query_classes = np.where(classes[position] == wanted, position, -1)
        num_relevant = np.where(query_classes < 0, 0, sizes[query_classes] - self.leave_one_out)

        own = np.arange(len(labels))[queries or slice(None)]
        num = len(own)
        depth = np.minimum(np.maximum(num_relevant[own], keep), len(target) - self.leave_one_out)
        self.order = np.argsort(depth, kind="stable")
        self.asked, self.depth = own[self.order], depth[self.order]
        self.query_classes, self.num_relevant = query_classes[self.asked], num_relevant[self.asked]
        others = np.ones(len(target), bool)
        others[own if self.leave_one_out else slice(0)] = False
        self.row_order = np.concatenate([self.asked if self.leave_one_out else own[:0], np.flatnonzero(others)])
        self.result = Retrieval(
            np.full(num, -1), np.zeros(num), np.zeros(num), num_relevant[own], np.full((num, keep), -1)
        )

    def run(self) -> None:
        if isinstance(self.exact, ExactEuclidean):
            self._rank_exactly(np.arange(len(self.asked)))
            return
        rows = self._on_device(self.cosine.gallery.unit32(self.row_order, copy=False))
        queries = rows
        if not self.leave_one_out:
            queries = self._on_device(self.cosine.queries.unit32(self.asked, copy=False))
        mask = Mask(self.row_order, self.gallery_classes[self.row_order], False)
        margin = np.float32(1.001 * self.cosine.gallery.margin)
        search = Search(
            queries=lambda part: queries[part],
            rows=lambda part: rows[part],
            num_rows=len(rows),
            dim=self.cosine.gallery.dim,
            mask=mask,
            depth=self.depth,
            margin=np.full(len(self.asked), margin),
            ids=self.asked if self.leave_one_out else np.full(len(self.asked), -1),
            labels=self.query_classes,
            reference=self._nearest_positive(queries, rows, mask.labels),
            same=self.leave_one_out,
            most_close=len(rows) // PAIR_COST,
            accelerator=not isinstance(rows, np.ndarray),
        )
        undecided = [np.empty(0, np.int64)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for group in search.groups(self.memory_bytes):  # each is ranked before the next takes memory
                undecided += pool.map(lambda block: self._rank(*block), search.collect(group, self.memory_bytes))
        self._rank_exactly(np.concatenate(undecided))

    def _on_device(self, units: np.ndarray) -> np.ndarray | Tensor:
        return torch.from_numpy(units).to(self.device) if on_accelerator(self.device) else units

    def _nearest_positive(
        self, queries: np.ndarray | Tensor, rows: np.ndarray | Tensor, row_classes: np.ndarray
    ) -> np.ndarray:
        """Each query's largest similarity to a row of its class, float32 [queries]; +inf where there is none.

        Queries and rows are taken in the order of their classes, so that small tiles hold all that is looked at.
        """
        best = np.full(len(self.asked), -np.inf, np.float32)
        by_class = np.argsort(self.query_classes, kind="stable")
        by_class = by_class[self.num_relevant[by_class] > 0]
        present = np.zeros(len(self.gallery_classes) + 1, bool)
        present[self.query_classes[by_class]] = True
        row_by_class = np.argsort(row_classes, kind="stable")
        row_by_class = row_by_class[present[row_classes[row_by_class]]]
        ordered = row_classes[row_by_class]
        for part in slices(len(by_class), _CLASS_QUERIES):
            some = by_class[part]
            classes = self.query_classes[some]
            start = int(np.searchsorted(ordered, classes[0], "left"))
            stop = int(np.searchsorted(ordered, classes[-1], "right"))
            for block in slices(stop - start, _CLASS_ROWS):
                members = row_by_class[start:stop][block]
                if isinstance(queries, Tensor):
                    tile = multiply_on_device(queries[some], rows[members]).cpu().numpy()
                else:
                    tile = queries[some] @ rows[members].T
                _largest_of_class(tile, some, members, classes, row_classes[members], self.leave_one_out, best)
        best[self.num_relevant == 0] = np.inf
        return best

    def _rank(self, part: slice, c: Candidates) -> np.ndarray:
        """Results of a block of queries; returns those that it leaves to `_rank_exactly`, as places in `asked`."""
        asked = self.asked[part]
        places, exact = kernels.places_to_compare(c), np.empty(len(c.values))
        query = np.searchsorted(c.starts, places, "right") - 1
        exact[places] = self.cosine.pairs(asked[query], self.row_order[c.rows[places]])
        kernels.sort_runs(c.starts, c.counts, c.values, c.margin, c.rows, exact, self.row_order)
        self._record(part, c.starts, c.counts, self.row_order[c.rows])
        self.result.first_hit[self.order[part]] = self._first_hit(c, part)
        return given_up(c) + part.start

    def _record(self, part: slice | np.ndarray, starts: np.ndarray, counts: np.ndarray, ids: np.ndarray) -> None:
        """Precisions and neighbours of some queries, whose nearest gallery rows are ids[start:start + count]."""
        result, places = self.result, self.order[part]
        classes, num_relevant = self.query_classes[part], self.num_relevant[part]
        average_precision, r_precision = np.zeros(len(places)), np.zeros(len(places))
        neighbours = np.full((len(places), self.keep), -1)
        precisions(
            starts, counts, ids, self.gallery_classes, classes, num_relevant, average_precision, r_precision, neighbours
        )
        result.average_precision[places], result.r_precision[places] = average_precision, r_precision
        result.neighbours[places] = neighbours

    def _first_hit(self, c: Candidates, part: slice) -> np.ndarray:
        """The rank of the nearest positive: rows surely nearer, and those of the close ones that are.

        With b the largest float32 similarity of a positive, the nearest positive and all that may stand on either side of it
        lie within the margin of b.
        """
        query, row = close_rows(c)
        alone = c.close[query] == 1  # the nearest positive itself
        query, row = query[~alone], row[~alone]
        ids = self.row_order[row]
        exact = self.cosine.pairs(self.asked[part][query], ids)
        first_hit = c.ahead.astype(np.int64)
        _count_nearer(query, ids, exact, self.gallery_classes[ids] == self.query_classes[part][query], first_hit)
        return np.where(self.num_relevant[part] > 0, first_hit, -1)

    def _rank_exactly(self, undecided: np.ndarray) -> None:
        """Results of some queries by the exact similarities to the whole gallery."""
        size = max(1, self.memory_bytes // torch.get_num_threads() // (24 * len(self.cosine.gallery)))

        def rank(part: slice) -> None:
            some = undecided[part]
            similarity = self.exact.block(self.asked[some])
            if self.leave_one_out:
                similarity[np.arange(len(some)), self.asked[some]] = -np.inf
            depth = int(self.depth[some].max())
            last = np.partition(similarity, -depth, axis=1)[:, [-depth]]
            above, tied = similarity > last, similarity == last
            room = depth - np.count_nonzero(above, axis=1, keepdims=True)
            listed = above | (tied & (np.cumsum(tied, axis=1, dtype=np.int32) <= room))
            ids = (np.flatnonzero(listed) % listed.shape[1]).reshape(len(some), depth)
            order = np.argsort(-np.take_along_axis(similarity, ids, axis=1), axis=1, kind="stable")
            ids = np.take_along_axis(ids, order, axis=1)
            self._record(some, np.arange(len(some)) * depth, np.full(len(some), depth), ids.ravel())

            positive = self.gallery_classes == self.query_classes[some, None]
            best = similarity.max(axis=1, where=positive, initial=-np.inf, keepdims=True)
            tied = similarity == best
            tied &= np.arange(len(self.gallery_classes)) < (tied & positive).argmax(axis=1)[:, None]
            first_hit = np.count_nonzero(similarity > best, axis=1) + np.count_nonzero(tied, axis=1)
            self.result.first_hit[self.order[some]] = np.where(self.num_relevant[some] > 0, first_hit, -1)

        run_blocks(rank, slices(len(undecided), size))


def on_accelerator(device: torch.device) -> bool:
    """Whether similarities are computed where the embeddings lie, with torch, instead of by the CPU's kernels."""
    return device.type != "cpu"


def labelled_rows(embeddings: Tensor, labels: Tensor, name: str, lengths: bool = True) -> NormedRows:
    """The embeddings as rows to compare; there has to be one label a row; without `lengths` a row may be zero."""
    vectors = NormedRows.of(embeddings, name, lengths)
    if labels.shape != (len(vectors),):
        raise ValueError(f"got {name} {tuple(embeddings.shape)} with labels {tuple(labels.shape)}: expected one a row")
    return vectors


@compiled
def _largest_of_class(tile, queries, rows, classes, row_classes, leave_one_out, best):
    """Raises best[query] to the largest element of its class in a tile [queries, rows]; itself is left out."""
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            itself = leave_one_out and rows[j] == queries[i]
            if row_classes[j] == classes[i] and not itself and tile[i, j] > best[queries[i]]:
                best[queries[i]] = tile[i, j]


@compiled
def precisions(starts, counts, ids, row_classes, classes, num_relevant, average_precision, r_precision, neighbours):
    """MAP@R's term and R-Precision of each query, 0 where nothing is relevant; sums run from the nearest on."""
    for query in range(counts.size):
        found = ids[starts[query] : starts[query] + counts[query]]
        for i in range(min(neighbours.shape[1], found.size)):
            neighbours[query, i] = found[i]
        hits, total, relevant = 0, 0.0, num_relevant[query]
        for i in range(min(relevant, found.size)):
            if row_classes[found[i]] == classes[query]:
                hits += 1
                total += hits / (i + 1)
        if relevant > 0:
            average_precision[query], r_precision[query] = total / relevant, hits / relevant


@compiled
def _count_nearer(queries, ids, exact, positive, first_hit):
    """Adds to first_hit[query] how many of its listed rows are nearer than its nearest listed positive; ties by id."""
    best, best_id = np.full(first_hit.size, -np.inf), np.full(first_hit.size, -1)
    for i in range(queries.size):
        query = queries[i]
        if positive[i]:
            nearer = exact[i] > best[query] or (exact[i] == best[query] and ids[i] < best_id[query])
            if best_id[query] < 0 or nearer:
                best[query], best_id[query] = exact[i], ids[i]
    for i in range(queries.size):
        query = queries[i]
        if exact[i] > best[query] or (exact[i] == best[query] and ids[i] < best_id[query]):
            first_hit[query] += 1
