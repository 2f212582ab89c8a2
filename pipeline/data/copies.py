"""Images whose files are the same, byte by byte: within a class, in several classes, on both sides of a split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt64


@dataclass(frozen=True)
class Copies:
    """What was found.

    Attributes:
        rows: Images of which there is another, the copies of one image together.
        groups: A number for each row, the same for all copies of an image.
        repeated: Images that repeat an earlier one.
        several_classes: Images that are given in more than one class.
        train_and_test: Images that are in train and in another split.
        in_gallery: True for gallery images that are copies of a query.
    """

    rows: Int64[np.ndarray, " copies"]
    groups: Int64[np.ndarray, " copies"]
    repeated: int
    several_classes: int
    train_and_test: int
    in_gallery: Bool[np.ndarray, " images"]

    def counts(self) -> dict[str, int]:
        """The numbers for the manifest."""
        return {
            "repeated": self.repeated,
            "several_classes": self.several_classes,
            "train_and_test": self.train_and_test,
            "query_and_gallery": int(self.in_gallery.sum()),
        }


def find_copies(
    hashes: UInt64[np.ndarray, " images"],
    labels: Int64[np.ndarray, " images"],
    splits: Shaped[np.ndarray, " images"],
) -> Copies:
    """Groups images by a hash of their bytes: one sort of all images.

    Args:
        hashes: 64 bits of each file; two of 10 million different files agree with a chance of 3e-6.
        labels: The class of each.
        splits: One of SPLITS for each.
    """
    _, group_of, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[group_of] > 1)
    rows = rows[np.argsort(group_of[rows], kind="stable")]
    in_gallery = np.zeros(len(hashes), bool)
    if not len(rows):
        return Copies(rows, rows, 0, 0, 0, in_gallery)
    first = np.flatnonzero(np.diff(group_of[rows], prepend=-1))
    groups = np.repeat(np.arange(len(first)), np.diff(first, append=len(rows)))
    low, high = (reduce.reduceat(labels[rows], first) for reduce in (np.minimum, np.maximum))
    has = {split: np.logical_or.reduceat(splits[rows] == split, first) for split in ("train", "query")}
    tested = np.logical_or.reduceat(splits[rows] != "train", first)
    in_gallery[rows] = has["query"][groups] & (splits[rows] == "gallery")
    return Copies(
        rows,
        groups,
        len(rows) - len(first),
        int((low != high).sum()),
        int((has["train"] & tested).sum()),
        in_gallery,
    )
