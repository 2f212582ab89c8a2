"""Retrieval tasks: their queries, galleries and protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.config import Config, RerankingConfig
from pipeline.data.entries import JUNK
from pipeline.data.store import Samples, Store
from pipeline.metric_names import metric_keys


def retrieval_units(samples: Samples) -> Samples:
    """The units of retrieval: tracklets (each represented by its first frame, ascending), or the images themselves."""
    if samples.tracks is None:
        return samples
    tracks, first = np.unique(samples.tracks, return_index=True)
    cameras = None if samples.cameras is None else samples.cameras[first]
    return Samples(samples.ids[first], samples.labels[first], samples.class_names, tracks, cameras)


@dataclass(frozen=True)
class RetrievalTask:
    """A retrieval task.

    Attributes:
        queries: Images, or frames of tracklets.
        gallery: Images among which they are searched; None: the other queries (leave-one-out).
        reid: Re-identification: CMC and mAP are measured; images of the query's class by the
            query's camera are junk, and so are rows of the label JUNK. The gallery may contain the
            queries.
        distractors: With reid, whether rows of the label DISTRACTOR count as wrong or as junk.
        reranking: With reid, settings of k-reciprocal re-ranking (of cosines); None: ranks by the distance.
        distance: What nearest means.
    """

    queries: Samples
    gallery: Samples | None = None
    reid: bool = False
    distractors: Literal["wrong", "junk"] = "wrong"
    reranking: RerankingConfig | None = None
    distance: Literal["cosine", "euclidean"] = "cosine"

    def check(self, cluster: bool) -> None:
        """Checks that the task can be measured, before any image is embedded.

        Args:
            cluster: NMI and AMI will be computed as well.

        Raises:
            ValueError: No query has a positive, or there are not the classes that a clustering
                needs.
        """
        queries, gallery = (
            retrieval_units(self.queries),
            None if self.gallery is None else retrieval_units(self.gallery),
        )
        sizes = np.bincount(queries.labels, minlength=1)
        if self.reid:
            assert gallery is not None and queries.cameras is not None and gallery.cameras is not None
            views = {
                (label, camera) for label, camera in zip(gallery.labels, gallery.cameras, strict=True) if label >= 0
            }
            num_cameras = np.bincount([label for label, _ in views], minlength=len(sizes))
            in_own_view = [
                (label, camera) in views for label, camera in zip(queries.labels, queries.cameras, strict=True)
            ]
            has_positive = bool((num_cameras[queries.labels] > in_own_view).any())
        elif gallery is None:
            has_positive = bool(sizes.max() > 1)
        else:
            has_positive = bool(np.isin(queries.labels, gallery.labels).any())
        if not has_positive:
            positive = "person seen by another camera" if self.reid else "image of its class"
            raise ValueError(f"none of the {len(queries)} queries has another {positive} to find")
        classes = np.count_nonzero(sizes)
        searched = queries.labels if gallery is None else gallery.labels[gallery.labels != JUNK]
        if classes == 1 and (searched == queries.labels[0]).all():
            raise ValueError(
                "all images are of one class, so that every answer is right and nothing can be "
                "chosen: prepare the dataset with more classes or with fewer folds (--folds), or for validation set "
                "data.validation_fold to null and evaluation.checkpoint to last"
            )
        if cluster and not 2 <= classes < len(queries):
            raise ValueError(
                f"a clustering needs at least 2 classes and fewer classes than queries, there are {classes} and "
                f"{len(queries)}: set evaluation.clustering to false"
            )

    def metrics(self, recall_at: Sequence[int]) -> list[str]:
        """Keys of the metrics of this task."""
        return metric_keys("reid" if self.reid else "retrieval", recall_at)


def validation_task(config: Config, store: Store) -> RetrievalTask | None:
    """The held-out fold of the training classes; under the paper protocol the test classes; None without either."""
    if config.protocol == "paper":
        return test_task(config, store)
    fold = config.data.validation_fold
    if fold is None:
        return None
    samples = store.select(["train"], fold=fold)
    return _reid(config, samples, samples) if store.protocol == "reid" else _retrieval(config, samples)


def test_task(config: Config, store: Store) -> RetrievalTask | None:
    """The task of the store's protocol (query to gallery, re-identification, leave-one-out); None without test images."""
    if store.protocol == "leave_one_out":
        samples = store.select(["test"])
        return _retrieval(config, samples) if len(samples) else None
    both = store.select(["query", "gallery"])  # one numbering of classes for both sides
    if not len(both):
        return None
    is_query = np.isin(both.ids, store.sample_id[store.split == "query"])
    queries = both.subset(is_query)
    if store.protocol == "reid":
        return _reid(config, queries, both)
    return _retrieval(config, queries, both.subset(~is_query & (both.labels != JUNK)))


def all_task(config: Config, store: Store, splits: Sequence[str]) -> RetrievalTask | None:
    """All images of some splits that have a class, each searched among the others; None without such images.

    In a re-identification store the others include the images of no class.
    """
    samples = store.select(splits)
    queries = samples.subset(samples.labels >= 0)
    if not len(queries):
        return None
    return _reid(config, queries, samples) if store.protocol == "reid" else _retrieval(config, queries)


def _retrieval(config: Config, queries: Samples, gallery: Samples | None = None) -> RetrievalTask:
    return RetrievalTask(queries, gallery, distance=config.evaluation.distance)


def _reid(config: Config, queries: Samples, gallery: Samples) -> RetrievalTask:
    e = config.evaluation
    return RetrievalTask(queries, gallery, True, e.distractors, e.reranking, e.distance)
