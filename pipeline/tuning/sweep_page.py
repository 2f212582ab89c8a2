"""A sweep as one HTML page that needs no network: leaderboard, curves, every trial's place, importance.

The page holds plotly.js (4.9 MB) once. Only that script and sweep.js can run: the page's policy names
their hashes, so no text of a name or a value is ever run, and nothing can be loaded or sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline.runs
from pipeline.exploration.html_page import html_page
from pipeline.metric_names import metric_title
from pipeline.tuning import sweep_charts as charts
from pipeline.tuning import sweep_tables as tables
from pipeline.tuning.answer import TITLES, Answer
from pipeline.tuning.importance import Importance
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_folder import TrialRecord

if TYPE_CHECKING:
    from pipeline.tuning.sweep_config import SweepConfig

HOW_TO_READ_TRIALS = (
    "Each line is a trial: where it lies on each axis is its value of that key, at the right its score; the stronger, the better. "
    "Keys that a setting does not have are drawn below the axis. Below, the score by each key; hollow: stopped before its full "
    "length. Failed trials and those without a score are in the table of trials only."
)


def sweep_page(
    sweep: SweepConfig,
    records: Sequence[TrialRecord],
    answer: Answer,
    importances: Mapping[str, Importance],
    config: str,
) -> str:
    """The page.

    Args:
        sweep: The sweep.
        records: All records of its trials.
        answer: Their answer.
        importances: Importance of the keys by method; a method without one has none shown.
        config: The resolved sweep file.
    """
    from plotly.offline import get_plotlyjs  # here: only who writes a page needs the script

    figures: dict[str, charts.Figure] = {}
    body = [
        _header(sweep, records, answer),
        _leaderboard(answer, figures),
        _curves(answer, records, figures),
        _places(sweep, records, answer, importances, figures),
        f'<section id="spent">\n<h2>Spent</h2>\n{tables.budget(answer)}</section>',
        f'<section id="all-trials">\n<h2>All trials</h2>\n{tables.all_trials(answer, records)}</section>',
        _protocol(sweep, answer),
        f'<section id="config">\n<h2>Sweep file</h2>\n<details><summary>The resolved sweep</summary>'
        f"<pre>{escape(config)}</pre></details>\n</section>",
    ]
    labels = {record.number: charts.label(record, answer.metric) for record in records}
    data = json.dumps({"labels": labels, "figures": figures}, separators=(",", ":"), allow_nan=False)
    css = "".join(
        path.read_text(encoding="utf-8")
        for path in (Path(pipeline.runs.__file__).with_name("report.css"), Path(__file__).with_name("sweep.css"))
    )
    data = data.replace("<", "\\u003c")  # the same text in JSON, and no tag in HTML
    body.append(f'<script type="application/json" id="charts">{data}</script>')
    scripts = (get_plotlyjs(), Path(__file__).with_name("sweep.js").read_text(encoding="utf-8"))
    return html_page(sweep.name, css, "\n".join(body), scripts, images="data: blob:").decode()


def _header(sweep: SweepConfig, records: Sequence[TrialRecord], answer: Answer) -> str:
    warnings = "".join(f"<li>{escape(text)}</li>" for text in answer.warnings)
    paper = f'<p class="warning">{escape(answer.notes[0])}</p>' if answer.protocol == "paper" else ""
    images, hours = sum(record.images for record in records), sum(record.busy_s for record in records) / 3600
    progress = f" Not finished: {answer.running} (running, or interrupted)." if answer.running else ""
    return f"""<header>
