"""Whether a run runs, as files in its folder say it to any machine that sees the storage; and the request to stop it.

    state.json   of the newest start of the run's command: a counter that grows as long as it lives, phase, step, figures
    stop.json    the start that is to stop; the next start has another number, so an old request stops nothing

A thread of the driver (of rank 0's process where there is no driver) writes the one and looks for the other: every 2 s in a
folder, every 10 s in object storage, where that is 360 writes and 720 reads an hour. Training never waits for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from pipeline.console import say
from pipeline.errors import RunError, UserError, one_line
from pipeline.storage import Folder

STATE, STOP = "state.json", "stop.json"
LOCAL_EVERY_S, REMOTE_EVERY_S = 2.0, 10.0
LAST_WRITE_S = 30.0  # longest time that the end of a run waits for its last state to be written

State = Literal["running", "finished", "stopped", "failed"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class RunState:
    """One start of a run's command, as it was when it was written.

    Attributes:
        start: Number of the start, from 1.
        token: Tells two starts of one number apart, on machines that started at the same time.
        state: "stopped": by a signal or a request.
        beat: Counts the writes of this start.
        every_s: Longest time between two writes while it lives, seconds.
        written_at: Of the writer's clock, seconds since 1970.
        started_at: Of the same clock.
        host, pid: Of the process that writes.
        metric: The metric that chooses the best checkpoint.
        progress: Newest progress of rank 0: phase, step, total, images_per_second, waiting, loss, ...
        workers: One entry a rank that has told where it runs: rank, node, pid.
        group: How often workers were started, this start of the command and earlier ones together.
        validations: The newest validations of this start: step, epoch, images and metrics in percent.
        best: Of all validations of the run: step and metrics.
        message: What it said last, or the error that ended it.
    """

    start: int
    token: str
    state: State = "running"
    beat: int = 0
    every_s: float = LOCAL_EVERY_S
    written_at: float = 0.0
    started_at: float = 0.0
    host: str = ""
    pid: int = 0
    metric: str = ""
    progress: Mapping[str, Any] = field(default_factory=dict)
    workers: tuple[Mapping[str, Any], ...] = ()
    group: int = 0
    validations: tuple[Mapping[str, Any], ...] = ()
    best: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.state != "running"


def read_run_state(run: Folder) -> RunState | None:
    """The newest state of a run; None if no start of it has written one.

    Raises:
        UserError: The file is damaged.
    """
    try:
        values = run.read_json(STATE)
    except FileNotFoundError:
        return None
    try:
        known = {name: value for name, value in values.items() if name in RunState.__dataclass_fields__}
        found = RunState(**known | {key: tuple(known[key]) for key in ("workers", "validations") if key in known})
        if found.state not in STATES or not all(isinstance(n, int) for n in (found.start, found.beat)):
            raise ValueError(f"{found.state!r}, start {found.start!r}, beat {found.beat!r}")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{run}/{STATE} is not the state of a run ({error}): remove it") from error
    return found


def request_stop(run: Folder, start: int, token: str = "") -> None:
    """Asks one start of a run, or of a sweep, to save and to end."""
    run.write_json(STOP, {"start": start, "token": token, "by": f"{socket.gethostname()}, process {os.getpid()}"})


def stop_requested(run: Folder, start: int, token: str = "") -> bool:
    """True if a request names this start.

    Raises:
        UserError: The file is damaged.
    """
    try:
        request = run.read_json(STOP)
    except FileNotFoundError:
        return False
    return isinstance(request, dict) and (request.get("start"), request.get("token")) == (start, token)


@dataclass
class RunStateWriter:
    """Writes the state of one start of a run while a block runs, and passes a stop request on.

    Args:
        run: The run folder.
        read: The status of the run, as `RunStatus.summary` gives it.
        stop: Called once, when a request names this start.
        metric: The metric that chooses the best checkpoint.
        finished: Whether the run has reached its length; asked when the block has ended.

    Attributes:
        stopped: A request has been passed on.
        signal: SIGTERM if the run was stopped by such a request, known after the block.
    """

    run: Folder
    read: Callable[[], Mapping[str, Any]]
    stop: Callable[[], None]
    metric: str
    finished: Callable[[], bool]
    stopped: bool = False
    signal: int | None = None

    def __enter__(self) -> RunStateWriter:
        self._every_s = LOCAL_EVERY_S if self.run.is_local else REMOTE_EVERY_S
        self._state: RunState | None = None
        self._problem = ""
        self._replaced = False
        self._end = threading.Event()
        self._last: tuple[State, str] = ("failed", "")
        self._thread = threading.Thread(target=self._write_repeatedly, daemon=True, name="state")
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Writes the last state, which it waits for at most `LAST_WRITE_S`."""
        if error is not None:
            self._last = ("failed", one_line(error))
        else:
            self._last = ("finished" if self.finished() else "stopped", "")
        if self.stopped and self._last[0] == "stopped":
            self.signal = signal.SIGTERM
        self._end.set()
        self._thread.join(LAST_WRITE_S)

    def _write_repeatedly(self) -> None:
        while not self._end.is_set():
            self._try(self._write)
            self._end.wait(self._every_s)
        self._try(lambda: self._write(*self._last))

    def _try(self, work: Callable[[], None]) -> None:
        """A storage that does not take the state does not end the run: it is told once as long as it lasts."""
        try:
            work()
            self._problem = ""
        except Exception as error:
            problem = f"{self.run}/{STATE} cannot be written or read, trying again: {one_line(error)}"
            if problem != self._problem:
                say(problem)
            self._problem = problem

    def _write(self, state: State = "running", message: str = "") -> None:
        if self._replaced:
            return
        found = read_run_state(self.run) if self._state is None or not self._end.is_set() else None
        if self._state is None:
            number = found.start + 1 if found is not None else 1
            now = time.time()
            self._state = RunState(number, uuid.uuid4().hex[:12], started_at=now, host=socket.gethostname(), pid=os.getpid(),
                                   every_s=self._every_s, metric=self.metric)  # fmt: skip
        elif found is not None and (found.start, found.token) > (self._state.start, self._state.token):
            self._replaced = True  # a later start of the run owns the file
            return
        values = self.read()
        mine = self._state
        self._state = RunState(
            **{name: getattr(mine, name) for name in ("start", "token", "started_at", "host", "pid", "every_s", "metric")},
            state=state, beat=mine.beat + 1, written_at=time.time(), message=message or (values["messages"] or [""])[-1],
            progress=values["progress"], workers=tuple(values["workers"]), group=values["group"],
            validations=tuple(values["validations"][-3:]), best=values["best"],
        )  # fmt: skip
        self.run.write_json(STATE, _without_nan(asdict(self._state)))
        if state == "running" and not self.stopped and stop_requested(self.run, mine.start, mine.token):
            self.stopped = True
            say("stopping, as `raydml stop` asks: saving a checkpoint ...")
            self.stop()


