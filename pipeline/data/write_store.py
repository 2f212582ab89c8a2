"""Writes a store: shards by parallel tasks, then the catalogue, then the manifest."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from pipeline.data.copies import Copies, find_copies
from pipeline.data.entries import DISTRACTOR, JUNK, LABELS, MAX_PIXELS, OWN_SOURCES, SPLITS, Entry, by_hash
from pipeline.data.image_faults import explain
from pipeline.data.image_files import DARK, image_area, normalise
from pipeline.data.store import CATALOG, FORMAT, ROW_GROUP, SOURCE, Store
from pipeline.errors import RunError, UserError
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
    fold_of = _deal_folds(ordered, num_folds)
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


def _deal_folds(entries: Iterable[Entry], num_folds: int) -> dict[str, int]:
    """The fold of each group of training classes: dealt in hash order; fold 0 is what was held out, where anything was."""
    training = [e for e in entries if e.split == "train"]
    held_out = {e.group or e.class_name for e in training if e.held_out}
    groups = [group for group in by_hash(e.group or e.class_name for e in training) if group not in held_out]
    if held_out and groups and num_folds > 1:
        return dict.fromkeys(held_out, 0) | {group: 1 + i % (num_folds - 1) for i, group in enumerate(groups)}
    return {group: i % num_folds for i, group in enumerate([*groups, *sorted(held_out)])}


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
    """Reads, checks and writes the images of one shard.

    Returns:
        Its record for the manifest (file, rows, bytes, sha256, pixels: the sum of width × height), and what `write_store` needs: its
        catalogue, the rejected images, a hash of each file's bytes, the remarks on images, and a
        checksum that does not depend on where the images lay.
    """
    schema = pa.schema([*CATALOG, *(pa.field(name, pa.int64()) for name in shard.extra_columns), SOURCE])
    columns: dict[str, list[Any]] = {name: [] for name in (*schema.names, "image")}
    rejected: list[tuple[str, str, str]] = []
    hashes, remarks, pixels = [], list[str](), 0
    for offset, (entry, label, fold) in enumerate(zip(shard.entries, shard.labels, shard.folds, strict=True)):
        data = None
        try:
            data = read_file(entry.source)
            with warnings.catch_warnings(action="ignore"):  # of Pillow, about metadata
                image = normalise(data, max_side, entry.box if crop else None, max_pixels, remarks)
        except (UserError, RunError):  # the storage, not the image: a dataset must not depend on its faults
            raise
        except Exception as error:  # missing, or bad bytes, for which decoders have no common class of errors
            rejected.append((entry.source, entry.class_name, explain(entry.source, data, error)))
            continue
        extra_values = (values[offset] for values in shard.extra_columns.values())
        source = entry.path or entry.source
        pixels += image_area(image)
        row = (shard.first_id + offset, label, entry.class_name, entry.split, fold, *extra_values, source, image)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
        box = repr(entry.box).encode() if crop else b""
        hashes.append(int.from_bytes(hashlib.blake2b(data + box, digest_size=8).digest(), "little"))
    record: dict[str, Any] = {"file": shard.file, "rows": len(columns["image"]), "rejected": rejected}
    catalog = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    if len(catalog):
        table = catalog.drop_columns(["fold"]).append_column("image", pa.array(columns["image"], pa.binary()))
        content = _parquet(table.drop_columns([SOURCE.name]), row_group_size=ROW_GROUP)
        record["content"] = hashlib.sha256(content).hexdigest()
        data = _parquet(table, row_group_size=ROW_GROUP)
        target.write(shard.file, data)
        record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pixels": pixels}
    return record | {"catalog": catalog, "hashes": np.array(hashes, np.uint64), "remarks": remarks}


def _parquet(table: pa.Table, **options: Any) -> bytes:
    """A file of images: not compressed, since they are, and with a checksum for each page."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", write_page_checksum=True, **options)
    return sink.getvalue()


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
    origin: str | None = None,
    left_out: Sequence[tuple[str, str, str]] = (),
) -> Store:
    """Writes a whole store and opens it.

    Args:
        name: The dataset's name, for reports.
        entries: The images.
        target: An empty folder, or a store that is replaced once the new one is whole: until then,
            and if anything fails, the earlier one stays.
        run: Maps a function over the shards, in any order; the parallel engine.
        num_folds: Validation folds of the training classes.
        images_per_shard: Upper bound.
        max_side: Reduce images whose longer side is larger, pixels.
        max_pixels: Reject images of more pixels, see `normalise`.
        max_rejected: Share of unreadable images, 0 to 1, above which the store is refused.
        crop: Store only the pixels within the entries' boxes.
        source: Origin of the entries, for the manifest: a published dataset, folder, csv, emoji or icons.
        protocol: One of PROTOCOLS (default: by the splits, query_gallery or leave_one_out).
        missing: A sentence for each thing that a published dataset lacks; None for other datasets,
            which have no list of their images. Then rejected images do not make the dataset
            partial.
        origin: The folder or list that the entries are from, for the manifest.
        left_out: Source, class and reason of files that are no entries, for `rejected.csv`.

    Raises:
        UserError: Too many unreadable images, `rejected.csv` then names them; no boxes to crop to;
            what `plan_shards` refuses.
    """
    if crop and not all(e.box for e in entries):
        raise UserError("not all images have a box to crop to: leave out --crop box")
    shards = plan_shards(entries, num_folds, images_per_shard)
    target.check_writable()
    earlier = _shard_files(target)
    if earlier & {shard.file for shard in shards}:  # beside those of the earlier store, which stays until the end
        shards = [replace(shard, file=shard.file.replace(".parquet", "-2.parquet")) for shard in shards]
    write = functools.partial(write_shard, target=target, max_side=max_side, max_pixels=max_pixels, crop=crop)
    try:
        written = {r["file"]: r for r in run(write, shards)}
        records = [written[shard.file] for shard in shards]
        rejected = [line for r in records for line in r.pop("rejected")]
        rejected_csv = _csv(("source", "class", "reason"), [*left_out, *rejected])
        if len(rejected) > max_rejected * len(entries):
            target.write("rejected.csv", rejected_csv)
            raise UserError(
                f"{len(rejected)} of {len(entries)} images cannot be read, more than {max_rejected:.1%} allowed; first: "
                f"{rejected[0][0]} ({rejected[0][2]}); all are listed in {target}/rejected.csv: repair them or raise "
                f"--max-rejected{'' if missing is None else ' (with --partial)'}"
                f"{'; the dataset that was there before stays as it was' if earlier else ''}"
            )
        if missing is not None and rejected:
            missing = [*missing, f"{len(rejected):,} images cannot be read"]
        catalog = pa.concat_tables([r.pop("catalog") for r in records])
        hashes = np.concatenate([r.pop("hashes") for r in records])
        copies = find_copies(hashes, np.array(catalog["label"]), np.array(catalog["split"]))
        if source in OWN_SOURCES and copies.in_gallery.any():  # a benchmark's own protocol is not changed
            labels = np.where(copies.in_gallery, JUNK, np.array(catalog["label"]))
            catalog = catalog.set_column(catalog.column_names.index("label"), "label", pa.array(labels))
        dark = sum(remark == DARK for r in records for remark in r.pop("remarks"))
        records = [r for r in records if r["rows"]]
        content = [r.pop("content") for r in records]
        files = _catalogue_files(catalog, copies)
        manifest = {
            "format": FORMAT,
            "name": name,
            "source": source,
            **({"origin": origin} if origin else {}),
            **({"partial": list(missing)} if missing else {}),
            **({"crop": "box"} if crop else {}),
            "protocol": protocol
            or ("query_gallery" if "query" in catalog["split"].unique().to_pylist() else "leave_one_out"),
            "fingerprint": _fingerprint(catalog, content),
            **_contents(catalog, num_folds),
            "rejected": len(rejected),
            **({"copies": copies.counts()} if copies.repeated else {}),
            **({"dark_16_bit": dark} if dark else {}),
            "row_group": ROW_GROUP,
            "catalog": {
                "file": "catalog.parquet",
                "sha256": hashlib.sha256(files["catalog.parquet"]).hexdigest(),
            },
            "shards": records,
        }
        text = (json.dumps(manifest, indent=1) + "\n").encode()
        target.write_together({**files, "rejected.csv": rejected_csv, "manifest.json": text})
    except BaseException:
        _remove_shards(target, keep=earlier)
        raise
    _remove_shards(target, keep={r["file"] for r in records})
    if not copies.repeated:
        target.remove("copies.csv")
    return Store(target)


