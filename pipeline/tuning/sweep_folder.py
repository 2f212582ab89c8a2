"""The folder of a sweep: its configuration, one record a trial, and the answer.

sweep.yaml        the resolved sweep
starts            number of the newest start of the sweep's command
trials/00007.json one record a trial, the only state that a sweep continues from
ensembles.json    figures of the concatenated embeddings of each method's final runs
state.json        whether the sweep runs, and the newest sign of life of its command
stop.json         the request to stop one start of it, see `pipeline.runs.run_state`
leaderboard.csv   a row a method and figure
sweep.html        the page
tensorboard/      a TensorBoard run for each trial
tune/             Ray Tune's own files of the present start; never read back

No module here imports PyTorch: the records can be shown while the sweep runs, from any machine.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pipeline.errors import RunError, UserError
from pipeline.runs.run_state import LastSign, refuse_second_start
from pipeline.storage import Folder, home

SWEEP = "sweep.yaml"
STARTS = "starts"
TRIALS = "trials"
ENSEMBLES = "ensembles.json"
STATE = "state.json"
LEADERBOARD = "leaderboard.csv"
PAGE = "sweep.html"
HEARTBEAT_S = 5.0  # between two signs of life of the command
SILENCE_S = 2.5 * HEARTBEAT_S

State = Literal["running", "finished", "stopped", "failed"]
STATES: tuple[State, ...] = get_args(State)


@dataclass
class RunProgress:
    """One run of a trial, as far as it has come.

    Attributes:
        name: Name of the run; its folder lies below STORAGE/runs.
        fold: Fold of the training classes that it validates on; None: trained on all of them.
        seed: The run's seed.
        state: "running" also before its start; "stopped": ended by the scheduler, can be continued.
        images: Images trained on.
        seconds: Time in training steps, all starts together.
        validation_s: Time in validations beside them.
        curve: One entry a validation: step, epoch, images, done (share of the run's length), and the metrics in percent.
        best: The metrics of the best validation; empty before the first. Under the paper protocol these are of the test classes.
        last: The metrics of the last validation.
        test: The metrics on the test classes; empty where they were not measured.
    """

    name: str
    fold: int | None
    seed: int
    state: State = "running"
    images: int = 0
    seconds: float = 0.0
    validation_s: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)


@dataclass
class TrialRecord:
    """One trial: a setting of one method, trained once for each fold and seed.

    Attributes:
        number: Number of the trial, from 0; also the order in which settings were drawn.
        stage: "search": chosen between by validation; "final": the chosen setting, trained again.
        method: Label of the method in the sweep's file.
        values: The drawn setting, by dotted key of the recipe.
        given: The setting was given in the sweep's file (`points`), not drawn.
        seed: Final runs: their seed.
        length: Final runs on all classes: their length, as a recipe writes it; None: that of the recipe.
        state: "stopped": ended early by the scheduler.
        runs: Its runs, in the order in which they are trained.
        score: Mean over its runs of the best value of the sweep's metric; None before every run has one.
        starts: How often it was started.
        retried: One line a start after the first: why.
        error: Why it failed.
        diverged: It failed because its runs cannot go on with this setting (a loss that is not finite); not tried again.
        started_at, ended_at: Seconds since 1970; ended_at is 0 while it runs.
        busy_s: Wall time in which it held its resources, all starts together.
        host, pid: Where its process ran last.
        workers, cpus, gpus: Workers, and CPUs and GPUs that it held altogether.
        history: Population-based training: each change of the setting, {"images", "values", "copied_from"}.
    """

    number: int
    stage: Literal["search", "final"]
    method: str
    values: dict[str, Any]
    given: bool = False
    seed: int | None = None
    length: str | None = None
    state: State = "running"
    runs: list[RunProgress] = field(default_factory=list)
    score: float | None = None
    starts: int = 0
    retried: list[str] = field(default_factory=list)
    error: str | None = None
    diverged: bool = False
    started_at: float = 0.0
    ended_at: float = 0.0
    busy_s: float = 0.0
    host: str = ""
    pid: int = 0
    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Images trained on, over all its runs."""
        return sum(run.images for run in self.runs)

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.busy_s / 3600


def best_trial(records: Iterable[TrialRecord], method: str) -> TrialRecord | None:
    """The search trial of a method with the highest score, the earliest of equals; None if none has a score.

    A trial that was stopped early is chosen only where no trial was trained to its full length.
    """
    own = [r for r in records if r.stage == "search" and r.method == method and r.state != "failed"]
    scored = [record for record in own if record.score is not None and math.isfinite(record.score)]
    full = [record for record in scored if record.state == "finished"]
    return max(full or scored, key=lambda record: (record.score or 0.0, -record.number), default=None)


def final_trials(records: Sequence[TrialRecord], method: str) -> list[TrialRecord]:
    """The final trials of a method's chosen setting, by seed; those of a setting that was chosen before are left out."""
    best = best_trial(records, method)
    finals = [r for r in records if r.stage == "final" and r.method == method]
    chosen = {r.seed: r for r in finals if best is not None and r.values == best.values}
    return sorted(chosen.values(), key=lambda record: record.seed or 0)


class SweepFolder:
    """The records of one sweep.

    Args:
        folder: STORAGE/sweeps/NAME.
        start: Number of this start; 0 for readers.
    """

    def __init__(self, folder: Folder, start: int = 0) -> None:
        self.folder = folder
        self.start = start

    def acquire(self) -> None:
        """Becomes the writer of the folder: an older process that still runs stops before it writes again."""
        self.start = self.current_start() + 1
        self.folder.write_json(STARTS, self.start)

    def current_start(self) -> int:
        """Number of the newest start of the sweep's command; 0 before the first."""
        return int(self.folder.read_json(STARTS)) if self.folder.exists(STARTS) else 0

    def read(self) -> list[TrialRecord]:
        """All records, by number.

        Raises:
            UserError: A record is damaged.
        """
        names = (name for name in self.folder.names(TRIALS) if name.endswith(".json"))
        return sorted((self.read_one(name) for name in names), key=lambda record: record.number)

    def read_one(self, name: str) -> TrialRecord:
        """One record, by the name of its file.

        Raises:
            UserError: It is damaged.
        """
        values = self.folder.read_json(f"{TRIALS}/{name}")
        try:
            runs = [RunProgress(**run) for run in values.pop("runs")]
            return TrialRecord(**values, runs=runs)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.folder}/{TRIALS}/{name} is not the record of a trial ({error}): restore it, or remove it to "
                "train this trial again"
            ) from error

    def write(self, record: TrialRecord) -> None:
        """Writes one record.

        Raises:
            RunError: Another start of the sweep has taken over.
        """
        current = self.current_start()
        if current != self.start:
            raise RunError(
                f"another process (start {current}) now runs the sweep {self.folder}: stopping this one (start {self.start})"
            )
        self.folder.write_json(f"{TRIALS}/{record.number:05d}.json", asdict(record))


