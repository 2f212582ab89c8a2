"""Runs of a comparison beyond its sweep: more seeds, timings, and equal wall time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, compare_seeds
from benchmarks.compare_results import Results
from benchmarks.compare_runs import train_runs
from benchmarks.compare_seeds import more_seeds
from benchmarks.compare_tables import tables
from benchmarks.compare_time import equal_time, more_timings, seconds_per_step, timed_runs
from pipeline.config import Config
from tests.benchmarks.comparisons import Training, change_finals


def test_slower_rows_are_trained_again_for_as_long_as_the_reference_takes(results: Results, tmp_path: Path) -> None:
    trained: list[Config] = []
    training = Training(101.0, lambda config: {"recall@1": 55.0 + config.seed, "map@r": 45.0}, trained)

    def train(root: str, config: Config) -> int:
        if len(trained) == 1:
            trained.append(config)
            return 3  # a run that fails; those that are finished are kept
        return training(root, config)

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
        and "Rows trained again for this table and those they are compared with have seeds 0, 1, 2 alone." in part
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
    train = Training(seconds=208.0)
    trained = train.trained

    def set_seconds(*seconds: float) -> None:
        change_finals(results, "osm_caa", lambda record: record["runs"][0].update(seconds=seconds[record["seed"]]))

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
    monkeypatch.setattr(compare_seeds, "CLOSE", 2.1)  # the difference is 2
    train = Training(figures=lambda config: {"recall@1": 62.0, "map@r": 53.0 - 2 * config.method.osm})
    trained = train.trained
    assert train_runs([*more_seeds(results)], train, until=0.0) == 0 and not trained, "the time is over"
    assert "Still to come: 4 of these runs." in tables(results)
    own, other = ([run for run in more_seeds(results) if run.row == row] for row in ("osm_caa", "osm_caa_base"))
    assert train_runs([*own, other[0]], train, None) == 0
    figures = results.figures()["map@r"]
    assert [*figures["osm_caa"]] == [*figures["osm_caa_base"]] == [0, 1, 2, 3], (
        "means are over the seeds of the differences"
    )
    assert "Still to come: 1 of these runs." in tables(results)
    assert tables(results).count("| optimizer.lr 0.0005, alpha 1.2 | 4 |") == 2, "the seeds that the means are of"
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
        def change(record: dict[str, Any]) -> None:
            record["runs"][0]["test"] = {"recall@1": values[record["seed"]], "map@r": 70.0}

        change_finals(results, "osm_caa", change)

    set_figures(80.0, 80.0, 80.0)
    trained.clear()
    assert train_runs([*more_seeds(results)], train, None) == 0 and not trained, "eighteen points above its base"
    set_figures(80.0, 60.0, 75.0)
    assert len([*more_seeds(results)]) == 4, "twelve points above, by an interval that holds 0"


def test_runs_of_another_length_or_setting_are_wanted_under_another_name(results: Results) -> None:
    train = Training()

    def wanted_after(change: Callable[[dict[str, Any]], object], search: bool = False) -> set[str]:
        change_finals(results, "osm_caa", change, search)
        return {run.config.name for run in equal_time(results) if not run.is_kept()}

    assert train_runs([*equal_time(results)], train, None) == 0
    first = {run.config.name for run in equal_time(results)}
    assert wanted_after(lambda record: record["runs"][0].update(seconds=205.0)) == set(), "about the same time"
    slower = wanted_after(lambda record: record["runs"][0].update(seconds=400.0))
    assert len(slower) == 3 and not slower & first and timed_runs(results) == []
    assert train_runs([*equal_time(results)], train, None) == 0 and len(timed_runs(results)) == 9
    setting = {"method.optimizer.lr": 1e-3, "method.alpha": 1.0}
    other = wanted_after(lambda record: record.update(values=setting), search=True)
    assert len(other) == 3 and not other & (first | slower)
