"""Retrieval tasks: which images are searched, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.config import Config, RerankingConfig
from pipeline.data.store import Samples, Store


def retrieval_units(samples: Samples) -> Samples:
    """What is searched and found: tracklets (each by its first frame, ascending), or the images themselves."""
    if samples.tracks is None:
        return samples
    tracks, first = np.unique(samples.tracks, return_index=True)
    cameras = None if samples.cameras is None else samples.cameras[first]
    return Samples(samples.ids[first], samples.labels[first], samples.class_names, tracks, cameras)


@dataclass(frozen=True)
class RetrievalTask:
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
        queries, gallery = (
            retrieval_units(self.queries),
            None if self.gallery is None else retrieval_units(self.gallery),
        )
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


def validation_task(config: Config, store: Store) -> RetrievalTask | None:
    """The held-out fold of the training classes; under the paper protocol the test classes; None without either."""
    if config.protocol == "paper":
        return test_task(config, store)
    fold = config.data.validation_fold
    if fold is None:
        return None
    samples = store.select(["train"], fold=fold)
    return _reid(config, samples, samples) if store.protocol == "reid" else RetrievalTask(samples)


def test_task(config: Config, store: Store) -> RetrievalTask | None:
    """As the store's protocol says: query to gallery, re-identification, or leave-one-out; None if it has no test images."""
    if store.protocol == "leave_one_out":
        samples = store.select(["test"])
        return RetrievalTask(samples) if len(samples) else None
    both = store.select(["query", "gallery"])  # one numbering of classes for both sides
    if not len(both):
        return None
    is_query = np.isin(both.ids, store.sample_id[store.split == "query"])
    queries, gallery = (both.subset(m) for m in (is_query, ~is_query))
    return _reid(config, queries, both) if store.protocol == "reid" else RetrievalTask(queries, gallery)


def _reid(config: Config, queries: Samples, gallery: Samples) -> RetrievalTask:
    e = config.evaluation
    return RetrievalTask(queries, gallery, True, e.distractors, e.reranking)
