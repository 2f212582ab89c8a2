"""Approximate indexes: tuned on the rows they were built from, and never worse than they say."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.mining import faiss_index
from pipeline.mining.faiss_index import ENGINES, auto_engine, build
from pipeline.neighbours.exact_search import Queries, Rows, rerank, search
from tests.pipeline.mining.oracle import clustered

APPROXIMATE = [e for e in ENGINES if e != "exact"]


def make_rows(rows: int, dim: int = 32, classes: int = 200) -> Rows:
    ids, values, labels = clustered(rows, dim, classes)
    return Rows(values, ids, labels, 1.001)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return make_rows(6000)


@pytest.mark.parametrize("engine", APPROXIMATE)
def test_an_index_reaches_its_recall_and_says_so(rows: Rows, engine: str) -> None:
    index, report = build(rows, engine, 10, 0.9, seed=3)  # type: ignore[arg-type]
    assert index is not None and report.engine == engine and index.report is report
    assert report.recall >= 0.9 and report.seconds > 0 and report.bytes > 6000 * 8 and report.note == ""
    queries = Queries(rows.values[::7], rows.ids[::7])
    found, truth = rerank(queries, rows, index.candidates(queries.values, 10), 10, "all"), search(queries, rows, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids, truth.ids, strict=True)])
    assert recall >= 0.88, "on other rows than those it was measured on"
    agree = found.ids == truth.ids
    assert agree.mean() > 0.5
    np.testing.assert_array_equal(found.distances[agree], truth.distances[agree])  # exact, though the index is not


@pytest.mark.parametrize("engine", ["ivf", "ivf_pq", "hnsw"])
def test_the_same_rows_give_the_same_index(rows: Rows, engine: str) -> None:
    first, second = (build(rows, engine, 5, 0.8, seed=1)[0] for _ in range(2))  # type: ignore[arg-type]
    assert first is not None and second is not None
    np.testing.assert_array_equal(first.candidates(rows.values[:200], 5), second.candidates(rows.values[:200], 5))


def test_an_index_below_its_target_is_not_used(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "_pq_code_bytes", lambda dim: 1)  # one byte a row
    monkeypatch.setattr(faiss_index, "OVERFETCH", 1)
    index, report = build(rows, "ivf_pq", 10, 0.99)
    assert index is None and report.engine == "exact" and report.recall == 1
    assert "ivf_pq reached recall@10 0." in report.note and report.note.endswith("rows are searched exactly")


def test_a_search_is_widened_no_further_than_needed(rows: Rows) -> None:
    loose, tight = (build(rows, "ivf", 10, target)[1].parameters for target in (0.3, 0.99))
    assert loose["nprobe"] < tight["nprobe"]


def test_few_rows_and_auto() -> None:
    index, report = build(make_rows(500), "hnsw", 10, 0.9)
    assert index is None and report.note == "500 rows are searched exactly"
    assert build(make_rows(1500), "auto", 10, 0.9)[1].engine == "exact"
    assert (auto_engine(8000), auto_engine(60_000), auto_engine(1_000_000)) == ("exact", "ivf_fp16", "ivf_fp16")


def test_auto_takes_no_index_that_costs_more_than_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours that are spread over many lists: looking at all of those is slower than a matrix product."""
    monkeypatch.setattr(faiss_index, "_AUTO_EXACT_MAX_ROWS", 1000)
    index, report = build(make_rows(3000), "auto", 10, 0.6)
    assert index is not None and report.parameters["nprobe"] <= report.parameters["lists"] / 8
    noise = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
    index, report = build(Rows(noise, np.arange(3000), np.arange(3000) // 5, 20.0), "auto", 10, 0.6)
    assert index is None and report.engine == "exact" and "ivf_fp16 reached recall@10 0." in report.note
