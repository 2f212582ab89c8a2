"""What Ray Train's controller calls for a run; a module of its own, since importing Ray Train takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.train

_UserCallback: Any = ray.train.UserCallback  # type: ignore[attr-defined]  # its annotations are those of an earlier interface


class TellFailures(_UserCallback):  # type: ignore[misc]
    """Tells the driver why workers have ended.

    Args:
        status: Handle of an actor of class `RunStatus`.
        cause: One line about an error.
    """

    def __init__(self, status: Any, cause: Callable[[BaseException], str]) -> None:
        self.status, self.cause = status, cause

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.status.workers_failed.remote({rank: self.cause(error) for rank, error in worker_exceptions.items()})
