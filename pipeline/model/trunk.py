"""The trunk: a backbone, its pooling, and the mode of its batch normalisation.

uint8 [B, 3, S, S] -> normalise on the device -> backbone -> pooled features [B, F]
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from jaxtyping import Float, UInt8
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.model.backbones import Pool, build_backbone
from pipeline.model.batch_norm import SyncBatchNorm2d, SyncBatchNormAct2d
from pipeline.model.bn_folding import Folding


class Trunk(nn.Module):
    """Backbone and pooling; the part that DDP wraps.

    Attributes:
        features: Width F of the pooled features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.config = config
        self.backbone, mean, std = build_backbone(config)
        self.register_buffer("mean", torch.tensor(config.mean or mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std or std).view(3, 1, 1), persistent=False)
        self.pool = Pool(config.pooling) if config.pooling != "native" else None
        if config.channels_last:
            self.backbone = self.backbone.to(memory_format=torch.channels_last)
        self.folding: Folding | None = None
        self.features = self._width(size)

    def _width(self, size: int) -> int:
        self.eval()
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        try:
            self.folding = Folding(self.backbone, self.normalise(pixels))
            with torch.no_grad():
                return int(self(pixels).shape[1])
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.config.backbone} cannot take images of {size}×{size}: {error}") from error

    def normalise(self, pixels: Tensor) -> Tensor:
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def forward(self, pixels: UInt8[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch features"]:
        with self.folding() if self.folding else nullcontext():
            maps = self.backbone(self.normalise(pixels))
        if self.pool is None or maps.ndim == 2:  # torchvision networks pool inside
            return maps.flatten(1)
        if maps.ndim != 4:
            raise UserError(
                f"{self.config.backbone} gives {tuple(maps.shape)} instead of a feature map: set model.pooling to native"
            )
        return self.pool(maps).flatten(1)

    def set_mode(self, training: bool, ranks: Ranks) -> None:
        """Training or evaluation mode, with batch normalisation as configured."""
        self.train(training)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.config.batch_norm == "frozen":
                module.eval()
            if isinstance(module, SyncBatchNorm2d):
                module.ranks = ranks


def build_trunk(config: ModelConfig, size: int) -> Trunk:
    """Makes the trunk and loads its weights.

    Args:
        config: The model section of the config.
        size: Side of the images in pixels; the network is run once on an image of this size to find its width.

    Raises:
        UserError: The backbone is unknown, weights are missing or do not fit, or it cannot take this size or pooling.
    """
    trunk = Trunk(config, size)
    if config.batch_norm == "sync":
        for module in trunk.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d  # keeps parameters and their names
            elif type(module) is BatchNormAct2d:
                module.__class__ = SyncBatchNormAct2d  # type: ignore[assignment]
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm2d):
                raise UserError(
                    f"batch_norm: sync does not know {type(module).__name__} of {config.backbone}: use frozen or local"
                )
    return trunk
