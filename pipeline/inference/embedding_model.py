"""A trained network with its preprocessing: images in, embeddings out, without the dataset it was trained on.

    image -> read_input -> preprocess (uint8 [3, S, S]) -> trunk -> method.embed -> embedding [D]

The pixels and the embedding of an image are those that an evaluation of the run computes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save as save_safetensors
from torch import Tensor

from methods import Method
from pipeline.config import Config, ModelConfig
from pipeline.data.entries import MAX_PIXELS
from pipeline.data.transforms import TransformConfig, evaluation_pixels
from pipeline.errors import UserError
from pipeline.inference.image_inputs import ImageError, ImageInput, image_inputs, read_input
from pipeline.model.network import EmbeddingConfig, trunk_features
from pipeline.model.trunk import Trunk
from pipeline.runs.checkpoint import cpu_tensors

PREFETCH = 2  # batches whose images are read before they are needed


@dataclass(frozen=True)
class EmbeddedBatch:
    """Some of the images, in their order.

    Attributes:
        names: Path or place of each image that was read.
        pixels: Their pixels, uint8 [B, 3, S, S].
        embeddings: [B, D].
        rejected: The images that could not be read.
    """

    names: list[str]
    pixels: UInt8[Tensor, "batch 3 size size"]
    embeddings: Float[Tensor, "batch dim"]
    rejected: list[ImageError]


class EmbeddingModel:
    """A trained network with its preprocessing. Its methods may be called from several threads.

    Args:
        source: Where it was loaded from.
        settings: The configuration of its run.
        trunk, method: The network in evaluation mode on `device`, as `build_for_embedding` makes it.
        device: Device of the network.
        weights: SHA-256 of the files of trunk and method.
        classes: Number of training classes.
        class_names: Their names by label; empty in runs of earlier versions.
        figures: The content of the run's summary.json, or {} if it has not finished.

    Attributes:
        name: Name of the run.
        dim: Dimension D of an embedding.
        distance: "cosine" or "euclidean": what nearest means, as in the run's evaluation.
        transforms: Preprocessing.
    """

    def __init__(
        self,
        source: str,
        settings: EmbeddingConfig,
        trunk: Trunk,
        method: Method,
        device: torch.device,
        weights: Mapping[str, str],
        classes: int,
        class_names: tuple[str, ...] = (),
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.settings, self.trunk, self.method, self.device = source, settings, trunk, method, device
        self.weights, self.classes, self.class_names = dict(weights), classes, class_names
        self.figures = dict(figures or {})
        self.name = settings.name
        self.transforms: TransformConfig = settings.transforms.of_evaluation()
        self.distance: Literal["cosine", "euclidean"] = settings.evaluation.distance
        self._lock = threading.Lock()
        self.dim = int(self.embed_pixels(self._no_pixels()).shape[1])

    def __repr__(self) -> str:
        size, backbone = self.transforms.size, self.settings.model.backbone
        return f"EmbeddingModel({self.name!r}, {backbone}, {size}×{size} -> {self.dim}, {self.device})"

    @property
    def config(self) -> Config:
        """The whole configuration of its run.

        Raises:
            UserError: This version does not accept it.
        """
        return self.settings.whole

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that an embedding depends on but the image: equal for a run and its exported folder."""
        s = self.settings
        tensors = {**cpu_tensors(self.trunk), **{f"method.{n}": t for n, t in cpu_tensors(self.method).items()}}
        model = s.model.model_dump(mode="json", exclude=set(ModelConfig.NOT_EMBEDDED))
        transforms = self.transforms.model_dump(mode="json", include={"size", "resize", "squash", "evaluation"})
        parts = json.dumps([model, transforms, s.method, s.precision], sort_keys=True).encode()
        return hashlib.sha256(save_safetensors(tensors) + parts).hexdigest()

    @torch.no_grad()
    def embed(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 64,
        threads: int | None = None,
        progress: bool = False,
    ) -> Float[Tensor, "images dim"]:
        """Embeddings of images, in their order, on the CPU.

        Args:
            images: Paths or URIs of images or folders (all images below, sorted by path), encoded bytes, images of
                Pillow, uint8 arrays or tensors [3, H, W] or [H, W, 3], a batch of those, or an iterator, which is
                consumed as it is needed.
            batch_size: Images in a forward pass.
            threads: Threads that read and decode; None: one a CPU, at most 16.
            progress: Draw a progress bar on stderr.

        Returns:
            [N, D] in the model's precision, float32 or float64. One image gives [1, D], no image [0, D].

        Raises:
            UserError: An image cannot be read (ImageError, which names it), or `images` is something else.
        """
        rows = [self.embed_pixels(self._no_pixels()).cpu()]
        bar = _progress_bar(images) if progress else contextlib.nullcontext(lambda _: None)
        with bar as advance:
            for batch in self.embed_batches(images, batch_size=batch_size, threads=threads):
                if batch.rejected:
                    raise batch.rejected[0]
                rows.append(batch.embeddings)
                advance(len(batch.names))
        return torch.cat(rows)

    def embed_batches(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 64,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[EmbeddedBatch]:
        """As `embed`, batch by batch: memory does not grow with the number of images, and a bad one ends nothing.

        Args:
            images, batch_size, threads: As in `embed`.
            max_pixels: Upper bound for an image's width × height.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected at least 1")
        threads = min(16, os.cpu_count() or 1) if threads is None else threads
        if threads < 1:
            raise UserError(f"threads is {threads}, expected at least 1")
        inputs = image_inputs(images)

        def read(named: tuple[str, ImageInput]) -> tuple[str, Tensor | ImageError]:
            try:
                return named[0], self.preprocess(read_input(*named, max_pixels))
            except ImageError as error:
                return named[0], error

        def next_futures() -> list[Future[tuple[str, Tensor | ImageError]]]:
            return [pool.submit(read, named) for named in islice(inputs, batch_size)]

        with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
            pending = deque(futures for _ in range(PREFETCH) if (futures := next_futures()))
            try:
                while pending:
                    done = [future.result() for future in pending.popleft()]
                    if futures := next_futures():
                        pending.append(futures)
                    yield self._embedded(done)
            finally:
                for futures in pending:
                    for future in futures:
                        future.cancel()

    def _embedded(self, done: list[tuple[str, Tensor | ImageError]]) -> EmbeddedBatch:
        good = [(name, pixels) for name, pixels in done if isinstance(pixels, Tensor)]
        pixels = torch.stack([pixels for _, pixels in good]) if good else self._no_pixels().cpu()
        return EmbeddedBatch(
            [name for name, _ in good],
            pixels,
            self.embed_pixels(pixels).cpu(),
            [error for _, error in done if isinstance(error, ImageError)],
        )

    @torch.no_grad()
    def embed_pixels(self, pixels: UInt8[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of preprocessed images, on the model's device."""
        given = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])  # some networks take no empty batch
        with self._lock:
            features = trunk_features(self.trunk, given.to(self.device), self.settings.precision)
            embeddings: Tensor = self.method.embed(features)
            return embeddings[: len(pixels)]

    def preprocess(self, image: ImageInput) -> UInt8[Tensor, "3 size size"]:
        """The pixels of an image that the network sees: resized and cropped as in an evaluation.

        Raises:
            ImageError: It cannot be read.
        """
        return evaluation_pixels(read_input("image", image), self.transforms)

    def similarity(
        self, a: Float[Tensor, "num dim"], b: Float[Tensor, "others same_dim"]
    ) -> Float[Tensor, "num others"]:
        """How similar each row of `a` is to each of `b`, larger is nearer: the cosine, or minus the Euclidean distance.

        Which of them is the run's `evaluation.distance`.
        """
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != self.dim or b.shape[1] != self.dim:
            raise UserError(f"got embeddings {list(a.shape)} and {list(b.shape)}, expected [N, {self.dim}] twice")
        if self.distance == "euclidean":
            return -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T

    def _no_pixels(self) -> Tensor:
        size = self.transforms.size
        return torch.zeros(0, 3, size, size, dtype=torch.uint8, device=self.device)


@contextlib.contextmanager
def _progress_bar(images: Any) -> Iterator[Any]:
    """A bar of the images done, and of how many there are where that is known; gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    total = len(images) if hasattr(images, "__len__") and not isinstance(images, str | bytes) else None
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda number: bar.advance(task, number)


__all__ = ["EmbeddedBatch", "EmbeddingModel"]
