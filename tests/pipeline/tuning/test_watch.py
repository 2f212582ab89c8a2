"""`raydml watch`: the records of a sweep that another process writes, shown as tables and as lines of what changed."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipeline import watch
from pipeline.errors import RunError, UserError
from pipeline.runs import following
from pipeline.runs.following import Tables, follow, span
from pipeline.storage import Folder
from pipeline.tuning.sweep_folder import (
    STATE,
    SWEEP,
    RunProgress,
    SweepFolder,
    TrialRecord,
    read_state,
    sweep_folder,
    sweep_names,
    write_state,
)
from pipeline.tuning.watch import Snapshot, SweepReader, last_line
from pipeline.tuning.watch_text import changes, sweep_view
from tests.pipeline.tuning.synthetic import final, make_sweep, search


class Sweep:
    """A sweep's folder, and what its command would write into it."""

    def __init__(self, storage: Folder) -> None:
        self.storage, self.folder = storage, sweep_folder(storage.uri, "made_up")
        sweep = make_sweep(budget={"trials": 6, "hours": 2.0}, final={"seeds": [0, 1]})
        self.folder.write(SWEEP, yaml.safe_dump(sweep.model_dump(mode="json")).encode())
        self.records = SweepFolder(self.folder)
        self.records.acquire()

    def write(self, *records: TrialRecord) -> None:
        for record in records:
            self.records.write(record)

    def log(self, run: str, *lines: dict[str, Any], text: str = "") -> None:
        data = "".join(json.dumps(line) + "\n" for line in lines) + text
        self.storage.write(f"runs/{run}/metrics.jsonl", data.encode())


def running(number: int, method: str, score: float | None = None, images: int = 0, **values: Any) -> TrialRecord:
    record = search(number, method, score, state="running", started_at=time.time() - 90, **values)
    record.runs[0].images = images
    if score is not None:
        record.runs[0].curve = [{"step": 5, "epoch": 1.0, "images": images, "done": 0.25, "map@r": score}]
    return record


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(Folder(tmp_path))


def as_lines(folder: Folder) -> list[str]:
    reader = SweepReader(folder)
    return list(sweep_view(reader).as_lines(reader.read()))


def shown(sweep: Sweep) -> dict[str, list[str]]:
    """The lines of --once by their first word."""
    return {line.split()[0]: line.split()[1:] for line in as_lines(sweep.folder) if line}


# ---- the tables ------------------------------------------------------------------------------------------------------


