"""Runs in object storage with faults: the same weights as without, also after a kill while a checkpoint is uploaded."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline import train
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.training import start
from tests.pipeline.conftest import Base
from tests.pipeline.storage.conftest import SECRET, copy_store
from tests.pool import Program
from tests.s3 import Proxy

pytestmark = pytest.mark.usefixtures("fresh_readers")


def left(run: Folder) -> dict[str, Any]:
    """What equal runs have in common."""
    step = Checkpoints(run).steps()[-1]
    files = ("trunk.safetensors", "method.safetensors", "optimizers.pt")
    weights = {name: run.read(f"checkpoints/step-{step:08d}/{name}") for name in files}
    lines = [{k: v for k, v in line.items() if k not in ("images_per_second", "waiting")} for line in read_metrics(run)]
    return weights | {"lines": lines, "final": run.read_json("summary.json")["final"]}


@pytest.fixture
def recipe(base: Base, place: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run of `base` with store and storage behind the proxy."""
    return base.recipe(
        {
            "storage": place.uri,
            "data.source": copy_store(base.store, place / "data" / "x").uri,
            "cache.folder": str(tmp_path / "cache"),
            "checkpoint.every": "2 steps",
        }
    )


def test_a_run_among_faults(recipe: str, base: Base, place: Folder, proxy: Proxy, capfd: pytest.CaptureFixture) -> None:
    for kind, method, key in (
        ("answer", "GET", "manifest.json"), ("cut", "GET", "shards/train-00000"), ("short", "GET", "shards/test"),
        ("answer", "HEAD", "incarnation"), ("reset", "PUT", "trunk.safetensors"), ("upload cut", "PUT", "optimizers.pt"),
        ("lost", "PUT", "checkpoint.json"), ("answer", "GET", "prefix=.*checkpoints"), ("lost", "POST", "delete"),
        ("reset", "PUT", "metrics.jsonl"), ("cut", "GET", "summary.json"), ("answer", "PUT", "report.html"),
    ):  # fmt: skip
        proxy.inject(kind, method, key)
    assert train.main([recipe]) == 0
    assert [fault.key for fault in proxy.faults if not fault.hit.is_set()] == []
    run = place / "runs" / "done"
    assert left(run) == left(base.run)
    order = [target.rsplit("/", 1)[1] for method, target in proxy.requests if method == "PUT"]
    lines, done = order.index("metrics.jsonl", order.index("optimizers.pt")), order.index("checkpoint.json")
    assert lines < done, "whoever resumes from a checkpoint finds its lines"
    said = "".join(capfd.readouterr()).encode()
    written = {name: run.read(name) for name in run.find()} | {"printed": said, "recipe": Path(recipe).read_bytes()}
    assert "report.html" in written and "config.yaml" in written
    assert [name for name, data in written.items() if SECRET.encode() in data] == []


def test_a_run_killed_while_it_uploads_a_checkpoint(
    recipe: str, base: Base, place: Folder, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:  # fmt: skip
    """By SIGKILL, in a process that gets endpoint and credentials from its environment."""
    monkeypatch.setattr(start, "write_report", lambda run, store: run.write("report.html", b""))
    stuck = proxy.inject("stall", "PUT", "checkpoints/step-00000004/method.safetensors")
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "RAYDML_"))}
    program = Program([recipe], str(tmp_path / "log"), environment=environment)
    assert stuck.hit.wait(60), program.output()
    program.signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    proxy.reset()
    run = place / "runs" / "done"
    assert run.names("checkpoints/step-00000004") == ["trunk.safetensors"]
    assert Checkpoints(run).steps() == [0, 2]
    capsys.readouterr()
    assert train.main([recipe]) == 0
    assert "resumed at step 2" in capsys.readouterr().err
    assert left(run) == left(base.run)
    assert SECRET not in program.output()
