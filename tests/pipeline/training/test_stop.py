"""`raydml stop` of the real training command, in this process."""

from __future__ import annotations

import functools
import signal
import threading

import pytest

from pipeline.runs import run_state
from pipeline.runs.run_state import read_run_state, request_stop
from pipeline.storage import Folder
from tests.pipeline.conftest import Base
from tests.pipeline.runs.test_run_state import state_of, until
from tests.pipeline.training.conftest import Train

pytestmark = pytest.mark.usefixtures("fresh_readers")


def test_a_run_that_is_stopped_ends_as_after_sigterm_and_continues(
    run: Train, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command: status 143 and a checkpoint; the request of before does not stop the next start."""
    monkeypatch.setattr(run_state, "LOCAL_EVERY_S", 0.05)
    folder = Folder(base.root / "runs" / "asked")
    changes = {"name": "asked", "length": "3000 epochs", "evaluation__every": "3000 epochs", "evaluation__test": False}
    done = 0
    for start in (1, 2):
        asked = threading.Thread(target=until, args=(functools.partial(_ask, folder, start, done + 5), 60))
        asked.start()
        status, _, err = run(**changes)
        asked.join()
        found = state_of(folder)
        assert status == 128 + signal.SIGTERM and (found.start, found.state, found.group) == (start, "stopped", start)
        assert "stopping, as `raydml stop` asks: saving a checkpoint ..." in err
        assert "saved; the same command continues" in err
        assert (f"resumed at step {done} " in err) == (start == 2)
        assert found.progress["step"] >= done + 5
        done = found.progress["step"]
    folder.remove()


def _ask(folder: Folder, start: int, step: int) -> bool:
    state = read_run_state(folder)
    if state is None or state.start != start or state.progress.get("step", 0) < step:
        return False
    request_stop(folder, state.start, state.token)
    return True
