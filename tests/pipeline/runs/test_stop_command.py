"""`raydml stop`: runs and sweeps found by name, asked to end, and waited for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline import stop
from pipeline.distributed.run_status import RunStatus
from pipeline.errors import UserError
from pipeline.runs.run_folder import CONFIG
from pipeline.runs.run_state import (
    STOP,
    read_run_state,
    stop_requested,
)
from pipeline.storage import Folder
from pipeline.tuning.find import find_run_or_sweep
from pipeline.tuning.sweep_folder import SWEEP, SweepFolder, write_state
from tests.pipeline.runs.states import AT, until, write, writer


def test_a_run_or_a_sweep_by_name_folder_or_uri(folder: Folder) -> None:
    run, sweep = folder / "runs" / "a", folder / "sweeps" / "b"
    run.write(CONFIG, b"name: a\n")
    sweep.write(SWEEP, b"name: b\n")
    for name, kind, place in (("a", "run", run), ("b", "sweep", sweep)):
        for given, storage in ((name, folder.uri), (place.uri, "")):
            found, where = find_run_or_sweep(given, storage)
            assert (found, where.uri) == (kind, place.uri)
    with pytest.raises(UserError, match=r"nor the name of one in .*/runs or .*/sweeps: expected one of a, b$"):
        find_run_or_sweep("photos", folder.uri)
    (folder / "sweeps" / "a").write(SWEEP, b"name: a\n")
    with pytest.raises(
        UserError, match=r"'a' is a run and a sweep: give the folder of one of them, .*/runs/a or .*/sweeps/a$"
    ):
        find_run_or_sweep("a", folder.uri)


def test_stop_asks_waits_and_says_what_happened(run_folder: Folder, quick: None, capsys: pytest.CaptureFixture) -> None:
    status, ready = RunStatus(), threading.Event()

    def run() -> None:
        with writer(run_folder, status):
            status.publish(AT)
            ready.set()
            until(status.stop_requested)

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    until(lambda: (s := read_run_state(run_folder)) is not None and s.progress)
    assert stop.main([str(run_folder)]) == 0
    thread.join()
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(" to save and to end")
    assert (
        out[1].endswith("of training left; the same command continues it") and " is stopped at step 50 of 200" in out[1]
    )
    assert stop.main([str(run_folder)]) == 2
    assert " does not run: it is stopped at step 50" in capsys.readouterr().err


def test_stop_tells_a_run_that_does_not_end_one_that_is_lost_and_one_that_began_again(
    run_folder: Folder, quick: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run_folder)
    assert stop.main([str(run_folder), "--timeout", "0"]) == 0
    assert run_folder.read_json(STOP)["start"] == 2 and run_folder.read_json(STOP)["token"] == "a"
    assert stop.main([str(run_folder), "--timeout", "0.1"]) == 1
    assert "has not ended within 0.1 s; the request stands, and it is at step 50" in capsys.readouterr().err
    monkeypatch.setattr(stop, "SILENT_S", 0.1)
    assert stop.main([str(run_folder)]) == 1
    assert "gives no sign of life for 0.1 s: it was killed, or hangs" in capsys.readouterr().err
    threading.Timer(0.05, lambda: write(run_folder, start=3, token="b")).start()
    assert stop.main([str(run_folder)]) == 1
    assert "another start of the run" in capsys.readouterr().err
    threading.Timer(0.05, lambda: write(run_folder, start=3, token="b", state="failed", message="no space")).start()
    assert stop.main([str(run_folder)]) == 1
    assert "is failed at step 50 of 200 (25%)" in capsys.readouterr().out


def test_stop_of_a_sweep_names_its_start(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture) -> None:
    folder = Folder(tmp_path / "sweeps" / "s")
    folder.write(SWEEP, b"name: s\n")
    assert stop.main([str(folder)]) == 2
    assert "has not been started yet" in capsys.readouterr().err
    records = SweepFolder(folder)
    records.acquire()
    records.acquire()
    write_state(folder, "running")
    threading.Timer(0.1, lambda: write_state(folder, "stopped", "2 running")).start()
    assert stop.main([str(folder)]) == 0
    assert stop_requested(folder, 2) and not stop_requested(folder, 1) and not stop_requested(folder, 3)
    assert "is stopped: 2 running; the same command continues it" in capsys.readouterr().out
