"""The table every benchmark prints, and its JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        what: Name of the figure, with its unit.
        ours: Our figure.
        other: The figure of the other side, if there is one.
        ratio: Ours divided by the other.
        promised: The limit that the figure has to keep, in words; empty if there is none.
        ok: True if the limit is kept.
        spread: The middle half of the ratios of the rounds, where they are kept.
    """

    what: str
    ours: float
    other: float | None = None
    ratio: float | None = None
    promised: str = ""
    ok: bool = True
    spread: tuple[float, float] | None = None

    @property
    def loses(self) -> bool:
        """Whether the other is ahead: of speeds and of what is to be at least so much, less is worse, of anything else more."""
        more_is_better = "images/s" in self.what or self.promised.startswith(">=")
        return self.ratio is not None and (self.ratio < 1 if more_is_better else self.ratio > 1)


def finish(rows: Sequence[Row], json_path: str | Path | None = None) -> int:
    """Prints the rows, writes them as JSON with the machine's load; returns 1 if a limit is exceeded, else 0."""
    header = ("what", "ours", "the other", "ratio", "promised", "")
    cells = [header] + [
        (row.what, _number(row.ours), _number(row.other), _ratio(row), row.promised, "" if row.ok else "BROKEN")
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    for line in cells:
        texts = [
            text.ljust(width) if i in (0, 4) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(texts).rstrip())
    if json_path:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
        Path(json_path).write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))
    return int(not all(row.ok for row in rows))


def _ratio(row: Row) -> str:
    spread = "" if row.spread is None else f" ({row.spread[0]:.3g} to {row.spread[1]:.3g})"
    return _number(row.ratio) + spread


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
