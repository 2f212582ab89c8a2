"""The charts of a sweep's page, as plotly figures in JSON, which sweep.js draws when they come into view.

Texts in a figure are escaped: plotly reads tags in them. Two keys are not plotly's. `trials` gives the
trial of each point, whose text is the hover label. `lines` holds polylines, each a trial with its x and
its y; sweep.js joins them to one trace with gaps, since a trace for each of 500 trials would be slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from pipeline.metric_names import metric_title
from pipeline.runs.charts import COLOURS
from pipeline.tuning.answer import TITLES, VALIDATION, Answer
from pipeline.tuning.leaderboard import show_value
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_folder import TrialRecord

Figure = dict[str, Any]

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
SHADES = (0.12, 0.2, 0.32, 0.5, 0.8)  # opacity of a trial's line, from the worst fifth to the best
NOT_USED = -0.12  # height of keys that a setting does not have
MAX_TITLE = 26  # characters of a key below its axis
MANY_POINTS = 2000  # curves of more points together have no markers: each is a node of the page
MAX_NAME = 40  # characters of a method's name beside an axis


class Axis(NamedTuple):
    """Where the values of a key lie.

    Attributes:
        key: Dotted key.
        low, high: Ends of the range; of choices the first and last index.
        log: The range is drawn from logarithmically.
        choices: Texts of the options; empty for a range.
    """

    key: str
    low: float
    high: float
    log: bool = False
    choices: tuple[str, ...] = ()

    def place(self, value: Any) -> float:
        """Height of a value, 0 at `low` and 1 at `high`."""
        if self.choices:
            return self.choices.index(show_value(value)) / (len(self.choices) - 1) if len(self.choices) > 1 else 0.5
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (x - low) / (high - low) if high > low else 0.5


def axes_of(space: Space, trials: Sequence[TrialRecord]) -> list[Axis]:
    """Axes of the keys that the trials of a method have, in the order of the space."""
    found: dict[str, dict[str, Any]] = {key: {} for key in space.keys}  # distributions of a key by name in the study
    for record in trials:
        by_name = space.distributions(record.values)
        for name, key in space.names(record.values).items():
            found[key][name] = by_name[name]
    axes = []
    for key, of_key in found.items():
        distributions = list(of_key.values())
        values = [record.values[key] for record in trials if key in record.values]
        if not distributions or len({show_value(value) for value in values}) < 2:
            continue
        if any(hasattr(distribution, "choices") for distribution in distributions):
            offered = [option for d in distributions for option in getattr(d, "choices", ())]
            if not {show_value(value) for value in values} <= {show_value(option) for option in offered}:
                offered = []  # stored as JSON text, as Optuna knows no lists
            texts = tuple(dict.fromkeys(show_value(v) for v in sorted([*offered, *values], key=_choice_order)))
            axes.append(Axis(key, 0, len(texts) - 1, choices=texts))
        else:
            low, high = min(d.low for d in distributions), max(d.high for d in distributions)
            axes.append(Axis(key, min(low, *values), max(high, *values), any(d.log for d in distributions)))
    return axes


def _choice_order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not is_number, float(value) if is_number else 0.0, show_value(value))


def colour_of(answer: Answer) -> dict[str, int]:
    """Number of each method, by name, so that its colour stays when the order of the table changes."""
    return {method: i for i, method in enumerate(sorted(row.method for row in answer.rows))}


def _colour(number: int, opacity: float = 1.0) -> str:
    text = COLOURS[number % len(COLOURS)]
    red, green, blue = (int(text[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def label(record: TrialRecord, metric: str) -> str:
    """The hover label of a trial."""
    score = "no score" if record.score is None else f"{metric_title(metric)} {record.score:.2f} %"
    lines = [f"<b>trial {record.number}</b>, {_text(record.method)}, {record.state}", score]
    lines += [f"{_text(key)} = {_text(show_value(value))}" for key, value in record.values.items()]
    return "<br>".join(lines)


def intervals(answer: Answer) -> Figure:
    """Means with their intervals, and a small dot for each seed."""
    kinds = [kind for kind in answer.kinds if kind != VALIDATION or answer.kind == VALIDATION]
    numbers = {kind: i for i, kind in enumerate(kinds)}
    traces: list[Figure] = []
    rows = answer.rows[::-1]  # the best on top
    for kind in kinds:
        shift = 0.0 if len(kinds) == 1 else 0.18 - 0.36 * numbers[kind] / (len(kinds) - 1)
        found = [(i, row, e) for i, row in enumerate(rows) if (e := row.estimate(kind, answer.metric)) is not None]
        dots = [(i + shift, v) for i, row, e in found if e.seeds > 1 for v in row.figures[kind][answer.metric].values()]
        traces.append(_seed_dots(dots, numbers[kind]))
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": _text(TITLES[kind]), "showlegend": len(kinds) > 1,
                "x": [_short(e.mean) for _, _, e in found], "y": [i + shift for i, _, _ in found],
                "error_x": _bars([(e.mean, e.low, e.high) for _, _, e in found]),
                "marker": {"size": 9, "color": _colour(numbers[kind]), "symbol": SYMBOLS[numbers[kind]]},
                "text": [f"<b>{_text(row.method)}</b><br>{_ends(e.mean, e.low, e.high)}<br>{e.seeds} seeds" for _, row, e in found],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    names = [_name(row.method) for row in rows]
    return _by_method(traces, names, f"{metric_title(answer.metric)}, %, {TITLES[answer.kind]}")


def differences(answer: Answer) -> Figure | None:
    """Paired differences from the best method; None if there is none."""
    found = [(row, row.comparison) for row in answer.rows[::-1] if row.comparison is not None]
    if not found:
        return None
    trace = {
        "type": "scatter", "mode": "markers", "showlegend": False, "hovertemplate": "%{text}<extra></extra>",
        "x": [_short(c.difference.mean) for _, c in found], "y": list(range(len(found))),
        "error_x": _bars([c.difference[:3] for _, c in found]),
        "marker": {
            "size": 9, "color": _colour(0),
            "symbol": ["circle" if c.within_noise is False else "circle-open" for _, c in found],
        },
        "text": [
            f"<b>{_text(row.method)}</b> minus {_text(c.reference)}<br>{_ends(*c.difference[:3])} points<br>{answer.verdict(row)}"
            + ("" if c.p is None else f", p = {c.p:.3g} (Holm)")
            for row, c in found
        ],
    }  # fmt: skip
    names = [_name(row.method) for row, _ in found]
    figure = _by_method([trace], names, f"difference from {_text(answer.rows[0].method)}, points")
    figure["layout"]["shapes"] = [
        {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1.5, "color": "INK"}}
    ]
    return figure


def curves(answer: Answer, records: Sequence[TrialRecord]) -> Figure | None:
    """The validation metric of every run by the images that it has trained on; None if there is none."""
    numbers, traces = colour_of(answer), []
    num_points = sum(len(run.curve) for record in records for run in record.runs)
    chosen = {row.trial for row in answer.rows}
    for method, number in numbers.items():
        own = [record for record in records if record.method == method]
        for is_chosen in (False, True):
            lines = [
                [
                    record.number,
                    [point["images"] for point in points],
                    [_short(point[answer.metric]) for point in points],
                ]
                for record in own
                if (record.number in chosen) is is_chosen
                for run in record.runs
                if (points := [p for p in run.curve if answer.metric in p and math.isfinite(p[answer.metric])])
            ]
            if not lines:
                continue
            has_legend = is_chosen or not any(record.number in chosen for record in own)
            mode = "lines+markers" if is_chosen or num_points <= MANY_POINTS else "lines"
            width, opacity = (3.0, 1.0) if is_chosen else (1.0, max(0.25, min(0.7, 12 / len(lines))))
            traces.append(
                {
                    "type": "scatter", "mode": mode, "lines": lines, "legendgroup": str(number), "connectgaps": False,
                    "name": _text(method), "showlegend": has_legend,
                    "line": {"width": width, "color": _colour(number), "dash": DASHES[number // len(COLOURS) % len(DASHES)]},
                    "marker": {"size": 5 if is_chosen else 3, "color": _colour(number)}, "opacity": opacity,
                    "hovertemplate": "%{text}<br>here: %{y:.2f} % after %{x:,} images<extra></extra>",
                }
            )  # fmt: skip
    if not traces:
        return None
    layout = {
        "height": 480, "hovermode": "closest", "legend": {"orientation": "h", "y": -0.18},
        "xaxis": {"title": {"text": "images trained on"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": f"{metric_title(answer.metric)}, %"}},
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def parallel(answer: Answer, method: str, axes: Sequence[Axis], trials: Sequence[TrialRecord]) -> Figure:
    """A line a trial over an axis a key and one for the score; the better, the darker."""
    number = colour_of(answer)[method]
    scores = [record.score or 0.0 for record in trials]
    last = Axis("score", min(scores), max(scores))
    ranked = sorted(trials, key=lambda record: record.score or 0.0)
    traces = []
    for shade, opacity in enumerate(SHADES):
        part = ranked[len(ranked) * shade // len(SHADES) : len(ranked) * (shade + 1) // len(SHADES)]
        lines = [
            [
                record.number,
                list(range(len(axes) + 1)),
                [
                    *(
                        _short(axis.place(record.values[axis.key]), 4) if axis.key in record.values else NOT_USED
                        for axis in axes
                    ),
                    _short(last.place(record.score), 4),
                ],
            ]
            for record in part
        ]
        if lines:
            colour = _colour(number, opacity)
            traces.append(
                {
                    "type": "scatter", "mode": "lines+markers", "lines": lines, "showlegend": False, "connectgaps": False,
                    "line": {"width": 1.5, "color": colour}, "marker": {"size": 6, "color": colour},
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )  # fmt: skip
    titles = [_key_title(axis.key) for axis in axes] + [_text(metric_title(answer.metric)) + ", %"]
    layout = {
        "height": 400, "hovermode": "closest", "margin": {"t": 30, "r": 60},
        "annotations": list(_marks([*axes, last])),
        "xaxis": {"tickvals": list(range(len(titles))), "ticktext": titles, "range": [-0.35, len(axes) + 0.45], "showgrid": True},
        "yaxis": {"range": [-0.17, 1.1], "visible": False},
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def _marks(axes: Sequence[Axis]) -> Iterable[Figure]:
    """Values beside the axes: both ends of a range, every choice."""
    for i, axis in enumerate(axes):
        if axis.choices:
            marks = [(j / (len(axis.choices) - 1), text) for j, text in enumerate(axis.choices)]
        else:
            marks = [(0.0, show_value(axis.low)), (1.0, show_value(axis.high))]
        for height, text in marks:
            yield {
                "x": i, "y": height, "text": _text(text[:MAX_TITLE]), "showarrow": False, "xanchor": "left", "yanchor": "bottom",
                "xshift": 4, "font": {"size": 10},
            }  # fmt: skip


def slice_of(answer: Answer, method: str, axis: Axis, trials: Sequence[TrialRecord]) -> Figure:
    """The score by one key; stopped trials are hollow."""
    own = [record for record in trials if axis.key in record.values]
    number = colour_of(answer)[method]
    trace: Figure = {
        "type": "scatter", "mode": "markers", "trials": [record.number for record in own], "showlegend": False,
        "x": [show_value(r.values[axis.key]) if axis.choices else r.values[axis.key] for r in own],
        "y": [_short(record.score) for record in own],
        "marker": {
            "size": 7, "opacity": 0.7, "color": _colour(number),
            "symbol": ["circle" if record.state == "finished" else "circle-open" for record in own],
        },
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    if axis.choices:
        trace["x"] = [_text(text) for text in trace["x"]]
        scale: Figure = {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [_text(c) for c in axis.choices],
        }
    else:
        scale = _log_scale(axis) if axis.log else {"type": "linear", "nticks": 6}
    layout = {
        "height": 210, "hovermode": "closest", "margin": {"l": 48, "r": 12, "t": 8, "b": 30},
        "xaxis": scale,
        "yaxis": {"title": {"text": f"{metric_title(answer.metric)}, %"}},
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def _log_scale(axis: Axis) -> Figure:
    """A logarithmic scale with its ends and the powers of ten between them."""
    low, high = math.log10(axis.low), math.log10(axis.high)
    inside = [
        10.0**k
        for k in range(math.ceil(low), math.floor(high) + 1)
        if 0.15 * (high - low) < k - low < 0.85 * (high - low)
    ]
    ticks = [axis.low, *inside, axis.high]
    pad = 0.05 * (high - low)
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": list(map(show_value, ticks)),
        "range": [low - pad, high + pad],
    }


def _by_method(traces: list[Figure], names: list[str], title: str) -> Figure:
    layout: Figure = {
        "height": 96 + 34 * len(names), "hovermode": "closest", "margin": {"t": 8},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": title}},
        "yaxis": {"tickvals": list(range(len(names))), "ticktext": names, "range": [-0.6, len(names) - 0.4], "zeroline": False},
    }  # fmt: skip
    if len([trace for trace in traces if trace.get("showlegend")]) > 1:
        layout["margin"]["t"] = 40
    return {"data": traces, "layout": layout}


def _seed_dots(dots: Sequence[tuple[float, float]], number: int) -> Figure:
    return {
        "type": "scatter", "mode": "markers", "showlegend": False, "hovertemplate": "one seed: %{x:.2f} %<extra></extra>",
        "x": [_short(value) for _, value in dots], "y": [height for height, _ in dots],
        "marker": {"size": 5, "opacity": 0.45, "color": _colour(number)},
    }  # fmt: skip


def _bars(ends: Sequence[tuple[float, float | None, float | None]]) -> Figure:
    above = [0.0 if high is None else _short(high - mean, 4) for mean, _, high in ends]
    below = [0.0 if low is None else _short(mean - low, 4) for mean, low, _ in ends]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 2, "width": 5}


def _ends(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:.2f}, no interval" if low is None or high is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _key_title(key: str) -> str:
    """The end of a key, as much as fits."""
    text = key.removeprefix("method.")
    return _text(text if len(text) <= MAX_TITLE else "…" + text[-MAX_TITLE + 1 :])


def _name(method: str) -> str:
    return _text(method if len(method) <= MAX_NAME else method[: MAX_NAME - 1] + "…")


def _text(text: str) -> str:
    """A text in which plotly sees no tags; quotes stay, as plotly does not decode them."""
    return escape(text, quote=False)


def _short(value: float | None, digits: int = 3) -> float:
    return round(value or 0.0, digits)
