"""A CSV list of images as a catalogue, made without reading any image.

Its first line names the columns: path and label, or what other tools call them; optionally split,
camera, track, frame. Other columns are passed over.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.data.class_names import count, merge_spellings
from pipeline.data.entries import Catalogue, Entry, split_classes
from pipeline.data.given_splits import SPLIT_OF, understand_splits
from pipeline.errors import UserError
from pipeline.storage import Folder

ALIASES = {
    "path": [
        "path",
        "image_path",
        "img_path",
        "file_path",
        "filepath",
        "filename",
        "file_name",
        "file",
        "image",
        "image_name",
        "img",
        "uri",
    ],
    "label": [
        "label",
        "class",
        "class_name",
        "classname",
        "category",
        "identity",
        "person_id",
        "pid",
        "product_id",
        "item_id",
        "target",
        "species",
    ],
    "split": ["split", "subset", "partition"],
    "camera": ["camera", "camera_id", "cameraid", "cam", "cam_id", "camid"],
    "track": ["track", "track_id", "tracklet", "tracklet_id"],
    "frame": ["frame", "frame_id", "frame_number"],
    "is_query": ["is_query"],
    "is_gallery": ["is_gallery"],
}  # columns by what they hold; the earlier name wins
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t"}
_YES = ("1", "1.0", "true", "yes", "t", "y")
_NO = ("0", "0.0", "false", "no", "f", "n", "", "none", "nan", "null")


def table(
    path: str,
    separator: str = "comma",
    columns: Mapping[str, str] | None = None,
    root: str | None = None,
    resplit: bool = False,
) -> Catalogue:
    """Rows of a CSV file. Without a split column (or with `resplit`) the classes are split as for a folder.

    Args:
        path: Local path or URI of the list.
        separator: A name of SEPARATORS.
        columns: The list's own names of columns, by the keys of ALIASES; an empty name: pass over.
        root: The folder that relative paths start from (default: that of the list).
        resplit: Leave the split column alone.

    Raises:
        UserError: The list cannot be read, or its splits cannot be used; the line is named.
    """
    parent, _, name = Folder(path).uri.rpartition("/")
    directory = Folder(parent or "/")
    rows = _rows(_text(directory, name, path), SEPARATORS[separator], path)
    header = [text.strip() for text in next(rows, (0, []))[1]]
    position, notes = _columns(header, dict(columns or {}), path, separator)
    if resplit:
        position = {key: at for key, at in position.items() if key not in ("split", "is_query", "is_gallery")}
    place = Folder(root) if root else directory
    reader = _RowReader(path, place, header, position)
    entries = reader.number_cameras([entry for line, values in rows for entry in reader.entries(line, values)])
    if not entries:
        raise UserError(f"{path} has a header but no rows")
    notes += reader.notes()
    entries, more = merge_spellings(sorted(entries, key=lambda e: (e.class_name, e.source)))
    notes += more
    splits_given = "split" in position or "is_query" in position
    if splits_given:
        entries, more = understand_splits(entries, path)
        notes += more
    else:
        entries = split_classes(entries)
    protocol = None
    if entries[0].camera is not None and any(e.split != "train" for e in entries):
        protocol = "reid"
        entries = [replace(e, split="query") if e.split == "test" else e for e in entries]
    return Catalogue(entries, tuple(notes), protocol=protocol, splits_given=splits_given)


def _text(directory: Folder, name: str, path: str) -> str:
    """The list's text. What spreadsheets save as "Unicode text" is UTF-16 with a byte order mark."""
    try:
        data = directory.read(name)
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"CSV file {path} cannot be read as UTF-8 text (line {line}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"CSV file {path} cannot be read as UTF-8 text ({type(error).__name__}: {error})") from error


