"""The parts that need Ray, against real Ray: one start for most tests, own processes where the driver or a job is the subject."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline import embed, prepare
from pipeline.checkpoint import Checkpoints
from pipeline.config import DEFAULT_PRESET, Config, build_config
from pipeline.data import catalog, loader
from pipeline.data.catalog import Entry
from pipeline.data.loader import Item, load
from pipeline.data.store import Shard, Store, layout
from pipeline.errors import RunError, UserError
from pipeline.jobs import run_here
from pipeline.jobs import run_on_ray as map_on_ray
from pipeline.launch import run_in_process, run_on_ray
from pipeline.s3 import S3
from pipeline.storage import Folder
from pipeline.summary import run_folder
from pipeline.trained import Trained
from pipeline.worker import pixel_source
from tests.conftest import write_images, write_tiny_store
from tests.pipeline.test_report import screenshot
from tests.s3 import Proxy, s3_server
from tests.stubs import tiny_values

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """One Ray for the module, with more logical CPUs than cores."""
    from pipeline.session import ray_session

    with ray_session(6) as ray:
        yield ray


def silent(_: dict[str, Any]) -> None:
    pass


def tensors(config: Config) -> dict[str, torch.Tensor]:
    """Weights of a run's newest checkpoint, by file and name."""
    from safetensors.torch import load as load_tensors

    folder = run_folder(config)
    base = f"checkpoints/step-{Checkpoints(folder).steps()[-1]:08d}"
    names = ("trunk.safetensors", "method.safetensors")
    return {f"{n}/{k}": v for n in names for k, v in load_tensors(folder.read(f"{base}/{n}")).items()}


def on_ray(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"workers": 2, **changes})})


