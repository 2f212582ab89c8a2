"""The parts that Ray Tune calls: the searcher, the recorder of trials, and the end of all trials."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher

from pipeline.console import console
from pipeline.errors import RunError
from pipeline.tuning.resources import TrialResources
from pipeline.tuning.search import Search, trial_config
from pipeline.tuning.sweep_folder import RunProgress, SweepFolder, TrialRecord
from pipeline.tuning.tensorboard import SweepBoard


class NotSaved:
    """Ray Tune pickles its parts into a file that is never read back."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class SweepSearcher(NotSaved, Searcher):
    """Hands Ray Tune the trials of a `Search`, as many as may run at once."""

    def __init__(self, search: Search, at_once: int) -> None:
        super().__init__()
        self.search = search
        self.at_once = at_once
        self.live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        if len(self.live) >= self.at_once:
            return None
        task = self.search.next()
        if task is None:
            return Searcher.FINISHED if self.search.finished() else None
        self.live.add(trial_id)
        return trial_config(task)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep continues from its records."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a sweep continues from its records, not from Ray Tune's files")


class StopWhen(NotSaved, tune.Stopper):
    """Ends all trials once a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.condition()


class Recorder(NotSaved, tune.Callback):
    """Keeps the record of every trial, and says what happens.

    Args:
        folder, search: The records, and what hands out trials.
        metric: The metric that the sweep chooses by.
        trials: Resources of a trial of each method.

    Attributes:
        error: Why nothing can be recorded any more.
        ended: Number of trials that have ended in this start.
    """

    def __init__(self, folder: SweepFolder, search: Search, metric: str, trials: Mapping[str, TrialResources]) -> None:
        self.folder = folder
        self.board = SweepBoard(folder.folder, metric)
        self.search = search
        self.metric = metric
        self.trials = trials
        self.error: RunError | None = None
        self.ended = 0
        self._since: dict[int, float] = {}  # when a trial's process started, by number

    def record_of(self, trial: TuneTrial) -> TrialRecord:
        return self.search.by_number[trial.config["number"]]

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        record = self.record_of(trial)
        held = self.trials[record.method]
        record.starts += 1
        record.started_at = record.started_at or time.time()
        record.workers, record.cpus, record.gpus = held.workers, held.total["CPU"], held.total["GPU"]
        self._since[record.number] = time.monotonic()
        self._write(record)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        record = self.record_of(trial)
        if trial.config["values"] != record.values:  # population-based training
            change = {"images": record.images, "values": dict(trial.config["values"])}
            record.history.append(change | {"copied_from": trial.config["copied_from"]})
            record.values = dict(trial.config["values"])
        record.host, record.pid = result["hostname"], result["pid"]
        record.runs = [RunProgress(**run) for run in result["runs"]]
        bests = [run.best.get(self.metric) for run in record.runs]
        if all(best is not None for best in bests):
            record.score = sum(best for best in bests if best is not None) / len(bests)
        self._write(record)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        record, result = self.record_of(trial), trial.last_result
        if result.get("error"):
            self._end(record, "failed", result["error"], result["diverged"])
        else:
            self._end(record, "finished" if result["ended"] else "stopped")

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        record = self.record_of(trial)
        reason = failure_of(trial)
        record.retried.append(reason)
        self._say(f"trial {record.number} ({record.method}) is started again from its checkpoint: {reason}")
        self._add_time(record)
        self._write(record)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._end(
            self.record_of(trial), "failed", f"lost {trial.num_failures} times, the last time: {failure_of(trial)}"
        )

    def _end(self, record: TrialRecord, state: Any, error: str | None = None, diverged: bool = False) -> None:
        record.state, record.error, record.diverged, record.ended_at = state, error, diverged, time.time()
        for run in record.runs:
            run.state = state if run.state == "running" else run.state
        self._add_time(record)
        self._write(record)
        self.ended += 1
        score = "" if record.score is None else f", {self.metric} {record.score:.2f}"
        stage = " final" if record.stage == "final" else ""
        self._say(
            f"trial {record.number} ({record.method}{stage}): {state}{f': {error}' if error else score}, {record.images:,} images; "
            f"{self.overview()}"
        )

    def _add_time(self, record: TrialRecord) -> None:
        started = self._since.pop(record.number, None)
        if started is not None:
            record.busy_s += time.monotonic() - started

    def _write(self, record: TrialRecord) -> None:
        try:
            self.folder.write(record)
            self.board.update(record)
        except RunError as error:
            self.error = self.error or error

    def overview(self) -> str:
        """Numbers of trials by state."""
        states = [record.state for record in self.search.records]
        counts = ((state, states.count(state)) for state in ("running", "finished", "stopped", "failed"))
        return ", ".join(f"{count} {state}" for state, count in counts if count)

    def _say(self, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def failure_of(trial: TuneTrial) -> str:
    """One line about the newest error of a trial."""
    with contextlib.suppress(OSError, TypeError):
        with open(trial.error_file) as file:
            lines = [line.strip() for line in file if line.strip()]
        return lines[-1].split(" Worker exit type:")[0][:300]
    return "its process or node was lost"
