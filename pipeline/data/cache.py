"""This node's copies of training splits: memory-mapped Arrow files, shared by all workers and trials of the node.

A copy holds encoded images, or decoded pixels (`pipeline.data.decoded`). It is made once, from
shards whose checksums are compared, and keeps a checksum of every image.
The copies in a folder together stay below a number of bytes: the least recently used are removed
first, never one that a process has open. A lock lets one process build at a time; an unfinished
copy of a killed process is removed by the next.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock
from jaxtyping import Int64

from pipeline.data.store import Store
from pipeline.errors import RunError
from pipeline.storage import disk_full_as_error

_PREFETCH_SHARDS = 4  # read at once while a copy is made
_FORMAT = 2  # version of a copy's layout; part of its file name, so that copies of other versions are left alone
_SCHEMA = pa.schema([("sample_id", pa.int64()), ("image", pa.large_binary()), ("crc", pa.uint32())])


class Cache(NamedTuple):
    """The folder of copies, and their largest size.

    Attributes:
        folder: A folder on this node's disk.
        max_bytes: Upper bound for all copies in it together.
        decoded: Copies hold decoded pixels instead of encoded images.
    """

    folder: str
    max_bytes: int
    decoded: bool = False


class CacheFull(Exception):
    """Copies that are in use leave no room for another."""


def split_bytes(store: Store, split: str) -> int:
    """Size of a split's shards; a copy of it takes nearly as much."""
    return sum(s["bytes"] for s in split_shards(store, split))


@dataclass(frozen=True)
class Copy:
    """What a copy is made of.

    Attributes:
        name: Its file name.
        what: What it is, for messages.
        num_bytes: Its size, nearly.
        schema: Its columns.
        batches: Makes its content.
    """

    name: str
    what: str
    num_bytes: int
    schema: pa.Schema
    batches: Callable[[], Iterator[pa.RecordBatch]]


def copy_name(store: Store, split: str, kind: str = f"v{_FORMAT}") -> str:
    """File name of a split's copy.

    Args:
        store: The images.
        split: The split.
        kind: Content and version of the layout.
    """
    name = re.sub(r"[^\w.-]", "_", store.name)
    return f"{name}-{store.fingerprint}-{split}.{kind}.arrow"


def open_local_copy(store: Store, cache: Cache, split: str) -> MappedReader:
    """Opens this node's copy of a split's encoded images, made now if there is none; safe to call from several processes.

    Raises:
        CacheFull: Copies in use leave no room.
        RunError: A shard is damaged, the disk is too full, the folder cannot be written, or the
            copy is damaged.
    """
    copy = Copy(
        copy_name(store, split),
        f"the copy of {split}",
        split_bytes(store, split),
        _SCHEMA,
        lambda: _encoded_batches(store, split),
    )
    return MappedReader(*open_copy(copy, cache), _SCHEMA)


def open_copy(copy: Copy, cache: Cache) -> tuple[Path, IO[bytes]]:
    """A copy's path and its file, open under a shared lock; the copy is made now if there is none.

    Raises:
        CacheFull, RunError: As `open_local_copy`.
    """
    path = Path(cache.folder) / copy.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if not path.exists():
                with FileLock(path.parent / ".lock"):
                    for unfinished in path.parent.glob("*.part"):
                        unfinished.unlink()  # its builder was killed: we hold the lock
                    if not path.exists():
                        _evict(path.parent, copy.num_bytes, cache.max_bytes)
                        _write(copy, path)
            file = _open_shared(path)
            if file is not None:
                return path, file
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{copy.what} cannot be made in {path.parent} ({reason}): set cache.folder") from error


