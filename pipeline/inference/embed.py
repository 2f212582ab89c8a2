"""Embeddings of any number of images as Parquet files: `python -m pipeline.evaluate RUN --embed-to PATH`.

    _embeddings.json    run, checkpoint, weights, dataset and splits; number of rows, dimensions and files ("parts");
                        "complete" once all files are written
    part-*.parquet      named by their first row: sample_id, label, class_name, split (for tracklets also track, camera,
                        frame), source (path or URI of the image's origin, where the store has it), embedding [D]

Each file is computed by one process and written whole; the same command continues after an
interruption and keeps the files that are there. Memory is that of one file and of the catalogue,
for any number of images.
"""

from __future__ import annotations

import functools
import io
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from methods import Method
from pipeline.data.reader import open_reader
from pipeline.data.store import Store
from pipeline.distributed.jobs import run_on_ray, run_serially
from pipeline.distributed.ray_session import check_visible, cluster_maximum, ray_session
from pipeline.errors import UserError
from pipeline.evaluation.embedder import Embedder
from pipeline.inference.trained_model import TrainedModel
from pipeline.model.trunk import Trunk
from pipeline.runs.run_folder import checkpoint_folder
from pipeline.storage import Folder

ROWS_PER_FILE = 2048  # images in a file
_MANIFEST = "_embeddings.json"  # readers of Parquet folders pass over names that begin so
_EARLIER_MANIFEST = "embeddings.json"  # of folders begun by earlier versions


class EmbedTask:
    """Embeds a range of images and writes them into a file.

    Args:
        trained: The model.
        splits: Splits of its dataset, whose images are ordered by sample id.
        target: The folder of the files.
    """

    def __init__(self, trained: TrainedModel, splits: Sequence[str], target: Folder) -> None:
        self.trained, self.splits, self.target = trained, tuple(splits), target

    @functools.cached_property
    def store(self) -> Store:
        return self.trained.store()

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Rows of the catalogue whose images are embedded."""
        return np.flatnonzero(np.isin(self.store.split, self.splits))

    @functools.cached_property
    def _network(self) -> tuple[Embedder, Trunk, Method]:
        gpu = self.trained.config.runtime.gpus_per_worker and torch.cuda.is_available()
        return self.trained.load(self.store, torch.device("cuda" if gpu else "cpu"))

    def __call__(self, file_rows: range) -> dict[str, Any]:
        store = self.store
        rows = self.rows[file_rows.start : file_rows.stop]
        embedder, trunk, method = self._network
        embeddings = embedder(store.sample_id[rows], trunk, method).cpu().numpy()
        source = embedder.source
        open_reader(source.uri, source.fingerprint, source.cache).clear()  # no image is read twice
        labels = store.label[rows]
        columns = {
            "sample_id": pa.array(store.sample_id[rows]),
            "label": pa.array(labels),
            "class_name": pa.array([store.class_name_of[int(label)] for label in labels]),
            "split": pa.array(store.split[rows]),
        }
        extra_columns = {"track": store.track, "camera": store.camera, "frame": store.frame}
        columns |= {name: pa.array(values[rows]) for name, values in extra_columns.items() if values is not None}
        sources = store.sources(store.sample_id[rows])
        columns |= {} if sources is None else {"source": pa.array(sources)}
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, write_page_checksum=True)
        self.target.write(_file_name(file_rows), sink.getvalue())
        return {}


def embed(trained: TrainedModel, splits: Sequence[str], target: Folder, workers: int) -> dict[str, Any]:
    """Writes the embeddings of all images of some splits; returns the manifest.

    Args:
        trained: The model.
        splits: Splits of its dataset.
        target: An empty folder, or one that an interrupted call with the same arguments has begun.
        workers: Number of processes on Ray; 0: this process.

    Raises:
        UserError: No such images; the folder holds other embeddings, or cannot be written.
    """
    work = EmbedTask(trained, splits, target)
    total = len(work.rows)
    if not total:
        raise UserError(f"{work.store.folder} has no images of the splits {', '.join(splits)}")
    manifest: dict[str, Any] = {
        "format": 1,
        "run": trained.run.uri,
        "checkpoint": checkpoint_folder(trained.kind, trained.step),
        "weights": trained.weights(),
        "dataset": work.store.folder.uri,
        "fingerprint": trained.fingerprint,
        "splits": list(splits),
        **({"partial": list(work.store.partial)} if work.store.partial else {}),
        "rows": total,
        "parts": -(-total // ROWS_PER_FILE),
    }
    name = _EARLIER_MANIFEST if target.exists(_EARLIER_MANIFEST) else _MANIFEST
    earlier = target.read_json(name) if target.exists(name) else None
    if earlier is None:
        if target.names():
            raise UserError(f"{target} is not empty, and contains no embeddings: choose another folder")
        target.check_writable()
        target.write_json(name, manifest | {"complete": False})
    elif {k: earlier.get(k) for k in manifest} != manifest:
        raise UserError(
            f"{target} contains embeddings of {earlier.get('run')}, {earlier.get('checkpoint')}, splits "
            f"{earlier.get('splits')}, of other weights or images than these: choose another folder, or remove it"
        )
    elif earlier.get("complete"):
        return dict(earlier)
    written = set(target.names())
    files = [range(start, min(start + ROWS_PER_FILE, total)) for start in range(0, total, ROWS_PER_FILE)]
    missing = [rows for rows in files if _file_name(rows) not in written]
    if missing and workers:
        with ray_session(workers) as ray:
            for folder, what in ((target, "--embed-to"), (trained.run, "the run"), (work.store.folder, "the dataset")):
                check_visible(ray, folder, what)
            # a run of another machine may be embedded where there are no GPUs; waiting for one would not end
            gpus = float(trained.config.runtime.gpus_per_worker) if cluster_maximum(ray).get("GPU") else 0.0
            deque(run_on_ray(EmbedTask(trained, splits, target), missing, "embedding", workers, gpus), maxlen=0)
    else:
        deque(run_serially(work, missing), maxlen=0)
    manifest["dim"] = pq.read_schema(target.open(_file_name(files[0]))).field("embedding").type.list_size
    manifest["complete"] = True
    target.write_json(name, manifest)
    return manifest


def _file_name(rows: range) -> str:
    return f"part-{rows.start:09d}.parquet"


__all__ = ["embed"]
