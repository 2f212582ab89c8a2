"""Tells a run's status why its workers ended; called by Ray Train's controller, in its process."""

from __future__ import annotations

from typing import Any

import ray.train

from pipeline.training.ray_train import root_cause

_UserCallback: Any = ray.train.UserCallback  # its annotations are those of an earlier interface


class TellFailures(_UserCallback):  # type: ignore[misc]
    """At module level, so that Ray Train pickles it by name.

    Args:
        status: Handle of the actor of class `RunStatus`.
    """

    def __init__(self, status: Any) -> None:
        self.status = status

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.status.workers_failed.remote({rank: root_cause(error) for rank, error in worker_exceptions.items()})
