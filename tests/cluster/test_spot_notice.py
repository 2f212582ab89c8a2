"""A real Ray node is drained by the watcher, with token authentication."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from tests.cluster.nodes import wait_for
from tests.pipeline.distributed.test_spot_notice import Aws, Metadata, in_two_minutes

pytestmark = pytest.mark.cluster
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a worker node on this machine, in a process of their own: Ray keeps its token for a process's lifetime."""
    code = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1, resources={"spot": 1})
print(cluster.address, node.node_id, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(TOKEN), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    yield tuple(process.stdout.readline().split())
    process.stdin.close()
    process.wait(60)


def environment(token: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


def watch(token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.distributed.spot_notice", *arguments]
    return subprocess.run(command, env=environment(token), capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.slow
def test_another_token_drains_nothing(cluster: Any) -> None:
    address, node = cluster
    end = in_two_minutes() - timedelta(seconds=117)
    server = Metadata(Aws(f'{{"action": "terminate", "time": "{end:%Y-%m-%dT%H:%M:%SZ}"}}', at=1))
    others = "f" * 32
    done = watch(others, "--cloud", "aws", "--metadata-url", server.url, "--address", address, "--node-id", node)
    server.close()
    assert done.returncode == 1 and f"error: node {node} could not be drained at {address}" in done.stderr
    assert "Unauthenticated" in done.stderr and others not in done.stdout + done.stderr


ASK = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
for node in ray.nodes():
    print(node["NodeID"], node["Alive"], node["DeathReasonMessage"])
"""


def test_a_notice_drains_the_node(cluster: Any) -> None:
    address, node = cluster
    server = Metadata(Aws(f'{{"action": "terminate", "time": "{in_two_minutes():%Y-%m-%dT%H:%M:%SZ}"}}', at=1))
    arguments = ["--cloud", "aws", "--metadata-url", server.url, "--address", address, "--node-id", node]
    done = watch(TOKEN, *arguments)
    server.close()
    assert done.returncode == 0 and f"draining node {node}" in done.stdout, done.stderr

    def left() -> bool:
        said = subprocess.run(
            [sys.executable, "-c", ASK, address], env=environment(TOKEN), capture_output=True, text=True, check=False
        ).stdout
        return f"{node} False spot instance: terminate at" in said

    wait_for(left, 30, "the node's end")
