"""A readers-writer lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriter:
    """Many readers or one writer; a waiting writer keeps new readers out."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._writer = threading.Lock()
        self._readers = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        with self._writer, self._lock:
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                self._lock.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        with self._writer:
            with self._lock:
                self._lock.wait_for(lambda: self._readers == 0)
            yield
