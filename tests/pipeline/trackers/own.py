"""Trackers of a user's own, for tests: what they were given is in `seen`, by run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.trackers.tracker import Started, State, TrackedRun

seen: dict[str, list[Any]] = {}


class Remembers:
    """Keeps all calls."""

    def __init__(self, label: str = "own") -> None:
        self.label = label

    def start(self, run: TrackedRun) -> Started:
        self.calls = seen.setdefault(run.name, [])
        self.calls.append(("start", run))
        return Started(run.id or f"{self.label}-{run.name}", f"https://example.org/{run.name}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("log", step, dict(values)))

    def finish(self, state: State, figures: Mapping[str, float], report: str | None) -> None:
        self.calls.append(("finish", state, dict(figures), report))


class Writes:
    """Writes all calls into the run's folder, where another process can read them."""

    def start(self, run: TrackedRun) -> Started:
        assert run.local is not None
        self.path = Path(run.local, "tracked.jsonl")
        self._write("start", run.group, run.id)
        return Started(run.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._write("log", step, dict(values))

    def finish(self, state: State, figures: Mapping[str, float], report: str | None) -> None:
        self._write("finish", state, dict(figures))

    def _write(self, *call: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(call) + "\n")


class Fails(Remembers):
    """Fails at the first so many lines, of all runs together."""

    failures = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if Fails.failures > 0:
            Fails.failures -= 1
            raise ConnectionError("the service\nis down")
        super().log(step, values)


class StartsNever(Remembers):
    def start(self, run: TrackedRun) -> Started:
        raise PermissionError("no such project")


class Refuses:
    def __init__(self) -> None:
        raise RuntimeError("cannot be made")


class LacksMethods:
    def start(self, run: TrackedRun) -> Started:
        return Started("unused")
