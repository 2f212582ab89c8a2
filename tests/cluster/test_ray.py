"""The parts that need Ray, against real Ray, started once."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import prepare
from pipeline.config import Config, build_config, to_yaml
from pipeline.data import loader, own_images
from pipeline.data.entries import Entry
from pipeline.data.loader import LoadRequest, load
from pipeline.data.store import Store
from pipeline.data.write_store import Shard, plan_shards
from pipeline.distributed.jobs import run_on_ray as map_on_ray
from pipeline.distributed.jobs import run_serially
from pipeline.errors import RunError, UserError
from pipeline.inference import embed
from pipeline.inference.trained_model import TrainedModel
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CONFIG, run_folder
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_images, write_tiny_store
from pipeline.training.launch import run_in_process
from pipeline.training.parts import image_source
from pipeline.training.ray_train import run_on_ray

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


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
    runtime = config.runtime.model_copy(update={"gpus_per_worker": 1})
    with_gpu = config.model_copy(update={"runtime": runtime, "precision": "float32"})
    run_folder(config).write(CONFIG, to_yaml(with_gpu).encode())
    trained = TrainedModel(run_folder(config), store.folder.uri, store.fingerprint, "checkpoints", 2)
    monkeypatch.setattr(embed, "ROWS_PER_FILE", 7)
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
        list(map_on_ray(embed.EmbedTask(trained, ("test",), there), [range(3)], actors=1))


@pytest.mark.slow
def test_prepare_is_the_same_on_ray_and_in_process(ray_here: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "images", {f"class{i}": 2 + i % 3 for i in range(10)}, seed=1)
    (tmp_path / "images" / "class3" / "broken.png").write_bytes(b"no image")
    entries = own_images.folder(str(tmp_path / "images")).entries
    options: dict[str, Any] = {"images_per_shard": 6, "max_rejected": 0.1}
    here = prepare.prepare("x", entries, Folder(tmp_path / "here"), run_serially, **options)
    there = prepare.prepare("x", entries, Folder(tmp_path / "there"), map_on_ray, **options)
    assert there.manifest == here.manifest
    assert len(there.manifest["shards"]) > 3
    assert "broken.png" in (tmp_path / "there" / "rejected.csv").read_text()


def refuse(shard: Shard) -> dict[str, Any]:
    raise RunError(f"{shard.file} cannot be written")


def test_an_error_of_a_task_of_prepare_arrives_as_it_is(ray_here: Any) -> None:
    shards = plan_shards([Entry("x.png", "c", "train")], num_folds=2, images_per_shard=4)
    with pytest.raises(RunError, match=r"^shards/train-00000\.parquet cannot be written$"):
        list(map_on_ray(refuse, shards))


def test_both_loaders_give_the_same_pixels_in_the_same_order(
    ray_here: Any, store: Store, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "REQUESTS_PER_PIPELINE", 12)  # two pipelines
    config = make_config()
    source = image_source(config, store)
    random = np.random.default_rng(0)
    ids = store.select(["train"]).ids
    items = [LoadRequest(random.choice(ids, 5), (0, step, 3)) for step in range(21)] + [
        LoadRequest(ids[:3]),
        LoadRequest(ids[3:10]),
    ]
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
    items = [LoadRequest(ids[:5], (0, step, 0)) for step in range(200)]
    stream = load(image_source(make_config(), store), items, "ray")
    next(stream)
    before = len(rests)
    time.sleep(1)
    assert before > 0 and len(rests) - before <= 1 / loader.PAUSE_S
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
        seen.extend(state["messages"])
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
            lambda s: starts.extend(s["messages"]),
            ray_here,
        )
    assert not any("resumed" in notice for notice in starts)
    assert run_folder(config).read_json("incarnation") == 1


def test_a_request_beyond_the_cluster_is_refused(
    ray_here: Any, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.errors import UserError
    from pipeline.training.checks import check_cluster

    monkeypatch.setenv("RAY_ADDRESS", "here")
    with pytest.raises(UserError, match=r"808 CPUs requested .* at most 6"):
        check_cluster(on_ray(make_config(), workers=101, cpus_per_worker=8, loader="in_process"), ray_here)
    check_cluster(on_ray(make_config(), loader="in_process"), ray_here)
