"""What a sweep says: for each method the chosen setting, its figures with intervals, and how far it is from the best.

Everything is computed from the records of the trials, also while the sweep runs. A method's figures are
those of its final runs; where the sweep has none, those that chose its setting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.metric_names import COUNTS, metric_title
from pipeline.tuning.statistics import (
    COMPARISON,
    FEW_SEEDS,
    INTERVAL,
    Comparison,
    Estimate,
    best_method,
    compare_with_best,
    estimate,
)
from pipeline.tuning.sweep_folder import RunProgress, TrialRecord, best_trial, final_trials

if (
    TYPE_CHECKING
):  # the schema imports the methods and with them PyTorch; the answer is also shown by commands without it
    from pipeline.tuning.sweep_config import SweepConfig

UNEQUAL_IMAGES = 1.5  # times as many images for one method's search as for another's: told

# Where figures come from: key in the table of figures, and what they are called everywhere.
TEST = "test"
CONCATENATED = "concatenated"
VALIDATION = "validation"
BEST = "best"
LAST = "last"
TITLES = {
    TEST: "test classes",
    CONCATENATED: "test classes, concatenated embeddings",
    VALIDATION: "validation classes",
    BEST: "best checkpoint, chosen on TEST classes",
    LAST: "last checkpoint",
}

BySeed = dict[str, dict[int, float]]  # by metric and seed; seed -1: one value over all seeds


@dataclass(frozen=True)
class Spent:
    """What one stage of a method has cost."""

    finished: int = 0
    stopped: int = 0
    failed: int = 0
    running: int = 0
    images: int = 0
    hours: float = 0.0
    gpu_hours: float = 0.0


@dataclass
class Row:
    """One method.

    Attributes:
        method: Its label.
        trial: Number of the chosen trial; None while none has a score.
        setting: The chosen values by dotted key.
        score: Its value of the sweep's metric that chose it: mean over folds and seeds.
        figures: Values by kind (a key of TITLES), metric and seed, folds averaged.
        comparison: Against the best method; None for the best itself and for methods without figures.
        search, final: What each stage has cost.
    """

    method: str
    trial: int | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    score: float | None = None
    figures: dict[str, BySeed] = field(default_factory=dict)
    comparison: Comparison | None = None
    search: Spent = Spent()
    final: Spent = Spent()

    def estimate(self, kind: str, metric: str) -> Estimate | None:
        """Mean and interval of a metric; None where it was not measured."""
        values = self.figures.get(kind, {}).get(metric)
        return estimate(list(values.values())) if values else None


@dataclass
class Answer:
    """The answer of a sweep.

    Attributes:
        name, protocol, metric: Those of the sweep.
        kind: The kind of figures that the methods are compared by (a key of TITLES).
        rows: One a method, the best first, those without figures last.
        running: Trials that run now, or were interrupted.
        notes: How it was measured and what has not been measured, a sentence each.
        warnings: What makes the comparison weaker than it looks, a sentence each.
    """

    name: str
    protocol: str
    metric: str
    kind: str
    rows: list[Row]
    running: int
    notes: list[str]
    warnings: list[str]

    @property
    def kinds(self) -> list[str]:
        """Kinds of figures that any method has."""
        return [kind for kind in TITLES if any(row.figures.get(kind) for row in self.rows)]

    @property
    def metrics(self) -> list[str]:
        """Metrics of any method: the sweep's own first, then in the order of the runs' figures."""
        names = dict.fromkeys([self.metric])
        for row in self.rows:
            for figures in row.figures.values():
                names |= dict.fromkeys(figures)
        return list(names)

    def verdict(self, row: Row) -> str:
        """One phrase on a method's difference from the best one."""
        if row.estimate(self.kind, self.metric) is None:
            return "not measured"
        if row.comparison is None:
            best = next((r for r in self.rows if r.estimate(self.kind, self.metric)), None)
            return "best" if row is best else "no common seed"
        if row.comparison.within_noise is None:
            return "one seed"
        return "within noise" if row.comparison.within_noise else "worse"


class _Chosen(NamedTuple):
    trial: TrialRecord | None
    finals: list[TrialRecord]
    earlier: int  # final records of a setting that is no longer the chosen one


