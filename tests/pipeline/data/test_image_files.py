"""Pictures of every kind, damaged or not: what a store lets in can be decoded."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.entries import Entry
from pipeline.data.image_files import decode, normalise
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.storage import Folder
from tests.pipeline.data.test_store import encode, entries_of, jpeg, rejected_lines

# ---- pictures of every kind ------------------------------------------------------------------------------------------

W, H = 20, 12
RANDOM = np.random.default_rng(3)
RGB = np.kron(RANDOM.integers(0, 256, (H // 4, W // 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
ALPHA = np.kron(RANDOM.integers(0, 256, (H // 4, W // 4)), np.ones((4, 4))).astype(np.uint8)
ON_WHITE = np.round(RGB * (ALPHA[..., None] / 255.0) + 255 * (1 - ALPHA[..., None] / 255.0)).astype(np.uint8)
GREY = RGB[..., 0]
PICTURE = Image.fromarray(RGB)
PHOTO = np.kron(RANDOM.integers(0, 256, (2, 3, 3)), np.ones((16, 16, 1))).astype(
    np.uint8
)  # no edge within a JPEG block


def png(pixels: np.ndarray, filter_type: int = 0) -> bytes:
    """A PNG without compression tricks, also of kinds that Pillow does not write: 16 bits a channel, bad filters."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    colour = {1: 0, 3: 2, 4: 6}[pixels.shape[-1]]
    header = struct.pack(">IIBBBBB", W, H, 8 * pixels.itemsize, colour, 0, 0, 0)
    rows = b"".join(bytes([filter_type]) + row.astype(f">u{row.itemsize}").tobytes() for row in pixels)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def paletted() -> tuple[Image.Image, np.ndarray]:
    """A palette picture in which colour 3 is transparent."""
    image = PICTURE.quantize(8)
    index = np.asarray(image)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[index == 3] = 255
    return image, expected


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


