"""The table of the newest embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.mining import embedding_table as module
from pipeline.mining.embedding_table import Table
from pipeline.neighbours.exact_search import Queries, search
from tests.pipeline.mining.oracle import assert_equal, neighbours


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 30), max_size=20), max_size=12), st.integers(1, 9)
)
def test_a_table_is_a_dict_of_the_last_rows(batches: list[list[int]], tail: int) -> None:
    kept, module._MIN_MERGE = module._MIN_MERGE, tail  # merges of every size
    try:
        table, expected, random = Table(3, capacity=2), {}, np.random.default_rng(0)
        for step, batch in enumerate(batches):
            ids = np.array(batch, np.int64)
            values, labels = random.normal(size=(len(ids), 3)).astype(np.float32), random.integers(0, 9, len(ids))
            table.put(ids, values, labels, step)
            expected |= {i: (v, y, step) for i, v, y in zip(batch, values, labels, strict=True)}
        asked = np.array(list(expected), np.int64)
        values, labels, steps = table.get(asked)
        assert len(table) == len(expected)
        for row, i in enumerate(expected):
            assert (values[row].tolist(), labels[row], steps[row]) == (expected[i][0].tolist(), *expected[i][1:])
        assert not table.contains(np.array([2**62 + 1])).any()
        again = Table.restore(table.state(), 1)
        assert all(np.array_equal(a, b) for a, b in zip(again.get(asked), table.get(asked), strict=True))
        assert np.array_equal(again.view().ids, table.view().ids), "the order of rows decides what an index proposes"
    finally:
        module._MIN_MERGE = kept


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_bytes_of_a_row(dtype: str, width: int) -> None:
    rows, dim = 20_000, 64
    table = Table(dim, dtype, rows)
    for part in np.array_split(np.random.default_rng(0).permutation(rows), 7):
        table.put(part, np.ones((len(part), dim), np.float32), part, 1)
    table.by_class()
    assert width * dim * rows < table.nbytes <= (width * dim + 40) * rows
    assert table.view().values.dtype == dtype


def test_bad_rows_are_refused_whole_and_named() -> None:
    table = Table(2)
    table.put(np.array([1]), np.ones((1, 2), np.float32), np.array([0]), 0)
    bad = np.ones((3, 2), np.float32)
    bad[1, 0], bad[2, 1] = np.nan, 1e30
    with pytest.raises(UserError, match=r"2 of 3 embeddings are not finite \(sample ids 8, 9\)"):
        table.put(np.array([7, 8, 9]), bad, np.zeros(3, np.int64), 1)
    ids, labels = np.array([7, 8]), np.zeros(2, np.int64)
    with pytest.raises(UserError, match=r"embeddings float32 \(3, 2\) for 2 ids: expected one row of 2 numbers"):
        module.validate_rows(ids, bad, labels, 2)
    with pytest.raises(UserError, match=r"\(2, 3\) for 2 ids: expected one row of 2"):
        table.put(ids, np.ones((2, 3), np.float32), labels, 1)
    with pytest.raises(UserError, match="got 1 labels for 2 ids"):
        module.validate_rows(ids, bad[:2] * 0, labels[:1], 2)
    assert len(table) == 1
    with pytest.raises(UserError, match=r"1 of 2 sample ids have no embedding in the table \(first: 7\)"):
        table.get(np.array([1, 7]))


def test_members_of_a_class_are_found_again_after_every_change() -> None:
    table, random = Table(2), np.random.default_rng(0)
    for step in range(6):
        ids = random.choice(40, 10, replace=False)
        table.put(
            ids, random.normal(size=(10, 2)).astype(np.float32), (ids + step // 3) % 4, step
        )  # moves between classes
        rows = table.view()
        queries = Queries(np.zeros((4, 2), np.float32), np.full(4, -1), np.arange(4))
        assert_equal(search(queries, rows, 50, "same"), neighbours(queries, rows, 50, "same"))
    before = table.by_class()
    table.put(rows.ids[:3], np.ones((3, 2), np.float32), rows.labels[:3].astype(np.int64), 9)
    assert table.by_class() is before, "new embeddings alone do not sort again"
