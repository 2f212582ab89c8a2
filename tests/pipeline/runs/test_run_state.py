"""A run watched and stopped by the files in its folder: `raydml watch`, `raydml stop`, and the thread that writes the state."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import stop, watch
from pipeline.distributed.run_status import RunStatus
from pipeline.errors import RunError, UserError
from pipeline.runs import following, run_state, watch_run
from pipeline.runs.following import follow
from pipeline.runs.run_folder import CONFIG
from pipeline.runs.run_state import (
    STATE,
    STOP,
    RunState,
    RunStateWriter,
    read_run_state,
    request_stop,
    stop_requested,
    wait_for_change,
)
from pipeline.runs.watch_run import RunReader, as_json, as_lines, run_view
from pipeline.storage import Folder
from pipeline.tuning.find import find_run_or_sweep
from pipeline.tuning.sweep_folder import SWEEP, SweepFolder, write_state

AT = {"phase": "training", "step": 50, "total": 200, "epoch": 0.5, "images": 600, "images_per_second": 20.0, "waiting": 0.125,
      "loss": 0.5}  # fmt: skip
POINT = {"step": 40, "epoch": 0.4, "images": 480, "recall@1": 70.0, "map@r": 31.25, "queries": 90}
WORKERS = [
    {"rank": 0, "node": "10.0.0.7", "pid": 12, "step": 50},
    {"rank": 1, "node": "10.0.0.8", "pid": 13, "step": 49},
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes ten times as often as the slowest test needs."""
    monkeypatch.setattr(run_state, "LOCAL_EVERY_S", 0.05)
    monkeypatch.setattr(stop, "POLL_S", 0.02)


@pytest.fixture
def run_folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "runs" / "photos")
    folder.write(CONFIG, b"name: photos\n")
    return folder


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


# ---- the thread that writes ------------------------------------------------------------------------------------------


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


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_what_is_shown(run_folder: Folder) -> None:
    write(run_folder, progress=AT | {"skipped_steps": 2.0})
    lines = list(as_lines(RunReader(run_folder).read()))
    assert lines[0] == "photos: running, training, step 50 of 200 (25%), epoch 0.50, 1 min of training left"
    assert lines[1:6] == [
        "speed: 20.0 images/s, 12.5% waiting for data, loss 0.5000",
        "best: map@r 31.25, recall@1 70.00, at step 40",
        "skipped: 2 steps whose loss or gradient was not finite",
        "where: rank 0 @ 10.0.0.7 (process 12, step 50), rank 1 @ 10.0.0.8 (process 13, step 49)",
        "command: process 5 on head; start 2 of the command, workers started 3 times in all",
    ]
    assert lines[6].startswith("not watched for long enough to say whether it lives; ") and lines[6].endswith(
        "clock of head"
    )
    assert [line.split() for line in lines[-2:]] == [
        ["step", "epoch", "images", "metrics"],
        ["40", "0.40", "480", "map@r", "31.25,", "recall@1", "70.00"],
    ]
    write(run_folder, progress={}, validations=[], best={}, workers=[])
    assert next(iter(as_lines(RunReader(run_folder).read()))) == "photos: running, starting workers"
    write(run_folder, state="failed", message="no space")
    last = list(watch_run.headlines(RunReader(run_folder).read()))[-1]
    assert last == "the run has failed; the same command continues it from its newest checkpoint: no space"


