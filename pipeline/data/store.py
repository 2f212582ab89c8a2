"""The Parquet store of a dataset: shards of encoded images sorted by split and class, a catalogue, and a manifest.

    manifest.json       format, fingerprint, counts, folds, shards with checksums; written last: without it there is no store
    catalog.parquet     sample_id, label, class_name, split, fold of every image, without pixels
    shards/*.parquet    sample_id, label, class_name, split, image (bytes of a plain JPEG or PNG)
    rejected.csv        source, class, reason of every image that could not be read

Sample ids follow the order of the catalogue that was asked for; a rejected image leaves a gap. Validation folds divide the
training classes (groups stay whole) and are the same for everyone who uses the store.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from pipeline.data.catalog import SPLITS, Entry, by_hash
from pipeline.data.transforms import normalise
from pipeline.errors import RunError, UserError
from pipeline.storage import Folder, read_file

FORMAT = 1
ROW_GROUP = 64  # images: one random access reads at most this many from object storage


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
    """What one writing task is told: which entries, with which ids, labels and folds, go into which file."""

    file: str
    entries: tuple[Entry, ...]
    first_id: int
    labels: tuple[int, ...]
    folds: tuple[int, ...]


def layout(entries: Iterable[Entry], num_folds: int, images_per_shard: int) -> list[Shard]:
    """Sorts by split and class, numbers samples and classes, deals the training groups into folds, cuts into shards."""
    ordered = sorted(entries, key=lambda e: (SPLITS.index(e.split or "train"), e.class_name, e.source))
    groups = by_hash(e.group or e.class_name for e in ordered if e.split == "train")
    fold_of = {group: i % num_folds for i, group in enumerate(groups)}
    label_of: dict[str, int] = {}
    for entry in ordered:
        label_of.setdefault(entry.class_name, len(label_of))
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
        shards.append(Shard(name, part, start, tuple(label_of[e.class_name] for e in part), folds))
        start = end
    return shards


def write_shard(shard: Shard, target: Folder, max_side: int | None) -> dict[str, Any]:
    """Reads, checks and writes the images of one shard; returns its record for the manifest, with the rejected ones."""
    columns: dict[str, list[Any]] = {n: [] for n in ("sample_id", "label", "class_name", "split", "fold", "image")}
    rejected: list[tuple[str, str, str]] = []
    for offset, (entry, label, fold) in enumerate(zip(shard.entries, shard.labels, shard.folds, strict=True)):
        try:
            image = normalise(read_file(entry.source), max_side)
        except (UserError, RunError):  # the storage, not the image: a dataset must not depend on its faults
            raise
        except Exception as error:  # missing, or bad bytes, on which each decoder raises what it likes
            reason = (str(error).strip().splitlines() or [""])[0].replace(entry.source, "")
            rejected.append((entry.source, entry.class_name, f"{type(error).__name__}: {reason}"))
            continue
        row = (shard.first_id + offset, label, entry.class_name, entry.split, fold, image)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    record: dict[str, Any] = {"file": shard.file, "rows": len(columns["image"]), "rejected": rejected}
    catalog = pa.table({n: columns[n] for n in ("sample_id", "label", "class_name", "split", "fold")}, schema=CATALOG)
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
    max_rejected: float = 0.01,
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
        max_rejected: share of unreadable images above which the store is refused.

    Raises:
        UserError: too many unreadable images; `rejected.csv` then names them.
    """
    target.check_writable()
    target.remove("manifest.json")
    shards = layout(entries, num_folds, images_per_shard)
    written = {r["file"]: r for r in run(functools.partial(write_shard, target=target, max_side=max_side), shards)}
    records = [written[shard.file] for shard in shards]
    rejected = [line for r in records for line in r.pop("rejected")]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("source", "class", "reason"), *rejected])
    target.write("rejected.csv", text.getvalue().encode())
    if len(rejected) > max_rejected * len(entries):
        raise UserError(
            f"{len(rejected)} of {len(entries)} images cannot be read, more than {max_rejected:.1%} allowed; first: "
            f"{rejected[0][0]} ({rejected[0][2]}); all are listed in {target}/rejected.csv: repair them or raise --max-rejected"
        )
    catalog = pa.concat_tables([r.pop("catalog") for r in records])
    sink = io.BytesIO()
    pq.write_table(catalog, sink)
    target.write("catalog.parquet", sink.getvalue())
    records = [r for r in records if r["rows"]]
    checksum = hashlib.sha256(sink.getvalue()).hexdigest()
    splits = np.array(catalog["split"])
    labels, folds = np.array(catalog["label"]), np.array(catalog["fold"])
    target.write_json(
        "manifest.json",
        {
            "format": FORMAT,
            "name": name,
            "fingerprint": hashlib.sha256("".join([checksum, *(r["sha256"] for r in records)]).encode()).hexdigest()[
                :16
            ],
            "splits": {
                s: {"images": int((splits == s).sum()), "classes": len(np.unique(labels[splits == s]))}
                for s in SPLITS
                if (splits == s).any()
            },
            "folds": [
                {"images": int((folds == f).sum()), "classes": len(np.unique(labels[folds == f]))}
                for f in range(num_folds)
            ],
            "rejected": len(rejected),
            "catalog": {"file": "catalog.parquet", "sha256": checksum},
            "shards": records,
        },
    )
    return Store(target)


@dataclass(frozen=True)
class Samples:
    """A selection of images: their store ids, and their classes renumbered 0..C-1."""

    ids: Int64[np.ndarray, " samples"]
    labels: Int64[np.ndarray, " samples"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


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
        self.name: str = self.manifest["name"]
        self.fingerprint: str = self.manifest["fingerprint"]
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
        self._names = catalog["class_name"]

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
        present = np.bincount(labels) > 0  # the store numbers its classes from 0
        labels = (np.cumsum(present) - 1)[labels]
        of_class = np.empty(present.sum(), dtype=np.int64)
        of_class[labels] = rows
        names = self._names.take(pa.array(of_class)).to_pylist()
        return Samples(self.sample_id[rows], labels, tuple(names))

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
