"""How an index is built and changed: images are appended as a segment, marked as removed, and merged when that pays.

Every change writes new files and then the manifest; killed anywhere before that, the former index is what there is. Memory is
that of a batch of images and of the faiss index, for any number of images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from pipeline.errors import UserError
from pipeline.searching.engines import SearchEngine, build_engine
from pipeline.searching.index_files import (
    EMBEDDINGS,
    FORMAT,
    IDS,
    MANIFEST,
    OFFSETS,
    ROWS,
    THUMBNAILS,
    EngineRecord,
    Manifest,
    ModelRecord,
    SegmentRecord,
    SegmentWriter,
    changing,
    check_files,
    index_folder,
    read_manifest,
    write_manifest,
    write_removed,
)
from pipeline.storage import Folder

MAX_SEGMENTS = 8  # behind the first; each is searched by itself
SMALL = 256  # rows behind the first segment, or removed, that are never worth merging all


@dataclass(frozen=True)
class IndexBatch:
    """Images with their embeddings, ready to be written.

    Attributes:
        embeddings: As the index compares them: see `pipeline.searching.index.unit_or_finite`.
        paths: A path or URI of each.
        labels: Number of each one's class; None: see `class_names`.
        class_names: Name of each one's class; None: not known. Without `labels`, the index numbers them.
        thumbnails: Encoded, b"" for none.
    """

    embeddings: Float32[np.ndarray, "rows dim"]
    paths: Sequence[str]
    labels: Sequence[int | None] | None
    class_names: Sequence[str | None]
    thumbnails: Sequence[bytes]


@dataclass(frozen=True)
class Change:
    """What a change did: images added, those among them that took the place of an earlier one, and removed."""

    manifest: Manifest
    added: int = 0
    replaced: int = 0
    removed: int = 0


def build_index(
    path: str | os.PathLike[str], model: ModelRecord, dim: int, distance: str, batches: Iterable[IndexBatch],
    *, engine: SearchEngine = "auto", thumbnail_side: int = 0, threads: int | None = None,
) -> Change:  # fmt: skip
    """Writes a new index.

    Args:
        path: A folder that does not exist, is empty, or holds what an interrupted build left.
        model: What computed the embeddings.
        dim, distance: Of the embeddings.
        batches: The images.
        engine: How it is searched; "auto": by its size.
        thumbnail_side: Longer side of the thumbnails that the batches bring; 0: none.
        threads: Threads of faiss while it builds; None: all cores.

    Raises:
        UserError: There is an index or something else; no images; another process writes here.
        RunError: The disk is full.
    """
    folder = index_folder(path)
    if folder.exists(MANIFEST):
        raise UserError(f"{folder} holds an index already: add images to it, or remove the folder to build it again")
    with changing(folder):
        segment, _, largest = _write_segment(folder, dim, 0, {}, batches)
        if not segment.rows:
            raise UserError("there are no images to build an index of")
        manifest = Manifest.model_validate(
            {
                "format": FORMAT,
                "generation": 1,
                "model": model,
                "dim": dim,
                "distance": distance,
                "largest": largest,
                "next_id": segment.rows,
                "thumbnail_side": thumbnail_side,
                "segments": (segment,),
                "removed": None,
                "engine": EngineRecord(requested=engine, name="exact"),
            }
        )
        manifest = _with_engine(folder, manifest, threads)
        write_manifest(folder, manifest)
    return Change(manifest, added=segment.rows)


def add_to_index(path: str | os.PathLike[str], batches: Iterable[IndexBatch], threads: int | None = None) -> Change:
    """Appends images; one whose path is in the index already takes the place of the earlier one.

    Raises:
        UserError: There is no index, it is damaged, or another process changes it; there are no images.
        RunError: The disk is full.
    """
    folder = index_folder(path)
    before = read_manifest(folder)
    check_files(folder, before)
    with changing(folder):
        before = read_manifest(folder)
        removed = _removed(folder, before)
        labels = _labels(folder, before)
        segment, paths, largest = _write_segment(folder, before.dim, before.next_id, labels, batches)
        if not segment.rows:
            raise UserError("there are no images to add")
        earlier = _ids_of(folder, before, removed, pa.array(paths))
        again = _repeated(paths) + before.next_id  # of one path given twice, the last counts
        now_removed = np.union1d(removed, np.concatenate([earlier, again]))
        manifest = before.model_copy(
            update={
                "segments": (*before.segments, segment),
                "next_id": before.next_id + segment.rows,
                "largest": max(before.largest, largest),
            }
        )
        if not before.segments:
            manifest = _with_engine(folder, manifest, threads)
        after = _finish(folder, manifest, now_removed, threads)
    added = segment.rows - len(again)
    return Change(after, added=added, replaced=len(earlier))


def remove_from_index(path: str | os.PathLike[str], paths: Sequence[str], threads: int | None = None) -> Change:
    """Removes images by their paths, or all below a folder.

    Raises:
        UserError: There is no index, or another process changes it; a path is not in the index (then nothing is removed).
        RunError: The disk is full.
    """
    folder = index_folder(path)
    check_files(folder, read_manifest(folder))
    with changing(folder):
        before = read_manifest(folder)
        removed = _removed(folder, before)
        found = [removed]
        for wanted in paths:
            ids = _ids_below(folder, before, removed, wanted)
            if not len(ids):
                raise UserError(f"{wanted} is not in the index {folder}: nothing was removed")
            found.append(ids)
        now_removed = np.unique(np.concatenate(found))
        after = _finish(folder, before, now_removed, threads)
    return Change(after, removed=len(now_removed) - len(removed))


# ---- the parts of a change -------------------------------------------------------------------------------------------


def _write_segment(
    folder: Folder, dim: int, first_id: int, labels: dict[str, int], batches: Iterable[IndexBatch]
) -> tuple[SegmentRecord, list[str], float]:
    """Writes batches as a segment; its record, the paths, and the length of the longest embedding.

    Args:
        folder: The index.
        dim: Of the embeddings.
        first_id: The id of the first image.
        labels: Numbers of the classes so far, by name; new ones are put in.
        batches: The images.
    """
    paths: list[str] = []
    with SegmentWriter(folder, dim) as writer:
        for batch in batches:
            given = batch.labels
            if given is None:
                names = batch.class_names
                given = [
                    None if name is None else labels.setdefault(name, max(labels.values(), default=-1) + 1)
                    for name in names
                ]
            ids = np.arange(first_id + writer.rows, first_id + writer.rows + len(batch.paths))
            table = pa.table(
                {
                    "path": pa.array(batch.paths, pa.string()),
                    "label": pa.array(given, pa.int64()),
                    "class_name": pa.array(batch.class_names, pa.string()),
                }
            )
            writer.append(ids, batch.embeddings, table, batch.thumbnails)
            paths += batch.paths
        return writer.finish(), paths, writer.largest


def _finish(
    folder: Folder, manifest: Manifest, removed: Int64[np.ndarray, " removed"], threads: int | None
) -> Manifest:
    """Merges segments where that pays, and writes the manifest of the next generation."""
    first, *others = manifest.segments or (None,)
    appended = sum(segment.rows for segment in others)
    if appended + len(removed) > max(SMALL, (first.rows if first else 0) // 4):
        merged = _merge(folder, manifest, manifest.segments, removed)
        manifest = manifest.model_copy(update={"segments": (merged,) if merged.rows else ()})
        manifest, removed = _with_engine(folder, manifest, threads), removed[:0]
    elif len(others) > MAX_SEGMENTS:
        assert first is not None
        merged = _merge(folder, manifest, others, removed)
        kept = np.load(folder.path(f"{first.folder}/{IDS}"), mmap_mode="r", allow_pickle=False)
        removed = removed[np.isin(removed, kept)]
        manifest = manifest.model_copy(update={"segments": (first, merged)})
    manifest = manifest.model_copy(
        update={"removed": write_removed(folder, removed), "generation": manifest.generation + 1}
    )
    write_manifest(folder, manifest)
    return manifest


def _merge(
    folder: Folder, manifest: Manifest, segments: Sequence[SegmentRecord], removed: Int64[np.ndarray, " removed"]
) -> SegmentRecord:
    """Copies what is not removed of some segments into one, a row group at a time."""
    with SegmentWriter(folder, manifest.dim) as writer:
        for segment in segments:
            arrays = {name: _mapped(folder, segment, name) for name in (EMBEDDINGS, IDS, OFFSETS)}
            with open(folder.path(f"{segment.folder}/{THUMBNAILS}"), "rb") as thumbnails:
                for start, table in _row_groups(folder, segment):
                    part = slice(start, start + len(table))
                    keep = ~np.isin(arrays[IDS][part], removed)
                    offsets = arrays[OFFSETS][start : start + len(table) + 1]
                    thumbnails.seek(int(offsets[0]))
                    packed = thumbnails.read(int(offsets[-1] - offsets[0]))
                    images = [
                        packed[offsets[i] - offsets[0] : offsets[i + 1] - offsets[0]] for i in np.flatnonzero(keep)
                    ]
                    writer.append(
                        arrays[IDS][part][keep], arrays[EMBEDDINGS][part][keep], table.filter(pa.array(keep)), images
                    )
        return writer.finish()


def _with_engine(folder: Folder, manifest: Manifest, threads: int | None) -> Manifest:
    """The manifest with an engine that is built from its first segment."""
    if not manifest.segments:
        engine = EngineRecord(requested=manifest.engine.requested, name="exact")
    else:
        embeddings = _mapped(folder, manifest.segments[0], EMBEDDINGS)
        requested: Any = manifest.engine.requested
        engine = build_engine(folder, embeddings, manifest.largest, requested, threads or os.cpu_count() or 1)
    return manifest.model_copy(update={"engine": engine})


def _mapped(folder: Folder, segment: SegmentRecord, name: str) -> np.ndarray:
    return np.asarray(np.load(folder.path(f"{segment.folder}/{name}"), mmap_mode="r", allow_pickle=False))


def _row_groups(
    folder: Folder, segment: SegmentRecord, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Position of the first row, and the rows, of each row group of a segment."""
    start = 0
    with pq.ParquetFile(folder.path(f"{segment.folder}/{ROWS}"), memory_map=True, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=None if columns is None else list(columns), use_threads=False)
            yield start, table
            start += len(table)


