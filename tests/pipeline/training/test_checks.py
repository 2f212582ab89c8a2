"""What a run asks of its machine; and the small parts through which a driver hears and stops its workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.config import Config, RuntimeConfig
from pipeline.distributed.ray_session import on_cluster
from pipeline.distributed.run_status import RunStatus
from pipeline.errors import UserError
from pipeline.training.checks import (
    check_cluster,
    check_machine,
    needed_cpus,
    placement_problems,
    with_machine_defaults,
)
from pipeline.training.launch import StopSignals, device_of, status_display, under_torchrun
from pipeline.training.ray_train import root_cause


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 8 cores without a GPU, no cluster."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("workers", "given", "expected"), [(1, None, 8), (0, None, 8), (3, None, 2), (20, None, 1), (3, 5, 5)]
)
def test_threads_of_a_worker(
    workers: int, given: int | None, expected: int, cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = RuntimeConfig(workers=workers, cpus_per_worker=given)
    assert with_machine_defaults(runtime).cpus_per_worker == expected
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert on_cluster() and with_machine_defaults(runtime).cpus_per_worker == (given or 2), (
        "the driver's machine says nothing about a cluster"
    )


@pytest.mark.parametrize(
    ("runtime", "cpus"),
    [
        ({"workers": 0, "cpus_per_worker": 3}, 4),
        ({"workers": 2, "cpus_per_worker": 3}, 8),
        ({"workers": 2, "cpus_per_worker": 3, "loader_cpus": 2}, 10),
        ({"workers": 2, "cpus_per_worker": 3, "loader_cpus": 2, "loader": "in_process"}, 6),
    ],
)
def test_logical_cpus(runtime: dict[str, Any], cpus: int) -> None:
    assert needed_cpus(Config(runtime=RuntimeConfig(**runtime))) == cpus


def test_what_a_machine_can_bear(
    cores: None, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(**runtime: Any) -> list[str]:
        return check_machine(make_config({"precision": "float32", **{f"runtime.{k}": v for k, v in runtime.items()}}))

    assert check(workers=2, cpus_per_worker=4) == [] == check(workers=0, cpus_per_worker=8)
    assert check(workers=3, cpus_per_worker=4) == [
        "warning: 12 threads on 8 cores (runtime.workers × cpus_per_worker): steps will be slower"
    ]
    with pytest.raises(UserError, match=r"33 threads requested .*this machine has 8 cores: reduce runtime.workers"):
        check(workers=11, cpus_per_worker=3)
    with pytest.raises(UserError, match=r"1\.5 GPUs requested .*this machine has 0: reduce"):
        check(workers=3, gpus_per_worker=0.5)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert check(workers=100, cpus_per_worker=4) == [] == check(workers=3, gpus_per_worker=1.0), (
        "a cluster is asked instead"
    )


def test_no_cluster_no_question(
    cores: None, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_cluster(make_config({"runtime.workers": 99}), ray=None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check_cluster(make_config({"runtime.workers": 0}), ray=None)


class Cluster:
    """What `check_cluster` asks of Ray."""

    def __init__(self, **resources: float) -> None:
        self.resources = {name: float(amount) for name, amount in resources.items()}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}]


def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is one node that has all its resources."""
    monkeypatch.setattr("pipeline.training.checks.cluster_maximum", lambda ray: ray.resources)
    monkeypatch.setattr("pipeline.training.checks.node_groups", lambda ray: [(ray.resources, 1)])


def test_workers_have_to_fit_on_nodes(make_config: Callable[..., Config]) -> None:
    """Enough CPUs in all are not enough: a worker's have to be on one node."""
    config = make_config({"runtime.workers": 2, "runtime.cpus_per_worker": 3, "runtime.loader": "in_process"})
    assert list(placement_problems(config, {"CPU": 6.0}, [({"CPU": 3.0}, 2)])) == []
    assert list(placement_problems(config, {"CPU": 8.0}, [({"CPU": 2.0}, 4)])) == [
        "2 workers of 3 CPUs each requested, the nodes of the cluster at its largest have room for 0 (the largest node has "
        "2 CPUs): reduce runtime.workers, cpus_per_worker or gpus_per_worker, or enlarge the cluster"
    ]
    found = list(placement_problems(config, {"CPU": 4.0}, [({"CPU": 4.0}, 1)]))
    assert [text.split(" requested")[0] for text in found] == ["6 CPUs", "2 workers of 3 CPUs each"]


