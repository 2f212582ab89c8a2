"""`raydml.evaluate`: exact retrieval metrics of embeddings that are given as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.array_files import label_numbers
from pipeline.evaluation.retrieval import Distance, Retrieval, retrieve

Array = Tensor | np.ndarray | Sequence[Any]


@dataclass(frozen=True)
class Evaluation:
    """Figures of embeddings.

    Attributes:
        metrics: In percent: "recall@K" for each K, "map@r", "r_precision", and "nmi", "ami" if asked for; "queries" and
            "queries_without_positive" are counts.
        retrieval: What each query found: rows of its neighbours, nearest first, its average precision, and more.
        labels: Number of each query's class.
        class_names: The classes' names by number.
        gallery_labels: Number of each gallery row's class; None without a gallery.
    """

    metrics: dict[str, Any]
    retrieval: Retrieval
    labels: np.ndarray
    class_names: list[str]
    gallery_labels: np.ndarray | None = None


def evaluate(
    embeddings: Array,
    labels: Array,
    *,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    distance: Distance = "cosine",
    clustering: bool = False,
) -> Evaluation:
    """Measures retrieval exactly: float64, ties by row. Without a gallery each row is searched among all others.

    Args:
        embeddings: [N, D] floats; float64 is compared as float64.
        labels: [N] whole numbers or text.
        gallery, gallery_labels: Rows to search instead, and their classes.
        recall_at: Every K of Recall@K.
        distance: "cosine" or "euclidean".
        clustering: Measure NMI and AMI as well (k-means).

    Raises:
        UserError: Arrays of other types or shapes, values that are not finite, nothing to find.
    """
    if (gallery is None) != (gallery_labels is None):
        raise UserError("gallery and gallery_labels go together: give both, or neither")
    if not recall_at or min(recall_at) < 1:
        raise UserError(f"recall_at is {list(recall_at)}, expected numbers of at least 1")
    sides = [("embeddings", embeddings, labels)]
    if gallery is not None and gallery_labels is not None:
        sides.append(("gallery", gallery, gallery_labels))
    rows = [_rows(name, values) for name, values, _ in sides]
    numbers, names = label_numbers(
        [_labels(name, given, len(x)) for (name, _, given), x in zip(sides, rows, strict=True)]
    )
    if len(rows) > 1 and rows[0].shape[1] != rows[1].shape[1]:
        raise UserError(f"queries have {rows[0].shape[1]} dimensions, the gallery has {rows[1].shape[1]}")
    try:
        retrieval = retrieve(
            rows[0],
            numbers[0],
            gallery=rows[1] if len(rows) > 1 else None,
            gallery_labels=numbers[1] if len(rows) > 1 else None,
            distance=distance,
        )
        metrics: dict[str, Any] = retrieval.summary(recall_at)
        if clustering:
            from pipeline.evaluation.clustering import clustering as cluster

            metrics |= cluster(rows[0], numbers[0])
    except ValueError as error:
        raise UserError(str(error)) from error
    return Evaluation(metrics, retrieval, numbers[0].numpy(), names, numbers[1].numpy() if len(numbers) > 1 else None)


def _rows(name: str, values: Array) -> Tensor:
    rows = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    if rows.ndim != 2 or not rows.is_floating_point() or not rows.numel():
        raise UserError(
            f"{name}: got {str(rows.dtype).removeprefix('torch.')} {list(rows.shape)}, expected floats [N, D]"
        )
    return rows


def _labels(name: str, values: Array, num: int) -> np.ndarray:
    labels = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if labels.ndim != 1 or labels.dtype.kind not in "iubUS" or len(labels) != num:
        raise UserError(
            f"labels of the {name}: got {labels.dtype} {list(labels.shape)}, expected {num} whole numbers or texts, one a row"
        )
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


__all__ = ["Evaluation", "evaluate"]
