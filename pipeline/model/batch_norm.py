"""Batch normalisation over the images of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.distributed.collectives import Ranks, SumOverRanks


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the images of all ranks, on any device and backend, empty shards included.

    Mean from count-weighted sums, variance from squared deviations in a second sum (not E[x²] - E[x]²), at least in
    float32; gradients flow through both. PyTorch's own SyncBatchNorm refuses the CPU.
    """

    ranks = Ranks()

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        num = self._sum(torch.full((), x.numel() // max(1, x.shape[1]), dtype=x.dtype, device=x.device))
        count = num.clamp(min=1)
        mean = self._sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = self._sum((centred * centred).sum((0, 2, 3))) / count
        with torch.no_grad():
            # no image on any rank: nothing to learn from
            if num > 0 and self.track_running_stats and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)  # type: ignore[union-attr]
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)  # type: ignore[union-attr]
        normalised = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            normalised = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return normalised.to(input.dtype)

    def _sum(self, value: Tensor) -> Tensor:
        return value if self.ranks.world == 1 else SumOverRanks.apply(value)


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """timm's batch normalisation with its activation, over all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[operator]
