"""Runs a sweep: checks, trials through Ray Tune, final runs, and the answer.

Ray Tune places the trials, restarts those whose process or node was lost, and asks the schedulers. Which trial comes next, and
what a sweep continues from, are ours: `search` and the records of `sweep_folder`. Tune's own files are never read back.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune

from pipeline.config import Config
from pipeline.console import console
from pipeline.data.store import Store
from pipeline.distributed.ray_session import check_visible, clean_up_after_controllers, on_cluster, ray_session
from pipeline.distributed.run_status import start_status
from pipeline.errors import RunError, UserError
from pipeline.runs.run_state import stop_requested
from pipeline.storage import Folder
from pipeline.trackers.follow import start_groups
from pipeline.training.checks import check_machine
from pipeline.training.launch import StopSignals
from pipeline.training.start import must_prepare, prepare_demo
from pipeline.tuning.answer import Answer
from pipeline.tuning.checks import check_sweep
from pipeline.tuning.ensembles import missing_ensembles, write_ensembles
from pipeline.tuning.population import KEEP, present_setting
from pipeline.tuning.resources import (
    TrialResources,
    check_labels,
    local_cpus,
    trial_resources,
    trials_here,
    trials_on_cluster,
)
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.schedulers import MethodSchedulers
from pipeline.tuning.search import Search
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import check_same_sweep, dump_sweep, read_sweep
from pipeline.tuning.sweep_folder import (
    HEARTBEAT_S,
    SWEEP,
    SweepFolder,
    TrialRecord,
    check_not_running,
    read_state,
    sweep_folder,
    write_state,
)
from pipeline.tuning.trial import Trial
from pipeline.tuning.tune_parts import Recorder, StopWhen, SweepSearcher
from pipeline.tuning.write_answer import write_answer

ANSWER_EVERY_S = 120.0  # sweep.html and leaderboard.csv while the sweep runs
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs write their own logs
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # Tune's own state is not read back
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # told in one line
}


@dataclass
class SweepResult:
    """The end of a sweep's command.

    Attributes:
        answer: The figures, as far as they are known.
        records: All trials.
        signal: Number of the signal that stopped it, or None.
    """

    answer: Answer
    records: list[TrialRecord]
    signal: int | None = None

    @property
    def failed(self) -> list[TrialRecord]:
        """Trials whose process was lost too often, or that could not be started; the same command tries them again."""
        return [record for record in self.records if record.state == "failed" and not record.diverged]


def run_sweep(
    sweep: SweepConfig, again: Sequence[int] = (), trainable: type[Trial] = Trial, fresh: bool = False
) -> SweepResult:
    """Starts or continues a sweep.

    Args:
        sweep: The sweep.
        again: Numbers of trials that were stopped early and are continued to their full length.
        trainable: The class of the trials' processes.
        fresh: Remove an earlier sweep of this name, its runs too.

    Raises:
        UserError: The input is bad; found before the first trial.
        RunError: Another process has taken over the sweep.
    """
    sweep = with_place(sweep)
    stores = check_sweep(sweep)
    folder = sweep_folder(sweep.storage, sweep.name)
    folder.check_writable()
    check_not_running(folder)
    sweep_records = SweepFolder(folder)
    if fresh:
        remove_sweep(sweep, folder)
    records = sweep_records.read()
    if folder.exists(SWEEP):
        for change in check_same_sweep(read_sweep(folder), sweep):
            console.print(f"changed: {change}", highlight=False)
    elif runs := trial_runs(sweep):
        raise UserError(
            f"{sweep.root}/runs has runs of an earlier sweep of the name {sweep.name}, whose folder is gone ({runs[0]} and "
            f"{len(runs) - 1} more): remove them with --fresh, or give this sweep another name"
        )
    check_again(records, again)
    for record in records if sweep.scheduler.name == "pbt" else ():
        if record.state == "running" and record.runs:
            run = Folder(sweep.root) / "runs" / record.runs[0].name
            record.values = present_setting(run) or record.values  # it may have copied another's just before the end
    state = read_state(folder)
    search = Search(sweep, records, again, state.hours if state is not None else 0.0)
    signal = None
    trained = not search.finished() or bool(missing_ensembles(sweep, folder, records))
    if trained:
        signal = train(sweep, sweep_records, search, stores, trainable)
    result = SweepResult(write_answer(sweep_records, sweep, records), records, signal)
    hours = search.hours if trained else state.hours if state is not None else 0.0
    write_state(folder, "stopped" if signal else "failed" if result.failed else "finished", hours=hours)
    return result


def train(
    sweep: SweepConfig, folder: SweepFolder, search: Search, stores: dict[str, Store], trainable: type[Trial]
) -> int | None:
    """Trains what a sweep still wants; returns the signal that stopped it, if any."""
    configs = example_configs(sweep)
    for warning in {line for config in configs.values() for line in check_machine(config)}:
        console.print(warning)
    trials = {label: trial_resources(config) for label, config in configs.items()}
    at_once = sweep.trials_at_once or trials_here(trials.values())
    console.print(f"starting Ray {'on the cluster' if on_cluster() else 'on this machine'} ...")
    with ray_session(local_cpus(at_once, trials.values())):
        check_labels(ray, trials.values())
        if on_cluster():
            check_visible(ray, Folder(sweep.root), "storage")
            at_once = min(trials_on_cluster(ray, trials.values()), sweep.trials_at_once or sys.maxsize)
        if any(must_prepare(config) for config in configs.values()):
            prepare_demo(next(config for config in configs.values() if must_prepare(config)))
            stores = check_sweep(sweep)
        folder.acquire()
        folder.folder.write(SWEEP, dump_sweep(sweep).encode())
        for config in configs.values():
            start_groups(config, sweep.name, folder.folder)
        console.print(f"{at_once} {'trials' if at_once > 1 else 'trial'} at once, {next(iter(trials.values()))} each")
        run = SweepRun(sweep, folder, search, at_once, trials)
        run.train({label: store.folder.uri for label, store in stores.items()}, trainable)
        if run.signal is None:
            write_ensembles(sweep, folder.folder, search.records, trials)
    return run.signal


@dataclass
class SweepRun:
    """One start of a sweep.

    Attributes:
        sweep, folder, search: The sweep, its records, and what comes next.
        at_once: Largest number of trials at once.
        trials: Resources of a trial of each method.
        signal: Number of the signal that stopped it.
    """

    sweep: SweepConfig
    folder: SweepFolder
    search: Search
    at_once: int
    trials: dict[str, TrialResources]
    signal: int | None = None

    def train(self, stores: dict[str, str], trainable: type[Trial]) -> None:
        """Trains all trials that are wanted, or until a signal.

        Raises:
            RunError: Another process has taken over the sweep, or Ray Tune failed.
        """
        status = start_status(ray)
        stop, asked = threading.Event(), threading.Event()
        recorder = Recorder(self.folder, self.search, self.sweep.metric, self.trials)
        errors: list[BaseException] = []

        def fit() -> None:
            try:
                self._tuner(
                    stores, trainable, status, recorder, lambda: stop.is_set() or recorder.error is not None
                ).fit()
            except BaseException as error:
                errors.append(error)

        def on_stop() -> None:
            stop.set()
            status.stop.remote()

        thread = threading.Thread(target=fit, daemon=True, name="tune")
        with StopSignals(on_stop) as signals:
            thread.start()
            written, told, told_at = 0.0, 0, time.monotonic()
            while thread.is_alive():
                thread.join(0.2)
                if recorder.error is not None and not stop.is_set():
                    on_stop()
                if time.monotonic() - written > HEARTBEAT_S:
                    written = time.monotonic()
                    write_state(self.folder.folder, "running", recorder.overview(), self.search.hours)
                    if not all(trial.in_process for trial in self.trials.values()):
                        clean_up_after_controllers(ray)  # of trials whose process was lost
                    if not stop.is_set() and stop_requested(self.folder.folder, self.folder.start):
                        console.print("stopping, as `raydml stop` asks: the trials save their checkpoints ...")
                        asked.set()
                        on_stop()
                if recorder.ended > told and time.monotonic() - told_at > ANSWER_EVERY_S:
                    told, told_at = recorder.ended, time.monotonic()
                    write_answer(self.folder, self.sweep, list(self.search.records), live=True)
        ray.kill(status)  # Ray Tune keeps a handle of it
        self.signal = signals.received or (signal.SIGTERM if asked.is_set() else None)
        if recorder.error is not None:
            raise recorder.error
        if errors:
            raise RunError(f"Ray Tune failed: {errors[0]}") from errors[0]

    def _tuner(
        self, stores: dict[str, str], trainable: type[Trial], status: Any, recorder: Recorder, stop: Callable[[], bool]
    ) -> tune.Tuner:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what happens is told by the recorder
        os.environ.update(_TUNE_ENVIRONMENT, TUNE_MAX_PENDING_TRIALS_PG=str(self.at_once))
        parameters = {"sweep": self.sweep.model_dump(mode="json"), "stores": stores, "status": status}
        bundles = {
            label: tune.PlacementGroupFactory([trial.bundle], bundle_label_selector=[trial.bundle_labels])
            for label, trial in self.trials.items()
        }
        place = self.folder.folder / "tune"
        place.remove()  # of an earlier start
        return tune.Tuner(
            tune.with_resources(
                tune.with_parameters(trainable, **parameters), lambda config: bundles[config["method"]]
            ),
            param_space={"method": next(iter(bundles))},
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=SweepSearcher(
                    self.search, self.at_once if self.sweep.scheduler.name != "pbt" else sys.maxsize
                ),
                scheduler=MethodSchedulers(self.sweep, self.search.records),
                reuse_actors=all(trial.in_process for trial in self.trials.values()),
            ),
            run_config=tune.RunConfig(
                name=f"start-{self.folder.start}",
                storage_path=place.path(),
                storage_filesystem=None if place.is_local else PyFileSystem(FSSpecHandler(place.fs)),
                failure_config=tune.FailureConfig(max_failures=self.sweep.retries),
                # Copies for population-based training, when its scheduler asks for one; the runs have their own checkpoints.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=KEEP, checkpoint_at_end=False),
                stop=StopWhen(stop),
                callbacks=[recorder],
                verbose=0,
            ),
        )


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


def remove_sweep(sweep: SweepConfig, folder: Folder) -> None:
    """Removes a sweep's folder and the runs of its trials."""
    for name in trial_runs(sweep):
        (Folder(sweep.root) / "runs").remove(name)
    folder.remove()


def trial_runs(sweep: SweepConfig) -> list[str]:
    """Names of the runs in the storage that a trial of a sweep of this name has, or would have."""
    pattern = re.compile(rf"{re.escape(sweep.name)}-\d{{5}}-(all|fold\d+)-seed\d+")
    return [name for name in (Folder(sweep.root) / "runs").names() if pattern.fullmatch(name)]


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
    return {
        label: run_configs(sweep, label, Space(sweep.space_of(label)).corners()[0], 0, "search")[0]
        for label in sweep.methods
    }
