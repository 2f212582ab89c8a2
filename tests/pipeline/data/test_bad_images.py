"""Images that cannot be used, among many that can: all and only they are rejected, each with its reason."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.store import Store
from pipeline.storage import Folder
from tests.pipeline import shipped
from tests.pipeline.conftest import Cli, pixels, rejected


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@functools.cache
def wide(height: int, kind: str, width: int = 20_000) -> bytes:
    return encoded(Image.new("L" if kind == "JPEG" else "1", (width, height), 1), kind)


def flipped(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 30
    return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]


BAD: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "corrupt.png": (lambda i: flipped(encoded(i, "PNG")), ""),
    "truncated.jpg": (lambda i: encoded(i, "JPEG")[:-300], "truncated"),
    "truncated.png": (lambda i: encoded(i, "PNG")[:-300], ""),
    "empty.jpg": (lambda i: b"", "the file is empty (0 bytes)"),
    "text.jpg": (lambda i: b"<html>404</html>", "a web page (HTML), not an image"),
    "huge.jpg": (lambda i: wide(6000, "JPEG"), "20000 × 6000 pixels, more than --max-pixels 100,000,000"),
    "huge.png": (lambda i: wide(6000, "PNG"), "20000 × 6000 pixels, more than --max-pixels 100,000,000"),
}
FINE: dict[str, Callable[[Image.Image], bytes]] = {
    "a png.jpg": lambda i: encoded(i, "PNG"),
    "a gif.jpg": lambda i: encoded(i.quantize(16), "GIF"),
    "a jpeg.png": lambda i: encoded(i, "JPEG"),
    "no suffix": lambda i: encoded(i, "PNG"),
    "wide.jpg": lambda i: wide(50, "JPEG"),
}


def write_mixed(root: Path, number: int, every: int) -> Counter[str]:
    """`number` drawings in 20 classes, every so many of them bad or odd; returns how many of each kind."""
    kinds = [*BAD, *FINE]
    found: Counter[str] = Counter()
    for i in range(number):
        kind = kinds[(i // every) % len(kinds)] if i % every == 0 else "plain.png"
        found[kind] += 1
        path = root / f"class {i % 20:02d}" / f"{i:05d} {kind}"
        image = shipped.drawing(i)
        make = BAD[kind][0] if kind in BAD else FINE.get(kind, lambda image: encoded(image, "PNG"))
        shipped.write(path, make(image))
    return found


def check_mixed(cli: Cli, tmp_path: Path, number: int, every: int) -> None:
    """All and only the images that cannot be used are rejected, each with its reason."""
    counts = write_mixed(tmp_path / "mixed", number, every)
    bad = sum(counts[kind] for kind in BAD)
    assert bad >= len(BAD) and all(counts[kind] for kind in FINE)
    status, said = cli("folder", tmp_path / "mixed", "--max-rejected", "0.03")
    assert status == 0, said
    store = Store(Folder(tmp_path / "home/data/mixed"))
    reasons = rejected(store.folder)
    assert Counter(name[6:] for name in reasons) == Counter({kind: counts[kind] for kind in BAD})
    for name, reason in reasons.items():
        assert BAD[name[6:]][1] in reason and "0x" not in reason and "BytesIO" not in reason
    assert len(store.sample_id) == number - bad and store.manifest["rejected"] == bad
    assert f"rejected: {bad:,} images" in said


def test_all_and_only_what_cannot_be_used_is_rejected(cli: Cli, tmp_path: Path) -> None:
    check_mixed(cli, tmp_path, number=360, every=30)
    status, said = cli("folder", tmp_path / "mixed")
    assert status == 2 and "7 of 360 images cannot be read, more than 1.0% allowed" in said


@pytest.mark.slow
def test_of_ten_thousand_images_too(cli: Cli, tmp_path: Path) -> None:
    check_mixed(cli, tmp_path, number=10_000, every=60)


def test_a_large_jpeg_is_let_in_where_it_is_reduced(cli: Cli, tmp_path: Path) -> None:
    """It is decoded at an eighth; a PNG cannot be, and stays out; the bound can be raised."""
    for name, height in (("a/1", 600), ("a/2", 40), ("b/1", 40), ("c/1", 40), ("d/1", 40)):
        shipped.write(tmp_path / f"in/{name}.jpg", wide(height, "JPEG", 2000))
    shipped.write(tmp_path / "in/b/2.png", wide(600, "PNG", 2000))
    before = Image.MAX_IMAGE_PIXELS
    arguments = ["folder", tmp_path / "in", "--max-rejected", "0.5", "--folds", "2"]
    assert cli(*arguments, "--max-pixels", "1000000")[0] == 0
    assert sorted(rejected(Folder(tmp_path / "home/data/in"))) == ["1.jpg", "2.png"]
    assert cli(*arguments, "--max-pixels", "1000000", "--max-side", "100")[0] == 0
    store = Store(Folder(tmp_path / "home/data/in"))
    assert list(rejected(store.folder)) == ["2.png"]
    assert sorted({image.shape[:2] for image in pixels(store, store.sample_id)}) == [(2, 100), (30, 100)]
    assert cli(*arguments, "--max-pixels", "1200000")[0] == 0
    assert len(Store(Folder(tmp_path / "home/data/in")).sample_id) == 6 and before == Image.MAX_IMAGE_PIXELS
