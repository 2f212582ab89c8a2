"""Encoded images by sample id: from this node's copy of the training split, or from the row groups of the shards."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from pipeline.data.cache import Cache, CacheFull, open_local_copy
from pipeline.data.store import Store
from pipeline.errors import RunError
from pipeline.storage import Folder

_THREADS = 8  # row groups read at once: object storage answers after tens of milliseconds
_FOOTERS = 2048  # of shards, those used last; some 150 kB each
_KEPT_BYTES = 256 * 2**20  # of row groups that were read, or are being read ahead


@runtime_checkable
class Reader(Protocol):
    def read(self, ids: Int64[np.ndarray, " some"]) -> list[bytes]:
        """Encoded images of these sample ids, in order."""
        ...

    def ahead(self, ids: Int64[np.ndarray, " some"]) -> None:
        """Says what will be read next, so that it can be fetched meanwhile."""
        ...

    def release(self) -> None:
        """Lets go of what was read, since it is not needed again."""
        ...


class RowGroupReader:
    """Reads row groups of the shards, several at once, and keeps those used last.

    What is asked for ahead, in the order of the plan, is fetched by threads while earlier images are decoded. A row group
    is read by one request of its own; training and an evaluation may share a reader.

    Raises:
        RunError: a page's checksum does not match; the shard is named.
    """

    def __init__(self, store: Store, kept_bytes: int = _KEPT_BYTES) -> None:
        self.store = store
        shards = store.manifest["shards"]
        self.starts = np.cumsum([0, *(s["rows"] for s in shards)])
        # mean size of a shard's row groups, to count what is kept before it has arrived
        self.weights = [s["bytes"] // -(-s["rows"] // store.row_group) + 1 for s in shards]
        self.kept_bytes = kept_bytes
        self.metadata: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self.groups: OrderedDict[tuple[int, int], Future[pa.ChunkedArray]] = OrderedDict()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="row-groups")

    def read(self, ids: Int64[np.ndarray, " some"]) -> list[bytes]:
        places = self._places(ids)
        futures = self._want(dict.fromkeys((shard, group) for shard, group, _ in places))
        return [futures[shard, group].result()[row].as_py() for shard, group, row in places]

    def ahead(self, ids: Int64[np.ndarray, " some"]) -> None:
        self._want(dict.fromkeys((shard, group) for shard, group, _ in self._places(ids)))

    def release(self) -> None:
        with self.lock:
            self.groups.clear()

    def _places(self, ids: np.ndarray) -> list[tuple[int, int, int]]:
        """Shard, row group and row within it of every sample."""
        rows = np.searchsorted(self.store.sample_id, ids)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        groups, within = np.divmod(rows - self.starts[shards], self.store.row_group)
        return list(zip(shards.tolist(), groups.tolist(), within.tolist(), strict=True))

    def _want(self, keys: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Future[pa.ChunkedArray]]:
        """Starts reading what is not there yet; what was used longest ago is let go."""
        wanted = {}
        with self.lock:
            for key in keys:
                future = self.groups.pop(key, None)
                if future is None or (future.done() and future.exception() is not None):
                    future = self.pool.submit(self._read_group, *key)
                self.groups[key] = wanted[key] = future
            held = sum(self.weights[shard] for shard, _ in self.groups)
            while held > self.kept_bytes and len(self.groups) > len(wanted):
                (shard, _), _ = self.groups.popitem(last=False)
                held -= self.weights[shard]
        return wanted

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        record = self.store.manifest["shards"][shard]
        name = record["file"]
        try:
            with self.store.folder.open(name, record["bytes"]) as source:
                with self.lock:
                    known = self.metadata.pop(shard, None)
                file = pq.ParquetFile(source, metadata=known, page_checksum_verification=True)
                with self.lock:
                    self.metadata[shard] = file.metadata
                    while len(self.metadata) > _FOOTERS:
                        self.metadata.popitem(last=False)
                return file.read_row_group(group, columns=["image"])["image"]
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"shard {self.store.folder}/{name} cannot be read ({error}): copy or prepare it again"
            ) from error


@functools.lru_cache(maxsize=8)
def open_reader(uri: str, fingerprint: str, cache: Cache | None) -> Reader:
    """The reader of a store, once a process.

    Args:
        uri: of the store.
        fingerprint: of the store, so that a store made anew under the same uri gets a new reader.
        cache: where this node's copy of the training split is, or is made now; none: row groups are read. Where copies that
            are in use leave no room, row groups are read too, with a warning.
    """
    store = Store(Folder(uri))
    if store.fingerprint != fingerprint:
        raise RunError(
            f"dataset {uri} changed while it was in use: fingerprint {store.fingerprint}, expected {fingerprint}"
        )
    if cache is not None:
        try:
            return open_local_copy(store, cache, "train")
        except CacheFull as full:
            warnings.warn(
                f"images are read from the store, which is slower: {full}; raise cache.max_bytes", stacklevel=2
            )
    return RowGroupReader(store)


__all__ = ["Reader", "RowGroupReader", "open_reader"]
