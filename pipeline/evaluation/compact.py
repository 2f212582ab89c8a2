"""Figures of embeddings that take less room: fewer dimensions, int8, single bits, with and without re-scoring.

    float32   4 D bytes   the first D dimensions, at length one where the whole embedding is
    int8      D bytes     round(127 x / max |x|), each row with a scale of its own, which a cosine does not need
    binary    D / 8       the signs

Rows of float32 are ranked exactly (`retrieval`, `reid`). Of the others, candidates are found by what is stored on both sides,
the cosine of int8 rows or the Hamming distance of bits, and then, where the row says so, ranked again by the cosine of the
float32 query with the stored int8 rows, with the signs, or with float32 rows kept beside them. There are `oversample` times as
many candidates as a query needs: the largest K of Recall@K, or R, the number of images of its class, if that is more; an image
that is not among them is not found. All scores are exact or the same in every order of summation, ties by row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int8, Int64
from torch import Tensor
from torch.nn import functional as F

from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation.evaluate_task import TaskEmbeddings, measure_embeddings
from pipeline.evaluation.retrieval import Distance, Retrieval, precisions, retrieve
from pipeline.evaluation.tasks import RetrievalTask
from pipeline.neighbours.exact_cosine import ExactCosine, NormedRows

Precision = Literal["int8", "binary"]
PRECISIONS: tuple[Precision, ...] = ("int8", "binary")
OVERSAMPLE = 4
_BLOCK_ELEMENTS = 2**24  # scores of a block of queries: 64 or 128 MiB
_UNIT = 1e-5  # of a length of one


@dataclass(frozen=True)
class CompactRow:
    """Figures of one way to store and search embeddings.

    Attributes:
        dim: Dimensions kept.
        stored: What is kept of an image.
        found_by: What the candidates are found by.
        ranked_by: What they are ranked by.
        bytes_per_image: Size of what is kept of an image.
        metrics: In percent, by name.
    """

    dim: int
    stored: str
    found_by: str
    ranked_by: str
    bytes_per_image: int
    metrics: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_dims(dims: Sequence[int], dim: int) -> list[int]:
    """The dimensions to measure, the whole embedding first, then descending.

    Raises:
        UserError: One is below 1 or above the embedding's.
    """
    for value in dims:
        if not 1 <= value <= dim:
            raise UserError(
                f"{value} dimensions cannot be kept of embeddings of {dim}: expected 1 to {dim} of each of --dims"
            )
    return sorted({dim, *dims}, reverse=True)


def first_dims(embeddings: Float[Tensor, "rows dim"], dim: int) -> Float[Tensor, "rows kept"]:
    """The first `dim` dimensions, at length one if all rows of the whole have length one."""
    if dim == embeddings.shape[1]:
        return embeddings
    unit = bool(((embeddings.norm(dim=1) - 1).abs() < _UNIT).all())
    return F.normalize(embeddings[:, :dim]) if unit else embeddings[:, :dim].contiguous()


def int8_rows(embeddings: Float[Tensor, "rows dim"]) -> Int8[Tensor, "rows dim"]:
    """round(127 x / max |x|) of each row."""
    largest = embeddings.abs().amax(1, keepdim=True)
    return (embeddings * (127 / largest)).round().to(torch.int8)


def sign_rows(embeddings: Float[Tensor, "rows dim"]) -> Int8[Tensor, "rows dim"]:
    """1 where an element is above zero, else -1: what one bit says of it."""
    return torch.where(embeddings > 0, 1, -1).to(torch.int8)


def measure_dims(
    task: RetrievalTask, embedded: TaskEmbeddings, ranks: Ranks, dims: Sequence[int], recall_at: Sequence[int]
) -> list[CompactRow]:
    """Figures of a task by dimensions kept, for every kind of task; the same on every rank.

    Raises:
        UserError: As `check_dims`.
        DivergedError: As `measure_embeddings`.
    """
    rows = []
    for dim in check_dims(dims, embedded.rows.shape[1]):
        cut = dataclasses.replace(embedded, rows=first_dims(embedded.rows, dim))
        rows.append(_float_row(dim, task.distance, measure_embeddings(task, cut, ranks, recall_at).metrics))
    return rows


def measure_compact(
    queries: Float[Tensor, "queries dim"],
    labels: Int[Tensor, " queries"],
    gallery: Float[Tensor, "rows dim"] | None = None,
    gallery_labels: Int[Tensor, " rows"] | None = None,
    *,
    dims: Sequence[int] = (),
    quantise: Sequence[Precision] = (),
    recall_at: Sequence[int] = (1, 2, 4, 8),
    distance: Distance = "cosine",
    oversample: int = OVERSAMPLE,
) -> list[CompactRow]:
    """Figures of retrieval by dimensions kept and by precision.

    Time: for every row of the table about that of an exact evaluation. Memory: some copies of the embeddings, and 300 MiB.

    Args:
        queries, labels, gallery, gallery_labels: As `retrieve` takes them.
        dims: Dimensions kept, besides all of them.
        quantise: Precisions besides float32.
        recall_at: Every K of Recall@K.
        distance: Of float32 rows; the others know cosines only.
        oversample: Candidates, as a multiple of the neighbours that a query needs.

    Raises:
        UserError: As `check_dims`; int8 or binary rows with Euclidean distance; fewer than one candidate.
        ValueError: As `retrieve`.
    """
    if quantise and distance != "cosine":
        raise UserError("int8 and binary embeddings are compared by their cosine: leave out --quantise or --distance")
    if oversample < 1:
        raise UserError(f"--oversample is {oversample}, expected 1 or more")
    table = []
    for dim in check_dims(dims, queries.shape[1]):
        asked, searched = first_dims(queries, dim), None if gallery is None else first_dims(gallery, dim)
        exact = retrieve(asked, labels, gallery=searched, gallery_labels=gallery_labels, distance=distance)
        table.append(_float_row(dim, distance, exact.summary(recall_at)))
        search = _Search(asked, labels, searched, gallery_labels, oversample * max(recall_at), oversample)
        for precision in PRECISIONS:
            if precision in quantise:
                table += _quantised(search, precision, recall_at)
    return table


def _float_row(dim: int, distance: str, metrics: dict[str, float]) -> CompactRow:
    return CompactRow(dim, "float32", distance, distance, 4 * dim, metrics)


def _quantised(search: _Search, precision: Precision, recall_at: Sequence[int]) -> Iterator[CompactRow]:
    """The rows of one precision: not ranked again, ranked by the stored rows, and by rows of more bits beside them."""
    dim = search.queries.shape[1]
    rows, size = (int8_rows, dim) if precision == "int8" else (sign_rows, -(-dim // 8))
    found_by = "int8 · int8" if precision == "int8" else "Hamming"
    found = search.candidates(rows)
    ways: list[tuple[str, str, int, Callable[[Tensor], Tensor] | None]] = [
        (precision, found_by, size, None),
        (precision, f"float32 · {precision}", size, rows),
    ]
    if precision == "binary":
        ways.append(("binary + int8", "float32 · int8", size + dim, int8_rows))
    ways.append((f"{precision} + float32", "float32 · float32", size + 4 * dim, lambda values: values))
    for stored, ranked_by, num_bytes, kept in ways:
        result = search.ranked(found, kept)
        yield CompactRow(dim, stored, found_by, ranked_by, num_bytes, result.summary(recall_at))


@dataclass(frozen=True)
class _Candidates:
    """Candidates of all queries, each query's in their order: its place, and the row."""

    query: Int64[np.ndarray, " candidates"]
    row: Int64[np.ndarray, " candidates"]


