"""Measures a retrieval task: embeds its images and ranks its queries; the ranks share both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods import Method
from pipeline.data.store import Samples
from pipeline.distributed.collectives import Ranks
from pipeline.errors import DivergedError
from pipeline.evaluation.clustering import clustering
from pipeline.evaluation.embedder import Embedder, EvaluatedTrunk
from pipeline.evaluation.reid import ReidRetrieval, ReidSet, match
from pipeline.evaluation.reranking import KNearestAndFarthest, Reranking
from pipeline.evaluation.retrieval import Retrieval, retrieve
from pipeline.evaluation.tasks import RetrievalTask, retrieval_units


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics, and the neighbours of each query.

    Attributes:
        metrics: In percent, by name; numbers of queries as counts.
        retrieval: Ranks and neighbours of the queries.
        queries, gallery: The images; tracklets are represented by their first frames.
        unit_length: All embeddings have length one, but for rounding: both distances then rank alike.
        embedded: The embeddings.
    """

    metrics: dict[str, float]
    retrieval: Retrieval | ReidRetrieval
    queries: Samples
    gallery: Samples
    unit_length: bool
    embedded: TaskEmbeddings

    def neighbour_columns(self) -> dict[str, np.ndarray]:
        """Each query with its nearest gallery images, as store ids, and its figures: what a report shows."""
        neighbours = self.retrieval.neighbours
        return {
            "query": self.queries.ids,
            "neighbours": np.where(neighbours >= 0, self.gallery.ids[np.maximum(neighbours, 0)], -1),
            "average_precision": self.retrieval.average_precision,
            "relevant": self.retrieval.num_relevant,
        }


def evaluate(
    task: RetrievalTask,
    embedder: Embedder,
    trunk: EvaluatedTrunk,
    method: Method | None,
    recall_at: Sequence[int],
    cluster: bool = False,
) -> EvaluationResult:
    """Embeds a task's images and measures retrieval; the same result on every rank, for any number of ranks.

    Args:
        task: Queries, gallery and protocol.
        embedder: Embeds the images.
        trunk, method: The model; without a method the pooled features are measured.
        recall_at: Every K of Recall@K, or of CMC@K.
        cluster: Measure NMI and AMI as well (k-means over the queries' embeddings).

    Raises:
        DivergedError: Embeddings are zero or not finite, or no query has a positive.
    """
    try:
        embedded = embed_task(task, embedder, trunk, method)
    except ValueError as error:  # a tracklet whose mean is zero or not finite
        raise _unmeasurable(error) from error
    return measure_embeddings(task, embedded, embedder.ranks, recall_at, cluster)


