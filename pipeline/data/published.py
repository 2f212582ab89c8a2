"""The files of a published dataset, from its folder or its archives, and whether all that its authors list is there."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.io import loadmat

from pipeline.data.archives import FLOOR, RATIO, Unpacker, is_archive, names_in, scratch_folder, stem
from pipeline.data.entries import Entry
from pipeline.errors import UserError
from pipeline.storage import Folder

NAMED = 5  # missing files that a message names
NESTED = 3  # an archive in an archive in an archive


def listing(folder: Folder) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, without what is hidden; links to folders are followed."""
    if folder.is_local:
        for place, _, names in os.walk(folder.uri, followlinks=True):
            below = os.path.relpath(place, folder.uri)
            yield from (name if below == "." else f"{below}/{name}" for name in names)
    else:
        yield from folder.find()


class FileIndex:
    """Files below one or several roots, by their path from a root; the earlier root wins.

    Paths are compared in Unicode's composed form, since a Mac writes names decomposed. Hidden files are left out.

    Args:
        parts: each root with the paths of its files.
    """

    def __init__(self, parts: Iterable[tuple[str, Iterable[str]]]) -> None:
        self.root_of: dict[str, str] = {}
        self.spelled: dict[str, str] = {}
        for root, paths in parts:
            for path in paths:
                key = unicodedata.normalize("NFC", path)
                if key in self.root_of or any(p.startswith(".") or p == "__MACOSX" for p in key.split("/")):
                    continue
                self.root_of[key] = root
                if key != path:
                    self.spelled[key] = path
        self.folders = {""}
        for folder in {posixpath.dirname(path) for path in self.root_of}:
            while folder:
                self.folders.add(folder)
                folder = posixpath.dirname(folder)

    def source(self, path: str) -> str | None:
        """Local path or URI of a file; None if there is none."""
        key = unicodedata.normalize("NFC", path)
        root = self.root_of.get(key)
        return None if root is None else f"{root}/{self.spelled.get(key, key)}"

    def find(self, name: str) -> str | None:
        """The path of the file `name`, or of the folder if it ends in a slash: the one nearest to the top.

        Raises:
            UserError: there are two at the same depth.
        """
        if name.endswith("/"):
            found = [f for f in self.folders if f"/{f}/".endswith(f"/{name}")]
        else:
            found = [p for p in (posixpath.join(folder, name) for folder in self.folders) if p in self.root_of]
        found.sort(key=lambda path: (path.count("/"), path))
        if len(found) > 1 and found[0].count("/") == found[1].count("/"):
            raise UserError(f"{name} is in {found[0]} and in {found[1]}: name the folder of one of them with --from")
        return found[0] if found else None

    def get(self, name: str) -> str:
        """The same for what has to be there."""
        found = self.find(name)
        if found is None:
            raise UserError(f"{name} is missing")
        return found

    def lines(self, name: str) -> list[str]:
        """Lines of a text file, without blanks at their ends; empty ones stay, so that lines can be counted."""
        path = self.get(name)
        try:
            text = self._read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}): download it again") from error
        return [line.rstrip() for line in re.split(r"\r\n|\r|\n", text)]

    def mat(self, name: str) -> dict[str, Any]:
        """Variables of a MATLAB file of version 5; structs as dicts, arrays of structs as lists of them."""
        path = self.get(name)
        try:
            variables = loadmat(io.BytesIO(self._read(path)), simplify_cells=True)
        except Exception as error:  # scipy has no common class of errors for damaged files
            raise UserError(f"{path} cannot be read as a MATLAB file ({error}): download it again") from error
        return {key: value for key, value in variables.items() if not key.startswith("__")}

    def _read(self, path: str) -> bytes:
        parent, _, name = f"{self.root_of[path]}/{self.spelled.get(path, path)}".rpartition("/")
        return Folder(parent).read(name)


def scalar(value: Any) -> Any:
    """What lies in cells within cells."""
    while isinstance(value, (list, np.ndarray)) and np.size(value) == 1:
        value = value[0] if isinstance(value, list) else value.reshape(-1)[0]
    return value


@dataclass(frozen=True)
class DatasetFormat:
    """How a dataset's authors ship it.

    Attributes:
        title: the dataset's name.
        forms: files and folders (with a slash) that have to be there, in one of several forms.
        archives: pattern of the names (without suffix, in lower case) of those archives in a folder that are unpacked.
        read: yields the entries that the dataset's own lists name, each with its path in the tree as source.
        counts: how many images, classes and tracklets each split has; "query+gallery" is both together.
        protocol: see `store`.
        boxes: files that hold the boxes of the objects, beside those of `forms`; None if it has no boxes.
    """

    title: str
    forms: tuple[tuple[str, ...], ...]
    archives: str
    read: Callable[[FileIndex], Iterator[Entry]]
    counts: dict[str, dict[str, int]]
    protocol: str
    boxes: tuple[str, ...] | None = None

    def with_boxes(self) -> DatasetFormat:
        """The same, in need of its boxes.

        Raises:
            UserError: the dataset has none.
        """
        if self.boxes is None:
            raise UserError(f"{self.title} has no boxes: leave out --crop box")
        return replace(self, forms=tuple((*form, *self.boxes) for form in self.forms))

    def missing(self, tree: FileIndex) -> list[str]:
        """What the form that is nearest to being complete lacks."""
        return min(([name for name in form if tree.find(name) is None] for form in self.forms), key=len)

    def require(self, tree: FileIndex, where: str) -> None:
        missing = self.missing(tree)
        if missing:
            raise UserError(f"{self.title}: {named(missing)} missing in {where}; expected {_either(self.forms)}")


