"""The files of an index: what holds what, and how they change without a reader ever seeing half of a change.

    index.json               the manifest, written last and whole: format, model, dimension, distance, segments, removed images,
                             engine with its measured recall, checksums. What it does not name does not exist.
    segment-*/               images that were added together, in the order of their ids
        embeddings.npy       float32 [rows, D]; of length one where the distance is cosine. Memory-mapped.
        ids.npy              int64 [rows], ascending; an id is never used twice. Memory-mapped.
        rows.parquet         path, label, class_name of each row; row groups are read when a result needs them
        thumbnails.bin       small JPEGs, one behind the other; memory-mapped
        thumbnails.npy       int64 [rows + 1], where each begins; equal to the next: there is none. Memory-mapped.
    removed-*.npy            int64, ascending: ids of rows that are no longer found; dropped when segments are merged
    engine-*.faiss           the faiss index of the first segment, where there is one; later segments are searched exactly
    .lock                    held by the one process that changes the index

Names of files are drawn anew for every change, so that a reader of the former manifest goes on with the former files. Files that
no manifest names, as a killed process leaves them, are removed by the next change.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UserError, one_line
from pipeline.storage import Folder
from pipeline.storage.folder import disk_full_as_error

FORMAT = 1
MANIFEST = "index.json"
EMBEDDINGS, IDS, ROWS, THUMBNAILS, OFFSETS = (
    "embeddings.npy", "ids.npy", "rows.parquet", "thumbnails.bin", "thumbnails.npy",
)  # fmt: skip
SEGMENT_FILES = (EMBEDDINGS, IDS, ROWS, THUMBNAILS, OFFSETS)
ROW_GROUP = 4096  # rows that are read to tell the path of one
_OURS = re.compile(
    r"segment-[0-9a-f]{12}|removed-[0-9a-f]{12}\.npy|engine-[0-9a-f]{12}\.faiss|\.lock|index\.json\..*part"
)

Distance = Literal["cosine", "euclidean"]
_SCHEMA = pa.schema([("path", pa.string()), ("label", pa.int64()), ("class_name", pa.string())])


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A file: its size, compared whenever it is opened, and its SHA-256, compared by `info --verify`."""

    bytes: int
    sha256: str


class SegmentRecord(_Record):
    """A segment: its folder, number of rows, and files by name."""

    folder: str
    rows: int
    files: dict[str, FileRecord]


class RemovedRecord(_Record):
    """The file of removed ids, and how many they are."""

    file: str
    rows: int
    record: FileRecord


class ModelRecord(_Record):
    """The model that computed the embeddings.

    Attributes:
        source: Where it was loaded from.
        checkpoint: The checkpoint of a run; None: the run's own choice.
        fingerprint: Of weights, architecture and preprocessing: what a query's model has to equal.
    """

    source: str
    checkpoint: str | None
    fingerprint: str


class EngineRecord(_Record):
    """How the first segment is searched.

    Attributes:
        requested: The engine that was asked for ("auto": by the size).
        name: The engine in use; "exact" also where the requested one stayed below the target.
        recall: Recall@k measured on images of the index; 1 for exact search.
        k, target: For which k, and what recall had to be reached.
        note: Why another engine is in use than the requested one, or "".
        parameters: nprobe, lists, efSearch, ...
        search_parameter, overfetch: What faiss is asked with; see `pipeline.mining.faiss_index`.
        file, record: The faiss index; None for exact search.
    """

    requested: str
    name: str
    recall: float = 1.0
    k: int = 10
    target: float = 0.95
    note: str = ""
    parameters: dict[str, int] = {}
    search_parameter: str = ""
    overfetch: int = 1
    file: str | None = None
    record: FileRecord | None = None


class Manifest(_Record):
    """All that is known of an index.

    Attributes:
        generation: Counts the changes.
        dim, distance: Of the embeddings.
        largest: Length of the longest embedding.
        next_id: The id that the next image will get.
        thumbnail_side: Longer side of the thumbnails in pixels; 0: there are none.
    """

    format: int
    generation: int
    model: ModelRecord
    dim: int
    distance: Distance
    largest: float
    next_id: int
    thumbnail_side: int
    segments: tuple[SegmentRecord, ...]
    removed: RemovedRecord | None
    engine: EngineRecord

    @property
    def rows(self) -> int:
        """Images that can be found."""
        return sum(segment.rows for segment in self.segments) - (self.removed.rows if self.removed else 0)