def _removed(folder: Folder, manifest: Manifest) -> Int64[np.ndarray, " removed"]:
    if manifest.removed is None:
        return np.zeros(0, np.int64)
    return np.asarray(np.load(folder.path(manifest.removed.file), allow_pickle=False))


def _labels(folder: Folder, manifest: Manifest) -> dict[str, int]:
    """Number of each class by its name, from one pass over the classes."""
    labels: dict[str, int] = {}
    for segment in manifest.segments:
        for _, table in _row_groups(folder, segment, ["label", "class_name"]):
            for row in table.group_by(["label", "class_name"]).aggregate([]).to_pylist():
                if row["label"] is not None and row["class_name"] is not None:
                    labels[row["class_name"]] = row["label"]
    return labels


def _matching(folder: Folder, manifest: Manifest, removed: np.ndarray, matches: Any) -> Int64[np.ndarray, " ids"]:
    """Ids, not removed, of the rows whose paths `matches` selects; one pass over all paths."""
    found = [np.zeros(0, np.int64)]
    for segment in manifest.segments:
        ids = _mapped(folder, segment, IDS)
        for start, table in _row_groups(folder, segment, ["path"]):
            mask = np.asarray(matches(table["path"].combine_chunks()))
            found.append(ids[start : start + len(table)][mask])
    every = np.concatenate(found)
    return every[~np.isin(every, removed)]


