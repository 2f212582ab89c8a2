"""Early stopping: each method by itself, at equal shares of a trial's length, and with the results of earlier starts."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.experiment import Trial

from pipeline.tuning.schedulers import SCORE, TIME, MethodSchedulers, curve
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import RunProgress, TrialRecord


def trial(number: int, method: str = "a", scheduled: bool = True) -> Trial:
    """A trial of Ray Tune's, with another id each time: a sweep knows it by its number."""
    return Trial("trial", config={"number": number, "method": method, "scheduled": scheduled}, stub=True)


def sweep(**scheduler: Any) -> SweepConfig:
    return SweepConfig.model_validate({"methods": {"a": {}, "b": {}}, "scheduler": scheduler})


def report(schedulers: MethodSchedulers, of: Any, time: float, score: float | None, done: bool = False) -> str:
    return schedulers.on_trial_result(None, of, {TIME: time, SCORE: score, "done": done})


def started(schedulers: MethodSchedulers, *trials: Any) -> None:
    for one in trials:
        schedulers.on_trial_add(None, one)


def test_successive_halving_compares_trials_of_one_method_only() -> None:
    schedulers = MethodSchedulers(sweep(name="asha", grace=0.25, reduction=2), [])
    best, worse, other, final = trial(0), trial(1), trial(2, "b"), trial(3, scheduled=False)
    started(schedulers, best, worse, other, final)
    assert report(schedulers, best, 25, 50.0) == "CONTINUE"
    assert report(schedulers, worse, 20, 1.0) == "CONTINUE", "before the first rung"
    assert report(schedulers, other, 25, 10.0) == "CONTINUE", "the first of its method"
    assert report(schedulers, final, 25, 1.0) == "CONTINUE"
    assert report(schedulers, worse, 30, 40.0) == "STOP"
    assert report(schedulers, best, 100, 0.0, done=True) == "CONTINUE"


def test_a_trial_that_is_ended_is_not_compared_again() -> None:
    schedulers = MethodSchedulers(sweep(name="asha"), [])
    one = trial(0)
    started(schedulers, one)
    assert report(schedulers, one, 0, None) == "CONTINUE", "nothing has been measured"


@pytest.mark.parametrize("name", ["asha", "median"])
def test_results_of_earlier_starts_count(name: str) -> None:
    def record(number: int, value: float) -> TrialRecord:
        points = [{"step": i, "done": done, "map@r": value} for i, done in enumerate((0.25, 0.5, 1.0))]
        return TrialRecord(number, "search", "a", {}, state="finished", runs=[RunProgress("x", 0, 0, curve=points)])

    bad = trial(9)
    fresh = MethodSchedulers(sweep(name=name), [])
    started(fresh, bad)
    assert report(fresh, bad, 50, 10.0) == "CONTINUE"
    for number in (9, 10):
        again = MethodSchedulers(sweep(name=name), [record(i, 40.0 + i) for i in range(4)])
        started(again, trial(number))
        assert report(again, trial(number), 50, 10.0) == "STOP"


def test_a_continued_trial_is_not_counted_twice() -> None:
    points = [{"step": 1, "done": 0.25, "map@r": 50.0}]
    earlier = TrialRecord(0, "search", "a", {}, runs=[RunProgress("x", 0, 0, curve=points)])
    schedulers = MethodSchedulers(sweep(name="asha"), [earlier])
    same = trial(0)
    started(schedulers, same)
    assert report(schedulers, same, 30, 1.0) == "CONTINUE", "its place on this rung was decided before"
    new = trial(1)
    started(schedulers, new)
    assert report(schedulers, new, 25, 49.0) == "STOP"


def test_without_a_scheduler_nothing_is_stopped() -> None:
    schedulers = MethodSchedulers(sweep(name="none"), [])
    started(schedulers, trial(0), trial(1))
    assert report(schedulers, trial(0), 50, 90.0) == report(schedulers, trial(1), 50, 1.0) == "CONTINUE"


def test_the_score_of_several_runs() -> None:
    def run(*values: float) -> RunProgress:
        return RunProgress("x", 0, 0, curve=[{"done": (i + 1) / 2, "map@r": v} for i, v in enumerate(values)])

    points = curve(TrialRecord(0, "search", "a", {}, runs=[run(4.0, 2.0), run(6.0)]), "map@r")
    assert points == [(25.0, 4.0), (50.0, 4.0), (75.0, 5.0)]
