"""Small pictures of a store's images: thumbnails for CSS, a sheet of tiles, and rows of few pixels to compare."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int64
from PIL import Image

from pipeline.data.reader import open_reader
from pipeline.data.store import Store

T = TypeVar("T")

SHEET_PIXELS = 8_400_000  # of all tiles together
SHEET_BYTES = 1_200_000  # of their JPEG file; base64 makes a third more of it
QUALITIES = (75, 60, 45, 30, 15)  # tried in turn until the sheet is small enough
_TILE_STEP = 16  # pixels; JPEG codes colour in squares of 16, so that no tile bleeds into the next
_CHUNK = 512  # images whose files are in memory at once
_THREADS = 2


@dataclass(frozen=True)
class Sheet:
    """Tiles in one JPEG, row by row.

    Attributes:
        data: The file.
        side: Width and height of a tile in pixels.
        columns: Tiles in a row.
    """

    data: bytes
    side: int
    columns: int


def each_image(
    store: Store, ids: Int64[np.ndarray, " images"], use: Callable[[Image.Image], T], side: int
) -> Iterator[T]:
    """`use` of each image, in order; images are decoded at no more than needed for `side` pixels, two at a time.

    Ids in ascending order have each row group read once. Memory: the files of 512 images.

    Raises:
        RunError: A shard of the dataset is damaged.
    """

    def open_image(data: bytes) -> T:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (side, side))  # JPEG: decoded at an eighth to a whole of its size
        return use(image.convert("RGB"))

    reader = open_reader(store.folder.uri, store.fingerprint, None)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(ids), _CHUNK):
            yield from pool.map(open_image, reader.read(ids[start : start + _CHUNK]))
    reader.clear()


def thumbnail_rules(side_of: Mapping[int, int], store: Store, prefix: str = "s") -> str:
    """CSS rules `.<prefix><sample id>`, each with a small JPEG as its background; `side_of` is the longer side by store id."""
    ids = np.array(sorted(side_of), np.int64)
    largest = max(side_of.values(), default=1)
    rules = []
    for sample, image in zip(ids.tolist(), each_image(store, ids, lambda image: image, largest), strict=True):
        image.thumbnail((side_of[sample], side_of[sample]))
        rules.append(f".{prefix}{sample}{{background-image:url({data_url(_jpeg(image, 85))})}}\n")
    return "".join(rules)


def data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def tile_side(images: int) -> int:
    """Pixels of a tile: 64, and fewer for many images, but 16."""
    side = math.isqrt(SHEET_PIXELS // max(1, images)) // _TILE_STEP * _TILE_STEP
    return max(_TILE_STEP, min(64, side))


def tile(image: Image.Image, side: int) -> Image.Image:
    """The whole image in the middle of a white square."""
    image = image.copy()
    image.thumbnail((side, side))
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def tile_grid(tiles: Sequence[Image.Image]) -> tuple[Image.Image, int]:
    """Tiles of one size in an image that is about square, row by row; and how many stand in a row."""
    side = tiles[0].width
    columns = math.isqrt(len(tiles) - 1) + 1
    grid = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side), "white")
    for place, image in enumerate(tiles):
        grid.paste(image, (place % columns * side, place // columns * side))
    return grid, columns


def make_sheet(tiles: Sequence[Image.Image], max_bytes: int = SHEET_BYTES) -> Sheet:
    """Puts tiles of one size into a JPEG; coarser where it would be larger than `max_bytes`, if that is possible."""
    grid, columns = tile_grid(tiles)
    for quality in QUALITIES:
        data = _jpeg(grid, quality)
        if len(data) <= max_bytes:
            break
    return Sheet(data, tiles[0].width, columns)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()
