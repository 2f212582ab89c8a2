"""A run on a cluster of this machine whose nodes come and go: `python -m tests.cluster.changing_nodes SCENARIO RECIPE OUTPUT`.

A process of its own: nodes can only be added from the main thread, and the cluster is none of the tests' shared one. The head holds no
workers; each further node has room for one. Writes the run's messages, with seconds since the start, as JSON.

resize   starts with two workers; a node is killed; a node comes
drain    starts with two workers on two of three nodes; one is announced to be taken away, and is 20 s later
spare    two workers, no range; a node is killed, another is there
lost     two workers, no range; a node is killed, and comes back 40 s later
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import ray
import yaml
from ray.cluster_utils import Cluster

from pipeline.config import build_config
from pipeline.distributed.ray_session import ray_session
from pipeline.errors import one_line
from pipeline.training.ray_train import run_on_ray

FAST_HEALTH_CHECKS = {
    "health_check_failure_threshold": 3,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
}
LIMIT_S = 240.0
DRAIN_S = 20.0


class Run(threading.Thread):
    """The run's driver, and what it has told."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.config = build_config(recipe)
        self.messages: list[tuple[float, str]] = []
        self.progress: dict[str, Any] = {}
        self.error: str | None = None
        self.began = time.monotonic()

    def run(self) -> None:
        try:
            run_on_ray(self.config, self.config.data.source, self.show, ray)
        except Exception as error:
            self.error = one_line(error)

    def show(self, state: dict[str, Any]) -> None:
        self.messages += [(round(time.monotonic() - self.began, 1), text) for text in state["messages"]]
        self.progress = state["progress"]

    def event(self, text: str) -> None:
        self.messages.append((round(time.monotonic() - self.began, 1), f"# {text}"))

    def wait_for_steps(self, steps: int) -> None:
        """Waits until the present workers have trained some further steps."""
        first = None
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.is_alive():
            step = self.progress.get("step", 0) if self.progress.get("phase") == "training" else 0
            first = step if first is None or step < first else first
            if step >= first + steps:
                return
            time.sleep(0.1)
        raise AssertionError(f"no {steps} further steps within 120 s: {self.progress}, {self.messages}")

    def wait_for_message(self, text: str, after: int) -> None:
        deadline = time.monotonic() + 120
        while not any(text in message for _, message in self.messages[after:]):
            assert time.monotonic() < deadline and self.is_alive(), f"not told within 120 s: {text}; {self.messages}"
            time.sleep(0.1)


def drain(cluster: Cluster, node: Any) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + DRAIN_S) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot node", deadline)
    assert accepted, why


def main(scenario: str, recipe: str, output: str) -> None:
    threading.Timer(LIMIT_S, os._exit, [3]).start()
    head = {
        "num_cpus": 2,
        "include_dashboard": False,
        "_system_config": FAST_HEALTH_CHECKS,
        "object_store_memory": 10**8,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)

    def add() -> Any:
        return cluster.add_node(num_cpus=1, resources={"worker": 1}, object_store_memory=10**8)

    nodes = [add() for _ in range(3 if scenario in ("spare", "drain") else 2)]
    os.environ["RAY_ADDRESS"] = cluster.address
    with ray_session(1):
        run = Run(yaml.safe_load(Path(recipe).read_text()))
        run.start()
        run.wait_for_steps(4)
        told = len(run.messages)
        used = {w for w in worker_nodes()}
        victim = next(node for node in nodes if node.node_id in used)
        if scenario == "drain":
            drain(cluster, victim)
            run.event("drained")
            taken = time.monotonic() + DRAIN_S
            run.wait_for_message("resumed at step", told)
            time.sleep(max(0.0, taken - time.monotonic()))
        cluster.remove_node(victim, allow_graceful=False)
        run.event("killed")
        if scenario != "drain":
            if scenario == "lost":
                time.sleep(40)
                add()
                run.event("added")
            run.wait_for_message("resumed at step", told)
        if scenario == "resize":
            run.wait_for_steps(4)
            told = len(run.messages)
            add()
            run.event("added")
            run.wait_for_message("resumed at step", told)
        run.join(LIMIT_S)
        run.event("ended")
    Path(output).write_text(json.dumps({"messages": run.messages, "error": run.error}))
    cluster.shutdown()
    os._exit(0)  # the timer


def worker_nodes() -> list[str]:
    actors = ray._private.state.actors().values()
    return [a["Address"]["NodeID"] for a in actors if a["ActorClassName"] == "RayTrainWorker" and a["State"] == "ALIVE"]


if __name__ == "__main__":
    main(*sys.argv[1:])
