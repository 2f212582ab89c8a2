"""Encoded images by sample id: from one mapped Arrow file a node, or from the row groups of the shards.

Random access needs local bytes, so each node keeps an Arrow copy of the training split, made once under a lock, checked
against the shards' checksums. A split that is larger than the allowed size is read row group by row group instead.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from jaxtyping import Int64

from pipeline.data.store import ROW_GROUP, Store
from pipeline.errors import RunError
from pipeline.storage import Folder


@runtime_checkable
class Reader(Protocol):
    def read(self, ids: Int64[np.ndarray, " some"]) -> list[bytes]:
        """Encoded images of these sample ids, in order."""
        ...


def cache_file(store: Store, cache: str, split: str) -> Path:
    return Path(cache) / f"{store.name}-{store.fingerprint}-{split}.arrow"


def fits_cache(store: Store, split: str, max_bytes: int) -> bool:
    """Whether the node's copy of a split would stay below the allowed size."""
    return sum(s["bytes"] for s in store.manifest["shards"] if s["file"].startswith(f"shards/{split}-")) <= max_bytes


def make_cache(store: Store, cache: str, split: str) -> Path:
    """Writes this node's Arrow copy of a split unless it is there; safe to call from several processes.

    Raises:
        RunError: a shard is damaged, or the disk is too full.
    """
    path = cache_file(store, cache, split)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _write_cache(store, path, split)
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"the copy of {split} cannot be made in {path.parent} ({reason}): set runtime.cache") from error
    return path


def _write_cache(store: Store, path: Path, split: str) -> None:
    shards = [s for s in store.manifest["shards"] if s["file"].startswith(f"shards/{split}-")]
    need, free = sum(s["bytes"] for s in shards), shutil.disk_usage(path.parent).free
    if need > free:
        raise RunError(
            f"{path.parent} has {free >> 20} MiB free, the copy of {split} needs {need >> 20}: set runtime.cache"
        )
    part = path.with_suffix(f".{os.getpid()}.part")
    schema = pa.schema([("sample_id", pa.int64()), ("image", pa.large_binary())])
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for record in shards:
                table = store.shard_table(record).select(["sample_id", "image"]).cast(schema)
                writer.write_table(table.combine_chunks())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class MappedReader:
    """Random access into a node's Arrow copy; the operating system's page cache holds what is used often."""

    def __init__(self, path: Path) -> None:
        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowException as error:
            raise RunError(f"{path} is damaged ({error}): remove it, it is made again") from error
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self.ids = np.concatenate([np.asarray(b.column(0)) for b in batches])
        self.starts = np.cumsum([0, *(len(b) for b in batches)])
        self.images = [b.column(1) for b in batches]

    def read(self, ids: Int64[np.ndarray, " some"]) -> list[bytes]:
        rows = np.searchsorted(self.ids, ids)
        parts = np.searchsorted(self.starts, rows, side="right") - 1
        return [self.images[p][int(r - self.starts[p])].as_py() for p, r in zip(parts, rows, strict=True)]


class RowGroupReader:
    """Reads row groups of the shards, and keeps the last few; made for ids that ascend or are few.

    One thread reads at a time: training fetches ahead while an evaluation reads, and a ParquetFile is not for two threads.

    Raises:
        RunError: a page's checksum does not match; the shard is named.
    """

    KEPT = 8

    def __init__(self, store: Store) -> None:
        self.store = store
        self.starts = np.cumsum([0, *(s["rows"] for s in store.manifest["shards"])])
        self.files: dict[int, pq.ParquetFile] = {}
        self.groups: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def _group(self, shard: int, group: int) -> pa.ChunkedArray:
        key = (shard, group)
        if key not in self.groups:
            name = self.store.manifest["shards"][shard]["file"]
            try:
                if shard not in self.files:
                    source = self.store.folder.fs.open(self.store.folder.path(name), "rb")
                    self.files[shard] = pq.ParquetFile(source, page_checksum_verification=True)
                self.groups[key] = self.files[shard].read_row_group(group, columns=["image"])["image"]
            except (OSError, pa.ArrowException) as error:
                raise RunError(
                    f"shard {self.store.folder}/{name} cannot be read ({error}): copy or prepare it again"
                ) from error
            if len(self.groups) > self.KEPT:
                self.groups.popitem(last=False)
        return self.groups[key]

    def read(self, ids: Int64[np.ndarray, " some"]) -> list[bytes]:
        rows = np.searchsorted(self.store.sample_id, ids)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        within = rows - self.starts[shards]
        with self.lock:
            return [
                self._group(int(s), int(w) // ROW_GROUP)[int(w) % ROW_GROUP].as_py()
                for s, w in zip(shards, within, strict=True)
            ]


@functools.lru_cache(maxsize=8)
def open_reader(uri: str, fingerprint: str, cached: str | None) -> Reader:
    """The reader of a store, once a process.

    Args:
        uri: of the store.
        fingerprint: of the store, so that a store made anew under the same uri gets a new reader.
        cached: cache folder if the training split is to be read from this node's copy, made now if need be.
    """
    store = Store(Folder(uri))
    if store.fingerprint != fingerprint:
        raise RunError(
            f"dataset {uri} changed while it was in use: fingerprint {store.fingerprint}, expected {fingerprint}"
        )
    return MappedReader(make_cache(store, cached, "train")) if cached else RowGroupReader(store)


__all__ = ["MappedReader", "Reader", "RowGroupReader", "fits_cache", "make_cache", "open_reader"]
