"""Near-duplicates: what counts as one, and the search over two splits of a store."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipeline.data.entries import Entry
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.exploration.duplicates import (
    find_duplicates,
    near_duplicates,
    pixel_rows,
    sample_row_groups,
    small_pixels,
)
from pipeline.storage import Folder


def scene(seed: int, side: int = 120) -> Image.Image:
    """Smooth in large parts, with some detail, as a photograph is."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, float) + random.normal(0, 6, (side, side, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


CHANGES = {
    "the same": (lambda image: image, True),
    "compressed": (lambda image: compressed(image, 40), True),
    "scaled": (lambda image: image.resize((70, 70)), True),
    "a little brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.03), True),
    "far darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.6), False),
    "mirrored": (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), False),
    "cropped": (lambda image: image.crop((15, 15, 105, 105)), False),
    "another": (lambda image: scene(99), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_counts_as_a_near_duplicate(change: str) -> None:
    function, expected = CHANGES[change]
    for seed in range(5):
        test, train = (small_pixels(image)[None] for image in (scene(seed), function(scene(seed))))
        assert bool(near_duplicates(np.array([1]), test, np.array([2]), train)) == expected, seed


def test_images_of_one_colour_are_left_out() -> None:
    flat = np.full((1, 768), 200, np.float32)
    assert near_duplicates(np.array([1]), flat, np.array([2]), flat) == []
    empty = np.empty((0, 768), np.float32)
    assert near_duplicates(np.array([1]), flat, np.array([], np.int64), empty) == []


def test_each_test_image_once_with_the_most_alike_first() -> None:
    pixels = [small_pixels(image) for image in (scene(1), scene(2), compressed(scene(2), 30), scene(3))]
    pairs = near_duplicates(
        np.array([10, 20, 30]),
        np.stack([pixels[2], pixels[0], pixels[3]]),
        np.array([1, 2, 3]),
        np.stack([*pixels[:2], pixels[1]]),
    )
    assert [(pair.test, pair.train) for pair in pairs] == [
        (20, 1),
        (10, 2),
    ]  # 2 and 3 are the same image: the first of them
    assert pairs[0].correlation == pytest.approx(1) and 0.998 <= pairs[1].correlation < 1


def test_a_sample_is_of_whole_row_groups() -> None:
    ids = np.arange(1000, 1100)
    assert sample_row_groups(ids, 100, 16) is ids
    chosen = sample_row_groups(ids, 40, 16)
    assert len(chosen) <= 40 and (np.diff(chosen) > 0).all() and np.isin(chosen, ids).all()
    assert {len(set(chosen) & set(ids[start : start + 16])) for start in range(0, 96, 16)} <= {0, 16}
    assert (sample_row_groups(ids, 40, 16) == chosen).all()


def test_two_splits_of_a_store(tmp_path: Path) -> None:
    images = {
        ("train", 0): scene(0),
        ("train", 1): scene(1),
        ("test", 2): compressed(scene(1), 60),
        ("test", 3): scene(3),
    }
    images |= {("train", 4): scene(4), ("test", 5): scene(4)}  # the same file
    entries = []
    for (split, number), image in images.items():
        path = tmp_path / f"{split}-{number}.png"
        image.save(path)
        entries.append(Entry(str(path), f"{split} class {number % 2}", split))
    store = write_store("scenes", entries, Folder(tmp_path / "store"), run_serially, num_folds=2)
    ids = store.sample_id[store.split == "test"]
    search = find_duplicates(store, ids, pixel_rows(store, ids), store)
    number_of = {
        int(i): int(path[-5]) for i, path in zip(store.sample_id, store.sources(store.sample_id) or [], strict=True)
    }
    assert [(number_of[pair.test], number_of[pair.train]) for pair in search.pairs] == [(5, 4), (2, 1)]
    assert (search.compared, search.total, search.identical) == ((3, 3), (3, 3), 1)
