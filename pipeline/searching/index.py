"""An index, opened: searched by image or by embedding, with paths, classes and thumbnails of what is found.

All large files are memory-mapped; an open index takes the memory of the manifest, of the removed ids, and of the pages in use.
What another process adds or removes becomes visible by `refresh`.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int64

from pipeline.errors import UserError
from pipeline.searching.index_files import (
    EMBEDDINGS,
    IDS,
    MANIFEST,
    OFFSETS,
    ROWS,
    THUMBNAILS,
    Manifest,
    SegmentRecord,
    check_files,
    index_folder,
    read_manifest,
)
from pipeline.searching.scan import decide, merge, nearest
from pipeline.storage import Folder

if TYPE_CHECKING:
    from pipeline.inference.embedding_model import EmbeddingModel

_ROW_GROUPS = 64  # of paths and classes that are kept, the most recently used
_ATTEMPTS = 5  # to open an index that others change at the same time


@dataclass(frozen=True, slots=True)
class SearchHit:
    """An image that was found.

    Attributes:
        id: Its number in the index, which never changes.
        path: Where it lay when it was indexed, a path or URI.
        label, class_name: Its class; None: not known.
        similarity: Cosine with the query, or minus the Euclidean distance to it.
    """

    id: int
    path: str
    label: int | None
    class_name: str | None
    similarity: float


class _Segment:
    """The files of a segment, memory-mapped."""

    def __init__(self, folder: Folder, record: SegmentRecord, removed: Int64[np.ndarray, " removed"]) -> None:
        root = Path(folder.path(record.folder))
        self.rows = record.rows
        self.embeddings = np.asarray(_mapped(root / EMBEDDINGS))
        self.ids = np.asarray(_mapped(root / IDS))
        self.offsets = np.asarray(_mapped(root / OFFSETS))
        self.thumbnails: Any = (
            np.memmap(root / THUMBNAILS, np.uint8, "r") if self.offsets[-1] else np.zeros(0, np.uint8)
        )
        self.table = pq.ParquetFile(root / ROWS, memory_map=True, pre_buffer=False)
        counts = [self.table.metadata.row_group(i).num_rows for i in range(self.table.num_row_groups)]
        self.starts = np.cumsum([0, *counts])
        here = removed[np.isin(removed, self.ids)] if len(removed) else removed
        self.removed = np.searchsorted(self.ids, here)  # positions, ascending

    def position(self, image: int) -> int | None:
        """Where the row of an id is; None if it is not here, or removed."""
        place = int(np.searchsorted(self.ids, image))
        if place == self.rows or self.ids[place] != image:
            return None
        at = int(np.searchsorted(self.removed, place))
        return None if at < len(self.removed) and self.removed[at] == place else place


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


class _Opened:
    """One generation of an index: its manifest and files, which never change."""

    def __init__(self, folder: Folder) -> None:
        self.version = _version(folder)
        self.manifest = read_manifest(folder)
        check_files(folder, self.manifest)
        record = self.manifest.removed
        self.removed = np.load(folder.path(record.file), allow_pickle=False) if record else np.zeros(0, np.int64)
        self.segments = [_Segment(folder, segment, self.removed) for segment in self.manifest.segments]
        self.engine = None
        if self.manifest.engine.file is not None:
            from pipeline.searching.engines import Engine  # with it numba: 1 CPU-s that exact search does not need

            self.engine = Engine(folder, self.manifest.engine, self.segments[0].rows, self.segments[0].removed)
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, image: int) -> tuple[int, int] | None:
        """Segment and position of an id."""
        for number, segment in enumerate(self.segments):
            place = segment.position(image)
            if place is not None:
                return number, place
        return None

    def row(self, image: int) -> dict[str, Any]:
        """path, label and class_name of an id that a search gave."""
        found = self.find(image)
        assert found is not None, image
        number, place = found
        segment = self.segments[number]
        group = int(np.searchsorted(segment.starts, place, "right")) - 1
        with self._lock:
            table = self._groups.pop((number, group), None)
            if table is None:
                table = segment.table.read_row_group(group, use_threads=False)
            self._groups[number, group] = table
            while len(self._groups) > _ROW_GROUPS:
                self._groups.popitem(last=False)
        (row,) = table.slice(place - int(segment.starts[group]), 1).to_pylist()
        return dict(row)


class SearchIndex:
    """An opened index. Searches may run in several threads at once.

    Args:
        path: Its folder.
        model: The model that embeds query images; None: loaded from where the index says, when it is first needed.

    Raises:
        UserError: There is no index, it is damaged, or the model is not the one that it was built with.
    """

    def __init__(self, path: str | os.PathLike[str], model: EmbeddingModel | str | None = None) -> None:
        self.folder = index_folder(path)
        self._opened = _open(self.folder)
        self._model: EmbeddingModel | None = None
        self._model_source = model if isinstance(model, str) else None
        self._lock = threading.Lock()
        if model is not None and not isinstance(model, str):
            self.check_model(model)
            self._model = model

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def manifest(self) -> Manifest:
        """What is known of the index."""
        return self._opened.manifest

    @property
    def model(self) -> EmbeddingModel:
        """The model that embeds queries, loaded when it is first needed.

        Raises:
            UserError: It cannot be loaded, or is not the one that the index was built with.
        """
        with self._lock:
            if self._model is None:
                from pipeline.inference.load_model import load_model

                record = self.manifest.model
                if self._model_source is None:
                    model = load_model(record.source, record.checkpoint)
                else:
                    model = load_model(self._model_source)
                self.check_model(model)
                self._model = model
            return self._model

    def check_model(self, model: EmbeddingModel) -> None:
        """Raises UserError unless the index was built with this model."""
        manifest = self.manifest
        if model.dim != manifest.dim:
            raise UserError(
                f"the index {self.folder} has {manifest.dim} dimensions, the model {model.source} gives {model.dim}: query it with "
                f"the model that built it ({manifest.model.source}), or build an index with this one"
            )
        if model.fingerprint != manifest.model.fingerprint:
            raise UserError(
                f"the index {self.folder} was built by another model ({manifest.model.source}, fingerprint "
                f"{manifest.model.fingerprint[:12]}) than {model.source} (fingerprint {model.fingerprint[:12]}): query it with "
                "that one, or build an index with this one"
            )

    def search(self, queries: Any, k: int = 10) -> list[list[SearchHit]]:
        """The nearest images of each query, nearest first; fewer than k where the index holds fewer.

        Args:
            queries: Embeddings, floating-point [N, D] or [D], an array or tensor; or images, as `EmbeddingModel.embed` takes
                them: a path, a list, a folder, PIL images, uint8 arrays, bytes.
            k: Neighbours of each query.

        Raises:
            UserError: k is below 1; there are no queries; an image cannot be read; embeddings of another dimension, or without a
                direction.
        """
        embeddings = _as_embeddings(queries)
        if embeddings is None:
            embeddings = self.model.embed(queries).numpy()
        opened = self._opened  # one generation for the search and for the paths of what it finds
        return _hits(opened, *self._search(opened, embeddings, k))

    def search_embeddings(
        self, embeddings: Any, k: int = 10
    ) -> tuple[Int64[np.ndarray, "queries k"], Float64[np.ndarray, "queries k"]]:
        """Ids of the nearest images, -1 where there are fewer than k, and their similarities (there -inf).

        Exact where the engine is exact; else distances and order are exact, and `manifest.engine.recall` of the neighbours are
        found.

        Args:
            embeddings: Floating-point [N, D].
            k: Neighbours of each query.

        Raises:
            UserError: As `search`.
        """
        return self._search(self._opened, embeddings, k)

    def _search(self, opened: _Opened, embeddings: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and similarities in one generation, whatever a refresh in another thread opens meanwhile."""
        manifest = opened.manifest
        if k < 1:
            raise UserError(f"k is {k}, expected 1 or more")
        queries = unit_or_finite(np.asarray(embeddings), manifest.dim, manifest.distance, "queries")
        if not len(queries):
            raise UserError("got no queries, expected one image or embedding or more")
        parts = [_search_segment(opened, i, queries, k) for i in range(len(opened.segments))]
        empty = np.full((len(queries), 0), -1, np.int64), np.zeros((len(queries), 0))
        ids, distances = (np.concatenate([part[j] for part in [empty, *parts]], 1) for j in (0, 1))
        ids, distances = merge(ids, distances, k)
        similarity = 1 - distances / 2 if manifest.distance == "cosine" else -np.sqrt(distances)
        return ids, similarity

    def thumbnail(self, image: int) -> bytes | None:
        """A small JPEG of an image, by its id; None if the index has no such image, or no thumbnail of it."""
        opened = self._opened
        found = opened.find(image)
        if found is None:
            return None
        segment, place = opened.segments[found[0]], found[1]
        return bytes(segment.thumbnails[segment.offsets[place] : segment.offsets[place + 1]]) or None

    def refresh(self) -> bool:
        """Opens what was added or removed since; False if nothing was. Costs one `stat` where nothing was.

        Raises:
            UserError: The index is gone or damaged, or was built anew with another model.
        """
        if _version(self.folder) == self._opened.version:
            return False
        opened = _open(self.folder)
        if opened.manifest.model.fingerprint != self.manifest.model.fingerprint:
            raise UserError(f"the index {self.folder} was built again, by another model: open it again")
        self._opened = opened
        return True


