"""A user's loss that prints, warns, and fails on rank 1 in its second step."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist
from pytorch_metric_learning.losses import MultiSimilarityLoss


class LossThatPrints(MultiSimilarityLoss):
    calls = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        print("printed by a user's loss")
        warnings.warn("a warning of a user's loss", stacklevel=1)
        if self.calls == 2 and dist.get_rank() == 1:
            1 / 0  # noqa: B018
        return super().forward(*arguments, **options)
