"""The suite of peers: its names, how ratios are taken, and what open-metric-learning calls MAP."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.alternate import alternate, ratio_of, rows_of
from benchmarks.open_metric_learning import map_at
from benchmarks.table import Row, finish


def test_the_table_ends_with_1_and_names_the_rows_that_lose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Row("faster", 1.0, 2.0, 0.5, "<= 0.6x"),
        Row("slower", 3.0, 2.0, 1.5, "<= 1.05x", ok=False, spread=(1.4, 1.6)),
        Row("loading, images/s", 90.0, 100.0, 0.9, ">= 0.9x"),
        Row("sampling, images/s", 200.0, 100.0, 2.0),
    ]
    monkeypatch.setattr(peers, "SECTIONS", {"losses": (lambda rounds: rows[:rounds], 1)})
    monkeypatch.setattr("sys.argv", ["peers", "--only", "losses", "--rounds", "4"])
    assert peers.main() == 1
    table, losing = capsys.readouterr().out.split("\n\n")
    assert re.search(r"slower +3 +2 +1\.5 \(1\.4 to 1\.6\) +<= 1\.05x +BROKEN", table)
    assert losing.splitlines() == ["the other is ahead in 2 of 4:", "  1.5x  slower", "  0.9x  loading, images/s"]
    assert finish(rows[:1]) == 0


def test_every_part_is_described() -> None:
    assert peers.__doc__ is not None
    described = re.findall(r"[a-z]+", peers.__doc__.split("names parts of it:")[1])
    assert set(peers.SECTIONS) <= set(described)


def test_ratios_are_medians_of_rounds_and_sides_alternate() -> None:
    ratio, spread = ratio_of([1, 2, 30, 4, 5], [1, 1, 10, 1, 1])
    assert (ratio, spread) == (3.0, (2.0, 4.0))
    calls: list[str] = []
    rounds = alternate(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3)
    assert len(rounds) == 3 and "".join(calls).endswith("ababab")
    cpu, wall = rows_of("x", [((1.0, 2.0), (2.0, 1.0))], most=1.5, unit=1e3, name="ms")
    assert cpu == Row("x: CPU-ms", 2000.0, 1000.0, 2.0, "<= 1.5x", False, (2.0, 2.0))
    assert wall == Row("x: wall-ms", 1000.0, 2000.0, 0.5, "", True, (0.5, 0.5))


def test_mean_average_precision_is_over_the_relevant_ones_among_the_nearest() -> None:
    labels = np.array([0, 0, 0, 1])
    neighbours = np.array([[1, 3, 2], [3, 0, 3], [3, 3, 3], [0, 1, 2]])
    expected = [(1 + 2 / 3) / 2, 1 / 2, 0, 0]
    assert map_at(neighbours, labels) == pytest.approx(np.mean(expected))
