"""The rows of a comparison at equal wall time: each trained for as long as the multi-similarity loss takes in the first table."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.compare_results import METRICS, ROWS, Figures, Results
from methods.config import Length
from pipeline.config import Config
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder
from pipeline.tuning.sweep_folder import TrialRecord

REFERENCE = "multi_similarity"
SAME = 0.05  # a row whose time is as near to the reference's is not trained again
FOLDER = "equal_time"


@dataclass(frozen=True)
class TimedRun:
    """A final run of a row, with its length by time.

    Attributes:
        row: The row.
        seed: The run's seed.
        steps: Its length.
        seconds: Time of training, without evaluation.
        test: Its metrics on the test classes, in percent.
    """

    row: str
    seed: int
    steps: int
    seconds: float
    test: dict[str, float]


def timed_runs(results: Results) -> list[TimedRun]:
    """The kept runs of a set, those of rows that are as fast as the reference among them."""
    if not results.has(REFERENCE):
        return []
    files = sorted((results.folder / FOLDER).glob("*.json"))
    kept = [TimedRun(**json.loads(file.read_text())) for file in files]
    for row in ROWS:
        if all(run.row != row for run in kept) and (found := _finals(results, row)) and not _again(results, row):
            kept += [
                TimedRun(row, record.seed or 0, _steps(record), record.runs[0].seconds, record.runs[0].test)
                for record in found
            ]
    return kept


def time_figures(runs: Sequence[TimedRun]) -> Figures:
    """Percent by metric, row and seed."""
    rows = {run.row for run in runs}
    return {
        metric: {row: {run.seed: run.test[metric] for run in runs if run.row == row} for row in ROWS if row in rows}
        for metric in METRICS
    }


def train_timed(results: Results, train: Callable[[str, Config], int], until: float | None) -> int:
    """Trains what is missing, a run a core; returns the first status that is not 0.

    Args:
        results: The set, whose first table is complete.
        train: Trains a configuration in a storage and returns the command's status.
        until: Time by the monotonic clock after which no run is started.
    """
    missing = list(_missing(results))

    def one(work: tuple[str, TrialRecord, Path]) -> int:
        row, record, file = work
        if until is not None and time.monotonic() > until:
            return 0
        config = results.config(record, results.root)
        steps = _length(results, row)
        name = f"compare-{results.name}-time-{row}-{record.seed}"
        config = config.model_copy(update={"name": name, "length": Length(value=steps, unit="steps")})
        if status := train(results.root, config):
            return status
        summary = Folder(f"{results.root}/runs/{name}").read_json(SUMMARY)
        run = TimedRun(row, record.seed or 0, steps, summary["seconds"], summary["final"])
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(asdict(run), indent=1) + "\n")
        return 0

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return next((status for status in pool.map(one, missing) if status), 0)


def _missing(results: Results) -> Iterator[tuple[str, TrialRecord, Path]]:
    for row in ROWS if results.has(REFERENCE) else ():
        if not _again(results, row):
            continue
        for record in _finals(results, row):
            file = results.folder / FOLDER / f"{row}-{record.seed}.json"
            if not file.exists():
                yield row, record, file


def _finals(results: Results, row: str) -> list[TrialRecord]:
    return results.finals(row) if results.has(row) else []


def _steps(record: TrialRecord) -> int:
    return int(str(record.length).split()[0])


def _seconds_per_step(results: Results, row: str) -> float:
    return statistics.median(record.runs[0].seconds / _steps(record) for record in results.finals(row))


def _length(results: Results, row: str) -> int:
    """Steps of a row in the time that the reference takes."""
    whole = _steps(results.finals(REFERENCE)[0])
    return max(1, round(whole * _seconds_per_step(results, REFERENCE) / _seconds_per_step(results, row)))


def _again(results: Results, row: str) -> bool:
    """Whether a row is slower or faster than the reference."""
    if not results.has(row):
        return False
    return abs(_length(results, row) / _steps(results.finals(row)[0]) - 1) > SAME
