"""The order in which a mining server applies requests: each waits until its predecessor is applied."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import RunError
from pipeline.mining.messages import SequenceNumber


class RequestOrder:
    """Admits the requests of one start of a run in the order of their numbers; may be used from any thread.

    Attributes:
        incarnation: Number of the start of the run that owns the server; 0 before the first.
        server_epoch: How often that start has set the server up again; requests of earlier epochs are refused.
        applied: Number of the newest request that is applied.
    """

    def __init__(self) -> None:
        self.incarnation = self.server_epoch = self.applied = 0
        self._wait_s: float | None = None  # None: not begun
        self._changed = threading.Condition()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Runs the block, which may call `restart` and set `applied`, while no request is admitted."""
        with self._changed:
            yield
            self._changed.notify_all()

    def restart(self, incarnation: int, server_epoch: int, wait_s: float) -> None:
        """Refuses requests of earlier starts and epochs from now on; no request is applied yet. Call it inside `held`.

        Args:
            incarnation: Number of the start of the run.
            server_epoch: How often this start has set the server up.
            wait_s: Longest time that a request waits for its predecessor, seconds.

        Raises:
            RunError: A newer start of the run owns the server.
        """
        if incarnation < self.incarnation:
            raise RunError(_superseded(incarnation, self.incarnation))
        self.incarnation, self.server_epoch, self._wait_s, self.applied = incarnation, server_epoch, wait_s, 0

    @contextmanager
    def in_order(self, order: SequenceNumber | None) -> Iterator[bool]:
        """Runs the block once all requests before `order` are applied; yields False if `order` was applied before.

        A request without a number (None) does not wait.

        Raises:
            RunError: The server has not begun a run, a newer start of the run owns it, or the predecessor did not come.
        """
        if order is None:
            yield True
            return
        with self._changed:
            wait_s = self._require_current(order)
            predecessor_applied = self._changed.wait_for(
                lambda: self.applied >= order.previous or not self._from_current_client(order), wait_s
            )
            self._require_current(order)
            if not predecessor_applied:
                raise RunError(
                    f"mining request {order.number} waited {wait_s:g} s for request {order.previous}, the newest "
                    f"applied is {self.applied}: raise mining.deadline_s, or check the log of rank 0"
                )
            first_time = self.applied < order.number
        try:
            yield first_time
        finally:  # a refused request counts as applied: its successors go on
            with self._changed:
                if self._from_current_client(order):
                    self.applied = max(self.applied, order.number)
                    self._changed.notify_all()

    def _require_current(self, order: SequenceNumber) -> float:
        if self._wait_s is None:
            raise RunError("the mining server has not begun a run")
        if not self._from_current_client(order):
            raise RunError(_superseded(order.incarnation, self.incarnation))
        return self._wait_s

    def _from_current_client(self, order: SequenceNumber) -> bool:
        return (order.incarnation, order.server_epoch) == (self.incarnation, self.server_epoch)


def _superseded(old: int, new: int) -> str:
    return f"another process (attempt {new}) now owns the mining server; this one (attempt {old}) stops"
