"""Exact evaluation: memory and time at the size of Stanford Online Products, and against pytorch-metric-learning.

    python -m benchmarks.evaluation [--json PATH]

Clustered random vectors stand in for embeddings; the noise is chosen for a Recall@1 near 60 %. 2 minutes of CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from benchmarks.table import Row, finish
from pipeline.metrics import clustering, retrieve

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
    figures: dict[str, Any] = {}
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "retrieval": lambda: retrieve(embeddings, labels).summary(RECALL_AT),
        "clustering": lambda: clustering(embeddings, labels),
    }
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


def product_size_rows() -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.evaluation", "--measure"]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows = [
        Row(f"SOP size: {name}, %", figures[name])
        for name in (*(f"recall@{k}" for k in RECALL_AT), "map@r", "r_precision", "nmi", "ami")
    ]
    for name in ("retrieval", "clustering"):
        peak = figures[f"{name} MiB"]
        rows.append(
            Row(
                f"SOP size: {name}, peak memory, MiB",
                peak,
                promised=f"<= {MEMORY_PROMISE_MIB}",
                ok=peak <= MEMORY_PROMISE_MIB,
            )
        )
        rows += [Row(f"SOP size: {name}, {clock} s", figures[f"{name} {clock}"]) for clock in ("wall", "cpu")]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument(
        "--measure", action="store_true", help="only print the figures of this process (used internally)"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_at_product_size()))
        return 0
    return finish([*product_size_rows(), *comparison_rows()], arguments.json)


if __name__ == "__main__":
    sys.exit(main())
