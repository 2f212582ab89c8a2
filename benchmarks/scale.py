"""What an epoch of very many images costs before the first of them is read: its plan, the catalogue, the loader's items.

    python -m benchmarks.scale [--samples 59_551 1_000_000 10_000_000] [--only plans catalogue items] [--json PATH]
    python -m benchmarks.scale --samples 100_000_000 --only plans --plans class_balanced              # 6 GB

Datasets are simulated: labels and a catalogue, no pixels. Classes have 2 to 12 images, 5.26 on average, like the training
classes of Stanford Online Products (59,551 images of 11,318).

plans      an epoch's plan: class_balanced 16 × 4 (the default), each_class_once 16 × 4 (MMSI), uniform_classes 16 × 4
           (GCA-HNG), combine 16 × 4 (Intra-Batch Connections), random triplets (Smart Mining's first epochs), and its checkpoint
catalogue  `layout` of entries (up to 10 million: an entry is a Python object), writing catalogue.parquet, opening the store and
           selecting three of four folds
items      items of one worker for an epoch of class_balanced 16 × 4, and what one Ray Data pipeline takes in before its first

Figures are of fresh processes: CPU-seconds with one thread, and peak memory above the imports; labels are counted in plans,
with 8 bytes a sample.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from benchmarks.evaluation import peak_mib, product_sizes
from benchmarks.table import Row, finish
from methods.base import Context
from methods.plans import Plan, class_balanced, combine, each_class_once, uniform_classes
from methods.smart_mining import SmartMining, SmartMiningConfig
from pipeline.checkpoint import _pack
from pipeline.collectives import Ranks
from pipeline.data.catalog import Entry
from pipeline.data.loader import MOST_PER_BLOCK, PIPELINE_ITEMS, Item, item_blocks
from pipeline.data.store import FORMAT, Store, layout
from pipeline.session import ray_session
from pipeline.storage import Folder
from pipeline.worker import Worker

SECTIONS = ("plans", "catalogue", "items")
IMAGES, CLASSES = 59_551, 11_318  # training set of Stanford Online Products (Oh Song et al., CVPR 2016)
P, K = 16, 4
LIMITS = {IMAGES: (0.3, None), 10_000_000: (30.0, 2000.0)}  # promised of a plan: CPU-s, MB
MOST_ENTRIES = 10_000_000
Figures = dict[str, float]


# ---- simulated datasets ----------------------------------------------------------------------------------------------


def simulated_labels(samples: int) -> Int64[np.ndarray, " samples"]:
    """Class of every sample, ascending, as a store gives them."""
    sizes = product_sizes(max(1, round(samples * CLASSES / IMAGES)), samples)
    return np.repeat(np.arange(len(sizes)), sizes)


def simulated_catalogue(labels: Int64[np.ndarray, " samples"], folds: int = 4) -> pa.Table:
    """The catalogue of a training set with these labels; fold = class modulo folds."""
    names = pa.array([f"class-{i:08d}" for i in range(int(labels[-1]) + 1)])
    split = pa.DictionaryArray.from_arrays(np.zeros(len(labels), dtype=np.int8), ["train"])
    return pa.table(
        {
            "sample_id": np.arange(len(labels)),
            "label": labels,
            "class_name": pa.chunked_array([names.take(pa.array(part)) for part in np.array_split(labels, 64)]),
            "split": split.cast(pa.string()),
            "fold": labels % folds,
        }
    )


def write_simulated_store(table: pa.Table, folder: Folder) -> int:
    """A store without shards: catalogue and manifest; returns the catalogue's bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    data = sink.getvalue()
    folder.write("catalog.parquet", data)
    checksum = {"file": "catalog.parquet", "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "format": FORMAT,
        "name": "simulated",
        "fingerprint": "0",
        "catalog": checksum,
        "splits": {},
        "shards": [],
    }
    folder.write_json("manifest.json", manifest)
    return len(data)


# ---- figures of one process ------------------------------------------------------------------------------------------