def sweep_folder(storage: str, name: str) -> Folder:
    """The folder of a sweep below a storage root."""
    return Folder(storage or home()) / "sweeps" / name


def sweep_names(storage: Folder) -> list[str]:
    """Names of all sweeps below a storage root."""
    sweeps = storage / "sweeps"
    return [name for name in sweeps.names() if (sweeps / name).exists(SWEEP)]


@dataclass(frozen=True)
class SweepState:
    """Whether a sweep runs.

    Attributes:
        state: "stopped": by a signal; "failed": some trial failed.
        heartbeat: When its command gave the newest sign of life, seconds since 1970.
        message: What it said last.
        hours: Wall time of all starts.
        host, pid: Of the command.
    """

    state: State
    heartbeat: float
    message: str = ""
    hours: float = 0.0
    host: str = ""
    pid: int = 0


def write_state(folder: Folder, state: State, message: str = "", hours: float = 0.0) -> None:
    """Writes whether a sweep runs, and with it a sign of life."""
    folder.write_json(STATE, asdict(SweepState(state, time.time(), message, hours, socket.gethostname(), os.getpid())))


def check_not_running(folder: Folder) -> None:
    """Waits, where a sweep's last command left no word of its end, whether it gives another sign of life.

    Raises:
        UserError: It does: a second command would take the sweep from it.
    """

    def read() -> LastSign | None:
        found = read_state(folder)
        return (
            LastSign(found.heartbeat, found.host, found.pid) if found is not None and found.state == "running" else None
        )

    refuse_second_start("sweep", folder, read, SILENCE_S)


def read_state(folder: Folder) -> SweepState | None:
    """Whether a sweep runs; None before its first trial.

    Raises:
        UserError: The file is damaged.
    """
    if not folder.exists(STATE):
        return None
    try:
        found = SweepState(**folder.read_json(STATE))
        if found.state not in STATES or not isinstance(found.heartbeat, (int, float)):
            raise ValueError(f"{found.state!r} at {found.heartbeat!r}")
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/{STATE} is not the state of a sweep ({error}): remove it") from error
    return found
