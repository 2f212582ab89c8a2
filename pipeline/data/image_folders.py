"""A folder of class folders as a catalogue, made without reading any image.

    ROOT/CLASS/IMAGE                                     the classes are split here
    ROOT/train/CLASS/IMAGE, ROOT/test/CLASS/IMAGE, ...   the splits are those of the folders

Images in subfolders belong to the class above them. Hidden files, and files that are no images by
their names, are passed over; other files count as images, whatever their suffix.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.data.class_names import count, merge_spellings, some
from pipeline.data.entries import Catalogue, Entry, split_classes
from pipeline.data.given_splits import SPLIT_OF, understand_splits
from pipeline.errors import UserError
from pipeline.storage import Folder

_OTHER_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "readme", "license", "licence", "copying")
_OTHER_SUFFIXES = frozenset(
    [
        ".txt",
        ".md",
        ".rst",
        ".rtf",
        ".pdf",
        ".doc",
        ".docx",
        ".odt",
        ".html",
        ".htm",
        ".xml",
        ".json",
        ".jsonl",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".log",
        ".csv",
        ".tsv",
        ".xls",
        ".xlsx",
        ".ods",
        ".db",
        ".sqlite",
        ".parquet",
        ".arrow",
        ".npy",
        ".npz",
        ".mat",
        ".pkl",
        ".pickle",
        ".h5",
        ".pt",
        ".pth",
        ".safetensors",
        ".onnx",
        ".py",
        ".ipynb",
        ".sh",
        ".bat",
        ".exe",
        ".zip",
        ".tar",
        ".gz",
        ".tgz",
        ".bz2",
        ".xz",
        ".7z",
        ".rar",
        ".lnk",
        ".url",
        ".aae",
        ".xmp",
        ".mp4",
        ".mov",
        ".avi",
        ".mkv",
        ".webm",
        ".mp3",
        ".wav",
        ".m4a",
        ".srt",
        ".part",
        ".tmp",
        ".bak",
        ".crdownload",
        ".md5",
        ".sha256",
        ".license",
    ]
)  # of files that lie beside images; an unknown suffix, or none, counts as an image
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


@dataclass
class Files:
    """What lies below a folder, by paths relative to it, hidden names left out.

    Attributes:
        images: Files that are images by their names.
        others: Files that are not.
        broken: Links to nothing.
        folders: All folders.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        name = posixpath.basename(path).lower()
        other = name in _OTHER_NAMES or posixpath.splitext(name)[1] in _OTHER_SUFFIXES
        (self.others if other else self.images).append(path)


def folder(root: str, resplit: bool = False, class_level: int = 1) -> Catalogue:
    """Images in `root/CLASS/...`, or in `root/SPLIT/CLASS/...` where all folders are named as splits are.

    Args:
        root: Local path or URI.
        resplit: Pool the images of the split folders and split the classes anew.
        class_level: The folder that names the class, counted from the root (or the split) on.

    Raises:
        UserError: There are no images in class folders; a link leads into a loop; a name is not
            UTF-8; the splits cannot be used.
    """
    images = Folder(root)
    if not images.exists():
        raise UserError(f"folder {images} does not exist")
    if images.is_local and not os.path.isdir(images.uri):
        raise UserError(
            f"{images} is a file, expected a folder of class folders: unpack an archive first; a list is prepared by "
            "`python -m pipeline.prepare csv`"
        )
    try:
        found = list_files(images)
    except OSError as error:
        raise UserError(f"folder {images} cannot be read ({error}): change its permissions, or move it away") from error
    top, by_split = _layout(images, found.images, may_descend=class_level == 1)
    level = class_level + (top.count("/") + 1 if top else 0) + by_split
    entries, beside, below = [], [], []
    for path in found.images:
        parts = path.split("/")
        if len(parts) <= level:
            beside.append(path)
            continue
        if len(parts) > level + 1:
            below.append(path)
        split = SPLIT_OF[parts[level - class_level - 1].lower()] if by_split and not resplit else None
        entries.append(Entry(f"{images}/{path}", parts[level - 1], split))
    if not entries:
        raise UserError(_nothing_found(images, found, beside))
    notes = _notes(found, level, beside, below, class_level)
    if top:
        notes.insert(0, f"the class folders are those in {images}/{top}")
    entries, more = merge_spellings(sorted(entries, key=lambda e: (e.class_name, e.source)))
    notes += more
    splits_given = by_split and not resplit
    if splits_given:
        entries, more = understand_splits(entries, str(images))
        notes += more
    else:
        entries = split_classes(entries)
    left_out = tuple((f"{images}/{path}", posixpath.dirname(path), "a link to a file that does not exist")
                     for path in found.broken)  # fmt: skip
    return Catalogue(entries, tuple(notes), left_out, splits_given=splits_given)