def index_folder(path: str | os.PathLike[str]) -> Folder:
    """The folder of an index.

    Raises:
        UserError: It is in object storage, where nothing can be memory-mapped.
    """
    folder = Folder(path)
    if not folder.is_local:
        raise UserError(
            f"an index is memory-mapped and has to lie in a local folder, got {folder}: build it in one, and copy the folder to and "
            "from object storage as it is"
        )
    return folder


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of an index.

    Raises:
        UserError: There is no index, or it is of a format that this program does not know.
    """
    if not folder.exists(MANIFEST):
        raise UserError(
            f"{folder} holds no index (no {MANIFEST}): build one with `python -m pipeline.search build RUN --to {folder}`"
        )
    values = folder.read_json(MANIFEST)
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder} has index format {found}, this program reads format {FORMAT}: build it again")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"{folder}/{MANIFEST} is damaged ({one_line(error)}): copy the index again or build it again"
        ) from error


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Makes a change visible: a reader sees the former manifest or this one."""
    folder.write(MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())


def check_files(folder: Folder, manifest: Manifest, checksums: bool = False) -> None:
    """Compares the files with the manifest: their sizes, or also their checksums, which reads all of them.

    Raises:
        UserError: A file is missing or differs.
    """
    for name, record in _files(manifest):
        path = folder.path(name)
        try:
            size = os.stat(path).st_size
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: copy the index again or build it again") from error
        if size != record.bytes:
            raise UserError(
                f"{path} has {size:,} bytes, {MANIFEST} says {record.bytes:,}: copy the index again or build it again"
            )
        if checksums and _sha256(path) != record.sha256:
            raise UserError(f"{path} is damaged (its checksum differs): copy the index again or build it again")


def _files(manifest: Manifest) -> Iterator[tuple[str, FileRecord]]:
    for segment in manifest.segments:
        yield from ((f"{segment.folder}/{name}", record) for name, record in segment.files.items())
    if manifest.removed is not None:
        yield manifest.removed.file, manifest.removed.record
    if manifest.engine.file is not None and manifest.engine.record is not None:
        yield manifest.engine.file, manifest.engine.record


@contextlib.contextmanager
def changing(folder: Folder) -> Iterator[None]:
    """A block in which this process alone changes the index; before and after it, files that no manifest names are removed.

    Raises:
        UserError: Another process is changing it; the folder holds other files, or cannot be written.
    """
    root = Path(folder.path())
    foreign = [name for name in folder.names() if name != MANIFEST and _OURS.fullmatch(name) is None]
    if foreign and not folder.exists(MANIFEST):
        raise UserError(f"{folder} is not empty, and holds no index ({foreign[0]}): choose another folder")
    folder.check_writable()
    lock = FileLock(root / ".lock")
    try:
        with lock.acquire(timeout=0):
            _sweep(folder)
            try:
                yield
            finally:
                _sweep(folder)
    except Timeout as error:
        raise UserError(f"another process is changing the index {folder}: wait until it has ended") from error


def _sweep(folder: Folder) -> None:
    """Removes what no manifest names."""
    keep = {MANIFEST, ".lock"}
    if folder.exists(MANIFEST):
        keep |= {name.split("/")[0] for name, _ in _files(read_manifest(folder))}
    for name in folder.names():
        if _OURS.fullmatch(name) and name not in keep:
            folder.remove(name)


def new_name(kind: str, suffix: str = "") -> str:
    """A name that no file of the index ever had."""
    return f"{kind}-{uuid.uuid4().hex[:12]}{suffix}"


def write_removed(folder: Folder, ids: np.ndarray) -> RemovedRecord | None:
    """Writes the file of removed ids; None if there are none."""
    if not len(ids):
        return None
    name, buffer = new_name("removed", ".npy"), io.BytesIO()
    np.save(buffer, np.sort(ids).astype(np.int64))
    folder.write(name, buffer.getvalue())
    return RemovedRecord(file=name, rows=len(ids), record=record_of(folder.path(name)))