def test_the_tables(sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    sweep.write(
        search(0, "a", 31.0, lr=1e-3),
        search(1, "a", 35.5, lr=2e-3, state="stopped"),
        search(2, "b", 20.25, lr=0.00125, gpus=2.0, started_at=time.time() - 3700),
        search(3, "b", None, state="failed", error="out of memory"),
        running(4, "a", 12.5, 1234, retried=["its node was lost"]),
        final(5, "a", 0, [30.0]),
    )
    sweep.log(
        "made_up-00004-fold0-seed0",
        {"step": 7, "kind": "train", "epoch": 0.5, "loss": 0.12345, "lr/main": 1.0, "images_per_second": 210.0},
        text='{"step": 8, "ki',
    )
    write_state(sweep.folder, "running")
    assert watch.main([str(sweep.folder), "--once"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err
    assert lines[0].startswith("made_up: running, 6 trials: 1 running, 3 finished, 1 stopped, 1 failed; last record ")
    assert lines[1].startswith("spent: 5 min of trials, 0.04 GPU-hours, 1 h 1 min since the first; ")
    assert lines[1].endswith("; budget: 6 trials a method, 2 hours")
    rows = [line.split() for line in lines]
    assert ["a", "1", "1", "1", "0", "1", "of", "2", "31.00", "0", "lr=0.001"] in rows, (
        "a full trial before a stopped one"
    )
    assert ["b", "0", "1", "0", "1", "0", "of", "2", "20.25", "2", "lr=0.00125"] in rows
    assert ["4", "a", "25%", "1,234", "12.50", "step", "7:", "loss", "0.1235,", "images_per_second", "210"] in rows
    assert lines[-2:] == ["trial 3 (b) failed: out of memory", "trial 4 (a) is started again: its node was lost"]


def test_a_sweep_without_trials(sweep: Sweep) -> None:
    lines = as_lines(sweep.folder)
    assert lines[0] == "made_up: not started yet, 0 trials"
    assert lines[1] == "spent: 0 s of trials, 0.00 GPU-hours; budget: 6 trials a method, 2 hours"
    assert lines[4].split() == ["a", "0", "0", "0", "0", "0", "of", "2", "-", "-", "-"]


def test_many_rows_are_cut(sweep: Sweep) -> None:
    sweep.write(*(running(number, "a", retried=[f"reason {number}"]) for number in range(25)))
    lines = as_lines(sweep.folder)
    assert "... 5 more" in lines and "... 17 earlier ones" in lines and lines[-1].endswith("reason 24")
    assert sum(line.endswith(("-", "0%")) or " 0% " in line for line in lines) >= 20


def test_only_what_was_written_since_is_read(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(folder)
    sweep.write(search(0, "a", 1.0), search(1, "a", 2.0))
    reader = SweepReader(sweep.folder)
    assert [record.score for record in reader.read().records] == [1.0, 2.0]
    read: list[str] = []
    read_one = SweepFolder.read_one

    def counted(self: SweepFolder, name: str) -> TrialRecord:
        read.append(name)
        return read_one(self, name)

    monkeypatch.setattr(SweepFolder, "read_one", counted)
    sweep.write(search(1, "a", 3.0), search(2, "a", 4.0))  # the first in as many bytes as before
    found = reader.read()
    assert [record.score for record in found.records] == [1.0, 3.0, 4.0] and read == ["00001.json", "00002.json"]
    sweep.folder.remove("trials/00000.json")
    assert [record.number for record in reader.read().records] == [1, 2] and len(read) == 2
    assert found.newest is not None and abs(found.newest - time.time()) < 60


def test_span() -> None:
    assert [span(s) for s in (-1.0, 59.4, 60.0, 3599.0, 3600.0, 90061.0)] == [
        "0 s",
        "59 s",
        "1 min",
        "59 min",
        "1 h 0 min",
        "25 h 1 min",
    ]


# ---- the log of a run ------------------------------------------------------------------------------------------------


def test_the_last_complete_line(sweep: Sweep) -> None:
    run = sweep.storage / "runs" / "r"
    assert last_line(run) is None
    sweep.log("r")
    assert last_line(run) is None
    sweep.log("r", {"step": 1, "kind": "train"}, text='{"step": 2')
    assert last_line(run) == {"step": 1, "kind": "train"}
    lines = [{"step": step, "kind": "train", "loss": 1 / (step + 1)} for step in range(2000)]
    sweep.log("r", *lines)
    assert last_line(run) == lines[-1]
    sweep.log("r", text="{" + "x" * 9000 + "\n")
    assert last_line(run) is None, "longer than what is read"


# ---- signs of life ---------------------------------------------------------------------------------------------------


def test_the_state_of_a_sweep(sweep: Sweep) -> None:
    assert read_state(sweep.folder) is None
    write_state(sweep.folder, "stopped", "by SIGTERM")
    found = read_state(sweep.folder)
    assert found is not None and (found.state, found.message) == ("stopped", "by SIGTERM")
    assert abs(found.heartbeat - time.time()) < 5
    assert set(sweep.folder.read_json(STATE)) == {"state", "heartbeat", "message", "hours", "host", "pid"}
    for damaged in (b"{}", b"[]", b"", b'{"state": "no", "heartbeat": 1}', b'{"state": "failed", "heartbeat": "x"}'):
        sweep.folder.write(STATE, damaged)
        with pytest.raises(UserError, match=STATE):
            read_state(sweep.folder)


def test_an_old_sign_of_life_is_told(sweep: Sweep) -> None:
    for age, told in ((10, False), (500, True)):
        sweep.folder.write_json(STATE, {"state": "running", "heartbeat": time.time() - age, "message": ""})
        assert any(line.startswith(f"no sign of life for {age} s: ") for line in as_lines(sweep.folder)) == told
    sweep.folder.write_json(STATE, {"state": "finished", "heartbeat": time.time() - 500, "message": ""})
    assert "life" not in "\n".join(as_lines(sweep.folder))


def test_silence_is_of_the_watchers_own_clock_once_it_has_seen_a_sign_of_life(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other machine's clock is an hour behind, then an hour ahead."""
    now = [1000.0]
    monkeypatch.setattr("pipeline.tuning.watch.time.monotonic", lambda: now[0])
    for wrong in (-3600, 3600):
        reader = SweepReader(sweep.folder)
        sweep.folder.write_json(STATE, {"state": "running", "heartbeat": time.time() + wrong, "message": ""})
        reader.read()
        now[0] += 5
        sweep.folder.write_json(STATE, {"state": "running", "heartbeat": time.time() + wrong + 5, "message": ""})
        assert reader.read().silent_s == 0
        now[0] += 20
        assert reader.read().silent_s == 0
        now[0] += 20
        assert reader.read().silent_s == 40


# ---- what changed ----------------------------------------------------------------------------------------------------


def test_each_change_is_a_line(sweep: Sweep) -> None:
    reader = SweepReader(sweep.folder)

    def then(*records: TrialRecord) -> list[str]:
        before = reader.read()
        sweep.write(*(copy.deepcopy(record) for record in records))
        return list(changes(before, reader.read()))

    assert then() == []
    assert then(running(0, "a")) == ["trial 0 (a) is started: lr=0.001"]
    assert then(running(0, "a", 12.0, 600)) == [
        "trial 0 (a): map@r 12.00, 600 images, 25% done",
        "best of a: map@r 12.00, trial 0: lr=0.001",
    ]
    lost = running(0, "a", 12.0, 600, retried=["a node was lost"])
    assert then(lost) == ["trial 0 (a) is started again: a node was lost"]
    lost.state, lost.retried = "failed", ["a node was lost", "it was lost again"]
    lost.error = "lost 2 times"
    assert then(lost) == [
        "trial 0 (a) is started again: it was lost again",
        "trial 0 (a) failed: lost 2 times",
        "trial 0 (a) is failed, map@r 12.00, 600 images",
    ]
    assert then(search(1, "b", 40.0)) == [
        "trial 1 (b) is started: lr=0.001",
        "trial 1 (b) is finished, map@r 40.00, 1,000 images",
        "best of b: map@r 40.00, trial 1: lr=0.001",
    ]
    assert then(running(1, "b", 40.0, 1000)) == ["trial 1 (b) goes on, map@r 40.00, 1,000 images"]
    assert then(final(2, "b", 0, [30.0])) == [
        "trial 2 (b, final, seed 0) is started: lr=0.001",
        "trial 2 (b, final, seed 0) is finished, 2,000 images",
    ]
    before = reader.read()
    write_state(sweep.folder, "running")
    alive = reader.read()
    assert list(changes(before, alive)) == ["the sweep runs"]
    silent = dataclasses.replace(alive, since_change=100.0)
    assert [line[:27] for line in changes(alive, silent)] == ["no sign of life for 100 s: "]
    assert list(changes(silent, alive)) == ["the sweep gives signs of life again"]
    write_state(sweep.folder, "stopped", "by Ctrl-C")
    assert list(changes(alive, reader.read())) == ["the sweep was stopped; the same command continues it: by Ctrl-C"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "status", "says"), [("finished", 0, "the sweep is finished"), ("failed", 1, "some trials failed")]
)
def test_it_follows_a_sweep_to_its_end(
    sweep: Sweep, capsys: pytest.CaptureFixture, state: Any, status: int, says: str
) -> None:
    write_state(sweep.folder, "running")
    sweep.write(running(0, "a"))

    def go_on() -> None:
        time.sleep(0.3)
        sweep.write(running(0, "a", 12.0, 600))
        time.sleep(0.3)
        sweep.write(search(0, "a", 13.0))
        write_state(sweep.folder, state)

    thread = threading.Thread(target=go_on)
    thread.start()
    assert watch.main([str(sweep.folder), "--every", "0.05"]) == status
    thread.join()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err and lines[0].startswith("made_up: running, 1 trials: 1 running")
    assert "trial 0 (a): map@r 12.00, 600 images, 25% done" in lines
    assert "trial 0 (a) is finished, map@r 13.00, 1,000 images" in lines and says in lines[-1]
    assert watch.main([str(sweep.folder)]) == status, "a sweep that has ended is shown once"
    assert says in capsys.readouterr().out
    assert watch.main([str(sweep.folder), "--once"]) == 0


def test_a_storage_that_does_not_answer_is_waited_for(
    sweep: Sweep, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(sweep.folder, "running")
    reader = SweepReader(sweep.folder)
    first, read, calls = reader.read(), reader.read, iter(range(100))

    def faulty() -> Snapshot:
        call = next(calls)
        if call in (0, 1, 3):
            raise RunError("no answer") if call < 3 else OSError("gone")
        if call == 4:
            write_state(sweep.folder, "finished")
        return read()

    monkeypatch.setattr(reader, "read", faulty)
    assert follow(sweep_view(reader), first, 0.01).finished
    out = capsys.readouterr().out
    assert out.count("trying again: no answer") == 1 and out.count("trying again: OSError: gone") == 1


def test_a_terminal_gets_tables_that_are_drawn_again(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(sweep.folder, "running")
    sweep.write(running(0, "a", 12.0, 600), search(1, "b", 5.0, state="failed", error="[red] is no colour"))
    reader = SweepReader(sweep.folder)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=50, markup=False, emoji=False)
    monkeypatch.setattr(following, "Console", lambda **_: console)

    def end() -> None:
        time.sleep(0.2)
        sweep.write(search(0, "a", 13.0))
        write_state(sweep.folder, "finished")

    thread = threading.Thread(target=end)
    thread.start()
    assert follow(sweep_view(reader), reader.read(), 0.05).finished
    thread.join()
    text = out.getvalue()
    assert "running trials" in text and "[red] is no colour" in text and "600" in text
    last = text.rsplit("made_up: ", 1)[1]
    assert "the sweep is finished" in last and "running trials" not in last and "13.00" in last
    with Tables(sweep_view(reader), console, reader.read()) as tables:
        tables.tell("no answer")
    assert "no answer" in out.getvalue()


def test_bad_input_is_one_line(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDML_HOME", str(tmp_path))

    def refused(says: str, *arguments: str) -> None:
        assert watch.main([*arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1 and says in err

    refused("'no_such' is neither a folder of a run or a sweep, nor the name of one in", "no_such")
    refused("--every 0: expected more than 0 seconds", "made_up", "--every", "0")
    sweep.folder.write("trials/00000.json", b"{}")
    refused("trials/00000.json is not the record of a trial", "made_up")
    sweep.folder.remove("trials")
    sweep.folder.write(SWEEP, b"name: [")
    refused("sweep.yaml is not a sweep", "made_up")
    sweep.folder.write(SWEEP, b"name: x")
    refused("sweep.yaml is not a sweep (no budget, final, methods, metric): restore it", "made_up")
    assert sweep_names(Folder(tmp_path)) == ["made_up"]


def test_ctrl_c_ends_it(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", interrupt)
    before = sorted(os.walk(sweep.folder.path()))
    assert watch.main([str(sweep.folder)]) == 130
    assert sorted(os.walk(sweep.folder.path())) == before, "nothing is written"


def test_runs_one_after_another_share_the_length(sweep: Sweep) -> None:
    record = running(0, "a", 10.0, 100)
    record.runs[0].curve[-1]["done"], record.runs[0].state = 1.0, "finished"
    record.runs.append(RunProgress("made_up-00000-fold1-seed0", 1, 0))
    sweep.write(record)
    sweep.log("made_up-00000-fold1-seed0", {"step": 3, "kind": "validation", "map@r": 1.5, "epoch": 1.0})
    assert shown(sweep)["0"] == ["a", "50%", "100", "10.00", *["validation", "step", "3:", "map@r", "1.5"]]
