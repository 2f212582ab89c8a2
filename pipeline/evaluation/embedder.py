"""Embeds any number of images or tracklets; the ranks share the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from methods import Method
from pipeline.config import Config
from pipeline.data.copy_ahead import on_device
from pipeline.data.loader import ImageSource, LoadRequest, load
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks, gather
from pipeline.evaluation.tracklets import TrackSums
from pipeline.model.network import trunk_features


@runtime_checkable
class EvaluatedTrunk(Protocol):
    """What an evaluation needs of a trunk: an exported network has it, too."""

    def set_mode(self, training: bool, ranks: Ranks) -> None: ...

    def __call__(self, pixels: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Embedder:
    """Computes embeddings of sample ids.

    Attributes:
        source: Store and transforms of the images.
        engine: Loader engine, "ray" or "in_process".
        loader_cpus: CPUs of a Ray Data pipeline.
        batch_size: Images in a forward pass.
        precision: The run's precision; bf16 runs the trunk in autocast.
        device: Device of the trunk.
        ranks: The ranks that share the work.
    """

    source: ImageSource
    engine: str
    loader_cpus: int
    batch_size: int
    precision: str
    device: torch.device
    ranks: Ranks

    @torch.no_grad()
    def __call__(
        self, ids: Int64[np.ndarray, " images"], trunk: EvaluatedTrunk, method: Method | None
    ) -> Float[Tensor, "images dim"]:
        """Embeddings of the given store ids (pooled features if there is no method), on every rank.

        Leaves trunk and method in evaluation mode.
        """
        self._set_evaluation_mode(trunk, method)
        local = self.ranks.slice(len(ids))
        batches = [*self._batches(ids, trunk, method)] or [self._embed(self._no_pixels(), trunk, method)]
        return gather(torch.cat(batches), local.start, len(ids), self.ranks)

    @torch.no_grad()
    def embed_tracklets(
        self,
        ids: Int64[np.ndarray, " frames"],
        tracks: Int64[np.ndarray, " frames"],
        trunk: EvaluatedTrunk,
        method: Method | None,
    ) -> Float[Tensor, "tracks dim"]:
        """The mean embedding of each tracklet, at length one, tracklets ascending, on every rank.

        No rank keeps more frames than a batch: each rank sums its share, and the sums are added
        over the ranks.

        Raises:
            ValueError: The mean of a tracklet is zero or not finite.
        """
        self._set_evaluation_mode(trunk, method)  # before any pass: one in training mode would move running statistics
        sums = TrackSums.empty(tracks, self._embed(self._no_pixels(), trunk, method).shape[1])
        start = self.ranks.slice(len(ids)).start
        for embeddings in self._batches(ids, trunk, method):
            sums.add(embeddings, tracks[start : start + len(embeddings)])
            start += len(embeddings)
        totals = (self.ranks.sum(t.to(self.device)).cpu() for t in (sums.sums, sums.counts))
        return TrackSums(sums.tracks, *totals).rows()

    def _set_evaluation_mode(self, trunk: EvaluatedTrunk, method: Method | None) -> None:
        trunk.set_mode(False, self.ranks)
        if method is not None:
            method.eval()

    def _batches(self, ids: np.ndarray, trunk: EvaluatedTrunk, method: Method | None) -> Iterator[Tensor]:
        """Embeddings of this rank's share, batch by batch."""
        local = self.ranks.slice(len(ids))
        requests = [
            LoadRequest(ids[i : min(i + self.batch_size, local.stop)])
            for i in range(local.start, local.stop, self.batch_size)
        ]
        pixels = load(self.source, requests, self.engine, self.loader_cpus)
        with contextlib.closing(on_device(pixels, self.device)) as pixel_stream:
            for batch in pixel_stream:
                yield self._embed(batch.to(self.device, non_blocking=True), trunk, method)

    def _embed(self, pixels: Tensor, trunk: EvaluatedTrunk, method: Method | None) -> Tensor:
        given = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])  # some networks take no empty batch
        features = trunk_features(trunk, given, self.precision)[: len(pixels)]
        return features if method is None else method.embed(features)

    def _no_pixels(self) -> Tensor:
        size = self.source.transforms.size
        return torch.zeros(0, 3, size, size, dtype=torch.uint8, device=self.device)


def build_embedder(
    config: Config, store: Store, device: torch.device, ranks: Ranks, loader: str, loader_cpus: int
) -> Embedder:
    """An embedder of a store's images with the transforms of evaluation, read without the cache.

    Args:
        config: The run's configuration.
        store: The dataset.
        device: Device of trunk and method.
        ranks: The ranks that share the work.
        loader: "ray" or "in_process".
        loader_cpus: CPUs of a Ray Data pipeline.
    """
    source = ImageSource(store.folder.uri, store.fingerprint, None, config.data.transforms.of_evaluation())
    return Embedder(source, loader, loader_cpus, config.evaluation.batch_size, config.precision, device, ranks)