class _Search:
    """Queries and a gallery; without a gallery every row is a query among all the others.

    Args:
        least: Candidates of a query at the least.
        oversample: Candidates for each image of its class.
    """

    def __init__(
        self, queries: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None,
        least: int, oversample: int,
    ) -> None:  # fmt: skip
        self.leave_one_out = gallery is None
        self.queries = queries.cpu()
        self.gallery = self.queries if gallery is None else gallery.cpu()
        self.classes = labels.cpu().numpy()
        self.gallery_classes = self.classes if gallery_labels is None else gallery_labels.cpu().numpy()
        classes, sizes = np.unique(self.gallery_classes, return_counts=True)
        place = np.minimum(np.searchsorted(classes, self.classes), len(classes) - 1)
        present = classes[place] == self.classes
        self.num_relevant = np.where(present, sizes[place] - self.leave_one_out, 0)
        self.depth = np.minimum(
            np.maximum(least, oversample * self.num_relevant), len(self.gallery) - self.leave_one_out
        )

    def candidates(self, stored: Callable[[Tensor], Tensor]) -> _Candidates:
        """Each query's `depth` nearest by what is stored on both sides, nearest first."""
        asked, rows = stored(self.queries), stored(self.gallery)
        exact_in_float32 = 127 * 127 * rows.shape[1] < 2**24  # whole numbers: the product has no rounding then
        dtype = torch.float32 if exact_in_float32 else torch.float64
        asked, rows = asked.to(dtype), rows.to(dtype)
        lengths = rows.double().norm(dim=1)
        order = np.argsort(self.depth, kind="stable")  # deep queries share their blocks
        parts = []
        for start in range(0, len(order), size := max(1, _BLOCK_ELEMENTS // len(rows))):
            some = order[start : start + size]
            score = (asked[some] @ rows.T).double() / lengths
            if self.leave_one_out:
                score[torch.arange(len(some)), some] = -torch.inf
            parts.append(self._best(score, some))
        query, row = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        by_query = np.argsort(query, kind="stable")
        return _Candidates(query[by_query], row[by_query])

    def _best(self, score: Tensor, some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best rows of a block's queries, ties by row; topk leaves open which of equals it takes."""
        depth = torch.from_numpy(self.depth[some])
        last = score.topk(int(depth.max())).values.gather(1, depth[:, None] - 1)
        listed = (score >= last).nonzero(as_tuple=True)
        value = score[listed].numpy()
        place, row = (index.numpy() for index in listed)
        order = np.lexsort((row, -value, place))
        place, row = place[order], row[order]
        rank = np.arange(len(place)) - np.searchsorted(place, place)
        kept = rank < self.depth[some][place]
        return some[place[kept]], row[kept]

    def ranked(self, found: _Candidates, kept: Callable[[Tensor], Tensor] | None) -> Retrieval:
        """Results of the candidates in their order, or ranked by the cosine of the query with rows that are kept."""
        query, row = found.query, found.row
        if kept is not None:
            rows = kept(self.gallery)
            exact = ExactCosine(
                NormedRows.of(self.queries, "embeddings"),
                NormedRows.of(rows if rows.is_floating_point() else rows.float(), "gallery"),
            )
            order = np.lexsort((row, -exact.pairs(query, row), query))
            query, row = query[order], row[order]
        num = len(self.queries)
        starts = np.searchsorted(query, np.arange(num))
        counts = np.diff(np.append(starts, len(query)))
        average_precision, r_precision = np.zeros(num), np.zeros(num)
        neighbours = np.full((num, 10), -1)
        precisions(
            starts, counts, row, self.gallery_classes, self.classes, self.num_relevant, average_precision, r_precision,
            neighbours,
        )  # fmt: skip
        first_hit = np.where(self.num_relevant > 0, len(self.gallery), -1)  # beyond all ranks where it is not found
        hits = np.flatnonzero(self.gallery_classes[row] == self.classes[query])
        queries, first = np.unique(query[hits], return_index=True)
        first_hit[queries] = hits[first] - starts[queries]
        return Retrieval(first_hit, average_precision, r_precision, self.num_relevant, neighbours)
