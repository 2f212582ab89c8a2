"""The answer of made-up sweeps whose figures are known."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.storage import Folder
from pipeline.tuning.answer import BEST, CONCATENATED, LAST, TEST, VALIDATION, Answer, answer
from pipeline.tuning.ensembles import missing_ensembles
from pipeline.tuning.leaderboard import leaderboard_csv, terminal_tables
from pipeline.tuning.statistics import estimate
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import SweepFolder, TrialRecord
from pipeline.tuning.write_answer import write_answer
from tests.pipeline.tuning.synthetic import final, large_sweep, make_sweep, search

BASE = [search(0, "a", 40.0, lr=1e-3), search(1, "b", 42.0, lr=2e-3), search(2, "a", 35.0), search(3, "b", 30.0)]


def two_methods() -> list[TrialRecord]:
    """a: 30, 31, 33 on the test classes; b: 29, 30.5, 31."""
    finals = [final(4 + s, "a", s, [v]) for s, v in enumerate((30.0, 31.0, 33.0))]
    finals += [final(7 + s, "b", s, [v], lr=2e-3) for s, v in enumerate((29.0, 30.5, 31.0))]
    return [*BASE, *finals]


def lines_of(result: Answer) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(leaderboard_csv(result))))


def printed(result: Answer, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for table in terminal_tables(result):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_fair_protocol_ranks_by_the_test_classes() -> None:
    result = answer(make_sweep(), two_methods(), {})
    assert [row.method for row in result.rows] == ["a", "b"]  # b was better on validation
    a, b = result.rows
    assert (a.trial, a.setting, a.score) == (0, {"method.optimizer.lr": 1e-3}, 40.0)
    assert a.estimate(TEST, "map@r") == estimate([30.0, 31.0, 33.0])
    assert a.estimate(TEST, "recall@1") == estimate([60.0, 61.0, 63.0])
    assert a.estimate(VALIDATION, "map@r") == estimate([40.0])
    assert a.comparison is None and result.verdict(a) == "best"
    assert b.comparison is not None and b.comparison.difference == estimate([-1.0, -0.5, -2.0])
    assert b.comparison.won == 0 and result.verdict(b) == "within noise"
    assert result.kind == TEST and result.metrics == ["map@r", "recall@1"]  # no counts of queries
    assert any("measured once on the test classes" in note for note in result.notes)
    assert any("b cannot be told from a" in warning for warning in result.warnings)
    assert any("3 seeds" in warning for warning in result.warnings)


def test_folds_of_a_seed_are_averaged_before_they_count() -> None:
    records = [*BASE, final(4, "a", 0, [30.0, 34.0], folds=True), final(5, "a", 1, [20.0, 22.0], folds=True)]
    sweep = make_sweep(final={"classes": "folds", "seeds": [0, 1]})
    row = answer(sweep, records, {}).rows[0]
    assert row.figures[TEST]["map@r"] == {0: 32.0, 1: 21.0}
    records[-1].runs[1].test = {}  # not yet measured: the seed does not count
    assert answer(sweep, records, {}).rows[0].figures[TEST]["map@r"] == {0: 32.0}


def test_concatenated_figures_of_the_present_final_runs() -> None:
    records = two_methods()
    ensembles: dict[str, Any] = {
        "a": [{"seed": None, "runs": [r.runs[0].name for r in records[4:7]], "metrics": {"map@r": 38.0, "queries": 9}}],
        "b": [{"seed": None, "runs": ["made_up-00099-all-seed0"], "metrics": {"map@r": 99.0}}],  # of an earlier setting
    }
    result = answer(make_sweep(), records, ensembles)
    assert result.rows[0].figures[CONCATENATED] == {"map@r": {-1: 38.0}}
    assert result.rows[1].figures[CONCATENATED] == {}
    assert "concatenated" in printed(result) and "38.0" in printed(result)
    by_seed = [{"seed": s, "runs": [records[4 + s].runs[0].name], "metrics": {"map@r": 35.0 + s}} for s in range(3)]
    found = answer(make_sweep(), records, {"a": by_seed}).rows[0].estimate(CONCATENATED, "map@r")
    assert found == estimate([35.0, 36.0, 37.0])


def test_without_final_runs_the_validation_is_shown_and_said_so() -> None:
    result = answer(make_sweep(final=None), BASE, {})
    assert result.kind == VALIDATION and [row.method for row in result.rows] == ["b", "a"]
    assert any("test classes were not measured (final: null)" in note for note in result.notes)
    assert any("one seed: no interval" in warning for warning in result.warnings)
    assert result.verdict(result.rows[1]) == "one seed"
    assert "test" not in {line["figures"].split()[0] for line in lines_of(result)}
    waiting = answer(make_sweep(), BASE, {})
    assert any("not measured yet" in note for note in waiting.notes)


def test_paper_protocol_shows_best_and_last_and_names_them() -> None:
    records = [search(0, "a", 40.0), search(1, "b", 42.0)]
    records[0].runs[0].last = {"map@r": 39.0}
    records[1].runs[0].last = {"map@r": 36.0}
    result = answer(make_sweep(protocol="paper", final=None), records, {})
    assert result.kinds == [BEST, LAST] and [row.method for row in result.rows] == ["b", "a"]
    assert result.rows[0].estimate(LAST, "map@r") == estimate([36.0])
    text = " ".join(printed(result).split())
    assert "on TEST classes" in text and "best, chosen on" in text and "last" in text and "validation" not in text
    assert {line["figures"] for line in lines_of(result)} == {
        "best checkpoint, chosen on TEST classes",
        "last checkpoint",
    }
    assert {line["protocol"] for line in lines_of(result)} == {"paper"}
    assert any("Never compare with the fair protocol" in note for note in result.notes)


@pytest.mark.parametrize("protocol", ["fair", "paper"])
def test_nothing_done_yet(protocol: str) -> None:
    sweep = make_sweep(protocol=protocol)
    for records in ([], [search(0, "a", None, state="running", busy_s=0.0)]):
        result = answer(sweep, records, {})
        assert [row.trial for row in result.rows] == [None, None] and result.rows[0].comparison is None
        assert {result.verdict(row) for row in result.rows} == {"not measured"}
        assert [line["mean"] for line in lines_of(result)] == ["", ""]
        assert "made_up" in printed(result)
    assert any("Not finished: 1 trial (running" in note for note in result.notes)
    assert not any("no trial has a score" in warning for warning in result.warnings)  # it runs
    assert any("a: no trial has a score" in warning for warning in answer(sweep, [], {}).warnings)


def test_final_runs_of_an_earlier_setting_are_left_out_and_told() -> None:
    records = [*two_methods(), search(10, "a", 45.0, lr=5e-3), final(11, "a", 0, [34.0], lr=5e-3)]
    result = answer(make_sweep(), records, {})
    row = next(row for row in result.rows if row.method == "a")
    assert row.figures[TEST]["map@r"] == {0: 34.0}
    assert any("a: 3 final trials of an earlier chosen setting" in warning for warning in result.warnings)
    assert any("different numbers of seeds: a 1, b 3" in warning for warning in result.warnings)


def test_budgets_and_failures_are_told() -> None:
    records = [
        *two_methods(),
        search(10, "b", None, state="failed", error="boom"),
        search(11, "b", 20.0, state="stopped"),
    ]
    records[-1].runs[0].images = 9000
    result = answer(make_sweep(), records, {})
    spent = {row.method: row for row in result.rows}
    assert spent["b"].search.finished == 2 and spent["b"].search.stopped == 1 and spent["b"].search.failed == 1
    assert spent["a"].search.images == 2000 and spent["a"].search.hours == pytest.approx(0.02)
    assert spent["a"].final.gpu_hours == pytest.approx(0.06) and spent["a"].search.gpu_hours == 0
    told = "\n".join(result.warnings)
    assert "b: 1 trial failed" in told
    assert "unequal budgets: trials finished or stopped: a 2, b 3" in told
    assert (
        "stopping early has left methods different budgets: images trained on in the search: a 2,000, b 12,000" in told
    )
    unstopped = answer(make_sweep(scheduler={"name": "none"}), records, {}).warnings
    assert "unequal budgets: images trained on in the search: a 2,000, b 12,000" in unstopped
    assert not [w for w in answer(make_sweep(), two_methods(), {}).warnings if "budget" in w]
    live = [*records, search(12, "a", None, state="running")]
    assert not [w for w in answer(make_sweep(), live, {}).warnings if "budget" in w]


def test_leaderboard_keeps_every_digit() -> None:
    records = two_methods()
    records[4].runs[0].test = {"map@r": 100 / 3, "recall@1": 60.0}
    lines = lines_of(answer(make_sweep(), records, {}))
    line = next(x for x in lines if x["method"] == "a" and x["metric"] == "map@r" and x["figures"] == "test classes")
    expected = estimate([100 / 3, 31.0, 33.0])
    assert (float(line["mean"]), float(line["low"]), float(line["high"])) == expected[:3]
    assert line["seeds"] == "3" and line["interval"] == "95 % Student t interval over seeds"
    assert json.loads(line["setting"]) == {"method.optimizer.lr": 1e-3}
    other = next(x for x in lines if x["method"] == "b" and x["metric"] == "map@r" and x["figures"] == "test classes")
    assert other["compared_with"] == "a" and "Holm" in other["comparison"] and other["verdict"] == "within noise"
    compared = [(x["method"], x["figures"], x["metric"]) for x in lines if x["verdict"]]
    assert compared == [("a", "test classes", "map@r"), ("b", "test classes", "map@r")]
    assert float(other["difference_low"]) < float(other["difference"]) < float(other["difference_high"])


def test_tables_fit_100_columns_and_print_names_as_they_are() -> None:
    methods = ("[red]a_method_of_a_long_name_with_many_words[/red]", "b" * 60)
    records = [search(0, methods[0], 40.0), search(1, methods[1], 42.0)]
    records += [final(2 + s, methods[0], s, [30.0 + s]) for s in range(3)]
    records += [final(5 + s, methods[1], s, [20.0 + s]) for s in range(3)]
    runs = [record.runs[0].name for record in records[2:5]]
    result = answer(
        make_sweep(methods), records, {methods[0]: [{"seed": None, "runs": runs, "metrics": {"map@r": 40.0}}]}
    )
    text = printed(result, width=200)
    assert max(map(len, text.splitlines())) <= 100
    assert any("Student t interval over seeds" in note for note in result.notes)
    assert any("Holm" in note for note in result.notes)
    assert "[red]" in text and "31.0 [28.5, 33.5]" in text
    assert printed(result, width=100).split() == text.split()  # nothing is cut or wrapped for want of room


def test_one_method_is_compared_with_none() -> None:
    result = answer(make_sweep(("a",)), [search(0, "a", 40.0)], {})
    text = printed(result)
    assert "40.0" in text and "difference" not in text and "verdict" not in text
    assert "one seed: no interval" in result.warnings
    assert not [note for note in result.notes if "Differences" in note or "Intervals" in note]


def test_written_into_the_sweeps_folder(tmp_path: Path) -> None:
    sweep, records = large_sweep(20)
    folder = SweepFolder(Folder(tmp_path))
    names = [r.runs[0].name for r in records if r.stage == "final" and r.method == "triplet"]
    folder.folder.write_json("ensembles.json", {"triplet": [{"seed": None, "runs": names, "metrics": {"map@r": 60.5}}]})
    result = write_answer(folder, SweepConfig.model_validate(sweep.model_dump()), records)
    assert (tmp_path / "leaderboard.csv").read_text() == leaderboard_csv(result)
    assert "60.5" in (tmp_path / "leaderboard.csv").read_text()


def test_an_ensemble_needs_the_runs_themselves(tmp_path: Path) -> None:
    sweep = make_sweep(("a",), storage=str(tmp_path), final={"seeds": [0, 1]})
    records = [search(0, "a", 40.0), final(1, "a", 0, [50.0]), final(2, "a", 1, [51.0])]
    names = [record.runs[0].name for record in records[1:]]
    folder = Folder(tmp_path / "sweep")
    for name in names:
        assert missing_ensembles(sweep, folder, records) == [], "removed, or trained elsewhere"
        Folder(tmp_path / "runs" / name).write_json("summary.json", {})
    assert missing_ensembles(sweep, folder, records) == [("a", None, names)]