def _ids_of(folder: Folder, manifest: Manifest, removed: np.ndarray, paths: pa.Array) -> Int64[np.ndarray, " ids"]:
    return _matching(folder, manifest, removed, lambda column: pc.is_in(column, value_set=paths))


def _ids_below(folder: Folder, manifest: Manifest, removed: np.ndarray, path: str) -> Int64[np.ndarray, " ids"]:
    """Ids of the image of this path, or of those below this folder; the path as it is, or made absolute."""
    names = {path.rstrip("/"), image_path(path.rstrip("/"))}

    def matches(column: pa.Array) -> Any:
        below = [pc.starts_with(column, f"{name}/") for name in sorted(names)]
        exact = pc.is_in(column, value_set=pa.array(sorted(names)))
        return np.logical_or.reduce([np.asarray(mask) for mask in (exact, *below)])

    return _matching(folder, manifest, removed, matches)


def _repeated(paths: Sequence[str]) -> Int64[np.ndarray, " positions"]:
    """Positions of paths that come again later."""
    last = {path: position for position, path in enumerate(paths)}
    return np.array([i for i, path in enumerate(paths) if last[path] != i], np.int64)


def image_path(path: str) -> str:
    """A path as the index keeps it: absolute, or a URI as it is."""
    return path if "://" in path else os.path.abspath(path)


__all__ = ["Change", "IndexBatch", "add_to_index", "build_index", "remove_from_index"]
