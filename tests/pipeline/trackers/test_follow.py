"""A run's log followed by trackers: each line once, whatever is killed or fails, and never in training's way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import train
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.errors import RunError
from pipeline.runs.run_folder import METRICS, SUMMARY, TRACKING, run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values
from pipeline.trackers import follow
from pipeline.trackers.follow import LogReader, RunTracking, lacking, numbers, read_tracking
from tests.pipeline.trackers import own

OWN = "tests.pipeline.trackers.own"
Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(follow, "LOCAL_EVERY_S", 0.02)
    monkeypatch.setattr(follow, "REMOTE_EVERY_S", 0.02)
    monkeypatch.setattr(follow, "AGAIN_S", 0.0)
    yield
    own.seen.clear()
    own.Fails.failures = 0


def lines(*steps: int, kind: str = "train") -> bytes:
    return "".join(json.dumps({"step": s, "kind": kind, "loss": 1.0 / s}) + "\n" for s in steps).encode()


def logged(name: str = "tiny") -> list[tuple[int, dict[str, float]]]:
    return [(call[1], call[2]) for call in own.seen.get(name, []) if call[0] == "log"]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def add(run: Folder, data: bytes) -> None:
    run.write(METRICS, (run.read(METRICS) if run.exists(METRICS) else b"") + data)


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_is_read_line_by_line_also_where_it_was_cut(folder: Folder) -> None:
    reader = LogReader(folder)
    assert reader.new_lines() == []
    folder.write(METRICS, lines(1, 2) + b'{"step": 3, "ki')
    assert [line["step"] for line in reader.new_lines()] == [1, 2]
    folder.write(METRICS, lines(1, 2, 3))
    assert [line["step"] for line in reader.new_lines()] == [3] and reader.new_lines() == []
    folder.write(METRICS, lines(1))
    assert [line["step"] for line in reader.new_lines()] == [1]
    folder.write(METRICS, b"x" * (len(lines(1)) + 5) + b"\n")
    assert reader.new_lines() == [], "cut and grown in the meantime"
    folder.write(METRICS, lines(1, 2))
    assert [line["step"] for line in reader.new_lines()] == [1, 2]


def test_what_is_sent_is_numbers() -> None:
    line = {"step": 3, "kind": "test", "map@r": 31.5, "loss": float("nan"), "note": "x", "epoch": 1}
    assert numbers(line) == {"test/map@r": 31.5, "test/epoch": 1}


# ---- whole runs ------------------------------------------------------------------------------------------------------


def write_recipe(tmp_path: Path, store: Store, **changes: Any) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_values(str(tmp_path), store.folder.uri, {"length": "2 epochs", **changes})))
    return str(path)


def test_a_run_is_followed_to_its_report_and_computes_the_same(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, store, tracking=[{"name": f"{OWN}:Remembers", "args": {"label": "mine"}}])
    assert train.main([recipe]) == 0
    run = Folder(tmp_path / "runs" / "tiny")
    kinds, told = [call[0] for call in own.seen["tiny"]], own.seen["tiny"][0][1]
    assert kinds[0] == "start" and kinds[-1] == "finish" and set(kinds[1:-1]) == {"log"}
    assert (told.name, told.folder, told.local, told.id, told.group) == ("tiny", run.uri, run.path(), None, None)
    assert told.config["method.optimizer.lr"] == 3e-3 and told.config["length"] == "2 epochs"
    assert logged() == [(line["step"], numbers(line)) for line in read_metrics(run)]
    _, state, figures, report = own.seen["tiny"][-1]
    final = run.read_json(SUMMARY)["final"]
    assert state == "finished" and figures == {n: v for n, v in final.items() if not n.startswith("queries")}
    assert Path(report).read_text().endswith("</html>\n") or "</html>" in Path(report).read_text()
    kept = read_tracking(run)[f"{OWN}:Remembers"]
    assert (
        kept["id"] == "mine-tiny" and "problem" not in kept and kept["sent"]["test"] == run.read_json(SUMMARY)["step"]
    )
    assert f"tracking: {OWN}:Remembers https://example.org/tiny\n" in capsys.readouterr().out
    before = {name: run.read(name) for name in run.find() if name.endswith(".safetensors")}
    assert train.main([write_recipe(tmp_path, store, name="untracked")]) == 0
    other = Folder(tmp_path / "runs" / "untracked")
    assert before and before == {name: other.read(name) for name in other.find() if name.endswith(".safetensors")}
    assert not other.exists(TRACKING)


def test_a_longer_run_goes_on_with_the_same_id(store: Store, tmp_path: Path) -> None:
    tracking = {"tracking": f"{OWN}:Remembers"}
    assert train.main([write_recipe(tmp_path, store, length="1 epochs", **tracking)]) == 0
    first = logged()
    assert train.main([write_recipe(tmp_path, store, **tracking)]) == 0
    starts = [call[1] for call in own.seen["tiny"] if call[0] == "start"]
    assert [run.id for run in starts] == [None, "own-tiny"]
    assert logged()[: len(first)] == first
    steps = [(step, name) for step, values in logged() for name in values]
    assert len(steps) == len(set(steps)), "no line twice"
    assert len({step for step, _ in steps}) > len({step for step, _ in first})


def test_a_tracker_that_is_added_later_gets_the_earlier_lines(store: Store, tmp_path: Path) -> None:
    assert train.main([write_recipe(tmp_path, store, length="1 epochs")]) == 0
    assert train.main([write_recipe(tmp_path, store, tracking=f"{OWN}:Remembers")]) == 0
    assert logged() == [(line["step"], numbers(line)) for line in read_metrics(Folder(tmp_path / "runs" / "tiny"))]


@pytest.mark.parametrize("tracker", ["Fails", "StartsNever"])
def test_a_tracker_that_fails_ends_nothing_and_is_told_once(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], tracker: str
) -> None:
    own.Fails.failures = 10**6
    name = f"{OWN}:{tracker}"
    recipe = write_recipe(tmp_path, store, tracking=[f"{OWN}:Remembers", name])
    assert train.main([recipe]) == 0
    run, told = Folder(tmp_path / "runs" / "tiny"), capsys.readouterr()
    assert told.err.count(f"warning: tracking by {name} failed (") == 1 and "is not tracked" not in told.err
    assert f"tracking: {name}" in told.out and "the same command sends what is missing\n" in told.out
    assert lacking(run) == [name]
    assert run.read_json(SUMMARY)["final"] and logged()
    assert [call[0] for call in own.seen["tiny"]].count("finish") == 1, "of the one that works"
    if tracker == "Fails":
        own.seen.clear()
        own.Fails.failures = 0
        assert train.main([recipe]) == 0
        assert lacking(run) == [] and "failed" not in capsys.readouterr().out
        assert logged() == [(line["step"], numbers(line)) for line in read_metrics(run)]
        assert own.seen["tiny"][-1][1] == "finished"


# ---- moments ---------------------------------------------------------------------------------------------------------


def test_workers_that_start_again_send_no_line_twice_and_an_outage_loses_none(make_config: Make) -> None:
    config = make_config({"tracking": f"{OWN}:Fails"})
    run = run_folder(config)
    with RunTracking(config):
        add(run, lines(1, 2, 3))
        until(lambda: len(logged()) == 3)
        own.Fails.failures = 3
        add(run, lines(4, 5))
        until(lambda: len(logged()) == 5)
        run.write(METRICS, lines(1, 2))
        time.sleep(0.1)
        add(run, lines(3, 4, 5, 6) + lines(6, kind="validation"))
    assert [step for step, _ in logged()] == [1, 2, 3, 4, 5, 6, 6]
    assert own.seen["tiny"][-1][1] == "stopped"


def test_the_state_at_the_end(make_config: Make) -> None:
    config = make_config({"tracking": f"{OWN}:Remembers"})
    with pytest.raises(RunError), RunTracking(config):
        raise RunError("no")
    assert own.seen["tiny"][-1][1:] == ("failed", {}, None)


def test_a_tracker_that_hangs_is_left(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "FINISH_S", 0.1)
    go_on = threading.Event()
    monkeypatch.setattr(own.Remembers, "finish", lambda *_: go_on.wait(20))
    started = time.monotonic()
    with RunTracking(make_config({"tracking": f"{OWN}:Remembers"})):
        pass
    assert time.monotonic() - started < 10
    assert "tracking has not ended within 0.1 s" in capsys.readouterr().err
    go_on.set()
