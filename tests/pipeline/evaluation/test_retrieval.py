"""Retrieval metrics against double loops in float64, and their exactness under every way of cutting up the work."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
import tracemalloc
from dataclasses import fields

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from pipeline.evaluation import retrieval
from pipeline.evaluation.clustering import _adjusted_mutual_info, clustering
from pipeline.evaluation.retrieval import Retrieval, retrieve
from pipeline.neighbours import candidates, exact_cosine
from pipeline.neighbours.exact_cosine import ExactCosine, NormedRows


def take_way(patch: pytest.MonkeyPatch, way: str) -> None:
    """Sends every query the same way: as it comes; by float32 and pairs; by exact blocks; proposals by torch on a device."""
    if way == "pairs":
        patch.setattr(retrieval, "PAIR_COST", 1)
        patch.setattr(candidates, "capacity", lambda depth: 2 * depth + 10_000)
    elif way == "exact":
        patch.setattr(retrieval, "PAIR_COST", 10**9)
    elif way == "device":
        patch.setattr(retrieval, "on_accelerator", lambda device: True)


WAYS = ["as it comes", "pairs", "exact", "device"]


def oracle(embeddings, labels, gallery=None, gallery_labels=None, keep=10) -> Retrieval:
    """Definitions, one query and one gallery row at a time."""
    rows = [row.tolist() for row in embeddings.double()]
    targets = rows if gallery is None else [row.tolist() for row in gallery.double()]
    norms, target_norms = ([math.sqrt(math.fsum(x * x for x in row)) for row in side] for side in (rows, targets))
    classes = (labels if gallery is None else gallery_labels).tolist()
    result = []
    for i, row in enumerate(rows):
        order = []
        for j, target in enumerate(targets):
            if gallery is not None or i != j:
                cosine = math.fsum(x * y for x, y in zip(row, target, strict=True)) / (norms[i] * target_norms[j])
                order.append((-cosine, j))
        ids = [j for _, j in sorted(order)]
        hits = [classes[j] == int(labels[i]) for j in ids]
        num_relevant = sum(hits)
        found, average_precision = 0, 0.0
        for rank in range(num_relevant):
            found += hits[rank]
            average_precision += hits[rank] * found / (rank + 1)
        scale = max(num_relevant, 1)
        first = hits.index(True) if num_relevant else -1
        result.append((first, average_precision / scale, found / scale, num_relevant, (ids + [-1] * keep)[:keep]))
    return Retrieval(*(np.array(column) for column in zip(*result, strict=True)))


def assert_equal(got: Retrieval, expected: Retrieval) -> None:
    for field in fields(Retrieval):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(expected, field.name), err_msg=field.name)


def clustered(num: int, num_classes: int, dim: int, noise: float = 0.7, seed: int = 0) -> tuple:
    """Rows around class centres, some of them exact or scaled duplicates of others, and some classes of one row."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    rows = torch.randn(num_classes, dim, generator=generator)[labels]
    rows = rows + noise * torch.randn(num, dim, generator=generator)
    copies = torch.randint(num, (2, num // 10), generator=generator)
    rows[copies[0]] = rows[copies[1]]
    copies = torch.randint(num, (2, num // 10), generator=generator)
    rows[copies[0]] = rows[copies[1]] * 4.0
    labels[: num // 20] = num_classes + 7 * torch.arange(num // 20)
    return rows, labels


@pytest.fixture(params=WAYS)
def any_way(request, monkeypatch):
    take_way(monkeypatch, request.param)


@functools.cache
def clustered_case(num: int, num_classes: int, dim: int, dtype: torch.dtype) -> tuple:
    rows, labels = clustered(num, num_classes, dim)
    return rows.to(dtype), labels, oracle(rows.to(dtype), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num", "num_classes", "dim"), [(40, 8, 2), (70, 3, 5), (350, 120, 6)])
def test_equals_the_loops(any_way, num, num_classes, dim, dtype):
    rows, labels, expected = clustered_case(num, num_classes, dim, dtype)
    result = retrieve(rows, labels)
    assert_equal(result, expected)
    assert (result.num_relevant == 0).any() and (result.first_hit > 10).any()


@settings(max_examples=60, deadline=None)
@given(
    picks=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0.25, 1.0, 2.0]), st.integers(0, 3)), min_size=2, max_size=14
    ),
    keep=st.integers(1, 16),
    way=st.sampled_from(WAYS),
)
def test_equals_the_loops_with_many_ties(picks, keep, way):
    pool = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    rows = torch.stack([pool[which] * scale for which, scale, _ in picks])
    labels = torch.tensor([label for _, _, label in picks])
    with pytest.MonkeyPatch.context() as patch:
        take_way(patch, way)
        assert_equal(retrieve(rows, labels, keep=keep), oracle(rows, labels, keep=keep))


def test_query_to_gallery(any_way):
    gallery, gallery_labels = clustered(300, 60, 4)
    rows, labels = clustered(50, 70, 4, seed=1)
    rows[:5] = gallery[10:15] * 2.0  # copies of gallery rows are found, not left out
    result = retrieve(rows, labels, gallery=gallery, gallery_labels=gallery_labels)
    assert_equal(result, oracle(rows, labels, gallery, gallery_labels))
    assert (
        result.neighbours[:5, 0].tolist()
        == oracle(rows[:5], labels[:5], gallery, gallery_labels).neighbours[:, 0].tolist()
    )
    assert (result.num_relevant == 0).any()


def test_short_gallery_is_padded():
    gallery, gallery_labels = torch.eye(3), torch.tensor([4, 5, 4])
    result = retrieve(
        torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([5]), gallery=gallery, gallery_labels=gallery_labels, keep=5
    )
    assert result.neighbours.tolist() == [[0, 2, 1, -1, -1]]
    assert result.first_hit.tolist() == [2]


@functools.cache
def deep_case() -> tuple:
    rows, _ = clustered(400, 90, 6)
    labels = torch.arange(400) - 1000
    labels[100:300] = 2**40  # any integers will do
    labels[300:304] = 7
    return rows, labels, oracle(rows, labels)


def test_one_deep_class_among_singletons(any_way):
    rows, labels, expected = deep_case()
    assert_equal(retrieve(rows, labels), expected)
    assert_equal(retrieve(rows, labels, memory_bytes=10**5), expected)


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-7, 0.0])
def test_no_bit_depends_on_how_the_work_is_cut(monkeypatch, noise):
    rows, labels = clustered(360, 90, 24)
    rows = 1 + noise * rows if noise < 1 else rows
    whole = retrieve(rows, labels, keep=5)
    for memory_bytes in (1, 10**5, 10**9):
        assert_equal(retrieve(rows, labels, keep=5, memory_bytes=memory_bytes), whole)
    for cuts in ([0, 120, 240, 360], [0, 1, 1, 359, 360]):
        ranges = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        parts = [retrieve(rows, labels, keep=5, queries=part) for part in ranges]
        assert_equal(Retrieval.concatenate(parts), whole)
        assert Retrieval.concatenate(parts).summary() == whole.summary()
    monkeypatch.setattr(exact_cosine, "_CHUNK_ELEMENTS", 1000)
    assert_equal(retrieve(rows, labels, keep=5), whole)
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            take_way(patch, way)
            assert_equal(retrieve(rows, labels, keep=5), whole)
            assert_equal(retrieve(rows, labels, keep=5, memory_bytes=10**5), whole)


