"""A run seen from outside: its state, read again and again while another process writes it; what `raydml watch` shows.

Whether it is alive is decided by whether its counter grows while this process looks: the clocks of two machines need not
agree. Nothing is written, and nothing imports PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.metric_names import COUNTS
from pipeline.runs.following import Table, View, span
from pipeline.runs.records import read_run
from pipeline.runs.run_state import RunState, read_run_state, wait_for_change
from pipeline.storage import Folder

SILENT_S = 30.0  # without a change of the counter, beyond the time between two writes
LINE_EVERY_S = 15.0  # of the watcher's clock, between two lines of progress
POSITION = ("step", "epoch", "images")
_ENDS = {
    "finished": "the run is finished",
    "stopped": "the run was stopped; the same command continues it",
    "failed": "the run has failed; the same command continues it from its newest checkpoint",
}


@dataclass(frozen=True)
class RunSeen:
    """A run at one moment.

    Attributes:
        name: Name of the run.
        state: Its newest state.
        alive: The counter has grown while this process looked; None: it has not looked for long enough.
        silent_s: For how long it has not, by this process's clock.
        read_at: Of this process's clock, monotonic.
    """

    name: str
    state: RunState
    alive: bool | None
    silent_s: float
    read_at: float

    @property
    def lost(self) -> bool:
        """It should run, and gives no sign of life."""
        return self.state.state == "running" and self.silent_s > SILENT_S + self.state.every_s

    @property
    def ended(self) -> bool:
        return self.state.ended

    @property
    def finished(self) -> bool:
        return self.state.state == "finished"


class RunReader:
    """Reads a run's state.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Folder) -> None:
        self.run = run
        self._last: RunState | None = None
        self._changed_at = 0.0
        self._grew = False

    def read(self) -> RunSeen:
        """The run now.

        Raises:
            UserError: It has no state, or a damaged one.
            RunError, OSError: The storage does not answer.
        """
        return self._seen(require_state(self.run))

    def read_alive(self) -> RunSeen:
        """The run now, after its counter has grown, or has not for as long as two writes may take."""
        found = require_state(self.run)
        self._seen(found)
        return self._seen(found if found.ended else wait_for_change(self.run, found, 2 * found.every_s + 2))

    def _seen(self, state: RunState) -> RunSeen:
        now, last = time.monotonic(), self._last
        if last is None or (state.token, state.beat) != (last.token, last.beat):
            self._grew, self._changed_at = last is not None, now
        self._last = state
        silent_s = now - self._changed_at
        waited = silent_s > 2 * state.every_s + 1
        alive = None if state.ended else False if waited else True if self._grew else None
        name = self.run.uri.rsplit("/", 1)[1]
        return RunSeen(name, state, alive, silent_s, now)


def require_state(run: Folder) -> RunState:
    """The state of a run.

    Raises:
        UserError: No start of it has written one.
    """
    found = read_run_state(run)
    if found is None:
        record = read_run(run)
        raise UserError(
            f"{run} has no state.json: it is {record.state}, and no start of it by this version has got to its workers"
        )
    return found


def run_view(reader: RunReader) -> View[RunSeen]:
    return View("the run", reader.read, headlines, tables, _Changes(), as_json)


def headlines(run: RunSeen) -> Iterator[str]:
    """State, progress, figures, where it runs, and whether it is alive."""
    state, at = run.state, run.state.progress
    phase = at.get("phase", "starting workers")
    yield f"{run.name}: {state.state}{'' if state.ended else f', {phase}'}{position(at)}"
    if "images_per_second" in at:
        yield f"speed: {figures(at)}"
    if state.best:
        yield f"best: {metrics(state.best, state.metric)}, at step {state.best['step']:,}"
    if at.get("skipped_steps"):
        yield f"skipped: {at['skipped_steps']:,.0f} steps whose loss or gradient was not finite"
    if state.workers:
        yield f"where: {', '.join(where(worker) for worker in state.workers)}"
    starts = f"start {state.start} of the command, workers started {state.group} times in all"
    yield f"command: process {state.pid} on {state.host}; {starts}"
    if state.ended:
        yield _ENDS[state.state] + (f": {state.message}" if state.message else "")
    else:
        yield liveness(run)


