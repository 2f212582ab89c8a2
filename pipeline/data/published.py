"""The files of a published dataset, from its folder or archives, and a check that all files in its lists are there."""

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

from pipeline.data.archives import MAX_RATIO, MIN_ALLOWANCE_BYTES, Unpacker, is_archive, names_in, scratch_folder, stem
from pipeline.data.entries import Entry
from pipeline.errors import UserError
from pipeline.storage import Folder

MAX_NAMES = 5  # missing files that a message names
MAX_NESTING = 3  # depth of archives within archives


def list_files(folder: Folder) -> Iterator[str]:
    """Paths of all files below a folder, relative to it; links to folders are followed."""
    if folder.is_local:
        for place, _, names in os.walk(folder.uri, followlinks=True):
            below = os.path.relpath(place, folder.uri)
            yield from (name if below == "." else f"{below}/{name}" for name in names)
    else:
        yield from folder.find()


class FileIndex:
    """Files below one or several roots, by their path from a root; the earlier root wins.

    Paths are compared in Unicode's composed form, since a Mac writes names decomposed. Hidden files
    are left out.

    Args:
        roots: Each root with the paths of its files.
    """

    def __init__(self, roots: Iterable[tuple[str, Iterable[str]]]) -> None:
        self.root_of: dict[str, str] = {}
        self.original_path: dict[str, str] = {}  # of paths that are not in composed form
        for root, paths in roots:
            for path in paths:
                key = unicodedata.normalize("NFC", path)
                if key in self.root_of or any(p.startswith(".") or p == "__MACOSX" for p in key.split("/")):
                    continue
                self.root_of[key] = root
                if key != path:
                    self.original_path[key] = path
        self.folders = {""}
        for folder in {posixpath.dirname(path) for path in self.root_of}:
            while folder:
                self.folders.add(folder)
                folder = posixpath.dirname(folder)

    def source(self, path: str) -> str | None:
        """Local path or URI of a file; None if there is none."""
        key = unicodedata.normalize("NFC", path)
        root = self.root_of.get(key)
        return None if root is None else f"{root}/{self.original_path.get(key, key)}"

    def find(self, name: str) -> str | None:
        """The path of the file `name`, or of the folder if it ends in a slash; None if there is none.

        Of several, the one nearest to the top.

        Raises:
            UserError: There are two at the same depth.
        """
        if name.endswith("/"):
            paths = [f for f in self.folders if f"/{f}/".endswith(f"/{name}")]
        else:
            paths = [p for p in (posixpath.join(folder, name) for folder in self.folders) if p in self.root_of]
        paths.sort(key=lambda path: (path.count("/"), path))
        if len(paths) > 1 and paths[0].count("/") == paths[1].count("/"):
            raise UserError(f"{name} is in {paths[0]} and in {paths[1]}: pass the intended folder with --from")
        return paths[0] if paths else None

    def get(self, name: str) -> str:
        """As `find`, for a file or folder that must exist.

        Raises:
            UserError: It is missing.
        """
        path = self.find(name)
        if path is None:
            raise UserError(f"{name} is missing")
        return path

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
        from scipy.io import loadmat  # here: only two datasets come as MATLAB files

        path = self.get(name)
        try:
            variables = loadmat(io.BytesIO(self._read(path)), simplify_cells=True)
        except Exception as error:  # scipy has no common class of errors for damaged files
            raise UserError(f"{path} cannot be read as a MATLAB file ({error}): download it again") from error
        return {key: value for key, value in variables.items() if not key.startswith("__")}

    def _read(self, path: str) -> bytes:
        parent, _, name = f"{self.root_of[path]}/{self.original_path.get(path, path)}".rpartition("/")
        return Folder(parent).read(name)


def scalar(value: Any) -> Any:
    """The one value within nested lists and arrays of one element, MATLAB's cells."""
    while isinstance(value, (list, np.ndarray)) and np.size(value) == 1:
        value = value[0] if isinstance(value, list) else value.reshape(-1)[0]
    return value


@dataclass(frozen=True)
class DatasetFormat:
    """The form in which a dataset's authors ship it.

    Attributes:
        title: The dataset's name.
        required_files: Alternative lists of the files and folders (with a slash) that have to be
            there.
        archives: Pattern of the names (without suffix, in lower case) of the archives in a folder
            that are unpacked.
        read: Yields the entries of the dataset's own lists, each with its path in the file index as
            source.
        counts: Numbers of images, classes and tracklets of each split; "query+gallery" is both
            together.
        protocol: One of `pipeline.data.store.PROTOCOLS`.
        boxes: Files that hold the boxes of the objects, beside `required_files`; None if the
            dataset has no boxes.
    """

    title: str
    required_files: tuple[tuple[str, ...], ...]
    archives: str
    read: Callable[[FileIndex], Iterator[Entry]]
    counts: dict[str, dict[str, int]]
    protocol: str
    boxes: tuple[str, ...] | None = None

    def with_boxes(self) -> DatasetFormat:
        """The same format, with the files of the boxes required.

        Raises:
            UserError: The dataset has none.
        """
        if self.boxes is None:
            raise UserError(f"{self.title} has no boxes: leave out --crop box")
        return replace(self, required_files=tuple((*files, *self.boxes) for files in self.required_files))

    def missing(self, index: FileIndex) -> list[str]:
        """Files that are not there, of the alternative that lacks the fewest."""
        return min(([name for name in files if index.find(name) is None] for files in self.required_files), key=len)

    def require(self, index: FileIndex, searched: str) -> None:
        """Raises UserError unless all required files are there; `searched` names the sources for the message."""
        missing = self.missing(index)
        if missing:
            expected = "; or ".join(", ".join(files) for files in self.required_files)
            raise UserError(f"{self.title}: {join_names(missing)} missing in {searched}; expected {expected}")


