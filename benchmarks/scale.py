"""Cost of an epoch of very many images before the first is read: plan, catalogue, shards, the loader's requests.

    python -m benchmarks.scale [--samples 59_551 1_000_000 10_000_000] [--only plans catalogue shards items] [--json PATH]
    python -m benchmarks.scale --samples 100_000_000 --only plans --plans class_balanced              # 6 GB

Datasets are simulated: labels and a catalogue, and one small image. Classes have 2 to 12 images, 5.26 on average,
like the training classes of Stanford Online Products (59,551 images of 11,318).

plans      an epoch's plan: class_balanced 16 × 4 (the default), each_class_once 16 × 4 (MMSI), uniform_classes 16 × 4
           (GCA-HNG), combine 16 × 4 (Intra-Batch Connections), random triplets (Smart Mining's first epochs), and its checkpoint
catalogue  `plan_shards` of entries (up to 10 million: an entry is a Python object), writing catalog.parquet, opening the
           store and selecting three of four folds
shards     opening a store with the manifest that `prepare` writes, locating the images of an epoch of class_balanced 16 × 4,
           and the memory of the readers: after reading from every shard once, and of an opened copy. Every shard is the
           same file, of one small image 512 times; a copy has the batches of a real one, of 8 bytes an image
items      requests of one worker for an epoch of class_balanced 16 × 4, and the blocks that a Ray Data pipeline takes before
           its first image

Every figure is of a fresh process: CPU-seconds with one thread, and peak memory above the imports; plans include the labels,
8 bytes a sample.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from benchmarks.evaluation import peak_mib
from benchmarks.simulated import (
    IMAGES,
    simulated_catalogue,
    simulated_labels,
    simulated_shards,
    write_simulated_copy,
    write_simulated_store,
)
from benchmarks.table import Row, finish
from methods.base import Context
from methods.plans import Plan, class_balanced, combine_sampler, each_class_once, uniform_classes
from methods.smart_mining import SmartMining, SmartMiningConfig
from pipeline.data.cache import MappedReader, split_bytes
from pipeline.data.entries import Entry
from pipeline.data.loader import (
    BLOCKS_PER_TASK,
    MAX_REQUESTS_PER_BLOCK,
    REQUESTS_PER_PIPELINE,
    LoadRequest,
    request_blocks,
)
from pipeline.data.reader import _MAX_FOOTERS, RowGroupReader
from pipeline.data.store import Store
from pipeline.data.write_store import plan_shards
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.ray_session import ray_session
from pipeline.runs.checkpoint import _pack
from pipeline.storage import Folder
from pipeline.training.batches import PlannedBatches

SECTIONS = ("plans", "catalogue", "shards", "items")
P, K = 16, 4
LIMITS = {IMAGES: (0.3, None), 10_000_000: (30.0, 2000.0)}  # for a plan: CPU-s, MB
MAX_ENTRIES = 10_000_000
Figures = dict[str, float]


# ---- figures of one process ------------------------------------------------------------------------------------------


def timed(figures: Figures, name: str, work: Callable[[], Any]) -> Any:
    """Calls `work`, records its CPU-seconds in the figures, and returns its result."""
    started = time.process_time()
    result = work()
    figures[f"{name}, CPU-s"] = time.process_time() - started
    return result


def random_triplets(labels: np.ndarray) -> Plan:
    method = SmartMining(SmartMiningConfig(), 8, 2)
    return method.plan(0, cast(Context, SimpleNamespace(labels=labels, seed=0)))


PLANS: dict[str, Callable[[np.ndarray], Plan]] = {
    "class_balanced": lambda labels: class_balanced(labels, P, K, 0, 0),
    "each_class_once": lambda labels: each_class_once(labels, P, K, 0, 0),
    "uniform_classes": lambda labels: uniform_classes(labels, P, K, 0, 0),
    "combine": lambda labels: combine_sampler(labels, P, K, 0, 0),
    "random triplets": random_triplets,
}


def measure_plans(samples: int, kinds: list[str]) -> Figures:
    """Figures of several kinds of plans, one after the other; the memory of each is freed before the next."""
    level = peak_mib(reset=True)
    labels, figures = simulated_labels(samples), Figures()
    for kind in kinds:
        peak_mib(reset=True)
        plan = timed(figures, kind, functools.partial(PLANS[kind], labels))
        figures[f"{kind}, peak MB"] = (peak_mib() - level) * 1.048576
        columns = [column for column in plan.columns.values() if column.strides[0]]  # others are one broadcast row
        figures[f"{kind}, bytes a sample"] = (plan.ids.nbytes + sum(column.nbytes for column in columns)) / samples
        if plan.columns:
            packed = timed(figures, f"{kind}, for a checkpoint", functools.partial(_pack, plan))
            figures[f"{kind}, for a checkpoint, bytes a sample"] = len(packed) / samples
        del plan
    return figures


def measure_layout(samples: int) -> Figures:
    labels, figures = simulated_labels(samples).tolist(), Figures()
    level = peak_mib(reset=True)
    names = [f"class-{i:08d}" for i in range(labels[-1] + 1)]
    entries = timed(
        figures,
        "entries",
        lambda: [Entry(f"s3://bucket/images/{i:09d}.jpg", names[c], "train") for i, c in enumerate(labels)],
    )
    figures["entries, bytes a sample"] = (peak_mib() - level) * 2**20 / samples
    timed(figures, "layout", lambda: plan_shards(entries, 4, 512))
    figures["entries and layout, peak MB"] = (peak_mib() - level) * 1.048576
    return figures


def measure_write(samples: int, folder: str) -> Figures:
    table, figures = simulated_catalogue(simulated_labels(samples)), Figures()
    written = timed(figures, "catalogue written", lambda: write_simulated_store(table, Folder(folder)))
    return figures | {"catalogue, bytes a sample on disk": written / samples}


def measure_open(samples: int, folder: str) -> Figures:
    figures, level = Figures(), peak_mib(reset=True)
    store = timed(figures, "store opened", lambda: Store(Folder(folder)))
    figures["store opened, peak MB"] = (peak_mib() - level) * 1.048576
    figures["store opened, bytes a sample kept"] = (peak_mib(reset=True) - level) * 2**20 / samples
    selected = timed(figures, "store, select", lambda: store.select(["train"], without_fold=0))
    figures["store opened and selected, peak MB"] = (peak_mib() - level) * 1.048576
    assert len(selected) < samples == len(store.label)
    return figures


def measure_write_shards(samples: int, folder: str) -> Figures:
    target = Folder(folder)
    records = simulated_shards(samples, target)
    write_simulated_store(simulated_catalogue(simulated_labels(samples)), target, records)
    write_simulated_copy(samples, Path(folder, "copy.arrow"))
    return {"shards": len(records), "manifest, MB": target.size("manifest.json") / 1e6}


def measure_shards(samples: int, folder: str) -> Figures:
    figures, level, anonymous = Figures(), peak_mib(reset=True), anonymous_mib()
    manifest = timed(figures, "manifest read", lambda: Folder(folder).read_json("manifest.json"))
    figures["manifest read, peak MB"] = (peak_mib() - level) * 1.048576
    figures["manifest kept, bytes a shard"] = (anonymous_mib() - anonymous) * 2**20 / len(manifest["shards"])
    del manifest
    store = timed(figures, "store with shards opened", lambda: Store(Folder(folder)))
    figures["store with shards opened, peak MB"] = (peak_mib() - level) * 1.048576
    timed(figures, "sizes of shards compared", store.check_shards)
    timed(figures, "size of the copy", lambda: split_bytes(store, "train"))
    reader = timed(figures, "row groups' reader opened", lambda: RowGroupReader(store))

    plan = class_balanced(simulated_labels(samples), P, K, 0, 0)
    items = [store.sample_id[ids] for ids in plan.ids]
    level = peak_mib(reset=True)

    def find() -> None:
        for ids in items:
            reader._locate(ids)

    timed(figures, "an epoch's row groups found", find)
    figures["an epoch's row groups found, peak MB"] = (peak_mib() - level) * 1.048576
    figures["row groups found, CPU-µs an item"] = figures["an epoch's row groups found, CPU-s"] / len(items) * 1e6
    groups = [len({place[:2] for place in reader._locate(ids)}) for ids in items[:1000]]
    figures["row groups an item"] = sum(groups) / len(groups)
    return figures


def measure_row_groups(samples: int, folder: str) -> Figures:
    figures, reader = Figures(), RowGroupReader(Store(Folder(folder)))
    shards = len(reader.weights)
    level, anonymous = peak_mib(reset=True), anonymous_mib()
    timed(
        figures, "a row group of every shard read", lambda: [reader._read_group(i, 0) and None for i in range(shards)]
    )
    figures["a row group of every shard read, peak MB"] = (peak_mib() - level) * 1.048576
    figures["row groups' reader keeps, bytes a shard"] = (anonymous_mib() - anonymous) * 2**20 / shards
    assert len(reader.metadata) <= _MAX_FOOTERS
    return figures


def measure_copy(samples: int, folder: str) -> Figures:
    path = Path(folder, "copy.arrow")
    figures, anonymous = Figures(), anonymous_mib()
    with path.open("rb") as file:
        reader = timed(figures, "copy opened", lambda: MappedReader(path, file))
    reader_bytes = (anonymous_mib() - anonymous) * 2**20
    figures["copy opened, MB kept"] = reader_bytes / 1e6
    figures["copy opened, bytes a sample kept"] = reader_bytes / samples
    figures["copy opened, bytes a sample of ids and checksums"] = (reader.ids.nbytes + reader.sums.nbytes) / samples
    assert len(reader.ids) == samples
    return figures


def anonymous_mib() -> float:
    """This process's resident memory, without mapped files, whose pages the system can drop (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def measure_items(samples: int) -> Figures:
    labels, figures = simulated_labels(samples), Figures()
    plan = class_balanced(labels, P, K, 0, 0)
    worker = SimpleNamespace(ranks=Ranks(), samples=SimpleNamespace(ids=np.arange(samples)))
    level = peak_mib(reset=True)
    timed(
        figures,
        "items of an epoch",
        lambda: sum(1 for _ in PlannedBatches.items(cast(PlannedBatches, worker), [(0, plan)], 0, 0)),
    )
    figures["items of an epoch, peak MB"] = (peak_mib() - level) * 1.048576
    return figures


