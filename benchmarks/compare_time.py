"""The rows of a comparison at equal wall time: each trained for as long as the multi-similarity loss takes in the first table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.compare_results import METRICS, ROWS, Figures, Results, steps_of
from benchmarks.compare_runs import KeptRun, Wanted, kept_runs
from methods.config import Length

REFERENCE = "multi_similarity"
SAME = 0.1  # a row whose time is as near to the reference's is not trained again
FOLDER = "equal_time"


def timed_runs(results: Results) -> list[KeptRun]:
    """The kept runs of a set, those of rows that are as fast as the reference among them."""
    if not results.has(REFERENCE):
        return []
    kept = kept_runs(results.folder / FOLDER)
    for row in ROWS:
        if all(run.row != row for run in kept) and results.has(row) and not _again(results, row):
            kept += results.final_runs(row)
    return kept


def time_figures(runs: Sequence[KeptRun]) -> Figures:
    """Percent by metric, row and seed."""
    rows = {run.row for run in runs}
    return {
        metric: {row: {run.seed: run.test[metric] for run in runs if run.row == row} for row in ROWS if row in rows}
        for metric in METRICS
    }


def equal_time(results: Results) -> Iterator[Wanted]:
    """The runs of rows that are slower or faster than the reference; the first table is complete before."""
    for row in ROWS if results.has(REFERENCE) else ():
        if not _again(results, row):
            continue
        for record in results.finals(row):
            name = f"compare-{results.name}-time-{row}-{record.seed}"
            length = Length(value=_length(results, row), unit="steps")
            config = results.config(record, results.root).model_copy(update={"name": name, "length": length})
            yield Wanted(row, config, results.folder / FOLDER / f"{row}-{record.seed}.json")


def _seconds_per_step(results: Results, row: str) -> float:
    return statistics.median(run.seconds / run.steps for run in results.final_runs(row))


def _length(results: Results, row: str) -> int:
    """Steps of a row in the time that the reference takes."""
    whole = steps_of(results.finals(REFERENCE)[0])
    return max(1, round(whole * _seconds_per_step(results, REFERENCE) / _seconds_per_step(results, row)))


def _again(results: Results, row: str) -> bool:
    """Whether a row is slower or faster than the reference."""
    return results.has(row) and abs(_length(results, row) / steps_of(results.finals(row)[0]) - 1) > SAME