def join_names(names: Sequence[str]) -> str:
    """The first five names, the number of the others, and "is" or "are"."""
    others = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return f"{', '.join(names[:MAX_NAMES])}{others} {'is' if len(names) == 1 else 'are'}"


def read_entries(dataset: DatasetFormat, index: FileIndex, partial: bool) -> tuple[list[Entry], list[str]]:
    """Entries of the images that are there, with their sources, and a sentence for each thing that is missing.

    Args:
        dataset: The dataset's format.
        index: Its files.
        partial: Accept an incomplete dataset.

    Raises:
        UserError: The dataset is not complete and `partial` is false, or its lists cannot be read.
    """
    entries: list[Entry] = []
    missing: list[str] = []
    for entry in dataset.read(index):
        source = index.source(entry.source)
        if source is None:
            missing.append(entry.source)
        else:
            entries.append(replace(entry, source=source, path=entry.source))
    num_listed = len(entries) + len(missing)
    problems = [f"{len(missing):,} of {num_listed:,} listed images are missing"] if missing else []
    for splits, expected in dataset.counts.items():
        counts = count(entries, splits.split("+"))
        wrong = [
            f"{counts[unit]:,} of {number:,} {unit}" for unit, number in expected.items() if counts[unit] != number
        ]
        if wrong:
            problems.append(f"{splits}: {', '.join(wrong)}")
    if problems and not partial:
        names = f" ({join_names(missing)} missing)" if missing else ""
        raise UserError(
            f"{dataset.title} is not complete: {'; '.join(problems)}{names}: unpack or download it again, "
            "or accept it as it is with --partial, which every report will say"
        )
    if not entries:
        raise UserError(f"{dataset.title}: none of its {num_listed:,} listed images is there")
    return entries, problems


def count(entries: Sequence[Entry], splits: Sequence[str]) -> dict[str, int]:
    """Numbers of images, classes and tracklets of some splits; distractors and junk are of no class."""
    selected = [e for e in entries if e.split in splits]
    return {
        "images": len(selected),
        "classes": len({e.class_name for e in selected if e.kind is None}),
        "tracks": len({e.track for e in selected if e.track is not None}),
    }


@contextlib.contextmanager
def open_sources(
    dataset: DatasetFormat,
    sources: Sequence[str],
    scratch: str,
    max_unpacked: int | None = None,
    before_unpacking: Callable[[str], None] = lambda folder: None,
) -> Iterator[FileIndex]:
    """The files of a dataset; archives are unpacked until the block ends.

    Args:
        dataset: The dataset's format.
        sources: Folders, archives, or folders of archives; local or URIs.
        scratch: Parent of the folder to unpack in.
        max_unpacked: Upper bound for the unpacked bytes (default: 20 times the archives' size, and
            at least 1 GiB).
        before_unpacking: Called with the empty folder that archives are unpacked into; an error
            that it raises ends all.

    Raises:
        UserError: A source is neither folder nor archive; a required file is in none of them; an
            archive is refused.
    """
    roots, archives = [], []
    for source in sources:
        location = Folder(source)
        if not location.exists():
            raise UserError(f"{location} does not exist")
        if location.fs.isdir(location.path()):
            roots.append((location.uri, list(list_files(location))))
        elif is_archive(source):
            archives.append((location.uri, ""))
        else:
            raise UserError(
                f"{location} is neither a folder nor an archive (.zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz)"
            )
    index = FileIndex(roots)
    searched = ", ".join(str(Folder(source)) for source in sources)
    if dataset.missing(index):
        archives += _archives(dataset, index)
    if not archives:
        dataset.require(index, searched)
        yield index
        return
    _check_before_unpacking(dataset, roots, archives, searched)
    max_bytes = max_unpacked or max(MIN_ALLOWANCE_BYTES, MAX_RATIO * sum(_size(uri) for uri, _ in archives))
    with scratch_folder(scratch) as folder:
        before_unpacking(str(folder))
        unpack = Unpacker(folder, max_bytes)
        unpacked: set[str] = set()
        for _ in range(MAX_NESTING):
            for uri, below in archives:
                unpack(uri, below)
                unpacked.add(uri)
            index = FileIndex([*roots, (str(folder), list(list_files(Folder(folder))))])
            nested = _archives(dataset, index) if dataset.missing(index) else []
            archives = [(uri, below) for uri, below in nested if uri not in unpacked]
            if not archives:
                break
        dataset.require(index, searched)
        yield index


def _archives(dataset: DatasetFormat, index: FileIndex) -> list[tuple[str, str]]:
    """The dataset's archives among its files, each with the folder that it lies in."""
    paths = [p for p in index.root_of if is_archive(p) and re.fullmatch(dataset.archives, stem(p).lower())]
    return [(source, posixpath.dirname(path)) for path in sorted(paths) if (source := index.source(path))]


def _check_before_unpacking(
    dataset: DatasetFormat, roots: list[tuple[str, list[str]]], archives: list[tuple[str, str]], searched: str
) -> None:
    """Raises UserError for missing files before anything is unpacked, where archives can be listed without that."""
    members = [(below, names_in(uri)) for uri, below in archives]
    if any(names is None or any(is_archive(name) for name in names) for _, names in members):
        return
    packed = [("", [posixpath.join(below, name) for name in names or []]) for below, names in members]
    dataset.require(FileIndex([*roots, *packed]), searched)


def _size(uri: str) -> int:
    parent, _, name = uri.rpartition("/")
    return Folder(parent).size(name)
