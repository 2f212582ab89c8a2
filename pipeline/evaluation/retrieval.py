"""Exact retrieval metrics: Recall@k, MAP@R, R-Precision.

Distinctive:

- **Exact.** A float32 matrix product proposes neighbours, with a proven bound on its error; what the bound leaves open
  is decided in float64, ties by the smaller gallery row. No bit of a result depends on the size of the blocks, on how
  the queries are shared among ranks, or on the number of threads.
- **Exact sums, not careful ones.** The float64 similarity is a sum of integers in disguise (`exact_cosine.NormedRows`):
  every order of summation gives the same bits, so BLAS may do it. Embeddings that collapsed to (nearly) one point, of
  which float32 can order nothing, cost about 7 times the usual time.
- **Recall at any k.** The rank of the first positive is counted, not searched, so its cost does not grow with k.
- **Classes of any number and size.** Labels are sorted once; a class of thousands makes only its own queries deep.

The similarity is the cosine. MAP@R and R-Precision are those of Musgrave et al., "A Metric Learning Reality Check",
ECCV 2020, arXiv 2003.08505. For a query with R relevant gallery rows:

    R-Precision = hits among the R nearest / R            MAP@R = 1/R * sum_{i <= R} precision(i) * [i-th is relevant]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from pipeline.neighbours.exact_cosine import Concatenable, ExactCosine, NormedRows, run_blocks, slices

_PAIR_COST = 32  # comparing one pair exactly costs about as much as 32 elements of the exact matrix product


@dataclass(frozen=True)
class Retrieval(Concatenable):
    """Results per query.

    Attributes:
        first_hit: rank of the nearest relevant gallery row, 0 is the nearest of all; -1 if the query has none.
        average_precision: the query's term of MAP@R, in [0, 1]; 0 if it has no relevant row.
        r_precision: share of relevant rows among the R nearest, in [0, 1]; 0 if it has no relevant row.
        num_relevant: R, the number of gallery rows of the query's class (itself not counted).
        neighbours: gallery rows of the nearest `keep`, nearest first; -1 where the gallery is smaller than that.
    """

    first_hit: Int64[np.ndarray, " queries"]
    average_precision: Float64[np.ndarray, " queries"]
    r_precision: Float64[np.ndarray, " queries"]
    num_relevant: Int64[np.ndarray, " queries"]
    neighbours: Int64[np.ndarray, "queries keep"]

    def summary(self, recall_at: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float | int]:
        """Average over the queries that have a relevant gallery row.

        Args:
            recall_at: the k of Recall@k: the share of queries with a relevant row among their k nearest.

        Returns:
            `recall@k` for each k, `map@r` and `r_precision` in percent; `queries`, the number averaged over;
            `queries_without_positive`, the number left out.

        Raises:
            ValueError: no query has a relevant row, so that there is nothing to average.
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
    memory_bytes: int = 64 * 2**20,
) -> Retrieval:
    """Rank the gallery for each query by cosine similarity, exactly.

    Without a gallery every row is a query against all the others; it is left out by its index, so that its duplicates
    count. Time: a float32 matrix product Q x N x D and about ten passes over its Q x N values (60,502 rows, D = 64:
    40 s on one core). Memory: a float32 copy of the rows and about `memory_bytes`.

    Args:
        embeddings: float32 or float64, of any length but zero; float64 is compared as float64.
        labels: class of each embedding.
        gallery: rows to search instead of the embeddings themselves.
        gallery_labels: class of each gallery row.
        queries: range of rows of `embeddings` to do, for one rank's share; default all.
        keep: neighbours to return for each query.
        memory_bytes: size of the temporary blocks. It changes time, never the result.

    Raises:
        ValueError: wrong dtype or shape; a row of length zero or with a NaN or infinity; nothing to search.
    """
    if keep < 1:
        raise ValueError(f"got keep={keep}: expected at least 1")
    search = _Search.of(embeddings, labels, gallery, gallery_labels, memory_bytes // torch.get_num_threads())
    query_ids = np.arange(len(labels))[queries or slice(None)]
    num_relevant = search.num_relevant[query_ids]
    depth = np.minimum(np.maximum(num_relevant, keep), search.num_gallery - search.leave_one_out)
    first_hit, neighbours = np.full(len(query_ids), -1), np.full((len(query_ids), keep), -1)
    average_precision, r_precision = np.zeros(len(query_ids)), np.zeros(len(query_ids))

    def rank(block: np.ndarray) -> None:
        ids, first_hit[block] = search.rank(query_ids[block], int(depth[block].max()))
        hits = search.are_positive(query_ids[block], ids)
        average_precision[block], r_precision[block] = _precisions(hits, num_relevant[block])
        neighbours[block, : ids.shape[1]] = ids[:, :keep]

    order = np.argsort(depth, kind="stable")  # deep queries share their blocks, so that the others stay shallow
    run_blocks(rank, [order[part] for part in slices(len(order), search.rows_per_block(12))])
    first_hit[num_relevant == 0] = -1
    return Retrieval(first_hit, average_precision, r_precision, num_relevant, neighbours)


@dataclass(frozen=True)
class _Search:
    """Ranks the gallery for blocks of queries."""

    cosine: ExactCosine
    query_units: np.ndarray  # float32 [queries, dim], of length one
    gallery_units: np.ndarray  # the same of the gallery
    query_classes: np.ndarray  # int64 [queries]
    gallery_classes: np.ndarray  # int64 [gallery]
    num_relevant: np.ndarray  # int64 [queries]
    leave_one_out: bool
    memory_bytes: int

    @staticmethod
    def of(
        embeddings: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None, memory_bytes: int
    ) -> _Search:
        """Checks the input of `retrieve` and numbers the classes."""
        if (gallery is None) != (gallery_labels is None):
            raise ValueError("got only one of gallery and gallery_labels: give both or neither")
        leave_one_out = gallery is None
        queries = target = labelled_rows(embeddings, labels, "embeddings")
        if gallery is not None and gallery_labels is not None:
            target = labelled_rows(gallery, gallery_labels, "gallery")
        if leave_one_out and len(queries) == 1:
            raise ValueError("got 1 embedding: expected a row to find besides the query")
        cosine = ExactCosine(queries, target)
        wanted = labels.cpu().numpy()
        searched = wanted if gallery_labels is None else gallery_labels.cpu().numpy()
        classes, gallery_classes, sizes = np.unique(searched, return_inverse=True, return_counts=True)
        position = np.minimum(np.searchsorted(classes, wanted), len(classes) - 1)
        query_classes = np.where(classes[position] == wanted, position, -1)
        num_relevant = np.where(query_classes < 0, 0, sizes[query_classes] - leave_one_out)
        units = queries.unit32()
        target_units = units if leave_one_out else target.unit32()
        return _Search(
            cosine,
            units,
            target_units,
            query_classes,
            gallery_classes,
            num_relevant,
            leave_one_out,
            memory_bytes,
        )

    @property
    def num_gallery(self) -> int:
        return len(self.cosine.gallery)

    def rows_per_block(self, bytes_per_similarity: int) -> int:
        return max(1, self.memory_bytes // (bytes_per_similarity * self.num_gallery))

    @property
    def margin(self) -> float:
        """Twice the largest error of a float32 similarity: gamma_n = n u / (1 - n u), u = 2^-24 (Higham 2002, 3.1).

        n = D for the sum in any order, two more for rounding both vectors, the rest for comparing with a rounded bound.
        """
        rounding = (self.cosine.gallery.dim + 8) * 2.0**-24
        return 2 * rounding / (1 - rounding)

    def rank(self, query_ids: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest `depth` gallery rows, nearest first, [queries, depth], and the rank of the first positive."""
        ids, first_hit, undecided = self._rank_by_float32(query_ids, depth)
        for part in slices(len(undecided), self.rows_per_block(24)):
            chosen = undecided[part]
            ids[chosen], first_hit[chosen] = self._rank_exactly(query_ids[chosen], depth)
        return ids, first_hit

    def _rank_by_float32(self, query_ids: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `rank`, and the positions of queries it leaves to `_rank_exactly`: too many rows are too near to tell.

        Two sets of gallery rows are compared exactly. At least `depth` rows reach the depth-th float32 value, so a row
        that is lower by more than the margin is not among the nearest `depth`. And with b the positives' best value,
        the best positive and all that may stand on either side of it are within the margin of b; what lies between
        the two sets is certainly nearer than the best positive, and only counted.
        """
        similarity = np.matmul(self.query_units[query_ids], self.gallery_units.T)
        self._exclude_self(similarity, query_ids)
        positive = self.are_positive(query_ids, slice(None))
        best = similarity.max(axis=1, where=positive, initial=-np.inf, keepdims=True)
        near = similarity >= np.partition(similarity, -depth, axis=1)[:, -depth, None] - self.margin
        ahead = similarity > best + self.margin
        first_hit = np.count_nonzero(ahead & ~near, axis=1)
        near |= (similarity >= best - self.margin) & ~ahead
        undecided = np.count_nonzero(near, axis=1) > self.num_gallery // _PAIR_COST
        near[undecided] = False

        rows, near_ids = np.divmod(np.flatnonzero(near), near.shape[1])  # np.nonzero takes 5 times as long
        near_ids = self._sorted(query_ids, rows, near_ids, similarity[rows, near_ids])
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        ids = np.zeros((len(query_ids), depth), np.int64)
        listed = place < depth
        ids[rows[listed], place[listed]] = near_ids[listed]
        hits = np.flatnonzero(positive[rows, near_ids])
        found, first = np.unique(rows[hits], return_index=True)
        first_hit[found] += place[hits[first]]
        return ids, first_hit, np.flatnonzero(undecided)

    def _sorted(self, query_ids: np.ndarray, rows: np.ndarray, ids: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """The `ids` of each row (both ascending) by exact similarity, highest first, ties by the smaller id.

        Float32 values more than the margin apart are in the right order; only runs of nearer ones are compared.
        """
        order = np.lexsort((-similarity, rows))
        ids, similarity = ids[order], similarity[order]
        close = (rows[1:] == rows[:-1]) & (similarity[:-1] - similarity[1:] <= self.margin)
        run = np.cumsum(np.append(True, ~close)[: len(rows)])
        members = np.flatnonzero(np.append(close, False) | np.append(False, close))
        exact = np.zeros(len(rows))
        exact[members] = self.cosine.pairs(query_ids[rows[members]], ids[members])
        return ids[np.lexsort((ids, -exact, run))]

    def _rank_exactly(self, query_ids: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """`rank` by the exact similarities to the whole gallery: 3 float64 matrix products."""
        similarity = self.cosine.block(query_ids)
        self._exclude_self(similarity, query_ids)
        last = np.partition(similarity, -depth, axis=1)[:, [-depth]]
        above, tied = similarity > last, similarity == last
        room = depth - np.count_nonzero(above, axis=1, keepdims=True)
        listed = above | (tied & (np.cumsum(tied, axis=1, dtype=np.int32) <= room))
        ids = (np.flatnonzero(listed) % listed.shape[1]).reshape(len(query_ids), depth)
        order = np.argsort(-np.take_along_axis(similarity, ids, axis=1), axis=1, kind="stable")

        positive = self.are_positive(query_ids, slice(None))
        best = similarity.max(axis=1, where=positive, initial=-np.inf, keepdims=True)
        tied = similarity == best
        tied &= np.arange(self.num_gallery) < (tied & positive).argmax(axis=1)[:, None]
        first_hit = np.count_nonzero(similarity > best, axis=1) + np.count_nonzero(tied, axis=1)
        return np.take_along_axis(ids, order, axis=1), first_hit

    def _exclude_self(self, similarity: np.ndarray, query_ids: np.ndarray) -> None:
        if self.leave_one_out:
            similarity[np.arange(len(query_ids)), query_ids] = -np.inf

    def are_positive(self, query_ids: np.ndarray, gallery_ids: np.ndarray | slice) -> np.ndarray:
        """Whether of the query's class, bool [queries, ids]. The query itself is, too: its similarity is -inf."""
        return self.gallery_classes[gallery_ids] == self.query_classes[query_ids, None]


def labelled_rows(embeddings: Tensor, labels: Tensor, name: str) -> NormedRows:
    """The embeddings as vectors; there has to be one label a row."""
    vectors = NormedRows.of(embeddings, name)
    if labels.shape != (len(vectors),):
        raise ValueError(f"got {name} {tuple(embeddings.shape)} with labels {tuple(labels.shape)}: expected one a row")
    return vectors


def _precisions(hits: np.ndarray, num_relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MAP@R's term and R-Precision of each query, from bool [queries, depth]; 0 where nothing is relevant.

    The sums run from left to right, so the depth of the block changes no bit.
    """
    rows, num_relevant = np.arange(len(hits)), np.maximum(num_relevant, 1)
    num_hits = np.cumsum(hits, axis=1)
    precision = np.cumsum(hits * num_hits / np.arange(1, hits.shape[1] + 1), axis=1)
    return precision[rows, num_relevant - 1] / num_relevant, num_hits[rows, num_relevant - 1] / num_relevant
