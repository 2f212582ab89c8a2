"""The terminal display of a run: a progress bar, or plain lines where there is no terminal, and the final table."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.metric_names import COUNTS
from pipeline.runs.run_folder import SUMMARY, TRACKING
from pipeline.runs.summary import warnings
from pipeline.storage import Folder

LINE_EVERY_S = 15.0


class Display:
    """Shows the status of a run.

    Args:
        console: A terminal gets a live bar, anything else a line every 15 s and at every change of
            phase.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task: TaskID = self.bar.add_task("starting workers", total=None, note="")
        self.phase, self.printed = "starting workers", 0.0

    def __enter__(self) -> Display:
        self.bar.start()
        if self.bar.disable:
            self.console.print(self.phase)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, state: dict[str, Any]) -> None:
        for message in state["messages"]:
            self.console.print(message, highlight=False, soft_wrap=True)
        progress = state["progress"]
        if not progress:
            return
        phase = progress["phase"]
        note = _note(progress)
        if "step" in progress:
            self.bar.update(
                self.task, description=phase, completed=progress["step"], total=progress["total"], note=note
            )
        else:
            self.bar.update(self.task, description=phase, note="")
        now = time.monotonic()
        changed = phase != self.phase
        if self.bar.disable and (changed or (note and now - self.printed > LINE_EVERY_S)):
            self.console.print(f"{phase} {note}".strip(), highlight=False, soft_wrap=True)
            self.printed = now
        self.phase = phase


def _note(progress: dict[str, Any]) -> str:
    if "step" not in progress:
        return ""
    step, total, speed = progress["step"], progress["total"], progress["images_per_second"]
    loss = f" loss {progress['loss']:.4f}" if "loss" in progress else ""
    return f"{step}/{total}{loss} {speed:.0f} images/s, {progress['waiting']:.1%} waiting for data"


def summary_table(summary: dict[str, Any]) -> Table:
    """Frozen trunk beside the trained embedding, in percent."""
    return metrics_table(summary["final"], summary["frozen"])


def metrics_table(metrics: dict[str, Any], before: dict[str, Any] | None = None) -> Table:
    """Metrics in percent, with those of the frozen trunk before them if given."""
    table = Table(caption_justify="left")
    table.add_column("%")
    for column in ("frozen", "trained", "gain") if before else ("value",):
        table.add_column(column, justify="right")
    for name, value in metrics.items():
        if name in COUNTS:
            continue
        frozen = (before or {}).get(name)
        cells = (
            (f"{frozen:.2f}", f"{value:.2f}", f"{value - frozen:+.2f}")
            if frozen is not None
            else ("", f"{value:.2f}", "")
        )
        table.add_row(name, *(cells if before else (f"{value:.2f}",)))
    queries, num_without_positive = metrics.get("queries", 0), metrics.get("queries_without_positive", 0)
    table.caption = f"{queries:,.0f} queries" + (
        f", {num_without_positive:,.0f} more without a positive left out" if num_without_positive else ""
    )
    return table


def dims_table(by_dim: dict[str, dict[str, Any]]) -> Table:
    """Metrics in percent by number of dimensions kept, a row each."""
    names = [name for name in next(iter(by_dim.values())) if name not in COUNTS]
    table = Table()
    for column in ("dimensions", *names):
        table.add_column(column, justify="right")
    for dim, metrics in by_dim.items():
        table.add_row(dim, *(f"{metrics[name]:.2f}" for name in names))
    return table


def show_summary(folder: Folder) -> None:
    summary = folder.read_json(SUMMARY)
    out = Console(markup=False, emoji=False)
    out.print(f"{summary['name']}: retrieval on classes never seen in training", highlight=False, soft_wrap=True)
    out.print(summary_table(summary))
    if "by_dim" in summary:
        out.print(dims_table(summary["by_dim"]))
    out.print(
        f"{summary['images']:,} images in {summary['seconds']:.0f} s, {summary['images_per_second']:.1f} images/s; "
        f"protocol: {summary['protocol']['profile']}, {summary['protocol']['checkpoint']} checkpoint",
        highlight=False,
    )
    for warning in warnings(summary):
        out.print(warning, highlight=False, soft_wrap=True)
    if "partial" in summary["protocol"]:
        out.print(f"partial dataset: {summary['protocol']['partial']}", highlight=False, soft_wrap=True)
    for name, kept in (folder.read_json(TRACKING) if folder.exists(TRACKING) else {}).items():
        missing = f": failed ({kept['problem']}); the same command sends what is missing" if kept.get("problem") else ""
        out.print(f"tracking: {name} {kept.get('url', '')}".rstrip() + missing, highlight=False, soft_wrap=True)
    out.print(f"report: {folder}/report.html", highlight=False, soft_wrap=True)
