"""Entries of a catalogue, one for each image: the source of its bytes, its class and split; and how classes are split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

MAX_PIXELS = 100_000_000  # largest image that a store accepts; 300 MB once decoded
OWN_SOURCES = ("folder", "csv")  # kinds of datasets whose protocol is ours to choose
SPLITS = ("train", "test", "query", "gallery")
Kind = Literal["distractor", "junk"]
DISTRACTOR = -1  # label of gallery images that are of no class: to retrieve one is wrong
JUNK = -2  # label of gallery images that evaluation ignores: to retrieve one is neither right nor wrong
LABELS: dict[Kind, int] = {"distractor": DISTRACTOR, "junk": JUNK}


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a dataset.

    Attributes:
        source: Local path or URI of its bytes.
        class_name: The name of its class.
        split: One of SPLITS.
        group: A group of classes that must stay on one side of every split; None: the class alone.
        box: The object in the image, as left, top, width, height in pixels as stored (before EXIF
            rotation).
        track: The tracklet that the image is a frame of, by any name that is unique in the dataset.
        camera: Number of the camera that took it.
        frame: Its number in the tracklet.
        kind: "distractor" or "junk" for test images of no class.
        held_out: The training class was set aside for validation by who made the dataset: fold 0
            holds exactly these.
        path: What the store records of its origin (None: `source`).
    """

    source: str
    class_name: str
    split: str | None = None
    group: str | None = None
    box: tuple[float, float, float, float] | None = None
    track: str | None = None
    camera: int | None = None
    frame: int | None = None
    kind: Kind | None = None
    held_out: bool = False
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The images of a dataset that is yet to be read.

    Attributes:
        entries: One for each image.
        notes: Sentences on what was merged, left out or understood, for the user.
        left_out: Source, class and reason of each file that was found to be no image of the dataset,
            for `rejected.csv`.
        protocol: One of `pipeline.data.store.PROTOCOLS`; None: by the splits.
        splits_given: The dataset came with its splits; otherwise its classes were halved here.
    """

    entries: list[Entry]
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str, str], ...] = ()
    protocol: str | None = None
    splits_given: bool = True


def by_hash(names: Iterable[str]) -> list[str]:
    """Names in the order of their sha256: a fixed, machine-independent shuffle."""
    return sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def split_classes(entries: list[Entry]) -> list[Entry]:
    """Gives every entry a split: groups of classes in hash order, the first half trains, the second tests."""
    order = by_hash(e.group or e.class_name for e in entries)
    training = set(order[: len(order) // 2])
    return [replace(e, split="train" if (e.group or e.class_name) in training else "test") for e in entries]
