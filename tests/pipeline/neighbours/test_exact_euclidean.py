"""Euclidean distances against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from pipeline.evaluation.reid import ReidSet, match
from pipeline.evaluation.retrieval import Retrieval, retrieve
from pipeline.neighbours.exact_euclidean import ExactEuclidean


def vectors(num: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, dim))).to(dtype)


def exact(a: torch.Tensor, b: torch.Tensor) -> Fraction:
    return sum(((Fraction(float(x)) - Fraction(float(y))) ** 2 for x, y in zip(a, b, strict=True)), Fraction(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances(dtype: torch.dtype) -> None:
    queries, gallery = vectors(5, 11, 0, dtype), vectors(7, 11, 1, dtype)
    found = ExactEuclidean.of(queries, gallery).block(np.array([3, 0]))
    for i, q in enumerate((3, 0)):
        for g in range(7):
            wanted = exact(queries[q], gallery[g])
            assert abs(Fraction(-found[i, g]) - wanted) <= wanted * Fraction(16, 2**53)


@pytest.mark.parametrize("with_gallery", [False, True])
def test_retrieval_against_loops(with_gallery: bool) -> None:
    """Lengths differ, one row is zero, some rows are equal: ties go to the smaller row."""
    random = np.random.default_rng(3)
    x = (vectors(40, 4, 2) * torch.from_numpy(random.uniform(0.1, 5, (40, 1))).float()).round(decimals=1)
    x[7] = 0
    x[21] = x[20]
    y = torch.from_numpy(random.integers(0, 5, 40))
    g, h = (
        (vectors(30, 4, 5).round(decimals=1), torch.from_numpy(random.integers(0, 5, 30))) if with_gallery else (x, y)
    )
    options = {"gallery": g, "gallery_labels": h} if with_gallery else {}
    found = retrieve(x, y, distance="euclidean", keep=4, **options)
    for q in range(40):
        others = [i for i in range(len(g)) if with_gallery or i != q]
        order = sorted(others, key=lambda i: (exact(x[q], g[i]), i))
        hits = [bool(h[i] == y[q]) for i in order]
        num = sum(hits)
        assert found.neighbours[q].tolist() == order[:4] and found.num_relevant[q] == num
        assert found.first_hit[q] == (hits.index(True) if num else -1)
        precision = [sum(hits[: i + 1]) / (i + 1) for i in range(num) if hits[i]]
        assert found.average_precision[q] == pytest.approx(sum(precision) / num if num else 0)


def test_parts_and_blocks_change_no_bit() -> None:
    x, y = vectors(50, 6, 0), torch.arange(50) % 7
    whole = retrieve(x, y, distance="euclidean")
    parts = [retrieve(x, y, distance="euclidean", queries=slice(a, b), memory_bytes=1) for a, b in ((0, 17), (17, 50))]
    for name, values in vars(Retrieval.concatenate(parts)).items():
        assert np.array_equal(values, getattr(whole, name)), name


def test_rows_of_length_one_rank_alike() -> None:
    x, y = torch.nn.functional.normalize(vectors(80, 8, 4)), torch.arange(80) % 9
    assert retrieve(x, y, distance="euclidean").summary() == retrieve(x, y).summary()


def test_length_matters() -> None:
    """Classes on one ray: the cosine cannot tell them apart."""
    y = torch.arange(60) % 6
    x = vectors(60, 2, 0) * 0.01 + (1 + y)[:, None] * torch.tensor([[1.0, 0.5]])
    assert retrieve(x, y, distance="euclidean").summary()["map@r"] == 100.0
    assert retrieve(x, y).summary()["map@r"] < 60


def test_re_identification_against_loops() -> None:
    random = np.random.default_rng(0)
    q, g = vectors(9, 3, 1) * 2, vectors(25, 3, 2)
    labels, cameras = (torch.from_numpy(random.integers(0, 4, 34)) for _ in range(2))
    sets = ReidSet(q, labels[:9], cameras[:9]), ReidSet(g, labels[9:], cameras[9:])
    found = match(*sets, distance="euclidean", keep=3)
    for i in range(9):
        junk = {j for j in range(25) if labels[9 + j] == labels[i] and cameras[9 + j] == cameras[i]}
        order = sorted(set(range(25)) - junk, key=lambda j: (exact(q[i], g[j]), j))
        assert found.neighbours[i].tolist() == order[:3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_refused(value: float) -> None:
    x = vectors(5, 3, 0)
    x[3, 1] = value
    with pytest.raises(ValueError, match="1 of 5 query rows are not finite, the first is row 3"):
        retrieve(x, torch.zeros(5, dtype=torch.int64), distance="euclidean")
