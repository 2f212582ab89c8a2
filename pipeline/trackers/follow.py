"""Trackers follow a run's log: a thread of the run's command reads metrics.jsonl and gives each new line to each tracker.

Whatever a tracker raises, and however long it takes, training goes on. What it missed is sent when it answers again, at the latest by
the next start of the same command. Workers that are killed and resumed write the same lines again, which are not sent twice.

    tracking.json   by tracker: the run's id with the service, where to look at it, the steps that it has, and what went wrong
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from methods import plugins
from pipeline.config import Config, flat_config
from pipeline.console import say
from pipeline.errors import RunError, UserError, one_line
from pipeline.metric_names import COUNTS
from pipeline.runs.run_folder import METRICS, REPORT, SUMMARY, TRACKING, run_folder
from pipeline.storage import Folder
from pipeline.trackers.choose import make_trackers
from pipeline.trackers.tracker import GroupTracker, State, TrackedRun, Tracker

LOCAL_EVERY_S, REMOTE_EVERY_S = 2.0, 10.0
AGAIN_S = 30.0  # from a call that failed to the next one
FINISH_S = 120.0  # longest time that the end of the command waits for trackers


class LogReader:
    """The complete lines of a run's log that were added since the last reading; from the first again where it was cut.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Folder) -> None:
        self.run = run
        self.offset = 0

    def new_lines(self) -> list[dict[str, Any]]:
        try:
            size = self.run.size(METRICS)
        except FileNotFoundError:
            return []
        if size < self.offset:  # workers have resumed at an earlier step
            self.offset = 0
        if size == self.offset:
            return []
        text = self.run.read_range(METRICS, self.offset, size)
        complete = text[: text.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
        except json.JSONDecodeError:  # cut and grown since the last reading
            self.offset = 0
            return []
        self.offset += len(complete)
        return lines


class FollowedTracker:
    """One tracker, how far it has got, and what went wrong.

    Args:
        name: Its name in the config.
        tracker: The tracker.
        run: The run folder.
        kept: Its part of tracking.json.
    """

    def __init__(self, name: str, tracker: Tracker, run: Folder, kept: Mapping[str, Any]) -> None:
        self.name, self.tracker = name, tracker
        self.id: str | None = kept.get("id")
        self.url: str | None = kept.get("url")
        self.sent: dict[str, int] = dict(kept.get("sent", {}))  # largest step by kind of line
        self.problem: str | None = None
        self.started = False
        self._log = LogReader(run)
        self._again_at = 0.0

    def kept(self) -> dict[str, Any]:
        found = {"id": self.id, "url": self.url, "sent": self.sent, "problem": self.problem}
        return {key: value for key, value in found.items() if value}

    def follow(self, told: TrackedRun, now: bool = False) -> None:
        """Starts the tracker where that has not been done, and gives it the new lines; an error is told once as long as it lasts.

        Args:
            told: What it is told at its start.
            now: Also shortly after an error.
        """
        if self.problem is None or now or time.monotonic() >= self._again_at:
            self.attempt(lambda: self._follow(told))

    def attempt(self, work: Callable[[], None]) -> None:
        """Does something that may fail for any reason."""
        try:
            work()
            self.problem = None
        except Exception as error:  # whatever a service raises: the run goes on
            problem = plugins.failure(error) if not isinstance(error, (UserError, RunError)) else one_line(error)
            if self.problem is None:
                say(
                    f"warning: tracking by {self.name} failed ({problem}): the run goes on, what is missing is sent later"
                )
            self.problem = problem
            self._again_at = time.monotonic() + AGAIN_S
            self._log.offset = 0

    def _follow(self, told: TrackedRun) -> None:
        if not self.started:
            found = self.tracker.start(told)
            self.id, self.url, self.started = found.id, found.url, True
            if not found.keeps:
                self.sent = {}
        for line in self._log.new_lines():
            step, kind = line["step"], line["kind"]
            if step > self.sent.get(kind, -1):
                self.tracker.log(step, numbers(line))
                self.sent[kind] = step


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of the log, by kind and name."""
    return {
        f"{line['kind']}/{name}": value
        for name, value in line.items()
        if name not in ("step", "kind") and isinstance(value, (int, float)) and math.isfinite(value)
    }


class RunTracking:
    """Follows one start of a run while a block runs, and ends its trackers with it. Without trackers it does nothing.

    Args:
        config: The resolved configuration.
        group: Name of the sweep that the run belongs to.
        parents: By tracker: what it returned for that sweep.
    """

    def __init__(self, config: Config, group: str | None = None, parents: Mapping[str, str] | None = None) -> None:
        self.run = run_folder(config)
        self.every_s = LOCAL_EVERY_S if self.run.is_local else REMOTE_EVERY_S
        kept = read_tracking(self.run) if config.tracking else {}
        self.trackers = [
            FollowedTracker(name, tracker, self.run, kept.get(name, {})) for name, tracker in _made(config).items()
        ]
        self._kept = kept
        self._told = {
            entry.name: TrackedRun(
                config.name, self.run.uri, self.run.path() if self.run.is_local else None,
                flat_config(config), entry.id, group, (parents or {}).get(entry.name),
            )
            for entry in self.trackers
        }  # fmt: skip
        self._end = threading.Event()
        self._state: State = "failed"
        self._is_finished = False
        self._unwritten = ""

    def __enter__(self) -> RunTracking:
        self._thread = threading.Thread(target=self._run, daemon=True, name="tracking")
        if self.trackers:
            self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self.trackers:
            return
        if error is None:
            self._state = "finished" if self._is_finished else "stopped"
        self._end.set()
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            say(
                f"warning: tracking has not ended within {FINISH_S:g} s and is left: the same command sends what is missing"
            )

    def finished(self) -> None:
        """The run is finished and its report written, if it gets one."""
        self._is_finished = True

    def _run(self) -> None:
        while not self._end.is_set():
            for entry in self.trackers:
                entry.follow(self._told[entry.name])
            self._keep()
            self._end.wait(self.every_s)
        figures = final_figures(self.run) if self._state == "finished" else {}
        with local_report(self.run, self._state) as report:
            for entry in self.trackers:
                entry.follow(self._told[entry.name], now=True)
                if entry.started and entry.problem is None:
                    entry.attempt(functools.partial(entry.tracker.finish, self._state, figures, report))
        self._keep()

    def _keep(self) -> None:
        found = self._kept | {entry.name: entry.kept() for entry in self.trackers}
        if found == self._kept:
            return
        try:
            self.run.write_json(TRACKING, found)
            self._kept = json.loads(json.dumps(found))
            self._unwritten = ""
        except (OSError, RunError) as error:  # tried again
            problem = f"warning: {self.run}/{TRACKING} cannot be written, trying again: {one_line(error)}"
            if problem != self._unwritten:
                say(problem)
            self._unwritten = problem


def _made(config: Config) -> dict[str, Tracker]:
    """The trackers of a run; where a node lacks a package, that is told, and the run goes on without."""
    try:
        return make_trackers(config)
    except UserError as error:
        say(f"warning: {one_line(error)}: this run is not tracked")
        return {}


def read_tracking(folder: Folder) -> dict[str, Any]:
    """What is known of the trackers of a run or a sweep, by name."""
    return dict(folder.read_json(TRACKING)) if folder.exists(TRACKING) else {}


def lacking(run: Folder) -> list[str]:
    """Names of the trackers of a run that failed in the end."""
    return [name for name, kept in read_tracking(run).items() if kept.get("problem")]


def final_figures(run: Folder) -> dict[str, float]:
    """The figures on the test classes, in percent."""
    return {name: value for name, value in run.read_json(SUMMARY)["final"].items() if name not in COUNTS}


@contextlib.contextmanager
def local_report(run: Folder, state: State) -> Iterator[str | None]:
    """Path of a finished run's report on this machine."""
    if state != "finished" or not run.exists(REPORT):
        yield None
    elif run.is_local:
        yield run.path(REPORT)
    else:
        with tempfile.TemporaryDirectory(prefix="raydml-") as folder:
            path = os.path.join(folder, REPORT)
            with open(path, "wb") as file:
                file.write(run.read(REPORT))
            yield path


def start_groups(config: Config, name: str, folder: Folder) -> dict[str, str]:
    """Begins or continues a sweep with those trackers that keep an object for it; their ids by name.

    Args:
        config: Configuration of some trial of the sweep.
        name: Name of the sweep.
        folder: The sweep's folder, in which the ids are kept.
    """
    kept = read_tracking(folder)
    for label, tracker in make_trackers(config).items():
        if isinstance(tracker, GroupTracker):
            try:
                kept[label] = {"id": tracker.start_group(name, folder.uri, kept.get(label, {}).get("id"))}
            except Exception as error:  # whatever a service raises
                say(f"warning: tracking by {label} failed ({plugins.failure(error)}): the trials have no parent there")
    if kept:
        folder.write_json(TRACKING, kept)
    return {label: entry["id"] for label, entry in kept.items()}
