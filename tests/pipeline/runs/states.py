"""States of a run, written and waited for, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline.distributed.run_status import RunStatus
from pipeline.runs.run_state import STATE, RunState, RunStateWriter, read_run_state
from pipeline.storage import Folder

AT = {"phase": "training", "step": 50, "total": 200, "epoch": 0.5, "images": 600, "images_per_second": 20.0, "waiting": 0.125,
      "loss": 0.5}  # fmt: skip
POINT = {"step": 40, "epoch": 0.4, "images": 480, "recall@1": 70.0, "map@r": 31.25, "queries": 90}
WORKERS = [
    {"rank": 0, "node": "10.0.0.7", "pid": 12, "step": 50},
    {"rank": 1, "node": "10.0.0.8", "pid": 13, "step": 49},
]


def write(folder: Folder, **values: Any) -> None:
    made: dict[str, Any] = {"start": 2, "token": "a", "beat": 7, "written_at": 1e9, "host": "head", "pid": 5, "metric": "map@r",
                            "progress": AT, "validations": [POINT], "best": POINT, "workers": WORKERS, "group": 3}  # fmt: skip
    folder.write_json(STATE, made | values)


def writer(folder: Folder, status: RunStatus, finished: bool = False) -> RunStateWriter:
    return RunStateWriter(folder, status.summary, status.stop, "map@r", lambda: finished)


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state_of(folder: Folder) -> RunState:
    found = read_run_state(folder)
    assert found is not None
    return found
