"""Exact cosines: the same bits however they are summed, and right to the last digits."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pipeline.neighbours import exact_cosine
from pipeline.neighbours.exact_cosine import ExactCosine, NormedRows


def random_rows(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 100, 512])
def test_split_sums_are_exact(dim):
    rows = random_rows(6, dim)
    high, low = NormedRows.of(rows, "rows").high_low(slice(None))
    for i in range(6):
        for j in range(6):
            parts = [(high[i], high[j]), (np.append(high[i], low[i]), np.append(low[j], high[j]))]
            sums = [sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)) for a, b in parts]
            assert sums == [Fraction(float(a @ b)) for a, b in parts]
            cosine = math.fsum(rows[i] * rows[j]) / math.sqrt(math.fsum(rows[i] ** 2) * math.fsum(rows[j] ** 2))
            assert abs(float(sum(sums)) - cosine) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_and_blocks_give_the_same_bits(monkeypatch, dtype):
    queries, gallery = (
        NormedRows.of(random_rows(9, 33).to(dtype), "q"),
        NormedRows.of(random_rows(50, 33, 1).to(dtype), "g"),
    )
    cosine = ExactCosine(queries, gallery)
    whole = cosine.block(np.arange(9))
    query, row = np.divmod(np.arange(450), 50)
    for chunk in (1, 33 * 7, 2**17):
        monkeypatch.setattr(exact_cosine, "_CHUNK_ELEMENTS", chunk)
        np.testing.assert_array_equal(cosine.pairs(query, row), whole.ravel())
        np.testing.assert_array_equal(cosine.block(np.array([7, 2])), whole[[7, 2]])
    np.testing.assert_array_equal(ExactCosine(queries[3:5], gallery).block(np.arange(2)), whole[3:5])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"got gallery torch.int64 \(2, 3\)"):
        NormedRows.of(torch.ones(2, 3, dtype=torch.int64), "gallery")
    with pytest.raises(ValueError, match="1 of 2 gallery rows are zero or not finite, the first is row 1"):
        NormedRows.of(torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), "gallery")
    with pytest.raises(ValueError, match=r"queries \(2, 3\) and gallery \(2, 4\): expected the same dimension"):
        ExactCosine(NormedRows.of(torch.ones(2, 3), "queries"), NormedRows.of(torch.ones(2, 4), "gallery"))


def test_unit_rows_are_copied_only_where_it_is_asked_or_needed():
    unit = torch.nn.functional.normalize(random_rows(50, 64).float())
    vectors, everything = NormedRows.of(unit, "rows"), np.arange(50)
    assert vectors.unit32(everything, copy=False) is vectors.rows
    for copied in (vectors.unit32(), vectors.unit32(everything[::-1], copy=False)):
        assert not np.shares_memory(copied, vectors.rows)
    longer = NormedRows.of(unit * 1.00001, "rows")
    lengths = np.linalg.norm(longer.unit32(everything, copy=False).astype(np.float64), axis=1)
    assert np.abs(lengths - 1).max() < 2e-7
    assert NormedRows.of(unit.double(), "rows").unit32(copy=False).dtype == np.float32
