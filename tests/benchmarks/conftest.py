"""Fixtures of the comparison's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.compare_results import Results
from pipeline.tuning.sweep_file import dump_sweep
from pipeline.tuning.sweep_folder import SWEEP, RunProgress, SweepFolder, TrialRecord, sweep_folder
from tests.benchmarks.comparisons import load


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
