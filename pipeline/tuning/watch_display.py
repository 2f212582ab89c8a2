"""A sweep shown until it ends: tables that are drawn again in a terminal, elsewhere a line at each change."""

from __future__ import annotations

import time

from rich import table as rich_table
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipeline.errors import RunError, one_line
from pipeline.tuning.watch import Snapshot, SweepReader
from pipeline.tuning.watch_text import Table, as_lines, changes, headlines, tables


def follow(reader: SweepReader, first: Snapshot, every_s: float) -> Snapshot:
    """Shows a sweep until it ends; returns how it stood then.

    Args:
        reader: Reads the sweep.
        first: How it stands now; nothing is shown if it has ended.
        every_s: Time between two readings, seconds.

    Raises:
        UserError: A file of the sweep is damaged.
    """
    if first.ended:
        return first
    out = Console(markup=False, emoji=False)
    with Tables(out, first) if out.is_terminal else Lines(out, first) as shown:
        while not first.ended:
            time.sleep(every_s)
            try:
                first = reader.read()
            except (RunError, OSError) as error:  # a storage that does not answer may do so later
                shown.tell(f"the sweep cannot be read, trying again: {one_line(error)}")
            else:
                shown.show(first)
    return first


class Lines:
    """A line at each change, after the tables once."""

    def __init__(self, out: Console, first: Snapshot) -> None:
        self.out, self.last, self.problem = out, first, ""

    def __enter__(self) -> Lines:
        for line in as_lines(self.last):
            self._print(line)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: every line is out already."""

    def show(self, sweep: Snapshot) -> None:
        for line in changes(self.last, sweep):
            self._print(line)
        self.last, self.problem = sweep, ""

    def tell(self, problem: str) -> None:
        """Prints a problem, once as long as it lasts."""
        if problem != self.problem:
            self._print(problem)
        self.problem = problem

    def _print(self, line: str) -> None:
        self.out.print(line, highlight=False, soft_wrap=True)
        self.out.file.flush()


class Tables:
    """Tables that are drawn again at every reading; the last ones stay."""

    def __init__(self, out: Console, first: Snapshot) -> None:
        self.last = first
        self.live = Live(console=out, auto_refresh=False)

    def __enter__(self) -> Tables:
        self.live.start()
        self.show(self.last)
        return self

    def __exit__(self, *_: object) -> None:
        self.live.vertical_overflow = "visible"
        self.live.stop()

    def show(self, sweep: Snapshot) -> None:
        self._draw(sweep)

    def tell(self, problem: str) -> None:
        """Shows a problem below the lines of the newest reading."""
        self._draw(self.last, problem)

    def _draw(self, sweep: Snapshot, problem: str = "") -> None:
        self.last = sweep
        lines = [Text(line) for line in (*headlines(sweep), problem) if line]
        self.live.update(Group(*lines, *map(as_rich_table, tables(sweep))), refresh=True)


def as_rich_table(table: Table) -> rich_table.Table:
    shown = rich_table.Table(title=table.title or None, title_justify="left")
    for column in table.rows[0]:
        shown.add_column(column, overflow="fold" if len(table.rows[0]) == 1 else "ellipsis")
    for row in table.rows[1:]:
        shown.add_row(*map(Text, row))
    return shown
