"""The status of a run, shared by driver and workers: progress, messages and validations to the driver, a stop request to the workers.

One object with plain methods. In one process it is used directly; with Ray Train it is an actor of the driver, and
`RunStatusProxy` calls it without making a training step wait. It knows where each worker runs, and says which of them gives
no sign of life.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from pipeline.distributed.gauges import RunGauges
from pipeline.errors import DivergedError, RunError


def worker_label(rank: int, node: str) -> str:
    """The beginning of every line of a worker: "[rank 1 @ 10.0.0.7]"."""
    return f"[rank {rank} @ {node}]"


class RunStatus:
    """Latest progress, messages and validations in order, a stop request, and the error that ended the run.

    Args:
        hang_timeout_s: Silence of a worker after which it is restarted; half of it is told. None: workers do not report.
    """

    def __init__(self, hang_timeout_s: float | None = None) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.workers: dict[int, dict[str, Any]] = {}  # by rank; "heard" is of this process's clock
        self.facts: dict[str, Any] = {}
        self.progress: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}  # the newest progress that had a step
        self.messages: list[str] = []
        self.validations: list[dict[str, Any]] = []
        self._stop_requested = False
        self.error: str | None = None
        self.diverged = False

    def publish(self, progress: dict[str, Any]) -> None:
        self.progress = progress
        if "step" in progress:
            self.figures = progress

    def add_message(self, text: str) -> None:
        self.messages.append(text)

    def add_validation(self, point: dict[str, Any]) -> None:
        """Adds the metrics of a validation, with step, epoch and images."""
        self.validations.append(point)

    def update(self, facts: dict[str, Any]) -> None:
        """Adds or replaces facts about the run: its best validation, the number of this start of the workers."""
        self.facts |= facts

    def beat(self, rank: int, node: str, pid: int, step: int) -> None:
        """A worker's sign of life, with the step that it is at."""
        before = self.workers.get(rank, {})
        told = before.get("told", False) and before.get("pid") == pid
        if told:
            self.add_message(f"{worker_label(rank, node)} gives signs of life again")
        self.workers[rank] = {"rank": rank, "node": node, "pid": pid, "step": step, "heard": time.monotonic()}

    def leave(self, rank: int, pid: int) -> None:
        """A worker ends by itself: its silence from now on means nothing."""
        if self.workers.get(rank, {}).get("pid") == pid:
            self.workers[rank]["left"] = True

    def where(self, rank: int) -> str:
        """Label of a rank with the node that it ran on last."""
        return worker_label(rank, self.workers[rank]["node"]) if rank in self.workers else f"[rank {rank}]"

    def _tell_silence(self) -> None:
        if self.hang_timeout_s is None:
            return
        for worker in self.workers.values():
            silent_s = time.monotonic() - worker["heard"]
            if silent_s > self.hang_timeout_s / 2 and not worker.get("told") and not worker.get("left"):
                worker["told"] = True
                self.add_message(
                    f"{worker_label(worker['rank'], worker['node'])} gives no sign of life for {silent_s:.0f} s, the last at step "
                    f"{worker['step']}: after {self.hang_timeout_s:g} s (runtime.hang_timeout_s) the workers start again"
                )

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

    def stop_requested(self) -> bool:
        return self._stop_requested

    def error_message(self) -> str | None:
        return self.error

    def read(self, messages: int = 0, validations: int = 0) -> dict[str, Any]:
        """Progress, what came after the first `messages` and `validations`, and the error, for the driver to show."""
        self._tell_silence()
        return {
            "progress": self.progress,
            "messages": self.messages[messages:],
            "validations": self.validations[validations:],
            "error": self.error,
        }

    def summary(self) -> dict[str, Any]:
        """What `pipeline.runs.run_state` writes: the present progress, newest messages and validations, facts, and the workers."""
        shown = ("rank", "node", "pid", "step")
        return {
            "progress": self.figures | self.progress,
            "messages": self.messages[-1:],
            "validations": self.validations[-3:],
            "workers": [{name: self.workers[rank][name] for name in shown} for rank in sorted(self.workers)],
            "group": self.facts.get("group", 0),
            "best": self.facts.get("best", {}),
        }


class RunStatusProxy:
    """A worker's access to the status in another process.

    Args:
        actor: Handle of a Ray actor of class `RunStatus`.
        gauges: Shown to Prometheus as well.
    """

    PUBLISH_EVERY_S = 0.3

    def __init__(self, actor: Any, gauges: RunGauges | None = None) -> None:
        self.actor = actor
        self.gauges = gauges
        self._published = 0.0  # time of the last call
        self._phase: Any = None
        self._pending_answer: Any = None
        self._stop = False

    def publish(self, progress: dict[str, Any]) -> None:
        now, phase = time.monotonic(), progress.get("phase")
        if phase != self._phase or now - self._published >= self.PUBLISH_EVERY_S:
            self._published, self._phase = now, phase
            if self.gauges is not None:
                self.gauges.set(progress)
            self.actor.publish.remote(progress)

    def add_message(self, text: str) -> None:
        self.actor.add_message.remote(text)

    def add_validation(self, point: dict[str, Any]) -> None:
        if self.gauges is not None:
            self.gauges.set_validation(point)
        self.actor.add_validation.remote(point)

    def update(self, facts: dict[str, Any]) -> None:
        self.actor.update.remote(facts)

    def beat(self, rank: int, node: str, pid: int, step: int) -> None:
        self.actor.beat.remote(rank, node, pid, step)

    def leave(self, rank: int, pid: int) -> None:
        self.actor.leave.remote(rank, pid)

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
