"""Splits that a dataset comes with: the words that name them, and what they have to fulfil."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.data.class_names import count
from pipeline.data.entries import Entry
from pipeline.errors import UserError

VALIDATION = "validation"  # until `understand_splits` has decided what it is for
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), VALIDATION),
    **dict.fromkeys(("query", "queries"), "query"),
    "gallery": "gallery",
}


def understand_splits(entries: Sequence[Entry], place: str) -> tuple[list[Entry], list[str]]:
    """Gives every entry one of SPLITS, from words of `SPLIT_OF`.

    Validation classes become fold 0 of the training classes, unless there are no test images: then
    they are the test. A query that is in the gallery too is left out of the gallery; where that is
    so for all, each image is searched among the others (leave-one-out).

    Args:
        entries: Images with a split.
        place: The folder or list, for messages.

    Raises:
        UserError: Classes are on both sides; there are queries without a gallery, or test beside
            query images.
    """
    entries, notes = _place_validation(list(entries))
    splits = {e.split or "" for e in entries}
    if ("query" in splits) != ("gallery" in splits) or {"query", "test"} <= splits:
        raise UserError(f"{place} has the splits {sorted(splits)}: give test alone, or query and gallery together")
    training = {e.class_name for e in entries if e.split == "train"}
    shared = sorted(training & {e.class_name for e in entries if e.split != "train"})
    if shared:
        raise UserError(
            f"{place}: {count(len(shared), 'class is', 'classes are')} in train and in a test split (first: {shared[0]!r}); "
            "retrieval is measured on classes not seen in training: give each class to one side, or add --resplit, "
            "which pools all images and splits the classes"
        )
    entries, more = _part_queries_from_gallery(entries)
    return entries, notes + more


def _place_validation(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    validation = {e.class_name for e in entries if e.split == VALIDATION}
    if not validation:
        return entries, []
    others = {e.split for e in entries} - {"train", VALIDATION}
    if not others:
        return [replace(e, split="test") if e.split == VALIDATION else e for e in entries], [
            "the validation images are the test, since there are no others"
        ]
    training = {e.class_name for e in entries if e.split == "train"}
    held_out = validation - training
    entries = [
        replace(e, split="train", held_out=e.class_name in held_out) if e.split == VALIDATION else e for e in entries
    ]
    notes = []
    if held_out:
        notes.append(
            f"the {count(len(held_out), 'validation class is', 'validation classes are')} fold 0 of the training classes"
        )
    if validation & training:
        number = count(len(validation & training), "class", "classes")
        notes.append(f"validation and train share {number}, which are trained on: validation is by classes here")
    return entries, notes


def _part_queries_from_gallery(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """A query never finds itself: files that are query and gallery are left out of the gallery."""
    queries, gallery = ({e.source for e in entries if e.split == split} for split in ("query", "gallery"))
    both = queries & gallery
    if not both:
        return entries, []
    if queries == gallery:
        kept = [replace(e, split="test") if e.split == "query" else e for e in entries if e.split != "gallery"]
        return kept, ["every query is in the gallery too: they become test images, each searched among the others"]
    kept = [e for e in entries if e.split != "gallery" or e.source not in both]
    return kept, [
        f"{count(len(both), 'query is', 'queries are')} in the gallery too, and left out of it: none finds itself"
    ]
