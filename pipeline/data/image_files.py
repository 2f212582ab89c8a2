"""Encoded images: decoded to pixels, and checked and re-encoded before they are stored."""

from __future__ import annotations

import functools
import io
import math
import struct
import threading
from typing import TYPE_CHECKING, Any

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


def decode(data: bytes, least_side: int | None = None) -> UInt8[Tensor, "3 height width"]:
    """Decodes an image of a store, in the form that `normalise` writes.

    Args:
        data: The image.
        least_side: A JPEG is decoded at a half, a quarter or an eighth of its size as long as its
            shorter side keeps this many pixels; None: whole.
    """
    import torch  # here, with torchvision: 2 CPU-s that `python -m pipeline.prepare` does not need for its arguments

    if least_side is not None and data.startswith(b"\xff\xd8\xff"):
        reduced = _decode_reduced(data, least_side)
        if reduced is not None:
            return reduced
    decode_image, mode = _decoder()
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)


@functools.cache
def _decoder() -> tuple[Any, Any]:
    """torchvision's decoder, and the mode of 3 channels; looked up once, since that takes as long as a tenth of an image."""
    from pipeline.vision_libraries import torchvision

    return torchvision.io.decode_image, torchvision.io.ImageReadMode.RGB


def _decode_reduced(data: bytes, least_side: int) -> UInt8[Tensor, "3 height width"] | None:
    """A JPEG at the smallest of 1/8, 1/4 and 1/2 whose shorter side is at least `least_side`; None if there is none."""
    import torch

    with _without_pillow_limit:
        image = Image.open(io.BytesIO(data))
    for divisor in (8, 4, 2):
        if min(image.size) // divisor >= least_side:
            image.draft(None, (image.width // divisor, image.height // divisor))
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
            return torch.from_numpy(pixels).permute(
                2, 0, 1
            )  # in memory as torchvision's decoder gives it: fast to resize
    return None


def image_area(data: bytes) -> int:
    """Width × height of an image that `normalise` wrote, by its header."""
    if data.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", data[16:24])
        return int(width * height)
    with _without_pillow_limit:
        image = Image.open(io.BytesIO(data))
    return image.width * image.height


def read_image(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 height width"]:
    """Decodes an image of any kind to the pixels that a store would give of it.

    Args:
        data: An encoded image, as `normalise` takes it.
        max_pixels: Upper bound for width × height.

    Raises:
        Exception: As `normalise`.
    """
    if _is_plain_jpeg(data, max_pixels):
        return decode(data)
    image, keep, lossy = _opened(data, None, None, max_pixels, None)
    if keep or lossy:
        return decode(data if keep else _encoded(image, lossy))
    return _pixels(image)


def _is_plain_jpeg(data: bytes, max_pixels: int) -> bool:
    """True for a JPEG that `normalise` would keep, judged by its header."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    with _without_pillow_limit:
        image = Image.open(io.BytesIO(data))
    few = image.size[0] * image.size[1] <= max_pixels
    return few and image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) not in _TURNS


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
    image, keep, lossy = _opened(data, max_side, box, max_pixels, remarks)
    if keep:
        decode(data)  # the very decoder that training uses must read it
        return data
    return _encoded(image, lossy)


def _opened(
    data: bytes,
    max_side: int | None,
    box: tuple[float, float, float, float] | None,
    max_pixels: int,
    remarks: list[str] | None,
) -> tuple[Image.Image, bool, bool]:
    """The image that `normalise` stores, whether its bytes are the input's own, and whether these are a JPEG's."""
    with _without_pillow_limit:
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
    image = _in_eight_bits(image)
    if remarks is not None and deep and _brightest(image) < 32:
        remarks.append(DARK)
    upright = _upright_on_white(image)
    image, keep = upright, keep and upright is image
    if max_side is not None and max(image.size) > max_side:
        image, keep = image.convert("RGB"), False
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return image, keep, lossy


def _encoded(image: Image.Image, lossy: bool) -> bytes:
    out = io.BytesIO()
    if lossy:
        image.convert("RGB").save(out, "JPEG", quality=95)
    else:
        image.convert("RGB").save(out, "PNG")
    return out.getvalue()


def _pixels(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def rgb_pixels(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """The pixels of an image of Pillow, as `normalise` would store them without loss: 8 bits, upright, on white.

    Raises:
        ValueError: Its pixels have 32 bits.
    """
    return _pixels(_upright_on_white(_in_eight_bits(image)))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow's own conversion clips at 255
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no known range: convert them to 8 bits")
    return image


def _upright_on_white(image: Image.Image) -> Image.Image:
    """The image turned as its metadata say, without transparency; the image itself where there is nothing to do."""
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


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


class _WithoutPillowLimit:
    """Blocks in which Pillow has no limit on pixels of its own, since `max_pixels` is the limit; in any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                Image.MAX_IMAGE_PIXELS = self._limit


_without_pillow_limit = _WithoutPillowLimit()


def _crop_to_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The pixels that a box touches, where it lies within the image."""
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(image.width, math.ceil(box[0] + box[2])), min(image.height, math.ceil(box[1] + box[3]))
    if left >= right or top >= bottom:
        raise ValueError(f"box {box} lies outside the {image.width} × {image.height} pixels")
    return image.crop((left, top, right, bottom))
