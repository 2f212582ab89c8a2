"""The tables of a comparison, and the pages that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, compare_pages, compare_results
from benchmarks.compare_pages import written
from benchmarks.compare_results import Results, figures_of
from benchmarks.compare_runs import KeptRun
from benchmarks.compare_tables import tables
from benchmarks.pages import ROOT, with_sections
from pipeline.errors import UserError
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder
from tests.benchmarks.comparisons import change_finals


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


def test_a_loss_by_its_interval_is_italic(results: Results) -> None:
    def change(record: dict[str, Any]) -> None:
        record["runs"][0]["test"] = {"recall@1": 58.0, "map@r": 40.0 + record["seed"]}

    change_finals(results, "osm_caa", change)
    (row,) = (line for line in tables(results).splitlines() if line.startswith("| OSM+CAA, `osm_caa` | 5"))
    assert row.endswith("| -2.0 [-6.5, +2.5] | *-9.0 [-11.2, -6.8]* |")


def test_figures_are_over_the_seeds_that_a_row_and_its_base_have() -> None:
    def runs(row: str, seeds: range) -> list[KeptRun]:
        return [KeptRun(row, {}, seed, 200, 90.0, {"recall@1": 60.0 + seed, "map@r": 40.0}) for seed in seeds]

    figures = figures_of(
        [*runs("osm_caa", range(3)), *runs("osm_caa_base", range(5)), *runs("multi_similarity", range(4))]
    )
    assert figures["recall@1"] == {
        "osm_caa": {0: 60.0, 1: 61.0, 2: 62.0},
        "osm_caa_base": {0: 60.0, 1: 61.0, 2: 62.0},
        "multi_similarity": {0: 60.0, 1: 61.0, 2: 62.0, 3: 63.0},
    }


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


def test_sections_are_written_also_where_they_are_empty() -> None:
    page = "a\n<!-- rows: one -->\n<!-- end -->\nb\n<!-- rows: two -->\nold\nlines\n<!-- end -->\nc\n"
    written_once = with_sections(page, "rows", str.upper)
    assert written_once == "a\n<!-- rows: one -->\nONE\n<!-- end -->\nb\n<!-- rows: two -->\nTWO\n<!-- end -->\nc\n"
    assert with_sections(written_once, "rows", str.upper) == written_once
    assert with_sections(page, "rows", lambda what: None) == page
    with pytest.raises(UserError, match=r"no <!-- columns: \.\.\. --> to write into"):
        with_sections(page, "columns", str.upper)


def test_the_pages_are_those_of_the_records() -> None:
    found = {name: Results(name, "", compare.RESULTS / name) for name in compare.SETS}
    for name in compare_pages.PAGES:
        page = (ROOT / name).read_text()
        assert written(page, found) == page, f"python -m benchmarks.compare --write: {name}"