def named(names: Sequence[str]) -> str:
    """At most five of some names, and how many there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def _either(forms: tuple[tuple[str, ...], ...]) -> str:
    return "; or ".join(", ".join(form) for form in forms)


def listed(layout: DatasetFormat, tree: FileIndex, partial: bool) -> tuple[list[Entry], list[str]]:
    """The entries whose files are there, with their sources, and what the dataset lacks, a sentence each.

    Args:
        layout: of the dataset.
        tree: its files.
        partial: whether it may lack anything.

    Raises:
        UserError: it lacks something and may not, or its lists cannot be read.
    """
    found: list[Entry] = []
    lost: list[str] = []
    for entry in layout.read(tree):
        source = tree.source(entry.source)
        if source is None:
            lost.append(entry.source)
        else:
            found.append(replace(entry, source=source))
    number = len(found) + len(lost)
    problems = [f"{len(lost):,} of {number:,} listed images are missing"] if lost else []
    for splits, counts in layout.counts.items():
        got = count(found, splits.split("+"))
        wrong = [f"{got[what]:,} of {wanted:,} {what}" for what, wanted in counts.items() if got[what] != wanted]
        if wrong:
            problems.append(f"{splits}: {', '.join(wrong)}")
    if problems and not partial:
        first = f" ({named(lost)} missing)" if lost else ""
        raise UserError(
            f"{layout.title} is not complete: {'; '.join(problems)}{first}: unpack or download it again, "
            "or take it as it is with --partial, which every report will say"
        )
    if not found:
        raise UserError(f"{layout.title}: none of its {number:,} listed images is there")
    return found, problems


def count(entries: Sequence[Entry], splits: Sequence[str]) -> dict[str, int]:
    """Images, classes and tracklets of some splits; distractors and junk are of no class."""
    own = [e for e in entries if e.split in splits]
    return {
        "images": len(own),
        "classes": len({e.class_name for e in own if e.kind is None}),
        "tracks": len({e.track for e in own if e.track is not None}),
    }


@contextlib.contextmanager
def opened(
    layout: DatasetFormat,
    sources: Sequence[str],
    scratch: str,
    max_unpacked: int | None = None,
    before_unpacking: Callable[[str], None] = lambda place: None,
) -> Iterator[FileIndex]:
    """The files of a dataset; if they are (partly) in archives, unpacked until the block ends.

    Args:
        layout: of the dataset.
        sources: folders, archives, or folders of archives; local or URIs.
        scratch: folder to unpack in.
        max_unpacked: bytes that may be unpacked (default: 20 times the archives' size, and at least 1 GiB).
        before_unpacking: called with the empty folder that will be unpacked in; may object by an error.

    Raises:
        UserError: a source is neither; a file that the dataset needs is in none of them; an archive is refused.
    """
    roots, archives = [], []
    for source in sources:
        place = Folder(source)
        if not place.exists():
            raise UserError(f"{place} does not exist")
        if place.fs.isdir(place.path()):
            roots.append((place.uri, list(listing(place))))
        elif is_archive(source):
            archives.append((place.uri, ""))
        else:
            raise UserError(
                f"{place} is neither a folder nor an archive (.zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz)"
            )
    tree, where = FileIndex(roots), ", ".join(str(Folder(source)) for source in sources)
    if layout.missing(tree):
        archives += _archives(layout, tree)
    if not archives:
        layout.require(tree, where)
        yield tree
        return
    _look_ahead(layout, roots, archives, where)
    allowed = max_unpacked or max(FLOOR, RATIO * sum(_size(uri) for uri, _ in archives))
    with scratch_folder(scratch) as unpacked:
        before_unpacking(str(unpacked))
        unpack = Unpacker(unpacked, allowed)
        done: set[str] = set()
        for _ in range(NESTED):
            for uri, below in archives:
                unpack(uri, below)
                done.add(uri)
            tree = FileIndex([*roots, (str(unpacked), list(listing(Folder(unpacked))))])
            archives = [a for a in _archives(layout, tree) if a[0] not in done] if layout.missing(tree) else []
            if not archives:
                break
        layout.require(tree, where)
        yield tree


def _archives(layout: DatasetFormat, tree: FileIndex) -> list[tuple[str, str]]:
    """Archives in a tree that are the dataset's, each with the folder that it lies in."""
    paths = [p for p in tree.root_of if is_archive(p) and re.fullmatch(layout.archives, stem(p).lower())]
    return [(source, posixpath.dirname(path)) for path in sorted(paths) if (source := tree.source(path))]


def _look_ahead(
    layout: DatasetFormat, roots: list[tuple[str, list[str]]], archives: list[tuple[str, str]], where: str
) -> None:
    """Tells what is missing before anything is unpacked, where all names can be read without that."""
    inside = [(below, names_in(uri)) for uri, below in archives]
    if any(names is None or any(is_archive(name) for name in names) for _, names in inside):
        return
    packed = [("", [posixpath.join(below, name) for name in names or []]) for below, names in inside]
    layout.require(FileIndex([*roots, *packed]), where)


def _size(uri: str) -> int:
    parent, _, name = uri.rpartition("/")
    return Folder(parent).size(name)
