"""The state of a run: the thread that writes it, requests to stop, and files that cannot be read."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from pipeline import watch
from pipeline.distributed.run_status import RunStatus
from pipeline.errors import RunError, UserError
from pipeline.runs import run_state
from pipeline.runs.run_state import (
    STATE,
    STOP,
    read_run_state,
    request_stop,
    stop_requested,
    wait_for_change,
)
from pipeline.storage import Folder
from tests.pipeline.runs.states import AT, POINT, WORKERS, state_of, until, write, writer


def test_a_start_writes_what_the_run_is_doing_and_its_end(folder: Folder, quick: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_state, "REMOTE_EVERY_S", 0.05)
    status = RunStatus()
    status.publish(AT | {"loss": float("nan")})
    status.publish({"phase": "validating"})
    status.add_validation(POINT)
    status.update({"group": 3, "best": POINT})
    status.beat(1, "10.0.0.8", 13, 49)
    assert read_run_state(folder) is None
    with writer(folder, status):
        until(lambda: (s := read_run_state(folder)) is not None and s.beat >= 3)
        found = state_of(folder)
        assert (found.start, found.state, found.group, found.metric) == (1, "running", 3, "map@r")
        assert found.progress == {**AT, "phase": "validating", "loss": None} and found.best == POINT
        assert found.validations == (POINT,) and found.workers == (WORKERS[1],)
        status.add_message("saved")
    ended = state_of(folder)
    assert (ended.state, ended.message, ended.token) == ("stopped", "saved", found.token) and ended.beat > found.beat
    with writer(folder, RunStatus(), finished=True):
        pass
    again = state_of(folder)
    assert (again.start, again.state) == (2, "finished") and again.token != found.token
    with pytest.raises(RunError), writer(folder, RunStatus()):
        raise RunError("the loss is not finite")
    assert (state_of(folder).state, state_of(folder).message) == ("failed", "the loss is not finite")


def test_a_request_stops_the_start_that_it_names_and_no_other(run_folder: Folder, quick: None) -> None:
    request_stop(run_folder, 1, "another token")
    status = RunStatus()
    with writer(run_folder, status) as state:
        until(lambda: (s := read_run_state(run_folder)) is not None and s.beat >= 3)
        assert not status.stop_requested()
        request_stop(run_folder, 1, state_of(run_folder).token)
        until(status.stop_requested)
    assert state.signal == signal.SIGTERM and state_of(run_folder).state == "stopped"
    later = RunStatus()
    with writer(run_folder, later) as state:
        until(lambda: state_of(run_folder).start == 2 and state_of(run_folder).beat >= 3)
        assert not later.stop_requested()
    assert state.signal is None
    run_folder.write(STOP, b"[]")
    assert not stop_requested(run_folder, 1)


def test_an_earlier_start_that_still_runs_leaves_the_file_to_the_later(run_folder: Folder, quick: None) -> None:
    early, late = RunStatus(), RunStatus()
    with writer(run_folder, early):
        until(lambda: read_run_state(run_folder) is not None)
        with writer(run_folder, late):
            until(lambda: state_of(run_folder).start == 2)
            time.sleep(0.2)
            assert state_of(run_folder).start == 2
        assert state_of(run_folder).state == "stopped"
    assert state_of(run_folder).start == 2


def test_a_storage_that_fails_is_told_once_and_does_not_end_the_run(
    run_folder: Folder, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status = RunStatus()
    with writer(run_folder, status):
        until(lambda: read_run_state(run_folder) is not None)
        write_json, tried = Folder.write_json, []

        def fail(self: Folder, name: str, value: Any) -> None:
            tried.append(name)
            raise OSError("no such device")

        monkeypatch.setattr(Folder, "write_json", fail)
        until(lambda: len(tried) > 3)
        monkeypatch.setattr(Folder, "write_json", write_json)
        beat = state_of(run_folder).beat
        until(lambda: state_of(run_folder).beat > beat)
    assert capsys.readouterr().err.count("cannot be written or read, trying again: OSError: no such device") == 1


def test_no_step_waits_for_a_write(run_folder: Folder, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A storage that takes a second for each request: what a step calls returns at once."""

    def slow(self: Folder, name: str, value: Any) -> None:
        time.sleep(1)

    monkeypatch.setattr(Folder, "write_json", slow)
    status = RunStatus()
    with writer(run_folder, status):
        started = time.perf_counter()
        for step in range(1000):
            status.publish({**AT, "step": step})
            status.stop_requested()
        assert time.perf_counter() - started < 0.2


def test_states_that_cannot_be_read(run_folder: Folder, capsys: pytest.CaptureFixture) -> None:
    assert watch.main([str(run_folder)]) == 2
    assert "has no state.json: it is at step 0" in capsys.readouterr().err
    for damaged in (b"[]", b"{}", b'{"start": 1, "token": "x", "state": "no"}', b'{"start": "1", "token": "x"}'):
        run_folder.write(STATE, damaged)
        with pytest.raises(UserError, match=r"state\.json is not the state of a run"):
            read_run_state(run_folder)
    run_folder.write_json(STATE, {"start": 1, "token": "x", "of_a_later_version": 1})
    assert state_of(run_folder).start == 1
    with pytest.raises(UserError, match="not valid JSON"):
        run_folder.write(STATE, b"{")
        read_run_state(run_folder)


def test_waiting_for_a_change_outlives_a_fault(run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run_folder, every_s=0.04)
    before, read, calls = state_of(run_folder), Folder.read, iter(range(9))

    def faulty(self: Folder, name: str) -> bytes:
        if next(calls) == 0:
            raise OSError("gone")
        return read(self, name)

    monkeypatch.setattr(Folder, "read", faulty)
    write(run_folder, beat=8, every_s=0.04)
    assert wait_for_change(run_folder, before, 5.0).beat == 8
