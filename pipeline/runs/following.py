"""What a running program writes, shown until it ends: tables that are drawn again in a terminal, elsewhere a line at each change.

Serves runs (`watch_run`) and sweeps (`pipeline.tuning.watch`), whose readers and texts differ.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from rich import table as rich_table
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipeline.console import aligned
from pipeline.errors import RunError, one_line

Rows = list[tuple[str, ...]]


class Table(NamedTuple):
    """A title, and rows of equal length, of which the first is the header."""

    title: str
    rows: Rows


@runtime_checkable
class Ends(Protocol):
    """What was read at one moment."""

    @property
    def ended(self) -> bool:
        """Nothing will change any more."""
        ...


Seen = TypeVar("Seen", bound=Ends)


@dataclass(frozen=True)
class View(Generic[Seen]):
    """How something is read and told.

    Attributes:
        what: "the run" or "the sweep".
        read: Reads it as it is now.
        headlines: Its first lines.
        tables: Its tables, none of them empty.
        changes: What happened between two moments, a line each.
        as_json: Everything as JSON.
    """

    what: str
    read: Callable[[], Seen]
    headlines: Callable[[Seen], Iterable[str]]
    tables: Callable[[Seen], Sequence[Table]]
    changes: Callable[[Seen, Seen], Iterable[str]]
    as_json: Callable[[Seen], Any]

    def as_lines(self, seen: Seen) -> Iterator[str]:
        """Everything as plain text."""
        yield from self.headlines(seen)
        for table in self.tables(seen):
            yield ""
            yield from aligned(table.rows)


def follow(view: View[Seen], first: Seen, every_s: float, as_json: bool = False) -> Seen:
    """Shows something until it ends; returns how it stood then.

    Args:
        view: How it is read and told.
        first: How it stands now; nothing is shown if it has ended.
        every_s: Time between two readings, seconds.
        as_json: One JSON object a line, at every reading that differs from the one before.

    Raises:
        UserError: A file is damaged.
    """
    if first.ended:
        return first
    out = Console(markup=False, emoji=False)
    shown: Lines[Seen] | Tables[Seen] = (
        JsonLines(view, out, first)
        if as_json
        else Tables(view, out, first)
        if out.is_terminal
        else Lines(view, out, first)
    )
    with shown:
        while not first.ended:
            time.sleep(every_s)
            try:
                first = view.read()
            except (RunError, OSError) as error:  # a storage that does not answer may do so later
                shown.tell(f"{view.what} cannot be read, trying again: {one_line(error)}")
            else:
                shown.show(first)
    return first


class Lines(Generic[Seen]):
    """A line at each change, after everything once."""

    def __init__(self, view: View[Seen], out: Console, first: Seen) -> None:
        self.view, self.out, self.last, self.problem = view, out, first, ""

    def __enter__(self) -> Lines[Seen]:
        for line in self._first():
            self._print(line)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: every line is out already."""

    def _first(self) -> Iterable[str]:
        return self.view.as_lines(self.last)

    def _lines(self, seen: Seen) -> Iterable[str]:
        return self.view.changes(self.last, seen)

    def show(self, seen: Seen) -> None:
        for line in self._lines(seen):
            self._print(line)
        self.last, self.problem = seen, ""

    def tell(self, problem: str) -> None:
        """Prints a problem, once as long as it lasts."""
        if problem != self.problem:
            self._print(problem)
        self.problem = problem

    def _print(self, line: str) -> None:
        self.out.print(line, highlight=False, soft_wrap=True)
        self.out.file.flush()


class JsonLines(Lines[Seen]):
    """A JSON object a line; a problem is an object with the key "problem"."""

    def _first(self) -> Iterator[str]:
        yield json.dumps(self.view.as_json(self.last))

    def _lines(self, seen: Seen) -> Iterator[str]:
        text = json.dumps(self.view.as_json(seen))
        if text != json.dumps(self.view.as_json(self.last)):
            yield text

    def tell(self, problem: str) -> None:
        super().tell(json.dumps({"problem": problem}))


class Tables(Generic[Seen]):
    """Tables that are drawn again at every reading; the last ones stay."""

    def __init__(self, view: View[Seen], out: Console, first: Seen) -> None:
        self.view, self.last = view, first
        self.live = Live(console=out, auto_refresh=False)

    def __enter__(self) -> Tables[Seen]:
        self.live.start()
        self.show(self.last)
        return self

    def __exit__(self, *_: object) -> None:
        self.live.vertical_overflow = "visible"
        self.live.stop()

    def show(self, seen: Seen) -> None:
        self._draw(seen)

    def tell(self, problem: str) -> None:
        """Shows a problem below the lines of the newest reading."""
        self._draw(self.last, problem)

    def _draw(self, seen: Seen, problem: str = "") -> None:
        self.last = seen
        lines = [Text(line) for line in (*self.view.headlines(seen), problem) if line]
        self.live.update(Group(*lines, *map(as_rich_table, self.view.tables(seen))), refresh=True)


def as_rich_table(table: Table) -> rich_table.Table:
    shown = rich_table.Table(title=table.title or None, title_justify="left")
    for column in table.rows[0]:
        shown.add_column(column, overflow="fold" if len(table.rows[0]) == 1 else "ellipsis")
    for row in table.rows[1:]:
        shown.add_row(*map(Text, row))
    return shown


def span(seconds: float) -> str:
    """A time in its two largest units: "2 h 5 min", "14 s"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