@dataclass(frozen=True)
class TaskEmbeddings:
    """Embeddings of a task's images or tracklets; those in both queries and gallery stand there once.

    Attributes:
        queries, gallery: What is searched, and among what; tracklets are represented by their first frames.
        rows: Embeddings [N, D], in the order of sample ids or of tracklets.
        query_rows, gallery_rows: Their rows.
    """

    queries: Samples
    gallery: Samples
    rows: Tensor
    query_rows: Tensor
    gallery_rows: Tensor

    def each_once(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels and embeddings [N, D] of queries and gallery, each image or tracklet once, by id."""
        ids = np.concatenate([self.queries.ids, self.gallery.ids])
        labels = np.concatenate([self.queries.labels, self.gallery.labels])
        rows = torch.cat([self.query_rows, self.gallery_rows])
        ids, first = np.unique(ids, return_index=True)
        return ids, labels[first], self.rows[rows[torch.from_numpy(first).to(rows.device)]].float().cpu().numpy()


def embed_task(task: RetrievalTask, embedder: Embedder, trunk: EvaluatedTrunk, method: Method | None) -> TaskEmbeddings:
    """Embeds the images of a task, each once.

    Raises:
        ValueError: The mean of a tracklet is zero or not finite.
    """
    sides = [task.queries, task.queries if task.gallery is None else task.gallery]
    ids, first = np.unique(np.concatenate([side.ids for side in sides]), return_index=True)
    if task.queries.tracks is None:
        keys, embeddings = ids, embedder(ids, trunk, method)
    else:
        tracks = np.concatenate([side.tracks for side in sides if side.tracks is not None])[first]
        keys, embeddings = np.unique(tracks), embedder.embed_tracklets(ids, tracks, trunk, method)
    if method is not None:
        with torch.no_grad():
            embeddings = method.refine_embeddings(embeddings)
    queries, gallery = (retrieval_units(side) for side in sides)
    rows = (np.searchsorted(keys, side.ids if side.tracks is None else side.tracks) for side in (queries, gallery))
    query_rows, gallery_rows = (torch.from_numpy(r).to(embeddings.device) for r in rows)
    return TaskEmbeddings(queries, gallery, embeddings, query_rows, gallery_rows)


def measure_embeddings(
    task: RetrievalTask, embedded: TaskEmbeddings, ranks: Ranks, recall_at: Sequence[int], cluster: bool = False
) -> EvaluationResult:
    """Measures retrieval with the embeddings of a task's images, which every rank has.

    Args:
        task: Queries, gallery and protocol.
        embedded: The embeddings.
        ranks: The ranks that share the queries.
        recall_at: Every K of Recall@K, or of CMC@K.
        cluster: Measure NMI and AMI as well (k-means over the queries' embeddings).

    Raises:
        DivergedError: Embeddings are zero or not finite, or no query has a positive.
    """
    queries, gallery = embedded.queries, embedded.gallery
    query_embeddings, gallery_embeddings = embedded.rows[embedded.query_rows], embedded.rows[embedded.gallery_rows]
    labels = torch.from_numpy(queries.labels)
    try:
        if task.reid:
            retrieval: Retrieval | ReidRetrieval = _match(
                task, queries, gallery, query_embeddings, gallery_embeddings, ranks
            )
        else:
            local_retrieval = retrieve(
                query_embeddings,
                labels,
                gallery=None if task.gallery is None else gallery_embeddings,
                gallery_labels=None if task.gallery is None else torch.from_numpy(gallery.labels),
                queries=ranks.slice(len(labels)),
                distance=task.distance,
            )
            retrieval = Retrieval.concatenate(ranks.collect(local_retrieval))
        metrics: dict[str, Any] = retrieval.summary(recall_at)
        if cluster:
            metrics |= ranks.broadcast(clustering(query_embeddings, labels) if ranks.rank == 0 else None)
    except ValueError as error:  # mostly embeddings that are not finite
        raise _unmeasurable(error) from error
    lengths = torch.cat([query_embeddings, gallery_embeddings]).norm(dim=1)
    unit_length = bool(((lengths - 1).abs() < 1e-5).all())
    return EvaluationResult(metrics, retrieval, queries, gallery, unit_length, embedded)


def _unmeasurable(error: ValueError) -> DivergedError:
    return DivergedError(f"the embeddings cannot be measured: {error}")


def _match(
    task: RetrievalTask,
    queries: Samples,
    gallery: Samples,
    query_embeddings: Tensor,
    gallery_embeddings: Tensor,
    ranks: Ranks,
) -> ReidRetrieval:
    """Re-identification; the ranks share the neighbours for re-ranking, and the queries."""
    reid_sets = []
    for side, embeddings in ((queries, query_embeddings), (gallery, gallery_embeddings)):
        assert side.cameras is not None
        reid_sets.append(ReidSet(embeddings, torch.from_numpy(side.labels), torch.from_numpy(side.cameras)))
    reranking = None
    if task.reranking is not None:
        config = task.reranking
        embeddings = torch.cat([query_embeddings, gallery_embeddings])
        local_neighbours = KNearestAndFarthest.of(embeddings, config.k1, ranks.slice(len(embeddings)))
        reranking = Reranking.of(
            query_embeddings,
            gallery_embeddings,
            k1=config.k1,
            k2=config.k2,
            weight=config.weight,
            neighbours=KNearestAndFarthest.concatenate(ranks.collect(local_neighbours)),
        )
    local_queries = ranks.slice(len(query_embeddings))
    local_retrieval = match(
        *reid_sets, distractors=task.distractors, reranking=reranking, part=local_queries, distance=task.distance
    )
    return ReidRetrieval.concatenate(ranks.collect(local_retrieval))