def record_of(path: str | os.PathLike[str]) -> FileRecord:
    """Size and checksum of a file."""
    return FileRecord(bytes=os.stat(path).st_size, sha256=_sha256(path))


def _sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _ArrayFile:
    """An .npy file that grows row by row; numpy leaves room in its header for a longer shape."""

    def __init__(self, path: Path, dtype: str, *inner: int) -> None:
        self.inner, self.dtype, self.rows = inner, dtype, 0
        self.file = open(path, "wb")  # noqa: SIM115  # closed by `finish`, or with the writer
        self._write_header()

    def _write_header(self) -> None:
        descr = {"descr": self.dtype, "fortran_order": False, "shape": (self.rows, *self.inner)}
        np.lib.format.write_array_header_1_0(self.file, descr)

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).data)
        self.rows += len(values)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        _flush(self.file)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class SegmentWriter:
    """Writes a segment batch by batch, in the memory of one row group; `finish` gives its record for the manifest.

    As a block, it removes what it wrote if the block fails.
    """

    def __init__(self, folder: Folder, dim: int) -> None:
        self.name, self.dim, self.rows, self.largest = new_name("segment"), dim, 0, 0.0
        self.root = Path(folder.path(self.name))
        with disk_full_as_error(self.root, 0):
            self.root.mkdir(parents=True)
            self._embeddings = _ArrayFile(self.root / EMBEDDINGS, "<f4", dim)
            self._ids = _ArrayFile(self.root / IDS, "<i8")
            self._offsets = _ArrayFile(self.root / OFFSETS, "<i8")
            self._thumbnails = open(self.root / THUMBNAILS, "wb")  # noqa: SIM115  # closed by `__exit__`
            self._table = pq.ParquetWriter(self.root / ROWS, _SCHEMA, write_page_checksum=True)
        self._waiting: list[pa.Table] = []
        self._end = 0
        self._offsets.append(np.zeros(1, np.int64))

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._embeddings.file, self._ids.file, self._offsets.file, self._thumbnails):
            file.close()
        with contextlib.suppress(OSError):  # a full disk: the error that brought us here tells it
            self._table.close()
        if kind is not None:
            shutil.rmtree(self.root, ignore_errors=True)

    def append(
        self, ids: np.ndarray, embeddings: Float32[np.ndarray, "rows dim"], table: pa.Table, thumbnails: Sequence[bytes]
    ) -> None:
        """Appends rows.

        Args:
            ids: Ascending, and larger than those before.
            embeddings: Of length one where the distance is cosine.
            table: path, label, class_name.
            thumbnails: Encoded; b"" for none.
        """
        size = embeddings.nbytes + sum(map(len, thumbnails))
        with disk_full_as_error(self.root, size):
            self._ids.append(ids)
            self._embeddings.append(embeddings)
            self._thumbnails.write(b"".join(thumbnails))
            ends = self._end + np.cumsum([len(data) for data in thumbnails], dtype=np.int64)
            self._offsets.append(ends)
            self._end = int(ends[-1]) if len(ends) else self._end
            self._waiting.append(table.select(_SCHEMA.names).cast(_SCHEMA))
            self._write_rows(ROW_GROUP)
        self.rows += len(ids)
        if len(embeddings):
            self.largest = max(self.largest, float(np.linalg.norm(embeddings.astype(np.float64), axis=1).max()))

    def _write_rows(self, least: int) -> None:
        """Writes whole row groups while at least so many rows wait."""
        while self._waiting and sum(len(table) for table in self._waiting) >= least:
            table = pa.concat_tables(self._waiting)
            self._table.write_table(table.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
            self._waiting = [table.slice(ROW_GROUP)] if len(table) > ROW_GROUP else []

    def finish(self) -> SegmentRecord:
        """Completes the files and gives their record."""
        with disk_full_as_error(self.root, 0):
            self._write_rows(1)
            self._table.close()
            for array in (self._embeddings, self._ids, self._offsets):
                array.finish()
            _flush(self._thumbnails)
            with open(self.root / ROWS, "rb") as file:
                os.fsync(file.fileno())
        files = {name: record_of(self.root / name) for name in SEGMENT_FILES}
        return SegmentRecord(folder=self.name, rows=self.rows, files=files)
