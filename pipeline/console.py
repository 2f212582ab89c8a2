"""The console on stderr, for progress and messages of commands and runs."""

from rich.console import Console

# Paths and names are printed as they are: "[red] shoes" is no colour, "[/x]" no closing tag, ":cat:" no picture.
console = Console(stderr=True, markup=False, emoji=False)


def say(line: str) -> None:
    """Prints one line of text as it is: not coloured, and not wrapped at the terminal's width."""
    console.print(line, highlight=False, soft_wrap=True)
