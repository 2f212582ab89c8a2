"""Two sides that do the same work in turn, A B A B: seconds of both, medians of their ratios with the spread.

A round that is not counted comes first. A machine that is busy for a while slows a round of both sides, so that their ratio is
steadier than either figure; CPU time is steadier than wall time, and both are rows.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.table import Row
from pipeline.distributed.cpus import KEPT

Seconds = tuple[float, float]  # wall, CPU


def seconds_of(work: Callable[[], Any], repeats: int = 1) -> Seconds:
    """Wall and CPU seconds that this process spends in a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def alternate(
    ours: Callable[[], Any], other: Callable[[], Any], rounds: int = 7, least_s: float = 0.0
) -> list[tuple[Seconds, Seconds]]:
    """Seconds of both sides, of each round; a side is called again until `least_s` have passed."""
    repeats = [max(1, round(least_s / max(1e-6, seconds_of(side, 2)[1]))) for side in (ours, other)]
    return [(seconds_of(ours, repeats[0]), seconds_of(other, repeats[1])) for _ in range(rounds)]


def rows_of(
    what: str, rounds: Sequence[tuple[Seconds, Seconds]], most: float | None = None, unit: float = 1.0, name: str = "s"
) -> list[Row]:
    """A row of CPU time, to which the promise holds, and one of wall time.

    Args:
        what: Name of the work, and of the other side.
        rounds: Seconds of both sides.
        most: The largest ratio promised.
        unit: Number that a second is multiplied with.
        name: Name of the unit.
    """
    rows = []
    for index, clock in ((1, "CPU"), (0, "wall")):
        a, b = (np.array([sides[side][index] for sides in rounds]) for side in (0, 1))
        ratio, spread = ratio_of(a, b)
        promised = "" if most is None or clock == "wall" else f"<= {most:g}x"
        medians = unit * statistics.median(a), unit * statistics.median(b)
        rows.append(Row(f"{what}: {clock}-{name}", *medians, ratio, promised, not promised or ratio <= most, spread))  # type: ignore[operator]
    return rows


def ratio_of(
    ours: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray
) -> tuple[float, tuple[float, float]]:
    """Median of the ratios of the rounds, and their middle half."""
    low, middle, high = np.quantile(np.asarray(ours, float) / np.asarray(other, float), (0.25, 0.5, 0.75))
    return float(middle), (float(low), float(high))


def as_it_comes() -> dict[str, str]:
    """The environment of a process whose memory is measured, or whose allocator is to be glibc's own default."""
    return {name: value for name, value in os.environ.items() if name not in KEPT}
