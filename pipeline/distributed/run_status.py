"""What the driver and the workers tell each other while a run goes on: progress one way, "stop" the other.

One object with plain methods. In one process it is used as it is; with Ray Train it lives in an actor of the driver, and
`RemoteBoard` speaks to it without ever making a training step wait.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any


class Board:
    """Latest progress, notices in order, a stop request, and the error that ended the run."""

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}
        self.notices: list[str] = []
        self.stop_requested = False
        self.error: str | None = None

    def publish(self, progress: dict[str, Any]) -> None:
        self.progress = progress

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def fail(self, error: str) -> None:
        """The run cannot go on; the first error is kept."""
        self.error = self.error or error

    def stop(self) -> None:
        self.stop_requested = True

    def stopping(self) -> bool:
        return self.stop_requested

    def failed(self) -> str | None:
        return self.error

    def read(self, seen: int = 0) -> dict[str, Any]:
        """Everything a driver shows: progress, the notices after the first `seen`, the error."""
        return {"progress": self.progress, "notices": self.notices[seen:], "error": self.error}


class RemoteBoard:
    """The board of another process, for a worker.

    Args:
        actor: handle of a Ray actor of class `Board`.
    """

    PUBLISH_EVERY_S = 0.3

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._published, self._phase = 0.0, None
        self._asked: Any = None
        self._stop = False

    def publish(self, progress: dict[str, Any]) -> None:
        now, phase = time.monotonic(), progress.get("phase")
        if phase != self._phase or now - self._published >= self.PUBLISH_EVERY_S:
            self._published, self._phase = now, phase
            self.actor.publish.remote(progress)

    def notice(self, text: str) -> None:
        self.actor.notice.remote(text)

    def fail(self, error: str) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # the driver may be gone; its absence ends us anyway
            ray.get(self.actor.fail.remote(error))

    def stopping(self) -> bool:
        """Whether the last answer was yes; asks again without waiting."""
        import ray

        if self._asked is None:
            self._asked = self.actor.stopping.remote()
        elif ray.wait([self._asked], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._asked))
            self._asked = None
        return self._stop

    def failed(self) -> str | None:
        import ray

        return ray.get(self.actor.failed.remote())
