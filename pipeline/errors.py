"""Errors that a user can act on; commands print them as one line and exit with status 2 (1 for a failed run)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message says what was got, what was expected and what to change."""


class RunError(Exception):
    """A run that cannot go on (a loss that is not finite, a damaged shard): restarting it would fail again."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, after the name of its class unless that is UserError or RunError."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, (UserError, RunError)) else f"{type(error).__name__}: {text}"


def joined_lines(error: BaseException) -> str:
    """All lines of an error's message as one, with single blanks between words."""
    return " ".join(str(error).split())


def did_you_mean(
    name: str, names: Iterable[str], *, kind: str = "", prefix: str = "", otherwise: str = "expected one of"
) -> str:
    """A hint for an unknown name: the most similar of the names that exist, or else all of them.

    Args:
        name: The name that was got.
        names: The names that exist; more than 100 are not listed.
        kind: A noun before the similar name ("the preset ").
        prefix: The first part of all names, shown with the similar name ("method.").
        otherwise: Text before the list of all names.
    """
    names = list(names)
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if similar:
        return f"did you mean {kind}{prefix + similar[0]!r}?"
    return f"{otherwise} {', '.join(names)}" if len(names) <= 100 else f"none of the {len(names):,} names is similar"
