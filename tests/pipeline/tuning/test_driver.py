"""What is told and removed before a sweep starts Ray."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.data.store import Store
from pipeline.errors import RunError, UserError
from pipeline.storage import Folder
from pipeline.tune import main
from pipeline.tuning import driver
from pipeline.tuning.driver import check_again, remove_sweep, run_sweep, trial_runs, with_place
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import dump_sweep
from pipeline.tuning.sweep_folder import (
    SWEEP,
    RunProgress,
    SweepFolder,
    TrialRecord,
    read_state,
    sweep_folder,
    write_state,
)
from tests.pipeline.tuning.sweeps import tiny_sweep


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(cpus: int) -> None:
        raise AssertionError("Ray is started")

    monkeypatch.setattr(driver, "ray_session", started)


def test_runs_of_a_sweep_whose_folder_is_gone(store: Store, tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, store)
    for name in ("small-00003-fold0-seed0", "small-other", "small-00000-all-seed1", "x-small-00000-all-seed1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    assert trial_runs(sweep) == ["small-00000-all-seed1", "small-00003-fold0-seed0"]
    with pytest.raises(UserError, match=r"small-00000-all-seed1 and 1 more.: remove them with --fresh"):
        run_sweep(sweep)
    remove_sweep(sweep, sweep_folder(sweep.storage, sweep.name))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["small-other", "x-small-00000-all-seed1"]
    with pytest.raises(AssertionError, match="Ray is started"):
        run_sweep(sweep)


def test_trials_that_can_be_lengthened() -> None:
    records = [TrialRecord(0, "search", "a", {}, state="stopped"), TrialRecord(1, "search", "a", {}, state="finished")]
    check_again(records, [0])
    with pytest.raises(UserError, match="trial 1 is finished, expected one that was stopped early: 0"):
        check_again(records, [1])
    with pytest.raises(UserError, match="trial 7 does not exist, expected one that was stopped early: there is none"):
        check_again(records[1:], [7])


def test_a_relative_storage_on_a_cluster(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tiny_sweep(tmp_path, store).model_copy(update={"storage": "somewhere"})
    assert Path(with_place(sweep).storage).is_absolute()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match="'somewhere' is a relative path"):
        with_place(sweep)


def test_a_later_start_owns_the_records(tmp_path: Path) -> None:
    first, second = SweepFolder(Folder(tmp_path)), SweepFolder(Folder(tmp_path))
    first.acquire()
    record = TrialRecord(3, "search", "a", {"x": 1.5}, history=[{"images": 1}])
    first.write(record)
    assert first.read() == [record]
    second.acquire()
    with pytest.raises(RunError, match=re.escape("another process (start 2) now runs the sweep")):
        first.write(record)
    second.write(record)
    (tmp_path / "trials" / "00003.json").write_text('{"number": 3}')
    with pytest.raises(UserError, match="is not the record of a trial"):
        second.read()


def test_the_command_tells_bad_input_in_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_sweep(tmp_path, store)
    path = str(tmp_path / "small.yaml")
    for arguments, said in (
        (["nothing.yaml"], "error: sweep 'nothing.yaml' is neither a file nor shipped with the program"),
        (
            [path, "--set", "settings.method.optimizer.lrr=1"],
            "error: methods.triplet: unknown key 'method.optimizer.lrr'",
        ),
        ([path, "--lengthen", "5"], "error: trial 5 does not exist"),
    ):
        assert main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and lines[0].startswith(said), lines
    assert main([path, "--dry-run"]) == 0
    assert "triplet" in capsys.readouterr().out


def test_fresh_removes_the_sweep_and_its_runs_first(store: Store, tmp_path: Path) -> None:
    sweep = tiny_sweep(tmp_path, store)
    folder = sweep_folder(sweep.storage, sweep.name)
    write_sweep_with_one_trial(sweep, folder)
    run = tmp_path / "runs" / "small-00000-fold0-seed0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(AssertionError, match="Ray is started"):
        main([str(tmp_path / "small.yaml"), "--fresh"])
    assert not run.exists() and SweepFolder(folder).read() == []


def test_the_hours_of_earlier_starts_count(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(tmp_path, store, "final=null", "budget={hours: 2}")
    folder = sweep_folder(sweep.storage, sweep.name)
    write_sweep_with_one_trial(sweep, folder)
    write_state(folder, "stopped", hours=1.5)
    command = [str(tmp_path / "small.yaml"), "--set", "final=null", "--set"]
    with pytest.raises(AssertionError, match="Ray is started"):
        main([*command, "budget={hours: 2}"])
    assert main([*command, "budget={hours: 1.4}"]) == 0
    assert "triplet" in capsys.readouterr().out
    state = read_state(folder)
    assert state is not None and state.state == "finished" and state.hours == 1.5


def write_sweep_with_one_trial(sweep: SweepConfig, folder: Folder) -> None:
    folder.write(SWEEP, dump_sweep(sweep).encode())
    records = SweepFolder(folder)
    records.acquire()
    values = {"method.optimizer.lr": 1e-3, "method.loss_args.margin": 0.1}
    run = RunProgress("small-00000-fold0-seed0", 0, 0, "finished", best={"map@r": 40.0}, last={"map@r": 40.0})
    records.write(TrialRecord(0, "search", "triplet", values, state="finished", runs=[run], score=40.0))
