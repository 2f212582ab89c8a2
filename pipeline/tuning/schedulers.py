"""Ray Tune's schedulers, one for each method, fed with the results of earlier starts too.

A method that learns slowly would be stopped by one that learns fast: trials are compared with trials of their own method only.
Time is the share of a trial's length in percent, which is the share of its images: methods report at different steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from pipeline.tuning.population import Population
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import TrialRecord

TIME = "progress"  # percent of the trial's length
SCORE = "score"
LATEST = "latest"  # the metric at the last validation
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
        self.by_method = {label: build_scheduler(sweep, label) for label in sweep.methods}
        for record in records:
            if record.stage == "search" and record.method in self.by_method and not self.populations:
                self._replay(self.by_method[record.method], record, sweep.metric)

    @property
    def populations(self) -> dict[str, Population]:
        return {label: one for label, one in self.by_method.items() if isinstance(one, Population)}

    def _replay(self, scheduler: TrialScheduler, record: TrialRecord, metric: str) -> None:
        stand = _Stand(str(record.number))
        scheduler.on_trial_add(None, stand)  # type: ignore[arg-type]  # these schedulers use a trial's id only
        for time, score in curve(record, metric):
            scheduler.on_trial_result(None, stand, {TIME: time, SCORE: score})  # type: ignore[arg-type]

    def _scheduler(self, trial: Trial) -> tuple[TrialScheduler, Any] | None:
        config = trial.config
        if not config["scheduled"]:
            return None
        scheduler = self.by_method[config["method"]]
        return scheduler, trial if isinstance(scheduler, Population) else _Stand(str(config["number"]))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        found = self._scheduler(trial)
        if found is not None:
            found[0].on_trial_add(tune_controller, found[1])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        found = self._scheduler(trial)
        if found is None or result.get("done") or result.get(SCORE) is None:
            return TrialScheduler.CONTINUE
        scheduler, trial_or_stand = found
        return scheduler.on_trial_result(self._view(tune_controller, trial), trial_or_stand, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        for label, population in self.populations.items():
            if trial.config["scheduled"] and trial.config["method"] == label:
                population.on_trial_complete(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        for label, population in self.populations.items():
            members: Any = _Members(tune_controller, label)
            trial = population.choose_trial_to_run(members)
            if trial is not None:
                return trial
        return super().choose_trial_to_run(tune_controller)

    def _view(self, tune_controller: Any, trial: Trial) -> Any:
        return _Members(tune_controller, trial.config["method"]) if self.populations else tune_controller

    def debug_string(self) -> str:
        return "; ".join(f"{label}: {scheduler.debug_string()}" for label, scheduler in self.by_method.items())


class _Members:
    """Ray Tune's controller as one method's population sees it: with that method's trials alone."""

    def __init__(self, controller: Any, method: str) -> None:
        self._controller = controller
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Trial]:
        return self._own(self._controller.get_trials())

    def get_live_trials(self) -> list[Trial]:
        return self._own(self._controller.get_live_trials())

    def _own(self, trials: Any) -> list[Trial]:
        return [trial for trial in trials if trial.config["method"] == self._method and trial.config["scheduled"]]


def build_scheduler(sweep: SweepConfig, label: str) -> TrialScheduler:
    """The scheduler of one method."""
    config = sweep.scheduler
    if config.name == "pbt":
        space = Space(sweep.space_of(label))
        seed = zlib.crc32(f"{sweep.searcher.seed} {label}".encode())
        return Population(space, TIME, LATEST, 100 * config.interval, config.quantile, seed)
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
            points.append((100 * (i + point["done"]) / len(record.runs), fmean([*best_of_ended, best])))
        if best is not None:
            best_of_ended.append(best)
    return points
