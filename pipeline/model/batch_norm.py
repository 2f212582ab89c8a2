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
            if self.track_running_stats and self.num_batches_tracked is not None:
                some = num > 0  # no image on any rank: nothing to learn from; on the device, which nothing waits for
                self.num_batches_tracked.add_(some)
                share = 1 / self.num_batches_tracked.clamp(min=1).double() if self.momentum is None else self.momentum
                unbiased = variance * (count / (count - 1).clamp(min=1))
                for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
                    assert running is not None
                    running.lerp_(value.to(running.dtype), (some.double() * share).to(running.dtype))
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
