"""The rows of a diagnosis: what was found, what was expected, what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.errors import masked

Status = Literal["ok", "warning", "fails"]
_STYLES = {"ok": "green", "warning": "yellow", "fails": "bold red"}
WIDTH_OF_FILES = 160  # characters of a line where the table is not printed to a terminal
_NODES_NAMED = 4  # of those with the same finding; the others are counted


@dataclass(frozen=True)
class Row:
    """The result of one check.

    Attributes:
        check: What was checked.
        status: "fails" where a run would fail.
        found: What was found.
        expected: What was expected.
        change: What to change; "" where nothing has to be.
    """

    check: str
    status: Status
    found: str
    expected: str
    change: str = ""

    def shown(self) -> Row:
        """The row as it is printed: secrets in addresses are masked."""
        return Row(self.check, self.status, masked(self.found), masked(self.expected), masked(self.change))


def graded(check: str, found: str, expected: str, *, fails: str = "", warning: str = "") -> Row:
    """A row whose status follows from what has to be changed: with `fails`, else with `warning`, else nothing."""
    status: Status = "fails" if fails else "warning" if warning else "ok"
    return Row(check, status, found, expected, fails or warning)


def together(rows: Mapping[str, Row]) -> list[Row]:
    """The rows of one check on several nodes, those that are equal as one that names its nodes.

    Args:
        rows: Row of each node, by the node's address.
    """
    nodes: dict[Row, list[str]] = {}
    for node, row in rows.items():
        nodes.setdefault(row, []).append(node)
    if len(rows) < 2:
        return list(nodes)
    out = []
    for row, names in nodes.items():
        where = f"all {len(rows)} nodes" if len(names) == len(rows) else named(names)
        out.append(Row(row.check, row.status, f"{row.found} ({where})", row.expected, row.change))
    return out


def named(names: Sequence[str]) -> str:
    """Some names, the first few of many."""
    more = len(names) - _NODES_NAMED
    return ", ".join(names[:_NODES_NAMED]) + (f" and {more} more" if more > 0 else "")


def worst(rows: Sequence[Row]) -> Status:
    """The status of a whole diagnosis."""
    statuses = {row.status for row in rows}
    return "fails" if "fails" in statuses else "warning" if "warning" in statuses else "ok"


def print_table(title: str, rows: Sequence[Row], console: Console | None = None) -> None:
    """Prints the rows as a table, and a line that counts them."""
    out = console or Console(markup=False, emoji=False)
    if console is None and not out.is_terminal:
        out.width = WIDTH_OF_FILES
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    table.add_column("check", overflow="fold", min_width=12)
    for column, ratio in (("found", 3), ("expected", 2), ("what to change", 3)):
        table.add_column(column, overflow="fold", ratio=ratio)
    for row in (row.shown() for row in rows):
        table.add_row(
            row.status,
            row.check,
            row.found,
            row.expected,
            row.change,
            style=_STYLES[row.status] if row.status != "ok" else None,
        )
    out.print(table)
    counts = {status: sum(row.status == status for row in rows) for status in _STYLES}
    verdict = {"ok": "a run can start", "warning": "a run can start", "fails": "a run would fail"}[worst(rows)]
    out.print(
        f"{verdict}: {counts['ok']} ok, {counts['warning']} with a warning, {counts['fails']} that fail",
        highlight=False,
    )


def as_json(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The diagnosis as one object."""
    return {"run": name, "status": worst(rows), "checks": [asdict(row.shown()) for row in rows]}


def size(num_bytes: float | int) -> str:
    """A number of bytes in MB or GB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
