"""The status of a run, shared by driver and workers: progress, messages and validations to the driver, a stop request to the workers.

One object with plain methods. In one process it is used directly; with Ray Train it is an actor of the driver, and
`RunStatusProxy` calls it without making a training step wait.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from pipeline.errors import DivergedError, RunError


class RunStatus:
    """Latest progress, messages and validations in order, the workers, a stop request, and the error that ended the run.

    Workers are asked to stop for good, or to save a checkpoint and to be started again by the driver.
    """

    def __init__(self) -> None:
        self.progress: dict[str, Any] = {}
        self.messages: list[str] = []
        self.validations: list[dict[str, Any]] = []
        self._stop_requested = False
        self._restart_reason: str | None = None
        self._stopped_at: int | None = None
        self._workers: dict[int, dict[str, Any]] = {}
        self.error: str | None = None
        self.diverged = False

    def publish(self, progress: dict[str, Any]) -> None:
        self.progress = progress

    def add_message(self, text: str) -> None:
        self.messages.append(text)

    def add_validation(self, point: dict[str, Any]) -> None:
        """Adds the metrics of a validation, with step, epoch and images."""
        self.validations.append(point)

    def fail(self, error: str, diverged: bool = False) -> None:
        """Records the error that ends the run; the first one is kept."""
        if self.error is None:
            self.error, self.diverged = error, diverged

    def failure(self) -> RunError | None:
        """The error that ends the run, if there is one."""
        if self.error is None:
            return None
        return DivergedError(self.error) if self.diverged else RunError(self.error)

    def stop(self) -> None:
        self._stop_requested = True

    def restart(self, reason: str) -> None:
        """Asks the workers to save a checkpoint and to end; the driver starts them again."""
        if self._restart_reason is None:
            self._restart_reason = reason
            self.add_message(f"{reason}: saving a checkpoint ...")

    def stop_requested(self) -> bool:
        return self._stop_requested or self._restart_reason is not None

    def add_stopped(self, step: int) -> None:
        """A worker has saved a checkpoint and ends before the run's length."""
        self._stopped_at = step
        if self._stop_requested or self._restart_reason is None:
            self.add_message(f"stopped at step {step}: saved; the same command continues")

    def restarts(self) -> bool:
        """True, once, if the workers have ended to be started again."""
        again = self._restart_reason is not None and self._stopped_at is not None and not self._stop_requested
        self._restart_reason = self._stopped_at = None
        self._workers = {}
        return again

    def add_worker(self, worker: dict[str, Any]) -> None:
        """Adds a worker that has started: rank, world, node (Ray's id), host, pid; the first of another number replaces all."""
        if any(other["world"] != worker["world"] for other in self._workers.values()):
            self._workers = {}
        self._workers[worker["rank"]] = worker

    def workers_failed(self, causes: dict[int, str]) -> None:
        """Tells why workers ended, by rank; all of them are started again, or the run ends."""
        for rank, cause in sorted(causes.items()):
            host = self._workers.get(rank, {}).get("host", "its node")
            self.add_message(f"worker {rank} on {host} failed: {cause}")
        self._workers = {}

    def workers(self) -> list[dict[str, Any]]:
        """The workers that run, by rank, once all have started; empty between two starts."""
        workers = [self._workers[rank] for rank in sorted(self._workers)]
        return workers if workers and len(workers) == workers[0]["world"] else []

    def error_message(self) -> str | None:
        return self.error

    def read(self, messages: int = 0, validations: int = 0) -> dict[str, Any]:
        """Progress, what came after the first `messages` and `validations`, and the error, for the driver to show."""
        return {
            "progress": self.progress,
            "messages": self.messages[messages:],
            "validations": self.validations[validations:],
            "error": self.error,
        }


class RunStatusProxy:
    """A worker's access to the status in another process.

    Args:
        actor: Handle of a Ray actor of class `RunStatus`.
    """

    PUBLISH_EVERY_S = 0.3

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._published = 0.0  # time of the last call
        self._phase: Any = None
        self._pending_answer: Any = None
        self._stop = False

    def publish(self, progress: dict[str, Any]) -> None:
        now, phase = time.monotonic(), progress.get("phase")
        if phase != self._phase or now - self._published >= self.PUBLISH_EVERY_S:
            self._published, self._phase = now, phase
            self.actor.publish.remote(progress)

    def add_message(self, text: str) -> None:
        self.actor.add_message.remote(text)

    def add_validation(self, point: dict[str, Any]) -> None:
        self.actor.add_validation.remote(point)

    def add_stopped(self, step: int) -> None:
        import ray

        ray.get(self.actor.add_stopped.remote(step))  # the driver asks for it as soon as this process has ended

    def add_worker(self, worker: dict[str, Any]) -> None:
        self.actor.add_worker.remote(worker)

    def fail(self, error: str, diverged: bool = False) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # the driver may be gone; its absence ends us anyway
            ray.get(self.actor.fail.remote(error, diverged))

    def stop_requested(self) -> bool:
        """True once an answer of the actor has been yes; asks again without waiting."""
        import ray

        if self._pending_answer is None:
            self._pending_answer = self.actor.stop_requested.remote()
        elif ray.wait([self._pending_answer], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._pending_answer))
            self._pending_answer = None
        return self._stop

    def error_message(self) -> str | None:
        import ray

        return ray.get(self.actor.error_message.remote())