def _search_segment(opened: _Opened, number: int, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the k nearest rows of a segment, and their squared distances."""
    segment, largest = opened.segments[number], opened.manifest.largest
    wanted = min(k, segment.rows)
    if number or opened.engine is None:
        positions, distances = nearest(queries, segment.embeddings, wanted, segment.removed, largest)
        return np.where(positions >= 0, segment.ids[positions], -1), distances
    answers = [
        decide(query, segment.embeddings, found, wanted, segment.removed)
        for query, found in zip(queries, opened.engine.candidates(queries, wanted), strict=True)
    ]
    positions, distances = np.stack([p for p, _ in answers]), np.stack([d for _, d in answers])
    there_are = min(wanted, segment.rows - len(segment.removed))
    lacking = np.flatnonzero((positions[:, :there_are] < 0).any(1))  # too few rows in the lists that were visited
    if len(lacking):
        positions[lacking], distances[lacking] = nearest(
            queries[lacking], segment.embeddings, wanted, segment.removed, largest
        )
    return np.where(positions >= 0, segment.ids[positions], -1), distances


def _hits(opened: _Opened, ids: np.ndarray, similarity: np.ndarray) -> list[list[SearchHit]]:
    """What a search gave, with paths and classes."""
    return [
        [
            SearchHit(int(image), **opened.row(int(image)), similarity=float(value))
            for image, value in zip(*row, strict=True)
            if image >= 0
        ]
        for row in zip(ids, similarity, strict=True)
    ]


def _version(folder: Folder) -> tuple[int, int] | None:
    try:
        status = os.stat(folder.path(MANIFEST))
    except OSError:
        return None  # `read_manifest` tells what is wrong
    return status.st_ino, status.st_mtime_ns


def _open(folder: Folder) -> _Opened:
    """Opens the newest generation; one that is replaced while it is opened is opened again."""
    for _ in range(_ATTEMPTS):
        version = _version(folder)
        try:
            return _Opened(folder)
        except (UserError, FileNotFoundError) as error:
            if _version(folder) == version:
                raise
            last = error
    raise UserError(f"the index {folder} changes faster than it can be opened: {last}")


def _as_embeddings(queries: Any) -> np.ndarray | None:
    """Floating-point arrays and tensors as an array; None for anything else."""
    if hasattr(queries, "detach"):
        queries = queries.detach().cpu().numpy() if queries.is_floating_point() else None
    if isinstance(queries, np.ndarray) and np.issubdtype(queries.dtype, np.floating):
        return np.atleast_2d(queries)
    return None


def unit_or_finite(values: np.ndarray, dim: int, distance: str, what: str) -> Float32[np.ndarray, "rows dim"]:
    """Embeddings as an index compares them: float32, and of length one where the distance is cosine.

    Raises:
        UserError: They are not [N, dim], not finite, or without a direction.
    """
    if values.ndim != 2 or values.shape[1] != dim:
        raise UserError(
            f"{what} have the shape {list(values.shape)}, expected [N, {dim}]: the index has {dim} dimensions"
        )
    exact = values.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    bad = ~np.isfinite(lengths[:, 0]) | ((lengths[:, 0] == 0) if distance == "cosine" else False)
    if bad.any():
        raise UserError(
            f"{what}: {int(bad.sum())} of {len(values)} embeddings are not finite, or zero, and cannot be compared"
        )
    return (exact / lengths if distance == "cosine" else exact).astype(np.float32)


def open_index(path: str | os.PathLike[str], model: EmbeddingModel | str | None = None) -> SearchIndex:
    """Opens an index; see `SearchIndex`."""
    return SearchIndex(path, model)


__all__ = ["SearchHit", "SearchIndex", "open_index"]
