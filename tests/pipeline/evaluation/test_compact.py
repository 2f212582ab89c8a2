"""Fewer dimensions, int8 and bits against plain loops over the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation import compact
from pipeline.evaluation.compact import check_dims, first_dims, int8_rows, measure_compact, sign_rows
from pipeline.evaluation.retrieval import retrieve

KS = (1, 2, 5)


def data(num: int = 60, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 9
    labels[:4] = torch.tensor([100, 101, 7, 7])  # two without a positive, and one larger class
    centres = torch.randn(102, dim, generator=torch.Generator().manual_seed(5))
    x = centres[labels] + 1.2 * torch.randn(num, dim, generator=random)
    return torch.nn.functional.normalize(x), labels


def as_int8(row: list[float]) -> list[float]:
    largest = max(abs(v) for v in row)
    return [float(np.rint(np.float32(v) * (np.float32(127) / np.float32(largest)))) for v in row]


def as_signs(row: list[float]) -> list[float]:
    return [1.0 if v > 0 else -1.0 for v in row]


STORED = {"int8": as_int8, "binary": as_signs, "float32": lambda row: row}


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def by_hand(
    x: Tensor, y: Tensor, g: Tensor | None, gy: Tensor | None, first: str, then: str | None, times: int
) -> dict[str, Any]:
    """Candidates by what is stored, ranked again by the float query; one query and one row at a time."""
    queries, rows = x.tolist(), (x if g is None else g).tolist()
    classes = (y if gy is None else gy).tolist()
    found_at, precisions, r_precisions = [], [], []
    for i, query in enumerate(queries):
        others = [j for j in range(len(rows)) if g is not None or j != i]
        relevant = sum(classes[j] == int(y[i]) for j in others)
        if not relevant:
            continue
        stored = STORED[first](query)
        order = sorted(others, key=lambda j: (-round(cosine(stored, STORED[first](rows[j])), 12), j))
        order = order[: max(times * max(KS), times * relevant)]
        if then is not None:
            order = sorted(order, key=lambda j: (-cosine(query, STORED[then](rows[j])), j))
        hits = [classes[j] == int(y[i]) for j in order]
        found_at.append(hits.index(True) if True in hits else len(rows))
        precisions.append(
            sum(sum(hits[: k + 1]) / (k + 1) for k in range(min(relevant, len(hits))) if hits[k]) / relevant
        )
        r_precisions.append(sum(hits[:relevant]) / relevant)
    return {
        **{f"recall@{k}": 100 * np.mean([f < k for f in found_at]) for k in KS},
        "map@r": 100 * np.mean(precisions), "r_precision": 100 * np.mean(r_precisions),
        "queries": len(found_at), "queries_without_positive": len(queries) - len(found_at),
    }  # fmt: skip


WAYS = {
    ("int8", "int8 · int8"): ("int8", None), ("int8", "float32 · int8"): ("int8", "int8"),
    ("int8 + float32", "float32 · float32"): ("int8", "float32"), ("binary", "Hamming"): ("binary", None),
    ("binary", "float32 · binary"): ("binary", "binary"), ("binary + int8", "float32 · int8"): ("binary", "int8"),
    ("binary + float32", "float32 · float32"): ("binary", "float32"),
}  # fmt: skip


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("with_gallery", [False, True])
def test_every_row_of_the_table_equals_plain_loops(with_gallery: bool, times: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(compact, "_BLOCK_ELEMENTS", 7 * 60)  # several blocks of queries
    x, y = data()
    g, gy = data(50, seed=1) if with_gallery else (None, None)
    table = measure_compact(x, y, g, gy, dims=[5], quantise=["binary", "int8"], recall_at=KS, oversample=times)
    assert [(row.dim, row.stored, row.ranked_by) for row in table] == [
        (dim, *way) for dim in (12, 5) for way in [("float32", "cosine"), *WAYS]
    ]
    for row in table:
        cut, gallery = first_dims(x, row.dim), None if g is None else first_dims(g, row.dim)
        if row.stored == "float32":
            exact = retrieve(cut, y, gallery=gallery, gallery_labels=gy)
            assert row.metrics == exact.summary(KS)
        else:
            first, then = WAYS[row.stored, row.ranked_by]
            assert row.metrics == pytest.approx(by_hand(cut, y, gallery, gy, first, then, times), rel=1e-12), row
    assert len({row.metrics["map@r"] for row in table if row.dim == 12}) >= 6, "the ways differ"


def test_bytes_of_an_image() -> None:
    table = measure_compact(*data(), dims=[10], quantise=["int8", "binary"])
    assert [(row.dim, row.stored, row.bytes_per_image) for row in table if row.dim == 10] == [
        (10, "float32", 40), (10, "int8", 10), (10, "int8", 10), (10, "int8 + float32", 50), (10, "binary", 2), (10, "binary", 2),
        (10, "binary + int8", 12), (10, "binary + float32", 42),
    ]  # fmt: skip
    assert table[0].bytes_per_image == 48


def test_wide_embeddings_are_added_without_rounding() -> None:
    """Above 1,040 dimensions a product of int8 rows leaves the whole numbers that float32 holds."""
    x = torch.ones(3, 2000)
    x[:, 0] = torch.tensor([1.0, 1 - 1 / 127, 1 - 2 / 127])
    assert int8_rows(x)[:, 0].tolist() == [127, 126, 125]
    row = measure_compact(x, torch.tensor([0, 1, 0]), quantise=["int8"], recall_at=[1], oversample=1)[1]
    assert row.metrics["recall@1"] == 0  # the row between is the nearest of both


def test_candidates_are_the_first_of_equals() -> None:
    """Five rows at the same Hamming distance, of which two are candidates: those of the smallest numbers, on any number of threads."""
    x = torch.tensor([[1.0, 1, 1, 1], *[[1, 1, 1, 0.5 - 0.1 * i] for i in range(5)]])
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    row = measure_compact(x, y, quantise=["binary"], recall_at=[1], oversample=2)[-1]
    assert row.metrics["recall@1"] == 0
    x, y = torch.cat([x[:1], x[5:], x[1:5]]), torch.tensor([0, 0, 1, 2, 3, 4])
    row = measure_compact(x, y, quantise=["binary"], recall_at=[2], oversample=1)[-1]
    assert row.metrics["recall@2"] == 100


def test_rows() -> None:
    x = torch.tensor([[0.0, -2.0, 1.0], [0.1, 0.05, -0.05]])
    assert int8_rows(x).tolist() == [[0, -127, 64], [127, 64, -64]]
    assert sign_rows(x).tolist() == [[-1, -1, 1], [1, 1, -1]]
    assert torch.equal(first_dims(x, 2), x[:, :2])  # not at length one: the prefix is taken as it is
    unit = torch.nn.functional.normalize(x)
    torch.testing.assert_close(first_dims(unit, 2), torch.nn.functional.normalize(unit[:, :2]))
    assert first_dims(x, 3) is x


def test_what_cannot_be_measured_is_one_line() -> None:
    x, y = data()
    for options, says in (
        ({"dims": [13]}, "13 dimensions cannot be kept of embeddings of 12: expected 1 to 12"),
        ({"dims": [0]}, "0 dimensions cannot be kept"),
        ({"quantise": ["int8"], "distance": "euclidean"}, "compared by their cosine"),
        ({"quantise": ["int8"], "oversample": 0}, "--oversample is 0, expected 1 or more"),
    ):
        with pytest.raises(UserError, match=says):
            measure_compact(x, y, **options)
    assert check_dims([3, 3, 5], 12) == [12, 5, 3]
