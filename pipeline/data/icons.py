"""The Material icons as a dataset: icons that Google drew in four styles, each drawing in colours of its own.

The fonts come with the wheel tkinter-icons-gmi (its code is not imported); the icons are Google's, under the Apache License 2.0.
"""

from __future__ import annotations

import colorsys
import hashlib
import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.entries import Entry, split_classes
from pipeline.errors import UserError

LICENCE = "the Material icons are by Google, under the Apache License 2.0"
SIDE = 72  # pixels, as the emoji
FONTS = {
    "baseline": "MaterialIcons-Regular.ttf",
    "outlined": "MaterialIconsOutlined-Regular.otf",
    "round": "MaterialIconsRound-Regular.otf",
    "sharp": "MaterialIconsSharp-Regular.otf",
}
Colour = tuple[int, int, int]


def draw_icons(folder: Path) -> list[Entry]:
    """Draws all icons that have every style. Class = icon, image = style.

    Some icons have several names: of names with the same drawing in some style the first in alphabetical order stays. The colours
    of an image are drawn at random, from its name, so that they are the same everywhere.

    Args:
        folder: Where STYLE/NAME.png are written, `SIDE` x `SIDE` pixels.

    Raises:
        UserError: The package with the fonts is not installed, or is not whole.
    """
    spec = importlib.util.find_spec("tkinter_icons_gmi")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the icons are not installed: pip install 'raydml[demo]' (package tkinter-icons-gmi)")
    root = Path(spec.submodule_search_locations[0])
    try:
        codes = {style: json.loads((root / f"glyphmap-{style}.json").read_bytes()) for style in FONTS}
        fonts = {s: ImageFont.truetype(str(root / "fonts" / file), int(0.8 * SIDE)) for s, file in FONTS.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{root} has no fonts that can be read ({error}): reinstall tkinter-icons-gmi") from error
    names = sorted(set.intersection(*(set(of_style) for of_style in codes.values())))
    masks = {
        (name, style): _draw(chr(int(codes[style][name], 16)), font) for style, font in fonts.items() for name in names
    }
    entries = []
    for style in FONTS:
        (folder / style).mkdir(parents=True)
    for name in _distinct(names, masks):
        for style in FONTS:
            path = folder / style / f"{name}.png"
            _coloured(masks[name, style], f"{name}/{style}").save(path)
            entries.append(Entry(str(path), name, path=f"{style}/{name}.png"))
    return split_classes(entries)


def _draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """A character in the middle of the image, white on black, one channel."""
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).text((SIDE / 2, SIDE / 2), character, font=font, fill=255, anchor="mm")
    return mask


def _distinct(names: list[str], masks: dict[tuple[str, str], Image.Image]) -> list[str]:
    """The first name of each group of icons that look the same in some style, or are joined by others that do."""
    group = {name: name for name in names}

    def first(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    alike: dict[tuple[str, bytes], list[str]] = defaultdict(list)
    for (name, style), mask in masks.items():
        alike[style, mask.tobytes()].append(name)
    for same in alike.values():
        for name in same[1:]:
            low, high = sorted((first(same[0]), first(name)))
            group[high] = low
    return [name for name in names if group[name] == name]


def _coloured(mask: Image.Image, seed: str) -> Image.Image:
    """A drawing in two colours, dark on light or light on dark, as in applications of different themes."""
    random = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    hue = random.uniform()
    dark = _rgb(hue, random.uniform(0.5, 1), random.uniform(0.2, 0.6))
    light = _rgb((hue + random.uniform(0.3, 0.7)) % 1, random.uniform(0, 0.4), random.uniform(0.85, 1))
    paper, ink = (dark, light) if random.uniform() < 0.5 else (light, dark)
    return Image.composite(Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, paper), mask)


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue
