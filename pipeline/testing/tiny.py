"""A dataset of 70 noisy images and a run of seconds on it, for checks of a method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.entries import Entry
from pipeline.data.store import Store
from pipeline.data.write_store import write_store
from pipeline.distributed.jobs import run_serially
from pipeline.storage import Folder


def write_images(root: Path, classes: dict[str, int], seed: int, side: int = 24) -> list[tuple[str, str]]:
    """PNGs of noise around a pattern of their class; returns (path, class name) of each.

    Args:
        root: folder to write to.
        classes: number of images by class name.
        seed: of the patterns and the noise.
        side: of the images, pixels.
    """
    random = np.random.default_rng(seed)
    found = []
    for name, count in classes.items():
        pattern = np.kron(random.uniform(102, 152, (4, 4, 3)), np.ones((side // 4, side // 4, 1)))
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(pattern + random.normal(0, 50, pattern.shape), 0, 255).astype(np.uint8)
            path = root / name / f"{i}.png"
            Image.fromarray(pixels).save(path)
            found.append((str(path), name))
    return found


def write_tiny_store(root: Path, seed: int = 0) -> Store:
    """12 training classes of 3 to 7 images and one of a single image, 6 test classes, in 4 folds and several shards."""
    train = {f"train{i:02d}": 3 + i % 5 for i in range(12)} | {"train_single": 1}
    test = {f"test{i:02d}": 3 + i % 5 for i in range(6)}
    images = write_images(root / "images", train | test, seed)
    entries = [Entry(path, name, "train" if name in train else "test") for path, name in images]
    return write_store("tiny", entries, Folder(root / "store"), run_serially, num_folds=4, images_per_shard=16)


def tiny_values(root: str, store: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run of seconds, as a recipe: in this process, one thread, float64, batches of 4 × 3 images of 24×24.

    Args:
        root: storage.
        store: URI of the dataset.
        changes: values by dotted key, "method.optimizer.lr": 0.1.
    """
    values: dict[str, Any] = {
        "name": "tiny",
        "storage": root,
        "seed": 3,
        "length": "3 epochs",
        "precision": "float64",
        "data": {"source": store, "validation_fold": 0, "transforms": {"size": 24, "jitter": 0.2, "rotate": 20}},
        "model": {"backbone": "test_efficientnet", "weights": "none", "batch_norm": "sync"},
        "method": {
            "name": "baseline",
            "classes_per_batch": 4,
            "samples_per_class": 3,
            "embedding_dim": 8,
            "optimizer": {"name": "adamw", "lr": 3e-3, "eps": 1e-6},
        },
        "evaluation": {"batch_size": 16, "recall_at": [1, 2]},
        "cache": {"folder": f"{root}/cache"},
        "runtime": {
            "workers": 0,
            "cpus_per_worker": 1,
            "loader": "in_process",
            "log_every": 1,
        },
    }
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return values
