"""Prepares a dataset: writes its store and prints its content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pipeline.console import console
from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.storage import Folder


def prepare(
    name: str,
    entries: list[Entry],
    target: Folder,
    run: Callable[..., Iterator[dict[str, Any]]],
    **options: Any,
) -> Store:
    """Writes a store and prints its content; see `write_store` for `run` and the options."""
    store = write_store(name, entries, target, run, **options)
    for line in describe(store):
        console.print(line, highlight=False, soft_wrap=True)
    return store


def describe(store: Store) -> list[str]:
    """Lines of text on the content of a store."""
    lines = [f"{store.title}: {store.folder}"]
    lines += [f"  partial: {sentence}" for sentence in store.partial]
    for split, counts in store.manifest["splits"].items():
        lines.append(f"  {split}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))
    folds = store.manifest["folds"]
    lines.append(f"  validation folds of the training classes: {', '.join(str(f['classes']) for f in folds)} classes")
    if store.manifest["rejected"]:
        lines.append(
            f"  rejected: {store.manifest['rejected']:,} images that cannot be read, see {store.folder}/rejected.csv"
        )
    return lines


def emoji_store(root: str, skin_tones: bool = False) -> Folder:
    """The store of the built-in demo below a storage root."""
    return Folder(root) / "data" / ("emoji-skin-tones" if skin_tones else "emoji")