def liveness(run: RunSeen) -> str:
    """Whether its counter grows, by the watcher's clock, and when it was written last, by the writer's."""
    written = time.strftime("%H:%M:%S", time.localtime(run.state.written_at))
    last = f"the last is of {written} by the clock of {run.state.host}"
    if run.lost:
        return (
            f"no sign of life for {run.silent_s:.0f} s ({last}): it was killed, hangs or cannot write; if its command is no "
            "longer there, the same command continues it"
        )
    if run.alive is None:
        return f"not watched for long enough to say whether it lives; signs of life: {last}"
    if not run.alive:
        return f"no sign of life since {run.silent_s:.0f} s, one is due every {run.state.every_s:g} s ({last})"
    return f"alive: a sign of life every {run.state.every_s:g} s, {last}"


def position(at: Mapping[str, Any]) -> str:
    if "step" not in at:
        return ""
    left = ""
    if at.get("images_per_second") and at["step"] and at.get("images"):
        steps_left = max(0, at["total"] - at["step"])
        seconds = steps_left * at["images"] / at["step"] / at["images_per_second"]
        left = f", {span(seconds)} of training left" if steps_left else ""
    return f", step {at['step']:,} of {at['total']:,} ({at['step'] / at['total']:.0%}), epoch {at['epoch']:.2f}{left}"


def figures(at: Mapping[str, Any]) -> str:
    loss = "" if at.get("loss") is None else f", loss {at['loss']:.4f}"
    return f"{at['images_per_second']:.1f} images/s, {at['waiting']:.1%} waiting for data{loss}"


def metrics(point: Mapping[str, Any], chooses: str) -> str:
    """Metrics of a validation in percent, first the one that chooses."""
    names = [n for n in point if n not in POSITION and n not in COUNTS and isinstance(point[n], (int, float))]
    names.sort(key=lambda name: name != chooses)
    return ", ".join(f"{name} {point[name]:.2f}" for name in names)


def where(worker: Mapping[str, Any]) -> str:
    return f"rank {worker['rank']} @ {worker['node']} (process {worker['pid']}, step {worker['step']:,})"


def tables(run: RunSeen) -> list[Table]:
    """The newest validations; none before the first."""
    points = run.state.validations
    if not points:
        return []
    header = ("step", "epoch", "images", "metrics")
    rows = [(f"{p['step']:,}", f"{p['epoch']:.2f}", f"{p['images']:,}", metrics(p, run.state.metric)) for p in points]
    return [Table("validations", [header, *rows])]


def as_json(run: RunSeen) -> dict[str, Any]:
    """Everything; `silent_s` is of the watcher's clock, `written_at` and `started_at` of the writer's."""
    return {
        "kind": "run", "name": run.name, **asdict(run.state), "alive": run.alive, "lost": run.lost,
        "silent_s": round(run.silent_s, 1),
    }  # fmt: skip


class _Changes:
    """What happened between two moments, a line each; lines of progress at most every `LINE_EVERY_S`."""

    def __init__(self) -> None:
        self._told_at = 0.0

    def __call__(self, before: RunSeen, after: RunSeen) -> Iterator[str]:
        old, new = before.state, after.state
        if new.token != old.token:
            yield f"start {new.start} of the command, process {new.pid} on {new.host}"
        if new.group > max(old.group, 1):
            yield f"the workers were started again: {', '.join(where(worker) for worker in new.workers)}"
        seen = {point["step"] for point in old.validations} if new.token == old.token else set()
        for point in new.validations:
            if point["step"] not in seen:
                best = "  * best so far" if new.best.get("step") == point["step"] else ""
                yield f"validation at step {point['step']:,}: {metrics(point, new.metric)}{best}"
        if new.message and new.message != old.message and not new.ended:
            yield new.message
        if before.lost != after.lost:
            yield liveness(after) if after.lost else "the run gives signs of life again"
        phase, skipped = (key_of(new, key) != key_of(old, key) for key in ("phase", "skipped_steps"))
        due = key_of(new, "step") != key_of(old, "step") and after.read_at - self._told_at >= LINE_EVERY_S
        if new.ended:
            yield list(headlines(after))[-1]
        elif phase or skipped or due:
            self._told_at = after.read_at
            at = new.progress
            speed = f": {figures(at)}" if "images_per_second" in at else ""
            yield f"{at.get('phase', 'starting workers')}{position(at)}{speed}"


def key_of(state: RunState, key: str) -> Any:
    return state.progress.get(key)
