"""Which trial comes next: interrupted ones, then new settings of each method in turn, then the final runs of the chosen ones.

Everything follows from the records: nothing else is kept between two starts of a sweep, and a setting depends only on the seed,
the method, the trial's place among the method's trials, and (TPE, Gaussian process) the results known when it is drawn.
"""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from methods.config import Length
from pipeline.tuning.checks import num_trials
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_config import FinalConfig, SearcherConfig, SweepConfig
from pipeline.tuning.sweep_folder import TrialRecord, best_trial, final_trials

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Task:
    """A trial to start or to continue.

    Attributes:
        record: Its record, new or of an earlier start.
        scheduled: The scheduler may end it early.
    """

    record: TrialRecord
    scheduled: bool = True


class Search:
    """Hands out the trials of a sweep, one at a time.

    Args:
        sweep: The sweep.
        records: All records, of earlier starts too; new ones are appended.
        again: Numbers of ended trials that are continued to their full length, without a scheduler.
        spent_hours: Wall time of earlier starts.
    """

    def __init__(
        self, sweep: SweepConfig, records: list[TrialRecord], again: Sequence[int] = (), spent_hours: float = 0.0
    ) -> None:
        self.sweep = sweep
        self.records = records
        self.by_number = {record.number: record for record in records}
        self.spaces = {label: Space(sweep.space_of(label)) for label in sweep.methods}
        self._grids: dict[str, list[dict[str, Any]]] = {}
        self._started = time.monotonic()
        self._earlier_hours = spent_hours
        self._queue = [
            Task(record, scheduled=record.stage == "search" and record.number not in again)
            for record in records
            if _unfinished(record, again)
        ]
        for task in self._queue:
            task.record.state, task.record.error, task.record.ended_at = "running", None, 0.0

    def next(self) -> Task | None:
        """The next trial; None if there is none before another one ends, or at all."""
        if self._queue:
            return self._queue.pop(0)
        label = self._next_method()
        if label is not None:
            return self._new(label)
        final = self._next_final()
        if final is not None:
            self._add(final)
            return Task(final, scheduled=False)
        return None

    def finished(self) -> bool:
        """True if no trial runs and none will come."""
        running = any(record.state == "running" for record in self.records)
        return not (running or self._queue or self._next_method() or self._next_final())

    # ---- settings ----------------------------------------------------------------------------------------------------

    def trials_of(self, label: str) -> list[TrialRecord]:
        """The search trials of a method, in the order in which they were drawn."""
        return [record for record in self.records if record.stage == "search" and record.method == label]

    def wanted(self, label: str) -> int | None:
        """Number of search trials of a method; None: as many as the time budget allows."""
        return num_trials(self.sweep, label, self.spaces[label])

    @property
    def hours(self) -> float:
        """Wall time of all starts."""
        return self._earlier_hours + (time.monotonic() - self._started) / 3600

    def spent(self) -> bool:
        """True if the budget of hours or GPU-hours is used up."""
        budget = self.sweep.budget
        gpu_hours = sum(record.gpu_hours for record in self.records if record.stage == "search")
        return (budget.hours is not None and self.hours >= budget.hours) or (
            budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours
        )

    def _next_method(self) -> str | None:
        """The method with the fewest trials, if one of them still wants some."""
        if self.spent():
            return None
        counts = {label: len(self.trials_of(label)) for label in self.sweep.methods}
        open_methods = [label for label, count in counts.items() if not _reached(count, self.wanted(label))]
        return min(open_methods, key=lambda label: counts[label], default=None)

    def _new(self, label: str) -> Task:
        earlier = self.trials_of(label)
        point = self._next_point(label, earlier)
        values = self._draw(label, earlier) if point is None else point
        record = TrialRecord(self._next_number(), "search", label, values, given=point is not None)
        self._add(record)
        return Task(record)

    def _next_number(self) -> int:
        return max(self.by_number, default=-1) + 1

    def _add(self, record: TrialRecord) -> None:
        self.records.append(record)
        self.by_number[record.number] = record

    def _next_point(self, label: str, earlier: Sequence[TrialRecord]) -> dict[str, Any] | None:
        """The first given setting that has not been tried, if any is left."""
        tried = [record.values for record in earlier if record.given]
        points = self.sweep.methods[label].points
        settings = (self.spaces[label].check_point(p, f"methods.{label}.points") for p in points)
        return next((values for values in settings if values not in tried), None)

    def _draw(self, label: str, earlier: Sequence[TrialRecord]) -> dict[str, Any]:
        place = sum(not record.given for record in earlier)
        if self.sweep.searcher.name == "grid":
            return self._grid(label)[place]
        seed = np.random.SeedSequence([self.sweep.searcher.seed, zlib.crc32(label.encode()), place])
        sampler_seed = int(seed.generate_state(1)[0])
        return draw(self.spaces[label], self.sweep.searcher, self.sweep.metric, earlier, sampler_seed)

    def _grid(self, label: str) -> list[dict[str, Any]]:
        if label not in self._grids:
            limit = self.sweep.budget.trials
            self._grids[label] = list(islice(self.spaces[label].grid(), limit))
        return self._grids[label]

    # ---- final runs --------------------------------------------------------------------------------------------------

    def chosen(self, label: str) -> TrialRecord | None:
        """The best trial of a method whose search is over; None before, or if none has a score."""
        trials = self.trials_of(label)
        over = self.spent() or _reached(len(trials), self.wanted(label))
        if not over or any(record.state == "running" for record in trials):
            return None
        return best_trial(self.records, label)

    def _next_final(self) -> TrialRecord | None:
        """The record of the next final trial, if one is to be started."""
        final = self.sweep.final
        if final is None:
            return None
        for label in self.sweep.methods:
            best = self.chosen(label)
            if best is None:
                continue
            existing = [record.seed for record in final_trials(self.records, label)]
            for seed in final.seeds:
                if seed not in existing:
                    length = self._final_length(final, best)
                    return TrialRecord(self._next_number(), "final", label, best.values, seed=seed, length=length)
        return None

    def _final_length(self, final: FinalConfig, best: TrialRecord) -> str | None:
        if final.classes == "folds" or final.length == "same":
            return None
        return str(final.length) if isinstance(final.length, Length) else best_length(best, self.sweep.metric)


