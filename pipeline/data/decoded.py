"""A node's copy of decoded pixels: what `decode` gives of every image of a split, so that no step decodes again.

    sample_id, image (height × width × 3 bytes, rows from the top), crc, height, width

The copy lies beside those of encoded images, in the same folder, under the same bound, made, locked,
checked and removed by the same rules (`pipeline.data.cache`). It takes ten times the room of JPEGs,
which is known beforehand from the manifest.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt8

from pipeline.data.cache import (
    Cache,
    Copy,
    MappedCopy,
    copy_name,
    open_copy,
    split_bytes,
    split_shards,
    split_tables,
)
from pipeline.data.image_files import decode
from pipeline.data.store import Store

if TYPE_CHECKING:
    from torch import Tensor

_KIND = "pixels-v1"  # content and version of the layout; part of the file name
_BATCH_BYTES = 64 * 2**20  # of pixels, written at once
_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("image", pa.large_binary()),
        ("crc", pa.uint32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
Row = tuple[int, bytes, int, int, int]


def decoded_bytes(store: Store, split: str) -> int | None:
    """Size of a split's decoded pixels; None in stores of earlier versions, whose manifest does not have it."""
    shards = split_shards(store, split)
    if not all("pixels" in shard for shard in shards):
        return None
    return 3 * sum(int(shard["pixels"]) for shard in shards)


def keeps_decoded(store: Store, max_bytes: int) -> bool:
    """Whether the decoded training split is known to stay below a number of bytes."""
    num_bytes = decoded_bytes(store, "train")
    return num_bytes is not None and num_bytes <= max_bytes


def training_copy(store: Store, max_bytes: int, decoded: bool) -> tuple[str, int]:
    """File name and size of the copy of the training split that a node keeps.

    Args:
        store: The images.
        max_bytes: Upper bound for all copies.
        decoded: Decoded pixels are wanted; encoded images are kept where those are too large.
    """
    num_bytes = decoded_bytes(store, "train")
    if decoded and num_bytes is not None and num_bytes <= max_bytes:
        return copy_name(store, "train", _KIND), num_bytes
    return copy_name(store, "train"), split_bytes(store, "train")


def open_decoded_copy(store: Store, cache: Cache, split: str) -> DecodedReader:
    """Opens this node's copy of a split's decoded pixels, made now if there is none; safe to call from several processes.

    Args:
        store: The images; its manifest has the size of the pixels.
        cache: The folder of copies.
        split: The split.

    Raises:
        CacheFull: Copies in use leave no room.
        RunError: As `open_local_copy`.
    """
    num_bytes = decoded_bytes(store, split)
    if num_bytes is None:
        raise ValueError(f"{store.folder} does not say how many pixels it has")
    name, what = copy_name(store, split, _KIND), f"the copy of {split}, decoded,"
    copy = Copy(name, what, num_bytes, _SCHEMA, lambda: _batches(_rows(store, split)))
    return DecodedReader(*open_copy(copy, cache))


class DecodedReader(MappedCopy):
    """Random access to the pixels of a node's copy."""

    def __init__(self, path: Path, file: IO[bytes], schema: pa.Schema = _SCHEMA) -> None:
        super().__init__(path, file, schema)
        self.heights, self.widths = self._column(3), self._column(4)

    def images(self, ids: Int64[np.ndarray, " images"]) -> Iterator[UInt8[Tensor, "3 height width"]]:
        """What `decode` gives of these sample ids, in order, in memory of its own.

        Raises:
            RunError: An image does not match its checksum.
        """
        import torch

        for row, buffer in self.buffers(ids):
            pixels = torch.frombuffer(bytearray(buffer), dtype=torch.uint8)
            yield pixels.view(int(self.heights[row]), int(self.widths[row]), 3).permute(2, 0, 1)


def _rows(store: Store, split: str) -> Iterator[Row]:
    """Every image of a split, decoded by as many threads as there are CPUs; few at a time are in memory."""
    threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        for table in split_tables(store, split):
            ids = np.asarray(table["sample_id"]).tolist()
            images = iter(table["image"])
            for some in _parts(ids, 4 * threads):
                encoded = [image.as_py() for image in itertools.islice(images, len(some))]
                yield from pool.map(_row, some, encoded)


def _parts(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _row(sample_id: int, data: bytes) -> Row:
    pixels = decode(data).permute(1, 2, 0).numpy()
    content = pixels.tobytes()
    return sample_id, content, zlib.crc32(content), pixels.shape[0], pixels.shape[1]


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Batches of some 64 MiB, or of one image if that is larger."""
    pending, size = list[Row](), 0
    for row in rows:
        if pending and size + len(row[1]) > _BATCH_BYTES:
            yield _batch(pending)
            pending, size = [], 0
        pending.append(row)
        size += len(row[1])
    if pending:
        yield _batch(pending)


def _batch(rows: list[Row]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


__all__ = ["DecodedReader", "decoded_bytes", "keeps_decoded", "open_decoded_copy", "training_copy"]
