"""Rows about resources and memory, passing and failing, from a cluster and figures that are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from methods.mining import MiningRequirements
from pipeline.config import Config
from pipeline.diagnosis.measured_step import MeasuredStep
from pipeline.diagnosis.node_facts import NodeFacts
from pipeline.diagnosis.resource_rows import (
    Expected,
    expected_memory,
    gpu_memory,
    labels,
    memory,
    mining,
    resources,
    step_row,
)
from pipeline.diagnosis.rows import Row
from pipeline.mining.embedding_table import Table
from pipeline.mining.memory import EmbeddingMemory
from pipeline.mining.messages import ServerSpec
from pipeline.mining.server_bytes import ServerBytes, memory_bytes, server_bytes
from pipeline.training.node_labels import asked_labels, label_problems

GB = 1 << 30
Make = Callable[..., Config]
STEP = MeasuredStep(GB, 3 * GB, GB // 2, None, 100 << 20, 0.5, 48, 926)
SERVER = ServerBytes(table=2 * GB, index=GB, build=2 * GB)
HERE = NodeFacts("here", memory_bytes=32 * GB, free_memory_bytes=30 * GB)


def status(rows: list[Row]) -> list[str]:
    return [row.status for row in rows]


def mined(**changes: Any) -> dict[str, Any]:
    return {
        "method": {"name": "smart_mining", "embedding_dim": 8},
        "runtime.workers": 2,
        "runtime.cpus_per_worker": 2,
        **changes,
    }


def test_resources_of_a_cluster(make_config: Make) -> None:
    config = make_config({"runtime.workers": 4, "runtime.cpus_per_worker": 2})
    node = {"CPU": 4.0}

    def rows(groups: list[tuple[dict[str, float], int]], free: list[dict[str, float]]) -> list[Row]:
        maximum = {"CPU": sum(n["CPU"] * count for n, count in groups)}
        return resources(config, maximum, groups, free)

    assert status(rows([(node, 1), (node, 1)], [node, node])) == ["ok", "ok"]
    (row,) = rows([(node, 1)], [node])[:1]
    assert row.status == "fails" and "8 CPUs requested" in row.change and row.found == "at most 4 CPUs, 0 GPUs"
    busy = rows([(node, 1), (node, 1)], [node, {"CPU": 1.0}])
    assert (
        status(busy) == ["ok", "warning"] and "room for 2 of 4 workers" in busy[1].found and "others" in busy[1].change
    )
    growing = rows([({"CPU": 1.0}, 1), (node, 10)], [{"CPU": 1.0}])
    assert status(growing) == ["ok", "warning"] and "autoscaler" in growing[1].change


def test_mining_servers_need_their_resource(make_config: Make) -> None:
    config = make_config(mined(**{"mining.resource": "steady", "mining.shards": 2}))
    spot, steady = {"CPU": 8.0}, {"CPU": 8.0, "steady": 1.0}
    (row,) = resources(config, {"CPU": 16.0}, [(spot, 2)], [spot, spot])
    assert row.status == "fails" and "which no node of the cluster has" in row.change
    assert status(resources(config, {"CPU": 16.0, "steady": 1.0}, [(spot, 1), (steady, 1)], [spot, steady])) == [
        "ok",
        "ok",
    ]
    rows = resources(
        config, {"CPU": 16.0, "steady": 1.0}, [(spot, 1), (steady, 1)], [spot, {"CPU": 1.0, "steady": 1.0}]
    )
    assert status(rows) == ["ok", "warning"] and "1 of 2 mining servers" in rows[1].found


def test_a_range_of_workers_starts_with_those_that_fit(make_config: Make) -> None:
    config = make_config(
        {"runtime.workers": {"min": 1, "max": 8}, "runtime.cpus_per_worker": 2, "runtime.loader": "in_process"}
    )
    node = {"CPU": 4.0}
    rows = resources(config, {"CPU": 40.0}, [(node, 10)], [node])
    assert status(rows) == ["ok", "warning"] and "starts with 2 workers" in rows[1].change
    rows = resources(config, {"CPU": 40.0}, [(node, 10)], [{"CPU": 1.0}])
    assert "the run waits until the autoscaler" in rows[1].change
    assert status(resources(config, {"CPU": 1.0}, [({"CPU": 1.0}, 1)], [{"CPU": 1.0}])) == ["fails", "fails"]


def test_labels_of_parts_that_no_run_of_ray_has_are_not_asked_for(make_config: Make) -> None:
    given = {"runtime.worker_labels": {"a": "1"}, "runtime.loader_labels": {"a": "2"}, "mining.labels": {"a": "3"}}
    assert asked_labels(make_config(mined(**given, **{"runtime.loader": "ray"}))) == given
    assert set(asked_labels(make_config(given | {"runtime.workers": 1}))) == {"runtime.worker_labels"}
    assert asked_labels(make_config(mined(**given, **{"runtime.workers": 0}))) == {}, "it is all in one process"


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("L4", "ok"),
        ("!T4", "ok"),
        ("in(T4, L4)", "ok"),
        ("T4", "fails"),
        ("!L4", "ok"),
        ("!in(L4, none)", "ok"),
        ("in(T4)", "fails"),
    ],
)
def test_labels(condition: str, expected: str, make_config: Make) -> None:
    config = make_config({"runtime.workers": 1, "runtime.worker_labels": {"ray.io/accelerator-type": condition}})
    nodes = [replace(HERE, node="gpu", labels={"ray.io/accelerator-type": "L4"}), replace(HERE, node="head")]
    assert status(labels(config, nodes, grows=False)) == [expected]
    assert status(labels(config, nodes, grows=True)) == ["ok" if expected == "ok" else "warning"]
    text = "runtime.worker_labels asks for a node of the labels ray.io/accelerator-type: "
    problems = list(label_problems(asked_labels(config), [node.labels for node in nodes]))
    assert [problem.startswith(f"{text}{condition}, which no node has") for problem in problems] == [True] * (
        expected == "fails"
    )
    assert labels(make_config({"mining.labels": {"a": "b"}}), nodes, False) == [], "it does not mine"
    assert status(labels(make_config(mined(**{"mining.labels": {"a": "b"}})), nodes, False)) == ["fails"]


@pytest.mark.parametrize(
    ("limit", "free", "expected"), [(32, 30, "ok"), (8, 8, "warning"), (7, 6, "fails"), (32, 5, "warning")]
)
def test_memory_of_this_machine(make_config: Make, limit: int, free: int, expected: str) -> None:
    """Two workers of 3 GB and Ray with its object store; half a GB of each is shared."""
    config = make_config({"runtime.workers": 2, "runtime.loader": "in_process"})
    found = expected_memory(config, STEP, None, 0)
    (row,) = memory(config, found, [replace(HERE, memory_bytes=limit * GB, free_memory_bytes=free * GB)])
    assert row.status == expected and "2 worker 3.2 GB" in row.found and row.found.startswith("7.6 GB")


def test_memory_of_nodes(make_config: Make) -> None:
    """As many workers as a node holds, their loaders, and one server where there is room for it."""
    config = make_config(mined(**{"runtime.loader": "ray", "runtime.loader_cpus": 2, "mining.resource": "steady"}))
    found = expected_memory(config, STEP, SERVER, 0)
    nodes = [
        replace(HERE, node="small", resources={"CPU": 3.0}),
        replace(
            HERE, node="large", resources={"CPU": 8.0, "steady": 1.0}, memory_bytes=16 * GB, memory_from="container"
        ),
        replace(HERE, node="head", resources={"CPU": 0.0}),
    ]
    small, large, head = memory(config, found, nodes)
    assert "1 worker 3.2 GB, 2 loader 1.1 GB" in small.found and "server" not in small.found and small.status == "ok"
    assert "2 worker 3.2 GB, 4 loader 1.1 GB, 1 mining server 6.4 GB" in large.found
    assert large.status == "warning" and "limit of the container" in large.expected
    assert head.found.startswith("nothing is placed here") and head.status == "ok"


def test_a_server_in_the_process_of_the_run(make_config: Make) -> None:
    config = make_config(mined(**{"runtime.workers": 0}))
    assert expected_memory(config, STEP, SERVER, GB).worker == 3 * GB + GB + SERVER.total
    assert expected_memory(make_config(mined()), STEP, SERVER, GB).worker == 4 * GB
    on_gpu = expected_memory(make_config(mined()), replace(STEP, gpu_bytes=5 * GB), SERVER, GB)
    assert (on_gpu.worker, on_gpu.worker_gpu) == (3 * GB, 6 * GB)
    assert on_gpu.checkpoint == STEP.checkpoint_bytes + SERVER.table


@pytest.mark.parametrize(
    ("need", "share", "expected"), [(10, 1.0, "ok"), (15, 1.0, "warning"), (17, 1.0, "fails"), (10, 0.5, "fails")]
)
def test_gpu_memory(make_config: Make, need: int, share: float, expected: str) -> None:
    config = make_config({"precision": "float32", "runtime.gpus_per_worker": share})
    gpus = (("L4", 24 * GB), ("T4", 16 * GB))
    (row,) = gpu_memory(config, Expected(0, need * GB, 0, 0, None, 0), [replace(HERE, torch_gpus=gpus)])
    assert row.status == expected
    assert gpu_memory(make_config(), Expected(0, None, 0, 0, None, 0), [HERE]) == []


def test_mining_servers(make_config: Make) -> None:
    config = make_config(mined())
    assert mining(config, None, [HERE]) == []
    (row,) = mining(config, SERVER, [replace(HERE, memory_bytes=4 * GB), HERE])
    assert row.status == "ok" and row.found == "5.4 GB each: table 2.1 GB, index 1.1 GB, building the next 2.1 GB"
    (row,) = mining(config, SERVER, [replace(HERE, memory_bytes=4 * GB)])
    assert row.status == "fails" and "mining.shards" in row.change


def test_the_step_says_what_it_was_measured_with(make_config: Make) -> None:
    row = step_row(STEP, make_config(), made_up=False)
    assert (
        row.found
        == "48 images in 0.50 s (1 threads; 96 images per second and worker, without loading), checkpoint 105 MB"
    )
    assert "926 made-up classes" in step_row(STEP, make_config(), made_up=True).found


# ---- sizes of a mining server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_computed_bytes_are_those_of_a_table(dtype: str) -> None:
    rows, dim = 20_000, 16
    table = Table(dim, dtype, rows)
    ids = np.arange(rows)
    table.put(ids, np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32), ids // 5, 0)
    spec = ServerSpec("run", dim, rows, dtype, engine="exact")
    computed = server_bytes(MiningRequirements(table=True), spec, 100)
    held = table.nbytes + sum(array.nbytes for array in table.by_class())
    assert computed.table == pytest.approx(held, rel=0.05)
    assert computed.total == computed.table, "exact search has no index"


def test_computed_bytes_are_those_of_a_memory() -> None:
    needs, spec = MiningRequirements(per_class=4), ServerSpec("run", 16, 100, memory_dtype="float16")
    bank = EmbeddingMemory(16, 4, None, torch.float16)
    labels = torch.arange(25).repeat(4)
    bank.append(torch.zeros(100, 16), labels, torch.arange(100))
    held = sum(array.nbytes for name, array in bank.state().items() if name != "version")
    assert memory_bytes(needs, spec, 25) == pytest.approx(held, rel=0.05)
    assert memory_bytes(MiningRequirements(per_class=4, total=50), spec, 25) == memory_bytes(needs, spec, 25) // 2
    assert memory_bytes(MiningRequirements(table=True), spec, 25) == 0


def test_computed_bytes_of_an_index_are_those_of_faiss() -> None:
    from pipeline.mining.faiss_index import build, index_bytes
    from pipeline.neighbours.exact_search import Rows

    values = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    rows = Rows(values, np.arange(4000), np.arange(4000, dtype=np.int32) // 8, 10.0)
    for engine in ("ivf", "ivf_fp16", "hnsw"):
        _, report = build(rows, engine, 5, 0.01)
        assert index_bytes(engine, 4000, 16) == pytest.approx(report.bytes, rel=0.1), engine
    many = ServerSpec("run", 16, 20_000)
    auto = server_bytes(MiningRequirements(table=True), many, 10)
    assert auto.index == index_bytes("ivf_fp16", 20_000, 16) and auto.build > auto.index
    assert server_bytes(MiningRequirements(table=True), replace(many, capacity=8000), 10).index == 0
