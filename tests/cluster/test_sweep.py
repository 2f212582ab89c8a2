"""Sweeps through real Ray: to the answer, with processes killed, and with nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sweep import RAYS_OWN
from pipeline import stop, watch
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.inference.trained_model import load_run
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import read_changes, read_config
from pipeline.runs.run_state import read_run_state
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.training.launch import run_in_process
from pipeline.tuning.driver import SweepResult, run_sweep
from pipeline.tuning.sweep_folder import LEADERBOARD, SweepFolder, TrialRecord, sweep_folder
from pipeline.tuning.tensorboard import TENSORBOARD, run_name
from tests.cluster.test_ray import silent, tensors
from tests.pipeline.tuning.sweeps import tiny_sweep

pytestmark = pytest.mark.cluster
ONE = {"workers": 1, "cpus_per_worker": 1, "loader": "in_process"}
WHOLE: dict[str, Any] = {"searcher": {"name": "random"}, "scheduler": {"name": "none"}, "budget": {"trials": 2}}


def settings(length: str = "3 epochs", **runtime: Any) -> dict[str, Any]:
    return {"runtime": {**ONE, **runtime}, "length": length}


def left_behind(ray: Any, within_s: float = 10.0) -> list[str]:
    """What a sweep still holds after some seconds: CPUs, placement groups, actors."""
    deadline = time.monotonic() + within_s
    while True:
        groups = [g["state"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        actors = [a["ActorClassName"] for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
        actors = [name for name in actors if name not in RAYS_OWN]
        free, cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]
        left = [*groups, *actors, *([f"{free} of {cpus} CPUs are free"] if free != cpus else [])]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def figures(records: list[TrialRecord]) -> dict[int, Any]:
    """All that two equal sweeps have in common, by trial."""
    return {
        r.number: (r.stage, r.method, r.values, r.state, r.score, [(run.name, run.curve, run.test) for run in r.runs])
        for r in records
    }


def test_a_sweep_to_its_answer(ray_here: Any, store: Store, tmp_path: Path) -> None:
    short = settings("2 epochs") | {"tracking": ["tests.pipeline.trackers.own:Writes"]}
    sweep = tiny_sweep(tmp_path, store, settings=short, trials_at_once=2, **WHOLE)
    result = run_sweep(sweep)
    assert left_behind(ray_here) == []
    records = result.records
    assert [r.stage for r in records].count("search") == 4 and [r.stage for r in records].count("final") == 4
    assert {r.state for r in records} == {"finished"} and not result.failed and result.signal is None
    searched = [r for r in records if r.stage == "search"]
    assert all(r.score == r.runs[0].best["map@r"] and not r.runs[0].test for r in searched), (
        "test classes are not touched"
    )
    assert all(r.runs[0].fold is None and r.runs[0].test["queries"] > 0 for r in records if r.stage == "final")
    folder = sweep_folder(sweep.storage, sweep.name)
    assert all(folder.exists(name) for name in (LEADERBOARD, "ensembles.json"))
    assert folder.names(TENSORBOARD) == sorted(map(run_name, records))
    assert not [name for name in (folder / "tune").find() if name.endswith(".safetensors")], "no run is copied"
    assert {row.method for row in result.answer.rows} == {"triplet", "contrastive"}

    for record in records:
        run = Folder(tmp_path / "runs" / record.runs[0].name)
        calls = [json.loads(line) for line in run.read("tracked.jsonl").splitlines()]
        assert calls[0] == ["start", sweep.name, None] and calls[-1][:2] == ["finish", "finished"]
        assert [call[1] for call in calls[1:-1]] == [line["step"] for line in read_metrics(run)]
    run = Folder(tmp_path / "runs" / searched[0].runs[0].name)
    config = read_config(run)
    alone = config.model_copy(update={"storage": str(tmp_path / "alone")})
    run_in_process(alone, store.folder.uri, silent)
    assert tensors(alone).keys() == tensors(config).keys()
    assert all((tensors(alone)[name] == value).all() for name, value in tensors(config).items()), "an ordinary run"
    assert load_run(str(run)).step > 0

    again = run_sweep(sweep)
    assert figures(again.records) == figures(records) and [r.starts for r in again.records] == [
        r.starts for r in records
    ]
    grown = run_sweep(
        tiny_sweep(tmp_path, store, settings=short, trials_at_once=2, **{**WHOLE, "budget": {"trials": 3}})
    )
    assert [r.stage for r in grown.records].count("search") == 6
    assert {n: f for n, f in figures(grown.records).items() if n < 8} == figures(records)
    with pytest.raises(UserError, match="belongs to a sweep of other settings"):
        run_sweep(tiny_sweep(tmp_path, store, settings=short, **{**WHOLE, "metric": "r_precision"}))


@pytest.mark.slow
def test_stopped_trials_leave_their_workers_groups_with_one_cpu_too_few(
    ray_here: Any, store: Store, tmp_path: Path
) -> None:
    """Two trials of two workers want 8 of the 6 CPUs: each that has ended or is stopped has to make room for the next."""
    sweep = tiny_sweep(
        tmp_path, store, settings=settings(workers=2, cpus_per_worker=2), trials_at_once=2, final=None,
        scheduler={"name": "asha", "grace": 0.3}, budget={"trials": 3},
        space={"method.optimizer.lr": {"log_uniform": [1e-9, 1e-2]}},
        methods={"triplet": {"recipe": str(tmp_path / "tiny.yaml"), "points": points(3e-3, 1e-8, 1e-9)}},
    )  # fmt: skip
    result = run_sweep(sweep)
    assert left_behind(ray_here) == []
    states = [record.state for record in result.records]
    assert len(states) == 3 and set(states) == {"finished", "stopped"}


def points(*rates: float) -> list[dict[str, float]]:
    return [{"method.optimizer.lr": rate} for rate in rates]


@pytest.mark.slow
def test_a_stopped_trial_is_lengthened(ray_here: Any, store: Store, tmp_path: Path) -> None:
    sweep = tiny_sweep(
        tmp_path, store, settings=settings(), trials_at_once=1, final=None, scheduler={"name": "asha", "grace": 0.3},
        budget={"trials": 2}, space={"method.optimizer.lr": {"log_uniform": [1e-9, 1e-2]}},
        methods={"triplet": {"recipe": str(tmp_path / "tiny.yaml"), "points": points(3e-3, 1e-9)}},
    )  # fmt: skip
    first = run_sweep(sweep).records
    assert [record.state for record in first] == ["finished", "stopped"]
    assert 0 < first[1].runs[0].curve[-1]["done"] < 1
    whole = run_sweep(sweep, again=[1]).records
    assert whole[1].state == "finished" and whole[1].starts == 2 and whole[1].runs[0].curve[-1]["done"] == 1
    with pytest.raises(UserError, match="is finished, expected one that was stopped early"):
        run_sweep(sweep, again=[1])


@pytest.mark.slow
def test_a_killed_trial_goes_on_from_its_checkpoint(ray_here: Any, store: Store, tmp_path: Path) -> None:
    results: list[SweepResult] = []
    killed: list[int] = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        sweep = tiny_sweep(tmp_path / name, store, settings=settings("6 epochs"), final=None, trials_at_once=1, **WHOLE)
        if name == "killed":
            folder = SweepFolder(sweep_folder(sweep.storage, sweep.name))
            threading.Thread(target=kill_when_it_trains, args=(folder, 1, killed), daemon=True).start()
        results.append(run_sweep(sweep))
    assert killed
    assert figures(results[0].records) == figures(results[1].records)
    assert [len(record.retried) for record in results[1].records] == [0, 1, 0, 0]
    assert left_behind(ray_here) == []


@pytest.mark.slow
def test_a_sweep_is_asked_to_stop_and_its_runs_are_watched(
    ray_here: Any, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sweep = tiny_sweep(tmp_path, store, settings=settings("900 epochs"), final=None, trials_at_once=1, **WHOLE)
    folder = sweep_folder(sweep.storage, sweep.name)
    statuses: list[int] = []

    def ask() -> None:
        while not (names := [name for name in (Folder(sweep.root) / "runs").names()]):
            time.sleep(0.1)
        run = Folder(sweep.root) / "runs" / names[0]
        while (state := read_run_state(run)) is None or not state.validations:
            time.sleep(0.1)
        statuses.append(watch.main([str(run), "--once"]))
        statuses.append(stop.main([str(folder), "--timeout", "120"]))

    thread = threading.Thread(target=ask)
    thread.start()
    result = run_sweep(sweep)
    thread.join()
    out = capsys.readouterr().out
    assert statuses == [0, 0] and result.signal == signal.SIGTERM
    assert "alive: a sign of life every 2 s" in out and "map@r" in out and "is stopped" in out
    assert result.records[0].state == "running" and left_behind(ray_here) == []
    run = Folder(sweep.root) / "runs" / result.records[0].runs[0].name
    latest, state = Checkpoints(run).latest(), read_run_state(run)
    assert latest is not None and not latest.finished and state is not None and state.state == "stopped"


def kill_when_it_trains(folder: SweepFolder, number: int, killed: list[int]) -> None:
    """SIGKILL of a trial's process once it has validated."""
    while not killed:
        time.sleep(0.02)
        for record in folder.read():
            if record.number == number and record.pid and record.runs[0].curve:
                os.kill(record.pid, signal.SIGKILL)
                killed.append(record.pid)


