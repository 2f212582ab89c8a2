"""More seeds for the rows of a comparison that are within two points of their base."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from benchmarks.compare_results import BASES, METRICS, MORE_SEEDS, Results
from benchmarks.compare_runs import Wanted, train_runs
from pipeline.config import Config

CLOSE = 2.0  # points
SEEDS = (3, 4)  # beside those of the sweep, 0 to 2


def train_seeds(results: Results, train: Callable[[str, Config], int], until: float | None) -> int:
    """Trains what is missing; returns the first status that is not 0. The sweep is complete before.

    Args:
        results: The set.
        train: Trains a configuration in a storage and returns the command's status.
        until: Time by the monotonic clock after which no run is started.
    """
    return train_runs(list(_wanted(results)), train, until)


def _wanted(results: Results) -> Iterator[Wanted]:
    """By the sweep's seeds alone, so that what is wanted does not change with what has been trained."""
    for row, base in BASES.items():
        if base is None or not (results.has(row) and results.has(base)) or not _close(results, row, base):
            continue
        for name in (row, base):
            record = results.finals(name)[0]
            for seed in SEEDS:
                run = f"compare-{results.name}-seed{seed}-{name}"
                config = results.config(record, results.root).model_copy(update={"name": run, "seed": seed})
                yield Wanted(name, config, results.folder / MORE_SEEDS / f"{name}-{seed}.json")


def _close(results: Results, row: str, base: str) -> bool:
    own, other = results.sweep_runs(row), results.sweep_runs(base)
    return any(
        abs(statistics.mean(r.test[metric] for r in own) - statistics.mean(r.test[metric] for r in other)) < CLOSE
        for metric in METRICS
    )
