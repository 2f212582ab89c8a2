"""The figures of a comparison: a row's mean and interval on the test classes beside its base's, one figure a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare_results import BASES, METRICS, TITLES, Figures, Results
from pipeline.tuning.statistics import estimate

Values = Mapping[str, Mapping[int, float]]  # percent by row and seed


@dataclass(frozen=True)
class Panel:
    """One metric of one set.

    Attributes:
        rows: Percent by row and seed.
        frozen: That of the pretrained trunk, if it is known.
    """

    rows: Values
    frozen: float | None


COLOUR, BASE_COLOUR = "#1f5fa8", "#b8651b"


def draw(title: str, figures: Figures, frozen: Mapping[str, float], file: Path) -> None:
    """Writes a set's figure as SVG, methods with their bases below baselines, the best of each on top.

    Args:
        title: Above the panels.
        figures: Percent by metric, row and seed; rows without them are left out.
        frozen: What the trunk has before training, by metric: a line.
        file: What is written.
    """
    panels = {
        f"{name}, %, unseen classes": Panel(figures[metric], frozen.get(metric)) for metric, name in METRICS.items()
    }
    _write(title, panels, file)


def draw_sets(sets: Mapping[str, Results], file: Path) -> None:
    """Writes the figure of all sets as SVG: MAP@R, a panel a set, in the order of the first.

    Args:
        sets: The results of each.
        file: What is written.
    """
    panels = {
        f"{name}: MAP@R, %": Panel(found.figures()["map@r"], found.frozen().get("map@r"))
        for name, found in sets.items()
    }
    _write("", panels, file)


def _write(title: str, panels: Mapping[str, Panel], file: Path) -> None:
    places = _places(next(iter(panels.values())).rows)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # the same file each time
        _figure(title, panels, places).savefig(file, format="svg", metadata={"Date": None})


def _figure(title: str, panels: Mapping[str, Panel], places: Sequence[tuple[str, str | None, float]]) -> Figure:
    figure = Figure(figsize=(3.2 + 3 * len(panels), 1.1 + 0.3 * len(places)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        values = panel.rows
        if panel.frozen is not None:
            axis.axvline(panel.frozen, color="#777777", linestyle=":", linewidth=1)
        for row, base, y in places:
            if values.get(row):
                _mark(axis, values[row], y, COLOUR, "o")
            if base is not None and values.get(base):
                _mark(axis, values[base], y + 0.25, BASE_COLOUR, "s")
        axis.set_xlabel(name)
        axis.grid(axis="x", linewidth=0.4)
        labels = [f"{TITLES[row]}*" if row.startswith("mmsi") else TITLES[row] for row, *_ in places]
        axis.set_yticks([y for *_, y in places], labels, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].plot([], [], "o", color=COLOUR, label="baseline, or method")
    axes[0].plot([], [], "s", color=BASE_COLOUR, label="the method's base")
    if any(panel.frozen is not None for panel in panels.values()):
        axes[0].plot([], [], ":", color="#777777", label="not trained")
    axes[0].plot([], [], " ", label="* from a trained base, as its base")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _places(values: Values) -> list[tuple[str, str | None, float]]:
    """Row, base and height of what is drawn: baselines, then methods."""
    ordered = sorted((row for row in values if row in BASES), key=lambda row: estimate([*values[row].values()]).mean)
    baselines = [row for row in reversed(ordered) if BASES[row] is None]
    methods = [row for row in reversed(ordered) if BASES[row] is not None]
    return [(row, BASES[row], float(y)) for y, row in enumerate([*baselines, *methods])]


def _mark(axes: Axes, values: Mapping[int, float], y: float, colour: str, marker: str) -> None:
    mean, low, high, _ = estimate([*values.values()])
    error = None if low is None or high is None else [[mean - low], [high - mean]]
    axes.errorbar(mean, y, xerr=error, fmt=marker, color=colour, markersize=4, capsize=2, linewidth=1)
