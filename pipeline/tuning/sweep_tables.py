"""The tables of a sweep's page, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from pipeline.metric_names import metric_title
from pipeline.tuning.answer import TITLES, VALIDATION, Answer, Spent
from pipeline.tuning.importance import EVALUATOR, MIN_TRIALS, Importance
from pipeline.tuning.leaderboard import show_value
from pipeline.tuning.statistics import Estimate
from pipeline.tuning.sweep_folder import TrialRecord


class Column(NamedTuple):
    """A column's header: its title, a smaller second line, and whether it holds text, which stands at the left."""

    title: str
    small: str = ""
    is_text: bool = False

    def html(self, sortable: bool) -> str:
        small = f"<small>{escape(self.small)}</small>" if self.small else ""
        content = f"<span>{escape(self.title)}</span>{small}"
        content = f'<button type="button">{content}</button>' if sortable else content
        style = ' class="text"' if self.is_text else ""
        return f'<th scope="col"{style}>{content}</th>'


METHOD = Column("method", is_text=True)
SETTING = Column("setting", is_text=True)


def table(
    caption: str, head: Sequence[Column], rows: Iterable[str], name: str, sortable: bool = True, tall: bool = False
) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    cells = "".join(column.html(sortable) for column in head)
    return (
        f'<div class="scroll{" tall" if tall else ""}" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f'<table id="{name}">\n<caption>{escape(caption)}</caption>\n<thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody>\n</table>\n</div>\n"
    )


def cell(text: str, value: Any = None, kind: str = "") -> str:
    """A cell with the value that it is sorted by; without one, by its text."""
    sort = "" if value is None else f' data-value="{escape(str(value))}"'
    style = f' class="{kind}"' if kind else ""
    return f"<td{sort}{style}>{text}</td>"


def number(value: int | float | None, text: str = "", small: str = "") -> str:
    """A cell of a number; "–", which comes last in any order, where there is none."""
    if value is None:
        return '<td data-value="">–</td>'
    return cell((text or f"{value:,}") + (f"<small>{small}</small>" if small else ""), value)


def leaderboard(answer: Answer) -> str:
    """A row a method: every figure with its interval, and the difference from the best."""
    columns = [(kind, metric) for kind in answer.kinds for metric in answer.metrics]
    columns = [c for c in columns if any(row.estimate(*c) for row in answer.rows)]
    # What chose the settings stands last, and of it only the metric that chose.
    columns = [c for c in columns if c[0] != VALIDATION or answer.kind == VALIDATION or c[1] == answer.metric]
    first = (answer.kind, answer.metric)
    columns.sort(key=lambda c: (c != first, c[0] == VALIDATION != answer.kind))
    comparison = [
        Column("difference", f"from the best, {metric_title(answer.metric)}"), Column("p", "Holm"),
        Column("won", "of the seeds"), Column("verdict", is_text=True),
    ]  # fmt: skip
    figures = [Column(metric_title(metric), TITLES[kind]) for kind, metric in columns]
    head = [METHOD, *figures[:1], *comparison, *figures[1:], Column("seeds")]
    rows = []
    for row in answer.rows:
        cells = [_estimate(row.estimate(*column)) for column in columns]
        found, c = row.estimate(*first), row.comparison
        against = [
            _estimate(c.difference if c else None, "+"),
            number(c.p if c else None, f"{c.p:.3g}" if c and c.p is not None else ""),
            number(c.won if c else None, f"{c.won:.0%}" if c else ""),
            cell(escape(answer.verdict(row)), kind="text"),
        ]
        best = ' class="best"' if answer.verdict(row) == "best" else ""
        rows.append(
            f'<tr{best}><th scope="row">{escape(row.method)}</th>{"".join([*cells[:1], *against, *cells[1:]])}'
            f"{number(found.seeds if found else 0)}</tr>\n"
        )
    return table(f"Methods, the best first: %, {answer.protocol} protocol", head, rows, "leaderboard")


