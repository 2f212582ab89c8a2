"""A trial: the process that Ray Tune starts for it, in which its runs are trained one after another.

With one worker the process is the worker, and it is used again for the next trial: PyTorch, the network's code and its weights
are then loaded already. With several workers it holds no CPU and starts Ray Train, as `pipeline.train` does.

Training waits at each validation until Ray Tune has decided whether the trial goes on, so a stopped trial does not train on. A
trial is ended by a request, never by killing it: its runs write a checkpoint and can be continued.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray import tune

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpus import use_cpus
from pipeline.distributed.gauges import RunGauges
from pipeline.distributed.run_status import RunStatus
from pipeline.errors import DivergedError, RunError, UserError, one_line
from pipeline.mining.actor import RayTransport
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import SUMMARY, run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.trackers.follow import RunTracking, read_tracking
from pipeline.training.checks import check_dataset, runtime_changes, with_former_defaults
from pipeline.training.launch import device_of, no_space_error, state_writer
from pipeline.training.loop import Worker
from pipeline.training.ray_train import mining_servers, run_on_ray
from pipeline.training.start import is_finished, record
from pipeline.tuning.population import adopt, copied_from, save_copy
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.schedulers import LATEST, SCORE, TIME, curve
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import RunProgress, TrialRecord, sweep_folder

STOP_TIMEOUT_S = 120.0  # at the end of a trial's process, which ends in any case
ASK_EVERY_S = 1.0


class Trial(tune.Trainable):
    """Trains the runs of one trial after another; `step` returns at each validation and at the end."""

    def setup(  # type: ignore[override]  # Ray Tune passes what `tune.with_parameters` is given
        self, config: dict[str, Any], sweep: dict[str, Any], stores: dict[str, str], status: Any
    ) -> None:
        """Starts the first trial of this process.

        Args:
            config: What `search.trial_config` makes of a trial.
            sweep: The sweep's configuration.
            stores: Address of the dataset of each method.
            status: Handle of an actor of class `RunStatus`: its stop request is for all trials.
        """
        self.sweep = SweepConfig.model_validate(sweep)
        self.stores = stores
        self.status = status
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends the trial of this process, however long its present evaluation takes, and starts another."""
        self._end(timeout_s=None)
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._end(STOP_TIMEOUT_S)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Population-based training: a copy of the present run, for other trials; the next `step` goes on from it."""
        self.runner.pause()
        save_copy(run_folder(self.runner.configs[0]), self.config["number"], checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Population-based training: takes over the copy of another trial; its own is in its run already."""
        if copied_from(checkpoint) != self.config["number"]:
            config = self.runner.configs[0]
            adopt(config, self.config["values"], run_folder(config), checkpoint)

    def step(self) -> dict[str, Any]:
        """Trains to the next validation, or to the end of the trial.

        Returns:
            The share of the trial's length in percent, its score so far, the state of its runs, and whether it is over.
        """
        runner = self.runner
        runner.go_on(lambda: bool(ray.get(self.status.stop_requested.remote())))
        return {
            TIME: runner.progress,
            SCORE: runner.score,
            LATEST: runner.latest,
            "runs": [asdict(run) for run in runner.runs],
            "error": runner.error,
            "diverged": runner.diverged,
            "ended": runner.ended,
            "done": runner.ended or runner.stop_requested.is_set(),
        }

    def _begin(self, config: Mapping[str, Any]) -> None:
        label = config["method"]
        configs = run_configs(
            self.sweep, label, config["values"], config["number"], config["stage"],
            length=config["length"], seed=config["seed"],
        )  # fmt: skip
        self.runner = TrialRunner(configs, self.stores[label], self.sweep.metric, self.run_one)

    def _end(self, timeout_s: float | None) -> None:
        self.runner.stop(timeout_s)
        gc.collect()

    def run_one(self, config: Config, store: Store, runner: TrialRunner) -> None:
        """Trains one run to its end or to a stop request; replaced where the trials' own work is to be left out."""
        name, run = self.sweep.name, run_folder(config)
        groups = read_tracking(sweep_folder(self.sweep.storage, name)) if config.tracking else {}
        with RunTracking(config, name, {label: group["id"] for label, group in groups.items()}) as tracking:
            train_run(config, store, runner)
            if is_finished(config, run):
                tracking.finished()


