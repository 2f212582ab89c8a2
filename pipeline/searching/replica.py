"""The service in Ray Serve: a replica holds the model and the index, and embeds images that arrive together as one batch."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from ray import serve
from torch import Tensor

from pipeline.searching.gate import Limits
from pipeline.searching.index import SearchIndex
from pipeline.searching.service import SearchService, application

MAX_BATCH = 16  # images in a forward pass
BATCH_WAIT_S = 0.005  # how long the first image of a batch waits for others


@serve.ingress()
class Replica:
    """One process that answers.

    Args:
        index: Folder of the index.
        model: Where the model is; None: where the index says.
        limits: Of a request.
        max_pixels: Largest width × height of an image.
        threads: Threads of PyTorch, and images that are decoded at once.
    """

    def __init__(self, index: str, model: str | None, limits: Limits, max_pixels: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.limits = limits
        opened = SearchIndex(index, model)
        self.service = SearchService(opened, self.embed, max_pixels=max_pixels, threads=threads)
        self.forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
        size = opened.model.transforms.size
        self._embed([torch.zeros(3, size, size, dtype=torch.uint8)])  # the first query is as fast as the others
        opened.search_embeddings(np.ones((1, opened.manifest.dim)), 1)

    def __serve_build_asgi_app__(self) -> Any:
        return application(self.service, self.limits)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def embed(self, images: list[Tensor]) -> list[np.ndarray]:
        """Embeddings of images that arrived together."""
        self.service.batches.observe(len(images))
        return await asyncio.get_running_loop().run_in_executor(self.forward, self._embed, images)

    def _embed(self, images: list[Tensor]) -> list[np.ndarray]:
        return list(self.service.model.embed_pixels(torch.stack(images)).cpu().numpy())


__all__ = ["Replica"]
