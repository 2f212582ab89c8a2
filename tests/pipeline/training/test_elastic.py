"""The number of workers on a cluster that is played: when a start waits, when running workers have to start again."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.training import elastic
from pipeline.training.elastic import WorkerNumber, worker_resources


class PlayedCluster:
    """Stands for the ray module: room for a number of places, which come into being in the order asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room, self.now = 0, 1000.0
        self.groups: list[object] = []
        self.asked: list[dict[str, Any]] = []
        self.leaving: dict[str, int] = {}
        self.during_sleep: Callable[[], None] = lambda: None
        self.util = types.SimpleNamespace(
            placement_group=self.create, remove_placement_group=self.groups.remove, placement_group_table=self.table
        )
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep, time=lambda: 1e6)
        monkeypatch.setattr(elastic, "time", clock)
        monkeypatch.setattr(elastic, "draining_nodes", lambda ray: self.leaving)

    def create(self, bundles: list[dict[str, float]], strategy: str, **options: Any) -> object:
        self.groups.append(object())
        self.asked.append({"bundles": bundles, **options})
        return self.groups[-1]

    def table(self, group: object) -> dict[str, str]:
        return {"state": "CREATED" if self.groups.index(group) < self.room else "PENDING"}

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during_sleep()

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> PlayedCluster:
    return PlayedCluster(monkeypatch)


@pytest.fixture
def number(cluster: PlayedCluster, make_config: Callable[..., Config]) -> tuple[WorkerNumber, list[str]]:
    told: list[str] = []
    workers = {"min": 2, "max": 4, "grow_after_s": 30.0}
    return WorkerNumber(make_config({"runtime.workers": workers}), cluster, told.append), told


def running(number: int) -> Callable[[], list[dict[str, str]]]:
    return lambda: [{"node": f"n{i}", "host": f"10.0.0.{i}"} for i in range(number)]


def check_for(
    cluster: PlayedCluster, workers: WorkerNumber, seconds: float, now: Callable[[], Any]
) -> tuple[float, str] | None:
    """Looks every 0.2 s; the time and the reason of the first restart."""
    began = cluster.now
    while cluster.now - began < seconds:
        cluster.now += 0.2
        if (reason := workers.check(now)) is not None:
            return cluster.now - began, reason
    return None


def test_a_fixed_number_starts_at_once(cluster: PlayedCluster, make_config: Callable[..., Config]) -> None:
    told: list[str] = []
    workers = WorkerNumber(make_config({"runtime.workers": 3}), cluster, told.append)
    assert workers.choose(lambda: False) == 3 and not cluster.asked
    assert check_for(cluster, workers, 70, running(0)) is None
    assert told == ["the 3 workers have not started yet (3 CPUs free; an autoscaler may be starting nodes)"] * 2
    assert check_for(cluster, workers, 500, running(3)) is None and not cluster.asked


def test_a_start_takes_the_places_that_come_within_seconds(
    cluster: PlayedCluster, number: tuple[WorkerNumber, list[str]]
) -> None:
    workers, told = number
    cluster.during_sleep = lambda: setattr(cluster, "room", min(3, int(cluster.now - 1000) // 4))
    assert workers.choose(lambda: False) == (2, 3)
    assert 12 + elastic.SETTLE_S <= cluster.now - 1000 < 14 + elastic.SETTLE_S and not told
    assert not cluster.groups, "the places are given back before Ray Train asks for its own"


def test_all_places_at_once_start_at_once(cluster: PlayedCluster, number: tuple[WorkerNumber, list[str]]) -> None:
    cluster.room = 9
    assert number[0].choose(lambda: False) == (2, 4) and cluster.now == 1000


def test_a_start_waits_for_the_smallest_number_and_says_so(
    cluster: PlayedCluster, number: tuple[WorkerNumber, list[str]]
) -> None:
    workers, told = number
    cluster.room = 1
    assert workers.choose(lambda: cluster.now > 1070) is None
    assert len(told) == 2 and told[0].startswith("waiting for room for 2 workers, there is room for 1 (3 CPUs free")
    assert not cluster.groups


def test_running_workers_start_again_where_there_is_room_for_more(
    cluster: PlayedCluster, number: tuple[WorkerNumber, list[str]]
) -> None:
    workers, _ = number
    cluster.room = 2
    assert workers.choose(lambda: False) == (2, 2)
    cluster.room = 0
    assert check_for(cluster, workers, 60, running(2)) is None
    assert len(cluster.groups) == 2, "an autoscaler sees what is wanted"
    cluster.room = 1
    found = check_for(cluster, workers, 60, running(2))
    assert found is not None and found[1] == "there is room for 3 workers, 2 run"
    assert elastic.SETTLE_S <= found[0] <= elastic.SETTLE_S + 2
    cluster.room = 2
    assert workers.choose(lambda: False) == (2, 2) and not cluster.groups
    assert check_for(cluster, workers, 29, running(2)) is None, "not again before grow_after_s"
    assert check_for(cluster, workers, 3, running(2)) is not None
    workers.close()
    assert not cluster.groups


def test_places_are_given_back_while_workers_start_again(
    cluster: PlayedCluster, number: tuple[WorkerNumber, list[str]]
) -> None:
    workers, _ = number
    assert check_for(cluster, workers, 5, running(3)) is None and len(cluster.groups) == 1
    cluster.room = 1
    assert check_for(cluster, workers, 2, running(0)) is None and not cluster.groups
    assert check_for(cluster, workers, 29, running(3)) is None
    assert check_for(cluster, workers, 60, running(4)) is None, "all that are wanted run"
    assert len(cluster.groups) <= 1


def test_a_node_that_is_about_to_leave(cluster: PlayedCluster, number: tuple[WorkerNumber, list[str]]) -> None:
    workers, _ = number
    cluster.leaving = {"n7": 0}
    assert check_for(cluster, workers, 10, running(4)) is None, "no worker of this run is there"
    cluster.leaving = {"n1": int((1e6 + 118) * 1000), "n7": 0}
    found = check_for(cluster, workers, 10, running(4))
    assert found is not None and found[1] == "node 10.0.0.1 is about to be taken away in 118 s"
    cluster.leaving = {"n0": 0}
    found = check_for(cluster, workers, 10, running(4))
    assert found is not None and found[1] == "node 10.0.0.0 is about to be taken away"


def test_what_a_worker_and_its_loader_ask_for(cluster: PlayedCluster, make_config: Callable[..., Config]) -> None:
    changes = {
        "runtime.workers": {"min": 1, "max": 1}, "runtime.cpus_per_worker": 3, "runtime.gpus_per_worker": 1, "precision": "float32",
        "runtime.memory_per_worker": 10**9, "runtime.worker_resources": {"spot": 0.01}, "runtime.worker_labels": {"kind": "!old"},
        "runtime.loader": "ray", "runtime.loader_cpus": 2, "runtime.loader_labels": {"kind": "cpu"},
    }  # fmt: skip
    config = make_config(changes)
    assert worker_resources(config) == {"CPU": 3.0, "GPU": 1.0, "memory": 1e9, "spot": 0.01}
    cluster.room = 1
    WorkerNumber(config, cluster, print).choose(lambda: False)
    assert cluster.asked == [
        {
            "bundles": [worker_resources(config), {"CPU": 1.0}, {"CPU": 1.0}],
            "bundle_label_selector": [{"kind": "!old"}, {"kind": "cpu"}, {"kind": "cpu"}],
        }
    ]