def test_mining_servers_count_and_their_resource_has_to_exist(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    one_node(monkeypatch)
    changes = {"runtime.workers": 2, "runtime.cpus_per_worker": 1, "runtime.loader": "in_process", "mining.shards": 3}
    mining = changes | {"mining.cpus": 2, "method.memory": 10}
    assert needed_cpus(make_config(changes)) == 2 and needed_cpus(make_config(mining)) == 8
    check_cluster(make_config(changes), Cluster(CPU=2))
    with pytest.raises(UserError, match=r"8 CPUs requested .* at most"):
        check_cluster(make_config(mining), Cluster(CPU=7))
    pinned = make_config(mining | {"mining.resource": "steady"})
    check_cluster(pinned, Cluster(CPU=8, steady=1))
    with pytest.raises(
        UserError, match=r"mining.resource is 'steady', which no node of the cluster has \(its resources: CPU\)"
    ):
        check_cluster(pinned, Cluster(CPU=8))


def test_storage_has_to_be_seen_from_all_nodes(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": alive, "NodeID": i, "NodeManagerAddress": f"10.0.0.{i}"} for i, alive in enumerate((1, 1, 0, 1))]
    cluster = Cluster(CPU=99)
    monkeypatch.setattr(cluster, "nodes", lambda: nodes)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    one_node(monkeypatch)
    config = make_config({"runtime.workers": 1})
    seen: list[str] = []
    monkeypatch.setattr(
        "pipeline.distributed.ray_session._path_exists_on",
        lambda ray, node, path: os.path.exists(path) and not seen.append(path),
    )
    check_cluster(config, cluster)
    assert len(seen) == 3 and not os.path.exists(seen[0]), "every living node looked at a file that is gone now"
    monkeypatch.setattr("pipeline.distributed.ray_session._path_exists_on", lambda ray, node, path: node == 0)
    with pytest.raises(
        UserError, match=r"storage .* is not visible on the nodes 10\.0\.0\.1, 10\.0\.0\.3: set storage to s3"
    ):
        check_cluster(config, cluster)


def test_torchrun_and_devices(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not under_torchrun()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert under_torchrun() and device_of(make_config()) == torch.device("cpu")
    assert device_of(make_config({"precision": "float32", "runtime.gpus_per_worker": 1.0})) == torch.device("cuda", 3)


# ---- driver and workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_the_second_ctrl_c_interrupts(number: int, capfd: pytest.CaptureFixture) -> None:
    asked: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(KeyboardInterrupt), StopSignals(lambda: asked.append(1)) as signals:
        signal.raise_signal(number)
        assert signals.received == number and asked == [1]
        assert capfd.readouterr().err == "stopping: saving a checkpoint ...\n"
        signal.raise_signal(signal.SIGTERM)  # a second SIGTERM only repeats the request
        assert len(asked) == 2 and not capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert {s: signal.getsignal(s) for s in before} == before, "handlers are put back"


def test_signals_belong_to_the_main_thread() -> None:
    done: list[int | None] = []

    def other() -> None:
        with StopSignals(lambda: None) as signals:
            done.append(signals.received)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert done == [None]


def test_a_board_is_shown_to_its_last_word() -> None:
    status, seen = RunStatus(), []
    with status_display(status.read, lambda state: seen.append(state), every_s=0.01):
        status.publish({"phase": "training", "step": 1})
        status.add_message("first")
        while not seen or not seen[-1]["progress"]:
            pass
        status.publish({"phase": "training", "step": 2})
        status.add_message("second")
    assert seen[-1]["progress"] == {"phase": "training", "step": 2}
    assert [n for state in seen for n in state["messages"]] == ["first", "second"], "each once"


def test_a_board_keeps_the_first_error_and_the_request_to_stop() -> None:
    status = RunStatus()
    assert not status.stop_requested() and status.error_message() is None
    status.fail("a")
    status.fail("b")
    status.stop()
    assert status.error_message() == "a" == status.read()["error"] and status.stop_requested()


def test_root_cause_of_a_failed_training() -> None:
    outer = RuntimeError("wrapped")
    outer.__cause__ = ValueError("traceback ...\n  the cause \n")
    assert root_cause(outer) == "the cause"
    failed = RuntimeError("training failed")
    failed.worker_failures = {1: outer}
    assert root_cause(failed) == "[rank 1] the cause" and root_cause(ValueError()) == "ValueError"
