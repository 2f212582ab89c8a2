"""Two workers against torchrun, one worker and plain DDP, for `python -m benchmarks.peers`; and what a killed run costs.

launchers   the same program, the same two workers with one thread each, started by Ray Train and by torchrun: a step when it
            is steady, from the run's log as it grows, and the start as a row of its own. The weights left have to be equal.
workers     two workers of one thread against one of two, both by Ray Train: images a second on the same cores
gradients   of every method, float64, by two ranks against one process; beside it a loop as usually written, DDP and a loss of
            pytorch-metric-learning on every rank's own images, and with that library's DistributedLossWrapper, each times the
            factor that makes it nearest
resume      a run killed after 200 of 300 steps and started again, against the undisturbed one: CPU seconds more; beside it those of
            a loop that replays the batches of the steps done

The network of `launchers` and `resume` is timm's test_efficientnet at 32 pixels: a step of milliseconds, in which overhead shows.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.alternate import ratio_of
from benchmarks.table import Row
from benchmarks.training import last_step, tree_cpu_s
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values, write_images, write_tiny_store
from pipeline.testing.watched_run import Seen
from tests.laws.test_laws import METHOD_CASES, case, train
from tests.pool import Pool

LAUNCHERS, WORKERS, EXACT = 1.03, 0.9, 1e-9
CLASSES, PER_CLASS, P, K = 64, 8, 16, 4
SMALL = {"model.backbone": "test_efficientnet", "model.weights": "none", "data.transforms.size": 32}
LARGER = {"model.backbone": "tf_efficientnet_lite0", "model.weights": "none", "data.transforms.size": 64}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pipeline.train")


def write_drawings(root: Path, side: int) -> Store:
    """512 PNGs of noise around patterns, of 64 classes."""
    images = write_images(root / "images", {f"class{i:02d}": PER_CLASS for i in range(CLASSES)}, seed=0, side=side)
    entries = [Entry(path, name, "train") for path, name in images]
    return write_store("drawings", entries, Folder(root / "store"), run_serially)


def command(
    module: Sequence[str], store: Store, root: Path, name: str, steps: int, changes: Mapping[str, Any]
) -> list[str]:
    """The command of a training run that measures nothing: it trains and saves the weights."""
    values = {
        "name": name,
        "storage": str(root),
        "length": f"{steps} steps",
        "data.source": store.folder.uri,
        "data.validation_fold": "null",
        "method.classes_per_batch": P,
        "method.samples_per_class": K,
        "evaluation.test": "false",
        "evaluation.checkpoint": "last",
        "checkpoint.every": "1000 steps",
        "runtime.loader": "in_process",
        "runtime.log_every": 1,
        **changes,
    }
    settings = [("--set", f"{key}={value}") for key, value in values.items()]
    return [sys.executable, "-m", *module, "baseline/emoji", *itertools.chain.from_iterable(settings)]


def steady(arguments: Sequence[str], run: Path, warm: int, steps: int, log: Path) -> dict[str, float]:
    """Seconds of a step between `warm` and `steps`, and to the first of the two, of a command that ends by itself."""
    with log.open("ab") as output:
        started = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=output, stderr=output)
    marks: list[tuple[int, float, float]] = []
    while process.poll() is None:
        step = last_step(run / "metrics.jsonl")
        if (step >= warm and not marks) or (step >= steps and len(marks) == 1):
            marks.append((step, time.perf_counter(), tree_cpu_s(process.pid)))
        time.sleep(0.02 if marks and step > 0.8 * steps else 0.1)
    if process.returncode or len(marks) < 2:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    low, high = marks
    count = high[0] - low[0]
    return {"wall": (high[1] - low[1]) / count, "cpu": (high[2] - low[2]) / count, "start": low[1] - started}


def weights(run: Path) -> bytes:
    """The trained weights, as the files of the newest checkpoint hold them."""
    newest = max((run / "checkpoints").glob("step-*"))
    return b"".join((newest / f"{part}.safetensors").read_bytes() for part in ("trunk", "method"))


def launcher_rows(rounds: int = 5, warm: int = 60, steps: int = 360) -> list[Row]:
    changes = SMALL | {"runtime.workers": 2, "runtime.cpus_per_worker": 1}
    sides = {"ray": ("pipeline.train",), "torchrun": TORCHRUN}
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as folder:
        root = Path(folder)
        store = write_drawings(root, 32)
        for i in range(rounds):
            left = {}
            for side, module in sides.items():
                name = f"{side}-{i}"
                run = root / "runs" / name
                arguments = command(module, store, root, name, steps + 20, changes)
                figures[side].append(steady(arguments, run, warm, steps, root / f"{name}.log"))
                left[side] = weights(run)
            if left["ray"] != left["torchrun"]:
                raise SystemExit("Ray Train and torchrun left different weights")
    rows = []
    for key, name, most in (("wall", "a steady step, wall-ms", LAUNCHERS), ("cpu", "a steady step with all processes, CPU-ms", None), ("start", f"start to step {warm}, s", None)):  # fmt: skip
        ours, other = ([figure[key] for figure in figures[side]] for side in sides)
        ratio, spread = ratio_of(ours, other)
        unit = 1.0 if key == "start" else 1e3
        medians = unit * statistics.median(ours), unit * statistics.median(other)
        promised, ok = ("", True) if most is None else (f"<= {most:g}x", ratio <= most)
        rows.append(Row(f"2 workers, 64 images, Ray Train / torchrun: {name}", *medians, ratio, promised, ok, spread))
    return rows


def worker_rows(rounds: int = 5, warm: int = 15, steps: int = 75) -> list[Row]:
    sides = {2: 1, 1: 2}  # workers: threads of each
    figures: dict[int, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as folder:
        root = Path(folder)
        store = write_drawings(root, 64)
        for i, (workers, threads) in itertools.product(range(rounds), sides.items()):
            name = f"workers-{workers}-{i}"
            changes = LARGER | {"runtime.workers": workers, "runtime.cpus_per_worker": threads}
            arguments = command(("pipeline.train",), store, root, name, steps + 5, changes)
            figures[workers].append(steady(arguments, root / "runs" / name, warm, steps, root / f"{name}.log"))
    rows = []
    for key, what, least in (("wall", "images/s", WORKERS), ("cpu", "images/s of CPU time", None)):
        two, one = ([P * K / figure[key] for figure in figures[side]] for side in sides)
        ratio, spread = ratio_of(two, one)
        promised, ok = ("", True) if least is None else (f">= {least:g}x", ratio >= least)
        what = f"EfficientNet-Lite0, 64 px, batches of 64, 2 workers of 1 thread / 1 of 2: {what}"
        rows.append(Row(what, statistics.median(two), statistics.median(one), ratio, promised, ok, spread))
    return rows


# ---- gradients -------------------------------------------------------------------------------------------------------


def difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of an element, relative to the largest of its tensor (or to 1e-6 of the largest of all)."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(
        float((got[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-6 * largest)
        for name, gradient in expected.items()
    )


def gradient_rows() -> list[Row]:
    rows, pool = [], Pool(2)
    try:
        with tempfile.TemporaryDirectory() as root:
            store = write_tiny_store(Path(root)).folder.uri
            for name in METHOD_CASES:
                values = {
                    shares: tiny_values(root, store, case(name, "sgd", "frozen") | {"name": f"{name}-{len(shares)}"})
                    for shares in ((12,), (6, 6))
                }  # fmt: skip
                one, two = (of_trunk(pool(train, len(shares), v, shares)[0]) for shares, v in values.items())
                worst = difference(two, one)
                what = f"{name}: gradient of 2 ranks against 1, largest relative difference"
                rows.append(Row(what, worst, promised=f"<= {EXACT:g}", ok=worst <= EXACT))
        for kind, name in (("own", "DDP, the loss of each rank's own images"), ("wrapper", "DDP and pytorch-metric-learning's DistributedLossWrapper")):  # fmt: skip
            one, two = (pool(plain_gradient, world, kind)[0] for world in (1, 2))
            a, b = (torch.cat([gradient.flatten() for gradient in side.values()]) for side in (one, two))
            factor = float(a @ b / (b @ b))
            worst = difference({n: factor * g for n, g in two.items()}, one)
            rows.append(Row(f"{name}: the same (after a factor of {factor:.3g})", worst))
    finally:
        pool.close()
    return rows


def of_trunk(seen: Seen) -> dict[str, Tensor]:
    """The first gradients that the trunk has a share in; some optimizers have none, and some runs begin with the head."""
    return next(gradients for gradients in seen.gradients if any(name.startswith("trunk.") for name in gradients))


def plain_gradient(rank: int, world: int, kind: str) -> dict[str, Tensor]:
    """The gradient of one step of a loop as usually written; 64 images, an equal part on each rank."""
    import timm
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    torch.manual_seed(0)
    trunk = timm.create_model("test_efficientnet", num_classes=0)
    network = nn.Sequential(trunk, nn.Linear(trunk.num_features, 8)).double().eval()
    images, labels = torch.randn(64, 3, 24, 24, dtype=torch.float64), torch.arange(64) // 4
    labels = labels[torch.randperm(64)]  # a class's images are on both ranks
    part = slice(rank * 64 // world, (rank + 1) * 64 // world)
    loss = MultiSimilarityLoss()
    if kind == "wrapper" and world > 1:
        loss = DistributedLossWrapper(loss)
    model = DistributedDataParallel(network) if world > 1 else network
    loss(nn.functional.normalize(model(images[part])), labels[part]).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# ---- a killed run ----------------------------------------------------------------------------------------------------


def cpu_of(arguments: Sequence[str], metrics: Path, log: Path, kill_after: int | None = None) -> float:
    """CPU seconds of a process, which ends well or is killed when that step is in its log."""
    with log.open("ab") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output)
    if kill_after is not None:
        while process.poll() is None and last_step(metrics) < kill_after:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (0 if kill_after is None else -signal.SIGKILL):
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def resume_rows(rounds: int = 3, killed: int = 200, steps: int = 300) -> list[Row]:
    changes = SMALL | {"runtime.workers": 0, "runtime.cpus_per_worker": 1, "checkpoint.every": "50 steps"}
    extra, replayed, start = [], [], []
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as folder:
        root = Path(folder)
        store = write_drawings(root, 32)
        log = root / "log"
        for i in range(rounds):
            spent = []
            for name, times in ((f"whole-{i}", (None,)), (f"killed-{i}", (killed, None))):
                run = root / "runs" / name
                arguments = command(("pipeline.train",), store, root, name, steps, changes)
                spent.append([cpu_of(arguments, run / "metrics.jsonl", log, kill) for kill in times])
            if weights(root / "runs" / f"whole-{i}") != weights(root / "runs" / f"killed-{i}"):
                raise SystemExit("the run that was killed and continued left other weights than the undisturbed one")
            extra.append(sum(spent[1]) - spent[0][0])
            short = command(("pipeline.train",), store, root, f"short-{i}", 1, changes)
            start.append(cpu_of(short, root / "none", log))
            replayed.append(start[-1] + replay_s(store, killed))
    ours, other = statistics.median(extra), statistics.median(replayed)
    what = f"killed after {killed} of {steps} steps, weights equal bit by bit: CPU-s more than undisturbed / a start and the replay of {killed} batches"
    return [Row(what, ours, other, *ratio_of(extra, replayed)[:1], spread=ratio_of(extra, replayed)[1])]


def replay_s(store: Store, batches: int) -> float:
    """CPU seconds in which a loader reads the batches of the steps done once more, to come to the next."""
    from pipeline.data.cache import Cache
    from pipeline.data.loader import ImageSource, LoadRequest, fetch
    from pipeline.data.transforms import TransformConfig

    with tempfile.TemporaryDirectory() as folder:
        source = ImageSource(store.folder.uri, store.fingerprint, Cache(folder, 2**30), TransformConfig(size=32))
        ids = torch.arange(P * K).numpy()
        fetch(source, LoadRequest(ids, (0, 0, 0)))
        started = time.process_time()
        for step in range(batches):
            fetch(source, LoadRequest(ids, (0, step, 0)))
        return time.process_time() - started
