"""Embeds many images and measures retrieval on them; images and query rows are shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from methods import Method
from pipeline.collectives import Ranks, gather
from pipeline.config import Config
from pipeline.data.loader import Item, PixelSource, load
from pipeline.data.store import Samples, Store
from pipeline.errors import RunError
from pipeline.metrics import Retrieval, clustering, retrieve
from pipeline.model import Trunk


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
        trunk.set_mode(False, self.ranks)
        if method is not None:
            method.eval()
        own = self.ranks.slice(len(ids))
        items = [Item(ids[i : min(i + self.batch_size, own.stop)]) for i in range(own.start, own.stop, self.batch_size)]
        parts = []
        for pixels in load(self.source, items, self.engine, self.loader_cpus):
            features = trunk_features(trunk, pixels.to(self.device), self.precision)
            parts.append(features if method is None else method.embed(features))
        if not parts:  # more ranks than images
            empty = trunk_features(
                trunk,
                torch.zeros(0, 3, *[self.source.transforms.size] * 2, dtype=torch.uint8).to(self.device),
                self.precision,
            )
            parts.append(empty if method is None else method.embed(empty))
        return gather(torch.cat(parts), own.start, len(ids), self.ranks)


def trunk_features(trunk: Callable[[Tensor], Tensor], pixels: Tensor, precision: str) -> Tensor:
    """Pooled features in at least float32, with the run's precision inside the trunk."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = trunk(pixels)
    return features if features.dtype == torch.float64 else features.float()


@dataclass(frozen=True)
class Task:
    """A retrieval task: leave-one-out over `queries`, or from `queries` to `gallery`."""

    queries: Samples
    gallery: Samples | None = None

    def check(self, cluster: bool) -> None:
        """Whether there is anything to measure, known before any image is embedded.

        Args:
            cluster: NMI and AMI are wanted too.

        Raises:
            ValueError: no query has a positive, or there are not the classes that a clustering needs.
        """
        sizes = np.bincount(self.queries.labels, minlength=1)
        found = sizes.max() > 1 if self.gallery is None else np.isin(self.queries.labels, self.gallery.labels).any()
        if not found:
            raise ValueError(f"none of the {len(self.queries)} queries has another image of its class to find")
        classes = np.count_nonzero(sizes)
        if cluster and not 2 <= classes < len(self.queries):
            raise ValueError(
                f"a clustering needs at least 2 classes and fewer classes than queries, there are {classes} and "
                f"{len(self.queries)}: set evaluation.clustering to false"
            )


def validation_task(config: Config, store: Store) -> Task | None:
    """The held-out fold of the training classes; under the paper protocol the test classes; None without either."""
    if config.protocol == "paper":
        return test_task(store)
    fold = config.data.validation_fold
    return None if fold is None else Task(store.select(["train"], fold=fold))


def test_task(store: Store) -> Task | None:
    """Query to gallery where the store has both, else leave-one-out over the test classes; None if it has no test images."""
    if (store.split == "query").any():
        both = store.select(["query", "gallery"])  # one numbering of classes for both sides
        is_query = np.isin(both.ids, store.sample_id[store.split == "query"])
        queries, gallery = (Samples(both.ids[m], both.labels[m], both.class_names) for m in (is_query, ~is_query))
        return Task(queries, gallery)
    samples = store.select(["test"])
    return Task(samples) if len(samples) else None


@dataclass(frozen=True)
class Result:
    """Metrics in percent, and for each query what it retrieved."""

    metrics: dict[str, float]
    retrieval: Retrieval


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
        recall_at: every K of Recall@K.
        cluster: NMI and AMI as well (k-means over the queries' embeddings).

    Raises:
        RunError: embeddings are zero or not finite, or no query has a positive.
    """
    images = task.queries.ids if task.gallery is None else np.concatenate([task.queries.ids, task.gallery.ids])
    embeddings = embedder(images, trunk, method)
    if method is not None:
        with torch.no_grad():
            embeddings = method.refine(embeddings)
    queries = embeddings[: len(task.queries)].cpu()
    gallery = None if task.gallery is None else embeddings[len(task.queries) :].cpu()
    labels = torch.from_numpy(task.queries.labels)
    gallery_labels = None if task.gallery is None else torch.from_numpy(task.gallery.labels)
    ranks = embedder.ranks
    try:
        part = retrieve(
            queries, labels, gallery=gallery, gallery_labels=gallery_labels, queries=ranks.slice(len(labels))
        )
        whole = Retrieval.concatenate(ranks.collect(part))
        metrics: dict[str, Any] = whole.summary(recall_at)
        if cluster:
            metrics |= ranks.broadcast(clustering(queries, labels) if ranks.rank == 0 else None)
    except ValueError as error:  # embeddings that are not finite, most often
        raise RunError(f"the embeddings cannot be measured: {error}") from error
    return Result(metrics, whole)
