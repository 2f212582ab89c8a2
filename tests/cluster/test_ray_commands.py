"""The commands and jobs, against real Ray: drivers that are killed, faults of the storage, `ray job submit`, the real demo."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline import prepare
from pipeline.config import Config, build_config
from pipeline.data import own_images
from pipeline.data.store import Store
from pipeline.distributed.jobs import run_serially
from pipeline.recipes import DEFAULT_PRESET
from pipeline.runs.checkpoint import Checkpoints
from pipeline.storage import Folder
from pipeline.storage.s3 import S3
from pipeline.training.launch import run_in_process
from tests.browser import screenshot
from tests.cluster.nodes import wait_for
from tests.cluster.test_ray import silent, tensors
from tests.s3 import Proxy, s3_server
from tests.stubs import tiny_values

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


def command(recipe: Path, *settings: str) -> list[str]:
    out = [sys.executable, "-m", "pipeline.train", str(recipe)]
    for setting in settings:
        out += ["--set", setting]
    return out


def write_recipe(tmp_path: Path, store: Store, **changes: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_values(str(tmp_path), store.folder.uri, changes)))
    return path


def logged_steps(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
def test_a_killed_driver_and_a_terminated_one_continue_to_the_same_weights(
    ray_here: Any, store: Store, tmp_path: Path
) -> None:
    """SIGKILL of the driver, then SIGTERM (saved, status 143), then the same command to the end: as if nothing had been.

    The drivers are other programs on the cluster of this module, whose Ray outlives them.
    """
    settings = ["runtime.workers=1", "length=8 epochs", "checkpoint.every=2 steps"]
    environment = os.environ | {"RAY_ADDRESS": ray_here.get_runtime_context().gcs_address}
    recipe = write_recipe(tmp_path, store)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    first = subprocess.Popen(command(recipe, *settings), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: logged_steps(metrics) >= 4, 120, "step 4")
    first.kill()
    first.wait()
    before = logged_steps(metrics)
    second = subprocess.Popen(command(recipe, *settings), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: logged_steps(metrics) > before + 3, 120, "progress after the kill")
    second.terminate()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 143, errors
    assert "the same command continues" in errors.split("stopping: saving a checkpoint ...\n")[1]
    saved = Checkpoints(Folder(tmp_path / "runs" / "tiny")).latest()
    assert saved is not None and saved.step > 0 and not saved.finished
    done = subprocess.run(command(recipe, *settings), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {saved.step}" in done.stderr
    values = tiny_values(
        str(tmp_path), store.folder.uri, {"name": "whole", "length": "8 epochs", "checkpoint.every": "2 steps"}
    )
    run_in_process(build_config(values), store.folder.uri, silent)
    whole, broken = (json.loads((tmp_path / "runs" / n / "summary.json").read_text()) for n in ("whole", "tiny"))
    assert whole["final"] == broken["final"] and whole["step"] == broken["step"]
    from safetensors.torch import load_file

    for name in ("trunk", "method"):
        path = f"checkpoints/step-{whole['step']:08d}/{name}.safetensors"
        one, other = load_file(tmp_path / "runs" / "whole" / path), load_file(tmp_path / "runs" / "tiny" / path)
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_workers_in_object_storage_with_faults(
    store: Store, tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Store, run folder and Ray Train's own notes: the weights of one process on a local disk."""
    here = make_config({"length": "1 epochs", "precision": "float64"})
    run_in_process(here, store.folder.uri, silent)
    with s3_server() as endpoint:
        proxy = Proxy(endpoint)
        for name, value in {"AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-test",
                            "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        S3.clear_instance_cache()
        S3().mkdir("bucket")
        for name in store.folder.find():
            Folder("s3://bucket/data/tiny").write(name, store.folder.read(name))
        for kind, method, key in (("answer", "PUT", "/ray/"), ("reset", "HEAD", "/ray/"), ("answer", "GET", "manifest.json"),
                                  ("cut", "GET", "shards/"), ("lost", "PUT", "checkpoint.json")):  # fmt: skip
            proxy.inject(kind, method, key)
        settings = {"storage": "s3://bucket", "data.source": "tiny", "length": "1 epochs", "runtime.workers": 2}
        recipe = write_recipe(tmp_path, store, **settings)
        environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command(recipe), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert [fault.key for fault in proxy.faults if not fault.hit.is_set()] == []
        there = tensors(here.model_copy(update={"storage": "s3://bucket"}))
        torch.testing.assert_close(there, tensors(here), rtol=1e-9, atol=1e-12)
        bucket = Folder("s3://bucket")
        assert [name for name in bucket.find() if b"s3cr3t-of-test" in bucket.read(name)] == []
        proxy.close()
    S3.clear_instance_cache()


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    ray = str(Path(sys.executable).parent / "ray")
    job = [ray, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, "-m", "pipeline.train", *arguments]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=300)
        starting = "No available agent" in done.stderr  # the dashboard listens some seconds before it can run jobs
        if not starting or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_ray_job_submit_runs_the_same_program(store: Store, tmp_path: Path, head: dict[str, str]) -> None:
    """The submitted job trains on the cluster; its status and last line are the run's own; results are in the storage."""
    recipe = write_recipe(
        tmp_path, store, **{"storage": "", "runtime.workers": 1, "length": "1 epochs", "runtime.loader": "ray"}
    )
    with ThreadPoolExecutor(1) as beside:
        refused = beside.submit(submit, head, str(recipe), "--set", "method.optimizer.lrr=1")
        done = submit(head, str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting Ray on the cluster" in done.stdout
    run = tmp_path / "storage" / "runs" / "tiny"
    assert json.loads((run / "summary.json").read_text())["step"] > 0
    assert (run / "report.html").exists()
    assert "tiny" in train_tab(head), "Ray Train's state tracking is on where there is a dashboard"
    shipped = next(
        Path(head["RAY_TMPDIR"]).glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*/pipeline")
    ).parent
    names = {p.name for p in shipped.iterdir()}
    assert {"methods", "pipeline"} <= names and not {".venv", ".git", "tests", "runs"} & names
    files = [p for p in shipped.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]  # those are made there
    sizes = [p.stat().st_size for p in files]
    assert sum(sizes) < 3 << 20

    wrong = refused.result()
    assert wrong.returncode != 0
    ours = [line for line in wrong.stdout.splitlines() if line.startswith("error:")]
    assert set(ours) == {"error: unknown key 'method.optimizer.lrr': did you mean 'method.optimizer.lr'?"}


def train_tab(environment: dict[str, str]) -> list[str]:
    """Names of the runs that the tab Train of the dashboard shows."""
    token = (Path(environment["HOME"]) / ".ray" / "auth_token").read_text()
    address = f"{environment['RAY_ADDRESS']}/api/train/v2/runs/v1"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [run["name"] for run in json.load(answer)["train_runs"]]


def hash_of(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[1]


@pytest.mark.slow
def test_the_real_command_on_real_emoji(tmp_path: Path) -> None:
    """Two workers, a few steps, the shipped preset, real drawings and weights; then the report in a real browser."""
    environment = os.environ | {"RAYDML_HOME": str(tmp_path)}
    drawings = [e for e in own_images.emoji() if hash_of(e.class_name) < 0x10]  # every sixteenth emoji
    data = prepare.prepare("emoji", drawings, Folder(tmp_path / "subset"), run_serially)
    settings = [
        f"data.source={data.folder}",
        "length=4 steps",
        "runtime.workers=2",
        "runtime.cpus_per_worker=1",
        "method.classes_per_batch=12",
    ]
    arguments = [sys.executable, "-m", "pipeline.train", DEFAULT_PRESET]
    for setting in settings:
        arguments += ["--set", setting]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "frozen" in done.stdout and "report:" in done.stdout
    summary = json.loads((tmp_path / "runs" / "emoji" / "summary.json").read_text())
    assert summary["step"] == 4 and summary["frozen"]["recall@1"] > 30
    assert {"recall@1", "map@r", "r_precision", "nmi", "ami"} <= set(summary["final"])
    red, green, blue = np.moveaxis(
        screenshot((tmp_path / "runs" / "emoji" / "report.html").read_text(), tmp_path).astype(int), 2, 0
    )
    right, wrong = (green - red > 60) & (green - blue > 40), (red - green > 100) & (red - blue > 100)
    assert right.sum() > 5000 and wrong.sum() > 5000  # frames of both kinds
