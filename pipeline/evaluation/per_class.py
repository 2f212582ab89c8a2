"""Figures of every class: which classes fail."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.reid import ReidRetrieval
from pipeline.evaluation.retrieval import Retrieval


def per_class(
    retrieval: Retrieval | ReidRetrieval, labels: np.ndarray, names: Sequence[str], recall_at: Sequence[int]
) -> list[dict[str, Any]]:
    """A row a class of the queries, worst first: by average precision, then by the first of Recall@K, then by name.

    Args:
        retrieval: The results of all queries.
        labels: Number of each query's class.
        names: Names of the classes by number.
        recall_at: Every K of Recall@K, or of CMC@K.

    Returns:
        `class`, `queries` (those measured), `queries_without_positive`, and the class's figures in percent; these are empty
        where no query of the class has a positive, and such classes are last.
    """
    counted = retrieval.num_relevant > 0
    rows: list[dict[str, Any]] = []
    for label in np.unique(labels):
        own = labels == label
        row: dict[str, Any] = {
            "class": names[int(label)],
            "queries": int((own & counted).sum()),
            "queries_without_positive": int((own & ~counted).sum()),
        }
        places = np.flatnonzero(own)
        part = type(retrieval)(*(getattr(retrieval, name)[places] for name in retrieval.__dataclass_fields__))
        figures = part.summary(recall_at) if row["queries"] else {}
        rows.append(row | {k: v for k, v in figures.items() if k not in row})
    average, first = ("map@r", "recall@") if isinstance(retrieval, Retrieval) else ("map", "cmc@")
    first += str(recall_at[0])
    return sorted(rows, key=lambda r: (average not in r, r.get(average, 0.0), r.get(first, 0.0), r["class"]))


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """The rows as a CSV file with a header; figures with four decimals."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue().encode()
