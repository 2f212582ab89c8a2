"""Images with their embeddings, batch by batch: from folders, from a run's dataset, or from files of embeddings.

Memory is that of a few batches of images and of the names, for any number of images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from pipeline.data.reader import RowGroupReader
from pipeline.data.store import Store
from pipeline.errors import RunError, UserError
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.inference.image_inputs import ImageError
from pipeline.searching.changes import IndexBatch, image_path
from pipeline.searching.index import unit_or_finite
from pipeline.storage import Folder

THUMBNAIL_SIDE = 128  # pixels
BATCH = 64  # images in a forward pass
_READ = 256  # encoded images of a store that are read at once
_EMBEDDINGS = "_embeddings.json"  # of a folder that `pipeline.inference.embed` has written


def thumbnail(pixels: Tensor, side: int = THUMBNAIL_SIDE) -> bytes:
    """A JPEG of preprocessed pixels (uint8 [3, S, S]): what the network sees, at most `side` pixels wide."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


class Embedding:
    """Embeds images for an index.

    Args:
        model: The model.
        thumbnails: Make thumbnails.
        threads: Threads that read and decode; None: one a CPU.

    Attributes:
        rejected: Files of folders that could not be read, and were left out.
    """

    def __init__(self, model: EmbeddingModel, thumbnails: bool = True, threads: int | None = None) -> None:
        self.model, self.thumbnails, self.threads = model, thumbnails, threads
        self.rejected: list[ImageError] = []

    def of_files(self, sources: Sequence[str], class_name: str | None = None) -> Iterator[IndexBatch]:
        """Images by path or URI, and all below folders.

        The class of an image is `class_name`, or else the folder of a given folder that it lies in: FOLDER/CLASS/.../IMAGE.

        Raises:
            ImageError: An image that was given by its own path cannot be read; one in a folder is put into `rejected`.
            UserError: A folder has no images, or none that can be read.
        """
        roots = sorted({Folder(source).uri for source in sources}, key=len, reverse=True)
        given = {os.path.expanduser(source) for source in sources}

        def class_of(path: str) -> str | None:
            root = next((root for root in roots if path.startswith(f"{root}/")), None)
            below = path[len(root) + 1 :].split("/") if root is not None else []
            return below[0] if len(below) > 1 else None

        found = 0
        for batch in self.model.embed_batches(sources, batch_size=BATCH, threads=self.threads):
            for error in batch.rejected:
                if error.image in given:
                    raise error
            self.rejected += batch.rejected
            found += len(batch.names)
            if batch.names:
                paths = [image_path(name) for name in batch.names]
                classes = [class_name or class_of(path) for path in paths]
                yield self._batch(batch.embeddings, batch.pixels, paths, None, classes)
        if self.rejected and not found:
            raise UserError(f"none of {len(self.rejected):,} images can be read; the first is {self.rejected[0]}")

    def of_store(self, store: Store, splits: Sequence[str]) -> Iterator[IndexBatch]:
        """Images of some splits of a dataset, with its classes.

        Raises:
            UserError: It has no such images.
            RunError: An image is damaged.
        """
        rows = np.flatnonzero(np.isin(store.split, splits))
        if not len(rows):
            raise UserError(f"{store.folder} has no images of the splits {', '.join(splits)}")
        done = 0
        for batch in self.model.embed_batches(
            _encoded(store, store.sample_id[rows]), batch_size=BATCH, threads=self.threads
        ):
            if batch.rejected:
                raise RunError(f"{store.folder}: {batch.rejected[0]}: prepare the dataset again")
            part = rows[done : done + len(batch.names)]
            done += len(part)
            yield self._batch(batch.embeddings, batch.pixels, *_described(store, part))

    def of_embeddings(self, uri: str, store: Store | None) -> Iterator[IndexBatch]:
        """Images that `python -m pipeline.evaluate RUN --embed-to FOLDER` has embedded.

        Args:
            uri: That folder.
            store: The dataset, of which thumbnails are made; None: without thumbnails.

        Raises:
            UserError: There are no such files, they are not complete, or of other weights than the model's.
        """
        folder = Folder(uri)
        manifest = embeddings_manifest(folder, self.model)
        if store is not None and store.fingerprint != manifest["fingerprint"]:
            raise UserError(
                f"the embeddings in {folder} are of the dataset {manifest['dataset']} ({manifest['fingerprint']}), not of "
                f"{store.folder} ({store.fingerprint}): add --no-thumbnails, or embed again"
            )
        reader = None if store is None else RowGroupReader(store)
        for name in folder.names():
            if not name.startswith("part-"):
                continue
            with pq.ParquetFile(folder.open(name), page_checksum_verification=True, pre_buffer=False) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, use_threads=False)
                    for start in range(0, len(table), _READ):
                        yield self._stored(table.slice(start, _READ), folder, reader)

    def _stored(self, table: pa.Table, folder: Folder, reader: RowGroupReader | None) -> IndexBatch:
        """Rows of a file of embeddings."""
        column = table["embedding"].combine_chunks()
        values = np.asarray(column.flatten()).reshape(len(table), column.type.list_size)
        ids = np.asarray(table["sample_id"])
        has_source = "source" in table.column_names
        paths = table["source"].to_pylist() if has_source else [f"{folder}#{i}" for i in ids]
        thumbnails = [b""] * len(table)
        if reader is not None:
            with self._pool() as pool:
                thumbnails = list(pool.map(lambda data: thumbnail(self.model.preprocess(data)), reader.read(ids)))
            reader.clear()
        return IndexBatch(
            unit_or_finite(values, self.model.dim, self.model.distance, f"embeddings in {folder}"),
            paths, table["label"].to_pylist(), table["class_name"].to_pylist(), thumbnails,
        )  # fmt: skip

    def _batch(
        self,
        embeddings: Tensor,
        pixels: Tensor,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        classes: Sequence[str | None],
    ) -> IndexBatch:
        images = [b""] * len(paths)
        if self.thumbnails:
            with self._pool() as pool:
                images = list(pool.map(thumbnail, pixels))
        rows = unit_or_finite(embeddings.numpy(), self.model.dim, self.model.distance, f"images from {paths[0]} on")
        return IndexBatch(rows, paths, labels, classes, images)

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads or os.cpu_count() or 1, thread_name_prefix="thumbnails")


