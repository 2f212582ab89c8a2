"""A run watched by the files in its folder: `raydml watch`."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from typing import Any

import pytest

from pipeline import watch
from pipeline.distributed.run_status import RunStatus
from pipeline.errors import RunError
from pipeline.runs import following, watch_run
from pipeline.runs.following import follow
from pipeline.runs.run_state import (
    read_run_state,
)
from pipeline.runs.watch_run import RunReader, as_json, run_view
from pipeline.storage import Folder
from tests.pipeline.runs.states import AT, POINT, state_of, until, write, writer


def as_lines(folder: Folder) -> list[str]:
    reader = RunReader(folder)
    return list(run_view(reader).as_lines(reader.read()))


def test_what_is_shown(run_folder: Folder) -> None:
    write(run_folder, progress=AT | {"skipped_steps": 2.0})
    lines = as_lines(run_folder)
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
    assert as_lines(run_folder)[0] == "photos: running, starting workers"
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


def test_json_of_a_run_is_json(run_folder: Folder) -> None:
    write(run_folder)
    found = json.loads(json.dumps(as_json(RunReader(run_folder).read())))
    assert (
        found["alive"] is None
        and found["lost"] is False
        and found["progress"] == AT
        and found["validations"] == [POINT]
    )
