"""Exact evaluation: memory and time at the sizes of Stanford Online Products and MARS; against pytorch-metric-learning.

    python -m benchmarks.evaluation [--json PATH]

Clustered random vectors stand in for embeddings; the noise is chosen for a Recall@1 near 60 %, or a mAP near 80 %. 3 minutes of CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from benchmarks.table import Row, finish
from pipeline.evaluation.clustering import clustering
from pipeline.evaluation.reid import DISTRACTOR, ReidRetrieval, ReidSet, match
from pipeline.evaluation.reranking import Reranking
from pipeline.evaluation.retrieval import retrieve

MEMORY_PROMISE_MIB = 400
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


def measure_at_product_size() -> dict[str, Any]:
    """To run in a fresh process: seconds, and peak resident memory above the level after the imports."""
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


def rows_at_size(size: str, metrics: Sequence[str], parts: Sequence[str]) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.evaluation", "--measure", size]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows = [Row(f"{size} size: {name}, %", figures[name]) for name in metrics]
    for name in parts:
        peak = figures[f"{name} MiB"]
        rows.append(
            Row(
                f"{size} size: {name}, peak memory, MiB",
                peak,
                promised=f"<= {MEMORY_PROMISE_MIB}",
                ok=peak <= MEMORY_PROMISE_MIB,
            )
        )
        rows += [Row(f"{size} size: {name}, {clock} s", figures[f"{name} {clock}"]) for clock in ("wall", "cpu")]
    return rows


def comparison_rows(rounds: int = 5) -> list[Row]:
    """Both sides in turn, on 8,000 x 512 in classes of 4; medians of CPU time."""
    embeddings, labels = clustered(np.full(2000, 4), dim=512, noise=2.4)
    calculator = AccuracyCalculator(include=tuple(THEIR_NAMES.values()), k="max_bin_count", device=torch.device("cpu"))
    ours_s, theirs_s = [], []
    for _ in range(rounds):
        start = time.process_time()
        ours = retrieve(embeddings, labels).summary()
        middle = time.process_time()
        theirs = calculator.get_accuracy(embeddings, labels)
        ours_s.append(middle - start)
        theirs_s.append(time.process_time() - middle)
    rows = []
    for name, their_name in THEIR_NAMES.items():
        their_value = 100 * theirs[their_name]
        equal = abs(ours[name] - their_value) <= 1e-9
        rows.append(Row(f"8,000 x 512: {name}, %", ours[name], their_value, promised="equal to 1e-9", ok=equal))
    ours_median, theirs_median = statistics.median(ours_s), statistics.median(theirs_s)
    return [*rows, Row("8,000 x 512: CPU s", ours_median, theirs_median, ours_median / theirs_median)]


MEASURE = {"SOP": measure_at_product_size, "MARS": measure_at_mars_size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--measure", choices=MEASURE, help="only print the figures of this process (used internally)")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASURE[arguments.measure]()))
        return 0
    products = [*(f"recall@{k}" for k in RECALL_AT), "map@r", "r_precision", "nmi", "ami"]
    persons = [prefix + name for prefix in ("", "re-ranked ") for name in ("cmc@1", "map", "map_trapezoidal")]
    rows = rows_at_size("SOP", products, ("retrieval", "clustering"))
    rows += rows_at_size("MARS", persons, ("matching", "re-ranking"))
    return finish([*rows, *comparison_rows()], arguments.json)


if __name__ == "__main__":
    sys.exit(main())
