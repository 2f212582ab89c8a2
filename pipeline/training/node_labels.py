"""The labels of nodes that a run's parts are placed by, and whether there are such nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.config import Config
from pipeline.distributed.ray_session import node_groups


def asked_labels(config: Config) -> dict[str, Mapping[str, str]]:
    """The labels that parts which Ray starts for this run ask for, by key of the config; without those that ask for none."""
    runtime = config.runtime
    asked = {
        "runtime.worker_labels": runtime.worker_labels if runtime.max_workers else {},
        "runtime.loader_labels": runtime.loader_labels if runtime.loader == "ray" else {},
        "mining.labels": config.mining.labels if config.method.mining is not None and runtime.max_workers else {},
    }
    return {key: wanted for key, wanted in asked.items() if wanted}


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node's labels meet all conditions."""
    return all(_matches(labels.get(name), condition) for name, condition in wanted.items())


def _matches(label: str | None, condition: str) -> bool:
    """Whether a node's label meets a condition of Ray's: VALUE, !VALUE, in(A, B), !in(A, B)."""
    text = condition.strip()
    positive = not text.startswith("!")
    text = text.removeprefix("!")
    values = [v.strip() for v in text[3:-1].split(",")] if text.startswith("in(") and text.endswith(")") else [text]
    return (label in values) == positive


def label_text(wanted: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {condition}" for name, condition in wanted.items())


def label_problems(asked: Mapping[str, Mapping[str, str]], nodes: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A sentence for each key whose labels no node has.

    Args:
        asked: Conditions by key of the config, see `asked_labels`.
        nodes: The labels of each node.
    """
    for key, wanted in asked.items():
        if not any(has_labels(labels, wanted) for labels in nodes):
            names = sorted({name for labels in nodes for name in labels if not name.startswith("ray.io/node-")})
            yield (
                f"{key} asks for a node of the labels {label_text(wanted)}, which no node has (labels of the nodes: "
                f"{', '.join(names) or 'none'}): start nodes with them (ray start --labels), or change {key}"
            )


def unmet_labels(asked: Mapping[str, Mapping[str, str]], ray: Any) -> list[str]:
    """What no node of a cluster can ever meet; nothing where an autoscaler may start nodes, whose labels it does not tell."""
    if not asked or any(count > 1 for _, count in node_groups(ray)):
        return []
    return list(label_problems(asked, [node.get("Labels", {}) for node in ray.nodes() if node["Alive"]]))
