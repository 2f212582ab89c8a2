"""Encoded images: decoded to pixels, and checked and re-encoded before they are stored."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pipeline.data.entries import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

DARK = "16 bits, of which at most 13 are filled"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation: how the pixels are turned for display


def decode(data: bytes) -> UInt8[Tensor, "3 height width"]:
    """Decodes an image of a store, in the form that `normalise` writes."""
    import torch  # here, with torchvision: 2 CPU-s that `python -m pipeline.prepare` does not need for its arguments

    from pipeline.vision_libraries import torchvision

    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torchvision.io.decode_image(buffer, mode=torchvision.io.ImageReadMode.RGB)


def normalise(
    data: bytes,
    max_side: int | None = None,
    box: tuple[float, float, float, float] | None = None,
    max_pixels: int = MAX_PIXELS,
    remarks: list[str] | None = None,
) -> bytes:
    """Bytes of a plain RGB or grey JPEG, or of an RGB PNG: the input itself where it is such a JPEG, else re-encoded.

    Transparency is composited on white, EXIF orientation applied (broken EXIF ignored), 16 bits cut to 8, other colour
    spaces and formats converted (to PNG where the source is lossless, to JPEG of quality 95 else),
    and a longer side than `max_side` reduced. A PNG is always written anew: on one that is damaged
    in places, torchvision's decoder ends the process.

    Args:
        data: An encoded image.
        max_side: Upper bound for the longer side of the stored image, pixels.
        box: Left, top, width, height in pixels of the file as it is, before any rotation: only this
            is stored.
        max_pixels: Upper bound for the decoded width × height, in place of Pillow's own limit. A
            larger JPEG is accepted where `max_side` is given (and no box): it is decoded at a half,
            a quarter or an eighth of its size, which must not be larger.
        remarks: DARK is appended for an image of 16 bits whose brightest value fills at most 13.

    Raises:
        Exception: The bytes are not an image that can be decoded whole; decoders have no common
            class of errors.
    """
    with _without_pillow_limit():
        image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels and max_side is not None and box is None:
            share = max_side / max(width, height)
            image.draft(None, (math.ceil(width * share), math.ceil(height * share)))
        if image.size[0] * image.size[1] > max_pixels:
            raise ValueError(f"{width} × {height} pixels, more than --max-pixels {max_pixels:,}")
        Image.open(io.BytesIO(data)).verify()  # compares the checksums of a PNG, which `load` ignores
        image.load()
        lossy = image.format in ("JPEG", "MPO")
        keep = image.format == "JPEG" and image.mode in ("RGB", "L") and image.size == (width, height)
        if box is not None:
            image, keep = _crop_to_box(image, box), False
    deep = image.mode.startswith("I;16") or (data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow's own conversion clips at 255
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no known range: convert them to 8 bits")
    if remarks is not None and deep and _brightest(image) < 32:
        remarks.append(DARK)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image, keep = image.transpose(turn), False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if max_side is not None and max(image.size) > max_side:
        image, keep = image.convert("RGB"), False
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    if keep:
        decode(data)  # the very decoder that training uses must read it
        return data
    out = io.BytesIO()
    if lossy:
        image.convert("RGB").save(out, "JPEG", quality=95)
    else:
        image.convert("RGB").save(out, "PNG")
    return out.getvalue()


def _brightest(image: Image.Image) -> int:
    """The largest value of the colours of an image of 8 bits a channel; of transparency nothing."""
    extrema = image.convert("RGB").getextrema()
    return max(int(high) for _, high in extrema)  # type: ignore[misc]  # pairs for an image of several channels


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1, as it is, where the metadata is missing or broken."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # whatever a damaged block of metadata makes Pillow raise: the pixels are good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextlib.contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """A block in which Pillow has no limit on pixels of its own, since `max_pixels` is the limit."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _crop_to_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The pixels that a box touches, where it lies within the image."""
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(image.width, math.ceil(box[0] + box[2])), min(image.height, math.ceil(box[1] + box[3]))
    if left >= right or top >= bottom:
        raise ValueError(f"box {box} lies outside the {image.width} × {image.height} pixels")
    return image.crop((left, top, right, bottom))
