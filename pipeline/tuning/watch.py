"""A sweep seen from outside: its records, read again and again while another process writes them.

Only what was written since is read. Nothing here is written, and nothing imports PyTorch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.runs.run_folder import METRICS
from pipeline.storage import Folder
from pipeline.storage.folder import FileVersion
from pipeline.tuning.sweep_folder import SWEEP, TRIALS, SweepFolder, SweepState, TrialRecord, read_state

SILENT_S = 30.0  # without a sign of life; the sweep's command gives one every 5 s
_TAIL_BYTES = 8192  # of a run's log, in which its last line is looked for


@dataclass(frozen=True)
class Snapshot:
    """A sweep at one moment.

    Attributes:
        name, metric: Name of the sweep, and the metric that it chooses by.
        methods: Labels of the methods.
        budget: The section of that name of the sweep's file.
        final_seeds: Number of final runs of each method.
        state: None before the first trial.
        records: By number.
        newest: When the newest record was written, seconds since 1970; None without records.
        logs: Newest line of the log of each running trial, by number.
        now: When this was read, seconds since 1970.
        since_change: Seconds since the sign of life last changed, by this process's clock; None: it has not changed yet.
    """

    name: str
    metric: str
    methods: tuple[str, ...]
    budget: Mapping[str, Any]
    final_seeds: int
    state: SweepState | None
    records: Sequence[TrialRecord]
    newest: float | None
    logs: Mapping[int, Mapping[str, Any]]
    now: float
    since_change: float | None = None

    @property
    def silent_s(self) -> float:
        """Seconds without a sign of life, if they are many and the sweep should run; else 0.

        By this process's clock, once it has seen one; before, by the difference of the two machines' clocks.
        """
        if self.state is None or self.state.state != "running":
            return 0.0
        silence = self.now - self.state.heartbeat if self.since_change is None else self.since_change
        return silence if silence > SILENT_S else 0.0

    @property
    def ended(self) -> bool:
        """The sweep's command has ended."""
        return self.state is not None and self.state.state != "running"

    @property
    def finished(self) -> bool:
        return self.state is not None and self.state.state == "finished"


@dataclass
class SweepReader:
    """Reads a sweep's folder.

    Args:
        folder: STORAGE/sweeps/NAME.
    """

    folder: Folder
    _records: dict[str, TrialRecord] = field(default_factory=dict)
    _versions: dict[str, FileVersion] = field(default_factory=dict)
    _heartbeat: float | None = None
    _changed_at: float | None = None  # of this process's monotonic clock

    def read(self) -> Snapshot:
        """The sweep now.

        Raises:
            UserError: A file of the sweep is damaged.
            RunError, OSError: The storage does not answer.
        """
        sweep = read_settings(self.folder)
        state = read_state(self.folder)  # before the records: a finished sweep's are then complete
        versions = {n: v for n, v in self.folder.versions(TRIALS).items() if n.endswith(".json")}
        records = SweepFolder(self.folder)
        for name, version in versions.items():
            if self._versions.get(name) != version:
                self._records[name] = records.read_one(name)
        self._records = {name: self._records[name] for name in versions}
        self._versions = versions
        found = sorted(self._records.values(), key=lambda record: record.number)
        heartbeat = state.heartbeat if state is not None else None
        if heartbeat != self._heartbeat:
            self._changed_at = None if self._heartbeat is None else time.monotonic()
        self._heartbeat = heartbeat
        return Snapshot(
            name=sweep["name"],
            metric=sweep["metric"],
            methods=tuple(sweep["methods"]),
            budget=sweep["budget"],
            final_seeds=len(sweep["final"]["seeds"]) if sweep["final"] else 0,
            state=state,
            records=found,
            newest=max((version.written for version in versions.values()), default=None),
            logs={r.number: line for r in found if r.state == "running" and (line := self._last_line(r))},
            now=time.time(),
            since_change=None if self._changed_at is None else time.monotonic() - self._changed_at,
        )

    def _last_line(self, record: TrialRecord) -> dict[str, Any] | None:
        """The last line of the log of the run that a trial is training."""
        name = next((run.name for run in record.runs if run.state == "running"), None)
        if name is None:
            return None
        storage = Folder(
            self.folder.uri.rsplit("/", 2)[0]
        )  # a sweep that was moved, with its runs, is read where it is
        return last_line(storage / "runs" / name)


def read_settings(folder: Folder) -> dict[str, Any]:
    """A sweep's resolved file, not validated.

    Raises:
        UserError: It is damaged.
    """
    try:
        sweep = yaml.safe_load(folder.read(SWEEP))
        missing = {"name", "metric", "methods", "budget", "final"} - set(sweep)
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/{SWEEP} is not a sweep ({error}): restore it") from error
    return dict(sweep)


def last_line(run: Folder) -> dict[str, Any] | None:
    """The last line of a run's log that is complete; None if there is none yet."""
    try:
        size = run.size(METRICS)
    except FileNotFoundError:
        return None
    lines = run.read_range(METRICS, max(0, size - _TAIL_BYTES), size).splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    return dict(json.loads(complete[-1])) if complete and complete[-1].startswith(b"{") else None