def list_files(root: Folder) -> Files:
    """All files below a folder; links are followed.

    Raises:
        OSError: A local folder cannot be listed.
        UserError: A link leads to a folder above it; a name is not UTF-8.
    """
    found = Files()
    if root.is_local:
        status = os.stat(root.uri)
        _walk(root.uri, "", {(status.st_dev, status.st_ino)}, found)
    else:
        for path in root.find():
            if not any(_is_hidden(part) for part in path.split("/")):
                found.add(path)
    return found


def _walk(folder: str, below: str, above: set[tuple[int, int]], found: Files) -> None:
    with os.scandir(folder) as listing:
        items = sorted(listing, key=lambda item: item.name)
    for item in items:
        path = f"{below}/{item.name}" if below else item.name
        if any("\udc80" <= c <= "\udcff" for c in item.name):  # surrogate escapes: undecodable bytes
            raise UserError(f"{folder}/{item.name!r}: its name is not UTF-8; rename it")
        if _is_hidden(item.name):
            continue
        if os.path.isdir(item.path):
            status = os.stat(item.path)
            key = (status.st_dev, status.st_ino)
            if key in above:
                raise UserError(f"{item.path} is a link to a folder that it lies in, a loop: remove it")
            found.folders.append(path)
            _walk(item.path, path, above | {key}, found)
        elif os.path.isfile(item.path):
            found.add(path)
        else:  # a pipe or a socket would never end
            (found.others if os.path.exists(item.path) else found.broken).append(path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _layout(root: Folder, paths: Sequence[str], may_descend: bool) -> tuple[str, bool]:
    """The folder that the class or split folders lie in, relative to the root; and whether they are split folders.

    A folder that alone holds all images, in at least two levels, is taken for a wrapper.
    """
    top = ""
    while True:
        skip = top.count("/") + 1 if top else 0
        parts = [p for path in paths if len(p := path.split("/")[skip:]) > 1]
        names = {p[0] for p in parts}
        splits = {name for name in names if name.lower() in SPLIT_OF}
        with_classes = [name for name in splits if all(len(p) > 2 for p in parts if p[0] == name)]
        if splits and splits == names:
            if len(with_classes) < len(splits):
                direct = min(set(splits) - set(with_classes))
                raise UserError(
                    f"{root}/{posixpath.join(top, direct)} holds images without class folders: expected images as "
                    f"{root}/{posixpath.join(top, direct)}/CLASS/IMAGE; labels of a list are read by "
                    "`python -m pipeline.prepare csv`"
                )
            return top, True
        if len(with_classes) > 1:
            raise UserError(
                f"{root} has the split folders {some(with_classes)} and beside them {some(names - splits)}: "
                "move the latter away, or rename the former"
            )
        if may_descend and len(names) == 1 and len(parts) == len(paths) and all(len(p) > 2 for p in parts):
            top = posixpath.join(top, names.pop())
            continue
        return top, False


def _notes(found: Files, level: int, beside: Sequence[str], below: Sequence[str], class_level: int) -> list[str]:
    """What was left out, and what was understood, in words."""
    notes = []
    if found.others:
        names = Counter(posixpath.basename(path) for path in found.others)
        common = [name for name, _ in names.most_common(3)]
        notes.append(
            f"{count(len(found.others), 'file that is no image', 'files that are no images')} passed over: {some(common)}"
        )
    if found.broken:
        notes.append(
            f"{count(len(found.broken), 'link')} to files that do not exist left out (first: {found.broken[0]}), see rejected.csv"
        )
    if beside:
        notes.append(f"{count(len(beside), 'image')} in no class folder left out (first: {beside[0]})")
    if below:
        notes.append(
            f"{count(len(below), 'image lies in a subfolder', 'images lie in subfolders')} of the class folders and "
            f"{'belongs' if len(below) == 1 else 'belong'} to their classes (first: {below[0]}); if the folder below names "
            f"the class, add --class-level {class_level + 1}"
        )
    filled = {"/".join(path.split("/")[:level]) for path in found.images}
    empty = [path for path in found.folders if path.count("/") + 1 == level and path not in filled]
    if empty:
        notes.append(f"{count(len(empty), 'class folder')} without an image: {some(empty)}")
    return notes


def _nothing_found(root: Folder, found: Files, beside: Sequence[str]) -> str:
    if beside:
        return (
            f"{root}/{beside[0]}: expected images as {root}/CLASS/IMAGE, one folder a class; labels of a list are read by "
            "`python -m pipeline.prepare csv`"
        )
    reason = f"no image in {root}: expected {root}/CLASS/IMAGE"
    archives = [path for path in found.others if path.lower().endswith(_ARCHIVES)]
    if archives:
        return f"{reason}; unpack {archives[0]} first"
    lists = [path for path in found.others if path.lower().endswith((".csv", ".tsv"))]
    if lists:
        return f"{reason}; a list is prepared by `python -m pipeline.prepare csv {root}/{lists[0]}`"
    if found.broken:
        return f"{reason}; {count(len(found.broken), 'link')} there lead to files that do not exist"
    return reason
