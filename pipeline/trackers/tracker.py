"""The protocol of a tracker: an object that is given a run as it goes. Write one of your own with these three methods.

A tracker lives in the process of the run's command, never in a worker: what it costs or raises does not touch training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

State = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told at the start.

    Attributes:
        name: Name of the run.
        folder: Folder or URI of the run.
        local: Folder on this machine for the tracker's own files; None: the run is in object storage.
        config: The resolved configuration by dotted key.
        id: What `start` returned as `id` at an earlier start of the run; None: this is the first.
        group: Name of the sweep that the run belongs to; None: none.
        parent: What `start_group` returned for that sweep; None: nothing.
    """

    name: str
    folder: str
    local: str | None
    config: Mapping[str, Any]
    id: str | None = None
    group: str | None = None
    parent: str | None = None


@dataclass(frozen=True)
class Started:
    """What `Tracker.start` returns.

    Attributes:
        id: Name under which the service knows the run; given to `start` again when the run is continued.
        url: Where to look at it; None: nowhere.
        keeps: Whether what was logged in earlier starts is still there; False: it is sent again from the first line.
    """

    id: str
    url: str | None = None
    keeps: bool = True


@runtime_checkable
class Tracker(Protocol):
    """Gets one run. All calls come from one thread; an error is told once, and the call is repeated later."""

    def start(self, run: TrackedRun) -> Started:
        """Begins the run, or continues the one of `run.id`."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of the run's log.

        Args:
            step: Steps done; never smaller than in the call before, and each name comes once a step.
            values: Finite numbers by name: "train/loss", "validation/map@r", "test/recall@1", "frozen/recall@1".
        """
        ...

    def finish(self, state: State, figures: Mapping[str, float], report: str | None) -> None:
        """Ends this start of the run.

        Args:
            state: How it ended; "stopped" and "failed" runs may be continued by a later start.
            figures: The final figures on the test classes; empty unless it is finished.
            report: Path of report.html on this machine; None: there is none.
        """
        ...


@runtime_checkable
class GroupTracker(Tracker, Protocol):
    """A tracker that keeps an object of its own for a sweep, which the runs of the trials then name as their parent."""

    def start_group(self, name: str, folder: str, id: str | None) -> str:
        """Begins or continues a sweep; called once a start of the sweep's command, before the trials. Returns its id."""
        ...
