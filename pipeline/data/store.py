"""The Parquet store of a dataset: shards of encoded images sorted by split and class, a catalogue, and a manifest.

    manifest.json       format, fingerprint, counts, folds, shards with checksums; written last: without it there is no store
    catalog.parquet     sample_id, label, class_name, split, fold of every image, without pixels
    shards/*.parquet    sample_id, label, class_name, split, image (bytes of a plain JPEG or PNG)
    rejected.csv        source, class, reason of every image that could not be read

Sample ids follow the order of the catalogue that was asked for; a rejected image leaves a gap. Validation folds divide the
training classes (groups stay whole) and are the same for everyone who uses the store.

A dataset of tracklets has the columns track (numbered over the store), camera and frame as well, in the catalogue and in the
shards; test images of no class have the label DISTRACTOR or JUNK. How the test images are measured, the manifest says:

    leave_one_out   each test image is searched among the others
    query_gallery   query rows are searched in gallery rows
    reid            query rows are searched in query and gallery rows, where what the query's own camera took of the query's
                    class counts as junk. So a query is in the gallery of the others without being stored twice (MARS).

Where there is a column track, what is searched and found are tracklets.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from pipeline.data.own_images import DISTRACTOR, JUNK, LABELS, SPLITS, Entry, by_hash
from pipeline.data.transforms import MAX_PIXELS, normalise
from pipeline.errors import RunError, UserError
from pipeline.storage import Folder, read_file

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


@dataclass(frozen=True)
class Shard:
    """What one writing task is told: which entries, with which ids, labels, folds and further columns, go into which file."""

    file: str
    entries: tuple[Entry, ...]
    first_id: int
    labels: tuple[int, ...]
    folds: tuple[int, ...]
    further: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.entries)


def layout(entries: Iterable[Entry], num_folds: int, images_per_shard: int) -> list[Shard]:
    """Sorts by split, class and tracklet, numbers samples, classes and tracklets, deals the training groups into folds, cuts
    into shards.

    Raises:
        UserError: a distractor or junk in the training split; or tracks, cameras or frames of some images only.
    """
    ordered = sorted(
        entries, key=lambda e: (SPLITS.index(e.split or "train"), e.class_name, e.track or "", e.frame or 0, e.source)
    )
    further = _further(ordered)
    groups = by_hash(e.group or e.class_name for e in ordered if e.split == "train")
    fold_of = {group: i % num_folds for i, group in enumerate(groups)}
    label_of: dict[str, int] = {}
    for entry in ordered:
        if entry.kind is None:
            label_of.setdefault(entry.class_name, len(label_of))
        elif entry.split == "train":
            raise UserError(f"{entry.source} is {entry.kind} and in the training split: it can only be in the gallery")
    labels = [label_of[e.class_name] if e.kind is None else LABELS[e.kind] for e in ordered]
    shards: list[Shard] = []
    start = 0
    while start < len(ordered):
        split = ordered[start].split
        end = start + 1
        while end < len(ordered) and ordered[end].split == split and end - start < images_per_shard:
            end += 1
        part = tuple(ordered[start:end])
        folds = tuple(fold_of[e.group or e.class_name] if split == "train" else -1 for e in part)
        name = f"shards/{split}-{len(shards):05d}.parquet"
        values = {column: tuple(all_of[start:end]) for column, all_of in further.items()}
        shards.append(Shard(name, part, start, tuple(labels[start:end]), folds, values))
        start = end
    return shards


def _further(ordered: list[Entry]) -> dict[str, list[int]]:
    """Values of the columns that not every dataset has; tracks are numbered in the order of their first image."""
    tracks = {track: i for i, track in enumerate(dict.fromkeys(e.track for e in ordered if e.track is not None))}
    columns: dict[str, list[int | None]] = {
        "track": [None if e.track is None else tracks[e.track] for e in ordered],
        "camera": [e.camera for e in ordered],
        "frame": [e.frame for e in ordered],
    }
    found = {}
    for name, values in columns.items():
        present = [value for value in values if value is not None]
        if 0 < len(present) < len(ordered):
            raise UserError(
                f"{len(present)} of {len(ordered)} images have a {name}: give it for all of them, or for none"
            )
        if present:
            found[name] = present
    return found


def write_shard(
    shard: Shard, target: Folder, max_side: int | None, max_pixels: int = MAX_PIXELS, crop: bool = False
) -> dict[str, Any]:
    """Reads, checks and writes the images of one shard; returns its record for the manifest, with the rejected ones."""
    schema = pa.schema([*CATALOG, *(pa.field(name, pa.int64()) for name in shard.further)])
    columns: dict[str, list[Any]] = {name: [] for name in (*schema.names, "image")}
    rejected: list[tuple[str, str, str]] = []
    for offset, (entry, label, fold) in enumerate(zip(shard.entries, shard.labels, shard.folds, strict=True)):
        try:
            image = normalise(read_file(entry.source), max_side, entry.box if crop else None, max_pixels)
        except (UserError, RunError):  # the storage, not the image: a dataset must not depend on its faults
            raise
        except Exception as error:  # missing, or bad bytes, on which each decoder raises what it likes
            reason = (str(error).strip().splitlines() or [""])[0].replace(entry.source, "")
            rejected.append((entry.source, entry.class_name, f"{type(error).__name__}: {reason}"))
            continue
        more = (values[offset] for values in shard.further.values())
        row = (shard.first_id + offset, label, entry.class_name, entry.split, fold, *more, image)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    record: dict[str, Any] = {"file": shard.file, "rows": len(columns["image"]), "rejected": rejected}
    catalog = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    if len(catalog):
        images = pa.array(columns["image"], pa.binary())
        table = catalog.drop_columns(["fold"]).append_column("image", images)
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="none", write_page_checksum=True)
        data = sink.getvalue()
        target.write(shard.file, data)
        record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return record | {"catalog": catalog}


def write_store(
    name: str,
    entries: list[Entry],
    target: Folder,
    run: Callable[[Callable[[Shard], dict[str, Any]], list[Shard]], Iterator[dict[str, Any]]],
    *,
    num_folds: int = 4,
    images_per_shard: int = 512,
    max_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_rejected: float = 0.01,
    crop: bool = False,
    source: str = "entries",
    protocol: str | None = None,
    missing: Sequence[str] | None = None,
) -> Store:
    """Writes a whole store and opens it.

    Args:
        name: of the dataset, for reports.
        entries: what to write.
        target: an empty or unfinished store; files of the same names are replaced.
        run: maps a function over the shards, in any order; the parallel engine.
        num_folds: validation folds of the training classes.
        images_per_shard: upper bound.
        max_side: reduce images whose longer side is larger, pixels.
        max_pixels: images of more are rejected, see `normalise`.
        max_rejected: share of unreadable images above which the store is refused.
        crop: store what lies in the entries' boxes only.
        source: of the entries, for the manifest: the name of a dataset's layout, or folder, csv.
        protocol: one of PROTOCOLS (default: by the splits, query_gallery or leave_one_out).
        missing: what a published dataset lacks, a sentence each; None if there is nothing to compare with. Then rejected
            images are no lack.

    Raises:
        UserError: too many unreadable images, `rejected.csv` then names them; no boxes to crop to; what `layout` refuses.
    """
    if crop and not all(e.box for e in entries):
        raise UserError("not all images have a box to crop to: leave out --crop box")
    shards = layout(entries, num_folds, images_per_shard)
    target.check_writable()
    target.remove("manifest.json")
    write = functools.partial(write_shard, target=target, max_side=max_side, max_pixels=max_pixels, crop=crop)
    written = {r["file"]: r for r in run(write, shards)}
    records = [written[shard.file] for shard in shards]
    rejected = [line for r in records for line in r.pop("rejected")]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("source", "class", "reason"), *rejected])
    target.write("rejected.csv", text.getvalue().encode())
    if len(rejected) > max_rejected * len(entries):
        raise UserError(
            f"{len(rejected)} of {len(entries)} images cannot be read, more than {max_rejected:.1%} allowed; first: "
            f"{rejected[0][0]} ({rejected[0][2]}); all are listed in {target}/rejected.csv: repair them or raise "
            f"--max-rejected{'' if missing is None else ' (with --partial)'}"
        )
    if missing is not None and rejected:
        missing = [*missing, f"{len(rejected):,} images cannot be read"]
    catalog = pa.concat_tables([r.pop("catalog") for r in records])
    sink = io.BytesIO()
    pq.write_table(catalog, sink)
    target.write("catalog.parquet", sink.getvalue())
    records = [r for r in records if r["rows"]]
    checksum = hashlib.sha256(sink.getvalue()).hexdigest()
    splits = np.array(catalog["split"])
    labels, folds = np.array(catalog["label"]), np.array(catalog["fold"])
    tracks = np.array(catalog["track"]) if "track" in catalog.column_names else None
    target.write_json(
        "manifest.json",
        {
            "format": FORMAT,
            "name": name,
            "source": source,
            **({"partial": list(missing)} if missing else {}),
            **({"crop": "box"} if crop else {}),
            "protocol": protocol or ("query_gallery" if (splits == "query").any() else "leave_one_out"),
            "fingerprint": hashlib.sha256("".join([checksum, *(r["sha256"] for r in records)]).encode()).hexdigest()[
                :16
            ],
            "splits": {
                s: _counts(labels[splits == s], None if tracks is None else tracks[splits == s])
                for s in SPLITS
                if (splits == s).any()
            },
            "folds": [
                {"images": int((folds == f).sum()), "classes": len(np.unique(labels[folds == f]))}
                for f in range(num_folds)
            ],
            "rejected": len(rejected),
            "row_group": ROW_GROUP,
            "catalog": {"file": "catalog.parquet", "sha256": checksum},
            "shards": records,
        },
    )
    return Store(target)


def _counts(labels: Int64[np.ndarray, " images"], tracks: Int64[np.ndarray, " images"] | None) -> dict[str, int]:
    """What the manifest says of one split; images of no class are named where there are any."""
    counts = {"images": len(labels), "classes": len(np.unique(labels[labels >= 0]))}
    if tracks is not None:
        counts["tracks"] = len(np.unique(tracks))
    for name, label in (("distractors", DISTRACTOR), ("junk", JUNK)):
        if (labels == label).any():
            counts[name] = int((labels == label).sum())
    return counts


@dataclass(frozen=True)
class Samples:
    """A selection of images: their store ids, and their classes renumbered 0..C-1, but for DISTRACTOR and JUNK.

    Of tracklets, also their tracks (as the store numbers them), cameras and frames.
    """

    ids: Int64[np.ndarray, " samples"]
    labels: Int64[np.ndarray, " samples"]
    class_names: tuple[str, ...]
    tracks: Int64[np.ndarray, " samples"] | None = None
    cameras: Int64[np.ndarray, " samples"] | None = None
    frames: Int64[np.ndarray, " samples"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Bool[np.ndarray, " samples"]) -> Samples:
        """Some of them, with the classes of all."""
        tracks, cameras, frames = (None if c is None else c[chosen] for c in (self.tracks, self.cameras, self.frames))
        return Samples(self.ids[chosen], self.labels[chosen], self.class_names, tracks, cameras, frames)


class Store:
    """An opened store.

    Raises:
        UserError: there is no store, its format is newer than this program, its catalogue is damaged, or a shard is missing
            or has another size than the manifest says.
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
        catalog = pq.read_table(io.BytesIO(data), read_dictionary=["split"])  # few texts, many rows
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
        """How its test images are measured: one of PROTOCOLS."""
        by_splits = "query_gallery" if "query" in self.manifest["splits"] else "leave_one_out"
        return str(self.manifest.get("protocol", by_splits))  # not said in stores of earlier versions

    @property
    def title(self) -> str:
        """Its name for reports, with the fingerprint and what makes its figures incomparable."""
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

    def select(self, splits: Iterable[str], fold: int | None = None, without_fold: int | None = None) -> Samples:
        """Images of some splits: of one validation fold only, or of all but one. O(images of the store)."""
        mask = np.isin(self.split, list(splits))
        if fold is not None:
            mask &= self.fold == fold
        if without_fold is not None:
            mask &= self.fold != without_fold
        rows = np.flatnonzero(mask)
        labels = self.label[rows]
        named = labels >= 0
        present = np.bincount(labels[named]) > 0  # the store numbers its classes from 0
        labels[named] = (np.cumsum(present) - 1)[labels[named]]
        of_class = np.empty(present.sum(), dtype=np.int64)
        of_class[labels[named]] = rows[named]
        names = self._names.take(pa.array(of_class)).to_pylist()
        tracks, cameras, frames = (None if c is None else c[rows] for c in (self.track, self.camera, self.frame))
        return Samples(self.sample_id[rows], labels, tuple(names), tracks, cameras, frames)

    def shard_table(self, record: dict[str, Any]) -> pa.Table:
        """Reads one shard whole and compares its checksum.

        Raises:
            RunError: the bytes are not those that were written; the shard is named.
        """
        data = self.folder.read(record["file"])
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise RunError(
                f"shard {self.folder}/{record['file']} is damaged (checksum differs from the manifest's): "
                "copy it again or prepare the dataset again"
            )
        return pq.read_table(io.BytesIO(data))
