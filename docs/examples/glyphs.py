"""Draws a small set of images to try raydml on: one folder a class, a class is one glyph of the DejaVu fonts.

    python docs/examples/glyphs.py glyphs --classes 120 --images 10

Every image of a class shows its glyph in another font, size, colour, angle and place. The fonts come with matplotlib.
"""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique")
# Latin, Greek, Cyrillic, arrows, mathematics, shapes and symbols: all in every font above.
RANGES = (
    (0x41, 0x5B),
    (0x61, 0x7B),
    (0x3B1, 0x3CA),
    (0x416, 0x450),
    (0x2190, 0x2196),
    (0x2200, 0x2223),
    (0x2660, 0x2668),
)


def glyphs() -> list[str]:
    """Characters that may become classes, in a fixed mixed order."""
    characters = [chr(code) for first, last in RANGES for code in range(first, last)]
    order = np.random.default_rng(0).permutation(len(characters))
    return [characters[i] for i in order]


def draw(character: str, rng: np.random.Generator, side: int) -> Image.Image:
    """One image of `side` x `side` pixels."""
    hue = rng.uniform()
    ink = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.3, 0.7)))
    paper = tuple(
        int(255 * c) for c in colorsys.hsv_to_rgb((hue + rng.uniform(0.3, 0.7)) % 1, 0.25, rng.uniform(0.85, 1))
    )
    font = ImageFont.truetype(
        str(Path(get_data_path()) / "fonts" / "ttf" / f"{rng.choice(FONTS)}.ttf"), int(side * rng.uniform(0.5, 0.8))
    )
    image = Image.new("RGB", (side, side), paper)
    centre = tuple(side / 2 + rng.uniform(-0.1, 0.1, 2) * side)
    ImageDraw.Draw(image).text(centre, character, font=font, fill=ink, anchor="mm")
    return image.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, fillcolor=paper)


def write(root: Path, classes: int, images: int, side: int = 64, seed: int = 0) -> None:
    """Writes ROOT/CLASS/NUMBER.png.

    Raises:
        ValueError: more classes are asked for than there are glyphs.
    """
    known = glyphs()
    if classes > len(known):
        raise ValueError(f"{classes} classes asked for, there are {len(known)} glyphs")
    for character in known[:classes]:
        folder = root / f"U+{ord(character):04X}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(images):
            draw(character, np.random.default_rng((seed, ord(character), number)), side).save(folder / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to write to")
    parser.add_argument("--classes", type=int, default=120)
    parser.add_argument("--images", type=int, default=10, help="images a class")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    options = parser.parse_args()
    write(options.root, options.classes, options.images, options.side)
    print(f"{options.classes} classes of {options.images} images: {options.root}")


if __name__ == "__main__":
    main()
