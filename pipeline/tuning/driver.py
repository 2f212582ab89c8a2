"""Runs a sweep: checks, trials through Ray Tune, final runs, and the answer.

Ray Tune places the trials, restarts those whose process or node was lost, and asks the schedulers. Which trial comes next, and
what a sweep continues from, are ours: `search` and the records of `sweep_folder`. Tune's own files are never read back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher

from pipeline.config import Config
from pipeline.console import console
from pipeline.distributed.ray_session import check_visible, on_cluster, ray_session
from pipeline.errors import RunError, UserError
from pipeline.inference.ensemble import measure_ensemble
from pipeline.storage import Folder
from pipeline.training.launch import StopSignals
from pipeline.training.start import must_prepare, prepare_demo
from pipeline.tuning.answer import Answer, write_answer
from pipeline.tuning.checks import check_sweep
from pipeline.tuning.resources import TrialResources, local_cpus, trial_resources, trials_here, trials_on_cluster
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.schedulers import MethodSchedulers
from pipeline.tuning.search import Search, trial_config
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import check_same_sweep, dump_sweep, read_sweep
from pipeline.tuning.sweep_folder import (
    ENSEMBLES,
    SWEEP,
    RunProgress,
    SweepFolder,
    TrialRecord,
    final_trials,
    sweep_folder,
    write_state,
)
from pipeline.tuning.trial import StopFlag, Trial

HEARTBEAT_S = 5.0
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs write their own logs
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # Tune's own state is not read back
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass
class SweepResult:
    """The end of a sweep's command.

    Attributes:
        answer: The figures, as far as they are known.
        failed: Trials that failed, and are tried again by the same command.
        signal: Number of the signal that stopped it, or None.
    """

    answer: Answer
    failed: list[TrialRecord]
    signal: int | None = None


def run_sweep(sweep: SweepConfig, again: Sequence[int] = (), trainable: type[Trial] = Trial) -> SweepResult:
    """Starts or continues a sweep.

    Args:
        sweep: The sweep.
        again: Numbers of trials that were stopped early and are continued to their full length.
        trainable: The class of the trials' processes.

    Raises:
        UserError: The input is bad; found before the first trial.
        RunError: Another process has taken over the sweep.
    """
    sweep = with_place(sweep)
    stores = check_sweep(sweep)
    folder = sweep_folder(sweep.storage, sweep.name)
    folder.check_writable()
    sweep_records = SweepFolder(folder)
    records = sweep_records.read()
    if folder.exists(SWEEP):
        for change in check_same_sweep(read_sweep(folder), sweep):
            console.print(f"changed: {change}", highlight=False)
    check_again(records, again)
    configs = example_configs(sweep)
    trials = {label: trial_resources(config) for label, config in configs.items()}
    at_once = 1 if on_cluster() else min(trials_here(trials.values()), sweep.trials_at_once or 10**6)
    if sweep.trials_at_once and not on_cluster():
        at_once = sweep.trials_at_once
    console.print(f"starting Ray {'on the cluster' if on_cluster() else 'on this machine'} ...")
    with ray_session(local_cpus(at_once, trials.values())):
        if on_cluster():
            check_visible(ray, Folder(sweep.storage), "storage")
            at_once = min(trials_on_cluster(ray, trials.values()), sweep.trials_at_once or 10**6)
        for label, config in configs.items():
            if must_prepare(config):
                prepare_demo(config)
            if label not in stores:
                stores = check_sweep(sweep)
        sweep_records.acquire()
        folder.write(SWEEP, dump_sweep(sweep).encode())
        run = SweepRun(sweep, sweep_records, records, again, at_once, trials)
        run.train({label: store.folder.uri for label, store in stores.items()}, trainable)
        if run.signal is None:
            write_ensembles(sweep, folder, run.search.records, trials)
    answer = write_answer(sweep_records, sweep, run.search.records)
    failed = [record for record in run.search.records if record.state == "failed"]
    write_state(folder, "stopped" if run.signal else "finished")
    return SweepResult(answer, failed, run.signal)


@dataclass
class SweepRun:
    """One start of a sweep.

    Attributes:
        sweep, folder: The sweep and its records.
        at_once: Largest number of trials at once.
        trials: Resources of a trial of each method.
        signal: Number of the signal that stopped it.
    """

    sweep: SweepConfig
    folder: SweepFolder
    records: list[TrialRecord]
    again: Sequence[int]
    at_once: int
    trials: dict[str, TrialResources]
    signal: int | None = None
    search: Search = field(init=False)

    def __post_init__(self) -> None:
        self.search = Search(self.sweep, self.records, self.again)

    def train(self, stores: dict[str, str], trainable: type[Trial]) -> None:
        """Trains all trials that are wanted, or until a signal.

        Raises:
            RunError: Another process has taken over the sweep, or Ray Tune failed.
        """
        flag = ray.remote(num_cpus=0)(StopFlag).remote()
        stop = threading.Event()
        recorder = Recorder(self)
        errors: list[BaseException] = []

        def fit() -> None:
            try:
                self._tuner(stores, trainable, flag, recorder, lambda: stop.is_set() or recorder.error is not None).fit()
            except BaseException as error:
                errors.append(error)

        def on_stop() -> None:
            stop.set()
            flag.set.remote()

        thread = threading.Thread(target=fit, daemon=True, name="tune")
        with StopSignals(on_stop) as signals:
            thread.start()
            written = 0.0
            while thread.is_alive():
                thread.join(0.2)
                if recorder.error is not None and not stop.is_set():
                    on_stop()
                if time.monotonic() - written > HEARTBEAT_S:
                    written = time.monotonic()
                    write_state(self.folder.folder, "running", recorder.overview())
        self.signal = signals.received
        if recorder.error is not None:
            raise recorder.error
        if errors:
            raise RunError(f"Ray Tune failed: {errors[0]}") from errors[0]

    def _tuner(
        self, stores: dict[str, str], trainable: type[Trial], flag: Any, recorder: Recorder, stop: Callable[[], bool]
    ) -> tune.Tuner:
        os.environ.update(_TUNE_ENVIRONMENT, TUNE_MAX_PENDING_TRIALS_PG=str(self.at_once))
        parameters = {"sweep": self.sweep.model_dump(mode="json"), "stores": stores, "stop_flag": flag}
        bundles = {label: tune.PlacementGroupFactory([trial.bundle]) for label, trial in self.trials.items()}
        place = self.folder.folder / "tune"
        return tune.Tuner(
            tune.with_resources(
                tune.with_parameters(trainable, **parameters), lambda config: bundles[config["method"]]
            ),
            param_space={"method": next(iter(bundles))},
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=SweepSearcher(self.search, self.at_once),
                scheduler=MethodSchedulers(self.sweep, self.records),
                reuse_actors=all(trial.in_process for trial in self.trials.values()),
            ),
            run_config=tune.RunConfig(
                name=f"start-{self.folder.start}",
                storage_path=place.path(),
                storage_filesystem=None if place.is_local else PyFileSystem(FSSpecHandler(place.fs)),
                failure_config=tune.FailureConfig(max_failures=self.sweep.retries),
                stop=StopWhen(stop),
                callbacks=[recorder],
                verbose=0,
            ),
        )


class _NotSaved:
    """Ray Tune pickles its parts into a file that is never read back."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class SweepSearcher(_NotSaved, Searcher):
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


