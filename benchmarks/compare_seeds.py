"""More seeds for the rows of a comparison that are not clearly apart from their base: within two points, or by an interval that holds 0."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.compare_results import BASES, METRICS, MORE_SEEDS, Results
from benchmarks.compare_runs import Wanted
from pipeline.tuning.statistics import estimate

CLOSE = 2.0  # points
SEEDS = (3, 4)  # beside those of the sweep, 0 to 2


def more_seeds(results: Results) -> Iterator[Wanted]:
    """The runs of such rows and their bases, by the sweep's seeds alone: what has been trained since changes nothing."""
    for row, base in BASES.items():
        if base is None or not (results.has(row) and results.has(base)) or not _is_close(results, row, base):
            continue
        for name in (row, base):
            for seed in SEEDS:
                yield results.wanted(results.finals(name)[0], MORE_SEEDS, seed, seed=seed)


def _is_close(results: Results, row: str, base: str) -> bool:
    """Whether the sweep's seeds do not tell a row from its base, by one of the metrics."""
    own, other = ({run.seed: run.test for run in results.sweep_runs(name)} for name in (row, base))
    for metric in METRICS:
        mean, low, high, _ = estimate([own[seed][metric] - other[seed][metric] for seed in own if seed in other])
        if abs(mean) < CLOSE or low is None or high is None or low < 0 < high:
            return True
    return False