def answer(sweep: SweepConfig, records: Sequence[TrialRecord], ensembles: Mapping[str, Any]) -> Answer:
    """The answer of a sweep, also of one that runs or has just begun.

    Args:
        sweep: The sweep.
        records: All records of its trials.
        ensembles: Content of ensembles.json; empty where there is none.
    """
    chosen = {method: _choose(records, method) for method in sweep.methods}
    rows = [_row(sweep, records, method, chosen[method], ensembles.get(method, [])) for method in sweep.methods]
    kind = _kind_compared(sweep, rows)
    values = {row.method: row.figures.get(kind, {}).get(sweep.metric, {}) for row in rows}
    comparisons = compare_with_best(values)
    best = best_method(values)
    for row in rows:
        row.comparison = comparisons.get(row.method)
    rows.sort(key=lambda row: (row.method != best, *_order(row, kind, sweep.metric)))
    running = sum(record.state == "running" for record in records)
    result = Answer(sweep.name, sweep.protocol, sweep.metric, kind, rows, running, [], [])
    result.notes = _notes(sweep, result)
    result.warnings = _warnings(sweep, result, chosen)
    return result


def _choose(records: Sequence[TrialRecord], method: str) -> _Chosen:
    finals = final_trials(records, method)
    num_finals = sum(record.stage == "final" and record.method == method for record in records)
    return _Chosen(best_trial(records, method), finals, num_finals - len(finals))


def _row(
    sweep: SweepConfig,
    records: Sequence[TrialRecord],
    method: str,
    chosen: _Chosen,
    ensembles: Sequence[Mapping[str, Any]],
) -> Row:
    own = [record for record in records if record.method == method]
    row = Row(
        method,
        search=_spent(record for record in own if record.stage == "search"),
        final=_spent(record for record in own if record.stage == "final"),
    )
    if chosen.trial is not None:
        row.trial, row.setting, row.score = chosen.trial.number, chosen.trial.values, chosen.trial.score
    final_runs = [run for record in chosen.finals for run in record.runs]
    search_runs = chosen.trial.runs if chosen.trial else []
    if sweep.protocol == "paper":
        runs = final_runs or search_runs
        row.figures = {
            BEST: _by_seed((run, run.best) for run in runs),
            LAST: _by_seed((run, run.last) for run in runs),
        }
    else:
        row.figures = {
            TEST: _by_seed((run, run.test) for run in final_runs),
            CONCATENATED: _concatenated(ensembles, {run.name for run in final_runs}),
            VALIDATION: _by_seed((run, run.best) for run in search_runs),
        }
    return row


def _by_seed(figures: Iterable[tuple[RunProgress, Mapping[str, float]]]) -> BySeed:
    """Mean over a seed's folds of each metric, for the seeds all of whose runs have it."""
    by_seed: dict[int, list[Mapping[str, float]]] = {}
    for run, values in figures:
        by_seed.setdefault(run.seed, []).append(values)
    result: BySeed = {}
    for seed, runs in by_seed.items():
        for metric in runs[0]:
            found = [run[metric] for run in runs if metric in run]
            if metric not in COUNTS and len(found) == len(runs) and all(math.isfinite(value) for value in found):
                result.setdefault(metric, {})[seed] = math.fsum(found) / len(found)
    return result


def _concatenated(ensembles: Sequence[Mapping[str, Any]], final_runs: set[str]) -> BySeed:
    """Figures of the ensembles, of those whose runs are all final runs of the chosen setting."""
    result: BySeed = {}
    for entry in ensembles:
        if set(entry["runs"]) <= final_runs:
            seed = -1 if entry["seed"] is None else int(entry["seed"])
            for metric, value in entry["metrics"].items():
                if metric not in COUNTS and math.isfinite(value):
                    result.setdefault(metric, {})[seed] = value
    return result


def _spent(records: Iterable[TrialRecord]) -> Spent:
    records = list(records)
    states = Counter(record.state for record in records)
    return Spent(
        finished=states["finished"],
        stopped=states["stopped"],
        failed=states["failed"],
        running=states["running"],
        images=sum(record.images for record in records),
        hours=math.fsum(record.busy_s for record in records) / 3600,
        gpu_hours=math.fsum(record.gpu_hours for record in records),
    )


def _kind_compared(sweep: SweepConfig, rows: Sequence[Row]) -> str:
    if sweep.protocol == "paper":
        return BEST
    return TEST if any(row.figures.get(TEST) for row in rows) else VALIDATION


