"""Pools that are open at the same time."""

from __future__ import annotations

import numpy as np  # noqa: F401  (its BLAS has to be loaded)
from threadpoolctl import threadpool_info, threadpool_limits

from pipeline.neighbours.thread_pool import thread_pool


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_blas_gets_its_threads_back_after_pools_that_overlap():
    with threadpool_limits(2, "blas"):
        assert blas_threads() == {2}
        first, second = thread_pool(), thread_pool()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert blas_threads() == {1}
        second.__exit__(None, None, None)
        assert blas_threads() == {2}
