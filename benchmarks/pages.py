"""Sections and tables of README.md and the documentation that are written from kept records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pipeline.errors import UserError

ROOT = Path(__file__).parents[1]


def with_sections(text: str, kind: str, render: Callable[[str], str | None]) -> str:
    """A page in which every `<!-- KIND: what -->` ... `<!-- end -->` has the text of `render(what)`; None leaves it as it is.

    Raises:
        UserError: The page has no such section.
    """

    def section(match: re.Match[str]) -> str:
        opening, what, end = match.groups()
        body = render(what)
        return match[0] if body is None else f"{opening}{body}\n{end}"

    result, number = re.subn(rf"(<!-- {kind}: (.+?) -->\n)(?:.*?\n)??(<!-- end -->)", section, text, flags=re.DOTALL)
    if not number:
        raise UserError(f"there is no <!-- {kind}: ... --> to write into in: {text[:60]!r}")
    return result


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines)
