"""Ray Tune's schedulers, one for each method, fed with the results of earlier starts too.

A method that learns slowly would be stopped by one that learns fast: trials are compared with trials of their own method only.
Time is the share of a trial's length in percent, which is the share of its images: methods report at different steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from pipeline.tuning.sweep_config import SchedulerConfig, SweepConfig
from pipeline.tuning.sweep_folder import TrialRecord

TIME = "progress"  # percent of the trial's length
SCORE = "score"
NEVER = float("inf")
END = 99.9  # percent; nothing is decided at the end itself


@dataclass(frozen=True)
class _Stand:
    """Stands for a trial: the same trial has the same id in every start of the sweep."""

    trial_id: str


class MethodSchedulers(FIFOScheduler):
    """Passes each trial on to the scheduler of its method; final trials are never stopped.

    Args:
        sweep: The sweep.
        records: The trials of earlier starts.
    """

    def __init__(self, sweep: SweepConfig, records: Sequence[TrialRecord]) -> None:
        super().__init__()
        self.by_method = {label: build_scheduler(sweep.scheduler) for label in sweep.methods}
        for record in records:
            if record.stage == "search" and record.method in self.by_method:
                self._replay(self.by_method[record.method], record, sweep.metric)

    def _replay(self, scheduler: TrialScheduler, record: TrialRecord, metric: str) -> None:
        stand = _Stand(str(record.number))
        scheduler.on_trial_add(None, stand)  # type: ignore[arg-type]  # these schedulers use a trial's id only
        for time, score in curve(record, metric):
            scheduler.on_trial_result(None, stand, {TIME: time, SCORE: score})  # type: ignore[arg-type]

    def _scheduler(self, trial: Trial) -> tuple[TrialScheduler, Any] | None:
        config = trial.config
        if not config["scheduled"]:
            return None
        return self.by_method[config["method"]], _Stand(str(config["number"]))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        found = self._scheduler(trial)
        if found is not None:
            found[0].on_trial_add(tune_controller, found[1])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        found = self._scheduler(trial)
        if found is None or result.get("done") or result.get(SCORE) is None:
            return TrialScheduler.CONTINUE
        return found[0].on_trial_result(tune_controller, found[1], result)

    def debug_string(self) -> str:
        return "; ".join(f"{label}: {scheduler.debug_string()}" for label, scheduler in self.by_method.items())


def build_scheduler(config: SchedulerConfig) -> TrialScheduler:
    """The scheduler of one method."""
    grace = 100 * config.grace
    common: dict[str, Any] = {"time_attr": TIME, "metric": SCORE, "mode": "max", "grace_period": grace}
    if config.name == "asha" and grace < END:
        return AsyncHyperBandScheduler(
            max_t=END,  # type: ignore[arg-type]  # any number
            reduction_factor=config.reduction,
            stop_last_trials=False,
            **common,
        )
    if config.name == "median":
        # It must not pause trials to give others their turn: they would keep what they hold.
        return MedianStoppingRule(min_samples_required=3, min_time_slice=NEVER, **common)  # type: ignore[arg-type]
    return FIFOScheduler()


def curve(record: TrialRecord, metric: str) -> list[tuple[float, float]]:
    """Share of the trial's length in percent, and the score reported there, for each validation of a record."""
    points: list[tuple[float, float]] = []
    best_of_ended: list[float] = []
    for i, run in enumerate(record.runs):
        best: float | None = None
        for point in run.curve:
            best = point[metric] if best is None else max(best, point[metric])
            points.append((100 * (i + point["done"]) / len(record.runs), mean([*best_of_ended, best])))
        if best is not None:
            best_of_ended.append(best)
    return points


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