def measure_pipeline() -> Figures:
    import ray.data

    random, figures = np.random.default_rng(0), Figures()
    with ray_session(2):
        ray.data.from_arrow(request_blocks([LoadRequest(np.arange(P * K))], 1))  # what starts with the first
        items = [LoadRequest(random.integers(0, 10**7, P * K), (0, step, 0)) for step in range(REQUESTS_PER_PIPELINE)]
        wall, level = time.perf_counter(), peak_mib(reset=True)
        per_task = MAX_REQUESTS_PER_BLOCK * BLOCKS_PER_TASK
        timed(figures, "blocks taken in", lambda: ray.data.from_arrow(request_blocks(items, per_task)))
        figures["blocks taken in, wall s"] = time.perf_counter() - wall
        figures["blocks taken in, peak MB"] = (peak_mib() - level) * 1.048576
    return figures


MEASURES: dict[str, Callable[..., Figures]] = {
    "plans": measure_plans,
    "layout": measure_layout,
    "write": measure_write,
    "open": measure_open,
    "write_shards": measure_write_shards,
    "shards": measure_shards,
    "row_groups": measure_row_groups,
    "copy": measure_copy,
    "items": measure_items,
    "pipeline": measure_pipeline,
}


# ---- the table -------------------------------------------------------------------------------------------------------


