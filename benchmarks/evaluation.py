"""Exact evaluation: memory and time at the sizes of Stanford Online Products and MARS; against faiss and pytorch-metric-learning.

    python -m benchmarks.evaluation [--json PATH] [--only sizes faiss pytorch-metric-learning]

Clustered random vectors stand in for embeddings; the noise is chosen for a Recall@1 of 60 to 75 %, or a mAP near 80 %. The two
sides of a comparison alternate, with one thread each. 4 minutes of CPU time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from benchmarks.alternate import alternate, as_it_comes, rows_of
from benchmarks.table import Row, finish
from pipeline.evaluation.clustering import clustering
from pipeline.evaluation.reid import DISTRACTOR, ReidRetrieval, ReidSet, match
from pipeline.evaluation.reranking import Reranking
from pipeline.evaluation.retrieval import retrieve

PROMISED_MIB = {"SOP retrieval": 121, "SOP clustering": 142, "MARS matching": 400, "MARS re-ranking": 400}
PROMISED_CPU_S = {"SOP retrieval": 20.0}
# (rows, dimensions): noise, promised share of the CPU time of faiss's flat index without a gallery, and with one as large
FAISS_SIZES = {(16_000, 64): (1.16, 1.0, 1.2), (16_000, 512): (2.4, 0.8, 1.0), (8_000, 2048): (3.5, 0.75, 1.0)}
FAISS_K = 14
PROMISED_SHARE = 0.6  # of the CPU time of pytorch-metric-learning
RECALL_AT = (1, 10, 100, 1000)
THEIR_NAMES = {"recall@1": "precision_at_1", "map@r": "mean_average_precision_at_r", "r_precision": "r_precision"}


def clustered(sizes: np.ndarray, dim: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows [sum of sizes, dim], float32, around random unit centres, and their classes; `noise` is its length."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.from_numpy(sizes))
    centres = torch.nn.functional.normalize(torch.randn(len(sizes), dim, generator=generator))
    rows = centres[labels] + torch.randn(len(labels), dim, generator=generator) * (noise / dim**0.5)
    return torch.nn.functional.normalize(rows), labels


def product_sizes(num_classes: int = 11_316, total: int = 60_502) -> np.ndarray:
    """Class sizes like those of the SOP test split: 2 to 12, 5.35 on average."""
    generator = np.random.default_rng(0)
    sizes = 2 + generator.binomial(10, (total / num_classes - 2) / 10, size=num_classes)
    while missing := total - sizes.sum():
        able = np.flatnonzero(sizes < 12 if missing > 0 else sizes > 2)
        sizes[generator.choice(able, size=min(abs(missing), len(able)), replace=False)] += np.sign(missing)
    return sizes


def warm_up() -> None:
    """Loads the engine's machine code, which numba makes once and keeps on disk."""
    retrieve(torch.randn(64, 8), torch.arange(64) // 2)


def measure_compilation() -> dict[str, Any]:
    """To run in a fresh process with an empty NUMBA_CACHE_DIR: CPU seconds of making that machine code."""
    start = time.process_time()
    warm_up()
    return {"compilation cpu": time.process_time() - start}


def measure_at_product_size() -> dict[str, Any]:
    """To run in a fresh process: seconds, and peak resident memory above the level after the imports."""
    warm_up()
    level = peak_mib(reset=True)  # before the embeddings are made: they count, 15 MiB
    embeddings, labels = clustered(product_sizes(), dim=64, noise=1.16)
    return measure(
        {
            "retrieval": lambda: retrieve(embeddings, labels).summary(RECALL_AT),
            "clustering": lambda: clustering(embeddings, labels),
        },
        level,
    )


def measure_at_mars_size() -> dict[str, Any]:
    """As `measure_at_product_size`: 1,980 tracklets of 626 persons among 12,180, of which a third are distractors.

    The embeddings, 55 MiB, do not count here.
    """
    generator = np.random.default_rng(0)
    embeddings, labels = clustered(np.bincount(generator.integers(900, size=14_160)), dim=1024, noise=2.6)
    labels[labels >= 626] = DISTRACTOR
    persons, others = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    order = generator.permutation(persons)
    cameras = torch.from_numpy(generator.integers(6, size=len(labels)))
    looked_for, gallery = (
        ReidSet(embeddings[ids], labels[ids], cameras[ids])
        for ids in map(torch.from_numpy, (order[:1980], np.concatenate([order[1980:], others])))
    )
    warm_up()
    level = peak_mib(reset=True)

    def again() -> ReidRetrieval:
        reranking = Reranking.of(looked_for.embeddings, gallery.embeddings)
        return match(looked_for, gallery, reranking=reranking)

    return measure(
        {
            "matching": lambda: match(looked_for, gallery).summary(),
            "re-ranking": lambda: {f"re-ranked {name}": value for name, value in again().summary().items()},
        },
        level,
    )


def measure(parts: dict[str, Callable[[], dict[str, float]]], level: float) -> dict[str, Any]:
    """What the parts return, and of each the seconds and the peak memory above `level`."""
    figures: dict[str, Any] = {}
    for name, part in parts.items():
        peak_mib(reset=True)
        wall, cpu = time.perf_counter(), time.process_time()
        figures |= part()
        figures[f"{name} wall"], figures[f"{name} cpu"] = time.perf_counter() - wall, time.process_time() - cpu
        figures[f"{name} MiB"] = peak_mib() - level
    return figures


def peak_mib(reset: bool = False) -> float:
    """This process's largest resident memory since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_fresh_process(what: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.evaluation", "--measure", what]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=as_it_comes() | environment)
    return json.loads(printed.stdout)


def rows_at_size(size: str, metrics: Sequence[str], parts: Sequence[str]) -> list[Row]:
    figures = in_fresh_process(size)
    rows = [Row(f"{size} size: {name}, %", figures[name]) for name in metrics]
    for name in parts:
        peak, most = figures[f"{name} MiB"], PROMISED_MIB[f"{size} {name}"]
        rows.append(Row(f"{size} size: {name}, peak memory, MiB", peak, promised=f"<= {most}", ok=peak <= most))
        cpu, most_s = figures[f"{name} cpu"], PROMISED_CPU_S.get(f"{size} {name}")
        promised = "" if most_s is None else f"<= {most_s:g}"
        rows.append(Row(f"{size} size: {name}, wall s", figures[f"{name} wall"]))
        rows.append(Row(f"{size} size: {name}, cpu s", cpu, promised=promised, ok=most_s is None or cpu <= most_s))
    return rows


def faiss_rows(rounds: int = 5) -> list[Row]:
    """Metrics of every query against faiss's exact search for its 14 nearest (`faiss.knn`); medians of CPU time.

    The rows have length one, so that distance, faiss's default, and inner product, which takes it less time, order them alike.
    """
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    warm_up()
    for (num, dim), (noise, most, most_with_gallery) in FAISS_SIZES.items():
        embeddings, labels = clustered(np.full(num // 4, 8), dim, noise)
        queries, gallery = (embeddings[start::2].contiguous() for start in (0, 1))
        sides = {"among each other": (queries, {}, most)}
        in_gallery = {"gallery": gallery, "gallery_labels": labels[1::2]}
        sides["query to gallery"] = (gallery, in_gallery, most_with_gallery)
        for name, (searched, arguments, promised) in sides.items():
            times = []
            for _ in range(rounds):
                row = [time.process_time()]
                ours = retrieve(queries, labels[::2], **arguments)
                row.append(time.process_time())
                for metric in (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT):
                    theirs = faiss.knn(queries.numpy(), searched.numpy(), FAISS_K, metric=metric)[1]
                    row.append(time.process_time())
                times.append(np.diff(row))
            if not arguments:  # they find the query itself; without it, the nearest
                theirs = np.where(theirs[:, :1] == np.arange(num)[:, None], theirs[:, 1:2], theirs[:, :1])
            same = 100 * float(np.mean(ours.neighbours[:, 0] == theirs[:, 0]))
            what = f"{num:,} x {dim:,}, {name}"
            recall = ours.summary()["recall@1"]
            rows.append(Row(f"{what}: Recall@1, %; queries whose nearest is faiss's, %", recall, same))
            own, by_distance, by_product = np.array(times).T
            ratio = float(np.median(own / by_distance))
            medians = float(np.median(own)), float(np.median(by_distance))
            rows.append(Row(f"{what}: CPU s", *medians, ratio, f"<= {promised:g}", ratio <= promised))
            medians = float(np.median(own)), float(np.median(by_product))
            rows.append(Row(f"{what}, faiss by inner product: CPU s", *medians, float(np.median(own / by_product))))
    torch.set_num_threads(threads)
    return rows


def comparison_rows(rounds: int = 5) -> list[Row]:
    """Both sides in turn, on 8,000 x 512 in classes of 4; medians of CPU time."""
    embeddings, labels = clustered(np.full(2000, 4), dim=512, noise=2.4)
    calculator = AccuracyCalculator(include=tuple(THEIR_NAMES.values()), k="max_bin_count", device=torch.device("cpu"))
    ours, theirs = retrieve(embeddings, labels).summary(), calculator.get_accuracy(embeddings, labels)
    rows = []
    for name, their_name in THEIR_NAMES.items():
        their_value = 100 * theirs[their_name]
        equal = abs(ours[name] - their_value) <= 1e-9
        rows.append(Row(f"8,000 x 512: {name}, %", ours[name], their_value, promised="equal to 1e-9", ok=equal))
    seconds = alternate(
        lambda: retrieve(embeddings, labels).summary(), lambda: calculator.get_accuracy(embeddings, labels), rounds
    )
    return [*rows, *rows_of("8,000 x 512 / pytorch-metric-learning", seconds, PROMISED_SHARE)]


def size_rows() -> list[Row]:
    products = [*(f"recall@{k}" for k in RECALL_AT), "map@r", "r_precision", "nmi", "ami"]
    persons = [prefix + name for prefix in ("", "re-ranked ") for name in ("cmc@1", "map", "map_trapezoidal")]
    with tempfile.TemporaryDirectory() as empty:
        compilation = in_fresh_process("compilation", NUMBA_CACHE_DIR=empty)["compilation cpu"]
    return [
        Row("making the engine's machine code, once a machine, cpu s", compilation),
        *rows_at_size("SOP", products, ("retrieval", "clustering")),
        *rows_at_size("MARS", persons, ("matching", "re-ranking")),
    ]


MEASURE = {"SOP": measure_at_product_size, "MARS": measure_at_mars_size, "compilation": measure_compilation}
SECTIONS = {"sizes": size_rows, "faiss": faiss_rows, "pytorch-metric-learning": comparison_rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--measure", choices=MEASURE, help="only print the figures of this process (used internally)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASURE[arguments.measure]()))
        return 0
    rows = [row for name in arguments.only for row in SECTIONS[name]()]
    return finish(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