<p class="eyebrow">raydml · deep metric learning · sweep</p>
<h1>{escape(sweep.name)}</h1>
<p class="key">{_key_sentence(answer)}</p>
{paper}
{f'<div class="warning"><ul>{warnings}</ul></div>' if warnings else ""}
<p class="note">{len(sweep.methods)} method{"s" if len(sweep.methods) > 1 else ""}, {len(records):,} trials, {images:,} images
trained on, {hours:,.2f} hours of trials.{progress}</p>
</header>"""


def _key_sentence(answer: Answer) -> str:
    best = answer.rows[0]
    found = best.estimate(answer.kind, answer.metric)
    if found is None:
        return "No trial has been measured yet."
    interval = "" if found.low is None or found.high is None else f" ({found.low:.1f} to {found.high:.1f})"
    where = "classes never seen in training" if answer.kind == "test" else TITLES[answer.kind]
    text = (
        f"Best on {escape(where)}: {escape(best.method)}, {escape(metric_title(answer.metric))} "
        f"<strong>{found.mean:.1f} %</strong>{interval}."
    )
    close = [escape(row.method) for row in answer.rows if row.comparison and row.comparison.within_noise]
    if close:
        return f"{text} Within noise of it: {', '.join(close)}."
    if any(row.comparison and row.comparison.within_noise is None for row in answer.rows):
        return f"{text} One seed cannot tell whether it is really better."
    return text


def _plot(name: str, caption: str, figure: charts.Figure, figures: dict[str, charts.Figure]) -> str:
    """A place for a chart, and the chart among `figures`."""
    figures[name] = figure
    return (
        f'<figure class="chart">\n<figcaption>{escape(caption)}</figcaption>\n<div class="chart-area" id="{name}" role="img" '
        f'aria-label="{escape(caption)}" style="height:{figure["layout"]["height"]}px"></div>\n</figure>\n'
    )


def _leaderboard(answer: Answer, figures: dict[str, charts.Figure]) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in answer.notes)
    plots = ""
    if answer.kinds:
        plots += _plot("intervals", "Means, 95 % Student t intervals over seeds", charts.intervals(answer), figures)
        if difference := charts.differences(answer):
            plots += _plot("differences", "Differences from the best; hollow: within noise", difference, figures)
    return (
        f'<section id="answer">\n<h2>Methods</h2>\n{tables.leaderboard(answer)}{notes}<div class="charts">\n{plots}</div>\n'
        f"<h3>Chosen settings</h3>\n{tables.settings(answer)}</section>"
    )


def _curves(answer: Answer, records: Sequence[TrialRecord], figures: dict[str, charts.Figure]) -> str:
    classes = "TEST" if answer.protocol == "paper" else "validation"
    figure = charts.curves(answer, records)
    caption = f"{metric_title(answer.metric)} on {classes} classes, a line a run; thick: the chosen trials"
    content = _plot("learning-curves", caption, figure, figures) if figure else "<p>No run has been validated yet.</p>"
    return f'<section id="curves">\n<h2>Learning curves</h2>\n{content}</section>'


def _places(
    sweep: SweepConfig,
    records: Sequence[TrialRecord],
    answer: Answer,
    importances: Mapping[str, Importance],
    figures: dict[str, charts.Figure],
) -> str:
    """A part a method: parallel coordinates, slices and importance."""
    parts = []
    for i, row in enumerate(answer.rows):
        method = row.method
        trials = [
            record
            for record in records
            if (record.method, record.stage) == (method, "search")
            and record.score is not None
            and math.isfinite(record.score)
        ]
        axes = charts.axes_of(Space(sweep.space_of(method)), trials)
        if not axes:
            content = '<p class="note">Fewer than two settings have a score.</p>\n'
        else:
            caption = f"{len(trials)} trials of {method}"
            plot = _plot(f"parallel-{i}", caption, charts.parallel(answer, method, axes, trials), figures)
            content = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n<div class="parallel">{plot}</div></div>\n'
            slices = [
                _plot(f"slice-{i}-{j}", axis.key, charts.slice_of(answer, method, axis, trials), figures)
                for j, axis in enumerate(axes)
            ]
            content += f'<div class="slices">\n{"".join(slices)}</div>\n'
        if method in importances:
            content += tables.importance_table(importances[method], i)
        parts.append(
            f'<details class="method"{" open" if i < 3 else ""}><summary>{escape(method)}</summary>\n{content}</details>\n'
        )
    return (
        f'<section id="places">\n<h2>Every trial\'s place</h2>\n<p class="note">{HOW_TO_READ_TRIALS}</p>\n'
        f"{''.join(parts)}</section>"
    )


def _protocol(sweep: SweepConfig, answer: Answer) -> str:
    """How it was measured, in words."""
    terms = "\n".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _terms(sweep, answer))
    return f'<section id="protocol">\n<h2>Protocol</h2>\n<dl>{terms}</dl>\n</section>'


def _counted(name: str, numbers: Sequence[int]) -> str:
    return f"{name}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _terms(sweep: SweepConfig, answer: Answer) -> list[tuple[str, str]]:
    metric, final, budget = metric_title(sweep.metric), sweep.final, sweep.budget
    seeds = _counted("seed", sweep.seeds)
    if sweep.protocol == "paper":
        chosen = f"by {metric} on the TEST classes, as published results mostly were: the mean over {seeds}"
        measured = "each trial on the test classes at every validation; best and last checkpoint are both shown"
    else:
        chosen = (
            f"by {metric} on validation classes, which are training classes held out: the mean over {_counted('fold', sweep.folds)} "
            f"and {seeds} of each run's best validation; the test classes play no part"
        )
        if final is None:
            measured = "the test classes were not measured"
        elif final.classes == "all":
            measured = (
                f"once, by final runs on all training classes with {_counted('seed', final.seeds)}, last checkpoint"
            )
        else:
            measured = (
                f"once, by final runs on the same folds with {_counted('seed', final.seeds)}, best checkpoint by "
                "validation; a seed's figure is the mean over its folds"
            )
    limits: dict[str, Any] = {"trials a method": budget.trials, "hours": budget.hours, "GPU-hours": budget.gpu_hours}
    spent = (
        ", ".join(f"{value:g} {name}" for name, value in limits.items() if value is not None)
        or "every combination of the grid"
    )
    scheduler = {
        "none": "no trial is stopped early",
        "asha": "asynchronous successive halving (ASHA) by images trained on, methods apart",
        "median": "the median rule by images trained on, methods apart",
        "pbt": "population-based training: settings change during a trial",
    }[sweep.scheduler.name]
    return [
        ("protocol", sweep.protocol),
        ("settings chosen", chosen),
        ("test classes" if sweep.protocol == "fair" else "measured", measured),
        ("search", f"{sweep.searcher.name}, seed {sweep.searcher.seed}, a search of its own for each method"),
        ("stopping", scheduler),
        ("budget", spent),
        ("intervals", "95 %, Student's t over seeds; none with one seed"),
        (
            "differences",
            "from the best method, paired by seed; two-sided paired t-test, p corrected by Holm for the number of comparisons; "
            "within noise where p is above 0.05",
        ),
        ("compared by", f"{metric}, {TITLES[answer.kind]}"),
    ]