def test_no_bit_depends_on_torch_settings():
    rows, labels = clustered(700, 150, 64)
    whole = retrieve(rows, labels)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            assert_equal(retrieve(rows, labels), whole)
        torch.set_float32_matmul_precision("medium")  # allows bfloat16 products, with errors of 1e-3
        for way in ("as it comes", "device"):
            with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
                take_way(patch, way)
                assert_equal(retrieve(rows.requires_grad_(), labels), whole)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_float32_alone_decides_ordinary_data(monkeypatch):
    """The exact search is a fallback: it must not be what makes the other tests pass."""
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(1000, 32, generator=generator), torch.arange(1000) // 4
    undecided: list[int] = []
    monkeypatch.setattr(retrieval._Ranking, "_rank_exactly", lambda self, queries: undecided.extend(queries.tolist()))
    assert (retrieve(rows, labels).first_hit > 100).any() and not undecided


@functools.cache
def near_case(dtype: torch.dtype) -> tuple:
    """39 rows whose similarities to row 0 differ by 1e-9 (float64) or in the last bits (float32), among 361 others."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    rows[0] = torch.eye(8)[0]
    cosine = 0.9 + 1e-9 * torch.randperm(39, generator=generator)
    near = torch.zeros(39, 8, dtype=torch.float64)
    near[:, 0], near[:, 1] = cosine, (1 - cosine**2).sqrt()
    rows[1:391:10] = near
    rows, labels = rows.to(dtype), torch.arange(400) % 130
    return rows, labels, oracle(rows, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_decides_what_float32_cannot_see(any_way, dtype):
    rows, labels, expected = near_case(dtype)
    assert_equal(retrieve(rows, labels), expected)
    seen = rows.float() @ rows[0].float() / rows.float().norm(dim=1)
    assert len(seen[torch.from_numpy(expected.neighbours[0])].unique()) < 10


def test_collapsed_to_one_point(any_way):
    num = 200
    labels = torch.arange(num) // 3
    result = retrieve(torch.full((num, 7), 0.3), labels)
    for i in range(num):
        others = [j for j in range(num) if j != i]
        assert result.neighbours[i].tolist() == others[:10]
        positives = [rank for rank, j in enumerate(others) if labels[j] == labels[i]]
        assert result.first_hit[i] == (positives[0] if positives else -1)


def test_nearly_collapsed(any_way):
    """All similarities within 1e-6, of which float32 can order nothing."""
    noise = torch.randn(250, 6, generator=torch.Generator().manual_seed(0))
    rows, labels = 1 + 5e-4 * noise, torch.arange(250) % 80
    assert_equal(retrieve(rows, labels), oracle(rows, labels))


def test_memory_is_bounded():
    """4,000 equal rows: all pairs would take 128 MB."""
    rows, labels = torch.ones(4000, 4), torch.arange(4000) // 2
    tracemalloc.start()
    try:
        retrieve(rows, labels, queries=slice(0, 600), memory_bytes=4 * 2**20)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_candidates_do_not_pile_up(monkeypatch):
    """Where ranking takes longer than collecting: a group of queries is ranked before the next takes memory."""
    waiting, most, lock = 0, 0, threading.Lock()
    collect, rank = candidates.Search.collect, retrieval._Ranking._rank

    def counted(self, *arguments):
        nonlocal waiting, most
        for block in collect(self, *arguments):
            with lock:
                waiting += 1
                most = max(most, waiting)
            yield block

    def slow(self, *arguments):
        nonlocal waiting
        time.sleep(0.01)
        undecided = rank(self, *arguments)
        with lock:
            waiting -= 1
        return undecided

    monkeypatch.setattr(candidates.Search, "collect", counted)
    monkeypatch.setattr(retrieval._Ranking, "_rank", slow)
    rows, labels = clustered(600, 100, 8)
    retrieve(rows, labels, memory_bytes=1)
    assert most == 1


@pytest.mark.parametrize("dim", [100, 1000])
def test_margin_covers_the_float32_error(dim):
    """Equal terms after a large first one are all rounded the same way, when added one after the other."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(60, 1, generator=generator).expand(60, dim) + 0.1
    rows[:, 0] = 30 * torch.rand(60, generator=generator)
    vectors = NormedRows.of(rows, "rows")
    unit, exact = vectors.unit32(), ExactCosine(vectors, vectors).block(np.arange(60))
    worst = 0.0
    for i, j in itertools.combinations(range(60), 2):
        in_order = np.cumsum(unit[i] * unit[j], dtype=np.float32)[-1]
        worst = max(worst, abs(float(in_order) - exact[i, j]))
    assert vectors.margin / 6 < worst < vectors.margin / 2


