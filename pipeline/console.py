"""Where commands and runs speak to whoever started them: stderr."""

from rich.console import Console

console = Console(stderr=True)
