"""A report read back: its tags, its text, and the classes of the pixels in its gallery."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

HOSTILE = '<b>&"x'
LONELY = "lonely"  # one image: a query with nothing to find
# Neither red nor green, so that the frames stand out from what they frame.
COLOUR_OF = {
    HOSTILE: (40, 60, 200),
    "yellow": (230, 220, 60),
    "magenta": (200, 40, 200),
    "cyan": (40, 200, 210),
    "grey": (120, 120, 120),
    "navy": (10, 10, 90),
    LONELY: (250, 250, 250),
}


class Page(HTMLParser):
    """What a report holds: all tags, its text, and the gallery by group."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.groups: dict[str, list[tuple[dict[str, str], list[dict[str, str]]]]] = {}
        self.text = ""
        self._in_mark = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        classes = values.get("class", "").split()
        self._in_mark = classes == ["mark"]
        if "group" in classes:
            self.groups[values["id"]] = []
        elif tag == "figure" and "query" in classes:
            list(self.groups.values())[-1].append((values, []))
        elif tag == "figure" and "neighbour" in classes:
            values["verdict"] = classes[1]
            list(self.groups.values())[-1][-1][1].append(values)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_mark:
            list(self.groups.values())[-1][-1][1][-1]["mark"] = data
            self._in_mark = False

    def figures(self) -> list[dict[str, str]]:
        return [figure for rows in self.groups.values() for query, found in rows for figure in (query, *found)]

    def metric(self, name: str) -> list[str]:
        """Cells of a row of the first table."""
        row = re.search(f'<tr data-metric="{name}">.*?</tr>', self.html)
        return re.findall("<td>(.*?)</td>", row[0]) if row else []

    def class_shown(self, figure: dict[str, str]) -> str:
        """The class that a figure's pixels belong to."""
        data = re.search(
            rf"\.s{figure['data-sample']}{{background-image:url\(data:image/jpeg;base64,(.*?)\)}}", self.html
        )
        assert data is not None
        mean = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))), float).mean(axis=(0, 1))
        return min(COLOUR_OF, key=lambda name: float(np.abs(mean - COLOUR_OF[name]).sum()))