def test_embeddings_are_the_same_on_ray_and_in_process(ray_here: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Parts of a finished run's images, embedded by two processes; errors of a part come back as they are."""
    store = write_tiny_store(tmp_path)
    config = build_config(tiny_values(str(tmp_path), store.folder.uri, {"name": "done", "length": "2 steps"}))
    run_in_process(config, store.folder.uri, silent)
    elsewhere = config.model_copy(update={"runtime": config.runtime.model_copy(update={"gpus_per_worker": 1})})
    trained = Trained(run_folder(config), elsewhere, store.folder.uri, store.fingerprint, "checkpoints", 2)
    monkeypatch.setattr(embed, "PART", 7)
    here, there = (Folder(tmp_path / name) for name in ("here", "there"))
    found = [embed.embed(trained, ("train", "test"), to, workers) for to, workers in ((here, 0), (there, 2))]
    assert found[0] == found[1] and found[0]["parts"] > 2
    for name in here.names():
        if name.endswith(".parquet"):
            one, other = (pq.read_table(io.BytesIO(folder.read(name))) for folder in (here, there))
            assert one.drop_columns(["embedding"]).equals(other.drop_columns(["embedding"]))
            x, y = (np.stack(t["embedding"].to_numpy()) for t in (one, other))
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    store.folder.write(
        "manifest.json", store.folder.read("manifest.json").replace(store.fingerprint.encode(), b"0" * 16)
    )
    with pytest.raises(UserError, match="has changed since the run"):
        list(map_on_ray(embed.Part(trained, ("test",), there), [range(3)], actors=1))


@pytest.mark.slow
def test_prepare_is_the_same_on_ray_and_in_process(ray_here: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "images", {f"class{i}": 2 + i % 3 for i in range(10)}, seed=1)
    (tmp_path / "images" / "class3" / "broken.png").write_bytes(b"no image")
    entries = catalog.folder(str(tmp_path / "images"))
    options: dict[str, Any] = {"images_per_shard": 6, "max_rejected": 0.1}
    here = prepare.prepare("x", entries, Folder(tmp_path / "here"), run_here, **options)
    there = prepare.prepare("x", entries, Folder(tmp_path / "there"), map_on_ray, **options)
    assert there.manifest == here.manifest
    assert len(there.manifest["shards"]) > 3
    assert "broken.png" in (tmp_path / "there" / "rejected.csv").read_text()


def refuse(shard: Shard) -> dict[str, Any]:
    raise RunError(f"{shard.file} cannot be written")


def test_an_error_of_a_task_of_prepare_arrives_as_it_is(ray_here: Any) -> None:
    shards = layout([Entry("x.png", "c", "train")], num_folds=2, images_per_shard=4)
    with pytest.raises(RunError, match=r"^shards/train-00000\.parquet cannot be written$"):
        list(map_on_ray(refuse, shards))


def test_both_loaders_give_the_same_pixels_in_the_same_order(
    ray_here: Any, store: Store, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIPELINE_ITEMS", 12)  # two pipelines
    config = make_config()
    source = pixel_source(config, store)
    random = np.random.default_rng(0)
    ids = store.select(["train"]).ids
    items = [Item(random.choice(ids, 5), (0, step, 3)) for step in range(21)] + [Item(ids[:3]), Item(ids[3:10])]
    ours = list(load(source, items, "ray", loader_cpus=2))
    for mine, theirs in zip(ours, load(source, items, "in_process"), strict=True):
        assert torch.equal(mine, theirs)
    assert [len(p) for p in ours] == [5] * 21 + [3, 7]


def test_a_pipeline_that_is_ahead_does_not_spin(
    ray_here: Any, store: Store, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scheduling loop, a thread of this process, rests after every step."""
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        threading.Event().wait(seconds)

    monkeypatch.setattr(loader, "time", types.SimpleNamespace(sleep=rest))
    ids = store.select(["train"]).ids
    items = [Item(ids[:5], (0, step, 0)) for step in range(200)]
    stream = load(pixel_source(make_config(), store), items, "ray")
    next(stream)
    before = len(rests)
    time.sleep(1)
    assert before > 0 and len(rests) - before <= 1 / loader.REST_S
    assert sum(1 for _ in stream) == 199


@pytest.mark.slow
def test_two_ray_workers_one_of_them_killed_give_the_weights_of_one_process(
    ray_here: Any, make_config: Callable[..., Config], store: Store
) -> None:
    """Laws 1 and 3 through the real launcher and loader: SIGKILL of a worker process at a random step.

    Ray Train starts the group again, and it goes on from the newest checkpoint.
    """
    changes = {
        "length": "6 epochs",
        "checkpoint.every": "3 steps",
        "method.optimizer.name": "sgd",
        "method.optimizer.lr": 0.1,
    }
    alone, killed = make_config(changes, name="alone"), on_ray(make_config(changes, name="killed"), loader="ray")
    run_in_process(alone, store.folder.uri, silent)
    wanted = int(np.random.default_rng().integers(4, 12))
    victims: list[int] = []
    seen: list[str] = []

    def kill(state: dict[str, Any]) -> None:
        seen.extend(state["notices"])
        if not victims and state["progress"].get("step", 0) >= wanted:
            victims.extend(train_workers())
            os.kill(victims[0], signal.SIGKILL)

    assert run_on_ray(killed, store.folder.uri, kill, ray_here) is None
    assert len(victims) == 2, "the kill never happened"
    assert any("resumed at step" in notice for notice in seen)
    one, other = tensors(alone), tensors(killed)
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = (other[name] - value).double().norm() / value.double().norm().clamp(min=1e-6)
        assert difference <= 1e-7, f"{name}: {difference:.1e}"  # rounding, grown over the steps of six epochs


def train_workers() -> list[int]:
    """Process ids of this machine's Ray Train workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"RayTrainWorker" in title or b"train_worker" in title:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_run_that_cannot_go_on_ends_at_once_with_its_own_words(
    ray_here: Any, make_config: Callable[..., Config], store: Store
) -> None:
    """A loss that is not finite: no restart, although restarts are allowed; the last good state is kept."""
    config = make_config({"method.optimizer.name": "sgd", "method.optimizer.lr": 1e200, "checkpoint.every": "1 steps"})
    starts: list[str] = []
    with pytest.raises(RunError, match="not finite at step"):
        run_on_ray(
            on_ray(config, loader="in_process", max_failures=3),
            store.folder.uri,
            lambda s: starts.extend(s["notices"]),
            ray_here,
        )
    assert not any("resumed" in notice for notice in starts)
    assert run_folder(config).read_json("incarnation") == 1


def test_a_request_beyond_the_cluster_is_refused(
    ray_here: Any, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.errors import UserError
    from pipeline.session import check_cluster

    monkeypatch.setenv("RAY_ADDRESS", "here")
    with pytest.raises(UserError, match=r"wants 808 CPU .* at most 6"):
        check_cluster(on_ray(make_config(), workers=101, cpus_per_worker=8, loader="in_process"), ray_here)
    check_cluster(on_ray(make_config(), loader="in_process"), ray_here)


# ---- own processes ---------------------------------------------------------------------------------------------------


def command(recipe: Path, *settings: str) -> list[str]:
    out = [sys.executable, "-m", "pipeline.train", str(recipe)]
    for setting in settings:
        out += ["--set", setting]
    return out


def write_recipe(tmp_path: Path, store: Store, **changes: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_values(str(tmp_path), store.folder.uri, changes)))
    return path


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


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
    assert "the same command continues" in errors
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ending() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Nodes that were told to end, which takes them half a minute: waited for when all else is done."""
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
                    "RAYDML_HOME": str(tmp_path / "storage"), "OMP_NUM_THREADS": "1"}  # fmt: skip
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


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
        tmp_path, store, **{"storage": "", "runtime.workers": 2, "length": "1 epochs", "runtime.loader": "ray"}
    )
    done = submit(head, str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting Ray on the cluster" in done.stdout
    run = tmp_path / "storage" / "runs" / "tiny"
    assert json.loads((run / "summary.json").read_text())["step"] > 0
    assert (run / "report.html").exists()
    shipped = next(
        Path(head["RAY_TMPDIR"]).glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*/pipeline")
    ).parent
    names = {p.name for p in shipped.iterdir()}
    assert {"methods", "pipeline"} <= names and not {".venv", ".git", "tests", "runs"} & names
    assert sum(p.stat().st_size for p in shipped.rglob("*") if p.is_file()) < 3 << 20

    wrong = submit(head, str(recipe), "--set", "method.optimizer.lrr=1")
    assert wrong.returncode != 0
    ours = [line for line in wrong.stdout.splitlines() if line.startswith("error:")]
    assert set(ours) == {"error: unknown key 'method.optimizer.lrr': did you mean 'method.optimizer.lr'?"}


def hash_of(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[1]


def test_the_real_command_on_real_emoji(tmp_path: Path) -> None:
    """Two workers, a few steps, the shipped preset, real drawings and weights; then the report in a real browser."""
    environment = os.environ | {"RAYDML_HOME": str(tmp_path)}
    drawings = [e for e in catalog.emoji() if hash_of(e.class_name) < 0x10]  # every sixteenth emoji
    data = prepare.prepare("emoji", drawings, Folder(tmp_path / "subset"), run_here)
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
