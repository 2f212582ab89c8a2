"""The answer of a sweep as leaderboard.csv and as tables for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.metric_names import metric_title
from pipeline.tuning.answer import BEST, CONCATENATED, LAST, TITLES, VALIDATION, Answer, Row, Spent
from pipeline.tuning.statistics import COMPARISON, INTERVAL, Estimate

COLUMNS = (
    "sweep", "protocol", "method", "chosen_trial", "setting", "figures", "metric", "mean", "low", "high", "seeds", "interval",
    "compared_with", "difference", "difference_low", "difference_high", "p_holm", "share_won", "verdict", "comparison",
    *(f"{stage}_{name}" for stage in ("search", "final") for name in Spent.__dataclass_fields__),
)  # fmt: skip


def leaderboard_csv(answer: Answer) -> str:
    """A line a method, kind of figures and metric; numbers with all digits, cells empty where there is no number.

    The comparison stands in the lines of the metric and kind that methods are compared by. A method
    without figures has one line, which tells what it has cost.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in answer.rows:
        common = _common(answer, row)
        lines = [
            common | _figure(answer, row, kind, metric, found)
            for kind in answer.kinds
            for metric in answer.metrics
            if (found := row.estimate(kind, metric)) is not None
        ]
        writer.writerows(lines or [common])
    return out.getvalue()


def _common(answer: Answer, row: Row) -> dict[str, Any]:
    """The columns that all lines of a method share."""
    values = {
        "sweep": answer.name,
        "protocol": answer.protocol,
        "method": row.method,
        "chosen_trial": "" if row.trial is None else row.trial,
        "setting": json.dumps(row.setting, sort_keys=True),
    }
    for stage, spent in (("search", row.search), ("final", row.final)):
        values |= {f"{stage}_{name}": getattr(spent, name) for name in Spent.__dataclass_fields__}
    return values


def _figure(answer: Answer, row: Row, kind: str, metric: str, found: Estimate) -> dict[str, Any]:
    values: dict[str, Any] = {"figures": TITLES[kind], "metric": metric, **_ends(found)}
    values |= {"seeds": found.seeds, "interval": INTERVAL if found.low is not None else "none: one seed"}
    if (kind, metric) == (answer.kind, answer.metric):
        values["verdict"] = answer.verdict(row)
        if row.comparison is not None:
            difference = _ends(row.comparison.difference)
            values |= {"compared_with": row.comparison.reference, "difference": difference.pop("mean")}
            values |= {f"difference_{end}": value for end, value in difference.items()}
            values |= {"p_holm": "" if row.comparison.p is None else row.comparison.p}
            values |= {"share_won": row.comparison.won, "comparison": COMPARISON}
    return values


def _ends(found: Estimate) -> dict[str, Any]:
    return {end: "" if (value := getattr(found, end)) is None else value for end in ("mean", "low", "high")}


def terminal_tables(answer: Answer) -> list[Table]:
    """Leaderboard, chosen settings and budget, each at most 100 columns wide."""
    return [_leaderboard(answer), _settings(answer), _budget(answer)]


def show_answer(answer: Answer) -> None:
    """Prints the tables, and what weakens the comparison."""
    out = Console(markup=False, emoji=False)
    for table in terminal_tables(answer):
        out.print(table)
    for line in [*answer.warnings, *answer.notes]:
        out.print(line, highlight=False, soft_wrap=True)


def short_estimate(found: Estimate | None, signed: bool = False) -> str:
    """A mean with its interval, in percent or points: "31.2 [30.1, 32.3]"; "–" where there is none."""
    if found is None:
        return "–"
    sign = "+" if signed else ""
    if found.low is None or found.high is None:
        return f"{found.mean:{sign}.1f}"
    return f"{found.mean:{sign}.1f} [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"


def _leaderboard(answer: Answer) -> Table:
    kinds = [kind for kind in answer.kinds if kind != VALIDATION] or [VALIDATION]
    table = _table(f"{answer.name}: {metric_title(answer.metric)} in %, {answer.protocol} protocol", answer.rows)
    for kind in kinds:
        table.add_column(_short_title(kind), justify="right", max_width=18)
    compared = ("difference", "won", "verdict") if len(answer.rows) > 1 else ()
    for name in ("seeds", *compared):
        table.add_column(name, justify="left" if name == "verdict" else "right")
    for row in answer.rows:
        found, comparison = row.estimate(answer.kind, answer.metric), row.comparison
        cells = [short_estimate(row.estimate(kind, answer.metric)) for kind in kinds]
        cells.append(str(found.seeds) if found else "0")
        if compared:
            cells.append(short_estimate(comparison.difference, signed=True) if comparison else "–")
            cells += [f"{comparison.won:.0%}" if comparison else "–", answer.verdict(row)]
        table.add_row(*map(Text, [row.method, *cells]))
    return table


def _short_title(kind: str) -> str:
    return {CONCATENATED: "concatenated", BEST: "best, chosen on TEST", LAST: "last", VALIDATION: "validation"}.get(
        kind, kind
    )


def _settings(answer: Answer) -> Table:
    chosen_on = "TEST classes" if answer.protocol == "paper" else "validation"
    table = _table(f"Chosen settings, by {metric_title(answer.metric)} on {chosen_on}", answer.rows)
    table.add_column("trial", justify="right")
    table.add_column("score", justify="right")
    table.add_column("setting", overflow="fold", max_width=60)
    for row in answer.rows:
        setting = ", ".join(f"{key}={show_value(value)}" for key, value in row.setting.items())
        trial, score = ("–", "–") if row.trial is None else (str(row.trial), f"{row.score:.1f}")
        table.add_row(*map(Text, [row.method, trial, score, setting or "–"]))
    return table


def show_value(value: Any) -> str:
    """A drawn value in few characters: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _budget(answer: Answer) -> Table:
    table = _table("Spent", answer.rows)
    table.add_column("stage")
    for name in ("finished", "stopped", "failed", "running", "images", "hours", "GPU-hours"):
        table.add_column(name, justify="right")
    for row in answer.rows:
        for stage, spent in (("search", row.search), ("final", row.final)):
            if spent != Spent():
                counts = [f"{n:,}" for n in (spent.finished, spent.stopped, spent.failed, spent.running, spent.images)]
                hours = [f"{spent.hours:,.2f}", f"{spent.gpu_hours:,.2f}"]
                table.add_row(*map(Text, [row.method, stage, *counts, *hours]))
    return table


def _table(title: str, rows: Sequence[Row]) -> Table:
    """A table whose first column is the method, a column of at most 18 characters."""
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column(
        "method", overflow="fold", max_width=18, min_width=max((min(18, len(row.method)) for row in rows), default=6)
    )
    return table
