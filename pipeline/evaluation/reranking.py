"""k-reciprocal re-ranking (Zhong, Zheng, Cao, Li, CVPR 2017, arXiv 1701.08398; github.com/zhunzhong07/person-re-ranking).

A gallery row is nearer to a query if the two have the same neighbours. Over queries and gallery
together:

    R(i, k)    rows among i's k nearest that have i among theirs, and i itself
    R*(i)      R(i, k1), and R(q, k1/2) of every q in R(i, k1) of which more than two thirds lie in R(i, k1)
    V_i[j]     exp(-d(i, j)) for j in R*(i), else 0; divided by its sum
    V'_i       mean of V over i and its k2 - 1 nearest rows
    J(i, j)    1 - sum(min(V'_i, V'_j)) / sum(max(V'_i, V'_j))
    d*(q, g)   (1 - weight) J(q, g) + weight d(q, g)

d is the cosine distance divided by its largest value in row i, which for rows of length one is the
authors' squared Euclidean distance divided likewise. Where the authors' code, which made the
published results, differs from the paper, this follows the code: V has sum one, d is divided by its
largest value, and "more than" two thirds (paper: at least).

Everything but the blocks of d* is sparse. Distances and neighbours are those of the exact cosine,
ties by the smaller row, so no bit depends on blocks or ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy import sparse
from torch import Tensor

from pipeline.evaluation.retrieval import retrieve
from pipeline.neighbours.exact_cosine import Concatenable, ExactCosine, NormedRows, slices

FARTHEST_BLOCK_ROWS = 2048  # rows that are negated at once
_CHUNK_ENTRIES = 2**18  # entries of sparse rows that are expanded at once, 10 to 40 bytes each


@dataclass(frozen=True)
class KNearestAndFarthest(Concatenable):
    """The nearest and the farthest rows of each row, among all queries and gallery rows.

    Attributes:
        nearest: The k1 nearest other rows, nearest first.
        farthest: The farthest row.
    """

    nearest: Int64[np.ndarray, "rows k1"]
    farthest: Int64[np.ndarray, " rows"]

    @staticmethod
    def of(
        embeddings: Float[Tensor, "all dim"], k1: int = 20, part: slice | None = None, memory_bytes: int = 64 * 2**20
    ) -> KNearestAndFarthest:
        """Nearest and farthest rows of a range of rows, in about the time of two `retrieval.retrieve` without a gallery.

        Args:
            embeddings: Queries, then gallery.
            k1: Number of nearest rows, fewer than there are rows.
            part: Range of rows to search for, one rank's share; default all.
            memory_bytes: Size of the temporary blocks. It changes time, never the result.

        Raises:
            ValueError: k1 out of range; as `retrieval.retrieve`.
        """
        if not 1 <= k1 < len(embeddings):
            raise ValueError(f"got k1={k1} for {len(embeddings)} rows: expected at least 1 and fewer than rows")
        classes = torch.arange(len(embeddings))  # a class for each row: only the neighbours are used, not the metrics
        nearest = retrieve(embeddings, classes, queries=part, keep=k1, memory_bytes=memory_bytes)
        queries = embeddings[part or slice(None)]
        farthest = [np.empty(0, np.int64)]
        for rows in slices(len(queries), FARTHEST_BLOCK_ROWS):
            negated = -queries[rows]
            no_class = torch.full((len(negated),), -1)
            retrieval = retrieve(
                negated, no_class, gallery=embeddings, gallery_labels=classes, keep=1, memory_bytes=memory_bytes
            )
            farthest.append(retrieval.neighbours[:, 0])
        return KNearestAndFarthest(nearest.neighbours, np.concatenate(farthest))


@dataclass(frozen=True)
class Reranking:
    """Distances d* of queries and gallery, block by block.

    Attributes:
        cosine: Cosine similarities of queries and gallery.
        largest: The cosine distance of each query to its farthest row.
        queries: V' of the queries, csr [queries, all rows].
        gallery: V' of the gallery, csc [gallery, all rows].
        weight: Weight of the original distance; the paper's lambda.
    """

    cosine: ExactCosine
    largest: Float64[np.ndarray, " queries"]
    queries: sparse.csr_array
    gallery: sparse.csc_array
    weight: float | int

    @staticmethod
    def of(
        queries: Float[Tensor, "queries dim"],
        gallery: Float[Tensor, "gallery dim"],
        *,
        k1: int = 20,
        k2: int = 6,
        weight: float | int = 0.3,
        neighbours: KNearestAndFarthest | None = None,
    ) -> Reranking:
        """Re-ranked distances; defaults are the paper's for Market-1501, OSM+CAA's on MARS are k1 7, k2 3, weight 0.85.

        Time: a float64 comparison for each of the about N k1 entries of V. Memory: 12 bytes for
        each of the entries of V', at most k2 times as many, and several times that while they are
        made.

        Args:
            queries, gallery: Embeddings, as given to `reid.match`.
            k1: Number of nearest neighbours that may be reciprocal.
            k2: Number of rows in the local query expansion, the row itself included; 1 for none.
            weight: Weight of the original distance, 0 to 1.
            neighbours: Neighbours of the rows of queries and gallery, in this order, for k1;
                default: computed here.

        Raises:
            ValueError: A value out of range; neighbours of other rows or another k1; as
                `retrieval.retrieve`.
        """
        if not (1 <= k2 <= k1 + 1 and 0 <= weight <= 1):
            raise ValueError(f"got k1={k1}, k2={k2}, weight={weight}: expected k2 from 1 to k1 + 1, weight from 0 to 1")
        cosine = ExactCosine(NormedRows.of(queries, "queries"), NormedRows.of(gallery, "gallery"))
        embeddings = torch.cat([queries.detach(), gallery.detach()])
        if neighbours is None:
            neighbours = KNearestAndFarthest.of(embeddings, k1)
        if neighbours.nearest.shape != (len(embeddings), k1):
            raise ValueError(
                f"got neighbours {neighbours.nearest.shape}: expected {(len(embeddings), k1)}, queries and gallery by k1"
            )
        vectors = NormedRows.of(embeddings, "embeddings")
        distance = _Distance(ExactCosine(vectors, vectors), neighbours.farthest)
        features = _reciprocal_features(neighbours.nearest, distance)
        features = _query_expanded(features, neighbours.nearest[:, : k2 - 1])
        largest = distance.largest[: len(queries)]
        return Reranking(cosine, largest, features[: len(queries)], features[len(queries) :].tocsc(), weight)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.cosine.queries), len(self.cosine.gallery)

    def block(self, query_ids: Int64[np.ndarray, " queries"]) -> Float64[np.ndarray, "queries gallery"]:
        """-d* of these queries to the whole gallery, so that the largest is the nearest."""
        distance = 1 - self.cosine.block(query_ids)
        distance /= self.largest[query_ids, None]
        distance *= self.weight
        overlap = self._overlap(query_ids)
        distance += (1 - self.weight) * (1 - overlap / (2 - overlap))  # both sums are one: max = 2 - min
        return -distance

    def _overlap(self, query_ids: np.ndarray) -> np.ndarray:
        """sum(min(V'_q, V'_g)) of these queries and the whole gallery, through the columns that q and g share.

        Each sum runs over ascending columns, so the other queries of the block change no bit.
        """
        features = self.queries[query_ids]
        num_gallery = self.gallery.shape[0]
        overlap = np.zeros(len(query_ids) * num_gallery)
        target = np.repeat(np.arange(len(query_ids)) * num_gallery, np.diff(features.indptr))
        start = self.gallery.indptr[features.indices]
        count = np.diff(self.gallery.indptr)[features.indices]
        cuts = np.flatnonzero(np.diff(np.cumsum(count) // _CHUNK_ENTRIES)) + 1
        for chunk in (slice(*ends) for ends in itertools.pairwise([0, *cuts.tolist(), len(count)])):
            entry = np.repeat(np.arange(chunk.start, chunk.stop), count[chunk])
            within = np.arange(len(entry)) - np.repeat(np.cumsum(count[chunk]) - count[chunk], count[chunk])
            position = start[entry] + within
            shared = np.minimum(features.data[entry], self.gallery.data[position])
            np.add.at(overlap, target[entry] + self.gallery.indices[position], shared)
        return overlap.reshape(len(query_ids), num_gallery)


class _Distance:
    """The cosine distance of pairs of rows, divided by the largest of the first one's."""

    def __init__(self, cosine: ExactCosine, farthest: np.ndarray) -> None:
        self.cosine = cosine
        # Where all rows coincide, distances are rounding errors: at most this large.
        rounding = cosine.gallery.dim * 2.0**-50
        self.largest = np.maximum(1 - cosine.pairs(np.arange(len(farthest)), farthest), rounding)

    def __call__(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        return (1 - self.cosine.pairs(rows, others)) / self.largest[rows]


def _neighbour_matrix(nearest: np.ndarray, value: int | float) -> sparse.csr_array:
    """A sparse matrix [rows, rows] with `value` where a column is the row itself or one of its `nearest` [rows, k]."""
    num, k = nearest.shape
    columns = np.column_stack([np.arange(num), nearest])
    columns.sort(axis=1)
    shape, pointers = (num, num), np.arange(0, num * (k + 1) + 1, k + 1)
    return sparse.csr_array((np.full(columns.size, value), columns.ravel(), pointers), shape=shape)


def _reciprocal_features(nearest: np.ndarray, distance: _Distance) -> sparse.csr_array:
    """V, the k-reciprocal features, from the k1 nearest of each row."""
    forward, forward_half = _neighbour_matrix(nearest, 1), _neighbour_matrix(nearest[:, : nearest.shape[1] // 2], 1)
    reciprocal, half = (lists.multiply(lists.T).tocsr() for lists in (forward, forward_half))
    half_size = np.diff(half.indptr)
    features = []
    for rows in slices(len(nearest), _CHUNK_ENTRIES // (1 + nearest.shape[1]) ** 2):
        block = reciprocal[rows]
        shared = (block @ half).multiply(block).tocsr()  # |R(q, k1/2) in R(i, k1)|: half is symmetric
        shared.data = (3 * shared.data > 2 * half_size[shared.indices]).astype(np.int64)
        members = block + shared @ half
        members.eliminate_zeros()
        members.sort_indices()
        count = np.diff(members.indptr)
        weights = np.exp(-distance(np.repeat(np.arange(rows.start, rows.stop), count), members.indices))
        weights /= np.repeat(np.add.reduceat(weights, members.indptr[:-1]), count)
        features.append(sparse.csr_array((weights, members.indices, members.indptr), shape=members.shape))
    return sparse.vstack(features, format="csr")


def _query_expanded(features: sparse.csr_array, nearest: np.ndarray) -> sparse.csr_array:
    """V', the mean of V over each row and its `nearest`."""
    if nearest.shape[1] == 0:
        return features
    mean = _neighbour_matrix(nearest, 1 / (1 + nearest.shape[1])) @ features
    mean.sort_indices()
    return mean
