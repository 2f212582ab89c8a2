"""Candidates against plain loops, on whole numbers, of which float32 computes every similarity without an error."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from pipeline.neighbours import kernels
from pipeline.neighbours.candidates import Search, _Block, close_rows, given_up, multiply_on_device
from pipeline.neighbours.kernels import Candidates, Hits, Mask

DIM = 4


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_search(
    num_rows: int, num_queries: int, margin: int, depth: int = 5, **changes: Any
) -> tuple[Search, np.ndarray]:
    """A search in random rows whose similarities are whole numbers up to a million, and these; queries are rows."""
    random = np.random.default_rng(num_rows + margin)
    rows = random.integers(-500, 501, (num_rows, DIM)).astype(np.float32)
    ids, labels = random.permutation(num_rows), random.integers(0, 8, num_rows)
    values = {
        "queries": lambda part: rows[:num_queries][part],
        "rows": lambda part: rows[part],
        "num_rows": num_rows,
        "dim": DIM,
        "mask": Mask(ids, labels, False),
        "depth": np.full(num_queries, depth),
        "margin": np.full(num_queries, margin, np.float32),
        "ids": ids[:num_queries],
        "labels": labels[:num_queries],
        "same": True,
        **changes,
    }
    return Search(**values), rows[:num_queries] @ rows.T


def collect(search: Search, memory_bytes: int) -> list[tuple[slice, Candidates]]:
    return [block for group in search.groups(memory_bytes) for block in search.collect(group, memory_bytes)]


@pytest.mark.parametrize("memory_bytes", [1, 10**5, 10**8])
@pytest.mark.parametrize(
    ("num_queries", "same", "other"),
    [(700, True, False), (700, True, True), (300, True, True), (300, False, False), (300, False, True)],
)
@pytest.mark.parametrize("margin", [0, 3000])
def test_all_within_the_margin_of_the_last_neighbour_are_candidates(
    threads, memory_bytes, num_queries, same, other, margin
):
    search, similarity = make_search(700, num_queries, margin, same=same)
    search = replace(search, mask=search.mask._replace(other=other))
    hidden = search.ids[:, None] == search.mask.ids
    if other:
        hidden |= search.labels[:, None] == search.mask.labels
    similarity[hidden] = -np.inf
    last = np.sort(similarity, axis=1)[:, -5]
    decided = 0
    for part, c in collect(search, memory_bytes):
        undecided = given_up(c)
        for query in np.setdiff1d(np.arange(len(c.counts)), undecided):
            listed = slice(c.starts[query], c.starts[query] + c.counts[query])
            expected = np.flatnonzero(similarity[part][query] >= last[part][query] - margin)
            assert sorted(c.rows[listed]) == expected.tolist()
            assert (c.values[listed] == similarity[part][query][c.rows[listed]]).all()
            assert (np.diff(c.values[listed]) <= 0).all()
            decided += 1
    assert decided > 0.9 * num_queries


@pytest.mark.parametrize("memory_bytes", [1, 10**5, 10**8])
@pytest.mark.parametrize("num_queries", [300, 700])
@pytest.mark.parametrize("accelerator", [False, True])
def test_rows_about_the_reference_are_counted_and_listed(threads, memory_bytes, num_queries, accelerator):
    """Some references are similarities of rows, so that some rows lie on the edge of the margin."""
    _, similarity = make_search(700, num_queries, 400)
    similarity[np.arange(num_queries), np.arange(num_queries)] = -np.inf
    reference = similarity[np.arange(num_queries), np.arange(num_queries) - 1] + np.float32(400)
    reference[::5] = np.inf
    search, _ = make_search(700, num_queries, 400, reference=reference, most_close=4)
    if accelerator:
        queries, rows = search.queries, search.rows
        search = replace(
            search,
            queries=lambda part: torch.from_numpy(queries(part)),
            rows=lambda part: torch.from_numpy(rows(part)),
            accelerator=True,
        )
    expected_close = np.abs(similarity - reference[:, None]) <= 400
    expected_ahead = (similarity - reference[:, None] > 400).sum(1)
    too_many = expected_close.sum(1) > 4
    assert 0 < too_many.sum() < num_queries / 2 and (expected_close.sum(1) == 4).any()
    close = np.zeros_like(expected_close)
    for part, c in collect(search, memory_bytes):
        undecided = np.isin(np.arange(len(c.counts)), given_up(c))
        assert (undecided | ~too_many[part]).all() and (undecided & ~too_many[part]).sum() <= 2
        assert (c.ahead == expected_ahead[part])[~undecided].all()
        query, row = close_rows(c)
        assert not undecided[query].any() and len(np.unique(query * 700 + row)) == len(query)
        close[part.start + query, row] = True
        close[part][undecided] = expected_close[part][undecided]
    assert (close == expected_close).all()


def test_close_rows_stay_within_the_memory():
    """Hundreds of rows about the reference of every third query: only such queries are given up."""
    memory_bytes, margin = 64_000, 100_000
    _, similarity = make_search(640, 640, margin)
    np.fill_diagonal(similarity, -np.inf)
    reference = np.full(640, np.inf, np.float32)
    reference[1::3], reference[2::3] = 0, similarity[2::3].max(1) + margin - 10_000
    search, _ = make_search(640, 640, margin, depth=640, reference=reference)
    expected = np.abs(similarity - reference[:, None]) <= margin
    assert expected[1::3].sum(1).min() > 20 and expected[2::3].sum(1).max() < 10
    given_up_for_close = 0
    for part, c in collect(search, memory_bytes):
        assert len(c.close_row) <= memory_bytes // 32
        query, row = close_rows(c)
        kept = np.isfinite(c.reference)
        given_up_for_close += int((~kept)[np.arange(part.start, part.stop) % 3 == 1].sum())
        assert kept[np.arange(part.start, part.stop) % 3 == 2].all()
        for each in np.flatnonzero(kept):
            assert sorted(row[query == each]) == np.flatnonzero(expected[part][each]).tolist()
    assert given_up_for_close > 150


def test_one_thread_at_a_time_changes_a_block(monkeypatch):
    inside: set[int] = set()
    together: list[int] = []
    guard, take_hits = threading.Lock(), kernels.take_hits

    def watched(c: Candidates, *arguments: Any) -> int:
        block = id(c.counts)
        with guard:
            together.extend(inside & {block})
            inside.add(block)
        time.sleep(0.001)
        taken = take_hits(c, *arguments)
        with guard:
            inside.discard(block)
        return taken

    monkeypatch.setattr(kernels, "take_hits", watched)
    search, similarity = make_search(700, 700, 0)
    block = _Block(search, slice(0, 64), 1000)

    def look(call: int) -> None:
        hits = Hits(np.empty(10_000, np.int32), np.empty(10_000, np.int32), np.empty(10_000, np.float32))
        if call % 4 < 2:
            block.add_tile(similarity[:64], 0, hits, first=False)
        else:
            block.add_transposed_tile(np.ascontiguousarray(similarity[:64].T), 0, hits)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(40)))
    assert not together


def test_products_on_a_device_are_in_full_precision():
    """Not every processor has the products of less precision, so that the setting is looked at as well."""
    seen = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "matmul" in getattr(function, "__name__", ""):
                seen.append(torch.get_float32_matmul_precision())
            return function(*args, **(kwargs or {}))

    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    exact, before = rows.double() @ rows.double().T, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16), Watched():
            product = multiply_on_device(rows, rows)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
    assert product.dtype == torch.float32 and (product - exact).abs().max() < 1e-4
