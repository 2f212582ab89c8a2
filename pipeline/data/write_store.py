"""Writes a store: shards by parallel tasks, then the catalogue, then the manifest."""

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
from jaxtyping import Int64

from pipeline.data.entries import DISTRACTOR, JUNK, LABELS, MAX_PIXELS, SPLITS, Entry, by_hash
from pipeline.data.image_files import normalise
from pipeline.data.store import CATALOG, FORMAT, ROW_GROUP, Store
from pipeline.errors import RunError, UserError, one_line
from pipeline.storage import Folder, read_file


@dataclass(frozen=True)
class Shard:
    """One writing task: the images of a file, with the values of their columns.

    Attributes:
        file: Path below the store.
        entries: The images, in order.
        first_id: Sample id of the first; the others follow.
        labels: The class of each, or DISTRACTOR or JUNK.
        folds: The validation fold of each, -1 for test images.
        extra_columns: Values of track, camera and frame, where the dataset has them.
    """

    file: str
    entries: tuple[Entry, ...]
    first_id: int
    labels: tuple[int, ...]
    folds: tuple[int, ...]
    extra_columns: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.entries)


def plan_shards(entries: Iterable[Entry], num_folds: int, images_per_shard: int) -> list[Shard]:
    """Sorts by split, class and tracklet, numbers samples, classes and tracklets, deals the training groups into folds, cuts
    into shards.

    Raises:
        UserError: A distractor or junk in the training split; or tracks, cameras or frames of some
            images only.
    """
    ordered = sorted(
        entries, key=lambda e: (SPLITS.index(e.split or "train"), e.class_name, e.track or "", e.frame or 0, e.source)
    )
    extra_columns = _extra_columns(ordered)
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
        images = tuple(ordered[start:end])
        folds = tuple(fold_of[e.group or e.class_name] if split == "train" else -1 for e in images)
        name = f"shards/{split}-{len(shards):05d}.parquet"
        values = {column: tuple(all_values[start:end]) for column, all_values in extra_columns.items()}
        shards.append(Shard(name, images, start, tuple(labels[start:end]), folds, values))
        start = end
    return shards


def _extra_columns(ordered: list[Entry]) -> dict[str, list[int]]:
    """Values of track, camera and frame, where the dataset has them; tracks are numbered by their first image."""
    tracks = {track: i for i, track in enumerate(dict.fromkeys(e.track for e in ordered if e.track is not None))}
    candidates: dict[str, list[int | None]] = {
        "track": [None if e.track is None else tracks[e.track] for e in ordered],
        "camera": [e.camera for e in ordered],
        "frame": [e.frame for e in ordered],
    }
    columns = {}
    for name, values in candidates.items():
        present = [value for value in values if value is not None]
        if 0 < len(present) < len(ordered):
            raise UserError(
                f"{len(present)} of {len(ordered)} images have a {name}: give it for all of them, or for none"
            )
        if present:
            columns[name] = present
    return columns


def write_shard(
    shard: Shard, target: Folder, max_side: int | None, max_pixels: int = MAX_PIXELS, crop: bool = False
) -> dict[str, Any]:
    """Reads, checks and writes the images of one shard; returns its record, with its catalogue and rejected images."""
    schema = pa.schema([*CATALOG, *(pa.field(name, pa.int64()) for name in shard.extra_columns)])
    columns: dict[str, list[Any]] = {name: [] for name in (*schema.names, "image")}
    rejected: list[tuple[str, str, str]] = []
    for offset, (entry, label, fold) in enumerate(zip(shard.entries, shard.labels, shard.folds, strict=True)):
        try:
            image = normalise(read_file(entry.source), max_side, entry.box if crop else None, max_pixels)
        except (UserError, RunError):  # the storage, not the image: a dataset must not depend on its faults
            raise
        except Exception as error:  # missing, or bad bytes, for which decoders have no common class of errors
            rejected.append((entry.source, entry.class_name, one_line(error).replace(entry.source, "")))
            continue
        extra_values = (values[offset] for values in shard.extra_columns.values())
        row = (shard.first_id + offset, label, entry.class_name, entry.split, fold, *extra_values, image)
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
        name: The dataset's name, for reports.
        entries: The images.
        target: An empty or unfinished store; files of the same names are replaced.
        run: Maps a function over the shards, in any order; the parallel engine.
        num_folds: Validation folds of the training classes.
        images_per_shard: Upper bound.
        max_side: Reduce images whose longer side is larger, pixels.
        max_pixels: Reject images of more pixels, see `normalise`.
        max_rejected: Share of unreadable images, 0 to 1, above which the store is refused.
        crop: Store only the pixels within the entries' boxes.
        source: Origin of the entries, for the manifest: a published dataset, folder, csv or emoji.
        protocol: One of PROTOCOLS (default: by the splits, query_gallery or leave_one_out).
        missing: A sentence for each thing that a published dataset lacks; None for other datasets,
            which have no list of their images. Then rejected images do not make the dataset
            partial.

    Raises:
        UserError: Too many unreadable images, `rejected.csv` then names them; no boxes to crop to;
            what `plan_shards` refuses.
    """
    if crop and not all(e.box for e in entries):
        raise UserError("not all images have a box to crop to: leave out --crop box")
    shards = plan_shards(entries, num_folds, images_per_shard)
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
    """Numbers of images, classes and tracklets of a split, for the manifest; of distractors and junk where it has any."""
    counts = {"images": len(labels), "classes": len(np.unique(labels[labels >= 0]))}
    if tracks is not None:
        counts["tracks"] = len(np.unique(tracks))
    for name, label in (("distractors", DISTRACTOR), ("junk", JUNK)):
        if (labels == label).any():
            counts[name] = int((labels == label).sum())
    return counts
