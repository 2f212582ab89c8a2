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
from pipeline.data.decoded import DecodedReader, open_decoded_copy
from pipeline.data.store import Store
from pipeline.errors import RunError
from pipeline.storage import Folder

_THREADS = 8  # row groups read at once: object storage answers after tens of milliseconds
_MAX_FOOTERS = 2048  # footers of shards kept, the most recently used; some 150 kB each
_BUFFER_BYTES = 256 * 2**20  # size of the row groups that are kept or being read


@runtime_checkable
class Reader(Protocol):
    """Random access to encoded images."""

    def read(self, ids: Int64[np.ndarray, " images"]) -> list[bytes]:
        """Encoded images of these sample ids, in order."""
        ...

    def prefetch(self, ids: Int64[np.ndarray, " images"]) -> None:
        """Starts fetching images that will be read next."""
        ...

    def clear(self) -> None:
        """Drops all buffered images."""
        ...


class RowGroupReader:
    """Reads row groups of the shards, several at once, and keeps the most recently used.

    Row groups are prefetched by threads, in the order of the plan, while earlier images are
    decoded. A row group is read by one request of its own; training and an evaluation may share a
    reader.

    Args:
        store: The images.
        buffer_bytes: Size of the row groups that are kept.

    Raises:
        RunError: A page's checksum does not match; the shard is named.
    """

    def __init__(self, store: Store, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self.store = store
        shards = store.manifest["shards"]
        self.starts = np.cumsum([0, *(s["rows"] for s in shards)])
        # mean size of a shard's row groups, which stands for a row group's size before it has arrived
        self.weights = [s["bytes"] // -(-s["rows"] // store.row_group) + 1 for s in shards]
        self.buffer_bytes = buffer_bytes
        self.metadata: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self.groups: OrderedDict[tuple[int, int], Future[pa.ChunkedArray]] = OrderedDict()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="row-groups")

    def read(self, ids: Int64[np.ndarray, " images"]) -> list[bytes]:
        positions = self._locate(ids)
        futures = self._request(dict.fromkeys((shard, group) for shard, group, _ in positions))
        return [futures[shard, group].result()[row].as_py() for shard, group, row in positions]

    def prefetch(self, ids: Int64[np.ndarray, " images"]) -> None:
        self._request(dict.fromkeys((shard, group) for shard, group, _ in self._locate(ids)))

    def clear(self) -> None:
        with self.lock:
            self.groups.clear()

    def _locate(self, ids: np.ndarray) -> list[tuple[int, int, int]]:
        """Shard, row group and row within it of every sample."""
        rows = np.searchsorted(self.store.sample_id, ids)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        groups, within = np.divmod(rows - self.starts[shards], self.store.row_group)
        return list(zip(shards.tolist(), groups.tolist(), within.tolist(), strict=True))

    def _request(self, keys: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Future[pa.ChunkedArray]]:
        """Starts reading row groups that are not buffered; those used longest ago are dropped to make room."""
        futures = {}
        with self.lock:
            for key in keys:
                future = self.groups.pop(key, None)
                if future is None or (future.done() and future.exception() is not None):
                    future = self.pool.submit(self._read_group, *key)
                self.groups[key] = futures[key] = future
            size = sum(self.weights[shard] for shard, _ in self.groups)
            while size > self.buffer_bytes and len(self.groups) > len(futures):
                (shard, _), _ = self.groups.popitem(last=False)
                size -= self.weights[shard]
        return futures

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        record = self.store.manifest["shards"][shard]
        name = record["file"]
        try:
            with self.store.folder.open(name, record["bytes"]) as source:
                with self.lock:
                    footer = self.metadata.pop(shard, None)
                file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, pre_buffer=False)
                with self.lock:
                    self.metadata[shard] = file.metadata
                    while len(self.metadata) > _MAX_FOOTERS:
                        self.metadata.popitem(last=False)
                return file.read_row_group(group, columns=["image"], use_threads=False)["image"]
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"shard {self.store.folder}/{name} cannot be read ({error}): copy or prepare it again"
            ) from error


@functools.lru_cache(maxsize=8)
def open_reader(uri: str, fingerprint: str, cache: Cache | None) -> Reader:
    """The reader of a store, one for each process.

    Args:
        uri: Address of the store.
        fingerprint: Content that the store must have; a store written again under the same uri gets
            a new reader.
        cache: Folder of this node's copy of the training split, which is made now if there is none;
            None: row groups are read. If copies in use leave no room, row groups are read as well,
            with a warning.

    Raises:
        RunError: The store has another fingerprint, or `open_local_copy` fails.
    """
    store = _opened(uri, fingerprint)
    if cache is not None:
        try:
            return open_local_copy(store, cache, "train")
        except CacheFull as full:
            warnings.warn(
                f"images are read from the store, which is slower: {full}; raise cache.max_bytes", stacklevel=2
            )
    return RowGroupReader(store)


def open_images(uri: str, fingerprint: str, cache: Cache | None) -> Reader | DecodedReader:
    """The reader of a store's images, one for each process: of decoded pixels where the cache keeps those.

    Args:
        uri, fingerprint, cache: As for `open_reader`. If copies in use leave no room for decoded
            pixels, encoded images are read, with a warning.

    Raises:
        RunError: As `open_reader`.
    """
    decoded = None
    if cache is not None and cache.decoded:
        decoded = open_decoded(uri, fingerprint, cache)
        cache = cache._replace(decoded=False)
    return decoded or open_reader(uri, fingerprint, cache)


@functools.lru_cache(maxsize=8)
def open_decoded(uri: str, fingerprint: str, cache: Cache) -> DecodedReader | None:
    """This node's copy of a store's decoded training split, one for each process; None where it has no room, with a warning.

    Raises:
        RunError: As `open_reader`.
    """
    try:
        return open_decoded_copy(_opened(uri, fingerprint), cache, "train")
    except CacheFull as full:
        warnings.warn(f"images are decoded in every step, which is slower: {full}; raise cache.max_bytes", stacklevel=2)
        return None


def _opened(uri: str, fingerprint: str) -> Store:
    store = Store(Folder(uri))
    if store.fingerprint != fingerprint:
        raise RunError(
            f"dataset {uri} changed while it was in use: fingerprint {store.fingerprint}, expected {fingerprint}"
        )
    return store


__all__ = ["Reader", "RowGroupReader", "open_decoded", "open_images", "open_reader"]
