"""Measures a retrieval task: its images are embedded, its queries ranked; both are shared by the ranks."""

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
from pipeline.errors import RunError
from pipeline.evaluation.clustering import clustering
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.reid import ReidRetrieval, ReidSet, match
from pipeline.evaluation.reranking import KNearestAndFarthest, Reranking
from pipeline.evaluation.retrieval import Retrieval, retrieve
from pipeline.evaluation.tasks import RetrievalTask, retrieval_units
from pipeline.model.trunk import Trunk


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics in percent, and for each query what it retrieved.

    Attributes:
        metrics: by name.
        retrieval: ranks and neighbours of the queries.
        queries, gallery: who they are; tracklets by their first frames.
    """

    metrics: dict[str, float]
    retrieval: Retrieval | ReidRetrieval
    queries: Samples
    gallery: Samples


def evaluate(
    task: RetrievalTask,
    embedder: Embedder,
    trunk: Trunk,
    method: Method | None,
    recall_at: Sequence[int],
    cluster: bool = False,
) -> EvaluationResult:
    """Embeds a task's images and measures retrieval; the same result on every rank, for any number of ranks.

    Args:
        task: what to measure.
        embedder: how to embed.
        trunk, method: the model; without a method the pooled features are measured.
        recall_at: every K of Recall@K, or of CMC.
        cluster: NMI and AMI as well (k-means over the queries' embeddings).

    Raises:
        RunError: embeddings are zero or not finite, or no query has a positive.
    """
    ranks = embedder.ranks
    try:
        queries, gallery, mine, theirs = _embeddings(task, embedder, trunk, method)
        if task.reid:
            whole: Retrieval | ReidRetrieval = _match(task, queries, gallery, mine, theirs, ranks)
        else:
            labels = torch.from_numpy(queries.labels)
            beside = (None, None) if task.gallery is None else (theirs, torch.from_numpy(gallery.labels))
            share = ranks.slice(len(labels))
            part = retrieve(mine, labels, gallery=beside[0], gallery_labels=beside[1], queries=share)
            whole = Retrieval.concatenate(ranks.collect(part))
        metrics: dict[str, Any] = whole.summary(recall_at)
        if cluster:
            labels = torch.from_numpy(queries.labels)
            metrics |= ranks.broadcast(clustering(mine, labels) if ranks.rank == 0 else None)
    except ValueError as error:  # embeddings that are not finite, most often
        raise RunError(f"the embeddings cannot be measured: {error}") from error
    return EvaluationResult(metrics, whole, queries, gallery)


def _embeddings(
    task: RetrievalTask, embedder: Embedder, trunk: Trunk, method: Method | None
) -> tuple[Samples, Samples, Tensor, Tensor]:
    """Queries and gallery, and their rows; what stands in both is embedded once."""
    sides = [task.queries, task.queries if task.gallery is None else task.gallery]
    ids, first = np.unique(np.concatenate([side.ids for side in sides]), return_index=True)
    if task.queries.tracks is None:
        keys, embeddings = ids, embedder(ids, trunk, method)
    else:
        tracks = np.concatenate([side.tracks for side in sides if side.tracks is not None])[first]
        keys, embeddings = np.unique(tracks), embedder.pooled(ids, tracks, trunk, method)
    if method is not None:
        with torch.no_grad():
            embeddings = method.refine_embeddings(embeddings)
    queries, gallery = (retrieval_units(side) for side in sides)
    rows = (np.searchsorted(keys, side.ids if side.tracks is None else side.tracks) for side in (queries, gallery))
    mine, theirs = (embeddings[torch.from_numpy(r).to(embeddings.device)] for r in rows)
    return queries, gallery, mine, theirs


def _match(
    task: RetrievalTask, queries: Samples, gallery: Samples, mine: Tensor, theirs: Tensor, ranks: Ranks
) -> ReidRetrieval:
    """Re-identification; neighbourhoods and queries are shared by the ranks."""
    sightings = []
    for side, rows in ((queries, mine), (gallery, theirs)):
        assert side.cameras is not None
        sightings.append(ReidSet(rows, torch.from_numpy(side.labels), torch.from_numpy(side.cameras)))
    reranking = None
    if task.reranking is not None:
        r, everything = task.reranking, torch.cat([mine, theirs])
        part = KNearestAndFarthest.of(everything, r.k1, ranks.slice(len(everything)))
        found = KNearestAndFarthest.concatenate(ranks.collect(part))
        reranking = Reranking.of(mine, theirs, k1=r.k1, k2=r.k2, weight=r.weight, neighbourhoods=found)
    matches = match(*sightings, distractors=task.distractors, reranking=reranking, part=ranks.slice(len(mine)))
    return ReidRetrieval.concatenate(ranks.collect(matches))
