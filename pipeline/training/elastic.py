"""The workers of a run on a cluster whose nodes come and go: how many start, and when they save a checkpoint and start again.

A worker that dies is Ray Train's business: with a range of workers it goes on with those that are left. What is known
beforehand is done without losing a step: when a node is announced to be taken away, or there is room for more workers, the
workers save a checkpoint, end, and start again. Batches, plan and learning rate do not depend on their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.config import Config, WorkerRange
from pipeline.distributed.ray_session import draining_nodes

SETTLE_S = 5.0  # without a further place, after which those found are used
CHECK_EVERY_S = 1.0
TELL_AFTER_S = 30.0
NEVER_S = 1e9


def worker_resources(config: Config) -> dict[str, float]:
    """The resources of one worker, without its loader's."""
    runtime = config.runtime
    resources = {"CPU": float(runtime.cpus_per_worker or 1), **runtime.worker_resources}
    if runtime.gpus_per_worker:
        resources["GPU"] = runtime.gpus_per_worker
    if runtime.memory_per_worker:
        resources["memory"] = float(runtime.memory_per_worker)
    return resources


class WorkerPlaces:
    """Placement groups for one worker and its loader each, which nobody uses.

    They tell an autoscaler that nodes are wanted, and exist once the cluster has room; never on a node that is about to leave.

    Args:
        config: The run's configuration.
        ray: The ray module, connected to a cluster.
    """

    def __init__(self, config: Config, ray: Any) -> None:
        runtime = config.runtime
        self.ray = ray
        self.bundles, self.labels = [worker_resources(config)], [runtime.worker_labels]
        if runtime.loader == "ray":
            self.bundles += [{"CPU": 1.0}] * runtime.loader_cpus
            self.labels += [runtime.loader_labels] * runtime.loader_cpus
        self.groups: list[Any] = []

    def ask(self, number: int) -> None:
        """Changes the number of places that are asked for."""
        selector = {"bundle_label_selector": self.labels} if any(self.labels) else {}
        while len(self.groups) < number:
            self.groups.append(self.ray.util.placement_group(self.bundles, strategy="PACK", **selector))
        while len(self.groups) > number:
            self.ray.util.remove_placement_group(self.groups.pop())

    def found(self) -> int:
        """Number of places that there is room for."""
        table = self.ray.util.placement_group_table
        return sum(table(group)["state"] == "CREATED" for group in self.groups)


class WorkerNumber:
    """Chooses the number of workers at each start, and tells when they have to start again.

    Args:
        config: The run's configuration.
        ray: The ray module, connected to a cluster.
        tell: Shows a line to the user.
    """

    def __init__(self, config: Config, ray: Any, tell: Callable[[str], None]) -> None:
        self.runtime, self.ray, self.tell = config.runtime, ray, tell
        self.range = self.runtime.workers if isinstance(self.runtime.workers, WorkerRange) else None
        self.places = WorkerPlaces(config, ray)
        self._found, self._found_at = 0, 0.0
        self._began_at = self._told_at = self._checked_at = time.monotonic()
        self._was_running = False

    def choose(self, stop_requested: Callable[[], bool]) -> int | tuple[int, int] | None:
        """Number of workers for Ray Train, or the range of it; waits until there is room for the smallest number.

        Returns:
            None after a stop request.
        """
        self._began_at, self._was_running = time.monotonic(), False
        if self.range is None:
            return self.runtime.max_workers
        self.places.ask(self.range.max)
        self._found, self._found_at = 0, time.monotonic()
        try:
            while not self._settled(self.range.max) or self._found < self.range.min:
                if stop_requested():
                    return None
                self._tell_waiting(f"waiting for room for {self.range.min} workers, there is room for {self._found}")
                time.sleep(0.2)
            return (self.range.min, self._found)
        finally:
            self.places.ask(0)  # Ray Train asks for its own

    def check(self, running: Callable[[], Sequence[Mapping[str, Any]]]) -> str | None:
        """Why the workers have to save and to start again, if they have to; looks about once a second.

        Args:
            running: Gives one mapping a worker that runs, with "node", its Ray node id, and "host"; none between two starts.
        """
        now = time.monotonic()
        if now - self._checked_at < CHECK_EVERY_S:
            return None
        self._checked_at = now
        workers = running()
        if not workers:
            self.places.ask(0)  # they would take the places that Ray Train starts the workers in
            if self._was_running:
                self._began_at, self._was_running = now, False
            least = self.runtime.min_workers
            self._tell_waiting(f"the {f'{least} workers have' if least > 1 else 'worker has'} not started yet")
            return None
        if not self._was_running:
            self._began_at, self._was_running = now, True
        leaving = draining_nodes(self.ray)
        hosts = {worker["host"]: leaving[worker["node"]] for worker in workers if worker["node"] in leaving}
        if hosts:
            return "; ".join(
                f"node {host} is about to be taken away{_in(deadline)}" for host, deadline in hosts.items()
            )
        return self._room(len(workers), now)

    def close(self) -> None:
        self.places.ask(0)

    def _room(self, running: int, now: float) -> str | None:
        if self.range is None or running >= self.range.max:
            return None
        missing = self.range.max - running
        if not self.places.groups:
            self._found, self._found_at = 0, now
        self.places.ask(missing)
        if not self._settled(missing) or not self._found or now - self._began_at < self.range.grow_after_s:
            return None
        return f"there is room for {running + self._found} workers, {running} run"

    def _settled(self, wanted: int) -> bool:
        """Looks how many places there are; True if there are all, or no further one has come for some seconds."""
        found = self.places.found()
        if found != self._found:
            self._found, self._found_at = found, time.monotonic()
        return found == wanted or time.monotonic() - self._found_at >= SETTLE_S

    def _tell_waiting(self, what: str) -> None:
        now = time.monotonic()
        if now - max(self._began_at, self._told_at) >= TELL_AFTER_S:
            self._told_at = now
            free = self.ray.available_resources()
            amounts = [f"{free.get(name, 0.0):g} {name}s" for name in ("CPU", "GPU") if name == "CPU" or name in free]
            self.tell(f"{what} ({', '.join(amounts)} free; an autoscaler may be starting nodes)")


def _in(deadline_ms: int) -> str:
    """The time that is left, where the cluster knows it."""
    return f" in {max(0.0, deadline_ms / 1000 - time.time()):.0f} s" if deadline_ms else ""
