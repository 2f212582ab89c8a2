"""The comparison of the methods: its sweep file, its records kept beside the program, and its tables."""

from __future__ import annotations

import copy
import functools
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from benchmarks import compare, compare_pages, compare_results, compare_seeds
from benchmarks.compare_pages import written
from benchmarks.compare_results import BASES, Results
from benchmarks.compare_runs import train_runs
from benchmarks.compare_seeds import more_seeds
from benchmarks.compare_tables import tables
from benchmarks.compare_time import equal_time, more_timings, seconds_per_step, timed_runs
from benchmarks.pages import ROOT
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder
from pipeline.tuning.checks import check_sweep
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import check_same_sweep, dump_sweep, load_sweep
from pipeline.tuning.sweep_folder import SWEEP, RunProgress, SweepFolder, TrialRecord, sweep_folder


def load(tmp_path: Path, name: str) -> SweepConfig:
    return load_sweep(str(compare.sweep_file(name, tmp_path, {"storage": f"{tmp_path}/root"})))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Of a sweep in which multi-similarity, and OSM+CAA with its base, have been trained."""
    sweep = load(tmp_path, "emoji")
    folder = sweep_folder(f"{tmp_path}/root", "compare-emoji")
    folder.write(SWEEP, dump_sweep(sweep).encode())
    records = SweepFolder(folder)
    records.acquire()
    figures = {
        "osm_caa": [50.0, 52.0, 54.0],
        "osm_caa_base": [48.0, 50.5, 51.5],
        "multi_similarity": [60.0, 61.0, 62.0],
    }
    number = 0
    for row, values in figures.items():
        setting = sweep.methods[row].points[0]
        search = RunProgress("r", 0, 0, "finished", best={"map@r": 33.0})
        records.write(
            TrialRecord(number, "search", row, setting, state="finished", runs=[search], score=33.0, host="the-machine")
        )
        for seed, value in enumerate(values):
            seconds = 200.0 if row == "osm_caa" else 100.0
            run = RunProgress(
                "r", None, seed, "finished", seconds=seconds, test={"recall@1": value + 10, "map@r": value}
            )
            number += 1
            records.write(
                TrialRecord(number, "final", row, setting, seed=seed, length="300 steps", state="finished", runs=[run])
            )
        number += 1
    kept = Results("emoji", f"{tmp_path}/root", tmp_path / "kept")
    kept.collect()
    return kept


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


def test_the_table_is_of_the_test_classes_paired_by_seed(results: Results) -> None:
    text = tables(results)
    assert text.startswith("### emoji, equal images seen, 200 steps\n")
    (osm,) = (line for line in text.splitlines() if line.startswith("| OSM+CAA, `osm_caa` | 6"))
    assert "| 62.0 [57.0, 67.0] | 52.0 [47.0, 57.0] | contrastive over all pairs, `osm_caa_base` | 60.0 " in osm
    assert osm.endswith("| **+2.0 [+0.8, +3.2]** | **+2.0 [+0.8, +3.2]** |")
    assert "| multi-similarity, `multi_similarity` | 71.0 [68.5, 73.5] | 61.0 [58.5, 63.5] |" in text
    assert (
        "| Intra-Batch Connections, `intra_batch` | – | – | cross-entropy, `cross_entropy` | – | – | – | – |" in text
    ), "rows without figures stay"
    assert "| `osm_caa` | 1 | 33.0 | optimizer.lr 0.0005, alpha 1.2 | 3 | 200 |" in text


def test_the_tables_have_what_the_trunk_had_before_training(results: Results, tmp_path: Path) -> None:
    assert results.frozen() == {} and "not trained" not in tables(results)
    summary = {"final": {}, "frozen": {"recall@1": 30.04, "map@r": 20.26, "queries": 9}}
    Folder(f"{results.root}/runs/r").write_json(SUMMARY, summary)
    compare.write_outputs(results, tmp_path)
    assert "not trained" not in (tmp_path / "emoji.svg").read_text()
    results.collect()
    compare.write_outputs(results, tmp_path)
    assert "not trained" in (tmp_path / "emoji.svg").read_text()
    assert results.frozen() == {"recall@1": 30.04, "map@r": 20.26}
    assert "| not trained: the pretrained trunk's features | 30.0 | 20.3 |" in tables(results)
    elsewhere = Results("emoji", "nowhere", results.folder)  # from the kept records alone
    assert elsewhere.frozen() == results.frozen()
    assert compare_pages.short_table(elsewhere).startswith(
        "| emoji: %, unseen classes (not trained: R@1 30.0, MAP@R 20.3) | R@1 |"
    )


def test_slower_rows_are_trained_again_for_as_long_as_the_reference_takes(results: Results, tmp_path: Path) -> None:
    trained: list[Config] = []

    def train(root: str, config: Config) -> int:
        trained.append(config)
        if len(trained) == 2:
            return 3  # a run that fails; those that are finished are kept
        Folder(f"{root}/runs/{config.name}").write_json(
            SUMMARY, {"seconds": 101.0, "final": {"recall@1": 55.0 + config.seed, "map@r": 45.0}}
        )
        return 0

    assert timed_runs(results) == [] and "wall time: that of" not in tables(results), "not before all rows are there"
    assert train_runs([*equal_time(results)], train, until=0.0) == 0 and not trained, "the time is over"
    assert train_runs([*equal_time(results)], train, None) == 3
    assert train_runs([*equal_time(results)], train, None) == 0
    assert len(trained) == 4 and {str(config.length) for config in trained} == {"150 steps"}
    assert {config.method.name for config in trained} == {"osm_caa"} and {config.seed for config in trained} == {
        0,
        1,
        2,
    }
    assert {run.row for run in timed_runs(results)} == {"osm_caa", "osm_caa_base", "multi_similarity"}
    osm = [run for run in timed_runs(results) if run.row == "osm_caa"]
    assert [(run.seed, run.steps, run.test["recall@1"]) for run in osm] == [
        (0, 150, 55.0),
        (1, 150, 56.0),
        (2, 150, 57.0),
    ]
    part = tables(results).split("### emoji, equal wall time: that of multi_similarity")[1]
    assert (
        "| OSM+CAA, `osm_caa` | 56.0 [53.5, 58.5] | 45.0 " in part
        and "Steps: `multi_similarity` 300, `osm_caa` 150, `osm_caa_base` 300." in part
        and "Rows trained again for this table have seeds 0, 1, 2 alone." in part
    )
    kept = results.folder / "equal_time" / "osm_caa-0.json"
    kept.write_text(kept.read_text().replace("0.0005", "0.0003"))
    assert timed_runs(results) == [], "a record of another setting"
    assert train_runs([*equal_time(results)], train, None) == 0 and len(trained) == 5 and len(timed_runs(results)) == 9
    compare.write_outputs(results, tmp_path / "figures")
    first, second = ((tmp_path / "figures" / f"emoji{name}.svg").read_text() for name in ("", "-time"))
    assert "OSM+CAA" in first and "emoji, equal wall time" in second and "contrastive over all pairs" not in first
    compare.write_outputs(results, tmp_path / "again")
    assert (tmp_path / "again" / "emoji.svg").read_text() == first, "the same bytes of the same records"
    for file in (results.folder / "trials").glob("*.json"):
        if json.loads(file.read_text())["method"] == "multi_similarity":
            file.unlink()
    assert timed_runs(results) == [] and train_runs([*equal_time(results)], train, None) == 0, (
        "nothing without the reference"
    )


def test_a_row_whose_times_differ_is_timed_again(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Config] = []

    def train(root: str, config: Config) -> int:
        trained.append(config)
        figures = {"seconds": 208.0, "final": {"recall@1": 62.0, "map@r": 52.0}}
        Folder(f"{root}/runs/{config.name}").write_json(SUMMARY, figures)
        return 0

    def set_seconds(*seconds: float) -> None:
        for file in (results.folder / "trials").glob("*.json"):
            record = json.loads(file.read_text())
            if record["stage"] == "final" and record["method"] == "osm_caa":
                record["runs"][0]["seconds"] = seconds[record["seed"]]
                file.write_text(json.dumps(record))

    set_seconds(900.0, 200.0, 210.0)
    assert [*more_timings(results)] == [] and seconds_per_step(results, "osm_caa") == 0.7
    set_seconds(900.0, 200.0, 260.0)
    assert train_runs([*more_timings(results)], train, None) == 0 and [*more_timings(results)] == []
    assert [(c.seed, str(c.length)) for c in trained] == [(0, "300 steps")]
    assert seconds_per_step(results, "osm_caa") == pytest.approx(208 / 300)
    assert len(results.final_runs("osm_caa")) == 3, "it is no further seed"
    set_seconds(900.0, 100.0, 150.0)
    for _ in range(4):
        train_runs([*more_timings(results)], train, None)
    assert len(trained) == 3, "at most three times"
    results.root = str(tmp_path)
    monkeypatch.setattr(compare, "train_config", train)
    monkeypatch.setattr(compare, "Results", lambda *_: results)
    monkeypatch.setattr("sys.argv", ["compare", "--sets", "emoji", "--time", "osm_caa", "--results", str(tmp_path)])
    assert compare.main() == 0 and [str(c.length) for c in trained[3:]] == ["300 steps"]
    assert len(results.kept_runs("timing", "osm_caa")) == 4, "once more, by hand"


def test_rows_close_to_their_base_get_more_seeds(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Config] = []
    monkeypatch.setattr(compare_seeds, "CLOSE", 2.1)  # the difference is 2

    def train(root: str, config: Config) -> int:
        trained.append(config)
        Folder(f"{root}/runs/{config.name}").write_json(
            SUMMARY, {"seconds": 100.0, "final": {"recall@1": 62.0, "map@r": 53.0 - 2 * config.method.osm}}
        )
        return 0

    assert train_runs([*more_seeds(results)], train, until=0.0) == 0 and not trained, "the time is over"
    assert "Still to come: 4 of these runs." in tables(results)
    own, other = ([run for run in more_seeds(results) if run.row == row] for row in ("osm_caa", "osm_caa_base"))
    assert train_runs([*own, other[0]], train, None) == 0
    figures = results.figures()["map@r"]
    assert [*figures["osm_caa"]] == [*figures["osm_caa_base"]] == [0, 1, 2, 3], (
        "means are over the seeds of the differences"
    )
    assert "Still to come: 1 of these runs." in tables(results)
    assert train_runs([*more_seeds(results)], train, None) == train_runs([*more_seeds(results)], train, None) == 0
    assert sorted((config.method.osm, config.seed) for config in trained) == [
        (False, 3), (False, 4), (True, 3), (True, 4),
    ]  # fmt: skip
    assert {str(config.length) for config in trained} == {"300 steps"}
    assert sorted(results.figures()["map@r"]["osm_caa"]) == [0, 1, 2, 3, 4] and "Still to come" not in tables(results)
    assert "| +0.4 [-2.4, +3.2] |" in tables(results) and "| 33.0 | optimizer.lr 0.0005, alpha 1.2 | 5 |" in tables(
        results
    )
    for file in (results.folder / "more_seeds").glob("*.json"):
        file.unlink()

    def set_figures(*values: float) -> None:
        for file in (results.folder / "trials").glob("*.json"):
            record = json.loads(file.read_text())
            if record["method"] == "osm_caa" and record["stage"] == "final":
                record["runs"][0]["test"] = {"recall@1": values[record["seed"]], "map@r": 70.0}
                file.write_text(json.dumps(record))

    set_figures(80.0, 80.0, 80.0)
    trained.clear()
    assert train_runs([*more_seeds(results)], train, None) == 0 and not trained, "eighteen points above its base"
    set_figures(80.0, 60.0, 75.0)
    assert len([*more_seeds(results)]) == 4, "twelve points above, by an interval that holds 0"


def test_a_loss_by_its_interval_is_italic(results: Results) -> None:
    for file in (results.folder / "trials").glob("*.json"):
        record = json.loads(file.read_text())
        if record["method"] == "osm_caa" and record["stage"] == "final":
            record["runs"][0]["test"] = {"recall@1": 58.0, "map@r": 40.0 + record["seed"]}
            file.write_text(json.dumps(record))
    (row,) = (line for line in tables(results).splitlines() if line.startswith("| OSM+CAA, `osm_caa` | 5"))
    assert row.endswith("| -2.0 [-6.5, +2.5] | *-9.0 [-11.2, -6.8]* |")


def test_runs_of_another_length_or_setting_are_wanted_under_another_name(results: Results) -> None:
    def train(root: str, config: Config) -> int:
        summary = {"seconds": 100.0, "final": {"recall@1": 62.0, "map@r": 53.0}}
        Folder(f"{root}/runs/{config.name}").write_json(SUMMARY, summary)
        return 0

    def change(part: str, value: object) -> set[str]:
        for file in (results.folder / "trials").glob("*.json"):
            record = json.loads(file.read_text())
            if record["method"] == "osm_caa":
                (record["runs"][0] if part == "seconds" else record)[part] = value
                file.write_text(json.dumps(record))
        return {run.config.name for run in equal_time(results) if not run.is_kept()}

    assert train_runs([*equal_time(results)], train, None) == 0
    first = {run.config.name for run in equal_time(results)}
    assert change("seconds", 205.0) == set(), "about the same time"
    slower = change("seconds", 400.0)
    assert len(slower) == 3 and not slower & first and timed_runs(results) == []
    assert train_runs([*equal_time(results)], train, None) == 0 and len(timed_runs(results)) == 9
    other = change("values", {"method.optimizer.lr": 1e-3, "method.alpha": 1.0})
    assert len(other) == 3 and not other & (first | slower)


def test_pages_have_the_tables_of_complete_sets(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (
        "a\n<!-- compare: emoji, short -->\nold\n<!-- end -->\nb\n<!-- compare: icons, full -->\nkept\n<!-- end -->\n"
    )
    assert written(page, {"emoji": results}) == page, "rows are missing"
    monkeypatch.setattr(compare_pages, "BASELINES", ["multi_similarity"])
    monkeypatch.setattr(compare_pages, "METHODS", {"osm_caa": ("OSM+CAA", ["osm_caa"])})
    monkeypatch.setattr(compare_results, "ROWS", ["osm_caa", "osm_caa_base", "multi_similarity"])
    text = written(page, {"emoji": results})
    assert text.startswith("a\n<!-- compare: emoji, short -->\n| emoji: %, unseen classes | R@1 |")
    assert "| multi-similarity, the best baseline | 71.0 [68.5, 73.5] | 61.0 [58.5, 63.5] | | | | |" in text
    assert "| OSM+CAA | 62.0 [57.0, 67.0] | 52.0 [47.0, 57.0] | contrastive over all pairs | 60.0 " in text
    assert "kept" in text and written(text, {"emoji": results}) == text
    page = "<!-- compare: osm_caa, all sets -->\nold\n<!-- end -->"
    row = "| emoji | OSM+CAA | 62.0 [57.0, 67.0] | 52.0 [47.0, 57.0] | contrastive over all pairs | 60.0 "
    assert row in written(page, {"emoji": results}) and written(page, {}) == page
    page = page.replace("osm_caa", "baseline")
    assert "| emoji | multi-similarity | 71.0 [68.5, 73.5] | 61.0 " in written(page, {"emoji": results})


def test_the_pages_are_those_of_the_records() -> None:
    found = {name: Results(name, "", compare.RESULTS / name) for name in compare.SETS}
    for name in compare_pages.PAGES:
        page = (ROOT / name).read_text()
        assert written(page, found) == page, f"python -m benchmarks.compare --write: {name}"


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