def fresh(measure: str, **arguments: Any) -> Figures:
    """Runs a measurement in a new process and returns its figures."""
    command = [sys.executable, "-m", "benchmarks.scale", "--measure", measure, json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(process.stdout.splitlines()[-1])


def rows_of(what: str, figures: Figures) -> list[Row]:
    return [Row(f"{what}: {name}", value) for name, value in figures.items()]


def plan_rows(samples: int, kinds: list[str]) -> list[Row]:
    rows: list[Row] = []
    max_cpu_s, max_mb = LIMITS.get(samples, (None, None))
    figures = fresh("plans", samples=samples, kinds=kinds)
    limits = {f"{kind}, CPU-s": max_cpu_s for kind in kinds} | {f"{kind}, peak MB": max_mb for kind in kinds}
    for name, value in figures.items():
        limit = limits.get(name)
        promised = "" if limit is None else f"<= {limit:g}"
        rows.append(Row(f"{samples:,}, {name}", value, None, None, promised, limit is None or value <= limit))
    return rows


def catalogue_rows(samples: int) -> list[Row]:
    figures = fresh("layout", samples=samples) if samples <= MAX_ENTRIES else {}
    with tempfile.TemporaryDirectory() as folder:
        figures |= fresh("write", samples=samples, folder=folder) | fresh("open", samples=samples, folder=folder)
    return rows_of(f"{samples:,}", figures)


def shard_rows(samples: int) -> list[Row]:
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        for measure in ("write_shards", "shards", "row_groups", "copy"):
            figures |= fresh(measure, samples=samples, folder=folder)
    return rows_of(f"{samples:,}", figures)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", nargs="+", type=int, default=[IMAGES, 1_000_000, 10_000_000])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS), help="kinds of plans")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--measure", nargs=2, help="only print the figures of this process (used internally)")
    options = parser.parse_args()
    if options.measure:
        name, arguments = options.measure
        print(json.dumps(MEASURES[name](**json.loads(arguments))))
        return 0
    rows: list[Row] = []
    for samples in options.samples:
        if "plans" in options.only:
            rows += plan_rows(samples, options.plans)
        if "catalogue" in options.only:
            rows += catalogue_rows(samples)
        if "shards" in options.only:
            rows += shard_rows(samples)
        if "items" in options.only:
            rows += rows_of(f"{samples:,}", fresh("items", samples=samples))
    if "items" in options.only:
        rows += rows_of(f"a pipeline of {REQUESTS_PER_PIPELINE:,} steps of {P * K}", fresh("pipeline"))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
