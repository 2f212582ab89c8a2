"""The runs of a trial, one after another in a thread that waits at each validation; the training itself is a stand-in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.config import Config, to_yaml
from pipeline.data.store import Store
from pipeline.errors import DivergedError, RunError
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CONFIG, run_folder
from pipeline.training.launch import run_in_process
from pipeline.tuning import trial
from pipeline.tuning.trial import TrialRunner, train_run


def never() -> bool:
    return False


@pytest.fixture
def make(make_config: Callable[..., Config]) -> Iterator[Callable[..., TrialRunner]]:
    runners: list[TrialRunner] = []

    def build(run_one: Any = train_run, folds: tuple[int, ...] = (0, 1), length: str = "2 epochs") -> TrialRunner:
        configs = [
            make_config(
                {"length": length, "data.validation_fold": fold, "runtime.workers": 1, "evaluation.test": False},
                name=f"run{fold}",
            )
            for fold in folds
        ]
        runners.append(TrialRunner(configs, configs[0].data.source, "map@r", run_one))
        return runners[-1]

    yield build
    for runner in runners:
        runner.stop()


def drain(runner: TrialRunner) -> list[float]:
    """Goes on to the end; the share of the length at each stop."""
    progress = []
    while not runner.ended:
        runner.go_on(never)
        progress.append(runner.progress)
    return progress


def test_the_runs_of_a_trial_in_order(make: Callable[..., TrialRunner]) -> None:
    runner = make()
    assert drain(runner) == pytest.approx([25, 50, 75, 100], abs=0.1)
    assert runner.error is None and [run.state for run in runner.runs] == ["finished", "finished"]
    assert runner.score == pytest.approx(sum(run.best["map@r"] for run in runner.runs) / 2)
    assert all(run.images > 0 and run.seconds > 0 and run.validation_s > 0 and not run.test for run in runner.runs)
    assert all([point["done"] for point in run.curve] == pytest.approx([0.5, 1.0]) for run in runner.runs)
    for run, config in zip(runner.runs, runner.configs, strict=True):
        latest = Checkpoints(run_folder(config)).latest()
        assert latest is not None and latest.finished and latest.images == run.images

    again = make()
    again.go_on(never)
    assert again.ended and again.score == runner.score, "finished runs are not trained again"
    assert [run.curve for run in again.runs] == [run.curve for run in runner.runs]


def test_training_waits_until_it_may_go_on(make: Callable[..., TrialRunner]) -> None:
    runner = make(length="6 epochs", folds=(0,))
    runner.go_on(never)
    images = runner.runs[0].images
    time.sleep(0.5)
    assert runner.runs[0].images == images and len(runner.runs[0].curve) == 1
    runner.go_on(never)
    assert len(runner.runs[0].curve) == 2


def test_a_stopped_trial_has_a_checkpoint_and_continues_to_the_same_weights(
    make: Callable[..., TrialRunner], make_config: Callable[..., Config]
) -> None:
    runner = make(length="4 epochs", folds=(0,))
    runner.go_on(never)
    runner.stop()
    (config,) = runner.configs
    latest = Checkpoints(run_folder(config)).latest()
    assert latest is not None and not latest.finished and latest.images == runner.runs[0].images
    assert not [t for t in threading.enumerate() if t.name == "trial"]
    second = make(length="4 epochs", folds=(0,))
    drain(second)
    whole = config.model_copy(update={"name": "whole"})
    run_folder(whole).write(CONFIG, to_yaml(whole).encode())
    run_in_process(whole, config.data.source, lambda state: None)
    ours, theirs = (run_folder(c).read_json("summary.json")["validation"] for c in (config, whole))
    assert ours == theirs and len(second.runs[0].curve) == 4


def test_the_next_trial_of_a_process_waits_for_the_end_of_this_one(make: Callable[..., TrialRunner]) -> None:
    may_end = threading.Event()

    def evaluates_for_long(config: Config, store: Store, runner: TrialRunner) -> None:
        runner.hold()
        may_end.wait(20)

    runner = make(evaluates_for_long)
    runner.go_on(never)
    runner.stop(timeout_s=0.05)  # the end of the process
    assert [t for t in threading.enumerate() if t.name == "trial"]
    threading.Timer(0.3, may_end.set).start()
    runner.stop()
    assert may_end.is_set() and not [t for t in threading.enumerate() if t.name == "trial"]


def test_a_pause_saves_and_goes_on(make: Callable[..., TrialRunner]) -> None:
    runner = make(length="3 epochs", folds=(0,))
    runner.go_on(never)
    runner.pause()
    latest = Checkpoints(run_folder(runner.configs[0])).latest()
    assert latest is not None and latest.images == runner.runs[0].images
    assert drain(runner) == pytest.approx([66.7, 100], abs=0.1)
    assert [round(point["done"], 2) for point in runner.runs[0].curve] == [0.33, 0.67, 1.0]


def test_a_stop_request_from_elsewhere_ends_a_long_step(
    make: Callable[..., TrialRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "ASK_EVERY_S", 0.05)

    def endless(config: Config, store: Store, runner: TrialRunner) -> None:
        assert runner.stop_requested.wait(20)

    runner = make(endless)
    asked: list[float] = []
    runner.go_on(lambda: asked.append(0.0) or len(asked) > 2)
    assert len(asked) == 3 and runner.stop_requested.is_set() and not runner.ended


@pytest.mark.parametrize(
    ("error", "diverged"), [(DivergedError("the loss is not finite"), True), (RunError("the disk is full"), False)]
)
def test_an_error_that_a_restart_does_not_heal_ends_the_trial(
    make: Callable[..., TrialRunner], error: RunError, diverged: bool
) -> None:
    def failing(config: Config, store: Store, runner: TrialRunner) -> None:
        raise error

    runner = make(failing)
    runner.go_on(never)
    assert runner.ended and (runner.error, runner.diverged) == (str(error), diverged)


def test_other_errors_are_raised_so_that_the_trial_is_started_again(make: Callable[..., TrialRunner]) -> None:
    def failing(config: Config, store: Store, runner: TrialRunner) -> None:
        raise ConnectionError("the network is gone")

    runner = make(failing)
    with pytest.raises(ConnectionError, match="the network is gone"):
        runner.go_on(never)
    assert not runner.ended
