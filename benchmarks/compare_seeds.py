"""More seeds for the rows of a comparison that are within two points of their base."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.compare_results import BASES, METRICS, MORE_SEEDS, Results
from benchmarks.compare_runs import Wanted

CLOSE = 2.0  # points
SEEDS = (3, 4)  # beside those of the sweep, 0 to 2


def more_seeds(results: Results) -> Iterator[Wanted]:
    """The runs of close rows and their bases, by the sweep's seeds alone: what has been trained since changes nothing."""
    for row, base in BASES.items():
        if base is None or not (results.has(row) and results.has(base)) or not _close(results, row, base):
            continue
        for name in (row, base):
            record = results.finals(name)[0]
            for seed in SEEDS:
                run = f"compare-{results.name}-seed{seed}-{name}"
                config = results.config(record, results.root).model_copy(update={"name": run, "seed": seed})
                yield Wanted(name, record.values, config, results.folder / MORE_SEEDS / f"{name}-{seed}.json")


def _close(results: Results, row: str, base: str) -> bool:
    own, other = results.sweep_runs(row), results.sweep_runs(base)
    return any(
        abs(statistics.mean(r.test[metric] for r in own) - statistics.mean(r.test[metric] for r in other)) < CLOSE
        for metric in METRICS
    )