def _without_nan(value: Any) -> Any:
    """None in place of numbers that JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class LastSign(NamedTuple):
    """The last sign of life of a run or a sweep.

    Attributes:
        sign: Changes with every sign of life.
        host, pid: Of the process that gave it.
        position: How far it was, ", step 7"; empty where that is not known.
    """

    sign: Hashable
    host: str
    pid: int
    position: str = ""


def check_not_running(run: Folder) -> None:
    """Waits, where the last start of a run left no word of its end, whether it gives another sign of life.

    Raises:
        UserError: It does: a second start would take the run from it.
    """

    def read() -> LastSign | None:
        state = read_run_state(run)
        if state is None or state.ended:
            return None
        return LastSign((state.token, state.beat), state.host, state.pid, f", step {state.progress.get('step', 0)}")

    before = read_run_state(run)
    if before is not None:
        refuse_second_start("run", run, read, 2.5 * before.every_s)


def refuse_second_start(what: str, folder: Folder, read: Callable[[], LastSign | None], seconds: float) -> None:
    """Waits, where the last start left no word of its end, whether it gives another sign of life.

    Args:
        what: "run" or "sweep".
        folder: Its folder.
        read: Gives its last sign of life; None once it has ended.
        seconds: Longest time between two signs of life, with a reserve.

    Raises:
        UserError: It gives one: a second start would take the folder from it.
    """
    before = read()
    if before is None or is_gone(before.host, before.pid):
        return
    say(
        f"{folder} has no word of the end of its last start, on {before.host}: looking up to {seconds:g} s whether it still runs"
    )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, seconds / 10))
        found: LastSign | None = before
        with contextlib.suppress(RunError, OSError):  # a storage that does not answer may do so later
            found = read()
        if found is None:
            return
        if found.sign != before.sign:
            raise UserError(
                f"{what} {folder} is running (on {found.host}, process {found.pid}{found.position}): wait for its end, stop it with "
                f"`raydml stop {folder}`, or give this {what} another name"
            )


def is_gone(host: str, pid: int) -> bool:
    """True if a process of this machine has ended; of those of other machines nothing is known."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def wait_for_change(run: Folder, before: RunState, seconds: float) -> RunState:
    """The first state whose counter differs from `before`, or the one found after so many seconds of this clock."""
    deadline = time.monotonic() + seconds
    found = before
    while (found.token, found.beat) == (before.token, before.beat) and time.monotonic() < deadline:
        time.sleep(min(0.5, before.every_s / 4))
        with contextlib.suppress(RunError, OSError):  # a storage that does not answer may do so later
            found = read_run_state(run) or found
    return found
