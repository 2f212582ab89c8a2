"""Losses of a user: one that prints, warns and fails on rank 1 in its second step, one that hangs there once."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning.losses import MultiSimilarityLoss


class LossThatPrints(MultiSimilarityLoss):
    calls = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        print("printed by a user's loss")
        warnings.warn("a warning of a user's loss", stacklevel=1)
        if self.calls == 2 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("no memory is left here")
        return super().forward(*arguments, **options)


class LossThatFails(MultiSimilarityLoss):
    """Fails on rank 1 in its third step in a way that a restart would not heal."""

    calls = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls >= 3 and dist.is_initialized() and dist.get_rank() == 1:
            raise ValueError("of rank 1 alone")
        return super().forward(*arguments, **options)


class LossThatHangs(MultiSimilarityLoss):
    """Hangs on rank 1 in its fifth step, unless the file `marker` is there."""

    def __init__(self, marker: str, **options: Any) -> None:
        super().__init__(**options)
        self.marker, self.calls = Path(marker), 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == 5 and dist.is_initialized() and dist.get_rank() == 1 and not self.marker.exists():
            self.marker.touch()
            time.sleep(10_000)
        return super().forward(*arguments, **options)