def test_summary_is_in_percent_and_leaves_out_queries_without_positive():
    """Rows on a circle, at angles whose order can be read off."""
    angles = torch.tensor([0.0, 10.0, 40.0, 22.0, 100.0, 205.0]).deg2rad()
    labels = torch.tensor([7, 7, 7, 8, 8, 9])
    result = retrieve(torch.stack([angles.cos(), angles.sin()], dim=1), labels, keep=2)
    assert result.neighbours.tolist() == [[1, 3], [0, 3], [3, 1], [1, 2], [2, 3], [4, 0]]
    assert result.first_hit.tolist() == [0, 0, 1, 3, 1, -1]
    assert result.average_precision.tolist() == [0.5, 0.5, 0.25, 0, 0, 0]
    assert result.r_precision.tolist() == [0.5, 0.5, 0.5, 0, 0, 0]
    assert result.num_relevant.tolist() == [2, 2, 2, 1, 1, 0]
    assert result.summary(recall_at=(1, 2, 4)) == {
        "recall@1": 40.0,
        "recall@2": 80.0,
        "recall@4": 100.0,
        "map@r": 25.0,
        "r_precision": 30.0,
        "queries": 5,
        "queries_without_positive": 1,
    }
    with pytest.raises(ValueError, match="none of the 5 queries"):
        retrieve(torch.ones(5, 2), torch.arange(5)).summary()