def _rows(text: str, separator: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their line; blank lines are left out.

    Raises:
        UserError: A quote is not closed on its line.
    """
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: a quote is not closed, or text follows it ({error}); write a quote within a quoted "
                'value twice, ""'
            ) from error
        if rows.line_num > line:
            raise UserError(
                f"{path}, line {line}: a quote that is opened there is closed in line {rows.line_num} only; close it on its "
                'line, and write a quote within a quoted value twice, ""'
            )
        if any(value.strip() for value in values):
            yield line, values


def _columns(
    header: Sequence[str], given: dict[str, str], path: str, separator: str
) -> tuple[dict[str, int], list[str]]:
    """The position of each column by what it holds, and notes on names that were understood and passed over."""
    unknown = [f"{key}={name}" for key, name in given.items() if name and name not in header]
    if unknown:
        raise UserError(f"{path} has the columns {list(header)}, not those of --columns {' '.join(unknown)}")
    names = [name.lower() for name in header]
    position: dict[str, int] = {}
    for key, aliases in ALIASES.items():
        if key in given:
            if given[key]:
                position[key] = header.index(given[key])
        elif present := [alias for alias in aliases if alias in names]:
            if present[0] != key and len(present) > 1:
                raise UserError(f"{path}: the {key} may be in {' or '.join(present)}: choose with --columns {key}=NAME")
            if names.count(present[0]) > 1:
                raise UserError(f"{path} has two columns {present[0]!r}: rename one")
            position[key] = names.index(present[0])
    if not {"path", "label"} <= position.keys():
        raise UserError(_explain_header(header, path, separator))
    renamed = [f"{header[at]} as {key}" for key, at in position.items() if names[at] != key]
    passed_over = [name for at, name in enumerate(header) if at not in position.values()]
    notes = [f"columns taken: {', '.join(renamed)}"] if renamed else []
    return position, notes + ([f"columns passed over: {', '.join(passed_over)}"] if passed_over else [])


def _explain_header(header: Sequence[str], path: str, separator: str) -> str:
    """Why a first line does not name a path and a label."""
    line = SEPARATORS[separator].join(header)
    for name, mark in SEPARATORS.items():
        names = {text.strip(' "').lower() for text in line.split(mark)}
        if name != separator and names & set(ALIASES["path"]) and names & set(ALIASES["label"]):
            return f"{path} separates its columns by {name}s, expected {separator}s: add --separator {name}"
    expected = "expected path,label or path,label,split"
    if len(header) > 1 and re.search(r"\.\w{3,4}$", header[0]):
        return f"{path}: its first line, {line!r}, looks like an image: {expected} as the first line"
    return f"{path} has the columns {list(header)}, {expected}; name your own with --columns path=NAME label=NAME"


class _RowReader:
    """Rows to entries; what is found on the way becomes notes.

    Args:
        path: The list, for messages.
        root: The folder that relative paths start from.
        header: Names of its columns.
        position: The column of each key of ALIASES.
    """

    def __init__(self, path: str, root: Folder, header: Sequence[str], position: Mapping[str, int]) -> None:
        self.path, self.root, self.header, self.position = path, root, header, position
        self.labels: dict[str, tuple[int, str]] = {}  # line and label of each image
        self.seen: set[tuple[str, str | None]] = set()
        self.cameras: list[str] = []
        self.repeated = self.backslashes = 0

    def entries(self, line: int, values: Sequence[str]) -> Iterator[Entry]:
        """The entry of a row: none if it repeats an earlier one, two if the image is query and gallery.

        Raises:
            UserError: The row lacks a value, or has one too many or of another kind; its image has
                another label in an earlier row.
        """
        row = {key: values[at].strip() for key, at in self.position.items() if at < len(values)}
        split = SPLIT_OF.get(row.get("split", "").lower())
        needed = [key for key in ("path", "label", "camera", "track") if key in self.position]
        bad_split = "split" in self.position and split is None
        if len(values) != len(self.header) or bad_split or not all(row.get(key) for key in needed):
            raise UserError(
                f"{self.path}, line {line}: got {list(values)}, expected {','.join(self.header)}, split one of "
                f"{', '.join(SPLIT_OF)}"
            )
        source, label = self._source(row["path"], line), row["label"]
        first_line, first = self.labels.setdefault(source, (line, label))
        if unicodedata.normalize("NFC", first) != unicodedata.normalize("NFC", label):
            raise UserError(
                f"{self.path}, line {line}: {source} has two labels, {label!r} and in line {first_line} {first!r}: "
                "leave one of the rows"
            )
        for side in self._sides(row, split, line):
            if (source, side) in self.seen:
                self.repeated += 1
                continue
            self.seen.add((source, side))
            self.cameras.append(row.get("camera", ""))
            yield Entry(source, label, side, track=row.get("track"), frame=self._frame(row, line))

    def _sides(self, row: Mapping[str, str], split: str | None, line: int) -> list[str | None]:
        """The splits that an image is in: query and gallery may be given by columns of their own."""
        if not {"is_query", "is_gallery"} <= row.keys() or split == "train":
            return [split]
        sides: list[str | None] = []
        for key in ("is_query", "is_gallery"):
            value = row[key].lower()
            if value not in _YES + _NO:
                raise UserError(f"{self.path}, line {line}: {key} is {row[key]!r}, expected 1 or 0")
            sides += [key.removeprefix("is_")] if value in _YES else []
        if not sides:
            raise UserError(f"{self.path}, line {line}: the image is neither query nor gallery nor train")
        return sides

    def _source(self, text: str, line: int) -> str:
        """Local path or URI of an image."""
        if "://" in text:
            return text
        if re.match(r"[A-Za-z]:[\\/]|\\\\", text):
            raise UserError(
                f"{self.path}, line {line}: {text!r} is a path of Windows: write paths relative to the list, or to --root"
            )
        if "\\" in text and not os.path.exists(os.path.join(self.root.uri, text)):
            text = text.replace("\\", "/")
            self.backslashes += 1
        text = os.path.expanduser(text)
        if not os.path.isabs(text):
            text = f"{self.root.uri}/{text}"
            if not self.root.is_local:
                return text
        return re.sub(r"/(\.?/)+", "/", text)  # ".." stays: it may lead out of a link

    def _frame(self, row: Mapping[str, str], line: int) -> int | None:
        if "frame" not in row:
            return None
        try:
            return int(row["frame"])
        except ValueError as error:
            raise UserError(f"{self.path}, line {line}: frame is {row['frame']!r}, expected a whole number") from error

    def number_cameras(self, entries: list[Entry]) -> list[Entry]:
        """Gives the entries, in the order of the rows, their cameras; tracks are made unique in the list.

        Cameras that are not numbers are numbered by name. A single camera is as good as none.
        """
        names = sorted(set(self.cameras))
        if len(names) > 1:
            numbered = all(re.fullmatch(r"\d{1,18}", name) for name in names)
            number_of = {name: int(name) if numbered else i for i, name in enumerate(names)}
            entries = [replace(e, camera=number_of[c]) for e, c in zip(entries, self.cameras, strict=True)]
        if "track" in self.position:
            entries = [
                replace(e, track=f"{e.split}/{e.class_name}/{camera}/{e.track}")
                for e, camera in zip(entries, self.cameras, strict=True)
            ]
        return entries

    def notes(self) -> list[str]:
        notes = []
        if self.repeated:
            notes.append(f"{count(self.repeated, 'row')} left out that repeat an earlier one (the same image twice)")
        if self.backslashes:
            notes.append(f"{count(self.backslashes, 'path')} written with backslashes: read as folders")
        if "camera" in self.position and len(set(self.cameras)) == 1:
            notes.append(f"all images are of camera {self.cameras[0]!r}: cameras are left out of account")
        elif "camera" in self.position:
            notes.append(
                "cameras are given: it is measured as re-identification, where images of the query's class by its own "
                "camera are ignored (not wanted: --columns camera=)"
            )
        return notes
