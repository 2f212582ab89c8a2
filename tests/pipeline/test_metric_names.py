"""The table of metrics names every metric that an evaluation measures, and no other."""

from __future__ import annotations

import torch

from pipeline.evaluation.clustering import clustering
from pipeline.evaluation.reid import ReidSet, match
from pipeline.evaluation.retrieval import retrieve
from pipeline.metric_names import COUNTS, METRICS, metric_keys, metric_title


def test_every_measured_metric_is_in_the_table() -> None:
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) // 3
    images = ReidSet(embeddings, labels, torch.arange(12) % 3)
    measured = {
        "retrieval": retrieve(embeddings, labels).summary((1, 2)),
        "reid": match(images, images).summary((1, 2)),
    }
    for task, metrics in measured.items():
        assert set(metrics) == {*metric_keys(task, (1, 2)), *COUNTS}  # type: ignore[arg-type]
    assert set(clustering(embeddings, labels)) == set(metric_keys("clustering", (1, 2)))
    assert {metric.task for metric in METRICS} == {*measured, "clustering", "every"}


def test_titles() -> None:
    titles = {key: metric_title(key) for key in ("recall@10", "cmc@1", "map@r", "map", "queries_without_positive")}
    assert titles == {
        "recall@10": "Recall@10",
        "cmc@1": "CMC@1",
        "map@r": "MAP@R",
        "map": "mAP",
        "queries_without_positive": "queries without positive",
    }
    assert metric_title("images_per_second") == "images per second"
