"""Sections of README.md and the documentation that are written from kept records."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def with_sections(text: str, kind: str, render: Callable[[str], str | None]) -> str:
    """A page in which every `<!-- KIND: what -->` ... `<!-- end -->` has the text of `render(what)`; None leaves it as it is."""

    def section(match: re.Match[str]) -> str:
        opening, what, end = match.groups()
        body = render(what)
        return match[0] if body is None else f"{opening}{body}{end}"

    return re.sub(rf"(<!-- {kind}: (.+?) -->\n).*?(\n<!-- end -->)", section, text, flags=re.DOTALL)
