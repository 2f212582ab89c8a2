"""Threads that each multiply matrices on their own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits


class _OneBlasThread:
    """BLAS in one thread while anybody is inside; blocks may overlap in any order."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limits: threadpool_limits | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limits = threadpool_limits(1, "blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._limits is not None:
                self._limits.restore_original_limits()


_one_blas_thread = _OneBlasThread()


@contextlib.contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, with BLAS in one thread; any number of pools may be open at once.

    BLAS's own threads would wait for each other in every product, 16 ms each on a busy machine.
    """
    with _one_blas_thread, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield pool