SIXTEEN = (RGB.astype(np.uint16) << 8) + RANDOM.integers(0, 256, RGB.shape).astype(np.uint16)
SIXTEEN_ALPHA = np.dstack([SIXTEEN, ALPHA.astype(np.uint16) * 257])
PICTURES: dict[str, tuple[bytes, np.ndarray, int]] = {  # bytes, the right picture, tolerance
    "RGB PNG": (encode(PICTURE, "PNG"), RGB, 0),
    "grey PNG": (encode(Image.fromarray(GREY), "PNG"), GREY, 0),
    "black and white PNG": (encode(Image.fromarray(GREY > 127), "PNG"), np.where(GREY > 127, 255, 0), 0),
    "palette PNG": (encode(PICTURE.quantize(8), "PNG"), np.asarray(PICTURE.quantize(8).convert("RGB")), 0),
    "palette PNG with transparency": (encode(paletted()[0], "PNG", transparency=3), paletted()[1], 0),
    "RGBA PNG": (encode(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"), ON_WHITE, 1),
    "grey PNG with alpha": (encode(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"), ON_WHITE[..., 0], 1),
    "RGB PNG with a transparent colour": (
        encode(PICTURE, "PNG", transparency=tuple(RGB[0, 0].tolist())), np.where((RGB[0, 0] == RGB).all(-1, keepdims=True), 255, RGB), 0),
    "16-bit grey PNG": (encode(Image.fromarray(SIXTEEN[..., 0]), "PNG"), GREY, 0),
    "16-bit RGB PNG": (png(SIXTEEN), RGB, 0),
    "16-bit RGBA PNG": (png(SIXTEEN_ALPHA), ON_WHITE, 1),
    "16-bit TIFF": (encode(Image.fromarray(SIXTEEN[..., 0]), "TIFF"), GREY, 0),
    "JPEG": (jpeg(PHOTO), PHOTO, 4),
    "grey JPEG": (jpeg(PHOTO[..., 0]), PHOTO[..., 0], 4),
    "progressive JPEG": (jpeg(PHOTO, progressive=True), PHOTO, 4),
    "CMYK JPEG": (encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95), PHOTO, 8),
    "GIF": (encode(PICTURE.quantize(8), "GIF"), np.asarray(PICTURE.quantize(8).convert("RGB")), 0),
    "GIF with transparency": (encode(paletted()[0], "GIF", transparency=3), paletted()[1], 0),
    "animated GIF": (
        encode(PICTURE.quantize(8), "GIF", save_all=True, append_images=[Image.new("P", (W, H))]), np.asarray(PICTURE.quantize(8).convert("RGB")), 0),
    "lossless WebP": (encode(PICTURE, "WEBP", lossless=True), RGB, 0),
    "WebP with alpha": (encode(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True), ON_WHITE, 1),
    "BMP": (encode(PICTURE, "BMP"), RGB, 0),
}  # fmt: skip
TURNS = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90}  # fmt: skip
for tag, turn in TURNS.items():  # the camera's tag says how the pixels have to be turned for display
    PICTURES[f"JPEG turned {tag}"] = (jpeg(PHOTO, exif=exif(tag)), turn(PHOTO), 8)
PICTURES["PNG turned 6"] = (encode(PICTURE, "PNG", exif=exif(6)), TURNS[6](RGB), 0)


@pytest.mark.parametrize("name", PICTURES)
def test_each_kind_of_picture_is_stored_as_the_right_rgb(name: str) -> None:
    data, expected, tolerance = PICTURES[name]
    got = decode(normalise(data)).permute(1, 2, 0).numpy().astype(int)
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, -1)
    assert got.shape == expected.shape
    where = np.s_[8::16, 8::16] if "JPEG" in name else np.s_[:]  # colours of a JPEG bleed a little at edges
    assert np.abs(got - expected)[where].max() <= tolerance
    assert normalise(data) == data or name not in ("JPEG", "grey JPEG", "progressive JPEG"), "no loss without need"


def damaged_png(at: int) -> bytes:
    data = bytearray(PICTURES["RGB PNG"][0])
    data[data.index(b"IDAT") + at] ^= 0x04
    return bytes(data)


BAD = {
    "no bytes": b"",
    "text": b"<html>404 not found</html>",
    "truncated JPEG": PICTURES["JPEG"][0][:-200],
    "truncated PNG": PICTURES["RGB PNG"][0][:-30],
    "truncated GIF": PICTURES["GIF"][0][:-40],
    "truncated WebP": PICTURES["lossless WebP"][0][:-40],
    # torchvision's decoder ends the process on these
    "PNG with a flipped bit": damaged_png(40),
    "PNG with a flipped bit in its checksum": PICTURES["RGB PNG"][0][:-13] + b"?" + PICTURES["RGB PNG"][0][-12:],
    "PNG with an unknown filter": png(RGB, filter_type=9),
    "PNG of gigapixels": PICTURES["RGB PNG"][0].replace(struct.pack(">II", W, H), struct.pack(">II", 90_000, 90_000)),
    "32-bit TIFF": encode(Image.fromarray(RGB[..., 0].astype(np.int32)), "TIFF"),
    "float TIFF": encode(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"),
}  # fmt: skip


def test_pictures_that_cannot_be_read_are_rejected_with_a_reason(tmp_path: Path) -> None:
    entries = []
    for i, (name, data) in enumerate(BAD.items()):
        (tmp_path / f"{i:02d} {name}").write_bytes(data)
        entries.append(Entry(str(tmp_path / f"{i:02d} {name}"), "bad", "train"))
    good = entries_of(tmp_path / "good", {"a": 2, "b": 2})
    opened = write_store("x", entries + good, Folder(tmp_path / "store"), run_serially, num_folds=2, max_rejected=0.99)
    reasons = {line[0].rsplit("/", 1)[1][3:]: line[2] for line in rejected_lines(opened.folder)[1:]}
    assert set(reasons) == set(BAD) and all(len(reason) > 5 for reason in reasons.values())
    assert len(opened.sample_id) == 4


@pytest.mark.parametrize(
    "kind", ["JPEG", "RGB PNG", "palette PNG with transparency", "GIF", "lossless WebP", "16-bit TIFF", "JPEG turned 6"]
)
def test_bytes_damaged_at_random_are_rejected_or_stored_decodable(kind: str) -> None:
    """Whatever happens to the bytes: an exception, or an image that training can decode; never the end of the process."""
    random = np.random.default_rng(0)
    source = PICTURES[kind][0]
    for round_ in range(60):
        data = bytearray(source)
        if round_ % 3 == 0:
            del data[random.integers(len(data)) :]
        for _ in range(random.integers(1, 4)):
            if data:
                data[random.integers(len(data))] = random.integers(256)
        with contextlib.suppress(Exception):
            kept = normalise(bytes(data))
            assert decode(kept).shape[0] == 3


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 20), (16, 8)), ((20, 40), (8, 16)), ((16, 10), (16, 10)), ((5, 5), (5, 5))]
)
def test_max_side_reduces_the_longer_side_only(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for kind in ("PNG", "JPEG"):
        got = decode(normalise(encode(PICTURE.resize(size), kind), max_side=16))
        assert got.shape == (3, expected[1], expected[0])
