"""The rows of a comparison at equal wall time: each trained for as long as the multi-similarity loss takes in the first table.

What a row's step takes is measured on its final runs. Other programs make some of them slower and none faster, so it is the second shortest
time that counts, and a row whose two shortest differ by more than a tenth is timed again, up to three times. A row of which every run was
disturbed is not noticed: `--time ROW` times it once more, and `--resume` then until two times agree.
On a machine of another speed than that of the final runs every row has to be timed twice by `--time`, as records do not tell machines apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.compare_results import ROWS, Results, steps_of
from benchmarks.compare_runs import SAME, KeptRun, Wanted

REFERENCE = "multi_similarity"
TIMING, EQUAL_TIME = "timing", "equal_time"  # folders of records
TIMINGS = 3  # at most, of a row


def timed_runs(results: Results) -> list[KeptRun]:
    """The runs at equal wall time, those of rows that are as fast as the reference among them; none before they are all there."""
    if not results.has(REFERENCE) or not all(wanted.is_kept() for wanted in equal_time(results)):
        return []
    return [
        run
        for row in ROWS
        if results.has(row)
        for run in (results.kept_runs(EQUAL_TIME, row) if _again(results, row) else results.final_runs(row))
    ]


def more_timings(results: Results) -> Iterator[Wanted]:
    """A run for each row whose times do not agree: the first final run again."""
    for row in filter(results.has, ROWS):
        times = _times(results, row)
        if len(results.kept_runs(TIMING, row)) < TIMINGS and (len(times) < 2 or times[1] > (1 + SAME) * times[0]):
            yield timing(results, row)


def timing(results: Results, row: str) -> Wanted:
    """The first final run of a row once more, for its time."""
    return results.wanted(results.finals(row)[0], TIMING, len(results.kept_runs(TIMING, row)))


def equal_time(results: Results) -> Iterator[Wanted]:
    """The runs of rows that are slower or faster than the reference; the first table is complete before."""
    for row in ROWS if results.has(REFERENCE) else ():
        if not _again(results, row):
            continue
        for record in results.finals(row):
            yield results.wanted(record, EQUAL_TIME, record.seed or 0, steps=_length(results, row))


def seconds_per_step(results: Results, row: str) -> float:
    return _times(results, row)[:2][-1]


def _times(results: Results, row: str) -> list[float]:
    """Seconds of a step in each final run of a row, mining included and evaluation not, the shortest first."""
    return sorted(run.seconds / run.steps for run in results.final_runs(row) + results.kept_runs(TIMING, row))


def _length(results: Results, row: str) -> int:
    """Steps of a row in the time that the reference takes."""
    whole = steps_of(results.finals(REFERENCE)[0])
    return max(1, round(whole * seconds_per_step(results, REFERENCE) / seconds_per_step(results, row)))


def _again(results: Results, row: str) -> bool:
    """Whether a row is slower or faster than the reference."""
    return results.has(row) and abs(_length(results, row) / steps_of(results.finals(row)[0]) - 1) > SAME