def best_length(best: TrialRecord, metric: str) -> str:
    """The mean epoch of the best validation over a trial's runs: the length of its final runs."""
    epochs = [max(run.curve, key=lambda point: (point[metric], -point["step"]))["epoch"] for run in best.runs]
    return f"{round(sum(epochs) / len(epochs), 2):g} epochs"


def draw(
    space: Space, searcher: SearcherConfig, metric: str, earlier: Sequence[TrialRecord], seed: int
) -> dict[str, Any]:
    """A setting drawn by Optuna, a function of its arguments alone."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="maximize", sampler=_sampler(searcher, seed))
        if searcher.name != "random":
            for record in earlier:
                study.add_trial(as_optuna(space, record, metric))
        return space.draw(study.ask())


def _sampler(searcher: SearcherConfig, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    if searcher.name == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=searcher.startup_trials, constant_liar=True)
    if searcher.name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=searcher.startup_trials, deterministic_objective=False)
    return samplers.RandomSampler(seed=seed)


def as_optuna(space: Space, record: TrialRecord, metric: str) -> optuna.trial.FrozenTrial:
    """A record as Optuna's: a setting that a run could not go on with counts as 0, a lost trial not at all."""
    import optuna

    states = optuna.trial.TrialState
    state = {"finished": states.COMPLETE, "stopped": states.PRUNED, "running": states.RUNNING, "failed": states.FAIL}[
        record.state
    ]
    value = record.score
    if record.diverged:
        state, value = states.COMPLETE, 0.0
    curve = [point[metric] for run in record.runs for point in run.curve] if state == states.PRUNED else []
    return optuna.trial.create_trial(
        state=state,
        value=value if state == states.COMPLETE else None,
        params=space.params(record.values),
        distributions=space.distributions(record.values),
        intermediate_values=dict(enumerate(curve)),
    )


def _unfinished(record: TrialRecord, again: Sequence[int]) -> bool:
    """True if a trial of an earlier start has to be continued."""
    lost = record.state == "failed" and not record.diverged
    return record.state == "running" or lost or record.number in again


def _reached(count: int, wanted: int | None) -> bool:
    return wanted is not None and count >= wanted


def trial_config(task: Task) -> dict[str, Any]:
    """What Ray Tune passes to the trial's process."""
    record = task.record
    return {
        "number": record.number,
        "stage": record.stage,
        "method": record.method,
        "values": record.values,
        "seed": record.seed,
        "length": record.length,
        "scheduled": task.scheduled,
    }