def embeddings_manifest(folder: Folder, model: EmbeddingModel) -> dict[str, Any]:
    """The manifest of a folder of embeddings.

    Raises:
        UserError: There is none, the files are not complete, or they were computed with other weights than the model's.
    """
    if not folder.exists(_EMBEDDINGS):
        raise UserError(
            f"{folder} holds no embeddings (no {_EMBEDDINGS}): write them with `python -m pipeline.evaluate RUN --embed-to {folder}`"
        )
    manifest: dict[str, Any] = folder.read_json(_EMBEDDINGS)
    if not manifest.get("complete"):
        raise UserError(
            f"the embeddings in {folder} are not complete: run `python -m pipeline.evaluate --embed-to` again"
        )
    if manifest["weights"] != model.weights:
        raise UserError(
            f"the embeddings in {folder} are of other weights ({manifest['run']}, {manifest['checkpoint']}) than those of "
            f"{model.source}: embed again, or give the run and --checkpoint that they are of"
        )
    return manifest


def _described(store: Store, rows: np.ndarray) -> tuple[list[str], list[int], list[str]]:
    """Paths, labels and class names of rows of a store."""
    ids, labels = store.sample_id[rows], store.label[rows].tolist()
    paths = store.sources(ids) or [f"{store.folder}#{i}" for i in ids]
    return paths, labels, [store.class_name_of[label] for label in labels]


def _encoded(store: Store, ids: np.ndarray) -> Iterator[bytes]:
    """Encoded images of a store in order, the next ones fetched ahead."""
    reader = RowGroupReader(store)
    for start in range(0, len(ids), _READ):
        reader.prefetch(ids[start + _READ : start + 2 * _READ])
        yield from reader.read(ids[start : start + _READ])


__all__ = ["Embedding", "embeddings_manifest", "thumbnail"]
