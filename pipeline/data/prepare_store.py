"""Prepares a dataset: checks that nothing else is in the store's place, writes the store and prints its content."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.console import say
from pipeline.data.class_names import count
from pipeline.data.entries import OWN_SOURCES, Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.errors import UserError
from pipeline.storage import Folder

STORE_FILES = ("manifest.json", "catalog.parquet", "rejected.csv", "copies.csv", "shards")


def prepare(
    name: str,
    entries: list[Entry],
    target: Folder,
    run: Callable[..., Iterator[dict[str, Any]]],
    **options: Any,
) -> Store:
    """Writes a store and prints its content; see `write_store` for `run` and the options."""
    store = write_store(name, entries, target, run, **options)
    for line in [*describe(store), *_lost_classes(entries, store)]:
        say(line)
    return store


def describe(store: Store) -> list[str]:
    """Lines of text on the content of a store."""
    manifest = store.manifest
    lines = [f"{store.title}: {store.folder}"]
    lines += [f"  partial: {sentence}" for sentence in store.partial]
    for split, counts in manifest["splits"].items():
        lines.append(f"  {split}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))
    folds = [fold["classes"] for fold in manifest["folds"]]
    if folds:
        lines.append(f"  validation folds of the training classes: {', '.join(map(str, folds))} classes")
    if "train" not in manifest["splits"]:
        lines.append("  no training images: a dataset to be measured on only")
    elif 1 in folds:
        lines.append(
            "  a validation fold of one class cannot choose a checkpoint, since every answer in it is right: train with "
            "--set data.validation_fold=null, or prepare with fewer --folds"
        )
    if manifest["rejected"]:
        lines.append(
            f"  rejected: {manifest['rejected']:,} images that cannot be read, see {store.folder}/rejected.csv"
        )
    return lines + _warnings(store)


def _warnings(store: Store) -> list[str]:
    """Lines on what makes figures or training worse than they look."""
    copies, dark = store.manifest.get("copies"), store.manifest.get("dark_16_bit")
    lines = []
    if copies:
        lines.append(
            f"  copies: {count(copies['repeated'], 'image is a copy', 'images are copies')} of others, with the same bytes, "
            f"see {store.folder}/copies.csv"
        )
        if copies["several_classes"]:
            number = count(copies["several_classes"], "image is", "images are")
            lines.append(f"  WARNING: {number} in more than one class: at most one of the labels is right")
        if copies["train_and_test"]:
            number = count(copies["train_and_test"], "image is", "images are")
            lines.append(
                f"  WARNING: {number} in train and in test: figures of the test classes will be too good; remove one side"
            )
        if copies["query_and_gallery"]:
            number = count(copies["query_and_gallery"], "gallery image is a copy", "gallery images are copies")
            lines.append(f"  WARNING: {number} of a query, which would find itself: {_treatment(store)}")
    if dark:
        lines.append(
            f"  WARNING: {count(dark, 'image has', 'images have')} 16 bits, of which the upper 3 or more are empty: stored "
            "nearly black; if they hold 10 or 12 bits, scale them to the full range first"
        )
    return lines


def _treatment(store: Store) -> str:
    published = store.manifest["source"] not in OWN_SOURCES
    return "its authors' protocol keeps them" if published else "junk, which evaluation leaves out"


def _lost_classes(entries: Iterable[Entry], store: Store) -> list[str]:
    lost = {e.class_name for e in entries} - set(store.class_name_of.values()) if store.manifest["rejected"] else set()
    lost -= {e.class_name for e in entries if e.kind is not None}
    if not lost:
        return []
    return [f"  {count(len(lost), 'class has', 'classes have')} no image that can be read (first: {min(lost)!r})"]


def emoji_store(root: str, skin_tones: bool = False) -> Folder:
    """The store of the built-in demo below a storage root."""
    return Folder(root) / "data" / ("emoji-skin-tones" if skin_tones else "emoji")


def check_target(target: Folder, kind: str, origin: str, entries: Iterable[Entry], replace: bool) -> str | None:
    """Checks that a store may be written: its place is not among the images, and no other dataset is there.

    Args:
        target: The store's folder.
        kind: Source of the entries: folder, csv, or the name of a published dataset.
        origin: The folder or list that they are from.
        entries: The images.
        replace: Another dataset may be replaced.

    Returns:
        A note if an earlier store is replaced, else None.

    Raises:
        UserError: It may not.
    """
    _check_place(target, kind, origin, entries)
    if not target.exists("manifest.json"):
        foreign = [
            n for n in target.names() if n not in STORE_FILES and not n.startswith(".") and not n.endswith(".part")
        ]
        if foreign:
            raise UserError(f"{target} is not empty and holds no dataset (first: {foreign[0]}): choose another --to")
        return None
    other = f"--to {_free_name(target)}"
    try:
        store = Store(target)
    except UserError as error:
        if replace:
            return f"replacing the dataset in {target}, which cannot be read"
        raise UserError(f"{error}; or add --replace to write it anew, or keep it with {other}") from error
    earlier = store.manifest.get("origin")
    what = f"{store.title}, {count(len(store.sample_id), 'image')}"
    if _same_origin(store, kind, origin, entries):
        return None if kind not in OWN_SOURCES else f"replacing {what}, prepared from the same {kind} before"
    if replace:
        return f"replacing {what}{f', prepared from {earlier}' if earlier else ''}"
    raise UserError(
        f"{target} exists already and holds another dataset: {what}{f', prepared from {earlier}' if earlier else ''}; "
        f"keep both with {other}, or add --replace"
    )


def _same_origin(store: Store, kind: str, origin: str, entries: Iterable[Entry]) -> bool:
    """Whether a store was prepared from the same place; stores of earlier versions are compared by their classes."""
    if kind not in OWN_SOURCES or store.manifest.get("source") not in OWN_SOURCES:
        return store.manifest.get("source") == kind
    if "origin" in store.manifest:
        return bool(store.manifest["origin"] == origin)
    return {e.class_name for e in entries} == set(store.class_name_of.values())


def _check_place(target: Folder, kind: str, origin: str, entries: Iterable[Entry]) -> None:
    """Raises UserError if the store would lie among its images, or in the place of the built-in demo."""
    name = target.uri.rsplit("/", 1)[1]
    if target.uri.endswith(("/data/emoji", "/data/emoji-skin-tones")) and not kind.startswith("emoji"):
        raise UserError(
            f"{target} is the place of the built-in demo, which `python -m pipeline.train` would take it for: "
            f"add --to {target.uri.rsplit('/', 1)[0]}/my-{name}"
        )
    if not target.is_local or kind not in OWN_SOURCES:
        return
    place = os.path.realpath(target.uri)
    if kind == "folder":
        folders = {os.path.realpath(origin)} if "://" not in origin else set()
    else:
        folders = {posixpath.dirname(e.source) for e in entries if "://" not in e.source}
        if any(f"{folder}/".startswith(f"{place}/") for folder in folders):
            raise UserError(f"{target} is a folder of the images themselves: choose another --to")
    inside = [folder for folder in folders if f"{place}/".startswith(f"{os.path.realpath(folder)}/")]
    if inside:
        raise UserError(
            f"the store {target} would lie among its images in {inside[0]}, and be taken for one of them next time: "
            f"choose another place with --to"
        )


def _free_name(target: Folder) -> str:
    """A place beside the target that is not taken."""
    number = 2
    while Folder(f"{target}-{number}").exists("manifest.json"):
        number += 1
    return f"{target}-{number}"
