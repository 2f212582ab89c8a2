"""Every row about a node, passing and failing, from facts that are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.diagnosis import node_rows
from pipeline.diagnosis.node_facts import NodeFacts
from pipeline.diagnosis.rows import Row

GB = 1 << 30
VERSIONS = {
    "python": "3.11.7",
    "raydml": "0.1.0, code aa",
    "torch": "2.9",
    "torchvision": "0.24",
    "ray": "2.60",
    "faiss": "1.15",
}
GOOD = NodeFacts(
    "10.0.0.1", versions=VERSIONS, resources={"CPU": 8.0}, cores=8, memory_bytes=32 * GB, free_memory_bytes=30 * GB,
    storage_free_bytes=50 * GB, cache_free_bytes=50 * GB, shm_bytes=8 * GB, shm_free_bytes=8 * GB, open_files=(65536, 65536),
)  # fmt: skip
GPU = ("L4", 24 * GB)


def other(**changes: Any) -> NodeFacts:
    return replace(GOOD, node="10.0.0.2", **changes)


def status(rows: list[Row]) -> list[str]:
    return [row.status for row in rows]


def test_equal_rows_stand_once_and_name_their_nodes() -> None:
    nodes = [replace(GOOD, node=f"10.0.0.{i}", cache_free_bytes=0 if i > 2 else GB) for i in range(1, 10)]
    good, bad = node_rows.cache(nodes, "/c", GB, 10 * GB)
    assert good.found == "/c: 1.1 GB free (10.0.0.1, 10.0.0.2)"
    assert bad.found == "/c: 0 MB free (10.0.0.3, 10.0.0.4, 10.0.0.5, 10.0.0.6 and 3 more)"
    assert node_rows.cache(nodes[:2], "/c", GB, 10 * GB)[0].found.endswith("(all 2 nodes)")
    assert node_rows.cache(nodes[:1], "/c", GB, 10 * GB)[0].found == "/c: 1.1 GB free"


def test_a_node_that_does_not_answer() -> None:
    silent = NodeFacts("10.0.0.3", error="no answer within 150 s")
    assert node_rows.answers([GOOD]) == []
    (row,) = node_rows.answers([GOOD, silent])
    assert row.status == "fails" and row.found == "10.0.0.3: no answer within 150 s" and row.change
    assert status(node_rows.cache([GOOD, silent], "/c", GB, 2 * GB)) == ["ok"], (
        "it is not judged by facts it did not give"
    )


@pytest.mark.parametrize(
    ("changed", "expected", "found"),
    [
        ({}, "ok", "timm"),
        ({"python": "3.11.9"}, "warning", "python 3.11.9"),
        ({"python": "3.12.1"}, "fails", "python 3.12.1"),
        ({"torchvision": "0.25"}, "warning", "torchvision 0.25"),
        ({"torch": "2.10"}, "fails", "torch 2.10"),
        ({"ray": "2.59"}, "fails", "ray 2.59"),
        ({"raydml": "0.1.0, code bb"}, "fails", "raydml 0.1.0, code bb"),
        ({"timm": None}, "warning", "timm None"),
    ],
)
def test_versions(changed: dict[str, str | None], expected: str, found: str) -> None:
    driver = replace(GOOD, versions=VERSIONS | {"timm": "1.0"})
    theirs = {name: v for name, v in (driver.versions | changed).items() if v is not None}
    (row,) = node_rows.versions([other(versions=theirs)], driver)
    assert row.status == expected and found in row.found and bool(row.change) == (expected != "ok")


def test_imports() -> None:
    (row,) = node_rows.versions([other(errors={"faiss": "ImportError: libcublas.so.12"})], GOOD)
    assert row.check == "imports" and row.status == "fails" and "faiss: ImportError: libcublas.so.12" in row.found


@pytest.mark.parametrize(
    ("node", "asked", "expected"),
    [
        (other(), (0, 0), ["ok"]),
        (other(torch_gpus=(GPU,), faiss_gpus=1, resources={"GPU": 1.0}), (1, 1), ["ok"]),
        (other(resources={"GPU": 1.0}), (1, 0), ["fails", "warning"]),  # Ray offers what torch does not see
        (other(torch_gpus=(GPU, GPU), faiss_gpus=2, resources={"GPU": 1.0}), (1, 0), ["warning"]),
        (other(torch_gpus=(GPU,), faiss_gpus=0, resources={"GPU": 1.0}), (0, 1), ["warning"]),
        (other(torch_gpus=(GPU,), faiss_gpus=0, resources={"GPU": 1.0}), (1, 0), ["ok"]),
        (other(), (1, 0), ["ok", "warning"]),  # a cluster may start nodes with GPUs
        (other(resources=None), (1, 0), ["ok", "fails"]),  # a machine cannot
        (other(resources=None), (0, 0.5), ["ok", "fails"]),
    ],
)
def test_devices(node: NodeFacts, asked: tuple[float, float], expected: list[str]) -> None:
    assert status(node_rows.devices([node], *asked)) == expected


def test_storage() -> None:
    assert status(node_rows.storage([GOOD], "/s", GB)) == ["ok", "ok"]
    bad = [other(storage_error="PermissionError: /s"), other(sees_probe=False)]
    for node, said in zip(bad, ["PermissionError: /s", "another folder here"], strict=True):
        rows = node_rows.storage([GOOD, node], "/s", GB)
        assert status(rows) == ["ok", "fails", "ok"] and said in rows[1].found and "10.0.0.2" in rows[1].found
    _, disk = node_rows.storage([other(storage_free_bytes=GB)], "/s", 2 * GB)
    assert disk.status == "fails" and "checkpoint.keep" in disk.change
    assert node_rows.storage([other(storage_free_bytes=3 * GB)], "/s", 2 * GB)[1].status == "warning"
    assert node_rows.storage([other(storage_free_bytes=GB // 2)], "/s", None)[1].status == "warning"
    assert len(node_rows.storage([other(storage_free_bytes=None)], "s3://b", GB)) == 1, "object storage has no end"


def test_cache() -> None:
    assert status(node_rows.cache([GOOD], "/c", GB, 10 * GB)) == ["ok"]
    assert status(node_rows.cache([other(cache_free_bytes=GB // 2)], "/c", GB, 10 * GB)) == ["fails"]
    assert status(node_rows.cache([other(cache_free_bytes=0, cached=True)], "/c", GB, 10 * GB)) == ["ok"]
    assert status(node_rows.cache([other(cache_error="read-only")], "/c", GB, 10 * GB)) == ["fails"]
    (row,) = node_rows.cache([other(cache_free_bytes=0)], "/c", None, 10 * GB)
    assert row.status == "ok" and "not known" in row.expected
    (row,) = node_rows.cache([GOOD], "/c", 20 * GB, 10 * GB)
    assert row.status == "warning" and "cache.max_bytes" in row.change


def test_limits() -> None:
    assert status(node_rows.limits([GOOD], uses_ray=True)) == ["ok", "ok"]
    assert status(node_rows.limits([GOOD], uses_ray=False)) == ["ok"], "/dev/shm is Ray's"
    assert status(node_rows.limits([other(shm_bytes=64 << 20)], uses_ray=True)) == ["warning", "ok"]
    assert status(node_rows.limits([other(shm_free_bytes=1 << 20)], uses_ray=True)) == ["warning", "ok"]
    assert status(node_rows.limits([other(shm_bytes=None)], uses_ray=True)) == ["warning", "ok"]
    assert status(node_rows.limits([other(open_files=(256, 256))], uses_ray=True)) == ["ok", "warning"], (
        "a run of one worker goes on"
    )
    assert status(node_rows.limits([other(open_files=(256, 4096))], uses_ray=True)) == ["ok", "ok"]
    assert status(node_rows.limits([other(open_files=(256, 4096))], uses_ray=False)) == ["warning"]


@pytest.mark.parametrize(
    ("off", "error", "object_storage", "expected"),
    [
        (0.5, 0.01, True, "ok"), (-3.0, 0.1, True, "warning"), (3.0, 2.0, True, "ok"), (0.0, float("inf"), True, "warning"),
        (3600.0, 0.1, True, "fails"), (-3600.0, 0.1, True, "fails"), (3600.0, 0.1, False, "warning"),
    ],
)  # fmt: skip
def test_clocks(off: float, error: float, object_storage: bool, expected: str) -> None:
    (row,) = node_rows.clocks([other(clock_s=off, clock_error_s=error)], object_storage)
    assert row.status == expected and (expected == "ok" or row.change)


@pytest.mark.parametrize(
    ("is_open", "listens", "address", "expected"),
    [
        (False, ("0.0.0.0",), "10.0.0.1:6379", "ok"),
        (True, ("0.0.0.0",), "10.0.0.1:6379", "fails"),
        (True, ("::",), "127.0.0.1:6379", "fails"),
        (True, ("127.0.0.1",), "127.0.0.1:6379", "warning"),
        (True, (), "10.0.0.1:6379", "fails"),  # the node that would know did not answer
        (True, (), "127.0.0.1:6379", "warning"),
    ],
)
def test_authentication(is_open: bool, listens: tuple[str, ...], address: str, expected: str) -> None:
    row = node_rows.authentication(is_open, address, [GOOD, other(gcs_addresses=listens)])
    assert row.status == expected and ("RAY_AUTH_MODE=token" in row.change) == is_open
