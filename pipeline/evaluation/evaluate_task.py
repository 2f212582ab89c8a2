"""Embeds many images and measures retrieval on them; images and query rows are shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from methods import Method
from pipeline.config import Config, RerankingConfig
from pipeline.data.loader import Item, PixelSource, load
from pipeline.data.store import Samples, Store
from pipeline.distributed.collectives import Ranks, gather
from pipeline.errors import RunError
from pipeline.evaluation.reid import Matches, Sightings, TrackSums, match
from pipeline.evaluation.reranking import Neighbourhoods, Reranking
from pipeline.evaluation.retrieval import Retrieval, clustering, retrieve
from pipeline.model.trunk import Trunk


@dataclass(frozen=True)
class Embedder:
    """Turns sample ids into embeddings; one for each run.

    Attributes:
        source: pixels of the images.
        engine, loader_cpus, batch_size: how they are loaded.
        precision: of the run; bf16 autocasts the trunk.
        device: of the trunk.
        ranks: who shares the work.
    """

    source: PixelSource
    engine: str
    loader_cpus: int
    batch_size: int
    precision: str
    device: torch.device
    ranks: Ranks

    @torch.no_grad()
    def __call__(
        self, ids: Int64[np.ndarray, " images"], trunk: Trunk, method: Method | None
    ) -> Float[Tensor, "images dim"]:
        """Embeddings of the given store ids (pooled features if there is no method), on every rank.

        Leaves trunk and method in evaluation mode.
        """
        own = self.ranks.slice(len(ids))
        parts = [*self._batches(ids, trunk, method)] or [self._embed(self._no_pixels(), trunk, method)]
        return gather(torch.cat(parts), own.start, len(ids), self.ranks)

    @torch.no_grad()
    def pooled(
        self,
        ids: Int64[np.ndarray, " frames"],
        tracks: Int64[np.ndarray, " frames"],
        trunk: Trunk,
        method: Method | None,
    ) -> Float[Tensor, "tracks dim"]:
        """The mean embedding of each tracklet, of length one, tracklets ascending, on every rank.

        No rank holds more frames than a batch: each adds up those of its share, and the sums are added over the ranks.

        Raises:
            ValueError: the mean of a tracklet is zero or not finite.
        """
        own = self.ranks.slice(len(ids))
        sums = TrackSums.empty(tracks, self._embed(self._no_pixels(), trunk, method).shape[1])
        at = own.start
        for embeddings in self._batches(ids, trunk, method):
            sums.add(embeddings, tracks[at : at + len(embeddings)])
            at += len(embeddings)
        totals = (self.ranks.sum(t.to(self.device)).cpu() for t in (sums.sums, sums.counts))
        return TrackSums(sums.tracks, *totals).rows()

    def _batches(self, ids: np.ndarray, trunk: Trunk, method: Method | None) -> Iterator[Tensor]:
        """Embeddings of this rank's share, batch by batch."""
        trunk.set_mode(False, self.ranks)
        if method is not None:
            method.eval()
        own = self.ranks.slice(len(ids))
        items = [Item(ids[i : min(i + self.batch_size, own.stop)]) for i in range(own.start, own.stop, self.batch_size)]
        for pixels in load(self.source, items, self.engine, self.loader_cpus):
            yield self._embed(pixels.to(self.device), trunk, method)

    def _embed(self, pixels: Tensor, trunk: Trunk, method: Method | None) -> Tensor:
        features = trunk_features(trunk, pixels, self.precision)
        return features if method is None else method.embed(features)

    def _no_pixels(self) -> Tensor:
        size = self.source.transforms.size
        return torch.zeros(0, 3, size, size, dtype=torch.uint8, device=self.device)


