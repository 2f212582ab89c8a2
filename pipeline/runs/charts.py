"""The report's curves: an inline SVG for each quantity that a run has logged."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from pipeline.metric_names import COUNTS, metric_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Float64[np.ndarray, "2 points"]  # steps and values

NOT_CURVES = ("step", "epoch", "images", *COUNTS)
FEW_POINTS = 40  # a curve of fewer points shows each of them

INK = "#010203"  # stands for the page's text colour in a chart, whatever the reader's colour scheme
COLOURS = ("#3b82d0", "#d97f1f", "#2a9d74", "#a667c9", "#d0577f", "#8a8f2c", "#2aa3b8", "#8b6f5c")
CHART_STYLE: Any = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9, "legend.fontsize": 8.5, "legend.frameon": False, "lines.linewidth": 1.6,
    "svg.fonttype": "none", "svg.hashsalt": "raydml", "text.parse_math": False,
}  # fmt: skip


def curves_section(lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], metric: str) -> str:
    """The section of curves; `metric` chooses the best validation. A quantity that was never logged has no chart."""
    train = _read(lines, "train")
    validation = _read(lines, "validation")

    def pop(key: str) -> dict[str, Curve]:
        return {name: train.pop(name) for name in list(train) if name == key or name.startswith(f"{key}/")}

    classes = "test" if summary["protocol"]["profile"] == "paper" else "held-out training"
    charts = [
        _chart("Training loss", "loss", pop("loss"), smooth=True),
        _chart(f"Validation on {classes} classes", "%", validation, best=metric),
        _chart("Gradient norm, before clipping", "norm", pop("gradient"), smooth=True, from_zero=True),
        _chart("Learning rate", "learning rate (first group)", pop("lr"), from_zero=True),
        _chart("Throughput, mean since the start", "images/s", pop("images_per_second"), from_zero=True),
        _chart("Waiting for data, mean since the start", "share of step time", pop("waiting"), from_zero=True),
        *(_chart(name, name, {name: curve}, smooth=True) for name, curve in train.items()),  # logged by the method
    ]
    content = f'<div class="charts">\n{"".join(charts)}</div>' if any(charts) else "<p>Nothing was logged.</p>"
    return f'<section id="curves">\n<h2>Training</h2>\n{content}\n</section>'


def _read(lines: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Curve]:
    """The curve of every quantity in the lines of a kind; values that are not finite are left out."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in (line for line in lines if line["kind"] == kind):
        for name, value in line.items():
            if name not in NOT_CURVES and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, []).append((line["step"], value))
    return {name: np.array(pairs, np.float64).T for name, pairs in points.items()}


def _chart(
    title: str, unit: str, curves: Mapping[str, Curve], smooth: bool = False, from_zero: bool = False, best: str = ""
) -> str:
    """A chart over the steps as inline SVG, in the page's font and colour; "" without curves.

    `smooth` draws a running mean over the values as logged, `from_zero` starts the vertical axis at 0, `best` names the
    curve whose maximum is marked, in percent.
    """
    if not curves:
        return ""
    import matplotlib  # here: only a finished run draws
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=unit)
        axes.set_prop_cycle(color=COLOURS)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for name, curve in curves.items():
            _draw(
                axes,
                curve,
                smooth,
                metric_title(name.removeprefix("lr/").removeprefix("gradient/")) if len(curves) > 1 else "",
            )
        if best in curves:
            step, value = max(curves[best].T, key=lambda point: point[1])  # the first of equals, as the run chooses
            label = f"best {metric_title(best)}: {value:.1f} % at step {step:,.0f}"
            axes.plot(step, value, "*", markersize=12, color=INK, label=label, zorder=3)
        axes.set_xlim(left=0)
        if from_zero:
            axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    svg = out.getvalue().replace(INK, "currentColor")
    svg = svg[svg.index("<svg") :]
    # HTML needs no namespaces, and ids of groups would be the same in every chart.
    svg = re.sub(r'<metadata>.*?</metadata>| xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f'<figure class="chart">\n<figcaption>{escape(title)}</figcaption>\n{svg}</figure>\n'


def _draw(axes: Axes, curve: Curve, smooth: bool, label: str) -> None:
    steps, values = curve
    if len(values) < FEW_POINTS:
        axes.plot(steps, values, marker="o", markersize=3, label=label)
    elif not smooth:
        axes.plot(steps, values, label=label)
    else:
        window = np.ones(len(values) // 15 | 1)  # centred; shorter at both ends
        mean = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
        (raw,) = axes.plot(steps, values, linewidth=0.9, alpha=0.5, label="" if label else "as logged")
        axes.plot(steps, mean, linewidth=2, color=raw.get_color(), label=label or f"mean of {len(window)}")
