"""What int8 weights cost: figures of retrieval with the float and with the int8 network, their size and their speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.find_store import find_store
from pipeline.data.store import Samples, Store
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation.embedder import build_embedder
from pipeline.evaluation.evaluate_task import evaluate
from pipeline.evaluation.tasks import RetrievalTask, test_task
from pipeline.exporting.onnx_files import OnnxNetwork
from pipeline.exporting.parity import made_images
from pipeline.storage import home

MAX_IMAGES = 5000  # measured, whole classes
_TIMED_S = 2.0


@dataclass(frozen=True)
class Int8Cost:
    """The float network and the int8 network, in this order.

    Attributes:
        dataset: Title of the dataset.
        images: Number of its test images that were measured.
        metrics: Figures in percent, by name.
        num_bytes: Sizes of the files.
        rates: Images a second on one thread of this machine.
    """

    dataset: str
    images: int
    metrics: tuple[dict[str, float], dict[str, float]]
    num_bytes: tuple[int, int]
    rates: tuple[float, float]

    @property
    def metric(self) -> str:
        """The first figure: recall@1, or cmc@1."""
        return next(iter(self.metrics[0]))

    @property
    def lines(self) -> list[str]:
        """The costs in words."""
        before, after = (found[self.metric] for found in self.metrics)
        megabytes = [size / 1e6 for size in self.num_bytes]
        return [
            f"int8: {self.metric} {before:.2f} -> {after:.2f} % ({after - before:+.2f}) on {self.images:,} test images of "
            f"{self.dataset}",
            f"int8: {megabytes[0]:.1f} -> {megabytes[1]:.1f} MB, {self.rates[0]:.1f} -> {self.rates[1]:.1f} images/s on one thread "
            "of this machine",
        ]


def int8_store(config: Config, dataset: str | None, trained_on: str | None) -> Store:
    """The dataset whose test images are measured: one by its name or address, or else the run's.

    Raises:
        UserError: There is none.
    """
    name = dataset or trained_on
    if name is None:
        raise UserError("--int8 measures its loss on test images, and an exported model has none: give --data DATASET")
    return Store(find_store(name, list(dict.fromkeys((config.root, home())))))


def int8_cost(config: Config, store: Store, full: Path, small: Path) -> Int8Cost:
    """Measures both networks on the test images, or on the images of evenly chosen test classes if there are many.

    Args:
        config: The run's configuration.
        store: The dataset.
        full, small: Files of the float and the int8 network, of pixels.

    Raises:
        UserError: The dataset has no test images.
        DivergedError: Embeddings cannot be measured.
    """
    task = test_task(config, store)
    if task is None:
        raise UserError(f"{store.folder} has no test images to measure the int8 network on: give --data DATASET")
    if task.gallery is None:
        task = RetrievalTask(_some_classes(task.queries), distance=task.distance)
    embedder = build_embedder(config, store, torch.device("cpu"), Ranks(), "in_process", 1)
    found = []
    for path in (full, small):
        found.append(evaluate(task, embedder, OnnxNetwork(path), None, config.evaluation.recall_at).metrics)
    sides = [task.queries, *([] if task.gallery is None else [task.gallery])]
    num = len(np.unique(np.concatenate([side.ids for side in sides])))
    size = config.data.transforms.of_evaluation().size
    return Int8Cost(
        store.title, num, (found[0], found[1]), (full.stat().st_size, small.stat().st_size),
        (_rate(full, size), _rate(small, size)),
    )  # fmt: skip


def _some_classes(samples: Samples) -> Samples:
    """All images, or those of evenly chosen classes, about MAX_IMAGES."""
    if len(samples) <= MAX_IMAGES:
        return samples
    classes = np.unique(samples.labels)
    chosen = classes[np.linspace(0, len(classes) - 1, max(2, len(classes) * MAX_IMAGES // len(samples))).astype(int)]
    return samples.subset(np.isin(samples.labels, chosen))


def _rate(path: Path, size: int) -> float:
    return images_per_second(OnnxNetwork(path, threads=1), size)


@torch.no_grad()
def images_per_second(network: Callable[[Tensor], Tensor], size: int) -> float:
    """Images a second of a network of pixels [B, 3, S, S], in batches of 8, over some seconds."""
    pixels = made_images(8, size, size)
    network(pixels)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < _TIMED_S:
        network(pixels)
        done += len(pixels)
    return done / (time.perf_counter() - start)
