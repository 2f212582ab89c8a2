"""Errors that a user can act on; commands print them as one line and exit with status 2 (1 for a failed run)."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable

LONGEST = 1000  # characters of a message that are shown
CLOSE = 0.7  # similarity, 0 to 1 (difflib), from which on a name is suggested


class UserError(Exception):
    """Bad input: the message says what was got, what was expected and what to change."""


class NameTakenError(UserError):
    """The run's name belongs to a run of other settings; `free_name` is one that does not, made from what differs."""

    def __init__(self, message: str, free_name: str) -> None:
        super().__init__(message)
        self.free_name = free_name

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return NameTakenError, (str(self), self.free_name)


class RunError(Exception):
    """A run that cannot go on (a loss that is not finite, a damaged shard): restarting it would fail again."""


class DivergedError(RunError):
    """A run whose loss, gradients, weights or embeddings are not finite: it cannot go on with its settings."""


class NonFiniteError(DivergedError):
    """A training step whose features, loss or gradient are not finite, raised on all ranks alike: it may be left out."""


def masked(text: str) -> str:
    """A text without the secrets that addresses in it hold: user and password, and what follows a question mark."""
    text = re.sub(r"(?<=://)[^\s/@'\"]+@", "***@", text)
    return re.sub(r"(\w+://[^\s'\"?]*\?)[^\s'\"]*=[^\s'\"]*", r"\1***", text)


def check_address_is_public(text: str, key: str = "") -> None:
    """Raises UserError if an address holds a user, a password or a key, which would be seen wherever it is written."""
    if masked(text) != text:
        raise UserError(
            f"{key}{': ' if key else ''}the address {masked(text)!r} holds a user, a password or a key: leave them out, and set the "
            "credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )


def one_line(error: BaseException) -> str:
    """An error's message, its lines joined by blanks, after the name of its class unless that is UserError or RunError.

    A remedy often stands in the second line; more than 1,000 characters are cut. Secrets in addresses are masked.
    """
    text = masked(joined_lines(error))
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return text if isinstance(error, (UserError, RunError)) else f"{type(error).__name__}: {text}".rstrip(": ")


def fail(error: Exception, status: int) -> int:
    """Prints what a command ends with as one line on stderr, after what it has printed; returns its exit status."""
    sys.stdout.flush()
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    return status


def joined_lines(error: BaseException) -> str:
    """All lines of an error's message as one, with a blank between them."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """The names that a misspelt one probably stands for, best first; none if no name is close."""
    names = list(names)
    by_lower: dict[str, str] = {}
    for candidate in names:
        by_lower.setdefault(candidate.lower(), candidate)
    return [by_lower[key] for key in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=CLOSE)]


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
    similar = close_names(name, names)
    if similar:
        return f"did you mean {kind}{prefix + similar[0]!r}?"
    return f"{otherwise} {', '.join(names)}" if len(names) <= 100 else f"none of the {len(names):,} names is similar"
