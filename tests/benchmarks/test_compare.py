"""The comparison of the methods: its sweep file, its records kept beside the program, and the program."""

from __future__ import annotations

import copy
import functools
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from benchmarks import compare, compare_seeds
from benchmarks.compare_results import BASES, Results
from pipeline.errors import UserError
from pipeline.tuning.checks import check_sweep
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.sweep_file import check_same_sweep
from pipeline.tuning.sweep_folder import SweepFolder
from tests.benchmarks.comparisons import load


def test_every_row_trains_on_as_many_images_of_the_same_pixels(tmp_path: Path) -> None:
    for name in compare.SETS:
        sweep = load(tmp_path, name)
        assert set(sweep.methods) == {n for row, base in BASES.items() for n in (row, base) if n}
        images, seen = set(), set()
        for row, entry in sweep.methods.items():
            (run,) = run_configs(sweep, row, entry.points[0], 0, "final", length="300 steps", seed=0)
            method, base = run.method, BASES.get(row)
            batch = getattr(method, "triplets_per_batch", 0) * 3 or method.classes_per_batch * method.samples_per_class
            images.add((batch + getattr(method, "meta", False) * getattr(method, "meta_classes", 0)) * run.length.value)
            seen.add(f"{run.model.backbone} {run.data} {method.embedding_dim} {run.runtime}")
            if base is not None:  # the same but for what the method adds, and what is tuned is the same too
                (of_base,) = run_configs(
                    sweep, base, sweep.methods[base].points[0], 0, "final", length="300 steps", seed=0
                )
                assert of_base.method.optimizer == method.optimizer and of_base.model == run.model
                assert sweep.methods[base].space == entry.space and sweep.methods[base].points == entry.points
                differing = {k for k, v in method.model_dump().items() if v != of_base.method.model_dump()[k]}
                switches = {"osm", "caa", "graph", "generate", "mined_share", "meta"}
                assert differing & switches and differing <= switches | {"classes_per_batch"}, row
                assert "classes_per_batch" not in differing or row.startswith("mmsi"), row
        assert len(seen) == 1 and min(images) >= 0.985 * max(images), (images, seen)


def test_learning_rates_of_a_set_are_multiplied_once(tmp_path: Path) -> None:
    """Also of rows that share their range and points by YAML anchors."""
    key, birds, emoji = "method.optimizer.lr", load(tmp_path, "birds"), load(tmp_path, "emoji")
    for row, entry in birds.methods.items():
        if row not in compare.SETS["birds"].own_rates:
            assert [p[key] for p in entry.points] == pytest.approx([0.2 * p[key] for p in emoji.methods[row].points]), (
                row
            )
            ends, expected = (sweep.space_of(row)[key]["log_uniform"] for sweep in (birds, emoji))
            assert ends == pytest.approx([0.2 * end for end in expected]), row


@pytest.mark.parametrize("name", [*compare.SETS])
def test_the_kept_sweeps_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """Otherwise `--resume` would be refused."""
    check_same_sweep(Results(name, "", compare.RESULTS / name).sweep(), load(tmp_path, name))


def test_records_go_on_in_another_storage(results: Results, tmp_path: Path) -> None:
    elsewhere = Results("emoji", f"{tmp_path}/elsewhere", results.folder)
    elsewhere.restore()
    assert SweepFolder(elsewhere.sweep_folder).read() == results.records() and len(results.records()) == 12
    kept = b"".join(file.read_bytes() for file in results.folder.rglob("*") if file.is_file())
    assert str(tmp_path).encode() not in kept and b"the-machine" not in kept, "nothing of the machine is kept"
    changed = copy.deepcopy(results.records()[0])
    records = SweepFolder(elsewhere.sweep_folder)
    records.acquire()
    changed.score = 99.0
    records.write(changed)
    with pytest.raises(UserError, match=r"00000\.json are different trials"):
        elsewhere.restore()
    changed.state = "running"
    records.write(changed)
    elsewhere.sweep_folder.remove("trials/00003.json")
    elsewhere.restore()
    assert SweepFolder(elsewhere.sweep_folder).read() == results.records(), "finished and missing ones are taken over"


