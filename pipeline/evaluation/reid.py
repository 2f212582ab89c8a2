"""Re-identification: is a person retrieved from another camera? CMC and mAP from queries to a gallery, exactly.

A gallery row is a *correct match* of a query if it shows the same person from another camera. It is
*junk*, removed from the query's ranking and neither right nor wrong, if it shows the same person
from the same camera or is labelled `JUNK`. Everything else is wrong, including persons that are in
no query, labelled `DISTRACTOR` (Zheng et al., "Scalable Person Re-identification", ICCV 2015:
Market-1501; "MARS", ECCV 2016, whose identities 0000 and 00-1 are these two).

With a query's R correct matches at the ranks r_1 < r_2 < ... (0: first) of its filtered ranking:

    CMC@k             share of queries with r_1 < k
    AP                1/R * sum_i i / (r_i + 1)
    AP, trapezoidal   1/R * sum_i (i / (r_i + 1) + [(i - 1) / r_i, or 1 if r_i = 0]) / 2

The second is the area under the precision-recall curve by the trapezoidal rule, as in the
evaluation scripts that came with Market-1501 and MARS, which OSM+CAA used. It is the smaller one,
unless the ranking is perfect.

The whole gallery is sorted by exact similarities. float32 proposals, which decide most of
`retrieval.retrieve`, would save little here: too many rows lie within the bound on their error of a
correct match. Counting the rows ahead of each correct match takes as long as sorting at 10 correct
matches a query, and longer at more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from pipeline.data.entries import DISTRACTOR, JUNK
from pipeline.evaluation.reranking import Reranking
from pipeline.evaluation.retrieval import Distance
from pipeline.neighbours.exact_cosine import Concatenable, ExactCosine, NormedRows, run_blocks, slices
from pipeline.neighbours.exact_euclidean import ExactEuclidean

_BYTES_PER_PAIR = 40  # size of temporary arrays for one query and one gallery row


@dataclass(frozen=True)
class ReidSet:
    """Embeddings of persons, with their identities and cameras.

    Attributes:
        embeddings: float32 or float64, of any length but zero.
        labels: Number of the person, 0 or more; in a gallery also `DISTRACTOR` and `JUNK`.
        cameras: Number of the camera, any integer.
    """

    embeddings: Float[Tensor, "rows dim"]
    labels: Int[Tensor, " rows"]
    cameras: Int[Tensor, " rows"]

    def checked(self, name: str, least_label: int, lengths: bool = True) -> tuple[NormedRows, np.ndarray, np.ndarray]:
        """Rows, labels and cameras.

        Raises:
            ValueError: As `NormedRows.of`; not one label and camera a row; a label below
                `least_label`.
        """
        vectors = NormedRows.of(self.embeddings, name, lengths)
        labels, cameras = self.labels.cpu().numpy(), self.cameras.cpu().numpy()
        if not labels.shape == cameras.shape == (len(vectors),):
            got = f"{len(vectors)} {name} rows with labels {labels.shape} and cameras {cameras.shape}"
            raise ValueError(f"got {got}: expected one of each a row")
        if labels.min() < least_label:
            raise ValueError(
                f"got label {labels.min()} in row {labels.argmin()} of the {name}: expected {least_label} or more "
                f"(distractors, {DISTRACTOR}, and junk, {JUNK}, belong to the gallery)"
            )
        return vectors, labels, cameras


@dataclass(frozen=True)
class ReidRetrieval(Concatenable):
    """Results per query.

    Attributes:
        first_hit: Rank of the nearest correct match in the filtered ranking, 0 is the nearest row;
            -1 if there is none.
        average_precision: In [0, 1]; 0 if the query has no correct match.
        average_precision_trapezoidal: The same by the trapezoidal rule.
        num_relevant: R, the number of correct matches.
        neighbours: Gallery rows of the nearest `keep` that are not junk, nearest first; -1 where
            there are fewer.
    """

    first_hit: Int64[np.ndarray, " queries"]
    average_precision: Float64[np.ndarray, " queries"]
    average_precision_trapezoidal: Float64[np.ndarray, " queries"]
    num_relevant: Int64[np.ndarray, " queries"]
    neighbours: Int64[np.ndarray, "queries keep"]

    def summary(self, cmc_at: Sequence[int] = (1, 5, 10, 20)) -> dict[str, float | int]:
        """Averages over the queries that have a correct match.

        Args:
            cmc_at: Every k of CMC@k: the share of queries with a correct match among their k
                nearest rows.

        Returns:
            `cmc@k` for each k, `map` and `map_trapezoidal` in percent; `queries`, the number averaged over;
            `queries_without_positive`, the number left out.

        Raises:
            ValueError: No query has a correct match, so that there is nothing to average.
        """
        counted = self.num_relevant > 0
        if not counted.any():
            raise ValueError(
                f"none of the {len(counted)} queries has its person in the gallery, seen by another camera"
            )
        return {
            **{f"cmc@{k}": 100.0 * float(np.mean(self.first_hit[counted] < k)) for k in cmc_at},
            "map": 100.0 * float(np.mean(self.average_precision[counted])),
            "map_trapezoidal": 100.0 * float(np.mean(self.average_precision_trapezoidal[counted])),
            "queries": int(counted.sum()),
            "queries_without_positive": int((~counted).sum()),
        }


def match(
    queries: ReidSet,
    gallery: ReidSet,
    *,
    distractors: Literal["wrong", "junk"] = "wrong",
    reranking: Reranking | None = None,
    part: slice | None = None,
    keep: int = 10,
    distance: Distance = "cosine",
    memory_bytes: int = 128 * 2**20,
) -> ReidRetrieval:
    """Ranks the gallery for each query by cosine similarity or Euclidean distance, exactly, ties by the smaller gallery row.

    Time: 3 float64 matrix products Q x N x D, and sorting the N similarities of each query. Memory:
    about `memory_bytes` beside the embeddings.

    Args:
        queries, gallery: The gallery may contain the queries, each of which is junk for itself.
        distractors: Whether distractors count as wrong or as junk. `junk` for the MARS figures of
            OSM+CAA, whose script ranks 00-1 instead: give those rows a label that no query has.
        reranking: Ranks by its distance instead of the cosine; made from the same rows.
        part: Range of queries to rank, one rank's share; default all.
        keep: Neighbours to return for each query.
        distance: "cosine", or "euclidean", which takes some 30 times the CPU time.
        memory_bytes: Size of the temporary blocks. It changes time, never the result.

    Raises:
        ValueError: Wrong dtype or shape; a row of length zero or with a NaN or infinity; a label
            below those allowed; a reranking of other rows.
    """
    if keep < 1:
        raise ValueError(f"got keep={keep}: expected at least 1")
    if distractors not in ("wrong", "junk"):
        raise ValueError(f"got distractors={distractors!r}: expected 'wrong' or 'junk'")
    query_rows, labels, cameras = queries.checked("queries", 0, distance == "cosine")
    gallery_rows, gallery_labels, gallery_cameras = gallery.checked("gallery", JUNK, distance == "cosine")
    exact: ExactCosine | ExactEuclidean = ExactCosine(query_rows, gallery_rows)
    if distance == "euclidean":
        exact = ExactEuclidean.of(queries.embeddings, gallery.embeddings)
    shape = (len(query_rows), len(gallery_rows))
    if reranking is not None and reranking.shape != shape:
        raise ValueError(f"got a reranking of {reranking.shape} queries and gallery rows: expected {shape}")
    similarity_of = exact.block if reranking is None else reranking.block
    junk = (gallery_labels == JUNK) | ((gallery_labels == DISTRACTOR) & (distractors == "junk"))
    query_ids = np.arange(len(query_rows))[part or slice(None)]
    depth = min(keep, len(gallery_rows))
    first_hit = np.full(len(query_ids), -1)
    num_relevant = np.zeros(len(query_ids), np.int64)
    neighbours = np.full((len(query_ids), keep), -1)
    precision = np.zeros(len(query_ids))
    trapezoidal = np.zeros(len(query_ids))

    def rank(block: np.ndarray) -> None:
        ids = query_ids[block]
        same = labels[ids, None] == gallery_labels
        excluded = junk | (same & (cameras[ids, None] == gallery_cameras))
        similarity = similarity_of(ids)
        similarity[excluded] = -np.inf
        order = _order(similarity)
        hits = np.take_along_axis(same & ~excluded, order, axis=1)
        num_relevant[block], first_hit[block], precision[block], trapezoidal[block] = _precisions(hits)
        nearest = order[:, :depth]
        neighbours[block, :depth] = np.where(np.take_along_axis(excluded, nearest, axis=1), -1, nearest)

    size = memory_bytes // torch.get_num_threads() // (_BYTES_PER_PAIR * len(gallery_rows))
    run_blocks(rank, [np.arange(len(query_ids))[block] for block in slices(len(query_ids), size)])
    return ReidRetrieval(first_hit, precision, trapezoidal, num_relevant, neighbours)


def _order(similarity: np.ndarray) -> np.ndarray:
    """Columns by similarity, largest first, ties by the smaller column; those of -inf come last in any order."""
    order = np.argsort(-similarity, axis=1)  # a third of the time of a stable sort, which only ties need
    ordered = np.take_along_axis(similarity, order, axis=1)
    tied = ((ordered[:, 1:] == ordered[:, :-1]) & ~np.isneginf(ordered[:, 1:])).any(axis=1)
    order[tied] = np.argsort(-similarity[tied], axis=1, kind="stable")
    return order


def _precisions(hits: np.ndarray) -> tuple[np.ndarray, ...]:
    """R, the first rank (-1: none) and both average precisions (0: none), from a mask of hits [queries, ranks].

    Each query's sum runs from its first hit to its last, so the block it is in changes no bit.
    """
    queries, ranks = np.divmod(np.flatnonzero(hits), hits.shape[1])
    num_relevant = np.bincount(queries, minlength=len(hits))
    hit_number = np.arange(1, len(queries) + 1) - (np.cumsum(num_relevant) - num_relevant)[queries]
    at_hit = hit_number / (ranks + 1)
    before = np.where(ranks == 0, 1.0, (hit_number - 1) / np.maximum(ranks, 1))
    first_hit = np.full(len(hits), -1)
    first_hit[num_relevant > 0] = ranks[hit_number == 1]
    means = (
        np.bincount(queries, terms, len(hits)) / np.maximum(num_relevant, 1)
        for terms in (at_hit, (at_hit + before) / 2)
    )
    return num_relevant, first_hit, *means