def test_equals_pytorch_metric_learning():
    rows, labels = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 90
    rows = torch.nn.functional.normalize(rows + torch.randn(90, 16, generator=torch.Generator().manual_seed(1))[labels])
    labels[:9] = 1000 + torch.arange(9)
    names = {"precision_at_1": "recall@1", "mean_average_precision_at_r": "map@r", "r_precision": "r_precision"}
    theirs = AccuracyCalculator(include=tuple(names), k="max_bin_count").get_accuracy(rows, labels)
    ours = retrieve(rows, labels).summary()
    assert 10 < ours["map@r"] < ours["r_precision"] < ours["recall@1"] < 90
    for name, our_name in names.items():
        assert ours[our_name] == pytest.approx(100 * theirs[name], abs=1e-9)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-200])
def test_bad_rows_are_named(value):
    rows, labels = torch.ones(9, 3, dtype=torch.float64), torch.zeros(9, dtype=torch.int64)
    rows[4] = rows[6] = value
    for evaluate in (retrieve, clustering):
        with pytest.raises(ValueError, match="2 of 9 embeddings rows are zero or not finite, the first is row 4"):
            evaluate(rows, labels)
    with pytest.raises(ValueError, match="2 of 9 gallery rows"):
        retrieve(rows[:2], labels[:2], gallery=rows, gallery_labels=labels)


def test_bad_input_is_refused():
    rows, labels = torch.ones(6, 3), torch.arange(6) // 2
    for arguments, message in [
        ({"gallery": rows}, "only one of gallery"),
        ({"gallery_labels": labels}, "only one of gallery"),
        ({"keep": 0}, "keep=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            retrieve(rows, labels, **arguments)
    with pytest.raises(ValueError, match="a row to find besides the query"):
        retrieve(rows[:1], labels[:1])
    with pytest.raises(ValueError, match="float16"):
        retrieve(rows.half(), labels)
    with pytest.raises(ValueError, match="not empty"):
        retrieve(rows[:0], labels[:0])
    for arguments in ((rows, labels[:5]), (rows[0], labels), (rows.long(), labels)):
        with pytest.raises((ValueError, TypeCheckError)):
            retrieve(*arguments)
    with pytest.raises((ValueError, TypeCheckError)):
        retrieve(rows, labels, gallery=torch.ones(4, 2), gallery_labels=labels[:4])
    for undefined in (labels * 0, torch.arange(6)):
        with pytest.raises(ValueError, match="classes for 6 rows"):
            clustering(rows, undefined)


def test_well_separated_clusters_score_100(capfd):
    """From one of the random starts; others end where one centre serves two classes."""
    labels = torch.arange(120) % 4 * 5
    noise = torch.randn(120, 16, generator=torch.Generator().manual_seed(1))
    rows = 3 * (torch.eye(16)[labels // 5] + 0.01 * noise)
    scores = max((clustering(rows, labels, seed=seed) for seed in range(8)), key=lambda score: score["nmi"])
    assert scores == {"nmi": pytest.approx(100), "ami": pytest.approx(100)}
    assert capfd.readouterr().err == ""  # faiss warns when it has fewer than 39 rows a cluster


def test_clustering_uses_all_unit_rows_and_the_seed():
    rows, labels = clustered(1500, 3, 8, noise=1.5)  # faiss alone would train on 256 rows a cluster
    labels = labels.clamp(max=2)
    scores = [clustering(rows, labels, seed=seed, iterations=7) for seed in (3, 4, 3)]
    assert scores[0] == scores[2] != scores[1]
    unit = torch.nn.functional.normalize(rows.double()).float().numpy()
    kmeans = faiss.Kmeans(8, 3, niter=7, seed=3, max_points_per_centroid=1500)
    kmeans.train(unit)
    clusters = kmeans.assign(unit)[1]
    assert scores[0]["nmi"] == pytest.approx(100 * normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert scores[0]["ami"] == pytest.approx(100 * adjusted_mutual_info_score(labels, clusters), abs=1e-9)
    assert 5 < scores[0]["ami"] < 95


@pytest.mark.parametrize(
    ("num", "num_classes", "num_clusters"), [(20, 3, 4), (500, 150, 60), (2000, 2, 700), (900, 899, 5)]
)
def test_adjusted_mutual_info_equals_scikit_learn(num, num_classes, num_clusters):
    generator = np.random.default_rng(0)
    classes = generator.integers(num_classes, size=num)
    skewed = (num_clusters * generator.random(num) ** 3).astype(np.int64)  # cluster sizes from 1 to hundreds
    for clusters in (skewed, np.where(generator.random(num) < 0.5, classes, skewed + num_classes)):
        expected = adjusted_mutual_info_score(classes, clusters)
        assert _adjusted_mutual_info(classes, clusters) == pytest.approx(expected, abs=1e-10)
