"""A second start of a run, or of a sweep, that still runs is refused; one whose process is gone, or silent, is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import train, tune
from pipeline.data.store import Store
from pipeline.distributed.run_status import RunStatus
from pipeline.errors import UserError
from pipeline.runs import run_state
from pipeline.runs.run_state import STATE, RunStateWriter, check_not_running, is_gone
from pipeline.storage import Folder
from pipeline.training import start
from pipeline.tuning import driver, sweep_folder
from pipeline.tuning.sweep_folder import write_state
from tests.pipeline.tuning.sweeps import tiny_sweep


@pytest.fixture
def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_that_runs_is_refused_and_one_that_has_ended_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "LOCAL_EVERY_S", 0.1)
    run, status = Folder(tmp_path), RunStatus()
    check_not_running(run)
    with RunStateWriter(run, status.summary, status.stop, "map@r", lambda: True):
        while not run.exists(STATE):
            pass
        with pytest.raises(
            UserError, match=rf"is running \(on {socket.gethostname()}, process {os.getpid()}, step 0\).*raydml stop"
        ):
            check_not_running(run)
    check_not_running(run)


@pytest.mark.parametrize("host", ["this one", "another"])
def test_a_run_that_was_killed_is_not_refused(
    host: str, tmp_path: Path, ended_process: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path)
    here = socket.gethostname() if host == "this one" else "10.9.9.9"
    run.write_json(STATE, {"start": 1, "token": "a", "beat": 3, "every_s": 0.1, "host": here, "pid": ended_process})
    check_not_running(run)
    assert ("looking up to 0.25 s" in capsys.readouterr().err) == (host == "another")


def test_whether_a_process_of_this_machine_is_gone(ended_process: int) -> None:
    assert is_gone(socket.gethostname(), ended_process)
    assert not is_gone(socket.gethostname(), os.getpid()) and not is_gone("10.9.9.9", ended_process)


def test_a_sweep_that_runs_is_refused_and_a_silent_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_folder, "SILENCE_S", 0.3)
    folder = Folder(tmp_path)
    sweep_folder.check_not_running(folder)
    write_state(folder, "running")
    sweep_folder.check_not_running(folder)  # no further sign of life
    monkeypatch.setattr(run_state.time, "sleep", lambda _: write_state(folder, "running"))
    with pytest.raises(
        UserError, match=rf"is running \(on {socket.gethostname()}, process {os.getpid()}\).*raydml stop"
    ):
        sweep_folder.check_not_running(folder)
    write_state(folder, "finished")
    sweep_folder.check_not_running(folder)


def test_both_commands_look_before_they_start(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(folder: Folder) -> None:
        raise UserError(f"{folder} is running")

    monkeypatch.setattr(start, "check_not_running", runs)
    monkeypatch.setattr(driver, "check_not_running", runs)
    sweep = tiny_sweep(tmp_path, store)
    assert train.main([str(tmp_path / "tiny.yaml")]) == 2 and tune.main([str(tmp_path / "small.yaml")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.endswith("is running") for line in errors] == [True, True]
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists() and sweep.name in errors[1]
