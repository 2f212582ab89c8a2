"""Every method on an accelerator, as far as a CPU goes: nothing mixes devices, and the host waits as seldom as it is said here.

A run on `PretendDevice` trains, evaluates, mines, is stopped in the middle of an epoch and continued; it has to end with the weights
and the figures of a run on the CPU. How often a step waits for the device is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.run_status import RunStatus
from pipeline.inference.load_model import load_model
from pipeline.runs.run_folder import run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.testing.pretend_device import DEVICE, MixedDevices, PretendDevice
from pipeline.testing.watched_run import StopAt
from pipeline.training.loop import Worker
from pipeline.training.start import record
from tests.laws.runs import METHODS_TRIED

CASES: dict[str, dict[str, Any]] = METHODS_TRIED | {
    "proxies": {"method.loss": "ProxyAnchorLoss"},
    "matryoshka": {"method.matryoshka": [2, 4]},
    "osm_caa_in_parts": {"method.name": "osm_caa", "model.batch_norm": "frozen", "runtime.images_per_pass": 5},
    "mmsi_in_parts": METHODS_TRIED["mmsi"] | {"runtime.images_per_pass": 5},
    "gca_hng_in_parts": METHODS_TRIED["gca_hng"] | {"model.batch_norm": "frozen", "runtime.images_per_pass": 5},
    "bf16": {"method.name": "osm_caa", "precision": "bf16", "runtime.log_every": 1},
}
CASES["intra_batch"] = METHODS_TRIED["intra_batch"] | {"method.reload_best": [1]}
LEFT_OUT = "metric_learning.py"  # the waits of pytorch-metric-learning's own losses and miners
# How often the host waits for the device in a step: once, for whether its losses and gradients are finite, and where a method has
# several optimizers, reads what it decides by, or sends embeddings to a mining server.
WAITS: dict[str, int] = {
    "baseline": 1, "proxies": 1, "matryoshka": 1, "mined": 2, "osm_caa": 1, "intra_batch": 1, "smart_mining": 1,
    "osm_caa_in_parts": 1, "bf16": 1,
    "gca_hng": 5,  # four updates; the first step reads a counter
    "gca_hng_in_parts": 5,
    "mmsi": 6,  # put, meta loss, are there pairs, kept outputs, are there weights, update
    "mmsi_in_parts": 5,
}  # fmt: skip


def weights(worker: Worker) -> dict[str, torch.Tensor]:
    parts = {"trunk": worker.trunk, "method": worker.method}
    tensors = {f"{part}.{n}": v for part, m in parts.items() for n, v in m.state_dict().items()}
    return {n: v.detach().cpu().clone() for n, v in tensors.items() if isinstance(v, torch.Tensor)}


def train(config: Config, device: torch.device, status: RunStatus, waits: list[Counter[str]] | None = None) -> Worker:
    worker = Worker(config, config.data.source, Ranks(), device, status)
    step = worker._training_step

    def counted(batch: Any) -> Any:
        assert waits is not None
        before = Counter(pretend.synchronisations)
        found = step(batch)
        waits.append(pretend.synchronisations - before)
        return found

    if waits is not None:
        (pretend,) = PretendDevice.entered
        worker._training_step = counted  # type: ignore[method-assign]
    worker()
    return worker


def _of_library(place: str) -> bool:
    """A wait of pytorch-metric-learning: in its losses and miners, or in the backward pass of an index by a mask."""
    return place.startswith(LEFT_OUT) or (place.startswith("context.py") and place.endswith(" index_put by a mask"))


def figures(config: Config) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(run_folder(config)) if line["kind"] in ("frozen", "validation", "test")]
    return [{n: v for n, v in line.items() if "second" not in n and "waiting" not in n} for line in lines]


def first_loss(config: Config) -> float:
    return next(float(line["loss"]) for line in read_metrics(run_folder(config)) if line["kind"] == "train")


TRIED = [pytest.param(name, marks=() if name == "mmsi" else pytest.mark.slow) for name in WAITS]  # 8 CPU-seconds each


@pytest.mark.parametrize("name", TRIED)
def test_a_run_on_the_device_ends_as_one_on_the_cpu(make_config: Callable[..., Config], name: str) -> None:
    changes = {"length": "2 epochs", "runtime.log_every": 100, **CASES[name]}
    on_cpu, on_device = (make_config(changes, name=place) for place in ("cpu", "device"))
    expected = weights(train(on_cpu, torch.device("cpu"), RunStatus()))
    waits: list[Counter[str]] = []
    with PretendDevice() as pretend:
        first = train(on_device, pretend.device, StopAt(3), waits)
        assert first.progress.step == 3, "the run was not stopped within an epoch"
        worker = train(on_device, pretend.device, RunStatus(), waits)
        got = weights(worker)
        features = next(iter(worker.trunk.parameters()))
        assert features.device.type == DEVICE.type, "the run was not on the device"
    if name == "bf16":  # rounded elsewhere: the weights part after some steps
        assert first_loss(on_device) == pytest.approx(first_loss(on_cpu), rel=1e-2)
    else:
        for key, value in expected.items():
            torch.testing.assert_close(
                got[key], value, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
            )
        assert figures(on_device) == figures(on_cpu)
    own = [Counter({place: n for place, n in step.items() if not _of_library(place)}) for step in waits]
    most = max(own, key=lambda step: step.total())
    assert most.total() == WAITS[name], most


def test_what_a_gpu_refuses_is_refused() -> None:
    with PretendDevice() as pretend:
        on_device, on_cpu = torch.ones(3, 4, device=pretend.device), torch.ones(4, 2)
        with pytest.raises(MixedDevices, match="mixes devices"):
            on_device @ on_cpu
        with pytest.raises(MixedDevices, match="call cpu"):
            on_device.numpy()
        with pytest.raises(MixedDevices, match="changes a tensor of the CPU"):
            torch.zeros(()).add_(on_device.sum())
        with pytest.raises(MixedDevices, match="index of the accelerator"):
            on_cpu[torch.zeros(1, dtype=torch.int64, device=pretend.device)]
        with pytest.raises(MixedDevices, match="generator of the CPU"):
            torch.rand(3, device=pretend.device, generator=torch.Generator())
        with pytest.raises(MixedDevices, match="generator of the accelerator"):
            torch.rand(3, generator=torch.Generator(pretend.device))
        assert (on_device * torch.tensor(2.0)).cpu().sum() == 24, "numbers of the CPU may be mixed in, as on a GPU"


def test_waits_of_the_host_are_counted() -> None:
    with PretendDevice() as pretend:

        def waits(work: Callable[[], Any]) -> int:
            pretend.synchronisations.clear()
            work()
            return pretend.num_synchronisations

        x = torch.arange(6.0, device=pretend.device)
        host = torch.arange(6)
        assert waits(lambda: (x * 2).sum() + 1) == 0
        assert waits(lambda: x.new_zeros(3) + torch.full((3,), 2.0, device=pretend.device)) == 0
        assert waits(lambda: host.to(pretend.device, non_blocking=True)) == 0
        for work in (
            lambda: x.sum().item(),
            lambda: bool(x[0] > 0),
            lambda: float(x[1]),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: host.to(pretend.device),
            lambda: torch.tensor([1.0, 2.0], device=pretend.device),
            lambda: x.nonzero(),
            lambda: x[x > 2],
            lambda: x[host],
            lambda: torch.unique(x),
        ):
            assert waits(work) == 1, pretend.synchronisations


def test_in_place_changes_of_shape_and_of_data_reach_the_values() -> None:
    with PretendDevice() as pretend:
        x = torch.arange(6.0, device=pretend.device).view(2, 3)
        x.t_()
        assert x.shape == (3, 2) and x.cpu().tolist() == [[0, 3], [1, 4], [2, 5]]
        parameter = torch.nn.Parameter(torch.ones(2, device=pretend.device))
        parameter.data = torch.full((2,), 3.0, device=pretend.device)
        (parameter**2).sum().backward()
        assert parameter.grad is not None and parameter.grad.tolist() == [6.0, 6.0]


def test_a_loaded_model_embeds_and_searches_on_the_device(make_config: Callable[..., Config], tmp_path: Any) -> None:
    from pipeline import search
    from pipeline.searching.index import SearchIndex

    config = make_config({"length": "2 steps", "precision": "float32"})
    record(config, run_folder(config), Store(Folder(config.data.source)), [])
    train(config, torch.device("cpu"), RunStatus())
    run = run_folder(config).uri
    images = sorted(str(path) for path in tmp_path.parent.rglob("images/*/*.png"))[:6] or None
    index = str(tmp_path / "index")
    assert search.main(["build", run, "--to", index, "--threads", "1"]) == 0
    pixels = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8).numpy()
    given: Any = images or list(pixels)
    expected = load_model(run).embed(given)
    with PretendDevice() as pretend:
        model = load_model(run, device=pretend.device)
        got = model.embed(given)
        assert got.device.type == "cpu"
        torch.testing.assert_close(got, expected)
        on_device = SearchIndex(index, model).search(given, k=3)
    on_cpu = SearchIndex(index).search(given, k=3)
    assert [[hit.path for hit in hits] for hits in on_device] == [[hit.path for hit in hits] for hits in on_cpu]