class StopWhen(_NotSaved, tune.Stopper):
    """Ends all trials once a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.condition()


class Recorder(_NotSaved, tune.Callback):
    """Keeps the record of every trial, and says what happens.

    Attributes:
        error: Why nothing can be recorded any more.
    """

    def __init__(self, run: SweepRun) -> None:
        self.run = run
        self.error: RunError | None = None
        self._since: dict[int, float] = {}  # when a trial's process started, by number

    def record_of(self, trial: TuneTrial) -> TrialRecord:
        return self.run.search.by_number[trial.config["number"]]

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        record = self.record_of(trial)
        held = self.run.trials[record.method]
        record.starts += 1
        record.started_at = record.started_at or time.time()
        record.workers, record.cpus, record.gpus = held.workers, held.total["CPU"], held.total["GPU"]
        self._since[record.number] = time.monotonic()
        self._write(record)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        record = self.record_of(trial)
        record.runs = [RunProgress(**run) for run in result["runs"]]
        bests = [run.best.get(self.run.sweep.metric) for run in record.runs]
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
        self._end(self.record_of(trial), "failed", f"lost {trial.num_failures} times, the last time: {failure_of(trial)}")

    def _end(self, record: TrialRecord, state: Any, error: str | None = None, diverged: bool = False) -> None:
        record.state, record.error, record.diverged, record.ended_at = state, error, diverged, time.time()
        for run in record.runs:
            run.state = state if run.state == "running" else run.state
        self._add_time(record)
        self._write(record)
        metric = self.run.sweep.metric
        score = "" if record.score is None else f", {metric} {record.score:.2f}"
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
            self.run.folder.write(record)
        except RunError as error:
            self.error = self.error or error

    def overview(self) -> str:
        """Numbers of trials by state."""
        states = [record.state for record in self.run.search.records]
        counts = ((state, states.count(state)) for state in ("running", "finished", "stopped", "failed"))
        return ", ".join(f"{count} {state}" for state, count in counts if count)

    def _say(self, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def failure_of(trial: TuneTrial) -> str:
    """One line about the newest error of a trial."""
    with contextlib.suppress(OSError, TypeError):
        with open(trial.error_file) as file:
            lines = [line.strip() for line in file if line.strip()]
        return lines[-1][:300]
    return "its process or node was lost"


def with_place(sweep: SweepConfig) -> SweepConfig:
    """The sweep with an absolute storage.

    Raises:
        UserError: On a cluster, the storage is a relative path.
    """
    root = sweep.root
    if on_cluster() and not (os.path.isabs(os.path.expanduser(root)) or "://" in root):
        raise UserError(
            f"storage {root!r} is a relative path, which every node of a cluster would look for in another folder: give an "
            "absolute path that all nodes mount, or s3://..."
        )
    return sweep.model_copy(update={"storage": Folder(root).uri})


def check_again(records: Sequence[TrialRecord], again: Sequence[int]) -> None:
    """Checks the numbers of the trials that are to be continued.

    Raises:
        UserError: There is no such trial, or it has reached its full length.
    """
    states = {record.number: record.state for record in records}
    for number in again:
        if states.get(number) != "stopped":
            stopped = [str(n) for n, state in states.items() if state == "stopped"]
            what = f"is {states[number]}" if number in states else "does not exist"
            raise UserError(
                f"trial {number} {what}, expected one that was stopped early: {', '.join(stopped) or 'there is none'}"
            )


def example_configs(sweep: SweepConfig) -> dict[str, Config]:
    """The configuration of one run of each method, for its resources and dataset."""
    from pipeline.tuning.space import Space

    return {
        label: run_configs(sweep, label, Space({**sweep.space, **entry.space}).corners()[0], 0, "search")[0]
        for label, entry in sweep.methods.items()
    }


def write_ensembles(
    sweep: SweepConfig, folder: Folder, records: Sequence[TrialRecord], trials: dict[str, TrialResources]
) -> None:
    """Measures the concatenated embeddings of each method's final runs, once they have all finished."""
    known: dict[str, Any] = folder.read_json(ENSEMBLES) if folder.exists(ENSEMBLES) else {}
    for label, seed, names in ensembles(sweep, records):
        entries = known.setdefault(label, [])
        if any(entry["runs"] == names for entry in entries):
            continue
        console.print(f"{label}: measuring the concatenated embeddings of {len(names)} runs", highlight=False)
        held = trials[label].worker
        task = ray.remote(num_cpus=held["CPU"], num_gpus=held.get("GPU", 0))(measure_ensemble)
        metrics = ray.get(task.remote([Folder(sweep.root) / "runs" / name for name in names]))
        entries[:] = [entry for entry in entries if entry["seed"] != seed]
        entries.append({"seed": seed, "runs": names, "metrics": metrics})
        folder.write_json(ENSEMBLES, known)


def ensembles(sweep: SweepConfig, records: Sequence[TrialRecord]) -> Iterator[tuple[str, int | None, list[str]]]:
    """Method, seed and runs of each ensemble: a seed's folds, or all seeds where runs are trained on all classes."""
    if sweep.final is None:
        return
    for label in sweep.methods:
        finals = [record for record in final_trials(records, label) if record.state == "finished"]
        if len(finals) < len(sweep.final.seeds):
            continue
        if sweep.final.classes == "folds":
            groups = [(record.seed, [run.name for run in record.runs]) for record in finals]
        else:
            groups = [(None, [run.name for record in finals for run in record.runs])]
        yield from ((label, seed, names) for seed, names in groups if len(names) > 1)

