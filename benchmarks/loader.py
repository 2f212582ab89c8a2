"""Loading for two workers, and preparing a dataset.

    python -m benchmarks.loader [--only loading s3 prepare embed] [--rounds 3] [--json PATH]

loading: JPEGs of 256 pixels to training crops of 224, P×K batches of 16 × 4 shared by two workers that do nothing else; images
a second of the slower worker from its 41st batch of 180 on, when all processes run; the time to the first is a row of its own.
Ours are the Ray Data pipeline of each worker, limited to one CPU, and the thread of the in-process engine. Compared with
torch's `DataLoader` with the same fetch function and 0 or 1 processes a worker, whichever is faster, and the usual stack:
ImageFolder, PIL transforms, `MPerClassSampler`, `DataLoader` with two processes a worker. Sides alternate; figures are medians,
ratios medians over rounds.

s3: the same from an S3 server, the training split already copied to this node, against a local store.

prepare: 24,223 drawings to a Parquet store, images a second by processes that are already running (the first call, which
starts them, is a row of its own), against two processes that only read, check and encode; and the resident memory of Ray's
processes for 12,000 and 24,000 drawings, the object store limited to 300 MB.

embed: the same memory for `python -m pipeline.evaluate RUN --embed-to FOLDER`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.table import Row, finish
from methods.plans import class_balanced
from pipeline.data import own_images
from pipeline.data.cache import Cache
from pipeline.data.entries import Entry
from pipeline.data.image_files import normalise
from pipeline.data.loader import ImageSource, LoadRequest, fetch, load
from pipeline.data.store import Store
from pipeline.data.transforms import TransformConfig
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_on_ray, run_serially
from pipeline.distributed.ray_session import ray_session
from pipeline.storage import Folder
from tests.s3 import Proxy, s3_server

CLASSES, PER_CLASS, P, K, STEPS, WARM, WORKERS = 100, 20, 16, 4, 180, 40, 2
TRANSFORMS = TransformConfig(size=224)
SECTIONS = ["loading", "s3", "prepare", "embed"]


def write_photos(root: Path) -> list[Entry]:
    """JPEGs of 256 pixels and some 20 kB, with the detail of photographs."""
    random = np.random.default_rng(0)
    entries = []
    for c in range(CLASSES):
        (root / f"{c:03d}").mkdir(parents=True)
        for i in range(PER_CLASS):
            scales = [random.uniform(0, 255, (side, side, 3)) for side in (4, 16, 64, 256)]
            layers = [np.asarray(Image.fromarray(s.astype(np.uint8)).resize((256, 256), 3), float) for s in scales]
            pixels = 0.4 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2] + 0.1 * layers[3]
            path = root / f"{c:03d}" / f"{i}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            entries.append(Entry(str(path), f"{c:03d}", "train"))
    return entries


def items_of(store: Store, rank: int) -> list[LoadRequest]:
    """A worker's half of every step."""
    samples = store.select(["train"])
    plans = [class_balanced(samples.labels, P, K, 0, epoch) for epoch in range(-(-STEPS * P * K // len(samples)) + 1)]
    half = P * K // WORKERS
    rows = np.concatenate([p.ids for p in plans])[:STEPS, rank * half : (rank + 1) * half]
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
    items = items_of(Store(Folder(source.uri)), rank)
    if side.startswith("torch"):
        loader = torch.utils.data.DataLoader(FetchDataset(source, items), batch_size=None, num_workers=int(side[-1]))
        return iter(loader)
    return load(source, items, side)


def consume(side: str, rank: int, root: str, source: ImageSource, address: str, start: Any, results: Any) -> None:
    """Loads all batches of a worker; puts (rank, seconds to the first, images a second after WARM of them) into `results`."""
    if side == "ray":
        import ray

        ray.init(address, log_to_driver=False, logging_level="ERROR")
    start.wait()
    began = time.perf_counter()
    iterator = batches(side, rank, root, source)
    next(iterator)
    first = time.perf_counter()
    for _ in range(WARM - 1):
        next(iterator)
    warm = time.perf_counter()
    images = sum(len(batch) for batch in iterator)
    results.put((rank, first - began, images / (time.perf_counter() - warm)))


def measure(side: str, root: str, source: ImageSource, address: str) -> tuple[float, float]:
    """Seconds to the first batch, and images a second of both workers together."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(WORKERS), context.Queue()
    workers = [
        context.Process(target=consume, args=(side, rank, root, source, address, start, results))
        for rank in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    figures = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return max(first_s for _, first_s, _ in figures), WORKERS * min(speed for _, _, speed in figures)


def measure_loading(rounds: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root, ray_session(4) as ray:
        entries = write_photos(Path(root) / "photos")
        store = write_store("photos", entries, Folder(root) / "store", run_serially)
        source = ImageSource(store.folder.uri, store.fingerprint, Cache(f"{root}/cache", 2**40), TRANSFORMS)
        sides = ("ray", "in_process", "torch0", "torch1", "usual")
        address = ray.get_runtime_context().gcs_address
        measure("in_process", root, source, address)  # makes the cache
        figures = [{side: measure(side, root, source, address) for side in sides} for _ in range(rounds)]
        torch_best = max(("torch0", "torch1"), key=lambda s: statistics.median(f[s][1] for f in figures))
        for ours in ("ray", "in_process"):
            for other, what, least in (
                (torch_best, f"DataLoader, same fetch, {torch_best[-1]} processes", 1.0),
                ("usual", "the usual stack", 1.5),
            ):
                speeds = [statistics.median(f[s][1] for f in figures) for s in (ours, other)]
                ratio = statistics.median(f[ours][1] / f[other][1] for f in figures)
                rows.append(
                    Row(
                        f"two workers, {ours}, images/s / {what}",
                        *speeds,
                        ratio,
                        f">= {least}",
                        ratio >= least,
                    )
                )
        for side in sides:
            rows.append(Row(f"seconds to the first batch, {side}", statistics.median(f[side][0] for f in figures)))
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
        speeds = [{name: measure("in_process", root, s, "")[1] for name, s in sources.items()} for _ in range(rounds)]
        images = proxy.count("GET", "shards/")
        proxy.close()
    ratio = statistics.median(speed["s3"] / speed["local"] for speed in speeds)
    ours, local = (statistics.median(speed[name] for speed in speeds) for name in ("s3", "local"))
    return [
        Row("two workers, in_process, images/s, S3 with a warm cache / local", ours, local, ratio, ">= 0.9", ratio >= 0.9),
        Row("the same, requests for images", float(images), None, None, "0", images == 0),
    ]  # fmt: skip


# ---- preparing -------------------------------------------------------------------------------------------------------


def decode_rate(entries: list[Entry], cores: int, seconds: float = 5.0) -> float:
    """Images a second that `cores` processes together read, check and encode."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.starmap(_decode, [(entries[i::cores], seconds) for i in range(cores)], chunksize=1))


def _decode(entries: list[Entry], seconds: float) -> float:
    torch.set_num_threads(1)
    for entry in entries[:20]:
        normalise(Path(entry.source).read_bytes())
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        normalise(Path(entries[count % len(entries)].source).read_bytes())
        count += 1
    return count / (time.perf_counter() - started)


def resident_mib(title: bytes = b"ray::") -> float:
    """Memory of this process and of Ray's workers with `title` in theirs, without shared pages of the object store."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if entry.name == str(os.getpid()) or title in command:
                status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
                total += int(status["RssAnon"].split()[0]) / 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def measure_prepare(rounds: int) -> list[Row]:
    import pipeline.distributed.ray_session

    pipeline.distributed.ray_session.OBJECT_STORE_BYTES = 300 * 10**6
    entries = own_images.emoji(skin_tones=True)
    cores, first = 2, 0.0
    speeds, peaks = [], dict[int, float]()
    with ray_session(cores):
        for count in (1000, *[len(entries)] * rounds, 12_000, 24_000):
            selected = [entries[i] for i in np.linspace(0, len(entries) - 1, count).astype(int)]
            selected = list(dict.fromkeys(selected))
            peak = 0.0

            def watched(function: Any, shards: Any) -> Iterator[Any]:
                nonlocal peak
                for record in run_on_ray(function, shards):
                    peak = max(peak, resident_mib())
                    yield record

            rate = decode_rate(entries[:: max(1, len(entries) // 6000)], cores) if count == len(entries) else 0.0
            with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root:
                started = time.perf_counter()
                write_store("emoji", selected, Folder(root), run_on_ray if rate else watched)
                seconds = time.perf_counter() - started
                first = first or seconds
                speeds.append((len(selected) / seconds, rate))
            peaks[count] = peak
    counted = speeds[1 : 1 + rounds]
    ratio = statistics.median(ours / bound for ours, bound in counted)
    ours, bound = (statistics.median(s[i] for s in counted) for i in (0, 1))
    small, large = peaks[12_000], peaks[24_000]
    return [
        Row(f"prepare {len(entries):,} drawings, images/s / two cores that only decode", ours, bound, ratio, ">= 0.8", ratio >= 0.8),
        Row("prepare 1,000 drawings in a Ray that has just started, seconds", first),
        Row("prepare, resident MiB, 24,000 drawings / 12,000", large, small, large / small, "<= 1.1", large <= 1.1 * small),
    ]  # fmt: skip


def measure_embed() -> list[Row]:
    """Resident memory of bulk embedding, with a small network and small images, by two processes on Ray."""
    import pipeline.distributed.ray_session
    import pipeline.inference.embed
    from pipeline import train
    from pipeline.inference.trained_model import load_run

    pipeline.distributed.ray_session.OBJECT_STORE_BYTES = 300 * 10**6
    pipeline.inference.embed.ROWS_PER_FILE = 512  # a process's memory settles after some of them
    entries = sorted(own_images.emoji(skin_tones=True), key=lambda e: e.class_name)
    peaks, speeds = dict[int, float](), dict[int, float]()
    with tempfile.TemporaryDirectory(prefix="raydml-bench-") as root, ray_session(2):
        for count in (6_000, 12_000, 24_000):
            store = write_store(f"emoji-{count}", entries[:count], Folder(f"{root}/data/{count}"), run_on_ray)
            settings = [
                "length=1 steps", f"name=embed-{count}", f"storage={root}", f"data.source={store.folder.uri}",
                "data.transforms.size=32", "model.backbone=test_efficientnet", "model.weights=none",
                "evaluation.test=false", "runtime.workers=0", "runtime.loader=in_process", "runtime.cpus_per_worker=1",
            ]  # fmt: skip
            arguments = ["baseline/emoji"]
            for setting in settings:
                arguments += ["--set", setting]
            if train.main(arguments):
                raise SystemExit("the run to embed with failed")
        for count in (6_000, 12_000, 24_000):
            peak = 0.0

            def watched(*args: Any) -> Iterator[Any]:
                nonlocal peak
                for record in run_on_ray(*args):
                    peak = max(peak, resident_mib(b"ray::MapWorker"))  # others are left from preparing
                    yield record

            pipeline.inference.embed.run_on_ray = watched
            started = time.perf_counter()
            manifest = pipeline.inference.embed.embed(
                load_run(f"{root}/runs/embed-{count}"), own_images.SPLITS, Folder(f"{root}/out/{count}"), 2
            )
            peaks[count] = peak
            speeds[count] = manifest["rows"] / (time.perf_counter() - started)
    small, large = peaks[12_000], peaks[24_000]
    return [
        Row("embed 24,000 drawings of 32 pixels, two processes, images/s", speeds[24_000]),
        Row("embed, resident MiB, 24,000 drawings / 12,000", large, small, large / small, "<= 1.1", large <= 1.1 * small),
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
    if "s3" in options.only:
        rows += measure_s3(options.rounds)
    if "prepare" in options.only:
        rows += measure_prepare(options.rounds)
    if "embed" in options.only:
        rows += measure_embed()
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
