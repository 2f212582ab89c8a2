"""Loading for two workers, and preparing a dataset.

    python -m benchmarks.loader [--only loading reduced s3 prepare embed] [--rounds 3] [--json PATH]

loading: JPEGs of 256 pixels to training crops of 224, P×K batches of 16 × 4 shared by two workers that do nothing else; images
a second of the slower worker from its 41st batch of 180 on, when all processes run (Ray: from the 451st of 900 on, since it has
fetched ahead by then, up to its object store); the time to the first is a row of its own.
Ours are the Ray Data pipeline of each worker, limited to one CPU, and the thread of the in-process engine, from encoded images
and from decoded pixels (`cache.decoded`). Compared with torch's `DataLoader` with the same fetch function of encoded images and 0
or 1 processes a worker, whichever is faster, and the usual stack: ImageFolder, PIL transforms, `MPerClassSampler`, `DataLoader`
with two processes a worker. Sides alternate; figures are medians, ratios medians over rounds. CPU time is that of all processes,
Ray's included, while a worker's batches are counted.

reduced: the fetch function alone on JPEGs of 1,280 × 960, with `data.transforms.decode_at_least` 448 and without; CPU time.

s3: the same from an S3 server, the training split already copied to this node, against a local store.

prepare (benchmarks/preparing.py): 24,223 drawings to a Parquet store, images a second by processes that are already running (the first call, which
starts them, is a row of its own), against two processes that only read, check and encode; and the resident memory of Ray's
processes for 12,000 and 24,000 drawings, the object store limited to 300 MB.

embed: the same memory for `python -m pipeline.evaluate RUN --embed-to FOLDER`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.preparing import measure_embed, measure_prepare
from benchmarks.table import Row, finish
from methods.plans import class_balanced
from pipeline.data.cache import Cache
from pipeline.data.entries import Entry
from pipeline.data.loader import ImageSource, LoadRequest, fetch, load
from pipeline.data.store import Store
from pipeline.data.transforms import TransformConfig
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.distributed.ray_session import ray_session
from pipeline.storage import Folder
from tests.s3 import Proxy, s3_server

CLASSES, PER_CLASS, P, K, WORKERS = 100, 20, 16, 4, 2
STEPS, WARM = 180, 40  # of a worker, and those before anything is counted
RAY_STEPS, RAY_WARM = (
    900,
    450,
)  # Ray fetches ahead until its object store is full: longer, so that this counts for little
TRANSFORMS = TransformConfig(size=224)
SECTIONS = ["loading", "reduced", "s3", "prepare", "embed"]


class Figures(NamedTuple):
    """Seconds to the first batch, images a second, CPU microseconds an image."""

    first_s: float
    speed: float
    cpu: float


def write_photos(
    root: Path, classes: int = CLASSES, per_class: int = PER_CLASS, size: tuple[int, int] = (256, 256)
) -> list[Entry]:
    """JPEGs (of 256 pixels: some 20 kB), with the detail of photographs."""
    random = np.random.default_rng(0)
    entries = []
    for c in range(classes):
        (root / f"{c:03d}").mkdir(parents=True)
        for i in range(per_class):
            scales = [random.uniform(0, 255, (side, side, 3)) for side in (4, 16, 64, 256)]
            layers = [np.asarray(Image.fromarray(s.astype(np.uint8)).resize(size, 3), float) for s in scales]
            pixels = 0.4 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2] + 0.1 * layers[3]
            path = root / f"{c:03d}" / f"{i}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            entries.append(Entry(str(path), f"{c:03d}", "train"))
    return entries


def steps_of(side: str) -> tuple[int, int]:
    """Steps of a worker, and how many of them are not counted."""
    return (RAY_STEPS, RAY_WARM) if side.startswith("ray") else (STEPS, WARM)


def items_of(store: Store, rank: int, steps: int) -> list[LoadRequest]:
    """A worker's half of every step."""
    samples = store.select(["train"])
    plans = [class_balanced(samples.labels, P, K, 0, epoch) for epoch in range(-(-steps * P * K // len(samples)) + 1)]
    half = P * K // WORKERS
    rows = np.concatenate([p.ids for p in plans])[:steps, rank * half : (rank + 1) * half]
    return [LoadRequest(samples.ids[row], (0, step, rank * half)) for step, row in enumerate(rows)]


class FetchDataset(torch.utils.data.Dataset[torch.Tensor]):
    """The batches of a worker, by our own fetch function."""

    def __init__(self, source: ImageSource, items: list[LoadRequest]) -> None:
        self.source, self.items = source, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> torch.Tensor:
        torch.set_num_threads(1)
        return torch.from_numpy(fetch(self.source, self.items[i]))


def usual_stack(root: str, rank: int) -> Iterator[torch.Tensor]:
    from pytorch_metric_learning.samplers import MPerClassSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.16, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    data = ImageFolder(root, pipeline)
    half = P * K // WORKERS
    torch.manual_seed(rank)
    sampler = MPerClassSampler(data.targets, K, batch_size=half, length_before_new_iter=STEPS * half)
    for pixels, _ in torch.utils.data.DataLoader(data, half, sampler=sampler, num_workers=2):
        yield pixels


def batches(side: str, rank: int, root: str, source: ImageSource) -> Iterator[Any]:
    torch.set_num_threads(1)
    if side == "usual":
        return usual_stack(f"{root}/photos", rank)
    engine, _, kept = side.partition(" ")
    if kept and source.cache:
        source = replace(source, cache=source.cache._replace(decoded=True))
    items = items_of(Store(Folder(source.uri)), rank, steps_of(side)[0])
    if engine.startswith("torch"):
        loader = torch.utils.data.DataLoader(FetchDataset(source, items), batch_size=None, num_workers=int(engine[-1]))
        return iter(loader)
    return load(source, items, engine)


def cpu_seconds() -> float:
    """CPU time so far of all processes of the benchmark: the worker's siblings, theirs, and Ray's."""
    main, total = psutil.Process(os.getppid()), 0.0
    for process in [main, *main.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # its own, and of those it started that have ended
    return total


def consume(
    side: str, rank: int, root: str, source: ImageSource, address: str, start: Any, counts: Any, results: Any
) -> None:
    """Loads all batches of a worker; puts a Figures of what came after the first of them (`steps_of`) into `results`."""
    if side.startswith("ray"):
        import ray

        ray.init(address, log_to_driver=False, logging_level="ERROR")
    start.wait()
    began = time.perf_counter()
    iterator = batches(side, rank, root, source)
    next(iterator)
    first = time.perf_counter()
    for _ in range(steps_of(side)[1] - 1):
        counts[rank] += len(next(iterator))
    warm, cpu, before = time.perf_counter(), cpu_seconds(), sum(counts)
    images = 0
    for batch in iterator:
        images += len(batch)
        counts[rank] += len(batch)
    seconds = time.perf_counter() - warm
    results.put(Figures(first - began, images / seconds, (cpu_seconds() - cpu) / (sum(counts) - before) * 1e6))


def measure(side: str, root: str, source: ImageSource, address: str) -> Figures:
    """Seconds to the first batch, images a second of both workers together, CPU microseconds an image."""
    context = multiprocessing.get_context("spawn")
    start, counts, results = context.Barrier(WORKERS), context.Array("q", WORKERS), context.Queue()
    workers = [
        context.Process(target=consume, args=(side, rank, root, source, address, start, counts, results))
        for rank in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    figures = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    first, speeds, cpu = zip(*figures, strict=True)
    return Figures(max(first), WORKERS * min(speeds), statistics.mean(cpu))


def measure_loading(rounds: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root, ray_session(4) as ray:
        entries = write_photos(Path(root) / "photos")
        store = write_store("photos", entries, Folder(root) / "store", run_serially)
        source = ImageSource(store.folder.uri, store.fingerprint, Cache(f"{root}/cache", 2**40), TRANSFORMS)
        sides = (
            "ray",
            "torch0",
            "in_process",
            "torch1",
            "ray decoded",
            "in_process decoded",
            "torch0 decoded",
            "usual",
        )
        address = ray.get_runtime_context().gcs_address
        for side in ("in_process", "in_process decoded"):
            measure(side, root, source, address)  # makes the cache
        found = [{side: measure(side, root, source, address) for side in sides} for _ in range(rounds)]
    best = max(("torch0", "torch1"), key=lambda s: statistics.median(f[s].speed for f in found))
    same = f"DataLoader, same fetch, {best[-1]} processes"
    compared = [
        (ours, other, what, least)
        for ours in ("ray", "in_process")
        for other, what, least in ((best, same, 0.95), ("usual", "the usual stack", 1.5))
    ]
    compared += [(f"{engine} decoded", best, f"{same}, encoded", 1.6) for engine in ("ray", "in_process")]
    compared += [("in_process decoded", "torch0 decoded", "DataLoader, same fetch, decoded", None)]
    for ours, other, what, least in compared:
        ratio = statistics.median(f[ours].speed / f[other].speed for f in found)
        speeds = [statistics.median(f[side].speed for f in found) for side in (ours, other)]
        promised = "" if least is None else f">= {least}"
        rows.append(Row(f"two workers, {ours}, images/s / {what}", *speeds, ratio, promised, ratio >= (least or 0)))
        ratio = statistics.median(f[ours].cpu / f[other].cpu for f in found)
        rows.append(
            Row("    CPU µs an image", *(statistics.median(f[s].cpu for f in found) for s in (ours, other)), ratio)
        )
    for side in sides:
        rows.append(Row(f"seconds to the first batch, {side}", statistics.median(f[side].first_s for f in found)))
    return rows


def measure_reduced(rounds: int) -> list[Row]:
    """CPU time of the fetch function on large JPEGs, decoded whole and at a part of their size."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root:
        entries = write_photos(Path(root) / "photos", classes=4, per_class=4, size=(1280, 960))
        store = write_store("large", entries, Folder(root) / "store", run_serially)
        ids, cpu = store.select(["train"]).ids, dict[int | None, list[float]]()
        for step in range(rounds + 1):
            for least in (None, 448, 224):
                transforms = TransformConfig(size=224, decode_at_least=least)
                source = ImageSource(store.folder.uri, store.fingerprint, Cache(f"{root}/cache", 2**40), transforms)
                started = time.process_time()
                fetch(source, LoadRequest(ids, (0, step, 0)))
                if step:  # the first makes the cache
                    cpu.setdefault(least, []).append((time.process_time() - started) / len(ids))
    rows = []
    for least in (448, 224):
        ratio = statistics.median(whole / part for part, whole in zip(cpu[least], cpu[None], strict=True))
        speeds = [1 / statistics.median(cpu[key]) for key in (least, None)]
        rows.append(Row(f"JPEGs of 1,280 × 960, images a CPU second, decode_at_least {least} / whole", *speeds, ratio))
    return rows


def measure_s3(rounds: int) -> list[Row]:
    """The in-process engine from a local store, and from an S3 server (moto) whose training split this node has copied."""
    import s3fs

    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root, s3_server() as endpoint:
        proxy = Proxy(endpoint)
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys | {"AWS_ENDPOINT_URL": proxy.url})
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bench")
        entries = write_photos(Path(root) / "photos")
        sources = {}
        for name, folder in (("local", Folder(root) / "store"), ("s3", Folder("s3://bench/store"))):
            store = write_store("photos", entries, folder, run_serially)
            sources[name] = ImageSource(store.folder.uri, store.fingerprint, Cache(f"{root}/{name}", 2**40), TRANSFORMS)
            measure("in_process", root, sources[name], "")  # makes the copy
        proxy.reset()
        speeds = [
            {name: measure("in_process", root, s, "").speed for name, s in sources.items()} for _ in range(rounds)
        ]
        images = proxy.count("GET", "shards/")
        proxy.close()
    ratio = statistics.median(speed["s3"] / speed["local"] for speed in speeds)
    ours, local = (statistics.median(speed[name] for speed in speeds) for name in ("s3", "local"))
    return [
        Row("two workers, in_process, images/s, S3 with a warm cache / local", ours, local, ratio, ">= 0.9", ratio >= 0.9),
        Row("the same, requests for images", float(images), None, None, "0", images == 0),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    rows: list[Row] = []
    if "loading" in options.only:
        rows += measure_loading(options.rounds)
    if "reduced" in options.only:
        rows += measure_reduced(options.rounds)
    if "s3" in options.only:
        rows += measure_s3(options.rounds)
    if "prepare" in options.only:
        rows += measure_prepare(options.rounds)
    if "embed" in options.only:
        rows += measure_embed()
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
