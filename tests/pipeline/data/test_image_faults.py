"""Odd images: metadata that is broken, 16 bits that are not filled, and files that are no images, told in words."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.image_faults import explain
from pipeline.data.image_files import DARK, decode, normalise
from tests.pipeline.conftest import Cli
from tests.pipeline.data.test_image_files import BAD, PHOTO, exif, png
from tests.pipeline.data.test_store import encode, jpeg
from tests.pipeline.data.test_untidy_images import photos

OVERRUN = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<HHHII", 1, 0x0112, 3, 2**27, 2**30)


@pytest.mark.parametrize(
    "metadata",
    [b"Exif\x00\x00garbage that is no TIFF header", b"Exif\x00\x00", OVERRUN, exif(0).tobytes(), exif(9).tobytes()],
)
@pytest.mark.filterwarnings("ignore")
def test_pixels_are_good_where_metadata_is_not(metadata: bytes) -> None:
    data = jpeg(PHOTO, exif=metadata)
    assert normalise(data) == data


def test_16_bits_that_are_not_filled_are_told(cli: Cli, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 20 * 12).reshape(12, 20).astype(np.uint16)
    colours = np.repeat(ramp[..., None], 3, -1)
    for dark, pixels in ((False, ramp), (True, ramp // 16)):
        remarks: list[str] = []
        normalise(encode(Image.fromarray(pixels), "PNG"), remarks=remarks)
        assert remarks == [DARK] * dark
    remarks = []
    assert decode(normalise(png(colours // 16), remarks=remarks)).max() < 32 and remarks == [DARK]
    root = photos(tmp_path / "img", "abcd")
    Image.fromarray(ramp // 16).save(root / "a" / "x.png")
    status, said = cli("folder", root)
    assert status == 0 and "WARNING: 1 image has 16 bits, of which the upper 3 or more are empty" in said


REASONS = {
    b"": "the file is empty (0 bytes)",
    bytes(100): "holds 100 zero bytes",
    b"<!DOCTYPE html><html>429": "a web page (HTML), not an image",
    b"\xef\xbb\xbf  <HTML>": "a web page (HTML)",
    b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200): "a HEIC image",
    b"\x00\x00\x00\x18ftypisom" + bytes(50): "a video, not an image",
    b"%PDF-1.7": "a PDF document, not an image",
    b"PK\x03\x04xxxx": "a ZIP archive, not an image",
    b"version https://git-lfs.github.com/spec/v1\noid": "a Git LFS pointer",
    b'{"error": 1}': "a JSON file, not an image",
    b"<?xml version='1.0'?><svg>": "an SVG drawing",
    "nur Text, grüße".encode(): "a text file, not an image: it begins with 'nur Text, grüße'",
    b"\x01\x02\x03\x04\xff\xfe\x80 ?": "no image of a known format: it begins with 01 02 03 04",
    BAD["truncated JPEG"]: "the image is truncated: the end of the file is missing",
    BAD["PNG with a flipped bit"]: "the image is damaged or of an unusual kind: ",
    BAD["PNG of gigapixels"]: "the image is damaged: its first bytes are right",
}


@pytest.mark.parametrize("data", REASONS)
def test_the_reason_tells_a_person_what_the_file_is(data: bytes) -> None:
    with pytest.raises(Exception) as caught:  # decoders have no common class of errors
        normalise(data)
    reason = explain("/some/a.jpg", data, caught.value)
    assert reason.startswith(REASONS[data]) or REASONS[data] in reason
    assert "0x" not in reason and "BytesIO" not in reason and "\n" not in reason


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nothing", tmp_path / "link")
    assert explain(str(tmp_path / "x"), None, FileNotFoundError()) == "there is no such file"
    assert explain(str(tmp_path / "link"), None, FileNotFoundError()) == "a link to a file that does not exist"
    assert explain("/x", None, PermissionError(13, "no")) == "no permission to read the file"
    assert explain("/x", None, OSError(5, "Input/output error", "/x")) == "[Errno 5] Input/output error: ''"