def _open_shared(path: Path) -> IO[bytes] | None:
    """Opens a copy under a shared lock, which keeps it from being removed; None if it has just been removed."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_nlink == 0:
        file.close()
        return None
    os.utime(path)
    return file


def _evict(folder: Path, new_bytes: int, max_bytes: int) -> None:
    """Removes copies that no process has open, the least recently used first, until a new one has room."""
    copies = sorted((p.stat().st_mtime_ns, p.stat().st_size, p) for p in folder.glob("*.arrow"))
    total = sum(size for _, size, _ in copies)
    for _, size, path in copies:
        if total + new_bytes <= max_bytes:
            return
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink()
            total -= size
    if total + new_bytes > max_bytes:
        raise CacheFull(
            f"{folder} may hold {max_bytes >> 20} MiB, copies in use take {total >> 20}, "
            f"another {new_bytes >> 20} are needed"
        )


def _write(copy: Copy, path: Path) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if copy.num_bytes > free_bytes:
        raise RunError(
            f"{path.parent} has {free_bytes >> 20} MiB free, {copy.what} needs {copy.num_bytes >> 20}: "
            "set cache.folder to a folder with more room"
        )
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        with (
            disk_full_as_error(path, copy.num_bytes),
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_file(sink, copy.schema) as writer,
        ):
            for batch in copy.batches():
                writer.write_batch(batch)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _encoded_batches(store: Store, split: str) -> Iterator[pa.RecordBatch]:
    for table in split_tables(store, split):
        images = table["image"].cast(pa.large_binary()).combine_chunks()
        crc = pa.array([zlib.crc32(image.as_buffer()) for image in images], pa.uint32())
        yield pa.record_batch([table["sample_id"].combine_chunks(), images, crc], schema=_SCHEMA)


def split_tables(store: Store, split: str) -> Iterator[pa.Table]:
    """The split's shards, in order, a few of them read at once."""
    records, pending = iter(split_shards(store, split)), deque[Future[pa.Table]]()
    with ThreadPoolExecutor(_PREFETCH_SHARDS) as pool:
        try:
            for record in itertools.islice(records, _PREFETCH_SHARDS):
                pending.append(pool.submit(store.shard_table, record))
            while pending:
                yield pending.popleft().result()
                for record in itertools.islice(records, 1):
                    pending.append(pool.submit(store.shard_table, record))
        finally:
            for future in pending:
                future.cancel()


def split_shards(store: Store, split: str) -> list[dict[str, Any]]:
    """The manifest's records of a split's shards."""
    return [s for s in store.manifest["shards"] if s["file"].startswith(f"shards/{split}-")]


class MappedCopy:
    """A node's copy, mapped; the operating system's page cache keeps the parts that are used often.

    Args:
        path: The copy's file.
        file: The same file, open under a shared lock, so that it is not removed to make room.
        schema: Its columns: sample_id, image and crc first.

    Raises:
        RunError: The copy is damaged.
    """

    def __init__(self, path: Path, file: IO[bytes], schema: pa.Schema) -> None:
        self.path, self.file = path, file
        try:
            mapped = pa.ipc.open_file(pa.memory_map(str(path)))
            if not mapped.schema.equals(schema):
                raise pa.ArrowInvalid(f"it has the columns {mapped.schema.names}")
            self.batches = [mapped.get_batch(i) for i in range(mapped.num_record_batches)]
        except pa.ArrowException as error:
            raise self._damaged(str(error)) from error
        self.ids = self._column(0)
        self.starts = np.cumsum([0, *(len(b) for b in self.batches)])
        self.columns = [b.column(1) for b in self.batches]
        self.sums = self._column(2)

    def buffers(self, ids: Int64[np.ndarray, " images"]) -> Iterator[tuple[int, pa.Buffer]]:
        """The row and the mapped bytes of each of these sample ids, in order.

        Raises:
            RunError: An image does not match its checksum.
        """
        rows = np.searchsorted(self.ids, ids)
        batches = np.searchsorted(self.starts, rows, side="right") - 1
        for batch, row in zip(batches.tolist(), rows.tolist(), strict=True):
            buffer = self.columns[batch][row - int(self.starts[batch])].as_buffer()
            if zlib.crc32(buffer) != self.sums[row]:
                raise self._damaged(f"sample {self.ids[row]} does not match its checksum")
            yield row, buffer

    def prefetch(self, ids: Int64[np.ndarray, " images"]) -> None:
        """Does nothing: the file is mapped."""

    def clear(self) -> None:
        """Does nothing: the operating system drops pages by itself."""

    def _column(self, number: int) -> np.ndarray:
        return np.concatenate([np.asarray(b.column(number)) for b in self.batches])

    def _damaged(self, reason: str) -> RunError:
        return RunError(f"{self.path} is damaged ({reason}): remove it, and the next start makes it again")


class MappedReader(MappedCopy):
    """Random access to the encoded images of a node's copy."""

    def read(self, ids: Int64[np.ndarray, " images"]) -> list[bytes]:
        """Encoded images of these sample ids, in order.

        Raises:
            RunError: An image does not match its checksum.
        """
        return [buffer.to_pybytes() for _, buffer in self.buffers(ids)]


__all__ = [
    "Cache",
    "CacheFull",
    "Copy",
    "MappedCopy",
    "MappedReader",
    "copy_name",
    "open_copy",
    "open_local_copy",
    "split_bytes",
    "split_shards",
    "split_tables",
]
