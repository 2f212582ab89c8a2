"""A cluster's head node, for tests that submit jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import free_port, reachable, wait_for


@pytest.fixture(scope="module")
def ending() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Nodes that were told to end, which takes them seconds: waited for when all else is done."""
    nodes: list[subprocess.Popen[bytes]] = []
    yield nodes
    for node in nodes:
        node.wait(timeout=90)


@pytest.fixture
def head(tmp_path: Path, ending: list[subprocess.Popen[bytes]]) -> Iterator[dict[str, str]]:
    """A head node of its own, with token authentication and its own HOME; gives the environment that reaches it."""
    home, port, dashboard = tmp_path / "home", free_port(), free_port()
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYDML_"))}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": f"/tmp/h{port}",
                    "RAYDML_HOME": str(tmp_path / "storage"), "OMP_NUM_THREADS": "1",
                    "RAY_JOB_STOP_WAIT_TIME_S": "60",
                    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # at SIGTERM a node waits 30 s otherwise  # fmt: skip
    ray = str(Path(sys.executable).parent / "ray")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    start = [ray, "start", "--head", "--block", "--num-cpus=5", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={free_port()}",  # another Ray of this machine may have the default one
             "--include-dashboard=true", "--disable-usage-stats", f"--temp-dir=/tmp/h{port}"]  # fmt: skip
    node = subprocess.Popen(
        start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(lambda: reachable(dashboard), 60, "the head's dashboard")
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        ending.append(node)
