"""Compiled loops of which the searches alone would not show an error."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.neighbours import kernels
from pipeline.neighbours.candidates import _SMALLEST
from pipeline.neighbours.kernels import Candidates, Mask


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=80), st.data())
def test_kth_largest(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    assert kernels.kth_largest(np.array(values, np.float32), k) == sorted(values, reverse=True)[k - 1]


@pytest.mark.parametrize("columns", [48, 64, 200, 203])
def test_a_first_threshold_is_reached_by_enough_rows_besides_the_query(columns):
    """The query's own row is the nearest and alone in its group of columns, where it takes the place of a neighbour."""
    random = np.random.default_rng(0)
    tile = np.stack([random.permutation(columns) for _ in range(50)]).astype(np.float32)
    own = tile.argmax(axis=1)
    empty = np.empty(0)
    depth, margin = np.full(50, 2, np.int32), np.full(50, 0, np.float32)
    for other in (False, True):
        labels = random.integers(0, 3, columns)
        c = Candidates(
            threshold=np.full(50, _SMALLEST, np.float32), margin=margin, depth=depth, starts=empty, counts=empty,
            values=empty, rows=empty, ids=own, labels=labels[own], reference=empty, ahead=empty, close=empty,
            close_query=empty, close_row=empty, close_size=empty, most_close=empty,
        )  # fmt: skip
        kernels.raise_thresholds(tile, c, Mask(np.arange(columns), labels, other), 0)
        allowed = tile != tile[np.arange(50), own][:, None]
        if other:
            allowed &= labels != labels[own][:, None]
        assert (((tile >= c.threshold[:, None]) & allowed).sum(1) >= 2).all()
        assert (c.threshold > columns / 4).all()


def test_code_is_compiled_where_none_can_be_kept(monkeypatch):
    njit = numba.njit

    def without_a_folder(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_a_folder)
    assert kernels.compiled(lambda x: x + 1)(2) == 3
