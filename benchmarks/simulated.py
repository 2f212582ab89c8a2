"""Datasets of any size with the class sizes of Stanford Online Products, and one small image in the place of all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from PIL import Image

from benchmarks.evaluation import product_sizes
from pipeline.data.cache import _SCHEMA as COPY
from pipeline.data.entries import Entry
from pipeline.data.store import FORMAT, ROW_GROUP
from pipeline.data.write_store import plan_shards, write_shard
from pipeline.storage import Folder

IMAGES, CLASSES = 59_551, 11_318  # training set of Stanford Online Products (Oh Song et al., CVPR 2016)
PER_SHARD = 512  # images, the default of `prepare`
MAX_LINKS = 10_000  # hard links to one file


def simulated_labels(samples: int) -> Int64[np.ndarray, " samples"]:
    """Class of every sample, ascending, as a store gives them."""
    sizes = product_sizes(max(1, round(samples * CLASSES / IMAGES)), samples)
    return np.repeat(np.arange(len(sizes)), sizes)


def simulated_catalogue(labels: Int64[np.ndarray, " samples"], folds: int = 4) -> pa.Table:
    """The catalogue of a training set with these labels; fold = class modulo folds."""
    names = pa.array([f"class-{i:08d}" for i in range(int(labels[-1]) + 1)])
    split = pa.DictionaryArray.from_arrays(np.zeros(len(labels), dtype=np.int8), ["train"])
    return pa.table(
        {
            "sample_id": np.arange(len(labels)),
            "label": labels,
            "class_name": pa.chunked_array([names.take(pa.array(part)) for part in np.array_split(labels, 64)]),
            "split": split.cast(pa.string()),
            "fold": labels % folds,
        }
    )


def simulated_shards(samples: int, folder: Folder) -> list[dict[str, Any]]:
    """Records of the shards of a training set, whose files are hard links to one with a small image."""
    source = Path(folder.path("image.png"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).save(source)
    labels = simulated_labels(PER_SHARD).tolist()
    (shard,) = plan_shards([Entry(str(source), f"class-{c:08d}", "train") for c in labels], 4, PER_SHARD)
    first = write_shard(shard, folder, None)
    data, file = folder.read(first["file"]), ""
    records = []
    for i, start in enumerate(range(0, samples, PER_SHARD)):
        name = f"shards/train-{i:05d}.parquet"
        if i % MAX_LINKS == 0:
            folder.write(file := name, data)
        else:
            os.link(folder.path(file), folder.path(name))
        rows = min(PER_SHARD, samples - start)
        records.append({"file": name, "rows": rows, "bytes": first["bytes"], "sha256": first["sha256"]})
    return records


def write_simulated_copy(samples: int, path: Path) -> None:
    """A node's copy of the training set: a batch for each shard."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, COPY) as writer:
        for start, end in pairwise([*range(0, samples, PER_SHARD), samples]):
            images = pa.array([bytes(8)] * (end - start), pa.large_binary())
            columns = [np.arange(start, end), images, np.zeros(end - start, np.uint32)]
            writer.write_batch(pa.record_batch(columns, schema=COPY))


def write_simulated_store(table: pa.Table, folder: Folder, shards: Sequence[dict[str, Any]] = ()) -> int:
    """A store, by default without shards: catalogue and manifest; returns the catalogue's bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    data = sink.getvalue()
    folder.write("catalog.parquet", data)
    checksum = {"file": "catalog.parquet", "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "format": FORMAT,
        "name": "simulated",
        "fingerprint": "0",
        "catalog": checksum,
        "splits": {},
        "row_group": ROW_GROUP,
        "shards": list(shards),
    }
    folder.write_json("manifest.json", manifest)
    return len(data)
