"""The figures of a comparison: a row's mean and interval on the test classes beside its base's, one figure a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare_results import BASES, METRICS, Figures
from pipeline.tuning.statistics import estimate

COLOUR, BASE_COLOUR = "#1f5fa8", "#b8651b"


def draw(title: str, figures: Figures, file: Path) -> None:
    """Writes a figure as SVG, methods with their bases below baselines, the best of each on top.

    Args:
        title: Above the panels.
        figures: Percent by metric, row and seed; rows without them are left out.
        file: What is written.
    """
    places = _places(figures[next(iter(METRICS))])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # the same file each time
        _figure(title, figures, places).savefig(file, format="svg", metadata={"Date": None})


def _figure(title: str, figures: Figures, places: Sequence[tuple[str, str | None, float]]) -> Figure:
    figure = Figure(figsize=(9.2, 1.1 + 0.3 * len(places)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for axis, (metric, name) in zip(axes, METRICS.items(), strict=True):
        for row, base, y in places:
            _mark(axis, figures[metric][row], y, COLOUR, "o")
            if base is not None and figures[metric].get(base):
                _mark(axis, figures[metric][base], y + 0.25, BASE_COLOUR, "s")
        axis.set_xlabel(f"{name}, %, unseen classes")
        axis.grid(axis="x", linewidth=0.4)
        labels = [f"{row} (from a trained base)" if row.startswith("mmsi") else row for row, *_ in places]
        axis.set_yticks([y for *_, y in places], labels, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].plot([], [], "o", color=COLOUR, label="row")
    axes[0].plot([], [], "s", color=BASE_COLOUR, label="its base")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _places(values: Mapping[str, Mapping[int, float]]) -> list[tuple[str, str | None, float]]:
    """Row, base and height of what is drawn: baselines, then methods."""
    ordered = sorted((row for row in values if row in BASES), key=lambda row: estimate([*values[row].values()]).mean)
    baselines = [row for row in reversed(ordered) if BASES[row] is None]
    methods = [row for row in reversed(ordered) if BASES[row] is not None]
    return [(row, BASES[row], float(y)) for y, row in enumerate([*baselines, *methods])]


def _mark(axes: Axes, values: Mapping[int, float], y: float, colour: str, marker: str) -> None:
    mean, low, high, _ = estimate([*values.values()])
    error = None if low is None or high is None else [[mean - low], [high - mean]]
    axes.errorbar(mean, y, xerr=error, fmt=marker, color=colour, markersize=4, capsize=2, linewidth=1)
