"""The status of a run, shared by driver and workers: progress, messages and validations to the driver, a stop request to the workers.

One object with plain methods. In one process it is used directly; with Ray Train it is an actor of the driver, and
`RunStatusProxy` calls it without making a training step wait. It knows where each worker runs, and says which of them gives
no sign of life.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

from pipeline.distributed.gauges import RunGauges
from pipeline.errors import DivergedError, RunError


def worker_label(rank: int, host: str) -> str:
    """The beginning of every line of a worker: "[rank 1 @ 10.0.0.7]"."""
    return f"[rank {rank} @ {host}]"


class RunStatus:
    """Latest progress, messages and validations in order, the workers, a stop request, and the error that ended the run.

    Workers are asked to stop for good, or to save a checkpoint and to be started again by the driver.

    Args:
        hang_timeout_s: Silence of a worker after which it is replaced; half of it is told. None: workers give no signs of life.
    """

    def __init__(self, hang_timeout_s: float | None = None) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.progress: dict[str, Any] = {}
        self._figures: dict[str, Any] = {}  # the newest progress that had a step
        self._facts: dict[str, Any] = {}
        self._beats: dict[int, dict[str, Any]] = {}  # by rank; "heard" is of this process's clock
        self._labels: dict[int, str] = {}  # of each rank that has ever run
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
        if "step" in progress:
            self._figures = progress

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
        self._workers, self._beats = {}, {}
        return again

    def add_worker(self, worker: dict[str, Any]) -> None:
        """Adds a worker that has started: rank, world, node (Ray's id), host, pid; the first of another number replaces all."""
        if any(other["world"] != worker["world"] for other in self._workers.values()):
            self._workers = {}
        self._workers[worker["rank"]] = worker
        self._labels[worker["rank"]] = worker_label(worker["rank"], worker["host"])

    def workers_failed(self, causes: dict[int, str]) -> None:
        """Tells why workers ended, by rank; all of them are started again, or the run ends."""
        for rank, cause in sorted(causes.items()):
            host = self._workers.get(rank, {}).get("host", "its node")
            self.add_message(f"worker {rank} on {host} failed: {cause}")
        self._workers, self._beats = {}, {}

    def workers(self) -> list[dict[str, Any]]:
        """The workers that run, by rank, once all have started; empty between two starts."""
        workers = [self._workers[rank] for rank in sorted(self._workers)]
        return workers if workers and len(workers) == workers[0]["world"] else []

    def update(self, facts: dict[str, Any]) -> None:
        """Adds or replaces facts about the run: its best validation, how often its workers were started."""
        self._facts |= facts

    def beat(self, rank: int, host: str, pid: int, step: int) -> None:
        """A worker's sign of life, with the step that it is at."""
        before = self._beats.get(rank, {})
        if before.get("told") and before["pid"] == pid:
            self.add_message(f"{worker_label(rank, host)} gives signs of life again")
        self._labels[rank] = worker_label(rank, host)
        self._beats[rank] = {"rank": rank, "node": host, "pid": pid, "step": step, "heard": time.monotonic()}

    def leave(self, rank: int, pid: int) -> None:
        """A worker ends by itself: its silence from now on means nothing."""
        if self._beats.get(rank, {}).get("pid") == pid:
            self._beats[rank]["told"] = True

    def label(self, rank: int) -> str:
        """Label of a rank with the node that it ran on last."""
        return self._labels.get(rank, f"[rank {rank}]")

    def _tell_silence(self) -> None:
        if self.hang_timeout_s is None:
            return
        for worker in self._beats.values():
            silent_s = time.monotonic() - worker["heard"]
            if silent_s > self.hang_timeout_s / 2 and not worker.get("told"):
                worker["told"] = True
                self.add_message(
                    f"{self.label(worker['rank'])} gives no sign of life for {silent_s:.0f} s, the last at step {worker['step']}: "
                    f"after {self.hang_timeout_s:g} s (runtime.hang_timeout_s) the workers are started again"
                )

    def error_message(self) -> str | None:
        return self.error

    def summary(self) -> dict[str, Any]:
        """What `pipeline.runs.run_state` writes: progress, the newest message and validations, facts, and the workers."""
        shown = ("rank", "node", "pid", "step")
        return {
            "progress": self._figures | self.progress,
            "messages": self.messages[-1:],
            "validations": self.validations[-3:],
            "workers": [{name: self._beats[rank][name] for name in shown} for rank in sorted(self._beats)],
            "group": self._facts.get("group", 0),
            "best": self._facts.get("best", {}),
        }

    def read(self, messages: int = 0, validations: int = 0) -> dict[str, Any]:
        """Progress, what came after the first `messages` and `validations`, and the error, for the driver to show."""
        self._tell_silence()
        return {
            "progress": self.progress,
            "messages": self.messages[messages:],
            "validations": self.validations[validations:],
            "error": self.error,
        }


def start_status(ray: Any, hang_timeout_s: float | None = None) -> Any:
    """Starts an actor of class `RunStatus` on the node of this process, with which it ends; gives its handle."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # another node may be taken away
    return ray.remote(num_cpus=0, max_concurrency=4, label_selector=here)(RunStatus).remote(hang_timeout_s)


class RunStatusProxy:
    """A worker's access to the status in another process.

    Args:
        actor: Handle of a Ray actor of class `RunStatus`.

    Attributes:
        gauges: Set with each progress and validation, if given.
    """

    PUBLISH_EVERY_S = 0.3
    ASK_EVERY_S = 0.3  # for a stop request: a call takes half a CPU-millisecond of two processes

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.gauges: RunGauges | None = None
        self._published = 0.0  # time of the last call
        self._phase: Any = None
        self._asked = -math.inf  # time of the last question
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

    def add_stopped(self, step: int) -> None:
        import ray

        ray.get(self.actor.add_stopped.remote(step))  # the driver asks for it as soon as this process has ended

    def add_worker(self, worker: dict[str, Any]) -> None:
        self.actor.add_worker.remote(worker)

    def update(self, facts: dict[str, Any]) -> None:
        self.actor.update.remote(facts)

    def beat(self, rank: int, host: str, pid: int, step: int) -> None:
        self.actor.beat.remote(rank, host, pid, step)

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
            if time.monotonic() - self._asked >= self.ASK_EVERY_S:
                self._asked = time.monotonic()
                self._pending_answer = self.actor.stop_requested.remote()
        elif ray.wait([self._pending_answer], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._pending_answer))
            self._pending_answer = None
        return self._stop

    def error_message(self) -> str | None:
        import ray

        return ray.get(self.actor.error_message.remote())
