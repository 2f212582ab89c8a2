"""The console on stderr, for progress and messages of commands and runs."""

from rich.console import Console

console = Console(stderr=True)
