"""Facts of every node of a cluster, gathered by one task a node; a node that does not answer is told, not waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.diagnosis.node_facts import NodeFacts, Wanted, clock, gather
from pipeline.errors import one_line

TIMEOUT_S = 150.0  # for all nodes together: the first worker process of a node, and the import of PyTorch
CLOCK_TIMEOUT_S = 20.0
_CLOCK_QUESTIONS = 3  # the fastest answer counts


def facts_of_nodes(ray: Any, wanted: Wanted, timeout_s: float = TIMEOUT_S) -> list[NodeFacts]:
    """Facts of every node that is alive, in the order of their addresses.

    Args:
        ray: The ray module, connected to a cluster.
        wanted: What is asked.
        timeout_s: Time after which a node counts as one that does not answer.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    answers = ask(ray, list(nodes), gather, (wanted,), timeout_s)
    answering = [node for node, (answer, _, _) in answers.items() if not isinstance(answer, str)]
    clocks = _clocks(ray, answering)
    facts = []
    for node_id, node in nodes.items():
        answer = answers[node_id][0]
        address = _name(node, nodes)
        if isinstance(answer, str):
            facts.append(NodeFacts(address, error=answer))
            continue
        offered = {name: float(amount) for name, amount in node["Resources"].items()}
        labels = {str(name): str(value) for name, value in node.get("Labels", {}).items()}
        ahead, error = clocks[node_id]
        facts.append(NodeFacts(address, **answer, resources=offered, labels=labels, clock_s=ahead, clock_error_s=error))
    return sorted(facts, key=lambda found: found.node)


def _name(node: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> str:
    """A node's address, with the beginning of its id where several nodes have the same."""
    address = str(node["NodeManagerAddress"])
    alone = sum(other["NodeManagerAddress"] == address for other in nodes.values()) == 1
    return address if alone else f"{address} {node['NodeID'][:6]}"


def ask(
    ray: Any, nodes: Sequence[str], function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float
) -> dict[str, tuple[Any, float, float]]:
    """Calls a function on every node; gives its result (text: why there is none), and when it was asked and answered."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[Any, tuple[str, float]] = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(function)
        asked[task.remote(*arguments)] = (node, time.time())
    answers: dict[str, tuple[Any, float, float]] = {}
    end = time.monotonic() + timeout_s
    waiting = list(asked)
    while waiting and (left := end - time.monotonic()) > 0:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
        answered = time.time()
        for reference in done:
            node, when = asked[reference]
            try:
                answers[node] = (ray.get(reference), when, answered)
            except ray.exceptions.RayError as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                answers[node] = (f"its task failed ({one_line(cause or error)})", when, answered)
    for reference in waiting:
        ray.cancel(reference, force=True)
        node, when = asked[reference]
        answers[node] = (f"no answer within {timeout_s:g} s", when, time.time())
    return answers


def _clocks(ray: Any, nodes: Sequence[str]) -> dict[str, tuple[float, float]]:
    """How far the clock of each node is ahead, and the largest error of that, seconds: by halves of a round trip."""
    best = dict.fromkeys(nodes, (0.0, float("inf")))
    for _ in range(_CLOCK_QUESTIONS):
        for node, (there, asked, answered) in ask(ray, nodes, clock, (), CLOCK_TIMEOUT_S).items():
            error = (answered - asked) / 2
            if not isinstance(there, str) and error < best[node][1]:
                best[node] = (there - (asked + answered) / 2, error)
    return best
