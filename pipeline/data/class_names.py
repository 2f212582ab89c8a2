"""Names of classes that mean the same: equal but for blanks at their ends or for Unicode's form."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.data.entries import Entry

MAX_NAMES = 3  # names that a note lists


def some(names: Iterable[str]) -> str:
    """The first three names, sorted and quoted, and the number of the others."""
    names = sorted(set(names))
    others = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(repr, names[:MAX_NAMES])) + others


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 image", "1,200 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def merge_spellings(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Gives classes whose names differ invisibly one name, the composed form without outer blanks.

    A name of one spelling stays as it is. "007" and "7", "Cat" and "cat" are different names; the
    latter are pointed out.

    Returns:
        The entries, and a note for each kind of finding.
    """
    spellings: dict[str, set[str]] = {}
    for entry in entries:
        spellings.setdefault(unicodedata.normalize("NFC", entry.class_name).strip(), set()).add(entry.class_name)
    name_of = {old: key if len(olds) > 1 else old for key, olds in spellings.items() for old in olds}
    merged = [key for key, olds in spellings.items() if len(olds) > 1]
    notes = []
    if merged:
        notes.append(
            f"{count(len(merged), 'class', 'classes')} merged of names that differ only in outer blanks or Unicode form: "
            + some(merged)
        )
    folded: dict[str, set[str]] = {}
    for name in set(name_of.values()):
        folded.setdefault(name.casefold(), set()).add(name)
    similar = [" and ".join(map(repr, sorted(names))) for names in folded.values() if len(names) > 1]
    if similar:
        notes.append(f"{len(similar):,} pairs of classes differ only in upper and lower case (first: {min(similar)})")
    return [replace(e, class_name=name_of[e.class_name]) for e in entries], notes