def test_a_population_copies_weights_and_settings_of_better_trials(ray_here: Any, store: Store, tmp_path: Path) -> None:
    """A rate of 1e-9 learns nothing: that trial copies the other, and then follows its curve with a setting of its own."""
    sweep = tiny_sweep(
        tmp_path, store, settings=settings("8 epochs"), final=None, trials_at_once=2, searcher={"name": "random"},
        scheduler={"name": "pbt", "interval": 0.25, "quantile": 0.5}, budget={"trials": 2},
        space={"method.optimizer.lr": {"log_uniform": [1e-9, 1e-2]}},
        methods={"triplet": {"recipe": str(tmp_path / "tiny.yaml"), "points": points(1e-9, 3e-3)}},
    )  # fmt: skip
    result = run_sweep(sweep)
    assert left_behind(ray_here) == []
    assert [record.state for record in result.records] == ["finished", "finished"]
    copies = [(record, change) for record in result.records for change in record.history]
    assert copies, "nobody copied"
    for record, change in copies:
        assert change["copied_from"] == 1 - record.number
        run = Folder(tmp_path / "runs" / record.runs[0].name)
        line = read_changes(run)[-1]
        assert line["copied_from_trial"] == 1 - record.number and line["changes"][0].startswith("method.optimizer.lr:")
        assert read_config(run).method.optimizer.lr == pytest.approx(record.values["method.optimizer.lr"])
        assert run.read_json("summary.json")["reproducible"] is False
    first = copies[0][0]
    original = float(sweep.methods["triplet"].points[first.number]["method.optimizer.lr"])
    assert first.values["method.optimizer.lr"] != pytest.approx(original)