def _order(row: Row, kind: str, metric: str) -> tuple[bool, float]:
    """Sorts descending by mean, methods without figures last, by their validation score."""
    found = row.estimate(kind, metric)
    return (found is None, -(found.mean if found else row.score if row.score is not None else -math.inf))


def _notes(sweep: SweepConfig, result: Answer) -> list[str]:
    title = metric_title(sweep.metric)
    if sweep.protocol == "paper":
        notes = [
            "Paper protocol: settings and checkpoints were chosen on the TEST classes, so the best checkpoint's figures are "
            "higher than new classes would give; the last checkpoint is shown beside it. Never compare with the fair protocol."
        ]
    elif result.kind == TEST:
        trained = (
            "on all training classes, last checkpoint"
            if sweep.final is None or sweep.final.classes == "all"
            else "once a fold, best checkpoint by validation; a seed's figure is the mean over its folds"
        )
        notes = [
            f"Fair protocol: settings were chosen by {title} on validation classes; the chosen ones were trained again {trained}, "
            "and measured once on the test classes."
        ]
    else:
        notes = [
            "The test classes were not measured"
            + (" yet" if sweep.final is not None else " (final: null)")
            + f": figures are {title} on validation classes, which also chose the settings, so they are too high."
        ]
    if any(e.low is not None for row in result.rows if (e := row.estimate(result.kind, sweep.metric))):
        notes.append(f"Intervals: {INTERVAL}.")
    if any(row.comparison for row in result.rows):
        notes.append(f"Differences from the best method: {COMPARISON}.")
    if result.running:
        notes.append(
            f"Not finished: {result.running} trial{'s' if result.running > 1 else ''} (running, or interrupted)."
        )
    return notes


def _warnings(sweep: SweepConfig, result: Answer, chosen: Mapping[str, _Chosen]) -> list[str]:
    warnings = [
        f"{row.method}: no trial has a score yet" for row in result.rows if row.trial is None and not result.running
    ]
    for row in result.rows:
        failed = row.search.failed + row.final.failed
        if failed:
            warnings.append(f"{row.method}: {failed} trial{'s' if failed > 1 else ''} failed")
        if chosen[row.method].earlier:
            warnings.append(
                f"{row.method}: {chosen[row.method].earlier} final trials of an earlier chosen setting are left out: "
                "its test classes were measured more than once"
            )
    warnings += _seed_warnings(sweep, result)
    return warnings + _budget_warnings(sweep, result)


def _seed_warnings(sweep: SweepConfig, result: Answer) -> list[str]:
    counts = {}
    for row in result.rows:
        found = row.estimate(result.kind, sweep.metric)
        if found is not None:
            counts[row.method] = found.seeds
    warnings = []
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{method} {count}" for method, count in counts.items())
        warnings.append(f"methods have different numbers of seeds: {told}")
    fewest = min(counts.values(), default=FEW_SEEDS)
    if fewest == 1:
        warnings.append("one seed: no interval" + (", and no difference can be called real" if len(counts) > 1 else ""))
    elif fewest < FEW_SEEDS:
        warnings.append(f"{fewest} seeds: wide intervals, compare with {FEW_SEEDS} or more")
    close = [row.method for row in result.rows if row.comparison and row.comparison.within_noise]
    if close:
        best = result.rows[0].method
        warnings.append(f"difference within noise: {', '.join(close)} cannot be told from {best} with these seeds")
    return warnings


def _budget_warnings(sweep: SweepConfig, result: Answer) -> list[str]:
    """Methods searched with different budgets; while trials run, numbers differ anyhow."""
    if sweep.protocol != "fair" or result.running:
        return []
    warnings = []
    trials = {row.method: row.search.finished + row.search.stopped for row in result.rows}
    if len(set(trials.values())) > 1:
        told = ", ".join(f"{method} {count}" for method, count in trials.items())
        warnings.append(f"unequal budgets: trials finished or stopped: {told}")
    images = {row.method: row.search.images for row in result.rows}
    if max(images.values()) > UNEQUAL_IMAGES * min(images.values()):
        told = ", ".join(f"{method} {count:,}" for method, count in images.items())
        cause = (
            "unequal budgets" if sweep.scheduler.name == "none" else "stopping early has left methods different budgets"
        )
        warnings.append(f"{cause}: images trained on in the search: {told}")
    return warnings