class TrialRunner:
    """Trains the runs of a trial in a thread that waits at each validation.

    Args:
        configs: The configuration of each run.
        store_uri: The dataset.
        metric: The metric that the sweep chooses by.
        run_one: Trains one run to its end or to a stop request.
    """

    def __init__(
        self,
        configs: list[Config],
        store_uri: str,
        metric: str,
        run_one: Callable[[Config, Store, TrialRunner], None],
    ) -> None:
        self.configs = configs
        self.store_uri = store_uri
        self.metric = metric
        self.run_one = run_one
        self.runs = [RunProgress(c.name, c.data.validation_fold, c.seed) for c in configs]
        self.current = 0
        self.ended = False
        self.error: str | None = None
        self.diverged = False
        self.failure: BaseException | None = None
        self.stop_requested = threading.Event()
        self._reached: queue.Queue[None] = queue.Queue()  # the thread has reached a validation, or its end
        self._allowed: queue.Queue[None] = queue.Queue()  # it may go on
        self._waiting = False
        self._thread: threading.Thread | None = None

    # ---- called by Ray Tune's thread -----------------------------------------------------------------------------------

    def go_on(self, stop_requested: Callable[[], bool]) -> None:
        """Lets the thread train to the next validation of the trial, or to its end; asks once a second whether it is to stop.

        Raises:
            Exception: An error that a restart may heal (a lost mining server, a network that does not answer).
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
            self._thread.start()
        elif self._waiting:
            self._waiting = False
            self._allowed.put(None)
        while True:
            try:
                self._reached.get(timeout=ASK_EVERY_S)
                break
            except queue.Empty:
                if not self.stop_requested.is_set() and stop_requested():
                    self.stop_requested.set()
        if self.failure is not None:
            raise self.failure

    def stop(self, timeout_s: float | None = None) -> None:
        """Asks the run to save a checkpoint and to end, and waits for that."""
        self.stop_requested.set()
        if self._thread is not None:
            self._allowed.put(None)
            self._thread.join(timeout_s)

    def pause(self) -> None:
        """Lets the run save a checkpoint and its thread end; `go_on` continues from it."""
        self.stop()
        self.stop_requested = threading.Event()
        self._reached, self._allowed, self._thread, self._waiting = queue.Queue(), queue.Queue(), None, False

    @property
    def progress(self) -> float:
        """Percent of the trial's length."""
        done = [run.curve[-1]["done"] if run.curve else 0.0 for run in self.runs]
        return 100.0 if self.ended and self.error is None else 100 * sum(done) / len(done)

    @property
    def score(self) -> float | None:
        """Mean of the best values of the runs that have begun."""
        points = curve(TrialRecord(0, "search", "", {}, runs=self.runs), self.metric)
        return points[-1][1] if points else None

    @property
    def latest(self) -> float | None:
        """Value of the sweep's metric at the last validation."""
        run = self.runs[self.current]
        return run.last.get(self.metric)

    # ---- called by the thread --------------------------------------------------------------------------------------------

    def _train(self) -> None:
        try:
            store = Store(Folder(self.store_uri))
            for i, config in enumerate(self.configs):
                self.current = i
                self._one(config, store)
                if self.stop_requested.is_set():
                    return
            self.ended = True
        except (RunError, UserError) as error:  # a restart would fail again
            self.error, self.ended, self.diverged = one_line(error), True, isinstance(error, DivergedError)
        except BaseException as error:
            traceback.print_exc()  # into the log of this process
            self.failure = error
        finally:
            self._reached.put(None)

    def _one(self, config: Config, store: Store) -> None:
        """Starts or continues one run, unless it has ended before."""
        folder, run = run_folder(config), self.runs[self.current]
        config = with_former_defaults(config, folder)
        changes = runtime_changes(config, folder)
        trained = not is_finished(config, folder)
        if trained:
            check_dataset(folder, store)
            record(config, folder, store, changes)
            latest = Checkpoints(folder).latest()
            if latest is not None:
                run.curve = recorded_curve(config, folder, latest.step)
                run.seconds, run.validation_s = latest.seconds, latest.validation_s
            self._measure(run)
            self.run_one(config, store, self)
        if is_finished(config, folder):
            self._take_result(config, run)
            if trained and self.current + 1 < len(self.configs):
                self.hold()

    def add_validation(self, point: dict[str, Any]) -> None:
        """Adds a validation of the present run, and waits until the trial may go on."""
        run = self.runs[self.current]
        run.curve.append({**point, "done": fraction_done(self.configs[self.current], point)})
        self._measure(run)
        if run.curve[-1]["done"] < 1:  # the last one counts when the run has ended
            self.hold()

    def hold(self) -> None:
        """Waits until the trial may go on."""
        if self.stop_requested.is_set():
            return
        self._waiting = True
        self._reached.put(None)
        self._allowed.get()

    def _measure(self, run: RunProgress) -> None:
        if run.curve:
            run.last = _metrics(run.curve[-1])
            run.best = _metrics(max(run.curve, key=lambda point: (point[self.metric], -point["step"])))
            run.images = run.curve[-1]["images"]

    def _take_result(self, config: Config, run: RunProgress) -> None:
        folder = run_folder(config)
        summary = folder.read_json(SUMMARY)
        run.curve = recorded_curve(config, folder, summary["step"])
        self._measure(run)
        run.state, run.test = "finished", summary["final"]
        run.images, run.seconds = summary["images"], summary["seconds"]
        run.validation_s = summary.get("validation_seconds", 0.0)  # absent in runs of earlier versions


