"""Test images that are also training images, all but identical: a retrieval figure counts them as found by skill.

Images are compared at 16 by 16 pixels: near-duplicates are those whose pixels correlate at 0.998 or more, and differ by no more
than 8 of 255 on average. So an image that was compressed again, scaled, or a little brightened is found; one that was cropped
by more than a hair, mirrored or drawn anew is not. Images of one colour have nothing to correlate and are left out. Every
test image of the sample is compared with every training image of the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from PIL import Image

from pipeline.data.store import Store
from pipeline.exploration.pictures import each_image

SIDE = 16  # pixels
CORRELATION = 0.998
DIFFERENCE = 8.0  # of 255, mean over pixels and colours
TRAIN_IMAGES = 10_000  # compared at the end of a run
_FLAT = 1.0  # of 255: standard deviation of the pixels below which an image is of one colour
_BLOCK = 512  # test images compared at once


@dataclass(frozen=True)
class NearDuplicate:
    """A test image and the training image most like it, store ids, with the correlation of their pixels."""

    test: int
    train: int
    correlation: float


@dataclass(frozen=True)
class DuplicateSearch:
    """What was compared and found.

    Attributes:
        pairs: One for each test image that has a near-duplicate, the most alike first.
        compared: Numbers of test and of training images that were compared.
        total: Numbers of test and of training images in the datasets.
        identical: Images that both have byte by byte, counted over all when the dataset was prepared; None: not counted.
        train: The store of the training images.
    """

    pairs: list[NearDuplicate]
    compared: tuple[int, int]
    total: tuple[int, int]
    identical: int | None
    train: Store


def small_pixels(image: Image.Image) -> Float32[np.ndarray, " values"]:
    """The image's colours at 16 by 16 pixels."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel()


def find_duplicates(
    test: Store,
    ids: Int64[np.ndarray, " images"],
    pixels: Float32[np.ndarray, "images values"],
    train: Store,
    max_train: int = TRAIN_IMAGES,
) -> DuplicateSearch:
    """Compares test images, whose `small_pixels` are given, with training images; which are at most `max_train`.

    Time: decoding of the training images, 1 to 3 ms each; the comparison itself takes 1 s for 8,000 x 10,000.
    """
    train_ids = train.sample_id[train.split == "train"]
    chosen = sample_row_groups(train_ids, max_train, train.row_group)
    train_pixels = pixel_rows(train, chosen)
    copies: dict[str, Any] = train.manifest.get("copies") or {}
    return DuplicateSearch(
        near_duplicates(ids, pixels, chosen, train_pixels),
        (len(ids), len(chosen)),
        (int((test.split != "train").sum()), len(train_ids)),
        copies.get("train_and_test") if train.fingerprint == test.fingerprint else None,
        train,
    )


def pixel_rows(
    store: Store, ids: Int64[np.ndarray, " images"], use: Callable[[Image.Image], np.ndarray] = small_pixels
) -> Float32[np.ndarray, "images values"]:
    """The `small_pixels` of images."""
    rows = list(each_image(store, ids, use, 4 * SIDE))
    return np.stack(rows) if rows else np.empty((0, SIDE * SIDE * 3), np.float32)


def sample_row_groups(ids: Int64[np.ndarray, " images"], limit: int, group: int) -> Int64[np.ndarray, " chosen"]:
    """All ids, or about `limit` of them in runs of `group`, drawn with a fixed seed: such runs are read in one piece."""
    if len(ids) <= limit:
        return ids
    runs = np.random.default_rng(0).permutation(-(-len(ids) // group))[: max(1, limit // group)]
    rows = (np.sort(runs)[:, None] * group + np.arange(group)).ravel()
    return ids[rows[rows < len(ids)]]


def near_duplicates(
    test_ids: Int64[np.ndarray, " test"],
    test_pixels: Float32[np.ndarray, "test values"],
    train_ids: Int64[np.ndarray, " train"],
    train_pixels: Float32[np.ndarray, "train values"],
) -> list[NearDuplicate]:
    """For each test image that has a near-duplicate the most correlated training image, ties by place; O(test x train)."""
    if not len(test_ids) or not len(train_ids):
        return []
    test, train = _standardised(test_pixels), _standardised(train_pixels)
    pairs = []
    for start in range(0, len(test), _BLOCK):
        similarity = test[start : start + _BLOCK] @ train.T
        best = similarity.argmax(axis=1)
        correlation = similarity[np.arange(len(best)), best]
        for row in np.flatnonzero(correlation >= CORRELATION):
            difference = np.abs(test_pixels[start + row] - train_pixels[best[row]]).mean()
            if difference <= DIFFERENCE:
                pair = int(test_ids[start + row]), int(train_ids[best[row]]), min(1.0, float(correlation[row]))
                pairs.append(NearDuplicate(*pair))
    return sorted(pairs, key=lambda pair: (-round(pair.correlation, 6), pair.test))


def _standardised(pixels: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1, so that their product is the correlation; 0 for images of one colour."""
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    flat = lengths < _FLAT * np.sqrt(pixels.shape[1])
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, lengths)).astype(np.float32)
