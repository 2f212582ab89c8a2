"""The metrics of an evaluation: their keys in metrics.jsonl and summary.json, their titles, and the tasks that have them.

A key that ends in "@" is a family of metrics, one for each K: "recall@" stands for recall@1,
recall@2, ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

Task = Literal["retrieval", "reid", "clustering", "every"]


class Metric(NamedTuple):
    """One metric.

    Attributes:
        key: Name in files and in `evaluation.metric`.
        title: Name in reports and charts.
        task: The task that it measures; "every" for numbers of queries.
        is_count: A number of queries; other metrics are in percent.
    """

    key: str
    title: str
    task: Task
    is_count: bool = False


METRICS = (
    Metric("map@r", "MAP@R", "retrieval"),
    Metric("r_precision", "R-Precision", "retrieval"),
    Metric("recall@", "Recall@", "retrieval"),
    Metric("map", "mAP", "reid"),
    Metric("map_trapezoidal", "mAP, trapezoidal", "reid"),
    Metric("cmc@", "CMC@", "reid"),
    Metric("nmi", "NMI", "clustering"),
    Metric("ami", "AMI", "clustering"),
    Metric("queries", "queries", "every", is_count=True),
    Metric("queries_without_positive", "queries without positive", "every", is_count=True),
)
COUNTS = tuple(metric.key for metric in METRICS if metric.is_count)


def metric_keys(task: Task, recall_at: Sequence[int]) -> list[str]:
    """Keys of a task's metrics, with those of a family for every K of `recall_at`."""
    keys = [metric.key for metric in METRICS if metric.task == task]
    return [name for key in keys for name in ([f"{key}{k}" for k in recall_at] if key.endswith("@") else [key])]


def metric_key(name: str) -> str:
    """The key of a metric that is written in other letters, or as R@1 for recall@1."""
    return re.sub(r"^r@(?=\d)", "recall@", name.strip().lower())


def metric_title(key: str) -> str:
    """The title of a metric, or of another quantity that is logged: its name with blanks for underscores."""
    for metric in METRICS:
        if metric.key == key:
            return metric.title
        if metric.key.endswith("@") and key.startswith(metric.key):
            return metric.title + key.removeprefix(metric.key)
    return key.replace("_", " ")