def _estimate(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return number(None)
    small = "" if found.low is None or found.high is None else f"{found.low:{sign}.2f} to {found.high:{sign}.2f}"
    return number(found.mean, f"{found.mean:{sign}.2f}", small)


def setting_text(values: dict[str, Any]) -> str:
    return "<br>".join(f"{escape(key)} = {escape(show_value(value))}" for key, value in values.items()) or "–"


def settings(answer: Answer) -> str:
    rows = [
        f'<tr><th scope="row">{escape(row.method)}</th>{number(row.trial)}'
        f"{number(row.score, '' if row.score is None else f'{row.score:.2f}')}{cell(setting_text(row.setting), kind='setting')}</tr>\n"
        for row in answer.rows
    ]
    chosen_on = "TEST classes" if answer.protocol == "paper" else "validation classes"
    head = [METHOD, Column("trial"), Column(f"{metric_title(answer.metric)}, %", chosen_on), SETTING]
    return table("The setting chosen for each method", head, rows, "settings")


def budget(answer: Answer) -> str:
    rows = []
    for row in answer.rows:
        for stage, spent in (("search", row.search), ("final", row.final)):
            if spent != Spent():
                counts = (spent.finished, spent.stopped, spent.failed, spent.running, spent.images)
                hours = (spent.hours, spent.gpu_hours)
                cells = [number(count) for count in counts] + [number(hour, f"{hour:,.2f}") for hour in hours]
                rows.append(
                    f'<tr><th scope="row">{escape(row.method)}</th>{cell(stage, kind="text")}{"".join(cells)}</tr>\n'
                )
    names = ("finished", "stopped", "failed", "running", "images", "hours", "GPU-hours")
    head = [METHOD, Column("stage", is_text=True), *map(Column, names)]
    return table(
        "Trials by state, images trained on, and time in which trials held their resources", head, rows, "budget"
    )


def importance_table(found: Importance, number_of_method: int) -> str:
    """Bars of each key, or why there are none."""
    trials = f"{found.trials} finished trial{'' if found.trials == 1 else 's'}"
    if found.reason:
        return (
            f'<p class="note">No importance of the keys: {escape(found.reason)} (there {"is" if found.trials == 1 else "are"} '
            f"{trials}; below {MIN_TRIALS} the shares would mostly be chance).</p>\n"
        )
    rows = [
        f'<tr><th scope="row">{escape(key)}</th>{number(share, f"{share:.0%}")}'
        f'<td class="bars"><span class="bar" style="width:{100 * share:.1f}%"></span></td></tr>\n'
        for key, share in found.shares.items()
    ]
    left_out = ""
    if found.left_out:
        names = ", ".join(escape(key) for key in found.left_out)
        left_out = f'<p class="note">Left out, as not all trials have them: {names}.</p>\n'
    caption = f"Importance: share of the score's variance ({EVALUATOR}, {trials})"
    return (
        table(
            caption,
            [Column("key"), Column("share"), Column("")],
            rows,
            f"importance-{number_of_method}",
            sortable=False,
        )
        + left_out
    )


def all_trials(answer: Answer, records: Sequence[TrialRecord]) -> str:
    """A row a trial: its setting, how it went, and the names of its runs."""
    texts = [Column(name, is_text=True) for name in ("stage", "state", "runs", "remarks")]
    counts = map(Column, (f"{metric_title(answer.metric)}, %", "images", "hours", "starts"))
    head = [Column("trial"), METHOD, *texts[:2], *counts, SETTING, *texts[2:]]
    rows = []
    for record in records:
        hours = record.busy_s / 3600
        remarks = ["given in the sweep's file"] if record.given else []
        remarks += [f"error: {record.error}"] if record.error else []
        remarks += [f"started again: {line}" for line in record.retried]
        remarks += [
            f"setting changed after {change['images']:,} images, copied from trial {change['copied_from']}"
            for change in record.history
        ]
        rows.append(
            f'<tr><th scope="row" data-value="{record.number}">{record.number}</th>{cell(escape(record.method), kind="text")}'
            f"{cell(record.stage, kind='text')}{cell(record.state, kind='text')}"
            f"{number(record.score, '' if record.score is None else f'{record.score:.2f}')}{number(record.images)}"
            f"{number(hours, f'{hours:,.2f}')}{number(record.starts)}{cell(setting_text(record.values), kind='setting')}"
            f"{cell('<br>'.join(escape(run.name) for run in record.runs), kind='text')}"
            f"{cell('<br>'.join(map(escape, remarks)), kind='wrap')}</tr>\n"
        )
    return (
        '<div class="filter"><input type="search" data-table="trials" placeholder="method, state, key = value" '
        'aria-label="Show only trials with these words"><span role="status"></span></div>\n'
        + table(f"{len(records)} trials, search and final", head, rows, "trials", tall=True)
    )
