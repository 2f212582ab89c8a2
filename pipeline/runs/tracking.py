"""A run's log: metrics.jsonl and TensorBoard events.

Rank 0 writes. A local run folder is written in place; for object storage the files grow in a
temporary folder and are copied whole at every `sync`. Lines of steps after the checkpoint that a
run resumes from are cut off first, and a line that survived the kill is not written again: a killed
run's log reads like that of a run that was never killed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from pipeline.runs.run_folder import METRICS
from pipeline.storage import Folder


class Tracker:
    """Writes the metrics of one run.

    Args:
        run: The run folder.
        step: Step that the run starts or resumes at.
    """

    def __init__(self, run: Folder, step: int) -> None:
        self.run = run
        self._temporary = None if run.is_local else tempfile.TemporaryDirectory(prefix="raydml-")
        self.local = run.path() if self._temporary is None else self._temporary.name
        old = run.read(METRICS).decode() if run.exists(METRICS) else ""
        lines = [line for line in old.splitlines() if _complete(line) and json.loads(line)["step"] <= step]
        self._written = {(line["step"], line["kind"]) for line in map(json.loads, lines)}
        run.write(METRICS, "".join(line + "\n" for line in lines).encode())
        self._path = os.path.join(self.local, METRICS)
        if self._temporary is not None:
            with open(self._path, "w") as file:
                file.writelines(line + "\n" for line in lines)
        folder = os.path.join(self.local, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        # tensorboardX's SummaryWriter writes through a queue that `flush` does not wait for.
        self._events = EventsWriter(os.path.join(folder, "events"), f".{time.time_ns() % 10**9:09d}")
        restart = SessionLog(status=SessionLog.START)  # TensorBoard hides what was logged at `step + 1` or later
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Appends one line; `kind` is train, validation or test.

        Args:
            step: Steps done.
            kind: "train", "validation", "test" or "frozen".
            values: Numbers by name.
        """
        if (step, kind) not in self._written:
            with open(self._path, "a") as file:
                file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                event = Event(wall_time=time.time(), step=step, summary=scalar(f"{kind}/{name}", value))
                self._events.write_event(event)

    def sync(self) -> None:
        """Makes everything logged so far visible in the run folder."""
        self._events.flush()
        if self._temporary is None:
            return
        for folder, _, files in os.walk(self.local):
            for name in files:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    self.run.write(os.path.relpath(path, self.local), file.read())

    def close(self, sync: bool = True) -> None:
        """Closes the files.

        Args:
            sync: Make everything visible in the run folder first.
        """
        if sync:
            self.sync()
        self._events.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def _complete(line: str) -> bool:
    """False for a last line that a killed process left unfinished."""
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    text = run.read(METRICS).decode() if run.exists(METRICS) else ""
    return [json.loads(line) for line in text.splitlines() if _complete(line)]
