"""cluster/compose.yaml without containers: its commands as processes of this machine, a job that finishes and one that is stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.store import Store
from pipeline.storage import Folder
from pipeline.storage.s3 import S3
from tests.cluster.nodes import free_port, reachable, wait_for
from tests.cluster_files.test_shipped import shipped
from tests.s3 import s3_server
from tests.stubs import tiny_values

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
PROGRAMS = Path(sys.executable).parent


@dataclass
class Cluster:
    """What compose would have started.

    Attributes:
        environment: of a service; the address that `ray job` takes is in it.
        submitter: of the machine outside: the token and the address only.
        folder: for what a job uploads.
    """

    environment: dict[str, str]
    submitter: dict[str, str]
    folder: Path

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAMS / "ray", "job", *arguments],
            env=self.submitter,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def submit(self, *arguments: str, settings: list[str]) -> subprocess.CompletedProcess[str]:
        words = [word for setting in settings for word in ("--set", setting)]
        train = [sys.executable, "-m", "pipeline.train", "recipe.yaml", *words]
        return self.job("submit", "--working-dir", str(self.folder), *arguments, "--", *train)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Head, workers, bucket and S3 server, by the commands and variables of the file; ports and paths are free ones."""
    services = yaml.safe_load(shipped("compose.yaml"))["services"]
    folder = tmp_path_factory.mktemp("compose")
    (folder / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    (folder / "auth_token").chmod(0o600)
    port, dashboard = free_port(), free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "AWS"))}
    with s3_server() as endpoint:
        given = {k: v for k, v in services["head"]["environment"].items()} | {
            "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"), "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any",
        }  # fmt: skip
        environment = kept | given | {
            "HOME": str(folder), "RAY_TMPDIR": f"/tmp/c{port}", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at SIGTERM a node waits 30 s otherwise
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        }  # fmt: skip
        subprocess.run(services["bucket"]["command"], env=environment, check=True)
        nodes = []

        def start(name: str) -> None:
            command = [
                {"--port=6379": f"--port={port}", "--address=head:6379": f"--address=127.0.0.1:{port}",
                 "--dashboard-host=0.0.0.0": "--dashboard-host=127.0.0.1",
                 "--object-store-memory=1000000000": "--object-store-memory=200000000"}.get(word, word)
                for word in services[name]["command"]
            ]  # fmt: skip
            own = [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
            if name == "head":
                own += [f"--dashboard-port={dashboard}", f"--temp-dir=/tmp/c{port}", "--node-ip-address=127.0.0.1"]
            else:
                own += [f"--node-ip-address=127.0.0.{2 + len(nodes)}"]
            log = (folder / f"{name}{len(nodes)}.log").open("w")
            nodes.append(
                subprocess.Popen([*command, *own], env=environment, stdout=log, stderr=log, start_new_session=True)
            )

        try:
            start("head")
            wait_for(lambda: reachable(dashboard), 60, "the head's dashboard")
            health = [
                word.replace("head:6379", f"127.0.0.1:{port}") for word in services["head"]["healthcheck"]["test"][1:]
            ]
            subprocess.run(health, env=environment, check=True, capture_output=True)
            for _ in range(services["worker"]["deploy"]["replicas"]):
                start("worker")
            submitter = kept | {
                "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
                "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", "HOME": str(folder),
            }  # fmt: skip
            yield Cluster(environment, submitter, folder / "job")
        finally:
            for node in nodes:
                os.killpg(node.pid, signal.SIGTERM)
            for node in nodes:
                node.wait(timeout=90)


@pytest.fixture
def bucket(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    for name, value in cluster.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    S3.clear_instance_cache()
    yield Folder("s3://raydml")
    S3.clear_instance_cache()


def test_a_job_finishes_and_another_one_is_stopped_with_a_checkpoint(
    cluster: Cluster, bucket: Folder, store: Store
) -> None:
    for name in store.folder.find():
        bucket.write(f"data/tiny/{name}", store.folder.read(name))
    cluster.folder.mkdir()
    values: dict[str, Any] = tiny_values("s3://raydml", "s3://raydml/data/tiny", {"runtime.workers": 2})
    (cluster.folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    deadline = time.monotonic() + 60
    while "No available agent" in (done := cluster.submit(settings=["name=whole", "length=4 steps"])).stderr:
        assert time.monotonic() < deadline  # the dashboard listens some seconds before it can run jobs
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert bucket.exists("runs/whole/summary.json")

    wrong = cluster.submitter | {"RAY_AUTH_TOKEN_PATH": str(cluster.folder / "recipe.yaml")}
    refused = subprocess.run([PROGRAMS / "ray", "job", "list"], env=wrong, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "uthenticat" in refused.stdout + refused.stderr

    settings = ["name=stopped", "length=100000 steps", "checkpoint.every=100000 steps"]
    assert cluster.submit("--no-wait", "--submission-id", "stopped", settings=settings).returncode == 0
    wait_for(lambda: bucket.exists("runs/stopped/metrics.jsonl"), 240, "the second job's first steps")
    assert max(saved_steps(bucket), default=0) == 0
    done = cluster.job("stop", "stopped")
    assert done.returncode == 0 and "was stopped" in done.stdout, done.stdout + done.stderr
    assert saved_steps(bucket)[-1] > 0


def saved_steps(bucket: Folder) -> list[int]:
    """Steps of the whole checkpoints of the run that is stopped."""
    names = (re.match(r"runs/stopped/checkpoints/step-(\d+)/checkpoint\.json", name) for name in bucket.find())
    return sorted(int(found[1]) for found in names if found)