def test_life_is_told_by_the_counter_not_by_the_clocks(run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's clock is years behind: it lives while its counter grows, and is lost when that stands still."""
    now = [100.0]
    monkeypatch.setattr(watch_run.time, "monotonic", lambda: now[0])
    write(run_folder, beat=1)
    reader = RunReader(run_folder)
    assert reader.read().alive is None
    now[0] += 3
    write(run_folder, beat=2)
    seen = reader.read()
    assert seen.alive and not seen.lost and "alive: a sign of life every 2 s" in watch_run.liveness(seen)
    now[0] += 10
    seen = reader.read()
    assert seen.alive is False and not seen.lost and "no sign of life since 10 s" in watch_run.liveness(seen)
    now[0] += 30
    seen = reader.read()
    assert seen.lost and watch_run.liveness(seen).startswith("no sign of life for 40 s (the last is of ")
    write(run_folder, beat=1, token="b", start=3)
    assert reader.read().alive, "another start"


def test_once_waits_until_it_knows_whether_the_run_lives(
    run_folder: Folder, quick: None, capsys: pytest.CaptureFixture
) -> None:
    with writer(run_folder, RunStatus()):
        until(lambda: read_run_state(run_folder) is not None)
        assert watch.main([str(run_folder), "--once"]) == 0
        assert "\nalive: a sign of life every 0.05 s" in capsys.readouterr().out
        assert watch.main([str(run_folder), "--once", "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        assert (seen["kind"], seen["alive"], seen["state"], seen["name"]) == ("run", True, "running", "photos")
    write(run_folder, every_s=0.01)
    monotonic, started = watch_run.time.monotonic, time.monotonic()
    assert watch.main([str(run_folder), "--once"]) == 0
    assert monotonic() - started >= 2 and "\nno sign of life since 2 s" in capsys.readouterr().out


def test_each_change_of_a_run_is_a_line(run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watch_run.time, "monotonic", lambda: now[0])
    reader = RunReader(run_folder)
    view = run_view(reader)
    write(run_folder)
    last = reader.read()

    def then(seconds: float = 3, **values: Any) -> list[str]:
        nonlocal last
        before, now[0] = last, now[0] + seconds
        write(run_folder, **({"beat": state_of(run_folder).beat + 1} | values))
        last = reader.read()
        return list(view.changes(before, last))

    assert then() == []
    assert then(progress=AT | {"step": 51}) == [
        "training, step 51 of 200 (26%), epoch 0.50, 1 min of training left: 20.0 images/s, 12.5% waiting for data, loss 0.5000"
    ]
    assert then(progress=AT | {"step": 52}) == [], "a line of progress every 15 s"
    assert len(then(20, progress=AT | {"step": 60})) == 1
    better = POINT | {"step": 80, "map@r": 40.0}
    assert then(progress=AT | {"step": 60}, validations=[POINT, better], best=better) == [
        "validation at step 80: map@r 40.00, recall@1 70.00  * best so far"
    ]
    kept = {"progress": AT | {"step": 60}, "validations": [POINT, better], "best": better}
    assert then(**kept, group=4) == [
        "the workers were started again: rank 0 @ 10.0.0.7 (process 12, step 50), rank 1 @ 10.0.0.8 (process 13, step 49)"
    ]
    assert then(**kept, group=4, message="[rank 1 @ 10.0.0.8] hangs") == ["[rank 1 @ 10.0.0.8] hangs"]
    (lost,) = then(50, **kept, group=4, message="[rank 1 @ 10.0.0.8] hangs", beat=state_of(run_folder).beat)
    assert lost.startswith("no sign of life for 50 s")
    assert then(**kept, group=4, message="[rank 1 @ 10.0.0.8] hangs") == ["the run gives signs of life again"]
    kept["validations"] = []
    assert then(**kept, start=3, token="b") == ["start 3 of the command, process 5 on head"]
    assert then(**kept, start=3, token="b", state="finished") == ["the run is finished"]


@pytest.mark.parametrize(("state", "status"), [("finished", 0), ("failed", 1)])
@pytest.mark.parametrize("as_objects", [False, True])
def test_it_follows_a_run_to_its_end(
    run_folder: Folder, capsys: pytest.CaptureFixture, state: str, status: int, as_objects: bool
) -> None:
    write(run_folder)

    def go_on() -> None:
        time.sleep(0.2)
        write(run_folder, state=state, message="it broke" if state == "failed" else "", beat=8)

    thread = threading.Thread(target=go_on)
    thread.start()
    assert watch.main([str(run_folder), "--every", "0.05", *(["--json"] if as_objects else [])]) == status
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    if as_objects:
        states = [json.loads(line)["state"] for line in lines]
        assert states[0] == "running" and states[-1] == state
    else:
        assert lines[0].startswith("photos: running") and lines[-1].startswith("the run ")
    assert watch.main([str(run_folder)]) == status, "a run that has ended is shown once"


def test_a_terminal_gets_a_run_drawn_again(run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150, height=50, markup=False, emoji=False)
    monkeypatch.setattr(following, "Console", lambda **_: console)
    write(run_folder, message="[red] is no colour")
    reader = RunReader(run_folder)
    view, first, really, calls = run_view(reader), reader.read(), reader.read, iter(range(9))

    def read() -> Any:
        if next(calls) == 0:
            raise RunError("no answer")
        write(run_folder, state="stopped", beat=8)
        return really()

    view = dataclasses.replace(view, read=read)
    assert follow(view, first, 0.01).ended
    text = out.getvalue()
    assert "the run cannot be read, trying again: no answer" in text and "validations" in text
    assert "the run was stopped" in text.rsplit("photos: ", 1)[1]


# ---- names -----------------------------------------------------------------------------------------------------------


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


# ---- raydml stop -----------------------------------------------------------------------------------------------------


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


def test_json_of_a_run_is_json(run_folder: Folder) -> None:
    write(run_folder)
    found = json.loads(json.dumps(as_json(RunReader(run_folder).read())))
    assert (
        found["alive"] is None
        and found["lost"] is False
        and found["progress"] == AT
        and found["validations"] == [POINT]
    )
