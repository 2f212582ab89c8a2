"""The Parquet store of a dataset: shards of encoded images sorted by split and class, a catalogue, and a manifest.

    manifest.json       format, fingerprint, counts, folds, shards with checksums; written last: without it there is no store
    catalog.parquet     sample_id, label, class_name, split, fold, source (path or URI of its origin) of every image
    shards/*.parquet    sample_id, label, class_name, split, source, image (bytes of a plain JPEG or PNG)
    rejected.csv        source, class, reason of every image that could not be read
    copies.csv          copy_group, source, class, split of images whose files are the same, byte by byte; if there are any

Stores of earlier versions have no column source. The fingerprint does not depend on it: the same
images, prepared elsewhere, have the same one.

Sample ids follow the order of the entries; a rejected image leaves a gap. Validation folds divide
the training classes (groups stay whole) and are the same for everyone who uses the store.

A dataset of tracklets has the columns track (numbered over the store), camera and frame as well, in
the catalogue and in the shards; test images of no class have the label DISTRACTOR or JUNK. The
manifest's protocol says how test images are measured:

    leave_one_out   each test image is searched among the others
    query_gallery   query rows are searched in gallery rows
    reid            query rows are searched in query and gallery rows, where images of the query's class by the query's own
                    camera count as junk. So a query is in the gallery of the others without being stored twice (MARS).

Where there is a column track, queries and gallery are tracklets.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from pipeline.errors import RunError, UserError
from pipeline.storage import Folder

FORMAT = 1
PROTOCOLS = ("leave_one_out", "query_gallery", "reid")
ROW_GROUP = 16  # images: what one random access reads from object storage


CATALOG = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("label", pa.int64()),
        ("class_name", pa.string()),
        ("split", pa.string()),
        ("fold", pa.int64()),
    ]
)
SOURCE = pa.field("source", pa.string())


@dataclass(frozen=True)
class Samples:
    """A selection of images.

    Attributes:
        ids: Store sample ids.
        labels: Classes renumbered 0..C-1, or DISTRACTOR or JUNK.
        class_names: The name of each class.
        tracks: Tracklets, as the store numbers them; None unless the dataset has them.
        cameras: Camera numbers; None unless the dataset has them.
        frames: Frame numbers within the tracklets; None unless the dataset has them.
    """

    ids: Int64[np.ndarray, " samples"]
    labels: Int64[np.ndarray, " samples"]
    class_names: tuple[str, ...]
    tracks: Int64[np.ndarray, " samples"] | None = None
    cameras: Int64[np.ndarray, " samples"] | None = None
    frames: Int64[np.ndarray, " samples"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, mask: Bool[np.ndarray, " samples"]) -> Samples:
        """The images that the mask selects; classes keep their numbers and names."""
        tracks, cameras, frames = (None if c is None else c[mask] for c in (self.tracks, self.cameras, self.frames))
        return Samples(self.ids[mask], self.labels[mask], self.class_names, tracks, cameras, frames)


def read_table(data: bytes, columns: Sequence[str] | None = None, texts: Sequence[str] = ()) -> pa.Table:
    """A Parquet file's columns, read in the caller's thread; `texts` are columns of few different texts.

    Arrow's threads hold Python objects: one that outlives the interpreter's last line aborts the process at its end.
    """
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(texts) or None, pre_buffer=False)
    return file.read(None if columns is None else list(columns), use_threads=False)


class Store:
    """An opened store.

    Raises:
        UserError: There is no store, its format is newer than this program, its catalogue is
            damaged, or a shard is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        if not folder.exists("manifest.json"):
            raise UserError(f"no prepared dataset in {folder} (no manifest.json): run `python -m pipeline.prepare`")
        self.manifest: dict[str, Any] = folder.read_json("manifest.json")
        if self.manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder} has store format {self.manifest.get('format')}, this program reads format {FORMAT}: "
                "update raydml, or prepare the dataset again"
            )
        if self.protocol not in PROTOCOLS:
            raise UserError(f"{folder} is measured by {self.protocol!r}, this program knows {PROTOCOLS}: update raydml")
        self.name: str = self.manifest["name"]
        self.row_group: int = self.manifest.get("row_group", 64)  # images; earlier versions did not say
        self.fingerprint: str = self.manifest["fingerprint"]
        self.partial: tuple[str, ...] = tuple(self.manifest.get("partial", ()))
        if not folder.exists("catalog.parquet"):
            raise UserError(f"{folder}/catalog.parquet is missing: copy it again or prepare the dataset again")
        data = folder.read("catalog.parquet")
        if hashlib.sha256(data).hexdigest() != self.manifest["catalog"]["sha256"]:
            raise UserError(f"{folder}/catalog.parquet does not match its checksum: prepare the dataset again")
        names = pq.read_schema(pa.BufferReader(data)).names
        columns = [name for name in names if name != SOURCE.name]  # the longest texts, rarely needed
        catalog = read_table(data, columns, texts=["split"])  # few texts, many rows
        self._has_sources = SOURCE.name in names
        self.sample_id = np.asarray(catalog["sample_id"])
        self.label = np.asarray(catalog["label"])
        self.fold = np.asarray(catalog["fold"])
        split = catalog["split"].combine_chunks()
        self.split = np.array(split.dictionary.to_pylist(), dtype="U7")[split.indices]
        self.track, self.camera, self.frame = (
            np.asarray(catalog[name]) if name in catalog.column_names else None for name in ("track", "camera", "frame")
        )
        self._names = catalog["class_name"]

    @property
    def protocol(self) -> str:
        """The protocol by which test images are measured: one of PROTOCOLS."""
        default = "query_gallery" if "query" in self.manifest["splits"] else "leave_one_out"
        return str(self.manifest.get("protocol", default))  # absent in stores of earlier versions

    @property
    def title(self) -> str:
        """The name for reports, with the fingerprint, and "cropped" or "PARTIAL" where figures cannot be compared."""
        crop = ", cropped to boxes" if self.manifest.get("crop") == "box" else ""
        return f"{self.name} ({self.fingerprint}{crop}{', PARTIAL' if self.partial else ''})"

    def check_shards(self) -> None:
        """Compares the size of every shard with the manifest; one listing, no image is read."""
        sizes = {f"shards/{name}": size for name, size in self.folder.sizes("shards").items()}
        for shard in self.manifest["shards"]:
            size = sizes.get(shard["file"])
            if size != shard["bytes"]:
                got = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"shard {self.folder}/{shard['file']} {got}, the manifest says {shard['bytes']} bytes: "
                    "copy it again or prepare the dataset again"
                )

    @functools.cached_property
    def class_name_of(self) -> dict[int, str]:
        labels, rows = np.unique(self.label, return_index=True)
        return dict(zip(labels.tolist(), self._names.take(pa.array(rows)).to_pylist(), strict=True))

    def sources(self, ids: Int64[np.ndarray, " images"]) -> list[str] | None:
        """Paths or URIs that images were read from, by sample id; None in stores of earlier versions."""
        if not self._has_sources:
            return None
        return list(self._sources.take(pa.array(np.searchsorted(self.sample_id, ids))).to_pylist())

    @functools.cached_property
    def _sources(self) -> pa.ChunkedArray:
        """The column, read when it is first needed: as many bytes an image as its path is long."""
        data = self.folder.read("catalog.parquet")
        return read_table(data, [SOURCE.name])[SOURCE.name]

    def select(self, splits: Iterable[str], fold: int | None = None, without_fold: int | None = None) -> Samples:
        """Images of some splits: of one validation fold only, or of all but one. O(images of the store)."""
        mask = np.isin(self.split, list(splits))
        if fold is not None:
            mask &= self.fold == fold
        if without_fold is not None:
            mask &= self.fold != without_fold
        rows = np.flatnonzero(mask)
        labels = self.label[rows]
        has_class = labels >= 0
        present = np.bincount(labels[has_class]) > 0  # the store numbers its classes from 0
        labels[has_class] = (np.cumsum(present) - 1)[labels[has_class]]
        row_of_class = np.empty(present.sum(), dtype=np.int64)
        row_of_class[labels[has_class]] = rows[has_class]
        names = self._names.take(pa.array(row_of_class)).to_pylist()
        tracks, cameras, frames = (None if c is None else c[rows] for c in (self.track, self.camera, self.frame))
        return Samples(self.sample_id[rows], labels, tuple(names), tracks, cameras, frames)

    def shard_table(self, record: dict[str, Any]) -> pa.Table:
        """Reads one shard whole and compares its checksum.

        Raises:
            RunError: The bytes are not those that were written; the shard is named.
        """
        data = self.folder.read(record["file"])
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise RunError(
                f"shard {self.folder}/{record['file']} is damaged (checksum differs from the manifest's): "
                "copy it again or prepare the dataset again"
            )
        return read_table(data)
