"""Errors that a user can act on; entry modules print them as one line and exit with status 2 (1 for a failed run)."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message tells what was got, what was expected and what to change."""


class RunError(Exception):
    """A run that cannot go on (a loss that is not finite, a damaged shard): restarting it would fail again."""


def first_line(error: BaseException) -> str:
    """One line for an error: its class, unless it is ours, and the first line of its message."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, (UserError, RunError)) else f"{type(error).__name__}: {text}"
