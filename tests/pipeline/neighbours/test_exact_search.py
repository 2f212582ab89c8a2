"""Exact search against a plain loop, under every mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.mining import ClassFilter
from pipeline.neighbours import exact_search
from pipeline.neighbours.exact_search import Neighbours, Queries, Rows, as_queries, rerank, search, search_all
from tests.pipeline.mining.oracle import assert_equal, clustered, neighbours


@st.composite
def problems(draw: st.DrawFn) -> tuple[Queries, Rows, int]:
    """Few distinct values, so that duplicates and ties are common; singletons, one dimension, no rows at all."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, dim, queries = draw(st.integers(0, 120)), draw(st.integers(1, 9)), draw(st.integers(0, 12))
    spread = draw(st.sampled_from(["continuous", "whole", "one point", "far away", "long", "short"]))
    values = random.normal(size=(rows + queries, dim))
    if spread == "whole":
        values = np.round(values)
    elif spread == "one point":
        values = np.ones_like(values) + 1e-7 * np.round(values)
    elif spread == "far away":
        values = 1e6 + values
    elif spread in ("long", "short"):  # the squares leave the range of float32
        values *= 1e30 if spread == "long" else 1e-30
    dtype = np.float32 if spread in ("far away", "long", "short") else draw(st.sampled_from([np.float32, np.float16]))
    labels = random.integers(0, draw(st.integers(1, 30)), rows + queries)
    ids = random.permutation(3 * rows + 3)[:rows].astype(np.int64)
    stored = values[:rows].astype(dtype)
    asked = values[rows:].astype(np.float32)
    own = np.where(random.random(queries) < 0.5, random.choice(np.append(ids, -1), queries), -1)
    largest = float(np.sqrt(np.square(stored.astype(np.float64)).sum(1)).max(initial=0))
    return Queries(asked, own, labels[rows:]), Rows(stored, ids, labels[:rows], largest), draw(st.integers(1, 40))


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(["all", "other", "same"]), st.sampled_from([1, 500, 10**8]))
def test_a_search_is_a_loop_over_all_rows(
    problem: tuple[Queries, Rows, int], class_filter: ClassFilter, memory: int
) -> None:
    queries, rows, k = problem
    assert_equal(search(queries, rows, k, class_filter, memory), neighbours(queries, rows, k, class_filter))


@settings(max_examples=30, deadline=None)
@given(problems(), st.sampled_from(["all", "other", "same"]), st.sampled_from([1, 3000, 10**8]))
def test_all_rows_at_once_are_the_searches_of_each(
    problem: tuple[Queries, Rows, int], class_filter: ClassFilter, memory: int
) -> None:
    _, rows, k = problem
    reached = 0
    for part, found in search_all(rows, k, class_filter, memory):
        assert part.start == reached
        reached = part.stop
        assert_equal(found, neighbours(as_queries(rows, part), rows, k, class_filter))
    assert reached == len(rows)


