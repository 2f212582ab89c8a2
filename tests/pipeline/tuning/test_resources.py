"""What a trial holds, and how many fit at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.training import node_labels
from pipeline.tuning import resources
from pipeline.tuning.resources import (
    TrialResources,
    check_labels,
    local_cpus,
    trial_resources,
    trials_here,
    trials_on_cluster,
)

Nodes = list[Any]  # resources of a node, and how many there are


def cluster(monkeypatch: pytest.MonkeyPatch, nodes: Nodes) -> Any:
    totals: dict[str, float] = {}
    nodes = [({name: float(amount) for name, amount in node.items()}, count) for node, count in nodes]
    for node, count in nodes:
        for name, amount in node.items():
            totals[name] = totals.get(name, 0.0) + amount * count
    monkeypatch.setattr(resources, "node_groups", lambda ray: nodes)
    monkeypatch.setattr(resources, "cluster_maximum", lambda ray: totals)
    return SimpleNamespace()


def trial(workers: int = 1, cpus: float = 1, gpus: float = 0, more: float = 0) -> TrialResources:
    worker = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    return TrialResources(workers, worker, {"CPU": float(workers * cpus + more), "GPU": float(workers * gpus)})


def test_what_a_trial_holds(make_config: Callable[..., Config]) -> None:
    one = trial_resources(make_config({"runtime.workers": 1, "runtime.cpus_per_worker": 2}))
    assert one.in_process and one.bundle == {"CPU": 2.0} and one.total == {"CPU": 2.0, "GPU": 0.0}
    three = trial_resources(
        make_config(
            {"runtime.workers": 3, "runtime.cpus_per_worker": 2, "runtime.loader": "ray", "runtime.loader_cpus": 2}
        )
    )
    assert not three.in_process and three.total["CPU"] == 12.0
    assert set(three.bundle) == {"node:__internal_head__"}, "its driver holds no CPU, and stays off spot nodes"
    mining = {"name": "smart_mining", "embedding_dim": 8}
    servers = trial_resources(
        make_config({"method": mining, "runtime.workers": 1, "mining.shards": 2, "mining.cpus": 3})
    )
    assert servers.bundle == {"CPU": 1.0} and servers.total["CPU"] == 7.0
    gpus = trial_resources(make_config({"runtime.workers": 2, "runtime.gpus_per_worker": 0.5, "precision": "float32"}))
    assert gpus.worker == {"CPU": 1.0, "GPU": 0.5} and gpus.total["GPU"] == 1.0
    assert str(gpus) == "2 CPUs, 1 GPU"


def test_a_trial_of_one_worker_is_placed_by_the_workers_labels(make_config: Callable[..., Config]) -> None:
    labels = {"runtime.worker_labels": {"side": "left"}}
    one, two = (trial_resources(make_config(labels | {"runtime.workers": workers})) for workers in (1, 2))
    assert one.bundle_labels == {"side": "left"} and two.bundle_labels == {}, "of two, Ray Train places the workers"
    assert one.labels == two.labels == labels


@pytest.mark.parametrize("autoscaled", [False, True])
def test_labels_that_no_node_has(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, autoscaled: bool
) -> None:
    """An autoscaler does not tell the labels of the nodes that it may start."""
    monkeypatch.setattr(node_labels, "node_groups", lambda ray: [({"CPU": 1.0}, 2 if autoscaled else 1)])
    nodes = [{"Alive": True, "Labels": {"side": "right"}}, {"Alive": False, "Labels": {"side": "left"}}]
    ray = SimpleNamespace(nodes=lambda: nodes)
    one = trial_resources(make_config({"runtime.workers": 1, "runtime.worker_labels": {"side": "left"}}))
    check_labels(ray, [trial_resources(make_config())])
    if autoscaled:
        check_labels(ray, [one])
    else:
        with pytest.raises(
            UserError, match=r"^runtime.worker_labels asks for .* side: left, which no node has \(labels .*: side\)"
        ):
            check_labels(ray, [one])


def test_trials_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(5))
    assert trials_here([trial(cpus=2)]) == 2
    assert trials_here([trial(cpus=1), trial(cpus=2, more=1)]) == 1
    assert trials_here([trial(cpus=8)]) == 1, "a machine that is too small trains one at a time"
    assert local_cpus(2, [trial(cpus=1), trial(cpus=2)]) == 4


@pytest.mark.parametrize(
    ("nodes", "one", "expected"),
    [
        ([({"CPU": 8}, 3)], trial(cpus=2), 12),
        ([({"CPU": 3}, 4)], trial(cpus=2), 4),  # the third CPU of a node is of no use
        ([({"CPU": 16}, 1), ({"CPU": 8, "GPU": 1}, 10)], trial(workers=2, cpus=4, gpus=1), 5),
        ([({"CPU": 16}, 1), ({"CPU": 8, "GPU": 1}, 10)], trial(workers=1, cpus=4, gpus=0.5, more=8), 8),
        ([({"CPU": 4}, 2)], trial(workers=1, cpus=1, more=3), 2),
    ],
)
def test_trials_of_a_cluster_at_its_largest(
    monkeypatch: pytest.MonkeyPatch, nodes: Nodes, one: TrialResources, expected: int
) -> None:
    ray = cluster(monkeypatch, nodes)
    assert trials_on_cluster(ray, [one]) == expected
    assert trials_on_cluster(ray, [one, trial(cpus=0.001)]) == expected, "the largest trial decides"


@pytest.mark.parametrize(
    ("nodes", "one", "said"),
    [
        ([({"CPU": 4}, 8)], trial(cpus=6), "1 worker of 6 CPUs each, .* has room for 0 .its largest node has 4 CPUs"),
        ([({"CPU": 4}, 2)], trial(workers=3, cpus=4), "needs 3 workers of 4 CPUs each, .* has room for 2"),
        ([({"CPU": 4}, 8)], trial(cpus=1, gpus=1), "1 GPU "),
        (
            [({"CPU": 4}, 1)],
            trial(cpus=2, more=4),
            "a trial needs 6 CPUs .workers, loaders, mining servers., .* at most 4",
        ),
    ],
)
def test_a_trial_that_can_never_be_placed_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, nodes: Nodes, one: TrialResources, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        trials_on_cluster(cluster(monkeypatch, nodes), [one])