def train_run(config: Config, store: Store, runner: TrialRunner) -> None:
    """Trains one run: in this thread with one worker, else with Ray Train."""
    if config.runtime.max_workers > 1:

        def show(state: dict[str, Any]) -> None:
            for point in state["validations"]:
                runner.add_validation(point)

        run_on_ray(config, store.folder.uri, show, ray, runner.stop_requested)
        return
    use_cpus(config.runtime.cpus_per_worker or 1)
    servers = mining_servers(config, ray)
    status = _TrialStatus(runner, RunGauges(config.name))
    try:
        transports = [RayTransport(server) for server in servers]
        with state_writer(config, status.summary, runner.stop_requested.set):
            Worker(config, store.folder.uri, Ranks(), device_of(config), status, servers=transports)()
    except OSError as error:
        raise no_space_error(error) from error
    finally:
        for server in servers:
            with contextlib.suppress(Exception):  # dead already
                ray.kill(server)


class _TrialStatus(RunStatus):
    """The status of a run whose worker is a thread of this process: waits at each validation."""

    def __init__(self, runner: TrialRunner, gauges: RunGauges) -> None:
        super().__init__()
        self.runner = runner
        self.gauges = gauges

    def publish(self, progress: dict[str, Any]) -> None:
        super().publish(progress)
        self.gauges.set(progress)

    def add_validation(self, point: dict[str, Any]) -> None:
        super().add_validation(point)
        self.gauges.set_validation(point)
        self.runner.add_validation(point)

    def stop_requested(self) -> bool:
        return self.runner.stop_requested.is_set()


def fraction_done(config: Config, point: Mapping[str, Any]) -> float:
    """Share of the run's length at a validation, 0 to 1."""
    length = config.length
    return min(1.0, (point["step"] if length.unit == "steps" else point["epoch"]) / length.value + 1e-9)


def recorded_curve(config: Config, folder: Folder, step: int) -> list[dict[str, Any]]:
    """The validations that a run has logged, up to a step."""
    points = [line for line in read_metrics(folder) if line["kind"] == "validation" and line["step"] <= step]
    for point in points:
        del point["kind"]
        point["done"] = fraction_done(config, point)
    return points


_POSITION = ("step", "epoch", "images", "done")


def _metrics(point: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in point.items() if name not in _POSITION}