def _shard_files(target: Folder) -> set[str]:
    """Shards of the store that is there; none if there is no store that can be read."""
    try:
        return {shard["file"] for shard in target.read_json("manifest.json")["shards"]}
    except (FileNotFoundError, UserError, KeyError, TypeError):
        return set()


def _remove_shards(target: Folder, keep: set[str]) -> None:
    """Removes what earlier or unfinished preparations left."""
    for name in target.names("shards"):
        if f"shards/{name}" not in keep:
            target.remove(f"shards/{name}")


def _catalogue_files(catalog: pa.Table, copies: Copies) -> dict[str, bytes]:
    """The catalogue as a file; and the list of copies, each group together, where there are any."""
    sink = io.BytesIO()
    pq.write_table(catalog, sink)
    files = {"catalog.parquet": sink.getvalue()}
    if copies.repeated:
        columns = catalog.take(pa.array(copies.rows)).select(["source", "class_name", "split"])
        rows = zip(copies.groups.tolist(), *(column.to_pylist() for column in columns.columns), strict=True)
        files["copies.csv"] = _csv(("copy_group", "source", "class", "split"), rows)
    return files


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def _fingerprint(catalog: pa.Table, content: Sequence[str]) -> str:
    """A short hash of all that the store holds but the places that the images are from."""
    sink = io.BytesIO()
    pq.write_table(catalog.drop_columns([SOURCE.name]), sink)
    checksum = hashlib.sha256(sink.getvalue()).hexdigest()
    return hashlib.sha256("".join([checksum, *content]).encode()).hexdigest()[:16]


def _contents(catalog: pa.Table, num_folds: int) -> dict[str, Any]:
    """Counts of the splits and of the validation folds, for the manifest."""
    splits, labels, folds = (np.array(catalog[name]) for name in ("split", "label", "fold"))
    tracks = np.array(catalog["track"]) if "track" in catalog.column_names else None
    return {
        "splits": {
            s: _counts(labels[splits == s], None if tracks is None else tracks[splits == s])
            for s in SPLITS
            if (splits == s).any()
        },
        "folds": [
            {"images": int((folds == f).sum()), "classes": len(np.unique(labels[folds == f]))} for f in range(num_folds)
        ],
    }


def _counts(labels: Int64[np.ndarray, " images"], tracks: Int64[np.ndarray, " images"] | None) -> dict[str, int]:
    """Numbers of images, classes and tracklets of a split, for the manifest; of distractors and junk where it has any."""
    counts = {"images": len(labels), "classes": len(np.unique(labels[labels >= 0]))}
    if tracks is not None:
        counts["tracks"] = len(np.unique(tracks))
    for name, label in (("distractors", DISTRACTOR), ("junk", JUNK)):
        if (labels == label).any():
            counts[name] = int((labels == label).sum())
    return counts