def test_a_comparison_from_its_starts_to_the_second_table(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, dict[str, Any], str]] = []

    def start(command: list[str], env: dict[str, str], start_new_session: bool) -> SimpleNamespace:
        commands.append((command[2], yaml.safe_load(Path(command[3]).read_text()), env["RAYDML_HOME"]))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    kinds: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr(
        compare, "train_runs", lambda runs, *_: kinds.append([run.file.parent.name for run in runs]) or 0
    )
    monkeypatch.setattr(compare_seeds, "CLOSE", 2.1)  # the difference is 2
    root = f"{tmp_path}/root"
    assert compare.compare("emoji", root, results, None) == 0
    assert kinds == [["more_seeds"] * 4, [], [], [], ["equal_time"] * 3], "after the first table; its times agree"
    assert {home for *_, home in commands} == {root}, "names in model.weights are those of the default storage"
    assert [program for program, *_ in commands] == ["pipeline.train"] * 4 + ["pipeline.tune"]
    starts = {values["name"]: values for _, values, _ in commands[:4]}
    weights = {
        run_configs(results.sweep(), f"mmsi_{row}", {}, 0, stage)[0].model.weights: fold
        for row in compare.STARTS
        for stage, fold in (("search", 0), ("final", None))
    }
    assert {name: values["data"]["validation_fold"] for name, values in starts.items()} == weights
    for values in starts.values():  # of the set's pixels, and no method of its own
        assert values["data"]["transforms"] == {"size": 64, "evaluation_scale": 1} and values["storage"] == root
        assert (
            values["method"]["meta"] is False and values["length"] == "200 steps" and not values["evaluation"]["test"]
        )
        assert values["method"]["loss"] == values["name"].split("-")[3]
    assert commands[-1][1]["name"] == "compare-emoji"


def test_a_row_again_is_the_run_that_was_recorded(results: Results, tmp_path: Path) -> None:
    seeds = [record.seed for record in results.finals("osm_caa")]
    config = results.config(results.finals("osm_caa")[1], "/elsewhere")
    assert seeds == [0, 1, 2] and (config.seed, config.storage, str(config.length)) == (1, "/elsewhere", "300 steps")
    assert config.method.name == "osm_caa" and config.evaluation.test and config.data.validation_fold is None
    with pytest.raises(UserError, match="has no final run of smart_mining"):
        results.finals("smart_mining")


def test_results_are_not_overwritten_and_a_missing_dataset_is_told_before_anything_is_trained(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("nothing may be trained"))
    kept = tmp_path / "kept-all"
    kept.mkdir()
    results.folder.rename(kept / "emoji")

    def main(*arguments: str) -> int:
        root = ["--root", f"{tmp_path}/root", "--results", str(kept)]
        monkeypatch.setattr("sys.argv", ["compare", *root, *arguments])
        return compare.main()

    assert main("--sets", "emoji") == 2 and "add --resume to go on" in capsys.readouterr().err
    assert main("--sets", "icons") == 2 and "icons" in capsys.readouterr().err
    figures = tmp_path / "figures"
    assert main("--show", "--figures", str(figures)) == 0 and not figures.exists(), "nothing is written"
    assert "### emoji" in capsys.readouterr().out and not (kept / "emoji/leaderboard.csv").exists()
    drawn: list[str] = []
    monkeypatch.setattr(compare, "write_pages", lambda found: drawn.extend(found))
    assert main("--sets", "emoji", "--write", "--figures", str(figures)) == 0 and drawn == [*compare.SETS], (
        "pages and the figure of all sets are of all sets"
    )
    compare.write_outputs(results := Results("emoji", "", kept / "emoji"), figures)
    assert (results.folder / "leaderboard.csv").exists() and (figures / "emoji.svg").exists()


@pytest.mark.parametrize("option", ["--time", "--repeat"])
def test_a_row_of_a_set_without_records_is_one_line(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--sets", "birds", option, "osm_caa", "--root", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    assert compare.main() == 2
    assert "birds has no records of birds: compare it first, or choose --sets" in capsys.readouterr().err


def test_the_sweep_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDML_HOME", f"{tmp_path}/root")  # without a dataset: keys, both ends of ranges, budgets
    assert check_sweep(load(tmp_path, "emoji"), weights=False) == {}


def test_the_budget_also_stops_a_comparison_in_the_background_of_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "POLL_S", 0.05)
    started = tmp_path / "started"
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: float(started.exists()))
    monkeypatch.setattr(compare, "time", clock)
    monkeypatch.setattr("sys.argv", ["compare", "--show", "--results", str(tmp_path)])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell without job control starts commands with &
    try:
        assert compare.main() == 0
        command = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
        run = functools.partial(compare.run, ["timeit", "-n1", "-r1", command], "", until=0.5)
        with ThreadPoolExecutor(1) as pool:  # as runs beside the sweep are trained
            assert pool.submit(run).result()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_the_comparison_alone_ends_its_command_and_keeps_the_records(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "POLL_S", 0.05)
    started, ended = tmp_path / "started", tmp_path / "ended"
    name = next(iter(sorted((results.folder / "trials").iterdir()))).name

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if started.exists():
            (results.folder / "trials" / name).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(compare, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    command = f"""
import pathlib, time
try:
    pathlib.Path({str(started)!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    pathlib.Path({str(ended)!r}).touch()"""
    with pytest.raises(KeyboardInterrupt):
        compare.run(["timeit", "-n1", "-r1", command], "", results=results)
    assert ended.exists(), "it was told to stop, and waited for"
    assert (results.folder / "trials" / name).exists(), "what was written last is kept"