@pytest.mark.parametrize("class_filter", ["all", "other", "same"])
@pytest.mark.parametrize("memory", [40_000, 2**20])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_rows_at_once_in_several_tiles(
    class_filter: ClassFilter, memory: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles large enough for groups, the last ones short; in one group of queries that share their products, and in several."""
    ids, values, labels = clustered(1000, 12, 40)
    rows = Rows(values, ids, labels, 1.001)
    expected = search(Queries(values, ids, labels), rows, 9, class_filter)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = Neighbours.concatenate([lists for _, lists in search_all(rows, 9, class_filter, memory)])
    finally:
        torch.set_num_threads(before)
    assert_equal(found, expected)


@pytest.mark.parametrize("class_filter", ["all", "other", "same"])
def test_many_rows_and_groups(class_filter: ClassFilter) -> None:
    """Large enough that the first selection goes by groups of similarities, and not by all of them."""
    ids, values, labels = clustered(3000, 16, 60)
    rows = Rows(values, ids, labels, 1.001)
    queries = Queries(values[:40], ids[:40], labels[:40])
    assert_equal(search(queries, rows, 20, class_filter), neighbours(queries, rows, 20, class_filter))


@pytest.mark.parametrize("dim", [14, 998])
def test_margin_covers_the_float32_error(dim: int) -> None:
    """Equal terms after a large first one are all rounded the same way, when added one after the other."""
    random = np.random.default_rng(0)
    values = np.repeat(random.random((60, 1)) + 0.1, dim, axis=1).astype(np.float32)
    values[:, 0] = 30 * random.random(60)
    largest = float(np.linalg.norm(values.astype(np.float64), axis=1).max())
    rows = Rows(values, np.arange(60), np.zeros(60, np.int64), largest)
    problem = exact_search._problem(values, rows.ids, None, rows, 5, same=True)
    queries, lifted = problem.queries(slice(0, 60)), problem.rows(slice(0, 60))
    scale = float(queries[0, 0]) / float(values[0, 0])
    used = 0.0
    for i in range(60):
        in_order = np.cumsum(queries[i] * lifted, axis=1, dtype=np.float32)[:, -1]
        exact = -0.5 * np.square(scale * (values.astype(np.float64) - values[i].astype(np.float64))).sum(1)
        used = max(used, float(np.abs(in_order - exact).max() / problem.margin[i]))
    assert 0.02 < used < 0.5
    halves = -0.5 * np.square(scale * values.astype(np.float64)).sum(1)
    np.testing.assert_array_max_ulp(
        lifted[:, -2], halves.astype(np.float32), 1
    )  # rounded once: the margin relies on it


def test_equal_rows_do_not_take_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 cannot tell rows apart, all pairs are compared exactly, a bounded number at a time."""
    monkeypatch.setattr(exact_search, "_MAX_PAIRS", 1000)
    seen: list[int] = []
    nearest = exact_search._nearest
    monkeypatch.setattr(
        exact_search, "_nearest", lambda q, r, query, *a: seen.append(len(query)) or nearest(q, r, query, *a)
    )
    rows = Rows(np.ones((400, 4), np.float32), np.arange(400), np.zeros(400, np.int64), 2.0)
    found = search(Queries(rows.values[:50], np.arange(50)), rows, 3)
    assert found.ids[0].tolist() == [1, 2, 3] and found.ids[49].tolist() == [0, 1, 2]
    assert max(seen) <= 1000 and sum(seen) == 50 * 399
    seen.clear()
    lists = Neighbours.concatenate([part for _, part in search_all(rows, 3, "all", 100)])
    assert lists.ids[0].tolist() == [1, 2, 3] and lists.ids[399].tolist() == [0, 1, 2]
    assert max(seen) <= 1000 and sum(seen) == 400 * 399


def test_candidates_are_ranked_exactly_under_the_mask() -> None:
    ids, values, labels = clustered(200, 8, 10)
    rows, queries = Rows(values, ids, labels, 1.001), Queries(values[:9], ids[:9], labels[:9])
    everything = np.tile(np.arange(200), (9, 1))
    for class_filter in ("all", "other", "same"):
        assert_equal(rerank(queries, rows, everything, 7, class_filter), neighbours(queries, rows, 7, class_filter))
    few = np.full((9, 4), -1)
    few[:, 0] = 50
    assert rerank(queries, rows, few, 3, "all").ids[0].tolist() == [ids[50], -1, -1]


def test_answers_of_shards_merge() -> None:
    ids, values, labels = clustered(300, 4, 10)
    values = np.round(values * 4)  # ties across the shards
    queries = Queries(values[:20], ids[:20], labels[:20])
    whole = neighbours(queries, Rows(values, ids, labels, 9.0), 8)
    parts = [neighbours(queries, Rows(values[s::3], ids[s::3], labels[s::3], 9.0), 8) for s in range(3)]
    assert_equal(Neighbours.merge(parts), whole)


def test_classes_have_to_be_known_to_tell_them_apart() -> None:
    rows = Rows(np.ones((3, 2), np.float32), np.arange(3), np.zeros(3, np.int64), 2.0)
    for class_filter in ("other", "same"):
        with pytest.raises(ValueError, match="give labels"):
            search(Queries(rows.values, np.arange(3)), rows, 1, class_filter)
