"""What commands print with: the console on stderr for progress and messages, numbers of things, and columns of text."""

from collections.abc import Iterator, Sequence

from rich.console import Console

# Paths and names are printed as they are: "[red] shoes" is no colour, "[/x]" no closing tag, ":cat:" no picture.
console = Console(stderr=True, markup=False, emoji=False)


def say(line: str) -> None:
    """Prints one line of text as it is: not coloured, and not wrapped at the terminal's width."""
    console.print(line, highlight=False, soft_wrap=True)


def counted(number: float | int, noun: str) -> str:
    """A number and what is counted: "1 worker", "0.5 GPUs", "2 workers"."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines with aligned columns; a row of a single cell has no columns."""
    columns = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if len(row) > max(i, 1)), default=0) for i in range(columns)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