def timed(figures: Figures, name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; its CPU-seconds go into the figures."""
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
    "combine": lambda labels: combine(labels, P, K, 0, 0),
    "random triplets": random_triplets,
}


def measure_plans(samples: int, kinds: list[str]) -> Figures:
    """One kind after the other: what one leaves behind has gone back to the system before the next."""
    level = peak_mib(reset=True)
    labels, figures = simulated_labels(samples), Figures()
    for kind in kinds:
        peak_mib(reset=True)
        plan = timed(figures, kind, functools.partial(PLANS[kind], labels))
        figures[f"{kind}, peak MB"] = (peak_mib() - level) * 1.048576
        own = [column for column in plan.columns.values() if column.strides[0]]
        figures[f"{kind}, bytes a sample"] = (plan.ids.nbytes + sum(column.nbytes for column in own)) / samples
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
    timed(figures, "layout", lambda: layout(entries, 4, 512))
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


def measure_items(samples: int) -> Figures:
    labels, figures = simulated_labels(samples), Figures()
    plan = class_balanced(labels, P, K, 0, 0)
    worker = SimpleNamespace(ranks=Ranks(), samples=SimpleNamespace(ids=np.arange(samples)))
    level = peak_mib(reset=True)
    timed(figures, "items of an epoch", lambda: sum(1 for _ in Worker._items(cast(Worker, worker), [(0, plan)], 0, 0)))
    figures["items of an epoch, peak MB"] = (peak_mib() - level) * 1.048576
    return figures


def measure_pipeline() -> Figures:
    import ray.data

    random, figures = np.random.default_rng(0), Figures()
    with ray_session(2):
        ray.data.from_arrow(item_blocks([Item(np.arange(P * K))], 1))  # what starts with the first
        items = [Item(random.integers(0, 10**7, P * K), (0, step, 0)) for step in range(PIPELINE_ITEMS)]
        wall, level = time.perf_counter(), peak_mib(reset=True)
        timed(figures, "blocks taken in", lambda: ray.data.from_arrow(item_blocks(items, MOST_PER_BLOCK)))
        figures["blocks taken in, wall s"] = time.perf_counter() - wall
        figures["blocks taken in, peak MB"] = (peak_mib() - level) * 1.048576
    return figures


MEASURES: dict[str, Callable[..., Figures]] = {
    "plans": measure_plans,
    "layout": measure_layout,
    "write": measure_write,
    "open": measure_open,
    "items": measure_items,
    "pipeline": measure_pipeline,
}


# ---- the table -------------------------------------------------------------------------------------------------------


def fresh(measure: str, **arguments: Any) -> Figures:
    """Figures of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--measure", measure, json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(what: str, figures: Figures) -> list[Row]:
    return [Row(f"{what}: {name}", value) for name, value in figures.items()]


def plan_rows(samples: int, kinds: list[str]) -> list[Row]:
    rows: list[Row] = []
    most_s, most_mb = LIMITS.get(samples, (None, None))
    figures = fresh("plans", samples=samples, kinds=kinds)
    limits = {f"{kind}, CPU-s": most_s for kind in kinds} | {f"{kind}, peak MB": most_mb for kind in kinds}
    for name, value in figures.items():
        most = limits.get(name)
        promised = "" if most is None else f"<= {most:g}"
        rows.append(Row(f"{samples:,}, {name}", value, None, None, promised, most is None or value <= most))
    return rows


def catalogue_rows(samples: int) -> list[Row]:
    figures = fresh("layout", samples=samples) if samples <= MOST_ENTRIES else {}
    with tempfile.TemporaryDirectory() as folder:
        figures |= fresh("write", samples=samples, folder=folder) | fresh("open", samples=samples, folder=folder)
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
        if "items" in options.only:
            rows += rows_of(f"{samples:,}", fresh("items", samples=samples))
    if "items" in options.only:
        rows += rows_of(f"a pipeline of {PIPELINE_ITEMS:,} steps of {P * K}", fresh("pipeline"))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