def trunk_features(trunk: Callable[[Tensor], Tensor], pixels: Tensor, precision: str) -> Tensor:
    """Pooled features in at least float32, with the run's precision inside the trunk."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = trunk(pixels)
    return features if features.dtype == torch.float64 else features.float()


def units(samples: Samples) -> Samples:
    """What is searched and found: tracklets (each by its first frame, ascending), or the images themselves."""
    if samples.tracks is None:
        return samples
    tracks, first = np.unique(samples.tracks, return_index=True)
    cameras = None if samples.cameras is None else samples.cameras[first]
    return Samples(samples.ids[first], samples.labels[first], samples.class_names, tracks, cameras)


@dataclass(frozen=True)
class Task:
    """A retrieval task.

    Attributes:
        queries: images, or frames of tracklets.
        gallery: where they are searched; none: among each other (leave-one-out).
        reid: what the query's camera took of the query's class is junk, and so are rows of the label JUNK; measured are CMC
            and mAP. The gallery may hold the queries.
        distractors: with reid, what rows of the label DISTRACTOR are.
        reranking: with reid, ranks by k-reciprocal distances.
    """

    queries: Samples
    gallery: Samples | None = None
    reid: bool = False
    distractors: Literal["wrong", "junk"] = "wrong"
    reranking: RerankingConfig | None = None

    def check(self, cluster: bool) -> None:
        """Whether there is anything to measure, known before any image is embedded.

        Args:
            cluster: NMI and AMI are wanted too.

        Raises:
            ValueError: no query has a positive, or there are not the classes that a clustering needs.
        """
        queries, gallery = units(self.queries), None if self.gallery is None else units(self.gallery)
        sizes = np.bincount(queries.labels, minlength=1)
        if self.reid:
            assert gallery is not None and queries.cameras is not None and gallery.cameras is not None
            seen = {
                (label, camera) for label, camera in zip(gallery.labels, gallery.cameras, strict=True) if label >= 0
            }
            by_label = np.bincount([label for label, _ in seen], minlength=len(sizes))
            own = [(label, camera) in seen for label, camera in zip(queries.labels, queries.cameras, strict=True)]
            found = bool((by_label[queries.labels] > own).any())
        elif gallery is None:
            found = bool(sizes.max() > 1)
        else:
            found = bool(np.isin(queries.labels, gallery.labels).any())
        if not found:
            what = "person seen by another camera" if self.reid else "image of its class"
            raise ValueError(f"none of the {len(queries)} queries has another {what} to find")
        classes = np.count_nonzero(sizes)
        if cluster and not 2 <= classes < len(queries):
            raise ValueError(
                f"a clustering needs at least 2 classes and fewer classes than queries, there are {classes} and "
                f"{len(queries)}: set evaluation.clustering to false"
            )

    def metrics(self, recall_at: Sequence[int]) -> list[str]:
        """Names of what is measured."""
        if self.reid:
            return ["map", "map_trapezoidal", *(f"cmc@{k}" for k in recall_at)]
        return ["map@r", "r_precision", *(f"recall@{k}" for k in recall_at)]


def validation_task(config: Config, store: Store) -> Task | None:
    """The held-out fold of the training classes; under the paper protocol the test classes; None without either."""
    if config.protocol == "paper":
        return test_task(config, store)
    fold = config.data.validation_fold
    if fold is None:
        return None
    samples = store.select(["train"], fold=fold)
    return _reid(config, samples, samples) if store.protocol == "reid" else Task(samples)


def test_task(config: Config, store: Store) -> Task | None:
    """As the store's protocol says: query to gallery, re-identification, or leave-one-out; None if it has no test images."""
    if store.protocol == "leave_one_out":
        samples = store.select(["test"])
        return Task(samples) if len(samples) else None
    both = store.select(["query", "gallery"])  # one numbering of classes for both sides
    if not len(both):
        return None
    is_query = np.isin(both.ids, store.sample_id[store.split == "query"])
    queries, gallery = (both.take(m) for m in (is_query, ~is_query))
    return _reid(config, queries, both) if store.protocol == "reid" else Task(queries, gallery)


def _reid(config: Config, queries: Samples, gallery: Samples) -> Task:
    e = config.evaluation
    return Task(queries, gallery, True, e.distractors, e.reranking)


@dataclass(frozen=True)
class Result:
    """Metrics in percent, and for each query what it retrieved.

    Attributes:
        metrics: by name.
        retrieval: ranks and neighbours of the queries.
        queries, gallery: who they are; tracklets by their first frames.
    """

    metrics: dict[str, float]
    retrieval: Retrieval | Matches
    queries: Samples
    gallery: Samples


def evaluate(
    task: Task,
    embedder: Embedder,
    trunk: Trunk,
    method: Method | None,
    recall_at: Sequence[int],
    cluster: bool = False,
) -> Result:
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
            whole: Retrieval | Matches = _match(task, queries, gallery, mine, theirs, ranks)
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
    return Result(metrics, whole, queries, gallery)


def _embeddings(
    task: Task, embedder: Embedder, trunk: Trunk, method: Method | None
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
            embeddings = method.refine(embeddings)
    embeddings = embeddings.cpu()
    queries, gallery = (units(side) for side in sides)
    rows = (np.searchsorted(keys, side.ids if side.tracks is None else side.tracks) for side in (queries, gallery))
    mine, theirs = (embeddings[torch.from_numpy(r)] for r in rows)
    return queries, gallery, mine, theirs


def _match(task: Task, queries: Samples, gallery: Samples, mine: Tensor, theirs: Tensor, ranks: Ranks) -> Matches:
    """Re-identification; neighbourhoods and queries are shared by the ranks."""
    sightings = []
    for side, rows in ((queries, mine), (gallery, theirs)):
        assert side.cameras is not None
        sightings.append(Sightings(rows, torch.from_numpy(side.labels), torch.from_numpy(side.cameras)))
    reranking = None
    if task.reranking is not None:
        r, everything = task.reranking, torch.cat([mine, theirs])
        part = Neighbourhoods.of(everything, r.k1, ranks.slice(len(everything)))
        found = Neighbourhoods.concatenate(ranks.collect(part))
        reranking = Reranking.of(mine, theirs, k1=r.k1, k2=r.k2, weight=r.weight, neighbourhoods=found)
    matches = match(*sightings, distractors=task.distractors, reranking=reranking, part=ranks.slice(len(mine)))
    return Matches.concatenate(ranks.collect(matches))
