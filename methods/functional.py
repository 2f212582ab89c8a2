"""Pieces that several methods share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """Linear layer and L2 norm: pooled features [B, F] to embeddings [B, D] of length 1."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, dim)

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        return nn.functional.normalize(self.linear(features))


@contextlib.contextmanager
def global_generators(*seed: int) -> Iterator[None]:
    """Seeds torch's and numpy's global generators inside the block and restores them after it.

    For third-party losses and miners that draw from them: what they draw then depends on `seed` alone.
    """
    state = np.random.get_state()
    words = np.random.SeedSequence(seed).generate_state(2)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))
        try:
            yield
        finally:
            np.random.set_state(state)
